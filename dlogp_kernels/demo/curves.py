"""`dlogp demo --curves`: what replacing a few tokens of the tiny base model does, and what extrapolation adds.

Thresholds are quantiles over responses of the base model to problems of their own, so that every criterion is drawn at
comparable shares. Whatever comes out is written down; nothing here expects the paper's result.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from ..hf.tiny import load_local
from ..jobs.decoding import run_sweep
from ..jobs.metrics import run_metrics
from ..jobs.options import Decoding
from ..jobs.settings import grid
from ..report.curves import CRITERION_LABELS, SweepPlot, compare, curves, models_alone, plot_sweep, results_markdown
from ..report.dataset import TokenDataset
from ..report.files import write_atomically
from ..report.responses import RL, Estimate, Setting, SettingResult
from ..report.tables import table_lines
from ..report.terminal import TextTable, print_files
from . import task
from .generate import generate_responses, response_rows, write_jsonl
from .run import find_pair

NUM_PROBLEMS = 1000
QUICK_NUM_PROBLEMS = 100
CALIBRATION_PROBLEMS = 500
SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
#: Extrapolation is drawn at the thresholds of these shares.
EXTRAPOLATED_SHARES = (0.01, 0.02, 0.04, 0.08)
GAMMAS = (0.25, 0.5, 1.0)
_SEED, _CALIBRATION_SEED = 2, 3
_BATCH_SIZE = 256
#: Thresholds of a criterion are quantiles of this statistic; of `delta_logp` the lower ones, of others the upper.
_STATISTICS = {"delta_logp": "delta_logp", "kl": "kl", "entropy": "base_entropy"}
#: Headings of the tables.
_REPLACED = "replaced [%]"
_DIFFERENCE = ("replaced where", "minus", "difference")


class Finding(NamedTuple):
    """A difference of accuracies between two settings, paired by problem."""

    setting: Setting
    other: Setting
    difference: Estimate

    def cells(self) -> tuple[str, str, str, str]:
        """Of a table: both settings, the difference, and how many standard errors it is."""
        other = "RL model" if self.other == RL else str(self.other)
        mean, error = self.difference
        return str(self.setting), other, self.difference.text("+"), f"{mean / error:+.1f}" if error else "–"


def run_curves(out: Path, *, num_problems: int | None, quick: bool, retrain: bool, console: Console) -> None:
    """Sweep criteria, thresholds and γ over held-out problems with the demo pair, and draw the curves.

    Args:
        out: receives `curves-…-problems/`, with the calibration, the sweep (figures in it) and `summary.md`; a run that
            was stopped goes on.
        num_problems: of each point of the curves; 1000, or 100 with `quick`.
        quick: fewer problems: half a minute.
        retrain: train the pair anew first, which takes minutes, and use that instead of the one that comes along.
        console: where findings are printed.
    """
    count = num_problems if num_problems is not None else QUICK_NUM_PROBLEMS if quick else NUM_PROBLEMS
    started = time.monotonic()
    pair = find_pair(out, count, retrain, console)
    directory = out / f"curves-{count}-problems"
    data = directory / "problems.jsonl"
    problems = task.generate_problems(count, _SEED, "held_out")
    write_jsonl(data, ({"prompt": problem.prompt, "answer": str(problem.answer)} for problem in problems))
    with _one_thread():
        thresholds = _calibrate(pair, directory / "calibration")
        decoding = Decoding(
            max_new_tokens=task.MAX_RESPONSE_WORDS, dtype="fp32", device="cpu", batch_size=_BATCH_SIZE, chunk_size=1000
        )
        run_sweep(
            pair / "rl",
            pair / "base",
            data,
            directory / "sweep",
            settings=settings_of(thresholds),
            seeds=(_SEED,),
            decoding=decoding,
        )
    figures = plot_sweep(directory / "sweep")
    findings = find_differences(figures.results)
    summary = directory / "summary.md"
    write_atomically(summary, summary_markdown(count, figures.results, findings).encode())
    _print(console, figures, findings)
    console.print(f"{summary}\nThat took {time.monotonic() - started:.0f} s.")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _calibrate(pair: Path, directory: Path) -> dict[str, list[float]]:
    """Thresholds by criterion at which `SHARES` of the tokens of base responses would be replaced."""
    base, tokenizer = load_local(pair / "base")
    problems = task.generate_problems(CALIBRATION_PROBLEMS, _CALIBRATION_SEED, "held_out")
    responses = generate_responses(base, tokenizer, problems, seed=_CALIBRATION_SEED)
    data = directory / "responses.jsonl"
    write_jsonl(data, response_rows(responses, "base"))
    metrics = directory / "metrics"
    run_metrics(pair / "rl", pair / "base", data, metrics, dtype="fp32", device="cpu")
    dataset = TokenDataset(metrics)
    thresholds = {
        criterion: quantiles(dataset.column(name, every_source=True), lower=criterion == "delta_logp")
        for criterion, name in _STATISTICS.items()
    }
    return thresholds | {"random": list(SHARES)}


def quantiles(values: np.ndarray, *, lower: bool) -> list[float]:
    """Thresholds beyond which `SHARES` of the values lie, to six digits; those of a lower tail only below 0."""
    found = np.quantile(values, SHARES if lower else 1 - np.array(SHARES))
    rounded = [float(f"{value:.6g}") for value in found]
    return [value for value in dict.fromkeys(rounded) if not lower or value < 0]


def settings_of(thresholds: Mapping[str, Sequence[float]]) -> list[Setting]:
    """The curves at γ = 0, with both models alone; then extrapolation at the lowest thresholds of `delta_logp`."""
    lowest = list(thresholds["delta_logp"])[: len(EXTRAPOLATED_SHARES)]
    everywhere = [Setting("all", None, gamma) for gamma in GAMMAS]
    return grid(thresholds) + grid({"delta_logp": lowest}, GAMMAS, baselines=False) + everywhere


def find_differences(results: Sequence[SettingResult]) -> list[Finding]:
    """`delta_logp` at γ = 0 against the RL model; then each extrapolation against the same setting at γ = 0."""
    settings = [result.setting for result in results]
    pairs = [(setting, RL) for setting in settings if setting.criterion == "delta_logp" and not setting.gamma]
    pairs += [(setting, setting._replace(gamma=0.0)) for setting in settings if setting.gamma]
    return [Finding(*pair, found) for pair in pairs if (found := compare(results, *pair)) is not None]


def summary_markdown(num_problems: int, results: Sequence[SettingResult], findings: Sequence[Finding]) -> str:
    """What the sweep found, in words and tables."""
    models = models_alone(results)
    lines = [
        "# Replacement and extrapolation on the demo pair",
        "",
        f"{num_problems} held-out problems, one response to each under every setting, temperature 1, no filters. "
        "± is one standard error over problems. All settings share one seed: the same noise drafts the tokens.",
        "",
        f"- Base model: {models['base']}",
        f"- RL model: {models['RL']}",
        "",
        "## Which criterion needs the fewest replacements",
        "",
        f"The first point whose accuracy is at least that of the RL model, {models['RL'].mean:.3f}:",
        "",
        *table_lines(("criterion", _REPLACED, "accuracy"), "lrr", _first_to_reach(results, models["RL"])),
        "",
        "## Differences of accuracy, paired by problem",
        "",
        "Replacement without extrapolation (γ = 0) may exceed the RL model: a token stays only if neither model speaks "
        "against it. What extrapolation adds is the difference to γ = 0 at the same threshold. Nothing is corrected "
        "for how many differences were looked at.",
        "",
        *table_lines((*_DIFFERENCE, "in standard errors"), "llrr", (finding.cells() for finding in findings)),
        "",
        results_markdown(results).replace("# Accuracy", "## Accuracy", 1),
    ]
    return "\n".join(lines)


def _first_to_reach(results: Sequence[SettingResult], target: Estimate) -> Iterator[tuple[str, str, Estimate | None]]:
    """Of each criterion the point with the least replaced share whose accuracy is at least `target`'s mean."""
    for curve in curves(results):
        reached = [result for result in curve.results if result.accuracy and result.accuracy.mean >= target.mean]
        result = (reached or curve.results[-1:])[0]
        share = _percent(result) if reached else f"not reached up to {_percent(result)}"
        yield CRITERION_LABELS[curve.criterion], share, result.accuracy


def _percent(result: SettingResult) -> str:
    return "–" if result.replaced_share is None else f"{100 * result.replaced_share.mean:.1f}"


def _print(console: Console, figures: SweepPlot, findings: Sequence[Finding]) -> None:
    rows = [(f"{name} model", "–", str(accuracy)) for name, accuracy in models_alone(figures.results).items()]
    for curve in curves(figures.results):
        rows += [(str(result.setting), _percent(result), str(result.accuracy)) for result in curve.results]
    console.print(TextTable("Replacement by the RL model (γ = 0)", ("criterion", _REPLACED, "accuracy"), rows))
    title, rows = "Differences of accuracy, paired by problem", [finding.cells()[:3] for finding in findings]
    console.print(TextTable(title, _DIFFERENCE, rows, text_columns=2))
    print_files(console, figures.files)
