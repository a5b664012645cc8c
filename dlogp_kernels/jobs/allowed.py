"""Options of a job as fields of a dataclass: the default, what it is for and what it may be, each stated once.

Jobs check them with `check_options`; the command line makes its own options of them, see `cli.command`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .errors import JobError

_KEY = "option"


class Allowed(NamedTuple):
    """Which values an option may have: in words, which end a message, and as a condition on finite ones of the kind."""

    expected: str
    kind: Any
    holds: Callable[[Any], bool]
    #: One of checks.py, which the ops ask, too: it has words of its own.
    check: Callable[..., None] | None = None
    #: The only values, where there are a few.
    choices: Sequence[str] = ()


class Option(NamedTuple):
    """What there is to say of an option: for `--help`, and for a value that can not be."""

    help: str
    allowed: Allowed | None = None
    #: What no value stands for.
    unset: str | None = None
    #: Whether it is a number of bytes, which is given as text such as "16MiB".
    in_bytes: bool = False
    #: The name on the command line where that may be given several times, each for one value.
    each: str | None = None


def option(default: Any, help: str, allowed: Allowed | None = None, **more: Any) -> Any:
    """A field of a dataclass of options; `more` of what an `Option` says."""
    return dataclasses.field(default=default, metadata={_KEY: Option(help, allowed, **more)})


def options_of(kind: Any) -> dict[str, Option]:
    """The options of a dataclass by the name of their field."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(kind)}


def integer(low: int, end: int = 2**31) -> Allowed:
    """In [low, end), of which `end` is a power of two."""
    return Allowed(f"an integer in [{low}, 2**{end.bit_length() - 1})", int, lambda value: low <= value < end)


def at_least(low: int) -> Allowed:
    """An integer that has a lower bound to speak of."""
    return integer(low)._replace(expected=f"an integer ≥ {low}, below 2**31")


def number(expected: str, holds: Callable[[float], bool], check: Callable[..., None] | None = None) -> Allowed:
    """A finite number for which `holds`, and that passes `check` if there is one."""
    return Allowed(f"a number {expected}", int | float, holds, check)


def one_of(*choices: str) -> Allowed:
    """A word of a few."""
    return Allowed(f"one of {', '.join(choices)}", str, lambda value: value in choices, choices=choices)


def flag_of(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_options(options: Any) -> None:
    """JobError that names the option for a value that can not be."""
    for name, about in options_of(options).items():
        value, default = getattr(options, name), getattr(type(options), name)
        if about.allowed is None or (value is None and default is None):
            continue
        for single in value if about.each else (value,):
            check_value(flag_of(about.each or name), single, about.allowed)


def check_value(flag: str, value: Any, allowed: Allowed) -> None:
    """JobError for a value that this option can not have."""
    odd = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
    if odd or not isinstance(value, allowed.kind) or not allowed.holds(value):
        raise JobError(f"{flag} is {repr(value) if allowed.choices else value}, expected {allowed.expected}")
    if allowed.check is not None:
        try:
            allowed.check(flag, value)
        except (TypeError, ValueError) as error:
            raise JobError(str(error)) from error
