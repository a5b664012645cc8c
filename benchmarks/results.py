"""Where measurements are kept: one table, in which the newest measurement of a case takes the place of older ones."""

import datetime
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils import collect_env

RESULTS = Path(__file__).resolve().parent / "results"
#: What a row is of; the others are what was measured, and where.
KEYS = ("kind", "op", "variant", "shape", "n", "d", "v", "dtype", "training", "candidate", "phase")


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
