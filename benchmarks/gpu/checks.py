"""The tests of the ops on this device, in parallel, the most important first.

This module is also a plugin of that pytest: it writes every outcome at once, so that tests that are cut off count too.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_GRACE_SECONDS = 5.0
#: When time runs out, the last ones are missing: the first are those that no GPU has run to their end.
_FILES = (
    "ops/test_gpu_only.py", "ops/test_near_certainty.py", "ops/test_top.py", "ops/test_accuracy.py",
    "ops/test_gradients.py", "ops/test_ignored.py", "ops/test_layout.py", "ops/test_invariance.py",
    "ops/test_linear_policy_loss.py", "ops/test_linear_sample.py", "ops/test_policy_loss.py", "ops/test_sample.py",
    "ops/test_registration.py", "ops/test_fuzz.py", "ops/test_backends.py", "ops/test_safety.py",
)  # fmt: skip
_TINY_FILES = ("functional/test_lemma.py",)
_WORKERS, _TEST_SECONDS = 12, 90
_MOST_FAILURES = 40
_OUTCOMES = "DLOGP_TEST_OUTCOMES"


def run(device: str, tiny: bool, seconds: float, outcomes: Path) -> dict[str, Any]:
    """Counts and failures of the tests that ended within `seconds`; a line of each in `outcomes`, at once."""
    files = [ROOT / "tests" / name for name in (_TINY_FILES if tiny else _FILES)]
    # Neither a process of the interpreter, as the visit's others are on a CPU, nor a worker of a pytest around it.
    command = ["env", "-u", "TRITON_INTERPRET", "-u", "PYTEST_XDIST_WORKER", sys.executable, "-m", "pytest"]
    command += ["--device", device, "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.checks"]
    command += [str(path) for path in files if path.exists()]
    if not tiny and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(_WORKERS), "--maxschedchunk", "1"]  # handed out one by one, in order
    if importlib.util.find_spec("pytest_timeout") is not None:
        # A thread, not a signal: a process that waits for the GPU does not hear one.
        command += ["--timeout", str(_TEST_SECONDS), "--timeout-method", "thread"]
    outcomes.write_text("")
    code, output = run_command(command, seconds, **{_OUTCOMES: str(outcomes.resolve())})
    found = [json.loads(line) for line in outcomes.read_text().splitlines()]
    failures = [outcome for outcome in found if outcome["outcome"] == "failed"]
    # 0: all passed, 1: some failed.
    whole = code in (0, 1)
    return {
        "counts": dict(Counter(outcome["outcome"] for outcome in found)),
        "whole": whole,
        "exit status": code,
        "failures": failures[:_MOST_FAILURES],
        "log": output[-3000:] if failures or not whole else "",
    }


def pytest_runtest_logreport(report: Any) -> None:
    """One line an outcome, by the process that prints."""
    path = os.environ.get(_OUTCOMES)
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(report.longrepr if crash is None else crash.message) if report.failed else ""
    outcome = {"test": report.nodeid, "outcome": report.outcome, "message": " ".join(message.split())[:300]}
    outcome["measured"] = [value for _, value in report.user_properties]
    with open(path, "a") as stream:
        stream.write(json.dumps({**outcome, "seconds": report.duration}) + "\n")


def pytest_runtest_setup(item: Any) -> None:
    """A worker that has lost its GPU ends, and another takes its place; otherwise every later test fails."""
    device = item.config.getoption("--device")
    if "PYTEST_XDIST_WORKER" in os.environ and device != "cpu":
        import torch

        from .processes import usable

        if not usable(torch.device(device)):
            os._exit(3)


def end_group(leader: int | None) -> None:
    """End a process that leads a session, and all that it started."""
    assert leader is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def run_command(command: Iterable[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Exit status (None: it was ended after `seconds`) and output of a command, with these environment variables."""
    with tempfile.TemporaryFile("w+b") as output:
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        environment = os.environ | variables
        process = subprocess.Popen([*command], cwd=ROOT, **pipes, start_new_session=True, env=environment)
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            end_group(process.pid)
            # A process that waits for the GPU may take its time to go.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
        output.seek(0)
        return code, output.read().decode(errors="replace")
