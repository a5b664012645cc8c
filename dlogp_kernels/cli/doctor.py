"""`dlogp doctor`."""

import json
from typing import Annotated

import typer

from .command import console


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, and which backend serves each op here, and why not another."""
    from ..jobs.doctor import examine
    from .tables import print_report

    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        print_report(console, report)
