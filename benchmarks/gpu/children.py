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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_SLICE = 0.2
_GRACE_SECONDS = 5.0
_MOST_STARTS = 12
_LOG_CHARACTERS = 3000

Entry = dict[str, Any]
Record = Callable[[str, Entry], None]


@dataclass(frozen=True)
class Job:
    """The cases of `module:function`, for one process at a time; `options` are further fields of its request."""

    name: str
    cases: str
    options: dict[str, Any] = field(default_factory=dict)
    #: Whether what it finds is of interest; of compiling ahead only what fails is.
    quiet: bool = False
    #: Seconds without progress, where they are not those of the visit: of compilers of other libraries.
    hang: float | None = None


@dataclass(frozen=True)
class Limits:
    """`deadline` is of time.monotonic(); without progress for `hang` seconds a process counts as hanging."""

    deadline: float
    hang: float

    def left(self) -> float:
        return self.deadline - time.monotonic()


class _LostError(RuntimeError):
    """The process is gone, or had to be ended; `status` is that of what it was at."""

    def __init__(self, reason: str, status: str = "failed") -> None:
        super().__init__(reason)
        self.status = status


def run_jobs(
    jobs: Sequence[Job], request: Entry, limits: Limits, record: Record, stop: threading.Event, at_once: int
) -> None:
    """All jobs, `at_once` of them side by side; `record(job, entry)` takes what they find."""

    def run(job: Job) -> None:
        try:
            _run_job(job, request, limits, partial(record, job.name), stop)
        except Exception as error:  # which must not end a visit
            record(job.name, {"case": "", "status": "failed", "error": f"{type(error).__name__}: {error}"})

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        try:
            list(pool.map(run, jobs))
        except BaseException:
            stop.set()
            raise


def _run_job(job: Job, request: Entry, limits: Limits, record: Callable[[Entry], None], stop: threading.Event) -> None:
    done: list[str] = []
    excluded: dict[str, list[str]] = {}
    if job.hang is not None:
        limits = replace(limits, hang=job.hang)
    for _ in range(_MOST_STARTS):
        if limits.left() <= 0 or stop.is_set():
            record({"case": "", "status": "cut off", "error": "out of time before it began"})
            return
        child = Child({**request, **job.options, "cases": job.cases, "done": done, "excluded": excluded})
        case = step = ""
        try:
            for event in child.events(limits, stop):
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
            entry = {"case": case, "status": lost.status, "error": str(lost), "log": child.log()}
            record(entry | ({"candidate": step} if case and step else {}))
            if lost.status != "failed" or not case:
                return
        finally:
            child.close()
        if step and step not in excluded.get(case, []):
            excluded.setdefault(case, []).append(step)
        else:
            done.append(case)


class Child:
    """One process of `child.py`, in a process group of its own so that its compilers end with it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (open as long as the process)
        command, pipe = [sys.executable, "-m", "benchmarks.gpu.child"], subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self._log, start_new_session=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def events(self, limits: Limits, stop: threading.Event) -> Iterator[Entry]:
        """What it sends, until it says that it has come to its end."""
        assert self._process.stdout is not None
        pipe, rest, heard = self._process.stdout.fileno(), b"", time.monotonic()
        while True:
            if stop.is_set() or limits.left() <= 0:
                raise _LostError("stopped" if stop.is_set() else "out of time", "cut off")
            if time.monotonic() - heard > limits.hang:
                raise _LostError(f"no progress for {limits.hang:.0f} s, its process was ended")
            if not select.select([pipe], [], [], _SLICE)[0]:
                continue
            received = os.read(pipe, 2**16)
            if not received:
                raise _LostError(f"its process ended with exit status {self._process.wait()}")
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
        end_group(self._process)
        for stream in filter(None, (self._process.stdin, self._process.stdout, self._log)):
            stream.close()


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads a session, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that waits for the GPU may take its time to go.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)


def run_command(
    command: Iterable[str], seconds: float, stop: threading.Event, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit status (None: it was ended after `seconds`) and output of a command."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryFile("w+b") as output:
        process = subprocess.Popen(
            [*command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < deadline and not stop.is_set():
                time.sleep(_SLICE)
            code = process.poll()
        finally:
            end_group(process)
        output.seek(0)
        return code, output.read().decode(errors="replace")
