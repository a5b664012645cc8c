"""Graders: what counts as the final answer, when two answers are the same, and graders of the user's that misbehave."""

import builtins
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

import numpy as np

from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.graders import final_answer, load_grader, same_answer

# Text, and its final answer.
FINAL = {
    "so a 1 + 2 = 3 # 3": "3",
    "#### 18": "18",
    "# Step 1\nfirst\n#### 1,234": "1,234",
    r"thus \boxed{\frac{1}{2}}.": r"\frac{1}{2}",
    r"\boxed{1} and then \boxed{2} # 3": "2",
    r"\boxed{\text{a {b} c}} rest": r"\text{a {b} c}",
    r"\boxed{7} then \boxed{never closed": "7",
    r"\boxed{never closed # 5": "5",
    "  42\n": "42",
    "": "",
    "#": "",
}
SAME = [("18", "18."), ("$18$", " 18 "), ("1,234", "1234"), ("5.0", "5"), ("+3", "3"), ("a  b", "a b"), ("1e3", "1000")]
DIFFERENT = [("18", "19"), ("1,23", "123"), ("nan", "NaN"), ("", "0"), ("a b", "ab"), ("-3", "3"), ("x", "X")]


@pytest.mark.parametrize("text", FINAL)
def test_final_answer(text):
    assert final_answer(text) == FINAL[text]


def test_same_answer():
    assert [pair for pair in SAME if not same_answer(*pair)] == []
    assert [pair for pair in DIFFERENT if same_answer(*pair)] == []


def test_exact_reads_the_answer_as_it_reads_the_response():
    grade = load_grader("exact")
    assert grade("… so it is # 18", {"answer": "9 + 9 = 18\n#### 18"}) == (1.0, None)
    assert grade("17", {"answer": 18}) == (0.0, None)
    assert grade("18", {"answer": 18.0}) == (1.0, None)


def test_math_verify():
    pytest.importorskip("math_verify")
    grade = load_grader("math-verify")
    problem = {"answer": r"\frac{1}{2}"}
    assert grade(r"It is $\boxed{0.5}$.", problem) == (1.0, None)
    assert grade(r"It is $\frac{2}{4}$.", problem) == (1.0, None)
    assert grade(r"It is $\boxed{0.4}$.", problem) == (0.0, None)
    assert grade("no idea", problem).score == 0.0
    assert grade.identity["version"]


def test_math_verify_that_is_missing_is_named_with_its_extra(monkeypatch):
    def absent(name, *arguments, **options):
        if name == "math_verify":
            raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify")
        return original(name, *arguments, **options)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(JobError, match=r"--grader math-verify: math_verify can not be imported.*dlogp_kernels\[math\]"):
        load_grader("math-verify")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Write a module of the user's into the current directory; gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(code: str, name: str = "own_grader") -> str:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def test_a_function_of_the_user(own_module):
    name = own_module("def grade(response, problem):\n    return response.count(problem['letter']) / 4\n")
    grader = load_grader(f"{name}:grade")
    assert grader("aba", {"letter": "a"}) == (0.5, None) and not grader.needs_answer
    digest = grader.identity["sha256"]
    own_module("def grade(response, problem):\n    return True\n")
    assert load_grader(f"{name}:grade").identity["sha256"] != digest


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('no such key')", "KeyError: 'no such key'"),
        ("return 'yes'", "TypeError: the grader returned 'yes', expected a bool or a number"),
        ("return None", "TypeError: the grader returned None"),
        ("return float('nan')", "ValueError: the grader returned nan, expected a finite number"),
        ("raise ValueError('x' * 10_000)", "ValueError: " + "x" * 50),
        ("assert False", "AssertionError: "),
    ],
)
def test_what_a_grader_raises_is_its_grade(own_module, body, message):
    name = own_module(f"def grade(response, problem):\n    {body}\n")
    score, error = load_grader(f"{name}:grade")("response", {})
    assert score is None and error.startswith(message) and len(error) < 400


def test_numpy_scores_are_scores(own_module):
    name = own_module("def grade(response, problem):\n    return problem['value']\n")
    grader = load_grader(f"{name}:grade")
    for value in (np.bool_(True), np.float32(1), np.int64(1)):
        assert grader("", {"value": value}) == (1.0, None)


@pytest.mark.parametrize(
    ("code", "grader", "message"),
    [
        ("", "own_grader:grade", "the module own_grader has no grade"),
        ("grade = 3", "own_grader:grade", "something that can not be called as grade"),
        ("1 / 0", "own_grader:grade", "can not be imported: ZeroDivisionError"),
        ("", "no_such_module_at_all:grade", "can not be imported: ModuleNotFoundError"),
        ("", "fuzzy", "--grader is 'fuzzy', expected exact, math-verify or module:function"),
        ("", ":grade", "--grader is ':grade', expected"),
    ],
)
def test_graders_that_are_not_there(own_module, code, grader, message):
    own_module(code)
    with pytest.raises(JobError) as caught:
        load_grader(grader)
    assert message in str(caught.value)
