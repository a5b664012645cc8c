"""The tests of the ops on this device, in parallel, the most important first.

This module is also a plugin of that pytest: it writes every outcome at once, so that tests that are cut off count too.
"""

import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from .children import ROOT, run_command

#: When time runs out, the last ones are missing.
_FILES = (
    "test_ops_sample.py", "test_ops_linear_sample.py", "test_ops_policy.py", "test_ops_linear_policy.py",
    "test_gpu_only.py", "test_ops_accuracy.py", "test_ops_gradients.py", "test_ops_ignored.py", "test_ops_layout.py",
    "test_ops_invariance.py", "test_ops_registration.py", "test_functional_fuzz.py", "test_backends.py",
)  # fmt: skip
_TINY_FILES = ("test_lemma.py",)
_WORKERS = 12
_TEST_SECONDS = 90
_MOST_FAILURES = 40
_LOG = "DLOGP_TEST_OUTCOMES"

Tests = dict[str, Any]


def run(device: str, tiny: bool, seconds: float, stop: threading.Event) -> Tests:
    """Counts and failures of the tests that ended within `seconds`."""
    names = _TINY_FILES if tiny else _FILES
    files = [str(path) for path in (ROOT / "tests" / name for name in names) if path.exists()]
    command = [sys.executable, "-m", "pytest", "--device", device, "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.checks"]
    if not tiny and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(_WORKERS), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # A thread, not a signal: a process that waits for the GPU does not hear one.
        command += ["--timeout", str(_TEST_SECONDS), "--timeout-method", "thread"]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        outcomes.touch()
        other = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
        environment = {key: value for key, value in os.environ.items() if key not in other}
        environment |= {_LOG: str(outcomes), "OMP_NUM_THREADS": "1"}
        code, output = run_command([*command, *files], seconds, stop, environment)
        return _summary(outcomes.read_text().splitlines(), code, output)


def _summary(lines: list[str], code: int | None, output: str) -> Tests:
    found = [json.loads(line) for line in lines]
    failures = [outcome for outcome in found if outcome["outcome"] == "failed"]
    # 0: all passed, 1: some failed.
    whole = code in (0, 1)
    return {
        "counts": dict(Counter(outcome["outcome"] for outcome in found)),
        "whole": whole,
        "exit status": code,
        "failures": [{"test": x["test"], "message": x["message"]} for x in failures[:_MOST_FAILURES]],
        "slowest": [[x["test"], x["seconds"]] for x in sorted(found, key=lambda x: -x["seconds"])[:10]],
        "log": output[-3000:] if failures or not whole else "",
    }


def pytest_runtest_logreport(report: Any) -> None:
    """One line an outcome, by the process that prints."""
    path = os.environ.get(_LOG)
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    message = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = " ".join(str(report.longrepr if crash is None else crash.message).split())[:300]
    outcome = {"test": report.nodeid, "outcome": report.outcome, "message": message, "seconds": report.duration}
    with open(path, "a") as stream:
        stream.write(json.dumps(outcome) + "\n")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Every worker begins with an equal piece of the list: dealt out, so that all begin with the most important."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = [item for worker in range(_WORKERS) for item in items[worker::_WORKERS]]


def pytest_runtest_setup(item: Any) -> None:
    """A worker that has lost its GPU ends, and another takes its place; otherwise every later test fails."""
    if "PYTEST_XDIST_WORKER" not in os.environ or item.config.getoption("--device") == "cpu":
        return
    import torch

    from .child import usable

    if not usable(torch.device(item.config.getoption("--device"))):
        os._exit(3)
