"""Graders: what counts as the final answer, when two answers are the same, and graders of the user's that misbehave."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("psutil")

import psutil
from paths import ROOT

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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7} " + r"\boxed{" * 6000, "7"),
        (r"\boxed{" * 6000, r"\boxed{" * 6000),
        (r"\boxed{" * 6000 + "7" + "}" * 6000, "7"),
        ("}" * 6000 + r"\boxed{7}" + "{" * 6000, "7"),
    ],
    ids=["after one that closes", "never closed", "nested", "unmatched"],
)
def test_a_degenerate_response_takes_a_moment(text, answer):
    begin = time.process_time()
    assert final_answer(text) == answer
    assert time.process_time() - begin < 1


def test_same_answer():
    assert [pair for pair in SAME if not same_answer(*pair)] == []
    assert [pair for pair in DIFFERENT if same_answer(*pair)] == []


def test_exact_reads_the_answer_as_it_reads_the_response():
    grade = load_grader("exact")
    assert grade("… so it is # 18", {"answer": "9 + 9 = 18\n#### 18"}) == (1.0, None)
    assert grade("17", {"answer": 18}) == (0.0, None)
    assert grade("18", {"answer": 18.0}) == (1.0, None)


def test_a_function_of_a_module_that_is_built_in_has_no_file():
    assert load_grader("time:sleep").identity == {"name": "time:sleep", "sha256": None}


def test_math_verify():
    pytest.importorskip("math_verify")
    grade = load_grader("math-verify")
    problem = {"answer": r"\frac{1}{2}"}
    assert grade(r"It is $\boxed{0.5}$.", problem) == (1.0, None)
    assert grade(r"It is $\frac{2}{4}$.", problem) == (1.0, None)
    assert grade(r"It is $\boxed{0.4}$.", problem) == (0.0, None)
    assert grade("no idea", problem).score == 0.0
    assert grade.identity["version"]


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


def test_math_verify_that_is_missing_is_named_with_its_extra(own_module):
    own_module("raise ModuleNotFoundError(\"No module named 'math_verify'\", name='math_verify')", "math_verify")
    with pytest.raises(JobError, match=r'--grader math-verify: math_verify can not be imported.*-e "\.\[math\]"'):
        load_grader("math-verify")


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
    name = own_module("import numpy\n\ndef grade(response, problem):\n    return getattr(numpy, problem['type'])(1)\n")
    grader = load_grader(f"{name}:grade")
    for kind in ("bool_", "float32", "int64"):
        assert grader("", {"type": kind}) == (1.0, None)


HANGING = """
import os, subprocess, sys, time

def grade(response, problem):
    print("a grader may print", flush=True)
    if response == "sleep":
        time.sleep(600)
    while response == "spin":
        try:
            time.sleep(0.001)
        except BaseException:
            pass
    if response == "child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
    if response == "exit":
        sys.exit("no more")
    if response == "crash":
        os.abort()
    if response == "fork":
        os.fork()
    return problem["score"]
"""


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("sleep", "TimeoutError: the grader took more than 1 s"),
        ("spin", "TimeoutError: the grader took more than 1 s"),
        ("child", "TimeoutError: the grader took more than 1 s"),
        ("exit", "SystemExit: no more"),
        ("crash", "the process of the grader ended, with status -6"),
        ("fork", None),
    ],
)
def test_a_grader_that_does_not_come_back_costs_one_grade(own_module, response, error):
    grade = load_grader(f"{own_module(HANGING)}:grade", timeout=1)
    scores = [grade(text, {"score": score}) for score, text in enumerate(["well", response, "well"])]
    assert scores == [(0, None), (1, None) if error is None else (None, error), (2, None)]


def test_the_process_of_a_grader_ends_with_it_and_its_children(own_module):
    code = "import os, subprocess\n\ndef grade(response, problem):\n"
    code += "    return subprocess.Popen(['sleep', '600']).pid if problem['child'] else os.getpid()\n"
    grade = load_grader(f"{own_module(code)}:grade")
    processes = [int(grade("", {"child": child}).score) for child in (False, True)]
    assert os.getpid() not in processes and all(map(psutil.pid_exists, processes))
    del grade
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in processes if psutil.pid_exists(pid)], timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_the_process_of_a_grader_ends_with_one_that_was_killed_before_it_read_the_reply(own_module):
    code = "import os, time\nfrom pathlib import Path\n\ndef grade(response, problem):\n"
    code += (
        "    Path('pid').write_text(str(os.getpid()))\n    time.sleep(1)\n    Path('graded').touch()\n    return 1\n"
    )
    run = f"from dlogp_kernels.jobs.graders import load_grader; load_grader('{own_module(code)}:grade')('', {{}})"
    asking = subprocess.Popen([sys.executable, "-c", run], env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(Path("pid"))
    asking.send_signal(signal.SIGSTOP)
    worker = psutil.Process(int(Path("pid").read_text()))
    wait_for(Path("graded"))
    time.sleep(0.5)  # until the reply is on its way
    asking.kill()
    asking.wait()
    worker.wait(timeout=10)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and (path.name != "pid" or path.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_limit_for_new_sockets_is_none_for_graders(own_module):
    module = own_module("def grade(response, problem):\n    return 1\n")
    socket.setdefaulttimeout(5.0)
    try:
        assert load_grader(f"{module}:grade")("", {}) == (1, None)
    finally:
        socket.setdefaulttimeout(None)


def test_what_math_verify_does_not_finish_is_an_error(own_module):
    pytest.importorskip("math_verify")
    code = "import sys\nfrom math_verify.errors import TimeoutException\n\ndef parse(text, raise_on_error):\n"
    code += "    if text == 'slow':\n        raise TimeoutException\n    return [text]\n\n"
    code += "def verify(one, other, raise_on_error):\n    raise (TimeoutException if other == 'hard' else ValueError)\n"
    own_module("class TimeoutException(BaseException):\n    pass\n", "errors")
    Path("math_verify").mkdir()
    Path("errors.py").rename("math_verify/errors.py")
    own_module(code, "math_verify/__init__")
    grade = load_grader("math-verify")
    assert grade("slow", {"answer": 1}) == (None, "TimeoutError: math-verify took too long to read it")
    assert grade("hard", {"answer": 1}) == (None, "TimeoutError: math-verify took too long to compare it")
    assert grade("odd", {"answer": 1}) == (0.0, None)


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
