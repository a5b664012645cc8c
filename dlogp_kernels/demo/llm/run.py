"""`dlogp demo --llm`: what reinforcement learning changed in a real language model that answers word problems."""

import json
import time
from pathlib import Path

from rich.console import Console

from ...jobs.compare import run_compare
from ...jobs.errors import JobError
from ...jobs.options import Comparing
from ...ops import backends
from ...report.terminal import print_files
from ..run import print_findings
from .models import ABOUT, ADAPTERS, METADATA_FILE, apply_adapter, convert
from .responses import SETTINGS, joined, respond, write_problems

NUM_PROBLEMS, QUICK_NUM_PROBLEMS = 48, 8
_SEED = 1


def run_llm_demo(out: Path, *, num_problems: int | None, quick: bool, retrain: bool, console: Console) -> Path:
    """Draw responses of both models to held-out problems, measure and plot them; returns the page that shows them.

    Args:
        out: receives `llm/`: the models, which are made once and stay, and a directory for this number of problems.
        num_problems: answered by each model once, and by the base model that asks the RL model where that would not
            have said so; 48, or 8 with `quick`.
        quick: fewer problems, by the models alone: a minute or two.
        retrain: train the pair anew first into `llm/retrained/`, which takes longer than all else, and use that.
        console: where findings are printed.

    Raises JobError where a package is missing, or for a number of problems that can not be.
    """
    count = num_problems if num_problems is not None else QUICK_NUM_PROBLEMS if quick else NUM_PROBLEMS
    if count < 1:
        raise JobError(f"--problems is {count}, expected at least 1")
    backends.warn_of_missing_kernels("cpu")
    pair = _make_pair(out / "llm", retrain, console)
    started = time.monotonic()
    directory = pair / f"{count}-problems"
    data, responses = directory / "problems.jsonl", directory / "responses.jsonl"
    write_problems(data, count, _SEED, "held_out")
    rl, base = pair / "rl", pair / "base"
    asked = {"base": (base, base), "rl": (rl, rl)} | ({} if quick else {"both": (rl, base)})
    accuracies = {
        SETTINGS[name].source: respond(*models, data, directory / name, SETTINGS[name], _SEED)
        for name, models in asked.items()
    }
    joined([directory / name for name in asked], responses)
    found = run_compare(rl, base, directory, responses=responses, options=Comparing(dtype="fp32", device="cpu"))
    print_findings(console, accuracies, found.measured, found.figures)
    print_files(console, [found.view.path])
    console.print(f"That took {time.monotonic() - started:.0f} s, with the models at hand.")
    return found.view.path


def _make_pair(out: Path, retrain: bool, console: Console) -> Path:
    """The directory with the models `base` and `rl`, which are made where they are not there."""
    raw = out / "raw"
    console.print(f"The model: {ABOUT}")
    if not raw.exists():
        console.print(f"converting it into {raw}")
    convert(raw)
    if retrain:
        # It imports trl, which a demo of the pair that comes along can do without.
        from .train_pair import train_pair

        pair = out / "retrained"
        adapters = train_pair(raw, pair, console.print)
    else:
        pair, adapters = out, ADAPTERS
        apply_adapter(raw, adapters / "base", pair / "base")
        apply_adapter(pair / "base", adapters / "rl", pair / "rl")
    made = json.loads((adapters / METADATA_FILE).read_text(encoding="utf-8"))["accuracy"]
    console.print(
        f"It solves {made['raw']['mean']:.0%} of the word problems. So the base model here is not it, but what "
        "supervised training made of it, on answers of a demonstrator who takes wrong shortcuts on purpose; and the "
        "RL model is what a few steps of reinforcement learning on right answers made of that. Nothing here is a "
        "finding about language models at large."
    )
    return pair
