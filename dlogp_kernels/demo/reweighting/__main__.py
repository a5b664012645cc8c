"""`python -m dlogp_kernels.demo.reweighting`: train each method with each seed, then sum up.

A run that has ended leaves a JSON of its own and is never done again: what was stopped goes on with the next one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils import collect_env

from ...jobs import doctor
from ...report.files import write_atomically
from ...report.pictures import render
from ...report.training_curves import Group, TrainingRun, draw_training
from . import summary, training
from .training import METHODS, Budget

#: The settings that differ between runs.
_OWN = ("method", "alpha", "seed")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dlogp_kernels.demo.reweighting", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="of each method (default %(default)s)")
    parser.add_argument("--rollouts", type=int, default=14, help="of each run (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default 1: the model is too small for more")
    runs, out = Path("build/reweighting"), Path("benchmarks/results/reweighting")
    parser.add_argument("--runs", type=Path, default=runs, metavar="DIR", help="a JSON for each finished run")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="folder for JSON, table and figure")
    parser.add_argument("--only-summary", action="store_true", help="train nothing: sum up the runs that there are")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not options.only_summary:
        run_all(options.runs, range(options.seeds), Budget(rollouts=options.rollouts))
    results = collect(options.runs)
    for path in write(results, options.out):
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
                run = training.train(method, seed, budget)
                _write(path, {**run, "environment": where})
                _progress(f"seed {seed} {method}: avg {run['evaluation']['avg']:.4f}, {run['seconds']['all']:.0f} s")


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


def write(results: dict[str, Any], directory: Path) -> list[Path]:
    """Write `reweighting.json`, `.md` and `.png`; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"reweighting.{kind}" for kind in ("json", "md", "png")]
    write_atomically(paths[0], (_json(results) + "\n").encode())
    write_atomically(paths[1], summary.markdown(results).encode())
    write_atomically(paths[2], render(draw_training(_groups(results)), "png"))
    return paths


def _groups(results: dict[str, Any]) -> list[Group]:
    """The curves of each method's runs, by optimiser step."""
    of_method: dict[str, list[TrainingRun]] = {}
    for run in results["runs"]:
        curves = pd.DataFrame(run["curves"])
        curves["step"] = results["settings"]["minibatches"] * curves["rollout"]
        of_method.setdefault(run["method"], []).append(TrainingRun(str(run["seed"]), {}, curves.to_dict("records")))
    return [Group(summary.NAMES[method], runs) for method, runs in of_method.items()]


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
    """Machine, versions, commit (with "-dirty" where files are changed) and date."""
    failed, commit, _ = collect_env.run(f"git -C {Path(__file__).parent} describe --always --abbrev=10 --dirty")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": doctor.examine()["processor"]["name"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl", "dlogp_kernels")},
        },
        "commit": None if failed else commit,
    }


def _json(results: dict[str, Any]) -> str:
    """A run a line: a diff shows which."""
    head = {name: value for name, value in results.items() if name != "runs"}
    runs = ",\n".join(json.dumps(run, ensure_ascii=False) for run in results["runs"])
    return json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}") + f',\n "runs": [\n{runs}\n]}}'


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, ensure_ascii=False) + "\n").encode())


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
