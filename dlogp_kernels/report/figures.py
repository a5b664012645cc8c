"""Pictures and tables of a data set of token statistics: Fig. 1b of arXiv 2603.22117 for the user's pair."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .dataset import TokenDataset
from .errors import DatasetError
from .pictures import render, style, tidy, write_figures
from .tables import csv_table, markdown_table
from .text import escape_markdown, quoted, visible

TOP_TOKENS = 50
DEFAULT_MIN_COUNT = 10

_KNOWN_SOURCES = {"rl": ("RL responses", 0), "base": ("base responses", 1)}
_MOST_SOURCES = 12


class Panel(NamedTuple):
    """One histogram: a column, its title, its axis, and whether values have a sign."""

    column: str
    title: str
    label: str
    signed: bool


_PANELS = (
    Panel("entropy", "Entropy of the RL model", "entropy [nats]", signed=False),
    Panel("kl", "KL(RL ‖ base)", "KL divergence [nats]", signed=False),
    Panel("delta_logp", "Δlog p = log π_RL − log π_base", "Δlog p [nats]", signed=True),
)
# The share of the tokens beyond either end of a panel; the axis says how many they are.
_BEYOND = 2e-5


class Histogram(NamedTuple):
    """Densities over the common bins of one column, for one source."""

    source: str | None
    edges: np.ndarray
    density: np.ndarray
    num_tokens: int
    num_beyond: int


class TopToken(NamedTuple):
    """One row of the table of raised tokens; the means are over all the token's places in the data."""

    token_id: int
    text: str
    occurrences: int
    delta_logp: float
    logp: float
    base_logp: float


class Plot(NamedTuple):
    """What `plot` made: files, the rows of its table, and whether the run had finished."""

    files: list[Path]
    top_tokens: list[TopToken]
    min_count: int
    complete: bool


def plot(directory: str | Path, out: str | Path | None = None, *, min_count: int = DEFAULT_MIN_COUNT) -> Plot:
    """Draw the three histograms and list the tokens that RL raised most.

    Args:
        directory: what `dlogp metrics --out` wrote.
        out: where the files go; `directory/figures` unless given.
        min_count: leave out tokens that occur less often, whose mean says little.

    Returns:
        Plot: `histograms.png`, `histograms.svg`, `top_tokens.md` and `top_tokens.csv`, and the table's rows.

    Raises:
        DatasetError: `directory` holds no data set, or an empty one.
        OSError: `out` is not writable.
    """
    if min_count < 1:
        raise DatasetError(f"min_count is {min_count}, expected at least 1")
    dataset = TokenDataset(directory)
    if len(dataset) == 0:
        raise DatasetError(f"{directory} holds no tokens")
    figure = draw_histograms(dataset)
    tokens = top_tokens(dataset, min_count=min_count)
    contents: dict[str, bytes | str] = {
        "histograms.png": render(figure, "png"),
        "histograms.svg": render(figure, "svg"),
        "top_tokens.md": top_tokens_markdown(tokens, min_count),
        "top_tokens.csv": top_tokens_csv(tokens),
    }
    return Plot(write_figures(directory, out, contents), tokens, min_count, dataset.complete)


def histograms(dataset: TokenDataset, panel: Panel) -> list[Histogram]:
    """The panel's column, binned alike for each source."""
    sources = dataset.sources()
    if len(sources) > _MOST_SOURCES:
        raise DatasetError(f"the data names {len(sources)} sources, expected at most {_MOST_SOURCES} to tell apart")
    values = {source: dataset.column(panel.column, source) for source in sources}
    edges = _edges(list(values.values()), signed=panel.signed)
    in_order = sorted(sources, key=lambda source: _KNOWN_SOURCES.get(source or "", ("", len(_KNOWN_SOURCES)))[1])
    return [_histogram(source, values[source], edges) for source in in_order]


def _histogram(source: str | None, values: np.ndarray, edges: np.ndarray) -> Histogram:
    counts, _ = np.histogram(values, edges)
    beyond = len(values) - int(counts.sum())
    # The density is that of all tokens, so that what lies beyond the axis is not spread over the rest.
    return Histogram(source, edges, counts / (max(len(values), 1) * np.diff(edges)), len(values), beyond)


def _edges(values: Sequence[np.ndarray], *, signed: bool) -> np.ndarray:
    """Equal bins from the lowest to the highest token but a few outliers.

    Signed values get an odd picture if the bin at 0 lies on one side: most tokens are within rounding of 0.
    So there the edges are at half widths, and the bin in the middle is centred on 0.
    """
    finite = [column[np.isfinite(column)] for column in values]
    total = sum(map(len, finite))
    if total == 0:
        return np.linspace(-1.0 if signed else 0.0, 1.0, 11)
    pooled = np.concatenate(finite)
    low, high = np.quantile(pooled, [_BEYOND, 1 - _BEYOND])
    low = min(float(low), 0.0) if signed else 0.0
    high = max(float(high), 1e-3)
    num_bins = int(np.clip(3 * total ** (1 / 3), 20, 60))
    width = (high - low) / num_bins
    if not signed:
        return np.linspace(0.0, high, num_bins + 1)
    first, last = np.floor(low / width - 0.5), np.ceil(high / width + 0.5)
    return (np.arange(first, last + 1) + 0.5) * width if first < last else np.array([-width / 2, width / 2])


def draw_histograms(dataset: TokenDataset) -> Figure:
    """Three panels side by side: entropy, KL, Δlog p; densities on a logarithmic axis, one line for each source."""
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    all_axes = figure.subplots(1, len(_PANELS))
    for axes, panel in zip(all_axes, _PANELS, strict=True):
        _draw_panel(axes, panel, histograms(dataset, panel))
    handles, labels = all_axes[0].get_legend_handles_labels()
    columns = min(len(labels), 3)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=12, frameon=False)
    return figure


def _draw_panel(axes: Axes, panel: Panel, data: Sequence[Histogram]) -> None:
    for index, histogram in enumerate(data):
        label, number = _label_and_number(histogram, index)
        colour, line = style(number)
        axes.stairs(histogram.density, histogram.edges, color=colour, alpha=0.13, fill=True)
        axes.stairs(histogram.density, histogram.edges, color=colour, linewidth=1.6, linestyle=line, label=label)
    if panel.signed:
        axes.axvline(0.0, color="0.35", linewidth=0.9, linestyle=":", zorder=0)
    densities = np.concatenate([histogram.density for histogram in data])
    if (densities > 0).any():
        axes.set_yscale("log")
        axes.set_ylim(densities[densities > 0].min() / 2, densities.max() * 2)
    first, last = data[0].edges[0], data[0].edges[-1]
    margin = 0.02 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    num_beyond = sum(histogram.num_beyond for histogram in data)
    beyond = f", {num_beyond:,} tokens beyond" if num_beyond else ""
    tidy(axes, panel.title, panel.label + beyond, "density of tokens (log scale)")


def _label_and_number(histogram: Histogram, index: int) -> tuple[str, int]:
    if histogram.source is None:
        name, number = "responses", index
    elif histogram.source in _KNOWN_SOURCES:
        name, number = _KNOWN_SOURCES[histogram.source]
    else:
        # A legend drops labels that begin with an underscore, hence the quotes.
        name, number = f"“{visible(histogram.source)}” responses", index
    return f"{name} ({histogram.num_tokens:,} tokens)", number


def top_tokens(dataset: TokenDataset, *, limit: int = TOP_TOKENS, min_count: int = DEFAULT_MIN_COUNT) -> list[TopToken]:
    """The tokens with the largest mean Δlog p of those that occur `min_count` times; ties go to the smaller id."""
    means = dataset.means_by_token(("delta_logp", "logp", "base_logp"))
    # A token that the base model excludes has a mean of +inf and leads; one with NaN cannot be ranked.
    rankable = ~np.isnan(means["delta_logp"].to_numpy()) & (means["count"].to_numpy() >= min_count)
    ranked = means.filter(rankable).sort_by([("delta_logp", "descending"), ("token_id", "ascending")])
    return [TopToken(*row.values()) for row in ranked.slice(length=limit).to_pylist()]


def top_tokens_markdown(tokens: Sequence[TopToken], min_count: int) -> str:
    """The table of raised tokens in Markdown."""
    introduction = (
        f"Means over all places of the token in the data, in nats; tokens that occur at least {min_count} times.\n"
        "Spaces are shown as ␣; control and formatting characters are spelt out."
    )
    head = ("rank", "token", "id", "count", "mean Δlog p", "mean log p, RL", "mean log p, base")
    rows = [
        (rank, escape_markdown(visible(text)), token_id, count, *(f"{mean:+.4f}" for mean in means))
        for rank, (token_id, text, count, *means) in enumerate(tokens, 1)
    ]
    return markdown_table("Tokens with the largest mean Δlog p", introduction, head, "rlrrrrr", rows)


def top_tokens_csv(tokens: Sequence[TopToken]) -> str:
    """The table of raised tokens as CSV; the token is a JSON string."""
    head = ("rank", "token", "token_id", "count", "mean_delta_logp", "mean_logp", "mean_base_logp")
    rows = [
        (rank, quoted(text), token_id, count, *(f"{mean:.9g}" for mean in means))
        for rank, (token_id, text, count, *means) in enumerate(tokens, 1)
    ]
    return csv_table(head, rows)
