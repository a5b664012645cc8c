"""`python -m benchmarks gpu --visit N`: the steps of a visit, each within its part of the time.

This process never touches the GPU. It ends within the visit's limit by its own clock, and prints a short table last,
also when it is stopped.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..peers import PEERS
from . import checks, machine, profile
from .children import Job, Limits, run_jobs
from .visit import Visit

LIMITS = {1: 280.0, 2: 420.0}
#: Kept for the table and for processes to end.
_RESERVE = 4.0
_PROFILE_SECONDS = 35.0
_SMOKE_SECONDS = {1: 75.0, 2: 60.0}
_TEST_SECONDS = 170.0
_PEER_SECONDS = 60.0
_PREWARM = 4
#: Of smoke.py, one process each; this one does not import what holds kernels.
_FAMILIES = (
    "linear", "pair", "sampling cuda", "sampling triton", "policy_loss", "backward", "linear_policy_loss", "logits",
    "gemm", "linear sampling",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--visit", type=int, choices=LIMITS, required=True, help="1: starts, is right, figures; 2: all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--commit", metavar="SHA", help="what is measured, where there is no git repository")
    parser.add_argument("--seconds", type=float, help="another limit for all of it (280 and 420)")
    parser.add_argument("--hang", type=float, default=45.0, help="seconds without progress that count as hanging")
    parser.add_argument("--tiny", action="store_true", help="all of it, with tiny inputs")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try it: Triton's interpreter then")
    options = parser.parse_args(arguments)
    limit = LIMITS[options.visit] if options.seconds is None else options.seconds
    visit = Visit(options.visit, options.out, limit, machine.environment(options.device, options.commit))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache, _ended_by_signals():
        run = _Run(visit, options, Path(cache))
        try:
            run.all()
        except _StoppedError as stopped:
            run.stop.set()
            visit.put(stopped=str(stopped))
        except Exception as error:
            # What was found so far is worth more than this error.
            run.stop.set()
            visit.put(stopped=f"{type(error).__name__}: {error}")
    print(visit.finish(), end="", flush=True)


class _StoppedError(BaseException):
    """Somebody asked the visit to end."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        # Once: what follows is short.
        for which in (signal.SIGTERM, signal.SIGINT):
            signal.signal(which, signal.SIG_IGN)
        raise _StoppedError(f"ended by {signal.Signals(number).name}")

    previous = [(which, signal.signal(which, stop)) for which in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for which, handler in previous:
            signal.signal(which, handler)


class _Run:
    def __init__(self, visit: Visit, options: argparse.Namespace, cache: Path) -> None:
        self.visit, self.options, self.stop = visit, options, threading.Event()
        self._request: dict[str, Any] = {"device": options.device, "tiny": options.tiny}
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Where Triton keeps what it compiled: one for all processes of the visit.
        os.environ["TRITON_CACHE_DIR"] = str(cache)
        if options.device == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"
        self._at_once = max(2, (os.cpu_count() or 2) - 2)

    def all(self) -> None:
        self._part("machine", [_job("machine")], 40.0)
        smoke = [Job(family, "benchmarks.gpu.smoke:cases", {"group": family}) for family in _FAMILIES]
        if self.options.visit == 1:
            self._part("smoke", [*smoke, *_prewarm(self.options.tiny)], _SMOKE_SECONDS[1])
            self._part("accuracy", [_job("accuracy")], 30.0)
            reserve = _RESERVE + (_PROFILE_SECONDS if self.visit.document["environment"]["ncu"] else 0.0)
            self._part("timing", [_job("timing")], self.visit.left(), reserve)
            self._profile()
        else:
            self._part("smoke", smoke, _SMOKE_SECONDS[2])
            self._tests()
            self._part("headline", [_job("headline"), *map(_peers, PEERS)], self.visit.left(), at_once=1)

    def _part(
        self, part: str, jobs: list[Job], seconds: float, reserve: float = _RESERVE, at_once: int | None = None
    ) -> None:
        since = self.visit.passed()
        limits = Limits(self.visit.deadline(seconds, reserve), self.options.hang)

        def record(job: str, entry: dict[str, Any]) -> None:
            self.visit.add(part, job, entry)
            _progress(part, job, entry)

        run_jobs(jobs, self._request, limits, record, self.stop, at_once or self._at_once)
        self.visit.end_part(part, since)

    def _profile(self) -> None:
        since = self.visit.passed()
        seconds = min(_PROFILE_SECONDS, self.visit.left() - _RESERVE)
        found = profile.run(seconds, self.options.tiny, self.options.device, self.stop)
        self.visit.put(ncu=found)
        self.visit.end_part("ncu", since)

    def _tests(self) -> None:
        since = self.visit.passed()
        seconds = max(0.0, min(_TEST_SECONDS, self.visit.left() - _RESERVE))
        self.visit.put(tests=checks.run(self.options.device, self.options.tiny, seconds, self.stop))
        self.visit.end_part("tests", since)


def _job(module: str) -> Job:
    return Job(module, f"benchmarks.gpu.{module}:cases")


def _peers(group: str) -> Job:
    return Job(group, "benchmarks.gpu.headline:peers", {"group": group}, hang=_PEER_SECONDS)


def _prewarm(tiny: bool) -> Iterator[Job]:
    """Shares of the timed kernels, compiled while processors are to spare; the interpreter has nothing to gain."""
    for number in range(1 if tiny else _PREWARM):
        options = {"prewarm": True, "share": [number, 8 if tiny else _PREWARM]}
        yield Job(f"prewarm {number + 1}", "benchmarks.gpu.timing:cases", options, quiet=True)


def _progress(part: str, job: str, entry: dict[str, Any]) -> None:
    if entry["status"] != "passed":
        where = " ".join(filter(None, (entry["case"], entry.get("candidate"))))
        print(f"{part} {job}: {where}: {entry['status']}: {entry.get('error')}", file=sys.stderr, flush=True)
