"""What the commands print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..jobs.doctor import Report
from ..report.figures import Plot, TopToken
from ..report.text import visible


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


def print_report(console: Console, report: Report) -> None:
    """What `dlogp doctor` found."""
    installation = Table("installed", "version", title="Installation")
    installation.add_row("python", report.python)
    for name, version in {**report.versions, **report.tools}.items():
        installation.add_row(name, Text(version) if version else Text("not found", style="yellow"))
    console.print(installation)
    console.print(_devices(report))
    served = Table("op", "device", "backend", "why not another", title="Which backend serves each op")
    for choice in report.backends:
        others = "\n".join(f"{name}: {reason}" for name, reason in choice.others.items())
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
