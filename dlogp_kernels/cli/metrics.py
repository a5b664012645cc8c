"""`dlogp metrics`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.options import Measuring, Working
from .command import Base, Resume, Rl, console, with_options


@with_options(Measuring, Working)
def metrics(
    rl: Rl,
    base: Base,
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL or Parquet with prompt and response, or messages, or prompt_ids and response_ids; optionally "
            "id, source (rl, base: who wrote the response), correct and finished. Or what `dlogp generate` or `sweep`, "
            "TRL or verl wrote: a file, or its directory.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Directory for the data set; a run of the same arguments there goes on.", show_default=False),
    ],
    resume: Resume = False,
    **options: Any,
) -> None:
    """Measure Δlog p, entropies and KLs of a pair of models at every response token.

    Killed and started again with the same arguments, it goes on where it was.
    """
    from ..jobs.metrics import run_metrics
    from .tables import print_metrics

    print_metrics(console, run_metrics(rl, base, data, out, resume=resume, **options), out)
