"""Histograms of token statistics: Fig. 1b of arXiv 2603.22117 for the user's pair, and the same of all statistics."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .dataset import TokenDataset
from .pictures import as_text, legend_above, panels, style, tidy
from .sources import numbers_of, responses_of, shown_sources
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


def histograms(dataset: TokenDataset, panel: Panel) -> list[Histogram]:
    """The panel's column, binned alike for each source that is shown."""
    sources, _ = shown_sources(dataset)
    values = {
        source: np.stack([dataset.column(name, source) for name in panel.columns]).mean(0, dtype=np.float64)
        for source in sources
    }
    edges = bin_edges(list(values.values()), panel.sign)
    return [_histogram(source, column, edges) for source, column in values.items()]


def _histogram(source: str | None, values: np.ndarray, edges: np.ndarray) -> Histogram:
    counts, _ = np.histogram(values, edges)
    beyond = len(values) - int(counts.sum())
    # The density is that of all tokens, so that what lies beyond the axis is not spread over the rest.
    return Histogram(source, edges, counts / (max(len(values), 1) * np.diff(edges)), len(values), beyond)


def bin_edges(values: Sequence[np.ndarray], sign: str = "±") -> np.ndarray:
    """Equal bins from the lowest to the highest token but a few outliers.

    Signed values get an odd picture if the bin at 0 lies on one side: most tokens are within rounding of 0.
    So there the edges are at half widths, and the bin in the middle is centred on 0.
    """
    finite = [column[np.isfinite(column)] for column in values]
    total = sum(map(len, finite))
    if total == 0:
        return np.linspace(-1.0 if sign != "+" else 0.0, 1.0 if sign != "−" else 0.0, 11)
    pooled = np.concatenate(finite)
    low, high = np.quantile(pooled, [_BEYOND, 1 - _BEYOND])
    num_bins = int(np.clip(3 * total ** (1 / 3), 20, 60))
    if sign == "+":
        return np.linspace(0.0, max(float(high), 1e-3), num_bins + 1)
    if sign == "−":
        return np.linspace(min(float(low), -1e-3), 0.0, num_bins + 1)
    low, high = min(float(low), 0.0), max(float(high), 1e-3)
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
    for axes, panel in zip(all_axes, shown, strict=True):
        _draw_panel(axes, panel, histograms(dataset, panel))
    legend_above(figure, shown_sources(dataset)[1])
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
