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
from ..jobs.errors import JobError
from ..jobs.metrics import run_metrics
from ..jobs.options import Decoding
from ..jobs.settings import grid
from ..ops import backends
from ..report.curves import CRITERION_LABELS, Curve, SweepPlot, compare, curves, find, plot_sweep, results_markdown
from ..report.dataset import TokenDataset
from ..report.files import write_atomically
from ..report.responses import BASE, RL, Estimate, Setting, SettingResult
from ..report.terminal import Terminal, TextTable, print_files
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


class Finding(NamedTuple):
    """A difference of accuracies between two settings, paired by problem."""

    setting: Setting
    other: Setting
    difference: Estimate


class CurvesResult(NamedTuple):
    """What `run_curves` found: thresholds, figures with results, differences, and the Markdown file that tells them."""

    thresholds: Mapping[str, Sequence[float]]
    figures: SweepPlot
    findings: list[Finding]
    summary: Path


def run_curves(
    out: str | Path,
    *,
    num_problems: int | None = None,
    quick: bool = False,
    retrain: bool = False,
    console: Console | None = None,
    progress: bool = True,
) -> CurvesResult:
    """Sweep criteria, thresholds and γ over held-out problems with the demo pair, and draw the curves.

    Args:
        out: receives `curves-…-problems/`, with the calibration, the sweep (figures in it) and `summary.md`; a run that
            was stopped goes on.
        num_problems: of each point of the curves; 1000, or 100 with `quick`.
        quick: fewer problems: half a minute.
        retrain: train the pair anew first, which takes minutes, and use that instead of the one that comes along.
        console: where findings are printed.
        progress: show progress on stderr.
    """
    console = console or Terminal()
    count = num_problems if num_problems is not None else QUICK_NUM_PROBLEMS if quick else NUM_PROBLEMS
    if count < 1:
        raise JobError(f"--problems is {count}, expected at least 1")
    backends.warn_of_missing_kernels("cpu")
    started = time.monotonic()
    pair = find_pair(Path(out), retrain, console)
    directory = Path(out) / f"curves-{count}-problems"
    with _one_thread():
        thresholds = _calibrate(pair, directory / "calibration", progress)
        data = _write_problems(directory / "problems.jsonl", count)
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
            progress=progress,
        )
    figures = plot_sweep(directory / "sweep")
    findings = find_differences(figures.results)
    summary = directory / "summary.md"
    write_atomically(summary, summary_markdown(count, figures.results, findings).encode())
    _print(console, figures, findings)
    console.print(f"{summary}\nThat took {time.monotonic() - started:.0f} s.")
    return CurvesResult(thresholds, figures, findings, summary)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _calibrate(pair: Path, directory: Path, progress: bool) -> dict[str, list[float]]:
    """Thresholds by criterion at which `SHARES` of the tokens of base responses would be replaced."""
    base, tokenizer = load_local(pair / "base")
    problems = task.generate_problems(CALIBRATION_PROBLEMS, _CALIBRATION_SEED, "held_out")
    responses = generate_responses(base, tokenizer, problems, seed=_CALIBRATION_SEED)
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "responses.jsonl"
    write_jsonl(data, response_rows(responses, "base"))
    metrics = directory / "metrics"
    run_metrics(pair / "rl", pair / "base", data, metrics, dtype="fp32", device="cpu", progress=progress)
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


def _write_problems(path: Path, count: int) -> Path:
    problems = task.generate_problems(count, _SEED, "held_out")
    write_jsonl(path, ({"prompt": problem.prompt, "answer": str(problem.answer)} for problem in problems))
    return path


def find_differences(results: Sequence[SettingResult]) -> list[Finding]:
    """`delta_logp` at γ = 0 against the RL model; then each extrapolation against the same setting at γ = 0."""
    pairs = [
        (result.setting, result.setting._replace(gamma=0.0) if result.setting.gamma else RL)
        for result in results
        if result.setting.criterion == "delta_logp" or (result.setting.criterion == "all" and result.setting.gamma)
    ]
    pairs.sort(key=lambda pair: pair[0].gamma > 0)
    found = [(setting, other, compare(results, setting, other)) for setting, other in pairs]
    return [Finding(setting, other, difference) for setting, other, difference in found if difference is not None]


def share_to_reach(curve: Curve, target: Estimate) -> SettingResult | None:
    """The point of a curve with the least replaced share whose accuracy is at least `target`'s mean."""
    reached = (result for result in curve.results if result.accuracy and result.accuracy.mean >= target.mean)
    return next(reached, None)


def summary_markdown(num_problems: int, results: Sequence[SettingResult], findings: Sequence[Finding]) -> str:
    """What the sweep found, in words and tables."""
    lines = [
        "# Replacement and extrapolation on the demo pair",
        "",
        f"{num_problems} held-out problems, one response to each under every setting, temperature 1, no filters. "
        "± is one standard error over problems. All settings share one seed: the same noise drafts the tokens.",
        "",
        *_models_lines(results),
        "",
        "## Which criterion needs the fewest replacements",
        "",
        *_reach_lines(results),
        "",
        "## Differences of accuracy, paired by problem",
        "",
        "Replacement without extrapolation (γ = 0) may exceed the RL model: a token stays only if neither model speaks "
        "against it. What extrapolation adds is the difference to γ = 0 at the same threshold. Nothing is corrected "
        "for how many differences were looked at.",
        "",
        "| replaced where | minus | difference | in standard errors |",
        "|:---|:---|---:|---:|",
        *(
            f"| {finding.setting} | {_name(finding.other)} | {_signed(finding.difference)} | {_ratio(finding)} |"
            for finding in findings
        ),
        "",
        results_markdown(results).replace("# Accuracy", "## Accuracy", 1),
    ]
    return "\n".join(lines)


def _models_lines(results: Sequence[SettingResult]) -> list[str]:
    found = [(name, find(results, setting)) for name, setting in (("Base model", BASE), ("RL model", RL))]
    return [f"- {name}: {result.accuracy}" for name, result in found if result is not None]


def _reach_lines(results: Sequence[SettingResult]) -> list[str]:
    rl = find(results, RL)
    if rl is None or rl.accuracy is None:
        return []
    lines = [
        f"The first point whose accuracy is at least that of the RL model, {rl.accuracy.mean:.3f}:",
        "",
        "| criterion | replaced [%] | accuracy |",
        "|:---|---:|---:|",
    ]
    for curve in curves(results):
        label = CRITERION_LABELS.get(curve.criterion, curve.criterion)
        point = share_to_reach(curve, rl.accuracy)
        if point is None:
            last = curve.results[-1]
            lines.append(f"| {label} | not reached up to {_percent(last)} | {last.accuracy} |")
        else:
            lines.append(f"| {label} | {_percent(point)} | {point.accuracy} |")
    return lines


def _percent(result: SettingResult) -> str:
    return "–" if result.replaced_share is None else f"{100 * result.replaced_share.mean:.1f}"


def _name(setting: Setting) -> str:
    return "RL model" if setting == RL else str(setting)


def _signed(difference: Estimate) -> str:
    error = "" if difference.standard_error is None else f" ± {difference.standard_error:.3f}"
    return f"{difference.mean:+.3f}{error}"


def _ratio(finding: Finding) -> str:
    error = finding.difference.standard_error
    return f"{finding.difference.mean / error:+.1f}" if error else "–"


def _print(console: Console, figures: SweepPlot, findings: Sequence[Finding]) -> None:
    rows = []
    for name, setting in (("base model", BASE), ("RL model", RL)):
        result = find(figures.results, setting)
        if result is not None:
            rows.append((name, "–", str(result.accuracy)))
    for curve in curves(figures.results):
        rows += [(str(result.setting), _percent(result), str(result.accuracy)) for result in curve.results]
    columns = ("criterion", "replaced [%]", "accuracy")
    console.print(TextTable("Replacement by the RL model (γ = 0)", columns, rows))
    rows = [(str(finding.setting), _name(finding.other), _signed(finding.difference)) for finding in findings]
    columns = ("replaced where", "minus", "difference")
    console.print(TextTable("Differences of accuracy, paired by problem", columns, rows, text_columns=2))
    print_files(console, figures.files)
