"""What `dlogp plot` makes of a data set of token statistics: pictures, each a function that returns it, and tables.

Each `draw_…` takes a `TokenDataset` and returns a matplotlib Figure. Fig. 1b, 3a and 3b are those of arXiv 2603.22117.
"""

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .classes import ClassChanges, class_changes, draw_classes, read_classes
from .dataset import TokenDataset
from .histograms import draw_all_histograms, draw_histograms
from .pictures import PALETTE, as_text, legend_above, panels, render, tidy, write_figures
from .quantiles import Batch, quantiles
from .sources import drawn_sources, responses_of
from .text import counted
from .words import DEFAULT_MIN_COUNT, Words, changed_tokens, words_csv, words_markdown

__all__ = [
    "Plot", "draw_all_histograms", "draw_classes", "draw_gradient_mass", "draw_histograms", "draw_positions",
    "draw_probabilities", "plot",
]  # fmt: skip

_POSITION_BINS = 40
#: Letters in a line above a panel.
_TITLE_WIDTH = 44
_DELTA_LOGP_BINS = (-2, -1, -0.5, -0.2, -0.05, 0.05, 0.2, 0.5, 1, 2)
_PROBABILITY_BINS = np.linspace(0.0, 1.0, 11)


class Plot(NamedTuple):
    """What `plot` made: files, what their tables hold, and whether the run had finished."""

    files: list[Path]
    words: Words
    classes: ClassChanges
    complete: bool


def plot(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    min_count: int = DEFAULT_MIN_COUNT,
    classes: str | Path | None = None,
) -> Plot:
    """Draw the pictures and rank the tokens that RL changed.

    Args:
        directory: what `dlogp metrics --out` wrote.
        out: where the files go; `directory/figures` unless given.
        min_count: do not rank tokens by their mean that occur less often, see `changed_tokens`.
        classes: a JSON file of token classes, see `read_classes`.

    Returns:
        Plot: `top_tokens.md` and `top_tokens.csv`, and as PNG and SVG `histograms`, `all_histograms`, `probabilities`,
        `gradient_mass`, `positions` and `token_classes`.

    Raises:
        DatasetError: `directory` holds no data set, or an empty one, or `classes` are none.
        OSError: `out` is not writable.
    """
    patterns = read_classes(classes)
    dataset = TokenDataset(directory)
    words = changed_tokens(dataset, min_count=min_count)
    changes = class_changes(dataset, patterns)
    figures = {
        "histograms": draw_histograms(dataset),
        "all_histograms": draw_all_histograms(dataset),
        "probabilities": draw_probabilities(dataset),
        "gradient_mass": draw_gradient_mass(dataset),
        "positions": draw_positions(dataset),
        "token_classes": draw_classes(dataset, patterns),
    }
    contents: dict[str, bytes | str] = {"top_tokens.md": words_markdown(words), "top_tokens.csv": words_csv(words)}
    for name, figure in figures.items():
        contents |= {f"{name}.{kind}": render(figure, kind) for kind in ("png", "svg")}
    return Plot(write_figures(directory, out, contents), words, changes, dataset.complete)


def draw_probabilities(dataset: TokenDataset) -> Figure:
    """The probability that either model gives a token, by its Δlog p in bins of unequal width (Fig. 3b)."""

    def draw(axes: Axes, source: str | None) -> None:
        num_bins = len(_DELTA_LOGP_BINS) + 1

        def read() -> Iterator[Batch]:
            """Groups are the bins of the RL model, then those of the base."""
            for delta_logp, *logps in _finite(dataset, source, "delta_logp", "logp", "base_logp"):
                bins = np.digitize(delta_logp, _DELTA_LOGP_BINS)
                yield np.append(bins, bins + num_bins), np.exp(np.append(*logps))

        means, (low, high) = _means(read, 2 * num_bins), quantiles(read, 2 * num_bins, (0.25, 0.75)).T
        for place in np.flatnonzero(np.isfinite(means)).tolist():
            model, number = divmod(place, num_bins)
            x = number + 0.3 * model - 0.15
            axes.vlines(x, low[place], high[place], PALETTE[model], linewidth=6, alpha=0.3)
            axes.plot(x, means[place], "o", color=PALETTE[model])
        for model, name in enumerate(("RL", "base")):
            axes.plot([], [], "o", color=PALETTE[model], label=f"{name} model: mean, bar between quartiles")
        axes.set_ylim(0, 1.02)
        axes.tick_params("x", labelsize=9)
        axes.set_xlim(-0.6, len(_DELTA_LOGP_BINS) + 0.6)
        axes.set_xticks(np.arange(len(_DELTA_LOGP_BINS)) + 0.5, [f"{x:g}".replace("-", "−") for x in _DELTA_LOGP_BINS])

    return _by_source(dataset, draw, "Δlog p [nats], in bins between these", "probability of the token")


def draw_gradient_mass(dataset: TokenDataset) -> Figure:
    """Shares of tokens, of gradient mass and of Σ|Δlog p| by the probability of the token (Lemma 3.1, Fig. 3a).

    The gradient of a token's loss with respect to the logits has the l1 norm 2 |w| (1 − π). With equal weights |w| its
    share of the sum is that of 1 − π; π is of the model that wrote the response: base, or else RL.
    """

    def draw(axes: Axes, source: str | None) -> None:
        masses = dict.fromkeys(("tokens", "gradient mass", "Σ|Δlog p|"), np.zeros(len(_PROBABILITY_BINS) - 1))
        of_writer = "base_logp" if source == "base" else "logp"
        for logp, delta_logp in _finite(dataset, source, of_writer, "delta_logp"):
            probability = np.exp(logp)
            for name, weights in zip(masses, (None, 1 - probability, np.abs(delta_logp)), strict=True):
                masses[name] = masses[name] + np.histogram(probability, _PROBABILITY_BINS, weights=weights)[0]
        for number, (name, mass) in enumerate(masses.items()):
            places = _PROBABILITY_BINS[:-1] + 0.02 + 0.03 * number
            colour = ("0.65", *PALETTE)[number]
            axes.bar(places, mass / (mass.sum() or 1), 0.028, color=colour, label=f"share of {name}")
        axes.set_xticks(_PROBABILITY_BINS)

    return _by_source(dataset, draw, "probability π of the token, by the model that wrote it", "share")


def draw_positions(dataset: TokenDataset) -> Figure:
    """Δlog p over the position in the response: mean, and bands that hold 90 and 98 % of the tokens."""

    def positions() -> Iterator[Batch]:
        return ((0, batch["position"].to_numpy()) for batch in dataset.batches(["position"]))

    # NaN of no tokens, which is told when they are drawn.
    last = int(np.nan_to_num(quantiles(positions, 1, (0.995,))[0, 0]))
    width = last // _POSITION_BINS + 1
    edges = np.arange(0, last + width + 1, width) - 0.5

    def draw(axes: Axes, source: str | None) -> None:
        def read() -> Iterator[Batch]:
            for position, delta_logp in _finite(dataset, source, "position", "delta_logp"):
                bins = np.digitize(position, edges) - 1
                yield bins[bins < len(edges) - 1], delta_logp[bins < len(edges) - 1]

        means = _means(read, len(edges) - 1)
        there = np.isfinite(means)
        places = (edges[:-1] + width / 2)[there]
        bands = quantiles(read, len(edges) - 1, (0.01, 0.05, 0.95, 0.99))[there].T
        for low, high, alpha, name in ((0, 3, 0.12, "1 to 99 % of the tokens"), (1, 2, 0.3, "5 to 95 % of the tokens")):
            axes.fill_between(places, bands[low], bands[high], color=PALETTE[0], alpha=alpha, linewidth=0, label=name)
        axes.plot(places, means[there], color=PALETTE[1], marker=".", label="mean")
        axes.axhline(0.0, color="0.35", linewidth=0.9, linestyle=":", zorder=0)

    return _by_source(dataset, draw, "position in the response [tokens]", "Δlog p [nats]")


def _finite(dataset: TokenDataset, source: str | None, *names: str) -> Iterator[list[np.ndarray]]:
    """Columns of a source without the rows in which one is not finite, some rows at a time."""
    for columns in dataset.values(names, source):
        keep = np.logical_and.reduce([np.isfinite(column) for column in columns])
        yield [column[keep].astype(np.float64) for column in columns]


def _means(read: Callable[[], Iterator[Batch]], num_groups: int) -> np.ndarray:
    """The mean of each group, NaN of one without values."""
    sums, counts = np.zeros((2, num_groups))
    for groups, values in read():
        sums += np.bincount(groups, values, num_groups)
        counts += np.bincount(groups, minlength=num_groups)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _by_source(dataset: TokenDataset, draw: Callable[[Axes, str | None], None], x: str, y: str) -> Figure:
    """A panel for each source that is shown, with one legend and equal axes."""
    sources, remark = drawn_sources(dataset)
    figure, all_axes = panels(len(sources), 4, (5.2, 4.0), share=True)
    for axes, (source, count) in zip(all_axes, sources.items(), strict=True):
        title = responses_of(source)
        tidy(axes, textwrap.fill(f"{title[0].upper()}{title[1:]} ({counted(count, 'token')})", _TITLE_WIDTH), x, y)
        draw(axes, source)
    legend_above(figure, remark)
    return as_text(figure)
