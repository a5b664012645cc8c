"""What the commands print."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..jobs.doctor import Report
from ..report.curves import SweepPlot
from ..report.figures import Plot, TopToken
from ..report.replaced import replacements_text
from ..report.responses import RESPONSES_FILE, ReplacedToken, Setting
from ..report.text import visible

#: Of each criterion, in the terminal; the files have more.
_SHOWN_TOKENS = 8


def print_metrics(console: Console, summary: Mapping[str, Any], out: Path) -> None:
    """The summary of a run: a line for each source, and where the files are."""
    table = Table(title="Response tokens: means, and tails of Δlog p")
    table.add_column("source", min_width=6)
    for heading in ("tokens", "Δlog p", "< −1", "> 0.25", "KL", "entropy", "base entropy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source, described in summary["sources"].items():
        tails, statistics = described["delta_logp_tails"], described["statistics"]
        means = [_number(statistics[name]["mean"]) for name in ("delta_logp", "kl", "entropy", "base_entropy")]
        table.add_row(
            Text(visible(source) if source else "–"),
            f"{described['response_tokens']:,}",
            means[0],
            f"{tails['below -1']:.2%}",
            f"{tails['above 0.25']:.2%}",
            *means[1:],
        )
    console.print(table)
    skipped = len(summary["broken_lines"])
    console.print(
        f"{summary['responses']:,} responses, {summary['response_tokens']:,} response tokens, {skipped:,} lines "
        f"skipped; {summary['seconds']:.1f} s, {summary['tokens_per_second'] or 0:,.0f} tokens/s with prompts"
    )
    console.print(f"data set and summary: {out}", markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def print_plot(console: Console, plot: Plot) -> None:
    """The table of raised tokens, and where the files are."""
    if not plot.complete:
        console.print("The run is not complete: this shows the part that is written.", style="yellow")
    console.print(top_token_table(plot.top_tokens, plot.min_count))
    for file in plot.files:
        console.print(str(file), markup=False, soft_wrap=True)


def top_token_table(tokens: list[TopToken], min_count: int) -> Table:
    """The tokens with the largest mean Δlog p."""
    table = Table(title=f"Largest mean Δlog p (tokens that occur at least {min_count} times)")
    table.add_column("rank", justify="right")
    table.add_column("token")
    for heading in ("id", "count", "mean Δlog p", "log p, RL", "log p, base"):
        table.add_column(heading, justify="right")
    for rank, token in enumerate(tokens, 1):
        means = [f"{value:+.4f}" for value in (token.delta_logp, token.logp, token.base_logp)]
        table.add_row(str(rank), Text(visible(token.text)), str(token.token_id), f"{token.occurrences:,}", *means)
    return table


def print_results(console: Console, summary: Mapping[str, Any], out: Path) -> None:
    """The summary of drawn responses: a line for each setting, and where the files are."""
    console.print(results_table(summary["settings"]))
    console.print(
        f"{summary['responses']:,} responses, {summary['tokens']:,} tokens; {summary['seconds']:.1f} s, "
        f"{summary['tokens_per_second'] or 0:,.0f} tokens/s"
    )
    _print_grader_errors(console, summary["settings"])
    console.print(f"responses and summary: {out}", markup=False, soft_wrap=True)


def results_table(settings: Sequence[Mapping[str, Any]]) -> Table:
    """Of the settings of a summary, a line each."""
    table = Table("replaced where", title="Accuracy and replaced tokens; ± one standard error over problems")
    for heading in ("accuracy", "replaced [%]", "length"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in settings:
        table.add_row(
            str(Setting(*(row[name] for name in Setting._fields))),
            _with_error(row["accuracy"], row["accuracy_standard_error"], 1, 3),
            _with_error(row["replaced_share"], row["replaced_share_standard_error"], 100, 2),
            f"{row['mean_length']:,.1f}",
        )
    return table


def _with_error(mean: float | None, error: float | None, factor: float, digits: int) -> str:
    if mean is None:
        return "–"
    return f"{factor * mean:.{digits}f}" + ("" if error is None else f" ± {factor * error:.{digits}f}")


def _print_grader_errors(console: Console, settings: Sequence[Mapping[str, Any]]) -> None:
    errors, responses = (sum(row[name] for row in settings) for name in ("grader_errors", "responses"))
    if errors:
        console.print(
            f"The grader raised at {errors:,} of {responses:,} responses, which are not in the accuracies; `error` in "
            f"{RESPONSES_FILE} says what.",
            style="yellow",
        )


def print_training(console: Console, summary: Mapping[str, Any], model: Path) -> None:
    """What a training began and ended with, and where the model is."""
    table = Table("", title=f"{summary['steps']:,} steps in {summary['seconds']:,.1f} s")
    for heading in ("at first", "at last"):
        table.add_column(heading, justify="right")
    for name, title in (
        ("accuracy", "accuracy in training"),
        ("eval_accuracy", "accuracy, held out"),
        ("entropy", "entropy [nats]"),
        ("length", "response length"),
    ):
        if f"last_{name}" in summary:
            cells = [
                _with_error(summary[f"{when}_{name}"], summary.get(f"{when}_{name}_standard_error"), 1, 3)
                for when in ("first", "last")
            ]
            table.add_row(title, *cells)
    console.print(table)
    if summary["grader_errors"]:
        console.print(
            f"The grader raised at {summary['grader_errors']:,} responses, which taught nothing.", style="yellow"
        )
    console.print(f"model: {model}", markup=False, soft_wrap=True)


def print_sweep_plot(console: Console, plot: SweepPlot) -> None:
    """The results and the replaced tokens of a sweep, and where the files are."""
    if not plot.complete:
        console.print("The run is not complete: this shows the part that is written.", style="yellow")
    settings = [result.to_json() for result in plot.results]
    console.print(results_table(settings))
    _print_grader_errors(console, settings)
    if plot.replaced_tokens:
        console.print(replaced_token_table(plot.replaced_tokens))
    for file in plot.files:
        console.print(str(file), markup=False, soft_wrap=True)


def replaced_token_table(tokens: Sequence[ReplacedToken]) -> Table:
    """The tokens replaced most often, with what took their place; a few for each criterion."""
    table = Table("criterion", "token", title="Tokens replaced most often")
    for heading in ("id", "times", "share", "mean Δlog p"):
        table.add_column(heading, justify="right")
    table.add_column("replaced by")
    shown: dict[str, int] = {}
    for token in tokens:
        shown[token.criterion] = shown.get(token.criterion, 0) + 1
        if shown[token.criterion] > _SHOWN_TOKENS:
            continue
        table.add_row(
            token.criterion,
            Text(visible(token.text)),
            str(token.token_id),
            f"{token.occurrences:,}",
            f"{token.share:.1%}",
            f"{token.delta_logp:+.4f}",
            Text(replacements_text(token)),
        )
    return table


def print_report(console: Console, report: Report) -> None:
    """What `dlogp doctor` found."""
    installation = Table("installed", "version", title="Installation")
    installation.add_row("python", report.python)
    for name, version in {**report.versions, **report.tools}.items():
        installation.add_row(name, Text(version) if version else Text("not found", style="yellow"))
    console.print(installation)
    console.print(report.torch_trial, markup=False, soft_wrap=True)
    console.print(_devices(report))
    served = Table("op", "device", "backend", "why not another", title="Which backend serves each op")
    for choice in report.backends:
        reasons = [f"{name}: {reason}" for name, reason in choice.others.items()]
        if choice.measured is not None:
            reasons.append(f"{choice.backend} first: {choice.measured}")
        others = "\n".join(reasons)
        served.add_row(choice.op, choice.device, Text(choice.backend, style="bold"), Text(others))
    console.print(served)


def _devices(report: Report) -> Table:
    table = Table("device", "properties", title="Devices")
    cpu = report.processor
    table.add_row(
        "cpu",
        Text(
            f"{cpu.name}, {cpu.cores} cores, {cpu.torch_threads} threads in torch\n"
            f"torch uses {cpu.capability}; it has {', '.join(cpu.instruction_sets) or 'none of the sets that matter'}"
        ),
    )
    for gpu in report.gpus:
        table.add_row(
            f"cuda:{gpu.number}",
            Text(f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_gib} GiB"),
        )
    if not report.gpus:
        build = f"built with CUDA {report.cuda}" if report.cuda else "built without CUDA"
        table.add_row("cuda", Text(f"none: torch sees no CUDA device (it is {build})"))
    return table
