"""Processes that do the cases, and what happens when one of them hangs, crashes or loses the GPU.

A kernel that never returns holds its process for ever, and one that reads out of bounds leaves the GPU unusable for it.
Then the process is ended, what it was at is recorded as failed, and a new process does what is left.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SLICE, _GRACE_SECONDS = 0.2, 5.0
_MOST_STARTS = 12
_LOG_CHARACTERS = 3000

Entry = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The cases of `module:function`, for one process at a time; `options` are further fields of its request.

    Without progress for `hang` seconds a process counts as hanging. Of a quiet job only what fails is of interest.
    """

    name: str
    cases: str
    options: Entry = field(default_factory=dict)
    hang: float = 45.0
    quiet: bool = False


class _LostError(RuntimeError):
    """The process is gone, or had to be ended: why, and the status of what it was at."""


def run_jobs(
    jobs: Sequence[Job],
    request: Entry,
    deadline: float,
    record: Callable[[str, Entry], None],
    stop: threading.Event,
    at_once: int,
) -> None:
    """All jobs until `deadline` (of time.monotonic), `at_once` side by side; `record(job, entry)` takes their finds."""

    def run(job: Job) -> None:
        try:
            _run_job(job, request, deadline, partial(record, job.name), stop)
        except Exception as error:  # which must not end a visit
            record(job.name, {"case": "", "status": "failed", "error": f"{type(error).__name__}: {error}"})

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        try:
            list(pool.map(run, jobs))
        except BaseException:
            stop.set()
            raise


def _run_job(job: Job, request: Entry, deadline: float, record: Callable[[Entry], None], stop: threading.Event) -> None:
    done: list[str] = []
    excluded: dict[str, list[str]] = {}
    for _ in range(_MOST_STARTS):
        if time.monotonic() > deadline or stop.is_set():
            record({"case": "", "status": "cut off", "error": "out of time before it began"})
            return
        child = _Child({**request, **job.options, "cases": job.cases, "done": done, "excluded": excluded})
        case = step = ""
        try:
            for event in child.events(deadline, job.hang, stop):
                if "at" in event:
                    case, step = event["at"]
                elif "done" in event:
                    done.append(event["done"])
                    case = step = ""
                elif "lost" in event:
                    break
                elif not job.quiet or event["entry"]["status"] == "failed":
                    record(event["entry"])
            else:
                return
        except _LostError as lost:
            reason, status = lost.args
            entry = {"case": case, "status": status, "error": reason, "log": child.log()}
            record(entry | ({"candidate": step} if case and step else {}))
            if status != "failed" or not case:
                return
        finally:
            child.close()
        if step and step not in excluded.get(case, []):
            excluded.setdefault(case, []).append(step)
        else:
            done.append(case)


class _Child:
    """One process of `child.py`, in a process group of its own so that its compilers end with it."""

    def __init__(self, request: Entry) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (open as long as the process)
        command = [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(request)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, cwd=ROOT, **pipes, start_new_session=True)

    def events(self, deadline: float, hang: float, stop: threading.Event) -> Iterator[Entry]:
        """What it sends, until it says that it has come to its end."""
        assert self._process.stdout is not None
        pipe, rest, heard = self._process.stdout.fileno(), b"", time.monotonic()
        while True:
            now = time.monotonic()
            if stop.is_set() or now > deadline:
                raise _LostError("stopped" if stop.is_set() else "out of time", "cut off")
            if now - heard > hang:
                raise _LostError(f"no progress for {hang:.0f} s, its process was ended", "failed")
            if not select.select([pipe], [], [], _SLICE)[0]:
                continue
            received = os.read(pipe, 2**16)
            if not received:
                raise _LostError(f"its process ended with exit status {self._process.wait()}", "failed")
            heard = time.monotonic()
            *lines, rest = (rest + received).split(b"\n")
            for event in map(json.loads, lines):
                if "end" in event:
                    return
                yield event

    def log(self) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-_LOG_CHARACTERS:]

    def close(self) -> None:
        _end_group(self._process)
        for stream in filter(None, (self._process.stdin, self._process.stdout, self._log)):
            stream.close()


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads a session, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that waits for the GPU may take its time to go.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)


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
            _end_group(process)
        output.seek(0)
        return code, output.read().decode(errors="replace")
