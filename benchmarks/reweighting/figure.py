"""Accuracy, entropy and length over rollouts, as Fig. 5 of arXiv 2603.22117, and the differences at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dlogp_kernels.report.figures import PALETTE, render
from dlogp_kernels.report.files import write_atomically

from . import summary

_GREY = "0.6"
#: Colour, line, width and marker of a method, told apart without the colour too. DAPO lies broad below the others.
_STYLES = {
    "none": (_GREY, "-", 4.0, "o"),
    "low_prob": (PALETTE[0], "-", 1.7, "s"),
    "dominate": (PALETTE[1], "--", 1.7, "D"),
    "ppl": (PALETTE[2], "-.", 1.7, "^"),
}
_FONT: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class _Panel(NamedTuple):
    curve: str
    title: str
    label: str


_PANELS = (
    _Panel("accuracy", "Accuracy of the responses learned from", "share that is right"),
    _Panel("entropy", "Entropy of the policy", "nats a token"),
    _Panel("length", "Length of the responses", "tokens"),
)


def draw(results: dict[str, Any], path: Path) -> None:
    """Curves: mean over seeds, and one standard error as a band."""
    with mpl.rc_context(_FONT):
        figure = Figure(figsize=(9.4, 6.4), layout="constrained")
        axes = figure.subplots(2, 2).flat
        for one, panel in zip(axes, _PANELS, strict=False):
            _draw_curves(one, results, panel)
        _draw_differences(axes[3], results)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        write_atomically(path, render(figure, "png"))


def _draw_curves(axes: Axes, results: dict[str, Any], panel: _Panel) -> None:
    axes.set_title(panel.title, loc="left")
    for method, (color, line, width, _) in _STYLES.items():
        runs = [*summary.of_method(results, method).values()]
        if not runs:
            continue
        rollouts = runs[0]["curves"]["rollout"]
        values = np.array([run["curves"][panel.curve] for run in runs])
        mean = values.mean(0)
        axes.plot(rollouts, mean, line, color=color, lw=width, label=_label(results, method))
        if len(runs) > 1:
            error = values.std(0, ddof=1) / np.sqrt(len(runs))
            axes.fill_between(rollouts, mean - error, mean + error, color=color, alpha=0.13, lw=0)
    axes.set_xlabel("rollout")
    axes.set_ylabel(panel.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e4e4", lw=0.7)
    axes.set_axisbelow(True)


def _draw_differences(axes: Axes, results: dict[str, Any]) -> None:
    """A dot for each seed, and mean ± standard error."""
    samples = results["settings"]["samples_per_problem"]
    axes.set_title(f"Held-out avg@{samples} at the end, minus DAPO", loc="left")
    axes.axhline(0, color=_GREY, lw=1)
    names: list[str] = []
    for method in (name for name in _STYLES if name != "none"):
        apart = summary.differences(results, method, summary.avg)
        if not apart:
            continue
        color, *_, marker = _STYLES[method]
        place, found = len(names), summary.estimate(apart)
        axes.plot([place - 0.12] * len(apart), apart, marker, color=color, ms=4.5, alpha=0.55, mew=0)
        axes.errorbar(place + 0.12, found.mean, found.standard_error, fmt=marker, color=color, ms=6, capsize=4, lw=1.7)
        names.append(summary.NAMES[method])
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel("difference, paired by seed")
    axes.grid(axis="y", color="#e4e4e4", lw=0.7)
    axes.set_axisbelow(True)


def _label(results: dict[str, Any], method: str) -> str:
    runs = summary.of_method(results, method)
    alpha = next(iter(runs.values()))["alpha"]
    return summary.NAMES[method] + (f", α = {alpha:g}" if alpha else "")
