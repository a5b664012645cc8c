"""Graders: a response and its problem in, a score out. `exact`, `math-verify`, or a function of the user's."""

import hashlib
import importlib
import importlib.metadata
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import JobError

EXACT, MATH_VERIFY = "exact", "math-verify"
_EXPECTED = f"expected {EXACT}, {MATH_VERIFY} or module:function"
_NUMBER_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SHOWN = 300


class Grade(NamedTuple):
    """A score, usually 0 or 1; or what the grader raised."""

    score: float | None
    error: str | None


class Grader(NamedTuple):
    """A grading function with what identifies it.

    `function` is called with the text of the response, without special tokens, and the columns of the problem's line.
    """

    name: str
    function: Callable[[str, Mapping[str, Any]], Any]
    needs_answer: bool
    identity: Mapping[str, Any]

    def __call__(self, response: str, problem: Mapping[str, Any]) -> Grade:
        """The score of a response. Whatever the function raises is the grade's error."""
        try:
            return Grade(_as_score(self.function(response, problem)), None)
        except Exception as error:  # a user's code may raise anything; it is kept with the response and counted
            text = f"{type(error).__name__}: {error}"
            return Grade(None, text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def load_grader(name: str) -> Grader:
    """The grader of that name; JobError if there is none, or its package or module can not be imported.

    Args:
        name: `exact` compares the final answers of response and problem (`final_answer`, `same_answer`);
            `math-verify` asks the package of that name whether they are equal as mathematics;
            `module:function` is imported, from the current directory too, and called with the response's text and the
            problem (a mapping); it returns a bool or a finite number.
    """
    if name == EXACT:
        return Grader(name, _exact, True, {"name": name})
    if name == MATH_VERIFY:
        return _math_verify()
    return _of_user(name)


def final_answer(text: str) -> str:
    """What is inside the last \\boxed{…}; without one, what follows the last #; without that, all of it. Stripped."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    return text.rpartition("#")[2].strip()


def _last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} whose braces close."""
    mark = r"\boxed{"
    end = len(text)
    while (begin := text.rfind(mark, 0, end)) >= 0:
        depth = 1
        for index in range(begin + len(mark), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[begin + len(mark) : index]
        end = begin
    return None


def same_answer(one: str, other: str) -> bool:
    """Whether two final answers are the same number, or the same text but for spaces, dollar signs and a final stop."""
    one, other = _normalised(one), _normalised(other)
    if one == other:
        return True
    numbers = _as_number(one), _as_number(other)
    return None not in numbers and numbers[0] == numbers[1]


def _normalised(answer: str) -> str:
    return _NUMBER_COMMA.sub("", " ".join(answer.strip().strip("$").split()).removesuffix("."))


def _as_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _exact(response: str, problem: Mapping[str, Any]) -> bool:
    return same_answer(final_answer(response), final_answer(str(problem["answer"])))


def _math_verify() -> Grader:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise JobError(
            f"--grader {MATH_VERIFY}: {error.name or error} can not be imported; expected the extra 'math': "
            'pip install "dlogp_kernels[math]"'
        ) from error

    def grade(response: str, problem: Mapping[str, Any]) -> bool:
        answer = str(problem["answer"])
        expected = parse(answer if "$" in answer or r"\boxed" in answer else f"${answer}$")
        if not expected:
            raise ValueError(f"math-verify finds no mathematics in the answer {answer!r}")
        return verify(expected, parse(response))

    return Grader(MATH_VERIFY, grade, True, {"name": MATH_VERIFY, "version": importlib.metadata.version("math-verify")})


def _of_user(name: str) -> Grader:
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise JobError(f"--grader is {name!r}, {_EXPECTED}")
    # A script that is started by its name finds modules beside it, not those of the current directory.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's code
        reason = f"{type(error).__name__}: {error}"
        raise JobError(f"--grader {name}: the module {module_name} can not be imported: {reason}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "has no" if function is None else "has something that can not be called as"
        raise JobError(f"--grader {name}: the module {module_name} {found} {function_name}")
    return Grader(name, function, False, {"name": name, "sha256": _source_digest(module)})


def _source_digest(module: Any) -> str | None:
    """Of the module's file: a grader that was edited is another one."""
    file = inspect.getsourcefile(module)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _as_score(value: Any) -> float:
    if not isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
        raise TypeError(f"the grader returned {value!r}, expected a bool or a number")
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"the grader returned {value!r}, expected a finite number")
    return score
