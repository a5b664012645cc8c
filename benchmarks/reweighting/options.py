"""The methods, and the command line of `python -m benchmarks reweighting`: what needs no trl."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..records import RESULTS

#: By α. `none` is DAPO. The others share one α and none was tuned: `low_prob` weighs 1 to 1.2, `dominate` 0.8 to 1.
METHODS = {"none": 0.0, "low_prob": 0.2, "dominate": 0.2, "ppl": 0.2}
FOLDER = RESULTS / "reweighting"
SEEDS = 5
ROLLOUTS = 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of each method (default {SEEDS})")
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help=f"of each run (default {ROLLOUTS})")
    parser.add_argument("--threads", type=int, default=1, help="default 1: the model is too small for more")
    parser.add_argument(
        "--runs", type=Path, default=Path("build/reweighting"), metavar="DIR", help="a JSON for each finished run"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="folder for JSON, table and figure")
    parser.add_argument("--only-summary", action="store_true", help="train nothing: sum up the runs that there are")
