"""A picture of time and memory over N, from stored results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .records import Record, Run
from .shapes import MAIN

#: Colour and width of a line; colours that the colour-blind tell apart as well.
_STYLES = {
    "ours": ("#0060b0", 2.4),
    "eager": ("#c04000", 1.5),
    "compiled": ("#9a7d0a", 1.5),
    "chunked": ("#7a5195", 1.5),
}
_GREY = "#666666"
_OPS = ("linear_logp", "linear_delta_logp")
_FONT: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(runs: Sequence[Run], path: Path) -> None:
    """Time over that of the bare matmuls, and peak memory, for each candidate."""
    records = [entry for run in runs for entry in run.records if entry.skipped is None]
    ops = [op for op in _OPS if any(entry.op == op and entry.case == "sweep" for entry in records)]
    if not ops:
        raise ValueError("the results have no sweep over N: it is not in a quick run")
    with mpl.rc_context(_FONT):
        figure = Figure(figsize=(9.4, 0.5 + 3.1 * len(ops)), layout="constrained")
        for row, op in zip(figure.subplots(len(ops), 2, squeeze=False), ops, strict=True):
            _draw_time(row[0], op, _series(records, op, "sweep"))
            _draw_memory(row[1], op, _series(records, op, "sweep memory"))
        figure.suptitle(f"Forward, bf16, D = {MAIN.d}, V = {MAIN.v}  ({_machine(runs)})", fontsize=11)
        figure.savefig(path, dpi=150)


def _series(records: Sequence[Record], op: str, case: str) -> dict[str, list[Record]]:
    """Records of each candidate, by N; of several runs the last one."""
    found = {(e.candidate, e.n): e for e in records if e.op == op and e.case == case and e.candidate in _STYLES}
    return {name: [found[key] for key in sorted(found) if key[0] == name] for name in _STYLES}


def _draw_time(axes: Axes, op: str, series: dict[str, list[Record]]) -> None:
    matmuls = "two bare matmuls" if "delta" in op else "a bare matmul"
    axes.set_title(f"{op}: time ÷ {matmuls}", loc="left")
    axes.axhline(1, color=_GREY, lw=1, ls="--")
    for name, entries in series.items():
        color, width = _STYLES[name]
        n = [entry.n for entry in entries]
        spread = [entry.ratios["matmul"] for entry in entries]
        if not n:
            continue
        axes.plot(n, [median for median, _, _ in spread], "o-", color=color, lw=width, ms=4)
        axes.fill_between(n, [low for _, low, _ in spread], [high for _, _, high in spread], color=color, alpha=0.15)
    _name_ends(axes, {name: (e[-1].n, e[-1].ratio_to("matmul")) for name, e in series.items() if e})
    low, high = axes.get_ylim()
    fine, coarse = (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8), tuple(2.0**k for k in range(-3, 9))
    _ticks(axes, series, fine if high / low < 10 else coarse, " ×")


def _draw_memory(axes: Axes, op: str, series: dict[str, list[Record]]) -> None:
    axes.set_title(f"{op}: peak memory beyond inputs and outputs", loc="left")
    ends = {}
    for name, entries in series.items():
        color, width = _STYLES[name]
        # Less than a page is not to be had; on a logarithmic axis 0 has no place.
        mib = [max(1.0, entry.peak_mib or 0.0) for entry in entries]
        axes.plot([entry.n for entry in entries], mib, "o-", color=color, lw=width, ms=4)
        if mib:
            ends[name] = (entries[-1].n, mib[-1])
    axes.set_yscale("log", base=2)
    _name_ends(axes, ends)
    _ticks(axes, series, tuple(4**k for k in range(9)), "")
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda mib, _: f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB")
    )


def _ticks(axes: Axes, series: dict[str, list[Record]], values: Sequence[float], unit: str) -> None:
    sizes = sorted({entry.n for entries in series.values() for entry in entries})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([value for value in values if low <= value <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}{unit}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#e4e4e4", lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("N, tokens")
    if sizes:
        # Room for the names at the ends of the lines.
        axes.set_xlim(sizes[0] * 0.8, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.25)


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Each line's name at its end, moved apart where lines meet."""
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    least_gap = (high / low) ** 0.065
    previous = 0.0
    for name, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        at = max(y, previous * least_gap)
        previous = at
        axes.annotate(
            name,
            (x, at),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=_STYLES[name][0],
            weight="bold" if name == "ours" else "normal",
        )
    # The highest name may have moved above the lines.
    axes.set_ylim(low, max(high, previous * least_gap))


def _machine(runs: Sequence[Run]) -> str:
    env = runs[-1].environment
    return f"{env['machine']}, {env['threads']} threads, torch {env['versions']['torch']}, {env['date'][:10]}"
