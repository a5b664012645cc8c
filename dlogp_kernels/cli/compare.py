"""`dlogp compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.allowed import taken
from ..jobs.graders import EXACT
from ..jobs.options import Comparing, Working
from .command import Base, Grader, Rl, console, with_line_limit, with_options


@with_options(Comparing, Working)
def compare(
    rl: Rl,
    base: Base,
    out: Annotated[
        Path,
        typer.Option(
            help="Directory for all of it; what was stopped goes on with the same arguments.", show_default=False
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Problems to answer: JSONL with prompt (or prompt_ids, or messages), answer, and optionally id.",
            show_default=False,
        ),
    ] = None,
    responses: Annotated[
        Path | None,
        typer.Option(
            help="Instead, responses that exist: what `dlogp metrics --data` takes. Nothing is drawn.",
            show_default=False,
        ),
    ] = None,
    grader: Grader = EXACT,
    **options: Any,
) -> None:
    """Compare a pair on problems: answers of both models, numbers of every token, figures, and a page to look at.

    The same as `dlogp sweep` of both models alone, `dlogp metrics` of what they wrote, `dlogp plot` and `dlogp view`.
    """
    from ..jobs.compare import run_compare
    from ..report.terminal import print_files
    from .tables import print_metrics, print_plot, results_table

    working = taken(Working, options)
    comparing = Comparing(**with_line_limit(options))
    found = run_compare(rl, base, out, data=data, responses=responses, grader=grader, options=comparing, **working)
    if found.drawn is not None:
        console.print(results_table(found.drawn["settings"]))
    print_plot(console, found.figures)
    print_metrics(console, found.measured, out / "metrics")
    for remark in found.view.remarks:
        console.print(remark, style="yellow")
    print_files(console, [found.view.path])
