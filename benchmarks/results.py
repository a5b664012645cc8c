"""Where measurements are kept, one table in which the newest one of a case takes the place of older ones; and how they
are shown: in Markdown, and in a README."""

import datetime
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils import collect_env

from .shapes import MAIN, MAIN_N

RESULTS = Path(__file__).resolve().parent / "results"
#: What a row is of; the others are what was measured, and where.
KEYS = ("kind", "op", "variant", "shape", "n", "d", "v", "dtype", "training", "candidate", "phase")

MARKERS = ("<!-- benchmark table -->", "<!-- /benchmark table -->")
#: What the README shows: a call in words, its op and what else tells its rows from the others of that op.
_SHOWN: dict[str, tuple[str, dict[str, object]]] = {
    f"`linear_logp`, N {MAIN_N}, bf16": ("linear_logp", {"dtype": "bfloat16"}),
    "… with a backward pass": ("linear_logp", {"dtype": "bfloat16", "training": True}),
    "`linear_delta_logp`, the same": ("linear_delta_logp", {"dtype": "bfloat16"}),
    "… with a backward pass, frozen base": ("linear_delta_logp", {"dtype": "bfloat16", "training": True}),
    f"`logp` of logits [{MAIN_N}, V], fp32": ("logp", {"dtype": "float32"}),
    "`delta_logp` of two of them": ("delta_logp", {"dtype": "float32"}),
    f"`linear_policy_loss`, N {MAIN_N}, all gradients, bf16": (
        "linear_policy_loss",
        {"dtype": "bfloat16", "training": True},
    ),
    "the same, fp32": ("linear_policy_loss", {"dtype": "float32", "training": True}),
    "`policy_loss`, 64 × 4096 tokens": ("policy_loss", {"variant": "DAPO", "training": True}),
    "`extrapolated_sample`, 8 rows, top-p 0.7": ("extrapolated_sample", {"variant": "top-p 0.7"}),
    "`linear_extrapolated_sample`, 8 rows, top-p 0.7, bf16": ("linear_extrapolated_sample", {"variant": "top-p 0.7"}),
    "`hf.generate`, the demo pair": ("hf.generate", {}),
}
#: What of an op's candidates the README compares ours with, and how it is called there.
_OTHERS = {
    "matmul": "the bare products",
    "read": "one pass over the logits",
    "forwards": "the models' forwards",
    "eager": "eager",
    "compiled": "`torch.compile`",
    "TRL": "TRL's loss",
    "warpers": "`transformers`' warpers",
    "generate calls": "two `generate` calls a token",
}


def environment(device: torch.device) -> tuple[dict[str, Any], str]:
    """What each row says of where it was measured, and all that `torch.utils.collect_env` says.

    On a busy machine (`load`) figures mean little: a thread that shares its core delays the others at every barrier.
    """
    known = collect_env.get_env_info()
    model = re.search(r"Model name:\s*(.+)", known.cpu_info or "")
    failed, commit, _ = collect_env.run(f"git -C {RESULTS} describe --always --abbrev=10 --dirty")
    columns = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": "" if failed else commit,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else model[1] if model else "",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }
    return columns, collect_env.pretty_str(known)


def read(path: Path) -> pd.DataFrame:
    text = {"variant": "", "skipped": ""}
    return pd.read_csv(path, dtype=dict.fromkeys(text, str)).fillna(text)


def merged(old: pd.DataFrame | None, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """`old` with `rows` added, which replace the rows of the same case, candidate and phase."""
    tables = [pd.DataFrame(rows)] if old is None else [old, pd.DataFrame(rows)]
    found = pd.concat(tables, ignore_index=True).fillna({"variant": ""})
    return found.drop_duplicates([*KEYS], keep="last", ignore_index=True)


def write(table: pd.DataFrame, path: Path) -> None:
    """Replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    table.to_csv(part, index=False, float_format="%.5g")
    part.replace(path)


def measured(table: pd.DataFrame) -> str:
    """A line for each row, as a run prints them: time, and over that of ours; memory; or why there is none."""
    cells = [["op", "N, V", "candidate", "phase", "measured", "× ours"], ["---"] * 6]
    for row in table.to_dict("records"):
        found = {name: value for name, value in row.items() if pd.notna(value)}
        figure = found.get("skipped") or (
            f"{found['ms']:.4g} ms ({found['p20_ms']:.4g} … {found['p80_ms']:.4g})"
            if row["kind"] == "time"
            else f"{found['peak_mib']:.0f} MiB over inputs and outputs"
        )
        what = " ".join(filter(None, (f"`{row['op']}`", found.get("variant"), row["dtype"])))
        over = f"{found['over_ours']:.2f}" if "over_ours" in found else ""
        cells.append([what, f"{row['n']}, {row['v']}", row["candidate"], row["phase"], figure, over])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def ratios(table: pd.DataFrame) -> str:
    """What the README says: time of ours, and how many times that others took in the same rounds."""
    cells = [["call", "time", "others’ time over that"], ["---", "---", "---"]]
    cells += [[what, *found] for what, (op, wanted) in _SHOWN.items() for found in _ratios(table, op, wanted)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _ratios(table: pd.DataFrame, op: str, wanted: dict[str, object]) -> Iterator[list[str]]:
    training = bool(wanted.get("training"))
    shown = table[(table.kind == "time") & (table.op == op) & (table.phase == ("both" if training else "forward"))]
    shown = shown[shown.ms.notna() & shown["shape"].isin([MAIN.name, "B=64 T=4096", "demo pair"])]
    shown = shown[shown.n == MAIN_N] if "logp" in op or op == "linear_policy_loss" else shown
    for name, value in ({"variant": "", "training": False} | wanted).items():
        shown = shown[shown[name] == value]
    by_name = {row.candidate: row for row in shown.itertuples()}
    if "ours" in by_name:
        over = {name: by_name[name].over_ours for name in _OTHERS if name in by_name}
        others = [f"{_OTHERS[name]} {ratio:.{2 if ratio < 10 else 0}f} ×" for name, ratio in over.items()]
        ours = by_name["ours"]
        yield [f"{ours.ms:.0f} ms" if ours.ms >= 10 else f"{ours.ms:.1f} ms", ", ".join(others)]


def put_into(readme: Path, text: str, markers: tuple[str, str] = MARKERS) -> None:
    """Replace what stands between the markers in `readme`."""
    begin, end = markers
    content = readme.read_text()
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{readme} needs one {begin} and after it one {end}")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
