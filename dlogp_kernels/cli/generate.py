"""`dlogp generate`."""

from typing import Annotated, Any

import typer

from ..jobs.allowed import taken
from ..jobs.graders import EXACT
from ..jobs.options import Decoding, Working
from .command import Base, Draft, Grader, Problems, ResponsesOut, Resume, Rl, console, with_line_limit, with_options


@with_options(Decoding, Working)
def generate(
    rl: Rl,
    base: Base,
    data: Problems,
    out: ResponsesOut,
    criterion: Annotated[
        str,
        typer.Option(
            help="When a drafted token is replaced: delta_logp (below the threshold); kl, reverse_kl, avg_kl, entropy, "
            "rl_entropy (above it); random, all, none."
        ),
    ] = "delta_logp",
    threshold: Annotated[
        float | None,
        typer.Option(help="τ of the criterion, in nats; of random, a probability.", show_default="none"),
    ] = None,
    gamma: Annotated[float, typer.Option(help="γ ≥ 0: how far to go beyond the RL model; 0 replaces only.")] = 0.0,
    draft: Draft = "base",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    grader: Grader = EXACT,
    resume: Resume = False,
    **options: Any,
) -> None:
    """Draw and grade responses to problems, with tokens replaced by the RL model or by extrapolation beyond it.

    Killed and started again with the same arguments, it goes on where it was.
    """
    from ..jobs.decoding import run_generate
    from ..report.responses import Setting
    from .tables import print_results

    working, setting = taken(Working, options), Setting(criterion, threshold, gamma, draft)
    decoding = Decoding(**with_line_limit(options))
    summary = run_generate(
        rl, base, data, out, setting=setting, seed=seed, decoding=decoding, grader=grader, resume=resume, **working
    )
    print_results(console, summary, out)
