"""Pictures and tables of a sweep: Fig. 1c, 2 and 4 of arXiv 2603.22117 for the user's pair, and a map over (τ, γ)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .dataset import SUMMARY_FILE
from .errors import DatasetError
from .pictures import PALETTE, render, tidy, write_figures
from .replaced import tokens_csv, tokens_html, tokens_markdown
from .responses import (
    BASE,
    RL,
    Estimate,
    ReplacedToken,
    Setting,
    SettingResult,
    collect,
    estimate,
    read_responses,
)
from .tables import csv_table, markdown_table
from .text import csv_cell, escape_markdown

REPLACED_TOKENS = 20

#: Criteria in the words of a legend, in its order.
CRITERION_LABELS = {
    "delta_logp": "Δlog p of the draft",
    "kl": "KL(RL ‖ base)",
    "reverse_kl": "KL(base ‖ RL)",
    "avg_kl": "mean of both KLs",
    "entropy": "entropy of the base",
    "rl_entropy": "entropy of the RL model",
    "random": "random",
}
_MARKERS = {"delta_logp": "o", "kl": "s", "reverse_kl": "D", "avg_kl": "P", "entropy": "^", "rl_entropy": "v"}
_GREY = "0.45"
_ACCURACY = "accuracy ± standard error"


class Curve(NamedTuple):
    """Accuracy over the replaced share for one criterion: a point a threshold, by share."""

    criterion: str
    results: list[SettingResult]


class Bars(NamedTuple):
    """Accuracies of one threshold of `delta_logp`, by γ; γ = 0 is replacement without extrapolation."""

    threshold: float
    results: list[SettingResult]


class SweepPlot(NamedTuple):
    """What `plot_sweep` made: files, what their tables hold, and whether the run had finished."""

    files: list[Path]
    results: list[SettingResult]
    replaced_tokens: list[ReplacedToken]
    complete: bool


def plot_sweep(directory: str | Path, out: str | Path | None = None, *, min_count: int = 1) -> SweepPlot:
    """Draw what `dlogp sweep` (or `dlogp generate`) drew.

    Args:
        directory: what it wrote.
        out: where the files go; `directory/figures` unless given.
        min_count: leave tokens that were replaced less often out of the table.

    Returns:
        SweepPlot: `results.md` and `results.csv`, `replaced_tokens.md`, `.csv` and `.html`; and, where the sweep has
        what they show, `accuracy_by_share.png`, `extrapolation.png` (bars) and `threshold_gamma.png` (a map).

    Raises:
        DatasetError: `directory` holds no responses.
        OSError: `out` is not writable.
    """
    if min_count < 1:
        raise DatasetError(f"min_count is {min_count}, expected at least 1")
    collector = collect(read_responses(directory))
    results = collector.results()
    if not results:
        raise DatasetError(f"{directory} holds no whole response")
    tokens = collector.replaced_tokens(limit=REPLACED_TOKENS, min_count=min_count)
    contents: dict[str, bytes | str] = {
        **_pictures(results),
        "results.md": results_markdown(results),
        "results.csv": results_csv(results),
        "replaced_tokens.md": tokens_markdown(tokens, min_count),
        "replaced_tokens.csv": tokens_csv(tokens),
        "replaced_tokens.html": tokens_html(tokens, min_count),
    }
    complete = (Path(directory) / SUMMARY_FILE).exists()
    return SweepPlot(write_figures(directory, out, contents), results, tokens, complete)


def _pictures(results: Sequence[SettingResult]) -> dict[str, bytes]:
    """The pictures that these results allow."""
    graded = [result for result in results if result.accuracy is not None]
    groups = bars(graded)
    allowed = {
        "accuracy_by_share.png": (draw_curves, curves(graded)),
        "extrapolation.png": (draw_bars, groups),
        "threshold_gamma.png": (draw_map, len(groups) > 1),
    }
    return {
        name: render(draw(graded), "png") for name, (draw, there_is_something) in allowed.items() if there_is_something
    }


def find(results: Sequence[SettingResult], setting: Setting) -> SettingResult | None:
    """The result of `setting`, if it is there."""
    return next((result for result in results if result.setting == setting), None)


def models_alone(results: Sequence[SettingResult]) -> dict[str, Estimate]:
    """The accuracies of the base model and the RL model alone, of those that were drawn and graded."""
    found = {"base": find(results, BASE), "RL": find(results, RL)}
    return {name: result.accuracy for name, result in found.items() if result is not None and result.accuracy}


def curves(results: Sequence[SettingResult]) -> list[Curve]:
    """The criteria that have a threshold, with the base model's drafts if there are any and at their least γ."""
    with_threshold = [result for result in results if result.setting.threshold is not None]
    plainest = min(((result.setting.draft, result.setting.gamma) for result in with_threshold), default=None)
    found: dict[str, list[SettingResult]] = {}
    for result in sorted(with_threshold, key=_share):
        if (result.setting.draft, result.setting.gamma) == plainest:
            found.setdefault(result.setting.criterion, []).append(result)
    known = [name for name in CRITERION_LABELS if name in found]
    return [Curve(name, found[name]) for name in (*known, *sorted(found.keys() - set(known)))]


def _share(result: SettingResult) -> float:
    return 0.0 if result.replaced_share is None else result.replaced_share.mean


def bars(results: Sequence[SettingResult]) -> list[Bars]:
    """The thresholds of `delta_logp` that were drawn with more than one γ, lowest first, each with its γ in order."""
    chosen = [result for result in results if result.setting.criterion == "delta_logp"]
    draft = min((result.setting.draft for result in chosen), default="base")
    groups: dict[float, list[SettingResult]] = {}
    for result in sorted(chosen, key=lambda result: result.setting.gamma):
        if result.setting.draft == draft and result.setting.threshold is not None:
            groups.setdefault(result.setting.threshold, []).append(result)
    return [Bars(threshold, group) for threshold, group in sorted(groups.items()) if len(group) > 1]


def _gammas(groups: Sequence[Bars]) -> list[float]:
    return sorted({result.setting.gamma for group in groups for result in group.results})


def draw_curves(results: Sequence[SettingResult]) -> Figure:
    """Accuracy over the share of replaced tokens, a line a criterion; both models alone as lines across."""
    drawn = curves(results)
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(drawn):
        shares = [100 * _share(result) for result in curve.results]
        axes.errorbar(
            shares,
            [_accuracy(result).mean for result in curve.results],
            yerr=[_error(_accuracy(result)) for result in curve.results],
            xerr=[100 * _error(result.replaced_share) for result in curve.results],
            color=PALETTE[index % len(PALETTE)],
            marker=_MARKERS.get(curve.criterion, "X"),
            linestyle=":" if curve.criterion == "random" else "-",
            markersize=5.5,
            linewidth=1.6,
            capsize=2.5,
            # A legend drops labels that begin with an underscore, hence the quotes.
            label=CRITERION_LABELS.get(curve.criterion, f"“{curve.criterion}”"),
        )
    _draw_models(axes, results)
    setting = drawn[0].results[0].setting
    title = f"Replacement with extrapolation, γ = {setting.gamma:g}" if setting.gamma else "Replacement by the RL model"
    title += ", drafts of the RL model" if setting.draft == "rl" else ""
    axes.set_xlim(left=0)
    axes.legend(title="replace by", fontsize=11, title_fontsize=11, frameon=False, loc="best")
    tidy(axes, title, "replaced tokens [% of the response]", _ACCURACY)
    return figure


def _draw_models(axes: Axes, results: Sequence[SettingResult]) -> None:
    """The accuracies of both models alone, with a band of one standard error, named at the right edge."""
    dashes = {"base": "--", "RL": "-."}
    for name, accuracy in models_alone(results).items():
        mean, error = accuracy.mean, _error(accuracy)
        axes.axhline(mean, color=_GREY, linewidth=1.2, linestyle=dashes[name], zorder=0)
        axes.axhspan(mean - error, mean + error, color=_GREY, alpha=0.13, linewidth=0, zorder=0)
        axes.annotate(
            f"{name} model",
            (1, mean),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=10.5,
            color="0.3",
        )


def draw_bars(results: Sequence[SettingResult]) -> Figure:
    """Both models alone, then for each threshold of `delta_logp` replacement without and with extrapolation."""
    groups = bars(results)
    gammas = _gammas(groups)
    width = 2.6 + 0.55 * sum(len(group.results) + 1 for group in groups)
    figure = Figure(figsize=(max(6.4, width), 4.8), layout="constrained")
    axes = figure.subplots()
    ticks: dict[float, str] = {}
    greys = {"base": "0.75", "RL": "0.5"}
    for name, accuracy in models_alone(results).items():
        _draw_bar(axes, len(ticks), accuracy, greys[name], None)
        ticks[len(ticks)] = name
    place = len(ticks) + 0.4 * bool(ticks)
    named: set[float] = set()
    for group in groups:
        middle = place + (len(group.results) - 1) / 2
        ticks[middle] = f"τ = {_signed(group.threshold)}\n{100 * _share(group.results[0]):.1f} % replaced"
        for result in group.results:
            gamma = result.setting.gamma
            label = None if gamma in named else f"extrapolate, γ = {gamma:g}" if gamma else "replace only (γ = 0)"
            named.add(gamma)
            _draw_bar(axes, place, _accuracy(result), PALETTE[gammas.index(gamma) % len(PALETTE)], label)
            place += 1
        place += 0.6
    axes.set_xticks(list(ticks), list(ticks.values()))
    # Above the highest bar, room for its number and the legend.
    axes.set_ylim(0, 1.22 * max(bar.get_height() for bar in axes.patches) or 1)  # type: ignore[attr-defined]
    axes.legend(fontsize=10.5, frameon=False, ncols=min(4, len(gammas)), loc="upper left")
    tidy(axes, "Selective replacement where Δlog p < τ, with and without extrapolation", "", _ACCURACY)
    axes.grid(visible=False, axis="x")
    return figure


def _draw_bar(axes: Axes, place: float, accuracy: Estimate, colour: str, label: str | None) -> None:
    error, thin = _error(accuracy), {"linewidth": 1.1}
    bar = axes.bar(place, accuracy.mean, 0.86, yerr=error, color=colour, capsize=3, label=label, error_kw=thin)
    axes.bar_label(bar, fmt="%.3f", padding=2, fontsize=8.5)


def draw_map(results: Sequence[SettingResult]) -> Figure:
    """Accuracy over the threshold of `delta_logp` and γ; a cell that was not drawn is empty."""
    groups = bars(results)
    gammas = _gammas(groups)
    accuracies = {
        (gammas.index(result.setting.gamma), column): _accuracy(result)
        for column, group in enumerate(groups)
        for result in group.results
    }
    cells = np.full((len(gammas), len(groups)), np.nan)
    for place, accuracy in accuracies.items():
        cells[place] = accuracy.mean
    figure = Figure(figsize=(2.6 + 0.95 * len(groups), 1.9 + 0.62 * len(gammas)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, cmap="viridis", aspect="auto", origin="lower")
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
    for (row, column), accuracy in accuracies.items():
        text, colour = f"{accuracy.mean:.3f}\n±{_error(accuracy):.3f}", "black" if accuracy.mean > middle else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(groups)), [_signed(group.threshold) for group in groups])
    axes.set_yticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    axes.set_xlabel("τ: replaced where Δlog p < τ [nats]", fontsize=11)
    axes.set_ylabel("γ", fontsize=12)
    axes.set_title("Accuracy ± standard error", fontsize=12)
    figure.colorbar(image, ax=axes)
    return figure


def _signed(value: float) -> str:
    """Three digits, with the sign that axes have."""
    return f"{value:.3g}".replace("-", "−")


def _accuracy(result: SettingResult) -> Estimate:
    assert result.accuracy is not None, "results without grades are not drawn"
    return result.accuracy


def _error(estimate: Estimate | None) -> float:
    return 0.0 if estimate is None or estimate.standard_error is None else estimate.standard_error


#: Headings of the table of results, and what stands below them.
_COLUMNS: dict[str, Callable[[SettingResult], str]] = {
    "criterion": lambda result: escape_markdown(result.setting.criterion),
    "τ": lambda result: "–" if result.setting.threshold is None else f"{result.setting.threshold:.4g}",
    "γ": lambda result: f"{result.setting.gamma:g}",
    "draft": lambda result: escape_markdown(result.setting.draft),
    "accuracy": lambda result: "–" if result.accuracy is None else str(result.accuracy),
    "replaced [%]": lambda result: (
        "–" if result.replaced_share is None else result.replaced_share.text(factor=100, digits=2)
    ),
    "mean length": lambda result: f"{result.mean_length:,.1f}",
    "responses": lambda result: f"{result.responses:,}",
    "grader errors": lambda result: f"{result.grader_errors:,}",
}


def results_markdown(results: Sequence[SettingResult]) -> str:
    """One row a setting."""
    introduction = (
        "Accuracies are over graded responses, shares over response tokens; ± one standard error over problems. "
        "τ in the criterion's unit: nats, or a probability for `random`."
    )
    rows = [[text(result) for text in _COLUMNS.values()] for result in results]
    align = "l" + "r" * (len(_COLUMNS) - 1)
    return markdown_table("Accuracy and replaced share by setting", introduction, list(_COLUMNS), align, rows)


def results_csv(results: Sequence[SettingResult]) -> str:
    """One row a setting, numbers in full."""
    rows = [result.to_json() for result in results]
    for row in rows:
        row["criterion"], row["draft"] = csv_cell(row["criterion"]), csv_cell(row["draft"])
        row["seeds"] = " ".join(map(str, row["seeds"]))
    return csv_table(list(rows[0]), [list(row.values()) for row in rows])


def compare(results: Sequence[SettingResult], setting: Setting, other: Setting) -> Estimate | None:
    """Mean accuracy of `setting` minus that of `other`, over the problems both have; None where one was not drawn.

    Paired: settings of one seed share their noise, so the difference is known better than either accuracy. Each
    problem counts once, however many responses it has.
    """
    one, two = find(results, setting), find(results, other)
    if one is None or two is None:
        return None
    common = sorted(one.scores.keys() & two.scores.keys())
    differences = np.array([one.scores[problem] - two.scores[problem] for problem in common])
    return estimate(differences, np.ones(len(differences)))
