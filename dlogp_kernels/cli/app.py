"""The commands and their options. Heavy modules are imported by the command that needs them."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Token log-probabilities of an RL model and its base: measure a pair, plot it, look at the installation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


class Dtype(StrEnum):
    """Of the weights in memory."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class OnError(StrEnum):
    """What to do with a line of the data that can not be used."""

    RAISE = "raise"
    SKIP = "skip"


@app.command()
def metrics(
    rl: Annotated[str, typer.Option(help="The RL model: a directory, or a name on the Hub.", show_default=False)],
    base: Annotated[str, typer.Option(help="Its base model, likewise.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL or Parquet with prompt and response, or messages, or prompt_ids and response_ids; optionally "
            "id and source (rl, base: who wrote the response).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Directory for the data set; a run of the same arguments there goes on.", show_default=False),
    ],
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory beyond the models, such as 4GiB.", show_default="none")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens at once, padding included.")] = 8192,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in memory.")] = Dtype.BF16,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="cuda if there is one")
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="One model in memory at a time; the base's hidden states go to disk.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail unless --out holds a run to go on with (one goes on without, too).")
    ] = False,
    on_error: Annotated[OnError, typer.Option(help="For a line that can not be used.")] = OnError.RAISE,
    temperature: Annotated[float, typer.Option(help="Divides the logits of both models.")] = 1.0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the models.")
    ] = False,
) -> None:
    """Measure Δlog p, entropies and KLs of a pair of models at every response token.

    Killed and started again with the same arguments, it goes on where it was.
    """
    from ..jobs.metrics import run_metrics
    from .tables import print_metrics

    summary = run_metrics(
        rl,
        base,
        data,
        out,
        memory_limit=memory_limit,
        batch_tokens=batch_tokens,
        dtype=dtype.value,
        device=device,
        sequential=sequential,
        resume=resume,
        on_error=on_error.value,
        temperature=temperature,
        trust_remote_code=trust_remote_code,
    )
    print_metrics(_console, summary, out)


@app.command()
def plot(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `dlogp metrics --out` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Directory for the files.", show_default="DIR/figures")] = None,
    min_count: Annotated[int, typer.Option(help="Leave rarer tokens out of the table.")] = 10,
) -> None:
    """Draw histograms of entropy, KL and Δlog p, and list the tokens that RL raised most."""
    from ..report.figures import plot as draw
    from .tables import print_plot

    print_plot(_console, draw(directory, out, min_count=min_count))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, and which backend serves each op here, and why not another."""
    from ..jobs.doctor import examine
    from .tables import print_report

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_report(_console, report)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for responses, data set and figures.")] = Path("demo_output"),
    problems: Annotated[int | None, typer.Option(help="Held-out problems for each model.", show_default="1000")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer problems and tokens: half a minute.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the pair anew into OUT/pair first (minutes) and use that.")
    ] = False,
) -> None:
    """Show the method on a tiny trained pair that comes with the package, and the memory it takes at full size."""
    from ..demo.run import run_demo

    run_demo(out, num_problems=problems, quick=quick, retrain=retrain, console=_console)


def run() -> None:
    """Run the command of `sys.argv`; errors that a user can do something about are one message and status 1."""
    from ..jobs.errors import JobError
    from ..report.errors import DatasetError

    try:
        app()
    except (JobError, DatasetError, OSError) as error:
        _errors.print(f"error: {error}", markup=False, style="red")
        sys.exit(1)
