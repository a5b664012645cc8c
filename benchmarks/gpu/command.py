"""`python -m benchmarks gpu --visit N`: the steps of a visit, each within its part of the time.

This process never touches the GPU. It ends within the visit's limit by its own clock, and prints a short table last,
also when it is stopped. Its JSON file is complete after every entry.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..peers import PEERS
from . import checks, profile, table
from .checks import ROOT
from .processes import Session, run_sessions
from .smoke import FAMILIES

_LIMITS = {1: 280.0, 2: 420.0}
#: Kept for the table and for processes to end.
_RESERVE = 4.0
_SMOKE_SECONDS = {1: 75.0, 2: 60.0}
_TEST_SECONDS, _PROFILE_SECONDS, _PEER_SECONDS = 170.0, 35.0, 60.0
_PREWARM = 4

_QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,utilization.gpu,ecc.mode.current"
)
_PACKAGES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "trl")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--visit", type=int, choices=_LIMITS, required=True, help="1: figures; 2: tests and peers")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--commit", metavar="SHA", help="what is measured, where there is no git repository")
    parser.add_argument("--seconds", type=float, help="another limit for all of it (280 and 420)")
    parser.add_argument("--tiny", action="store_true", help="all of it, with tiny inputs")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try it: Triton's interpreter then")
    options = parser.parse_args(arguments)
    visit = _Visit(options)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        # It is ended as Ctrl+C ends it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Where Triton keeps what it compiled: one for all processes of the visit.
        os.environ["TRITON_CACHE_DIR"] = cache
        if options.device == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"
        try:
            visit.run()
        except (KeyboardInterrupt, Exception) as error:
            # What was found so far is worth more than this error, or than to end at once.
            for which in (signal.SIGTERM, signal.SIGINT):
                signal.signal(which, signal.SIG_IGN)
            visit.stop.set()
            visit.put(stopped=f"{type(error).__name__}: {error}")
    print(visit.finish(), end="", flush=True)


class _Visit:
    """What was found so far, and how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._start, self._options, self.stop = time.monotonic(), options, threading.Event()
        self._limit, self._lock = options.seconds or _LIMITS[options.visit], threading.Lock()
        found = _environment(options.device, options.commit)
        self.document: dict[str, Any] = {
            "visit": options.visit, "stopped": None, "environment": found, "parts": {}, "entries": [],
        }  # fmt: skip
        # h100, for example: the part of the card's name that tells it from others; cpu where there is none.
        name = found["gpu"].get("name", options.device.split(":")[0])
        model = re.search(r"\b([A-Z]+\d+\w*)\b", name)
        card = re.sub(r"[^a-z0-9]+", "-", (model.group(1) if model else name).lower())
        options.out.mkdir(parents=True, exist_ok=True)
        self._path = options.out / f"{card}_visit{options.visit}.json"
        self.put()

    def _passed(self) -> float:
        return time.monotonic() - self._start

    def _seconds(self, most: float = math.inf, reserve: float = _RESERVE) -> float:
        """At most so many, and `reserve` less than are left."""
        return max(0.0, min(most, self._limit - self._passed() - reserve))

    def put(self, **facts: Any) -> None:
        with self._lock:
            self.document |= facts
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self.document, indent=1, ensure_ascii=False) + "\n")
            part.replace(self._path)

    def finish(self) -> str:
        """Write the table beside the JSON, and return it."""
        self.put(seconds=round(self._passed(), 1))
        try:
            text = "\n".join(table.lines(self.document)) + "\n"
        except Exception as error:  # all that matters is in the JSON
            text = f"no table: {type(error).__name__}: {error}\n"
        self._path.with_suffix(".txt").write_text(text)
        return text

    def run(self) -> None:
        tiny, device, number = self._options.tiny, self._options.device, self._options.visit
        session = partial(Session, device=torch.device(device), tiny=tiny)
        smoke = [session(family, "benchmarks.gpu.smoke:cases", group=family) for family in FAMILIES]
        # Shares of the timed kernels are compiled while processors are to spare; the interpreter has nothing to gain.
        for i in range(0 if number == 2 else 1 if tiny else _PREWARM):
            share = f"{i}/{8 if tiny else _PREWARM}"
            smoke.append(session(f"prewarm {i + 1}", "benchmarks.gpu.timing:prewarm", prewarm=True, group=share))
        self._sessions("machine", [session("machine", "benchmarks.gpu.smoke:machine")], self._seconds(40.0))
        self._sessions("smoke", smoke, self._seconds(_SMOKE_SECONDS[number]))
        if number == 1:
            reserve = _RESERVE + (_PROFILE_SECONDS if self.document["environment"]["ncu"] else 0.0)
            self._sessions("timing", [session("timing", "benchmarks.gpu.timing:cases")], self._seconds(reserve=reserve))
            self._part("ncu", lambda: self.put(ncu=profile.run(self._seconds(_PROFILE_SECONDS), tiny, device)))
            return
        outcomes = self._path.with_name(f"{self._path.stem}_tests.jsonl")
        self._part("tests", lambda: self.put(tests=checks.run(device, tiny, self._seconds(_TEST_SECONDS), outcomes)))
        headline = [session("headline", "benchmarks.gpu.timing:headline")]
        for group in PEERS:
            headline.append(session(group, "benchmarks.gpu.timing:peers", group=group, hang=_PEER_SECONDS))
        self._sessions("headline", headline, self._seconds(), at_once=1)

    def _part(self, name: str, run: Callable[[], None]) -> None:
        since = self._passed()
        run()
        self.document["parts"][name] = round(self._passed() - since, 1)
        self.put()

    def _sessions(self, part: str, sessions: list[Session], seconds: float, at_once: int | None = None) -> None:
        def record(job: str, entry: dict[str, Any]) -> None:
            if "prewarm" in job and entry["status"] not in ("failed", "cut off"):
                return
            self.document["entries"].append({"part": part, "job": job, **entry, "at": round(self._passed(), 1)})
            self.put()
            if entry["status"] != "passed":
                where = " ".join(filter(None, (entry["case"], entry.get("candidate"))))
                print(f"{part} {job}: {where}: {entry['status']}: {entry['error']}", file=sys.stderr, flush=True)

        at_once, deadline = at_once or max(2, (os.cpu_count() or 2) - 2), time.monotonic() + seconds
        self._part(part, lambda: run_sessions(sessions, deadline, record, self.stop, at_once))


def _environment(device: str, commit: str | None) -> dict[str, Any]:
    """All that can be said without touching the GPU."""
    smi = None if device == "cpu" else _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "gpu": {} if smi is None else dict(zip(_QUERY.split(","), smi.split(", "), strict=False)),
        "python": platform.python_version(),
        "packages": {x.name: x.version for x in importlib.metadata.distributions() if x.name in _PACKAGES},
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "ncu": shutil.which("ncu"),
    }


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where it fails, hangs or is not there."""
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(finished.stdout.splitlines()), None)
