"""The command line of `python -m benchmarks reweighting`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..records import RESULTS

SEEDS = 5
ROLLOUTS = 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of each method (default {SEEDS})")
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help=f"of each run (default {ROLLOUTS})")
    parser.add_argument("--threads", type=int, default=1, help="default 1: the model is too small for more")
    parser.add_argument(
        "--runs", type=Path, default=Path("build/reweighting"), metavar="DIR", help="a JSON for each finished run"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder for JSON, table and figure")
    parser.add_argument("--only-summary", action="store_true", help="train nothing: sum up the runs that there are")
