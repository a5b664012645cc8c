"""Values of a line of the data, checked; a line that does not hold what is expected is broken, and says so."""

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 60


class BrokenLine(ValueError):
    """A line of the data that can not be used; the message says why."""


def as_text(name: str, value: Any) -> str:
    """`value` if it is a string of Unicode; else a BrokenLine with its name."""
    if not isinstance(value, str):
        raise BrokenLine(f"{name} is a {kind_of(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenLine(
            f"{name} has half a surrogate pair at character {error.start + 1}, expected Unicode"
        ) from error
    return value


def as_id_list(name: str, value: Any) -> list[int]:
    """`value` if it is a list of integers; else a BrokenLine with its name."""
    if not isinstance(value, list):
        raise BrokenLine(f"{name} is a {kind_of(value)}, expected a list of integers")
    if set(map(type, value)) <= {int}:
        return value
    for position, token_id in enumerate(value):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise BrokenLine(f"{name}[{position}] is {shown(token_id)}, expected an integer")
    return value


def check_range(name: str, ids: Sequence[int], vocabulary: int) -> None:
    """BrokenLine for a token that the models do not have."""
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocabulary:
            raise BrokenLine(
                f"token {position} of the {name} is {shown(token_id)}, outside the vocabulary [0, {vocabulary})"
            )


def is_missing(value: Any) -> bool:
    """Whether it is what a table with columns for all forms has where a line has no value: null, or NaN."""
    return value is None or value != value


def fullest_form(columns: Mapping[str, Any], forms: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The first form whose columns all have values; else of those whose columns are there one with the most values."""

    def share(form: tuple[str, ...]) -> float:
        return sum(not is_missing(columns[name]) and columns[name] != [] for name in form) / len(form)

    return max((form for form in forms if columns.keys() >= set(form)), key=share, default=None)


def kind_of(value: Any) -> str:
    """What JSON calls a value of this type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value in a message, cut to a length that a line bears."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
