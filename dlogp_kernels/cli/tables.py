"""What the commands print."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..ops.backends import BACKENDS, Choice
from ..report.classes import ClassChanges
from ..report.curves import SweepPlot
from ..report.dataset import UNFINISHED
from ..report.figures import Plot
from ..report.replaced import replacements_text
from ..report.responses import RESPONSES_FILE, ReplacedToken, Setting
from ..report.sources import responses_of
from ..report.terminal import TextTable, print_files
from ..report.text import counted, one_line, percent, visible
from ..report.words import LOWERED, RAISED, TokenChange

#: The rows of each criterion in the terminal; the files have more.
_SHOWN_TOKENS = 8
#: Those of each end of the tokens that RL changed.
_SHOWN_CHANGES = 12


def print_metrics(console: Console, summary: Mapping[str, Any], out: Path) -> None:
    """The summary of a run: a line for each source, and where the files are."""
    columns = ("source", "tokens", "Δlog p", "< −1", "> 0.25", "KL", "entropy", "base entropy")
    rows = []
    for source, described in summary["sources"].items():
        tails, statistics = described["delta_logp_tails"], described["statistics"]
        means = [_number(statistics[name]["mean"]) for name in ("delta_logp", "kl", "entropy", "base_entropy")]
        rows.append(
            (
                one_line(source) if source else "–",
                f"{described['response_tokens']:,}",
                means[0],
                f"{tails['below -1']:.2%}",
                f"{tails['above 0.25']:.2%}",
                *means[1:],
            )
        )
    console.print(TextTable("Response tokens: means, and tails of Δlog p", columns, rows))
    # Runs that ended before there were words have none.
    console.print(*([summary["words"]] if "words" in summary else []), soft_wrap=False)
    console.print(
        f"{counted(summary['responses'], 'response')}, {counted(summary['response_tokens'], 'response token')}, "
        f"{counted(len(summary['broken_lines']), 'line')} skipped; {summary['seconds']:.1f} s, "
        f"{summary['tokens_per_second'] or 0:,.0f} tokens/s with prompts"
    )
    console.print(f"data set and summary: {out}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def print_plot(console: Console, plot: Plot) -> None:
    """The tokens that RL raised and lowered most, the classes of tokens, and where the files are."""
    if not plot.complete:
        console.print(UNFINISHED, style="yellow")
    for direction in (RAISED, LOWERED):
        tokens = plot.words.parts[0].rankings["sum", direction][:_SHOWN_CHANGES]
        console.print(change_table(f"Tokens that RL {direction} most, by Σ Δlog p; share of Σ|Δlog p|", tokens))
    console.print(_class_table(plot.classes))
    console.print(
        "top_tokens.md and .csv have more: by the mean (of tokens that occur at least "
        f"{counted(plot.words.min_count, 'time')}), by share, for each source, right and wrong."
    )
    print_files(console, plot.files)


def change_table(title: str, tokens: Sequence[TokenChange]) -> TextTable:
    """Tokens with one of their contexts."""
    rows = [
        (
            visible(token.text),
            token.contexts[0],
            f"{token.occurrences:,}",
            f"{token.total:+,.2f}",
            f"{token.delta_logp:+.4f}",
            percent(token.share),
        )
        for token in tokens
    ]
    columns = ("token", "context", "count", "Σ Δlog p", "mean Δlog p", "share")
    return TextTable(title, columns, rows, text_columns=2)


def _class_table(classes: ClassChanges) -> TextTable:
    rows = [
        (
            one_line(change.name),
            responses_of(change.source),
            f"{change.occurrences:,}",
            f"{change.delta_logp:+.4f}" if change.occurrences else "–",
            percent(change.share),
        )
        for change in classes.changes
    ]
    columns = ("class of tokens", "in", "count", "mean Δlog p", "share")
    title = "; ".join(filter(None, ("Classes of tokens", classes.remark, "share of Σ|Δlog p|")))
    return TextTable(title, columns, rows, text_columns=2)


def print_results(console: Console, summary: Mapping[str, Any], out: Path) -> None:
    """The summary of drawn responses: a line for each setting, and where the files are."""
    console.print(results_table(summary["settings"]))
    console.print(
        f"{counted(summary['responses'], 'response')}, {counted(summary['tokens'], 'token')}; "
        f"{summary['seconds']:.1f} s, {summary['tokens_per_second'] or 0:,.0f} tokens/s"
    )
    _print_grader_errors(console, summary["settings"])
    console.print(f"responses and summary: {out}")


def results_table(settings: Sequence[Mapping[str, Any]]) -> TextTable:
    """A line for each setting of a summary."""
    rows = [
        (
            one_line(str(Setting(*(row[name] for name in Setting._fields)))),
            _with_error(row["accuracy"], row["accuracy_standard_error"], 1, 3),
            _with_error(row["replaced_share"], row["replaced_share_standard_error"], 100, 2),
            f"{row['mean_length']:,.1f}",
        )
        for row in settings
    ]
    return TextTable(
        "Accuracy and replaced tokens; ± one standard error over problems",
        ("replaced where", "accuracy", "replaced [%]", "length"),
        rows,
    )


def _with_error(mean: float | None, error: float | None, factor: float, digits: int) -> str:
    if mean is None:
        return "–"
    return f"{factor * mean:.{digits}f}" + ("" if error is None else f" ± {factor * error:.{digits}f}")


def _print_grader_errors(console: Console, settings: Sequence[Mapping[str, Any]]) -> None:
    errors, responses = (sum(row[name] for row in settings) for name in ("grader_errors", "responses"))
    if errors:
        console.print(
            f"The grader raised at {errors:,} of {counted(responses, 'response')}; these are not in the accuracies. "
            f"`error` in {RESPONSES_FILE} says what.",
            style="yellow",
        )


def print_training(console: Console, summary: Mapping[str, Any], model: Path) -> None:
    """What a training began and ended with, and where the model is."""
    rows = []
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
            rows.append((title, *cells))
    title = f"{counted(summary['steps'], 'step')} in {summary['seconds']:,.1f} s"
    console.print(TextTable(title, ("", "at first", "at last"), rows))
    if summary["grader_errors"]:
        console.print(
            f"The grader raised at {counted(summary['grader_errors'], 'response')}, which taught nothing.",
            style="yellow",
        )
    console.print(f"model: {model}")


def print_sweep_plot(console: Console, plot: SweepPlot) -> None:
    """The results and the replaced tokens of a sweep, and where the files are."""
    if not plot.complete:
        console.print(UNFINISHED, style="yellow")
    settings = [result.to_json() for result in plot.results]
    console.print(results_table(settings))
    _print_grader_errors(console, settings)
    if plot.replaced_tokens:
        console.print(replaced_token_table(plot.replaced_tokens))
    print_files(console, plot.files)


def replaced_token_table(tokens: Sequence[ReplacedToken]) -> TextTable:
    """The tokens replaced most often, with what took their place; a few for each criterion."""
    rows = []
    shown: dict[str, int] = {}
    for token in tokens:
        shown[token.criterion] = shown.get(token.criterion, 0) + 1
        if shown[token.criterion] > _SHOWN_TOKENS:
            continue
        rows.append(
            (
                one_line(token.criterion),
                visible(token.text),
                replacements_text(token),
                str(token.token_id),
                f"{token.occurrences:,}",
                f"{token.share:.1%}",
                f"{token.delta_logp:+.4f}",
            )
        )
    columns = ("criterion", "token", "replaced by", "id", "times", "share", "mean Δlog p")
    return TextTable("Tokens replaced most often", columns, rows, text_columns=3)


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """What `dlogp doctor` found."""
    versions = {"python": report["python"], **report["versions"], **report["tools"]}
    rows = [(name, version or "not found") for name, version in versions.items()]
    console.print(TextTable("Installation", ("installed", "version"), rows, text_columns=2))
    console.print(report["torch_trial"])
    console.print(TextTable("Devices", ("device", "properties"), _devices(report), text_columns=2))
    choices = [Choice(**choice) for choice in report["backends"]]
    for device in dict.fromkeys(choice.device for choice in choices):
        _print_choices(console, device, [choice for choice in choices if choice.device == device])


def _devices(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    cpu = report["processor"]
    rows = [
        (
            "cpu",
            f"{cpu['name']}, {cpu['cores']} cores, {cpu['torch_threads']} threads in torch\ntorch uses "
            f"{cpu['capability']}; it has {', '.join(cpu['instruction_sets']) or 'none of the sets that matter'}",
        )
    ]
    for gpu in report["gpus"]:
        capability = f"compute capability {gpu['compute_capability']}"
        rows.append((f"cuda:{gpu['number']}", f"{gpu['name']}, {capability}, {gpu['memory_gib']} GiB"))
    if not report["gpus"]:
        build = f"built with CUDA {report['cuda']}" if report["cuda"] else "built without CUDA"
        rows.append(("cuda", f"none: torch sees no CUDA device (it is {build})"))
    return rows


def _print_choices(console: Console, device: str, choices: Sequence[Choice]) -> None:
    """Which backends serve the ops on a device, and each reason why not another, once, with its ops."""
    console.print(f"Which backend serves each op on {device}", style="italic")
    served: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        served.setdefault((f"{choice.backend} serves", ""), []).append(choice.op)
        if choice.measured is not None:
            served.setdefault((f"{choice.backend} comes first for", choice.measured), []).append(choice.op)
    for backend, choice in itertools.product(BACKENDS, choices):
        if backend in choice.others:
            served.setdefault((f"not {backend} for", choice.others[backend]), []).append(choice.op)
    for (what, reason), ops in served.items():
        console.print(f"  {what} {_op_names(ops, choices)}{': ' * bool(reason)}{reason}")


def _op_names(ops: Sequence[str], choices: Sequence[Choice]) -> str:
    """All of a device, or those that are missing where these are fewer, or each."""
    missing = [choice.op for choice in choices if choice.op not in ops]
    if not missing:
        return f"all {len(ops)} ops" if len(ops) > 1 else ops[0]
    if len(missing) < len(ops):
        return f"all ops but {', '.join(missing)}"
    return ", ".join(ops)
