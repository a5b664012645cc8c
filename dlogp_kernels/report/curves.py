"""Pictures and tables of a sweep: Fig. 1c, 2 and 4 of arXiv 2603.22117 for the user's pair, and a map over (τ, γ)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    difference,
    is_complete,
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
    return SweepPlot(write_figures(directory, out, contents), results, tokens, is_complete(directory))


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


def curves(results: Sequence[SettingResult]) -> list[Curve]:
    """The criteria that have a threshold, at the least γ there is and with the base model's drafts if there are any."""
    with_threshold = [result for result in results if result.setting.threshold is not None]
    if not with_threshold:
        return []
    gamma, draft = _plainest(with_threshold)
    found: dict[str, list[SettingResult]] = {}
    for result in with_threshold:
        if (result.setting.gamma, result.setting.draft) == (gamma, draft):
            found.setdefault(result.setting.criterion, []).append(result)
    known = [name for name in CRITERION_LABELS if name in found]
    others = sorted(found.keys() - set(known))
    return [Curve(name, sorted(found[name], key=_share)) for name in (*known, *others)]


def _plainest(results: Sequence[SettingResult]) -> tuple[float, str]:
    draft = min(result.setting.draft for result in results)
    return min(result.setting.gamma for result in results if result.setting.draft == draft), draft


def _share(result: SettingResult) -> float:
    return 0.0 if result.replaced_share is None else result.replaced_share.mean


def bars(results: Sequence[SettingResult]) -> list[Bars]:
    """The thresholds of `delta_logp` that were drawn with more than one γ, lowest first, each with its γ in order."""
    chosen = [result for result in results if result.setting.criterion == "delta_logp"]
    draft = min((result.setting.draft for result in chosen), default="base")
    groups: dict[float, list[SettingResult]] = {}
    for result in chosen:
        if result.setting.draft == draft and result.setting.threshold is not None:
            groups.setdefault(result.setting.threshold, []).append(result)
    return [
        Bars(threshold, sorted(groups[threshold], key=lambda result: result.setting.gamma))
        for threshold in sorted(groups)
        if len(groups[threshold]) > 1
    ]


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
    axes.set_xlabel("replaced tokens [% of the response]", fontsize=12)
    axes.set_ylabel("accuracy ± standard error", fontsize=12)
    setting = drawn[0].results[0].setting
    what = (
        "Replacement by the RL model"
        if setting.gamma == 0
        else f"Replacement with extrapolation, γ = {setting.gamma:g}"
    )
    if setting.draft == "rl":
        what += ", drafts of the RL model"
    axes.set_title(what, fontsize=13)
    axes.set_xlim(left=0)
    axes.legend(title="replace by", fontsize=11, title_fontsize=11, frameon=False, loc="best")
    tidy(axes)
    return figure


def _draw_models(axes: Axes, results: Sequence[SettingResult]) -> None:
    """The accuracies of both models alone, with a band of one standard error, named at the right edge."""
    for setting, name, style in ((BASE, "base model", "--"), (RL, "RL model", "-.")):
        result = find(results, setting)
        if result is None or result.accuracy is None:
            continue
        mean, error = result.accuracy.mean, _error(result.accuracy)
        axes.axhline(mean, color=_GREY, linewidth=1.2, linestyle=style, zorder=0)
        axes.axhspan(mean - error, mean + error, color=_GREY, alpha=0.13, linewidth=0, zorder=0)
        axes.annotate(
            name,
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
    gammas = sorted({result.setting.gamma for group in groups for result in group.results})
    figure = Figure(
        figsize=(max(6.4, 2.6 + 0.55 * sum(len(group.results) + 1 for group in groups)), 4.8), layout="constrained"
    )
    axes = figure.subplots()
    ticks, labels = _draw_single_bars(axes, results)
    place = float(len(ticks)) + 0.4 * bool(ticks)
    named: set[float] = set()
    for group in groups:
        begin = place
        for result in group.results:
            gamma = result.setting.gamma
            label = None if gamma in named else "replace only (γ = 0)" if gamma == 0 else f"extrapolate, γ = {gamma:g}"
            named.add(gamma)
            _draw_bar(axes, place, _accuracy(result), PALETTE[gammas.index(gamma) % len(PALETTE)], label)
            place += 1
        share = 100 * _share(group.results[0])
        ticks.append((begin + place - 1) / 2)
        labels.append(f"τ = {_signed(group.threshold)}\n{share:.1f} % replaced")
        place += 0.6
    axes.set_xticks(ticks, labels, fontsize=10)
    axes.set_ylabel("accuracy ± standard error", fontsize=12)
    axes.set_title("Selective replacement where Δlog p < τ, with and without extrapolation", fontsize=13)
    axes.set_ylim(0, _headroom(axes))
    axes.legend(fontsize=10.5, frameon=False, ncols=min(4, len(gammas)), loc="upper left")
    tidy(axes)
    axes.grid(visible=False, axis="x")
    return figure


def _draw_single_bars(axes: Axes, results: Sequence[SettingResult]) -> tuple[list[float], list[str]]:
    ticks: list[float] = []
    labels: list[str] = []
    for setting, name, colour in ((BASE, "base", "0.75"), (RL, "RL", "0.5")):
        result = find(results, setting)
        if result is not None and result.accuracy is not None:
            _draw_bar(axes, len(ticks), result.accuracy, colour, None)
            ticks.append(float(len(ticks)))
            labels.append(name)
    return ticks, labels


def _draw_bar(axes: Axes, place: float, accuracy: Estimate, colour: str, label: str | None) -> None:
    error = _error(accuracy)
    axes.bar(place, accuracy.mean, 0.86, yerr=error, color=colour, capsize=3, label=label, error_kw={"linewidth": 1.1})
    axes.annotate(
        f"{accuracy.mean:.3f}",
        (place, accuracy.mean + error),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8.5,
    )


def _headroom(axes: Axes) -> float:
    """Above the highest bar, room for its number and the legend."""
    return 1.22 * max(patch.get_height() for patch in axes.patches)  # type: ignore[attr-defined]


def draw_map(results: Sequence[SettingResult]) -> Figure:
    """Accuracy over the threshold of `delta_logp` and γ; a cell that was not drawn is empty."""
    groups = bars(results)
    gammas = sorted({result.setting.gamma for group in groups for result in group.results})
    cells = np.full((len(gammas), len(groups)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for column, group in enumerate(groups):
        for result in group.results:
            row = gammas.index(result.setting.gamma)
            accuracy = _accuracy(result)
            cells[row, column] = accuracy.mean
            texts[row, column] = f"{accuracy.mean:.3f}\n±{_error(accuracy):.3f}"
    figure = Figure(figsize=(2.6 + 0.95 * len(groups), 1.9 + 0.62 * len(gammas)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, cmap="viridis", aspect="auto", origin="lower")
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
    for (row, column), text in texts.items():
        colour = "black" if cells[row, column] > middle else "white"
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


def _share_text(result: SettingResult) -> str:
    share = result.replaced_share
    error = "" if share is None or share.standard_error is None else f" ± {100 * share.standard_error:.2f}"
    return "–" if share is None else f"{100 * share.mean:.2f}{error}"


#: Headings of the table of results, and what stands below them.
_COLUMNS: dict[str, Callable[[SettingResult], str]] = {
    "criterion": lambda result: escape_markdown(result.setting.criterion),
    "τ": lambda result: "–" if result.setting.threshold is None else f"{result.setting.threshold:.4g}",
    "γ": lambda result: f"{result.setting.gamma:g}",
    "draft": lambda result: escape_markdown(result.setting.draft),
    "accuracy": lambda result: "–" if result.accuracy is None else str(result.accuracy),
    "replaced [%]": _share_text,
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
    """Accuracy of `setting` minus that of `other`, paired by problem; None where one of them was not drawn."""
    one, two = find(results, setting), find(results, other)
    return None if one is None or two is None else difference(one, two)
