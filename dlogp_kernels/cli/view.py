"""`dlogp view`."""

from pathlib import Path
from typing import Annotated

import typer

from ..report.view import MAX_TOKENS
from .command import console, open_in_browser


def view(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `dlogp metrics`, `generate` or `sweep` wrote.")
    ],
    out: Annotated[Path | None, typer.Option(help="The file.", show_default="DIR/view.html")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Directory or name of the tokenizer, where the run's models are no longer where they were.",
            show_default="that of the run",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Show a sample of whole responses, the same in every run, of more tokens than these.")
    ] = MAX_TOKENS,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write a page of HTML to look at responses: every token coloured by Δlog p or another number, with all of them.

    Responses of both models to a prompt stand side by side, replaced tokens beside their drafts. The page is one file,
    which loads nothing from anywhere.
    """
    from ..jobs.view import run_view
    from ..report.terminal import print_files

    found = run_view(directory, out, tokenizer=tokenizer, max_tokens=max_tokens)
    for remark in found.remarks:
        console.print(remark, style="yellow")
    console.print(found.subtitle)
    print_files(console, [found.path])
    if open_page:
        open_in_browser(found.path)
