"""`dlogp plot`: which picture book a directory asks for."""

from pathlib import Path

from rich.console import Console

from ..report.responses import RESPONSES_FILE
from .tables import print_plot, print_sweep_plot


def plot_any(console: Console, directory: Path, out: Path | None, min_count: int | None) -> None:
    """Draw a directory of responses or a data set of token statistics, and print what is in it."""
    if (directory / RESPONSES_FILE).exists():
        from ..report.curves import plot_sweep

        print_sweep_plot(console, plot_sweep(directory, out, min_count=1 if min_count is None else min_count))
    else:
        from ..report.figures import DEFAULT_MIN_COUNT, plot

        print_plot(console, plot(directory, out, min_count=DEFAULT_MIN_COUNT if min_count is None else min_count))
