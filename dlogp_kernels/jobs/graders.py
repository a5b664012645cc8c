"""Graders: a response and its problem in, a score out. `exact`, `math-verify`, or a function of the user's."""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from ..installation import how_to_install
from .errors import JobError
from .grader_process import Grade, GraderFailure, GraderProcess

EXACT, MATH_VERIFY = "exact", "math-verify"
DEFAULT_GRADER_SECONDS = 60.0
_EXPECTED = f"expected {EXACT}, {MATH_VERIFY} or module:function"
_MATH_EXTRA = f"expected the extra 'math': {how_to_install('math')}"
_NUMBER_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BOXED, _BRACES = r"\boxed{", re.compile(r"[{}]")


class Grader(NamedTuple):
    """A grading function with what identifies it.

    `grade` is called with the text of the response, without special tokens, and the columns of the problem's line.
    """

    grade: Callable[[str, Mapping[str, Any]], Grade]
    needs_answer: bool
    identity: Mapping[str, Any]

    def __call__(self, response: str, problem: Mapping[str, Any]) -> Grade:
        """The score of a response. Whatever the grader raises, or a time limit that it hits, is the grade's error."""
        return self.grade(response, problem)


def load_grader(name: str, *, timeout: float = DEFAULT_GRADER_SECONDS) -> Grader:
    """The grader of that name; JobError if there is none, or its package or module can not be imported.

    Args:
        name: `exact` compares the final answers of response and problem (`final_answer`, `same_answer`);
            `math-verify` asks the package of that name whether they are equal as mathematics;
            `module:function` is imported, from the current directory too, and called with the response's text and the
            problem (a mapping of JSON's values); it returns a bool or a finite number.
        timeout: seconds that a response may take. All but `exact` run in a process of their own, which is stopped then,
            and what it would have graded has this as its error; the next response gets a new process.
    """
    if name == EXACT:
        return Grader(_exact, True, {"name": name})
    module, colon, function = name.partition(":")
    if name != MATH_VERIFY and not (colon and module and function):
        raise JobError(f"--grader is {name!r}, {_EXPECTED}")
    try:
        process = GraderProcess(name, timeout)
    except GraderFailure as error:
        advice = f"; {_MATH_EXTRA}" if name == MATH_VERIFY else ""
        raise JobError(f"--grader {name}: {error}{advice}") from error
    return Grader(process, name == MATH_VERIFY, {"name": name, **process.identity})


def final_answer(text: str) -> str:
    """What is inside the last \\boxed{…}; without one, what follows the last #; without that, all of it. Stripped."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    return text.rpartition("#")[2].strip()


def _last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} whose braces close, in one pass: a degenerate model opens thousands."""
    opened: list[int] = []
    begin = end = -1
    for brace in _BRACES.finditer(text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened:
            place = opened.pop()
            if place > begin and text.startswith(_BOXED, place - len(_BOXED)):
                begin, end = place, brace.start()
    return None if begin < 0 else text[begin:end]


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


def _exact(response: str, problem: Mapping[str, Any]) -> Grade:
    return Grade(float(same_answer(final_answer(response), final_answer(str(problem["answer"])))))
