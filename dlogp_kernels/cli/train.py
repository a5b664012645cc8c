"""`dlogp train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.graders import EXACT
from ..jobs.options import Training
from .command import Grader, Problems, Resume, console, with_line_limit, with_options


@with_options(Training)
def train(
    base: Annotated[
        str, typer.Option(help="The model to begin with: a directory, or a name on the Hub.", show_default=False)
    ],
    data: Problems,
    out: Annotated[
        Path, typer.Option(help="Directory for the run; one of the same arguments there goes on.", show_default=False)
    ],
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out problems, likewise JSONL.", show_default="none")
    ] = None,
    grader: Grader = EXACT,
    resume: Resume = False,
    **options: Any,
) -> None:
    """Train a model on graded problems: DAPO with reweighted advantages; writes a checkpoint and a log.

    Killed and started again with the same arguments, it goes on from its last checkpoint.
    """
    from ..jobs.train import MODEL_DIRECTORY, run_train
    from .tables import print_training

    training = Training(**with_line_limit(options))
    summary = run_train(base, data, out, training=training, grader=grader, eval_data=eval_data, resume=resume)
    print_training(console, summary, out / MODEL_DIRECTORY)
