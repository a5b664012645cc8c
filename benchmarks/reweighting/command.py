"""`python -m benchmarks reweighting`: train each method with each seed, then sum up.

A run that has ended leaves a JSON of its own and is never done again: what was stopped goes on with the next one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dlogp_kernels.report.files import write_atomically

from ..records import environment
from . import summary, training
from .options import METHODS
from .training import Budget


def command(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    budget = Budget(rollouts=options.rollouts)
    if not options.only_summary:
        run_all(options.runs, range(options.seeds), budget)
    results = collect(options.runs)
    for path in summary.write(results, options.out):
        _progress(f"wrote {path}")
    print(summary.table(results))


def run_all(directory: Path, seeds: range, budget: Budget) -> None:
    """Every run that `directory` does not have yet, each written when it has ended."""
    directory.mkdir(parents=True, exist_ok=True)
    where = _environment()
    base = directory / "base.json"
    if _missing(base, wanted := {"num_problems": budget.num_problems, "samples": budget.samples_per_problem}):
        _write(base, {**wanted, "evaluation": training.evaluate_base(budget)})
    for seed in seeds:
        # All methods of a seed: what was stopped has whole pairs.
        for method in METHODS:
            path = directory / f"seed-{seed}-{method}.json"
            if _missing(path, training.settings(method, seed, budget)):
                begin = time.monotonic()
                run = training.train(method, seed, budget)
                _write(path, {**run, "environment": where})
                _progress(f"seed {seed} {method}: avg {run['evaluation']['avg']:.4f}, {time.monotonic() - begin:.0f} s")


def collect(directory: Path) -> dict[str, Any]:
    """What `directory` has, as one: `environment`, `settings` that all runs share, `base`, `runs`."""
    paths = sorted(directory.glob("seed-*.json"))
    if not paths:
        raise SystemExit(f"{directory} has no finished run")
    runs = [json.loads(path.read_text()) for path in paths]
    environments = [run.pop("environment") for run in runs]
    shared = {name: runs[0][name] for name in training.settings("none", 0, Budget(0)) if name not in _OWN}
    for path, run in zip(paths, runs, strict=True):
        for name, value in shared.items():
            if run.pop(name) != value:
                raise SystemExit(f"{path}: {name} is not {value}, as in {paths[0]}")
    base = json.loads((directory / "base.json").read_text())["evaluation"]
    runs.sort(key=lambda run: (run["seed"], list(METHODS).index(run["method"])))
    return {"environment": environments[0], "settings": shared, "base": base, "runs": runs}


#: The settings that differ between runs.
_OWN = ("method", "alpha", "seed")


def _missing(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether `path` is not there; with other settings in it, an error."""
    if not path.exists():
        return True
    found = json.loads(path.read_text())
    for name, value in wanted.items():
        if found[name] != value:
            raise SystemExit(f"{path} is of {name} {found[name]}, not {value}: give another folder as --runs")
    return False


def _environment() -> dict[str, Any]:
    where = environment(torch.device("cpu"))
    where["versions"] |= {name: importlib.metadata.version(name) for name in ("transformers", "trl")}
    return where


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, ensure_ascii=False) + "\n").encode())


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
