"""`dlogp sweep`."""

from typing import Annotated, Any

import typer

from ..jobs.allowed import taken
from ..jobs.graders import EXACT
from ..jobs.options import Decoding, Working
from .command import Base, Draft, Grader, Problems, ResponsesOut, Resume, Rl, console, with_line_limit, with_options


@with_options(Decoding, Working)
def sweep(
    rl: Rl,
    base: Base,
    data: Problems,
    out: ResponsesOut,
    criterion: Annotated[
        list[str],
        typer.Option(
            help="A criterion with its thresholds, such as delta_logp:-2,-1,-0.5 or kl:0.1 (in nats), random:0.05 (a "
            "probability), all; may be repeated.",
            show_default=False,
        ),
    ],
    gamma: Annotated[str, typer.Option(help="Values of γ ≥ 0, such as 0,0.05,0.1; 0 replaces only.")] = "0",
    draft: Draft = "base",
    seed: Annotated[str, typer.Option(help="Seeds, such as 0,1,2: responses of all are averaged.")] = "0",
    baselines: Annotated[bool, typer.Option(help="Draw from both models alone, too.")] = True,
    grader: Grader = EXACT,
    resume: Resume = False,
    **options: Any,
) -> None:
    """Draw and grade responses under every criterion, threshold, γ and seed; `dlogp plot` draws the curves.

    Killed and started again with the same arguments, it goes on where it was.
    """
    from ..jobs.decoding import run_sweep
    from ..jobs.settings import grid, parse_criteria, parse_numbers
    from .tables import print_results

    working = taken(Working, options)
    decoding = Decoding(**with_line_limit(options))
    gammas = parse_numbers("--gamma", gamma, float)
    settings = grid(parse_criteria(criterion), gammas, draft=draft, baselines=baselines)
    seeds = parse_numbers("--seed", seed, int)
    summary = run_sweep(
        rl, base, data, out, settings=settings, seeds=seeds, decoding=decoding, grader=grader, resume=resume, **working
    )
    print_results(console, summary, out)
