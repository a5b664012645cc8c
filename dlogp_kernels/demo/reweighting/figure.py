"""Accuracy, entropy and length over rollouts, as Fig. 5 of arXiv 2603.22117, and the differences at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...report.figures import PALETTE, render
from ...report.files import write_atomically
from . import summary
from .training import METHODS

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
#: Title and label of a curve's panel.
_PANELS = {
    "accuracy": ("Accuracy of the responses learned from", "share that is right"),
    "entropy": ("Entropy of the policy", "nats a token"),
    "length": ("Length of the responses", "tokens"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Curves: mean over seeds, and one standard error as a band."""
    with mpl.rc_context(_FONT):
        figure = Figure(figsize=(9.4, 6.4), layout="constrained")
        *panels, last = figure.subplots(2, 2).flat
        for axes, curve in zip(panels, _PANELS, strict=True):
            _draw_curves(axes, results, curve)
        _draw_differences(last, results)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        write_atomically(path, render(figure, "png"))


def _draw_curves(axes: Axes, results: dict[str, Any], curve: str) -> None:
    title, label = _PANELS[curve]
    for method, (color, line, width, _) in _STYLES.items():
        curves = [run["curves"] for run in results["runs"] if run["method"] == method]
        if not curves:
            continue
        name = summary.NAMES[method] + (f", α = {METHODS[method]:g}" if METHODS[method] else "")
        values = np.array([found[curve] for found in curves])
        mean = values.mean(0)
        axes.plot(curves[0]["rollout"], mean, line, color=color, lw=width, label=name)
        if len(curves) > 1:
            error = values.std(0, ddof=1) / np.sqrt(len(curves))
            axes.fill_between(curves[0]["rollout"], mean - error, mean + error, color=color, alpha=0.13, lw=0)
    axes.set_xlabel("rollout")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, title, label)


def _draw_differences(axes: Axes, results: dict[str, Any]) -> None:
    """A dot for each seed, and mean ± standard error."""
    axes.axhline(0, color=_GREY, lw=1)
    names: list[str] = []
    for method, (color, _, _, marker) in _STYLES.items():
        apart = summary.differences(results, method, "avg")
        if method == "none" or apart.empty:
            continue
        place, error = len(names), apart.sem() if len(apart) > 1 else None
        axes.plot([place - 0.12] * len(apart), apart, marker, color=color, ms=4.5, alpha=0.55, mew=0)
        axes.errorbar(place + 0.12, apart.mean(), error, fmt=marker, color=color, ms=6, capsize=4, lw=1.7)
        names.append(summary.NAMES[method])
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    samples = results["settings"]["samples_per_problem"]
    _finish(axes, f"Held-out avg@{samples} at the end, minus DAPO", "difference, paired by seed")


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#e4e4e4", lw=0.7)
    axes.set_axisbelow(True)
