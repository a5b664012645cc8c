"""The demo: what RL changed in the tiny pair, found as a user would find it, and the memory it takes at full size."""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..hf.tiny import load_local
from ..installation import how_to_install
from ..jobs.errors import JobError
from ..jobs.metrics import run_metrics
from ..ops import backends
from ..report.figures import Plot, plot
from ..report.responses import Estimate
from ..report.terminal import TextTable, print_files
from . import task
from .generate import PAIR_DIRECTORY, accuracy, generate_responses, response_rows, write_jsonl
from .memory import VOCABULARY, Measurement, measure_in_subprocess

NUM_PROBLEMS = 1000
QUICK_NUM_PROBLEMS = 200
MEMORY_TOKENS = 8192
QUICK_MEMORY_TOKENS = 1024
_SEED = 1


def run_demo(out: Path, *, num_problems: int | None, quick: bool, retrain: bool, console: Console) -> None:
    """Sample responses of both models to held-out problems, measure and plot them, and measure memory at full size.

    Args:
        out: receives a directory for this number of problems, with `responses.jsonl` and `metrics/` (`figures/` in
            it), and, with `retrain`, `pair/`.
        num_problems: answered by each model once; 1000, or 200 with `quick`.
        quick: fewer problems, and 1024 tokens instead of 8192 in the measurement of memory.
        retrain: train the pair anew first, which takes minutes, and use that instead of the one that comes along.
        console: where findings are printed.

    Raises JobError if `out` holds the demo of another pair, or with `retrain` a pair already.
    """
    count = num_problems if num_problems is not None else QUICK_NUM_PROBLEMS if quick else NUM_PROBLEMS
    pair = find_pair(out, count, retrain, console)
    directory = out / f"{count}-problems"
    started = time.monotonic()
    data = directory / "responses.jsonl"
    accuracies = _respond(pair, count, data)
    summary = run_metrics(
        pair / "rl", pair / "base", data, directory / "metrics", dtype="fp32", device="cpu", batch_tokens=16_384
    )
    figures = plot(directory / "metrics")
    print_findings(console, accuracies, summary, figures)
    console.print(
        f"That took {time.monotonic() - started:.0f} s. Now the size of a real model, in a process of its own…"
    )
    _print_memory(console, measure_in_subprocess(QUICK_MEMORY_TOKENS if quick else MEMORY_TOKENS))


def find_pair(out: Path, num_problems: int, retrain: bool, console: Console) -> Path:
    """The pair that comes along, or with `retrain` one that is trained into `out / "pair"` first.

    Before that, JobError for a number of problems that can not be, and a warning where there are no compiled kernels.
    """
    if num_problems < 1:
        raise JobError(f"--problems is {num_problems}, expected at least 1")
    backends.warn_of_missing_kernels("cpu")
    if not retrain:
        return PAIR_DIRECTORY
    directory = out / "pair"
    if directory.exists():
        raise JobError(f"--out {out}: it holds a pair already, expected another directory to train into")
    # It imports trl, which a demo of the pair that comes along can do without.
    if importlib.util.find_spec("trl") is None:
        raise JobError(f"--retrain: trl can not be imported, expected the extra 'trl': {how_to_install('trl')}")
    from .train_pair import train_pair

    console.print(f"training a pair into {directory}")
    train_pair(directory)
    return directory


def _respond(pair: Path, num_problems: int, data: Path) -> dict[str, Estimate]:
    """Write both models' responses to `data`, and grade them."""
    problems = task.generate_problems(num_problems, _SEED, "held_out")
    accuracies: dict[str, Estimate] = {}
    rows: list[dict[str, Any]] = []
    for source in ("base", "rl"):
        model, tokenizer = load_local(pair / source)
        responses = generate_responses(model, tokenizer, problems, seed=_SEED)
        accuracies[source] = Estimate(*accuracy(responses))
        rows += response_rows(responses, source)
    write_jsonl(data, rows)
    return accuracies


def print_findings(
    console: Console, accuracies: Mapping[str, Estimate], summary: Mapping[str, Any], figures: Plot
) -> None:
    """Show accuracy and Δlog p of each source, the tokens that RL raised most, and where the files are."""
    rows = []
    for source, graded in accuracies.items():
        described = summary["sources"][source]
        tails, statistics = described["delta_logp_tails"], described["statistics"]
        rows.append(
            (
                source,
                str(graded),
                f"{described['response_tokens']:,}",
                f"{tails['below -1']:.2%}",
                f"{tails['above 0.25']:.2%}",
                f"{statistics['kl']['mean']:.4f}",
                f"{statistics['entropy']['mean']:.4f}",
            )
        )
    columns = ("source", "accuracy", "tokens", "< −1", "> 0.25", "KL", "entropy")
    console.print(TextTable("What RL changed: accuracy, tails of Δlog p, means over response tokens", columns, rows))
    console.print(summary["words"], soft_wrap=False)
    print_files(console, figures.files)


def _print_memory(console: Console, memory: Measurement) -> None:
    console.print(
        f"linear_delta_logp of {memory.num_tokens:,} tokens over a vocabulary of {VOCABULARY:,}, bfloat16: "
        f"{memory.seconds:.1f} s, {memory.extra_bytes / 2**20:.0f} MiB over inputs "
        f"({memory.input_bytes / 2**20:.0f} MiB) and outputs."
    )
    logits = memory.logits_bytes / 2**30
    console.print(
        f"Float32 logits of both models would take {logits:.1f} GiB, {2 * logits:.1f} GiB with a log-softmax of each."
    )
