"""`dlogp demo`."""

from pathlib import Path
from typing import Annotated

import typer

from .command import console, open_in_browser


def demo(
    out: Annotated[Path, typer.Option(help="Directory for responses, data set and figures.")] = Path("demo_output"),
    problems: Annotated[
        int | None, typer.Option(help="Held-out problems for each model.", show_default="1000; 48 with --llm")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer problems and tokens: half a minute.")] = False,
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain",
            help="Train the pair anew first, into OUT/pair (minutes) or OUT/llm/retrained (longer), and use it.",
        ),
    ] = False,
    curves: Annotated[
        bool,
        typer.Option(
            "--curves", help="Instead, draw accuracy over the replaced share, and extrapolation: minutes, resumable."
        ),
    ] = False,
    llm: Annotated[
        bool,
        typer.Option(
            "--llm",
            help="Instead, a real language model and word problems: minutes, 1.6 GB in OUT/llm, the extra 'llm-demo'.",
        ),
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="With --llm, open the page in a browser.")] = False,
) -> None:
    """Show the method on a tiny trained pair that comes with the package, and the memory it takes at full size."""
    if llm and curves:
        raise typer.BadParameter("--llm and --curves are given together, expected one of them")
    if llm:
        from ..demo.llm.run import run_llm_demo

        page = run_llm_demo(out, num_problems=problems, quick=quick, retrain=retrain, console=console)
        if open_page:
            open_in_browser(page)
        return
    if curves:
        from ..demo.curves import run_curves

        run_curves(out, num_problems=problems, quick=quick, retrain=retrain, console=console)
        return
    from ..demo.run import run_demo

    run_demo(out, num_problems=problems, quick=quick, retrain=retrain, console=console)
