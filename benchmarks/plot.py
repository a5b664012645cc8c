"""The picture of the README: time and memory over N, from the table of results."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .shapes import MAIN, SWEEP_N

#: Colour and width of a line; colours that the colour-blind tell apart as well.
_STYLES = {
    "ours": ("#0060b0", 2.4),
    "eager": ("#c04000", 1.5),
    "compiled": ("#9a7d0a", 1.5),
    "chunked": ("#7a5195", 1.5),
}
_OPS = ("linear_logp", "linear_delta_logp")
_FONT: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False}


def draw(table: pd.DataFrame, path: Path) -> None:
    """Time over that of the bare matmuls, and peak memory, of each candidate."""
    swept = (table["shape"] == MAIN.name) & (table.dtype == "bfloat16") & ~table.training & (table.variant == "")
    table = table[swept & table.n.isin(SWEEP_N)].sort_values("n")
    ops = [op for op in _OPS if op in set(table.op)]
    if not ops:
        raise ValueError("the results have no sweep over N: it is not in a quick run")
    with mpl.rc_context(_FONT):
        figure = Figure(figsize=(9.4, 0.5 + 3.1 * len(ops)), layout="constrained")
        for (left, right), op in zip(figure.subplots(len(ops), 2, squeeze=False), ops, strict=True):
            matmuls = "two bare matmuls" if "delta" in op else "a bare matmul"
            times = table[(table.op == op) & (table.kind == "time")].pivot(index="n", columns="candidate")["over_ours"]
            _lines(left, times.div(times["matmul"], axis=0), f"{op}: time ÷ {matmuls}", lambda x, _: f"{x:g} ×")
            left.axhline(1, color="#666666", lw=1, ls="--")
            memory = table[(table.op == op) & (table.kind == "memory")]
            # Less than a page is not to be had; on a logarithmic axis 0 has no place.
            peaks = memory.pivot(index="n", columns="candidate")["peak_mib"].clip(lower=1.0)
            _lines(right, peaks, f"{op}: peak memory beyond inputs and outputs", _size)
        last = table.iloc[-1]
        where = f"{last.machine}, {last.threads} threads, torch {last.torch}, {last.date}"
        figure.suptitle(f"Forward, bf16, D = {MAIN.d}, V = {MAIN.v}  ({where})", fontsize=11)
        figure.savefig(path, dpi=150)


def _size(mib: float, _: object) -> str:
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB"


def _lines(axes: Axes, values: pd.DataFrame, title: str, form: Any) -> None:
    """A line a candidate over N, both axes logarithmic."""
    for name, (color, width) in _STYLES.items():
        if name in values:
            line = values[name].dropna()
            axes.plot(line.index, line, "o-", color=color, lw=width, ms=4, label=name)
    axes.set(title=title, xlabel="N, tokens", xscale="log", yscale="log")
    low, high = axes.get_ylim()
    # Half steps where the lines are near one another.
    step = 0.5 if high / low < 10 else 1 if high / low < 100 else 2
    powers = [2 ** (step * k) for k in range(int(-4 / step), int(18 / step))]
    within = [round(x, 1 if step < 1 else 4) for x in powers if low <= x <= high]
    ticks = ((axes.xaxis, [*values.index], "{x:.0f}"), (axes.yaxis, within, FuncFormatter(form)))
    for axis, places, formatter in ticks:
        axis.set_major_locator(FixedLocator(places))
        axis.set_major_formatter(formatter)
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#e4e4e4", lw=0.7)
    axes.legend(frameon=False)
