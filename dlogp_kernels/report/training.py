"""The log of `dlogp train`: one JSON object a step, and the same as CSV.

DIR/log.jsonl   a line a step that was logged, in order: `COLUMNS`, those that there is something to say of
DIR/log.csv     the same; it is written anew with every checkpoint
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import DatasetError
from .jsonl import MAX_LINE_BYTES, written_lines
from .tables import csv_table

LOG_FILE, CSV_FILE = "log.jsonl", "log.csv"

#: Name in the log → what it is called by the trainer.
COLUMNS = {
    "step": None,
    "accuracy": "rewards/grade/mean",
    "eval_accuracy": None,
    "eval_accuracy_standard_error": None,
    "eval_length": None,
    "entropy": "entropy",
    "length": "completions/mean_length",
    "unfinished": "completions/clipped_ratio",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "mean_weight": "reweight/mean_weight",
    "delta_logp": "delta_logp/mean",
    "delta_logp_min": "delta_logp/min",
    "delta_logp_max": "delta_logp/max",
    "delta_logp_below_-1": "delta_logp/below_-1",
    "delta_logp_above_0.25": "delta_logp/above_0.25",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clip_dual": "clip_ratio/dual_mean",
    "approx_kl": "approx_kl",
    "ref_kl": "kl",
    "ratio": "ratio/mean",
    "ratio_max": "ratio/max",
    "reward": "reward",
    "dropped": "dynamic_sampling/dropped",
    "refills": "dynamic_sampling/refills",
    "grader_errors": "grader_errors",
    "step_seconds": "step_time",
}


def to_entry(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the log says of a step, out of what the trainer logged."""
    named = {name: metrics.get(key) for name, key in COLUMNS.items() if key is not None}
    return {"step": step} | {name: value for name, value in named.items() if value is not None}


def to_line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, allow_nan=False) + "\n").encode()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log; a last line that a killed process left unfinished is left out.

    Raises DatasetError with the line's number for one that is not an entry.
    """
    for number, line in written_lines(path, MAX_LINE_BYTES):
        try:
            entry = json.loads(line)
            entry["step"] = int(entry["step"])
            for name, value in entry.items():
                if not isinstance(value, int | float):
                    raise TypeError(f"{name} is {value!r:.60}")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DatasetError(f"{path}: line {number} is not an entry of a log of training: {error!r}") from error
        yield entry


def to_csv(entries: Sequence[Mapping[str, Any]]) -> bytes:
    return csv_table(list(COLUMNS), ([entry.get(name) for name in COLUMNS] for entry in entries)).encode()
