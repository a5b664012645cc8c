"""The tests of the ops, run on the GPU before anything is timed.

Each test file has a process of its own, a few at a time: after an illegal memory access every later test of the same
process fails, and a hanging kernel holds only its own file.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_ROOT = Path(__file__).resolve().parent.parent.parent
PATTERNS = ("test_gpu_*.py", "test_ops_*.py", "test_functional_*.py")
_AT_ONCE = 4
#: For pytest to write its report after an interrupt; a process that waits for the GPU does not hear it.
_GRACE_SECONDS = 15
_MOST_FAILURES = 40
_OUTCOMES = ("passed", "failed", "errors", "skipped")


def run_tests(device: str, seconds: float, log: Path, files: Sequence[Path] | None = None) -> dict[str, Any]:
    """Counts and failures of the test files (of all for a GPU if None) within `seconds`; their output in `log`."""
    files = _files() if files is None else files
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = [
            pool.submit(_run_file, path, device, start + seconds, Path(folder) / f"{number}")
            for number, path in enumerate(files)
        ]
        results = [job.result() for job in jobs]
        log.write_text("\n".join(result.pop("output") for result in results))
    summary: dict[str, Any] = {name: sum(result[name] for result in results) for name in _OUTCOMES}
    failures = [failure for result in results for failure in result["failures"]]
    return {
        **summary,
        "seconds": round(time.monotonic() - start, 1),
        "incomplete": {result["file"]: result["incomplete"] for result in results if result["incomplete"]},
        "failures": failures[:_MOST_FAILURES],
    }


def _files() -> list[Path]:
    return [path for pattern in PATTERNS for path in sorted((_ROOT / "tests").glob(pattern))]


def _run_file(path: Path, device: str, deadline: float, scratch: Path) -> dict[str, Any]:
    xml, log = scratch.with_suffix(".xml"), scratch.with_suffix(".log")
    empty = {**dict.fromkeys(_OUTCOMES, 0), "file": path.name, "failures": [], "output": ""}
    if time.monotonic() > deadline:
        return {**empty, "incomplete": "out of time"}
    # `-v` so that the log names the test that was running when the process was ended.
    command = [sys.executable, "-m", "pytest", "--device", device, str(path), f"--junitxml={xml}"]
    command += ["-v", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_logging=no"]
    with log.open("w") as stream:
        child = subprocess.Popen(command, cwd=_ROOT, stdout=stream, stderr=subprocess.STDOUT)
        incomplete = _wait(child, deadline)
    output = log.read_text(errors="replace")
    if xml.exists():
        counted = _from_report(ElementTree.parse(xml).getroot())
        if incomplete:
            # Of a test that was interrupted the report does not say so.
            counted |= _from_log(output)
    else:
        counted = _from_log(output)
        incomplete = incomplete or f"no report, exit status {child.returncode}: {_last_line(output)}"
    return {**empty, **counted, "output": output, "incomplete": incomplete}


def _wait(child: subprocess.Popen[bytes], deadline: float) -> str | None:
    """Wait for `child`; why it did not come to its end, None if it did."""
    try:
        child.wait(max(0.1, deadline - time.monotonic()))
        return None
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    return "stopped: out of time"


def _from_report(root: ElementTree.Element) -> dict[str, Any]:
    cases = list(root.iter("testcase"))
    bad = [(case, child) for case in cases for child in case if child.tag in ("failure", "error")]
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    failed = sum(child.tag == "failure" for _, child in bad)
    return {
        "passed": len(cases) - len({id(case) for case, _ in bad}) - skipped,
        "failed": failed,
        "errors": len(bad) - failed,
        "skipped": skipped,
        "failures": [_failure(case, child) for case, child in bad],
    }


def _failure(case: ElementTree.Element, child: ElementTree.Element) -> dict[str, str]:
    message = " ".join((child.get("message") or child.text or "").split())
    return {"test": f"{case.get('classname')}.{case.get('name')}", "message": message[:300]}


def _from_log(output: str) -> dict[str, Any]:
    """Of a process that was killed: pytest writes its report at the end."""
    words = {"passed": "PASSED", "failed": "FAILED", "errors": "ERROR", "skipped": "SKIPPED"}
    return {name: len(re.findall(rf"::\S.* {word}\b", output)) for name, word in words.items()}


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1][:200] if lines else "no output"


def summary(tests: dict[str, Any] | None) -> Iterable[str]:
    """A line of counts, and one for each file that did not come to its end."""
    if tests is None:
        yield "Tests: not run."
        return
    counts = ", ".join(f"{tests[name]} {name}" for name in _OUTCOMES)
    yield f"Tests on this device: {counts} in {tests['seconds']:.0f} s."
    for file, reason in tests["incomplete"].items():
        yield f"- {file}: {reason}"
