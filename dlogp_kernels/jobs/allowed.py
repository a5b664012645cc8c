"""Options of a job as fields of a dataclass: the default, what it is for and what it may be, each stated once.

Jobs check them with `check_options`; the command line makes its own options of them, see `cli.command`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .errors import JobError

_KEY = "option"

#: Raises TypeError or ValueError for a value that an option, given by name, can not have, as those of checks.py do.
Check = Callable[[str, Any], None]


class Option(NamedTuple):
    """What there is to say of an option: for `--help`, and for a value that can not be."""

    help: str
    check: Check | None = None
    #: What no value stands for.
    unset: str | None = None
    #: Whether it is a number of bytes, which is given as text such as "16MiB".
    in_bytes: bool = False
    #: The name on the command line where that may be given several times, each for one value.
    each: str | None = None


def option(default: Any, help: str, check: Check | None = None, **more: Any) -> Any:
    """A field of a dataclass of options; `more` of what an `Option` says."""
    return dataclasses.field(default=default, metadata={_KEY: Option(help, check, **more)})


def options_of(kind: Any) -> dict[str, Option]:
    """The options of a dataclass by the name of their field."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(kind)}


def taken(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given options that a dataclass has; they are taken out."""
    return {name: given.pop(name) for name in options_of(kind) if name in given}


def of_kind(kind: Any, expected: str, holds: Callable[[Any], bool]) -> Check:
    """A finite value of this kind, and no bool, for which `holds`; `expected` says so in words."""

    def check(flag: str, value: Any) -> None:
        odd = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
        if odd or not isinstance(value, kind) or not holds(value):
            raise ValueError(f"{flag} is {value}, expected {expected}")

    return check


def integer(low: int, end: int = 2**31) -> Check:
    """In [low, end), of which `end` is a power of two."""
    return of_kind(int, f"an integer in [{low}, 2**{end.bit_length() - 1})", lambda value: low <= value < end)


def at_least(low: int) -> Check:
    """An integer that has a lower bound to speak of."""
    return of_kind(int, f"an integer ≥ {low}, below 2**31", lambda value: low <= value < 2**31)


def number(expected: str, holds: Callable[[float], bool]) -> Check:
    """A finite number for which `holds`."""
    return of_kind(int | float, f"a number {expected}", holds)


def all_of(*checks: Check) -> Check:
    """What every one of them lets pass; the first that does not tells why."""

    def check(flag: str, value: Any) -> None:
        for one in checks:
            one(flag, value)

    return check


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The check of a word of a few, in the order in which `--help` shows them; `expected` says it in other words."""

    choices: Sequence[str]
    expected: str | None = None

    def __call__(self, flag: str, value: Any) -> None:
        if value not in self.choices:
            expected = self.expected or f"one of {', '.join(self.choices)}"
            raise ValueError(f"{flag} is {value!r}, expected {expected}")


def flag_of(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_options(options: Any) -> None:
    """JobError that names the option for a value that can not be."""
    for name, about in options_of(options).items():
        value, default = getattr(options, name), getattr(type(options), name)
        if about.check is None or (value is None and default is None):
            continue
        for single in value if about.each else (value,):
            check_value(about.check, flag_of(about.each or name), single)


def check_value(check: Check, flag: str, value: Any) -> None:
    """JobError for a value that this option can not have."""
    try:
        check(flag, value)
    except (TypeError, ValueError) as error:
        raise JobError(str(error)) from error
