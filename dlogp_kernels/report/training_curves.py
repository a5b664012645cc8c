"""Pictures of training runs: Fig. 5 of arXiv 2603.22117, accuracy, entropy and response length over steps."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from .errors import DatasetError
from .ledger import MANIFEST_FILE, Ledger, check, read_manifest
from .pictures import render, style, tidy, write_figures
from .responses import Estimate
from .tables import markdown_table
from .text import escape_markdown
from .training import LOG_FILE, read_log

#: A curve of measurements at every step is averaged over this share of its points, to show more than noise.
_SMOOTHED_SHARE = 0.05
_METHODS = {"none": "DAPO", "low_prob": "low-probability tokens", "dominate": "dominate", "ppl": "perplexity"}


class TrainingRun(NamedTuple):
    """The log of one run, and what it was told to do."""

    name: str
    settings: Mapping[str, Any]
    entries: Sequence[Mapping[str, float]]

    def series(self, quantity: str) -> dict[int, float]:
        """The quantity by step, where it was measured."""
        return {int(entry["step"]): entry[quantity] for entry in self.entries if quantity in entry}


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    label: str
    runs: Sequence[TrainingRun]


class Line(NamedTuple):
    """Mean over runs at each step that all of them have, and its standard error; None of a single run."""

    steps: np.ndarray
    mean: np.ndarray
    standard_error: np.ndarray | None


def plot_training(directories: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Draw what runs of `dlogp train` logged.

    Args:
        directories: of the runs.
        out: where the files go; `figures` in the first directory unless given.

    Returns:
        `training.png` and `training.md`, a table of the last measurements.

    Raises:
        DatasetError: a directory holds no log of a training, or an empty one.
        OSError: `out` is not writable.
    """
    runs = [read_run(Path(directory)) for directory in directories]
    groups = grouped(runs)
    contents: dict[str, bytes | str] = {
        "training.png": render(draw_training(groups), "png"),
        "training.md": markdown(groups),
    }
    return write_figures(directories[0], out, contents)


def read_run(directory: Path) -> TrainingRun:
    """The run in a directory; DatasetError if there is none."""
    log, manifest = directory / LOG_FILE, directory / MANIFEST_FILE
    if not log.exists():
        raise DatasetError(f"{directory} has no {LOG_FILE}, expected a directory that `dlogp train` wrote")
    check(Ledger.read(directory), log, [log])
    entries = list(read_log(log))
    if not any(entry["step"] > 0 for entry in entries):
        raise DatasetError(f"{log} has no step yet")
    try:
        settings = read_manifest(manifest)["identity"]["training"]
        if not isinstance(settings, dict):
            raise TypeError(f"training is {settings!r:.60}")
        for name, kind in (("reweight", str), ("alpha", int | float)):
            if name in settings and not isinstance(settings[name], kind):
                raise TypeError(f"{name} is {settings[name]!r:.60}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{manifest} is not the manifest of a training: {error!r}") from error
    return TrainingRun(directory.name, settings, entries)


def grouped(runs: Sequence[TrainingRun]) -> list[Group]:
    """Runs of equal settings but for the seed together, named by what differs between the groups."""
    groups: dict[str, list[TrainingRun]] = {}
    for run in runs:
        alike = {name: value for name, value in run.settings.items() if name != "seed"}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    settings = [members[0].settings for members in groups.values()]
    differing = [
        name
        for name in settings[0]
        if name not in ("seed", "reweight", "alpha") and len({json.dumps(each.get(name)) for each in settings}) > 1
    ]
    return [Group(_label(each, differing), members) for each, members in zip(settings, groups.values(), strict=True)]


def _label(settings: Mapping[str, Any], differing: Sequence[str]) -> str:
    method = settings.get("reweight", "none")
    alpha = "" if method == "none" or "alpha" not in settings else f", α = {settings['alpha']:g}"
    differences = "".join(f", {name} {settings.get(name)}" for name in differing)
    return _METHODS.get(method, f"“{method}”") + alpha + differences


def line(group: Group, quantity: str, *, smoothed: bool = True) -> Line | None:
    """The quantity over steps; None where no run has it."""
    series = [run.series(quantity) for run in group.runs]
    steps = sorted(set.intersection(*(set(values) for values in series)))
    if not steps:
        return None
    values = np.array([[values[step] for step in steps] for values in series], np.float64)
    if smoothed:
        values = np.stack([_moving_average(row) for row in values])
    error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return Line(np.array(steps), values.mean(0), error)


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Over a window in the middle of which each point stands; at the ends it is as long as there are points."""
    window = np.ones(2 * (int(_SMOOTHED_SHARE * len(values)) // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw_training(groups: Sequence[Group]) -> Figure:
    """Three panels; a line a group, with a band of one standard error where it has several seeds."""
    held_out = all(len(run.series("eval_accuracy")) > 1 for group in groups for run in group.runs)
    panels = (
        ("eval_accuracy" if held_out else "accuracy", "Accuracy" + (", held out" if held_out else " in training"), ""),
        ("entropy", "Entropy", "nats a token"),
        ("length", "Response length", "tokens"),
    )
    figure = Figure(figsize=(13.2, 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(panels))
    for axes, (quantity, title, unit) in zip(all_axes, panels, strict=True):
        for index, group in enumerate(groups):
            # Measurements on held-out problems are few.
            drawn = line(group, quantity, smoothed=quantity != "eval_accuracy")
            if drawn is None:
                continue
            colour, dashes = style(index)
            seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
            marker = "o" if len(drawn.steps) < 30 else None
            axes.plot(
                drawn.steps, drawn.mean, color=colour, linewidth=1.7, marker=marker, markersize=3.5, linestyle=dashes,
                label=group.label + seeds,
            )  # fmt: skip
            if drawn.standard_error is not None:
                low, high = drawn.mean - drawn.standard_error, drawn.mean + drawn.standard_error
                axes.fill_between(drawn.steps, low, high, color=colour, alpha=0.18, linewidth=0)
        tidy(axes, title, "step", unit)
        axes.yaxis.label.set_size(11)
    all_axes[0].legend(fontsize=10, frameon=False, loc="best")
    return figure


def markdown(groups: Sequence[Group]) -> str:
    """The last measurement of each quantity, mean ± standard error over seeds."""
    names = ("accuracy", "eval_accuracy", "entropy", "length")
    titles = ("accuracy in training", "accuracy, held out", "entropy [nats]", "response length")
    rows = []
    for group in groups:
        drawn = [line(group, name, smoothed=False) for name in names]
        steps = min(max(int(entry["step"]) for entry in run.entries) for run in group.runs)
        cells = ["–" if one is None else _last(one) for one in drawn]
        rows.append((escape_markdown(group.label), len(group.runs), steps, *cells))
    introduction = "Last measurements; ± one standard error over seeds."
    return markdown_table("Training runs", introduction, ("runs", "seeds", "steps", *titles), "lrrrrrr", rows)


def _last(drawn: Line) -> str:
    return str(Estimate(drawn.mean[-1], None if drawn.standard_error is None else drawn.standard_error[-1]))
