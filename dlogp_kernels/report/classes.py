"""Classes of tokens, as the user defines them: how often they occur, and what RL did to them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from .dataset import TokenDataset
from .errors import DatasetError
from .pictures import as_text, legend_above, panels, style, tidy
from .sources import drawn_sources, numbers_of, responses_of, shown_sources
from .text import one_line, percent, visible

#: Names of classes, and what their tokens match.
Classes = Mapping[str, re.Pattern[str]]

_DEFAULTS = {
    "numbers": [r"[-+]?\d+([.,]\d+)*"],
    "connectives": [
        "so", "then", "now", "next", "thus", "hence", "therefore", "because", "since", "first", "second", "finally",
        "and", "but", "if", "as", "which",
    ],
    "reflection": [
        "wait", "hmm+", "however", "alternatively", "actually", "check", "verify", "again", "maybe", "perhaps", "let",
        "mistake", "wrong",
    ],
}  # fmt: skip
_OTHER = "other tokens"
_MOST_SOURCES = 4


class ClassChange(NamedTuple):
    """A class in the responses of one source: its tokens, their mean Δlog p, their share of Σ|Δlog p|."""

    name: str
    source: str | None
    occurrences: int
    delta_logp: float
    share: float


class ClassChanges(NamedTuple):
    """Of the largest sources, class by class; a remark if some are left out."""

    changes: list[ClassChange]
    remark: str


def read_classes(path: str | Path | None = None) -> Classes:
    """The classes that a file defines, or numbers, connectives and words of reflection.

    Args:
        path: of a JSON object: name → list of words or regular expressions. A token is of a class if one of these
            matches all of its text as tables show it (`text.visible`), with or without the ␣ at its ends; the case of
            letters makes no difference.

    Raises:
        DatasetError: the file is not that.
    """
    if path is None:
        found = _DEFAULTS
    else:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DatasetError(f"--classes {path}: it can not be read as JSON: {error}") from error
    if not isinstance(found, dict) or not found or not all(_is_list_of_text(patterns) for patterns in found.values()):
        raise DatasetError(
            f"--classes {path}: expected a JSON object of names with lists of words or regular expressions, such as "
            '{"numbers": ["[0-9]+"], "reflection": ["wait", "however"]}'
        )
    if _OTHER in found:
        raise DatasetError(f"--classes {path}: {_OTHER!r} are the tokens of no class, expected another name for one")
    return {name: _any_of(path, patterns) for name, patterns in found.items()}


def _is_list_of_text(patterns: object) -> bool:
    return isinstance(patterns, list) and bool(patterns) and all(isinstance(pattern, str) for pattern in patterns)


def _any_of(path: object, patterns: list[str]) -> re.Pattern[str]:
    """What any of them matches; some are regular expressions alone but not together, such as those with flags."""
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    for pattern in (*patterns, joined):
        try:
            compiled = re.compile(pattern, re.IGNORECASE)
        except (re.error, RecursionError, OverflowError) as error:
            shown = f"{pattern!r:.200}"
            raise DatasetError(f"--classes {path}: {shown} is not a regular expression: {error}") from error
    return compiled


def class_changes(dataset: TokenDataset, classes: Classes | None = None) -> ClassChanges:
    """What RL did to each class, and to tokens of none, in the responses of the largest sources."""
    patterns = read_classes() if classes is None else classes
    sums = dataset.sums_by_token
    shown = [visible(text) for text in sums["text"].to_pylist()]
    texts = {text: {text, text.strip("␣")} for text in set(shown)}
    members = {
        name: np.array([any(map(pattern.fullmatch, texts[text])) for text in shown], bool)
        for name, pattern in patterns.items()
    }
    members[_OTHER] = ~np.logical_or.reduce(list(members.values()))
    of_row = np.array(sums["source"].to_pylist(), object)
    columns = [sums[name].fill_null(0).to_numpy() for name in ("count", "defined", "delta_logp", "size")]
    changes = []
    sources, remark = shown_sources(dataset, _MOST_SOURCES)
    for source in sources:
        of_source = of_row == source
        whole = columns[3][of_source].sum()
        for name, member in members.items():
            with np.errstate(invalid="ignore"):  # of both infinities there is no sum
                count, defined, total, size = (float(column[of_source & member].sum()) for column in columns)
            mean, share = total / defined if defined else np.nan, size / whole if whole else 0.0
            changes.append(ClassChange(name, source, int(count), mean, float(share)))
    return ClassChanges(changes, remark)


def draw_classes(dataset: TokenDataset, classes: Classes | None = None) -> Figure:
    """Three panels: tokens, mean Δlog p and share of Σ|Δlog p| of each class, a bar for each of the largest sources."""
    sources, remark = drawn_sources(dataset, _MOST_SOURCES)
    changes = class_changes(dataset, classes).changes
    names = list(dict.fromkeys(change.name for change in changes))
    figure, all_axes = panels(3, 3, (4.8, 1.4 + 0.24 * len(names) * (len(sources) + 1)))
    height = 0.84 / len(sources)
    shown: list[tuple[str, Callable[[ClassChange], float], Callable[[float], str]]] = [
        ("Tokens", lambda change: change.occurrences, "{:,}".format),
        ("Mean Δlog p [nats]", lambda change: change.delta_logp, _signed),
        ("Share of Σ|Δlog p|", lambda change: change.share, percent),
    ]
    for axes, (title, value_of, spelt) in zip(all_axes, shown, strict=True):
        for number, source in enumerate(sources):
            values = [value_of(change) for change in changes if change.source == source]
            places = np.arange(len(names)) + height * (number - (len(sources) - 1) / 2)
            colour, _ = style(numbers_of(sources)[source])
            lengths = [value if np.isfinite(value) else 0.0 for value in values]
            bars = axes.barh(places, lengths, height, color=colour, label=responses_of(source))
            axes.bar_label(bars, list(map(spelt, values)), padding=3, fontsize=9)
        tidy(axes, title, "", "")
        axes.margins(x=0.2)
        axes.set_yticks(range(len(names)), [one_line(name) for name in names], parse_math=False)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.label_outer()
    legend_above(figure, remark)
    return as_text(figure)


def _signed(value: float) -> str:
    return "" if np.isnan(value) else f"{value:+.3g}".replace("-", "−").replace("inf", "∞")
