"""`dlogp plot`: which pictures and tables directories ask for."""

from pathlib import Path
from typing import Annotated

import typer

from ..report.errors import DatasetError
from .command import console


def plot(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR…",
            help="What `dlogp metrics`, `generate`, `sweep` or `train` wrote; several of `train` are overlaid.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the files.", show_default="figures in the first DIR")
    ] = None,
    min_count: Annotated[
        int | None,
        typer.Option(
            help="Do not rank rarer tokens by their mean; leave rarer replaced tokens out.",
            show_default="10, of replaced tokens 1",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help='Classes of tokens, of `dlogp metrics`: a JSON object such as {"reflection": ["wait", "hm+"]}.',
            show_default="numbers, connectives, reflection",
        ),
    ] = None,
) -> None:
    """Draw what a run found.

    Of `dlogp metrics`: histograms of all statistics, probabilities over Δlog p, shares of gradient mass, Δlog p over
    positions, classes of tokens, and the tokens that RL raised and lowered most. Of `dlogp sweep`: accuracy over the
    replaced share, extrapolation against replacement, a map over τ and γ, and the tokens replaced most often, also as a
    page of HTML. Of `dlogp train`: accuracy, entropy and response length over steps; runs that differ in their seed
    alone are one line, their mean with a band of one standard error.
    """
    from ..report.dataset import TOKENS_DIRECTORY
    from ..report.responses import RESPONSES_FILE
    from ..report.terminal import print_files
    from ..report.training import LOG_FILE
    from .tables import print_plot, print_sweep_plot

    if classes is not None and not all((directory / TOKENS_DIRECTORY).exists() for directory in directories):
        raise DatasetError(f"--classes {classes}: only what `dlogp metrics` wrote has classes of tokens")
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
        from ..report import figures

        least = figures.DEFAULT_MIN_COUNT if min_count is None else min_count
        print_plot(console, figures.plot(directory, out, min_count=least, classes=classes))
