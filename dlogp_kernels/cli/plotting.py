"""`dlogp plot`: which picture book directories ask for."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..report.errors import DatasetError
from ..report.responses import RESPONSES_FILE
from ..report.terminal import print_files
from ..report.training import LOG_FILE
from .tables import print_plot, print_sweep_plot


def plot_any(console: Console, directories: Sequence[Path], out: Path | None, min_count: int | None) -> None:
    """Draw runs of training, a directory of responses or a data set of token statistics, and print what is in it."""
    if all((directory / LOG_FILE).exists() for directory in directories):
        from ..report.training_curves import plot_training

        print_files(console, plot_training(directories, out))
        return
    if len(directories) > 1:
        without = next(directory for directory in directories if not (directory / LOG_FILE).exists())
        raise DatasetError(f"{without} has no {LOG_FILE}: only runs of `dlogp train` can be drawn together")
    directory = directories[0]
    if (directory / RESPONSES_FILE).exists():
        from ..report.curves import plot_sweep

        print_sweep_plot(console, plot_sweep(directory, out, min_count=1 if min_count is None else min_count))
    else:
        from ..report.figures import DEFAULT_MIN_COUNT, plot

        print_plot(console, plot(directory, out, min_count=DEFAULT_MIN_COUNT if min_count is None else min_count))
