"""Histograms of token statistics: Fig. 1b of arXiv 2603.22117 for the user's pair, and the same of all statistics."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .dataset import TokenDataset
from .pictures import as_text, legend_above, panels, style, tidy
from .quantiles import quantiles
from .sources import drawn_sources, numbers_of, responses_of
from .text import counted


class Panel(NamedTuple):
    """One histogram: columns whose mean is shown, its title, its axis, and which signs values have: +, − or ±."""

    columns: tuple[str, ...]
    title: str
    label: str
    sign: str = "+"


_DELTA_LOGP = Panel(("delta_logp",), "Δlog p = log π_RL − log π_base", "Δlog p [nats]", "±")
_PANELS = (
    Panel(("entropy",), "Entropy of the RL model", "entropy [nats]"),
    Panel(("kl",), "KL(RL ‖ base)", "KL divergence [nats]"),
    _DELTA_LOGP,
)
#: Of the statistics lse and base_lse have no scale of their own: logits may be off by a constant.
_ALL_PANELS = (
    _DELTA_LOGP,
    Panel(("logp",), "log p of the RL model", "log p [nats]", "−"),
    Panel(("base_logp",), "log p of the base model", "log p [nats]", "−"),
    _PANELS[0],
    Panel(("base_entropy",), "Entropy of the base model", "entropy [nats]"),
    _PANELS[1],
    Panel(("reverse_kl",), "KL(base ‖ RL)", "KL divergence [nats]"),
    Panel(("kl", "reverse_kl"), "Mean of both KLs", "KL divergence [nats]"),
)
# The share of the tokens beyond either end of a panel; the axis says how many they are.
_BEYOND = 2e-5
#: The areas of more sources would hide each other.
_MOST_FILLED = 3


class Histogram(NamedTuple):
    """Densities over the common bins of one column, for one source."""

    source: str | None
    edges: np.ndarray
    density: np.ndarray
    num_tokens: int
    num_beyond: int


def histograms(dataset: TokenDataset, shown: Sequence[Panel]) -> list[list[Histogram]]:
    """Of each panel its column, binned alike for each source that is shown."""
    sources, _ = drawn_sources(dataset)
    names = list(dict.fromkeys(name for panel in shown for name in panel.columns))

    def read(source: str | None) -> Iterator[tuple[int, np.ndarray]]:
        """Numbers of panels, and some of their values."""
        for columns in dataset.values(names, source):
            of_name = dict(zip(names, columns, strict=True))
            for number, panel in enumerate(shown):
                means = np.stack([of_name[name] for name in panel.columns]).mean(0, dtype=np.float64)
                yield number, means.astype(np.float32)

    ranges = quantiles(
        lambda: itertools.chain.from_iterable(map(read, sources)), len(shown), (_BEYOND, 1 - _BEYOND)
    ).tolist()
    total = sum(sources.values())
    edges = [_bin_edges(low, high, total, panel.sign) for panel, (low, high) in zip(shown, ranges, strict=True)]
    of_source = [_histograms_of(source, count, read(source), edges) for source, count in sources.items()]
    return list(map(list, zip(*of_source, strict=True)))


def _histograms_of(
    source: str | None, count: int, batches: Iterable[tuple[int, np.ndarray]], edges: Sequence[np.ndarray]
) -> list[Histogram]:
    counts = [np.zeros(len(one) - 1, np.int64) for one in edges]
    for number, values in batches:
        counts[number] += np.histogram(values, edges[number])[0]
    # The density is that of all tokens, so that what lies beyond the axis is not spread over the rest.
    return [
        Histogram(source, one, inside / (count * np.diff(one)), count, count - int(inside.sum()))
        for one, inside in zip(edges, counts, strict=True)
    ]


def _bin_edges(low: float, high: float, total: int, sign: str) -> np.ndarray:
    """Equal bins for `total` tokens, all but a few of which lie from `low` to `high`; both are NaN if none is finite.

    Signed values get an odd picture if the bin at 0 lies on one side: most tokens are within rounding of 0.
    So there the edges are at half widths, and the bin in the middle is centred on 0.
    """
    if np.isnan(low):
        return np.linspace(-1.0 if sign != "+" else 0.0, 1.0 if sign != "−" else 0.0, 11)
    num_bins = int(np.clip(3 * total ** (1 / 3), 20, 60))
    if sign == "+":
        return np.linspace(0.0, max(high, 1e-3), num_bins + 1)
    if sign == "−":
        return np.linspace(min(low, -1e-3), 0.0, num_bins + 1)
    low, high = min(low, 0.0), max(high, 1e-3)
    width = (high - low) / num_bins
    first, last = np.floor(low / width - 0.5), np.ceil(high / width + 0.5)
    return (np.arange(first, last + 1) + 0.5) * width if first < last else np.array([-width / 2, width / 2])


def draw_histograms(dataset: TokenDataset) -> Figure:
    """Three panels side by side: entropy, KL, Δlog p; densities on a logarithmic axis, one line for each source."""
    return _draw(dataset, _PANELS)


def draw_all_histograms(dataset: TokenDataset) -> Figure:
    """The same of Δlog p, and of both models' log p, entropies, KL divergences and the mean of these."""
    return _draw(dataset, _ALL_PANELS)


def _draw(dataset: TokenDataset, shown: Sequence[Panel]) -> Figure:
    figure, all_axes = panels(len(shown), 4, (4.5, 4.1))
    for axes, panel, data in zip(all_axes, shown, histograms(dataset, shown), strict=True):
        _draw_panel(axes, panel, data)
    legend_above(figure, drawn_sources(dataset)[1])
    return as_text(figure)


def _draw_panel(axes: Axes, panel: Panel, data: Sequence[Histogram]) -> None:
    numbers = numbers_of([histogram.source for histogram in data])
    for histogram in data:
        label = f"{responses_of(histogram.source)} ({counted(histogram.num_tokens, 'token')})"
        colour, line = style(numbers[histogram.source])
        if len(data) <= _MOST_FILLED:
            axes.stairs(histogram.density, histogram.edges, color=colour, alpha=0.13, fill=True)
        axes.stairs(histogram.density, histogram.edges, color=colour, linewidth=1.6, linestyle=line, label=label)
    if panel.sign == "±":
        axes.axvline(0.0, color="0.35", linewidth=0.9, linestyle=":", zorder=0)
    densities = np.concatenate([histogram.density for histogram in data])
    if (densities > 0).any():
        axes.set_yscale("log")
        axes.set_ylim(densities[densities > 0].min() / 2, densities.max() * 2)
    first, last = data[0].edges[0], data[0].edges[-1]
    margin = 0.02 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.locator_params(axis="x", nbins=6)
    num_beyond = sum(histogram.num_beyond for histogram in data)
    beyond = f", {counted(num_beyond, 'token')} beyond" if num_beyond else ""
    tidy(axes, panel.title, panel.label + beyond, "density of tokens (log scale)")
