"""What all commands are made of: options that are stated with a job, those of the files of a run, and a terminal."""

import functools
import inspect
import webbrowser
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand

from ..jobs.allowed import OneOf, Option, flag_of, options_of
from ..jobs.workers.freed_memory import keep_freed_memory
from ..report.terminal import Terminal
from ..report.text import printable

console = Terminal()


Rl = Annotated[str, typer.Option(help="The RL model: a directory, or a name on the Hub.", show_default=False)]
Base = Annotated[str, typer.Option(help="Its base model, likewise.", show_default=False)]
Problems = Annotated[
    Path,
    typer.Option(
        help="JSONL with prompt (or prompt_ids, or messages), answer, and optionally id.",
        show_default=False,
    ),
]
ResponsesOut = Annotated[
    Path,
    typer.Option(help="Directory for the responses; a run of the same arguments there goes on.", show_default=False),
]
Draft = Annotated[Literal["base", "rl"], typer.Option(help="Who draws the token that may be replaced.")]
Grader = Annotated[
    str,
    typer.Option(
        help="exact (final answers: after the last #, or in \\boxed{}), math-verify, or module:function of your own, "
        "called with the response's text and the problem.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Fail unless --out holds a run to go on with (one goes on without, too).")
]


_THREADS = inspect.Parameter(
    "threads",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        int | None, typer.Option(min=1, max=1024, help="Of the computation on a CPU.", show_default="one for each core")
    ],
)


class Command(TyperCommand):
    """A command whose arguments are Unicode, and whose options are given once, but for those that are lists."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for text in args:
            # So Python hands over bytes that are no UTF-8, which neither JSON nor safetensors take in a name.
            if any("\ud800" <= character <= "\udfff" for character in text):
                ctx.fail(f"{printable(text)} is not UTF-8, expected text that is.")
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option, count in Counter(given).items():
            if count > 1 and not option.multiple:
                ctx.fail(f"{option.opts[0]} is given {count} times, expected once.")
        return super().parse_args(ctx, args)


def open_in_browser(page: Path) -> None:
    """Or say that there is none."""
    if not webbrowser.open(page.resolve().as_uri()):
        console.print("There is no browser here: open the file in one.", style="yellow")


def with_options(*kinds: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put the options of a job, the fields of the dataclasses `kinds`, in the place of a command's `**options`.

    The command is given them by the names of the fields; a limit on lines is still text then. It runs with so many
    threads as `--threads` says, which is no option of the job: other numbers of threads may go on with its run.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(threads: int | None, **given: Any) -> None:
            keep_freed_memory()
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            command(**given)

        own = [one for one in inspect.signature(command).parameters.values() if one.kind is not one.VAR_KEYWORD]
        options = [_parameter(kind, name, about) for kind in kinds for name, about in options_of(kind).items()]
        parameters = [*own, *options, _THREADS]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(kind: type, name: str, about: Option) -> inspect.Parameter:
    """An option of a job as typer takes it."""
    default = getattr(kind, name)
    annotation: Any = get_type_hints(kind)[name]
    if about.each:
        annotation = list[int] | None
    elif about.in_bytes:
        annotation, default = (str | None, None) if default is None else (str, f"{default >> 20}MiB")
    elif isinstance(about.check, OneOf):
        annotation = Literal[tuple(about.check.choices)]
    # A switch that is off has no second name to switch it off.
    names = [flag_of(about.each or name)] if about.each or default is False else []
    shown = typer.Option(*names, help=about.help, show_default=about.unset or True)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, shown]
    )


def with_line_limit(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a job with the limit on lines in bytes; JobError for a text that is none."""
    from ..jobs.inputs.records import line_limit

    return options | {"max_line_size": line_limit(options["max_line_size"])}
