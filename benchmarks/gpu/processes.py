"""Cases, the processes that do them one after the other, and what happens when one hangs, crashes or loses the GPU.

A kernel that never returns holds its process for ever, and one that reads out of bounds leaves the GPU unusable for it.
Then the process is ended, what it was at is recorded as failed, and a new process does what is left.
"""

import contextlib
import importlib
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

import torch

from ..timing import NotMeasuredError, WrongResultError
from .checks import end_group

_SLICE, _GRACE_SECONDS = 0.2, 5.0
_MOST_STARTS = 12
#: The exit status of a process that has lost its GPU.
_NOT_USABLE = 3
_LOG_CHARACTERS = 3000
#: A server that has imported all of this, and never touches the GPU, forks the processes: they start at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["benchmarks.gpu.preload"])
#: Names of `multiprocessing` that only these processes need: what waits for a process that can not be ended.
_children: set[Any] = vars(multiprocessing.process)["_children"]
_server: Any = vars(forkserver)["_forkserver"]
_tracker: Any = vars(resource_tracker)["_resource_tracker"]

#: Of the server's children only one thread at a time asks how they have ended.
_LOCK = threading.Lock()

Entry = dict[str, Any]


class Case(NamedTuple):
    """`run()` yields an entry for each thing that it looked at: {} says that it passed."""

    name: str
    run: Callable[[], Iterable[Entry]]


def _unwatched(step: str) -> None:
    """Nobody asks what runs now."""


@dataclass
class Session:
    """The cases of `cases`, "module:function", which is told this; for one process at a time.

    Without progress for `hang` seconds a process counts as hanging; `case` and `watch(step)` say what runs now.
    """

    name: str
    cases: str
    device: torch.device
    tiny: bool = False
    #: Compile only: every candidate once, of few rows.
    prewarm: bool = False
    #: Which of several sets of cases.
    group: str = ""
    hang: float = 45.0
    done: list[str] = field(default_factory=list)
    #: Case → candidates that ended a process.
    excluded: dict[str, list[str]] = field(default_factory=dict)
    watch: Callable[[str], None] = _unwatched
    case: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class _LostError(RuntimeError):
    """The process is gone, or had to be ended: why, and the status of what it was at."""


def failure(error: BaseException) -> Entry:
    """The fields of an entry that say what went wrong."""
    if isinstance(error, NotMeasuredError) and not isinstance(error, WrongResultError):
        return {"status": "skipped", "error": str(error)}
    message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return {"status": "failed", "error": message, "traceback": "".join(traceback.format_exception(error))}


def usable(device: torch.device) -> bool:
    """Whether the device still answers. After an illegal memory access, for example, it does not, in this process."""
    try:
        return torch.ones(1, device=device).add_(1).item() == 2.0
    except RuntimeError:
        return False


def run_sessions(
    sessions: Sequence[Session],
    deadline: float,
    record: Callable[[str, Entry], None],
    stop: threading.Event,
    at_once: int,
) -> None:
    """All until `deadline` (of time.monotonic), `at_once` side by side; `record(name, entry)` takes their finds."""

    def run(session: Session) -> None:
        try:
            _run(session, deadline, partial(record, session.name), stop)
        except Exception as error:  # which must not end a visit
            record(session.name, {"case": "", "status": "failed", "error": f"{type(error).__name__}: {error}"})

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        try:
            list(pool.map(run, sessions))
        except BaseException:
            stop.set()
            raise


def _run(session: Session, deadline: float, record: Callable[[Entry], None], stop: threading.Event) -> None:
    """In a new process after each that is lost, without what it was lost at."""
    for _ in range(_MOST_STARTS):
        if stop.is_set() or time.monotonic() > deadline:
            record({"case": "", "status": "cut off", "error": "out of time before it began"})
            return
        case = step = failed = ""
        with tempfile.NamedTemporaryFile() as log, _process(session, log.name) as (process, events):
            try:
                for kind, value in _received(process, events, deadline, session.hang, stop):
                    if kind == "at":
                        case, step = value
                    elif kind == "done":
                        session.done.append(case)
                        case = step = ""
                    else:
                        failed = case if value["status"] == "failed" else failed
                        record(value)
                return
            except _LostError as lost:
                reason, status = lost.args
                # Why the GPU was lost is said already, if the case failed by it.
                if process.exitcode != _NOT_USABLE or failed != case:
                    printed = log.read().decode(errors="replace")[-_LOG_CHARACTERS:]
                    entry = {"case": case, "status": status, "error": reason, "log": printed}
                    record(entry | ({"candidate": step} if case and step else {}))
        if status != "failed" or not case:
            return
        excluded = session.excluded.setdefault(case, [])
        if step in ("", *excluded):
            session.done.append(case)
        else:
            excluded.append(step)


@contextlib.contextmanager
def _process(session: Session, log: str) -> Iterator[tuple[ForkServerProcess, Connection]]:
    """One that does the session's cases, and what it sends."""
    events, to_send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_serve, args=(session, to_send, log))
    with _LOCK:
        process.start()
    to_send.close()
    try:
        yield process, events
    finally:
        process.kill()
        end_group(process.pid)
        process.join(_GRACE_SECONDS)
        # One that waits for the GPU may outlive its end: the visit's own is not to wait for it.
        _children.discard(process)
        events.close()


def _received(
    process: ForkServerProcess, events: Connection, deadline: float, hang: float, stop: threading.Event
) -> Iterator[tuple[str, Any]]:
    """What it sends, until it has come to its end."""
    heard = time.monotonic()
    while True:
        now = time.monotonic()
        if stop.is_set() or now > deadline:
            raise _LostError("stopped" if stop.is_set() else "out of time", "cut off")
        if now - heard > hang:
            raise _LostError(f"no progress for {hang:.0f} s, its process was ended", "failed")
        if not events.poll(_SLICE):
            continue
        try:
            yield events.recv()
        except EOFError:
            with _LOCK:
                process.join(_GRACE_SECONDS)
            if process.exitcode == 0:
                return
            raise _LostError(f"its process ended with exit status {process.exitcode}", "failed") from None
        heard = time.monotonic()


def _serve(session: Session, events: Connection, log: str) -> None:
    """In a process group of its own, so that its compilers end with it; what it prints is in `log`."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    # The server and the tracker live, and hold what the visit prints to, until nobody has these.
    os.close(_server._forkserver_alive_fd)
    os.close(_tracker._fd)
    _tracker._fd = None
    # A visit that was killed leaves nothing running.
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    session.watch = lambda step: events.send(("at", (session.case, step)))
    session.watch("import")
    module, name = session.cases.split(":")
    cases: list[Case] = getattr(importlib.import_module(module), name)(session)
    for case in (case for case in cases if case.name not in session.done):
        session.case = case.name
        session.watch("")
        try:
            for entry in case.run():
                events.send(("entry", {"status": "passed", **entry, "case": case.name}))
        except Exception as error:
            events.send(("entry", {**failure(error), "case": case.name}))
        if not usable(session.device):
            os._exit(_NOT_USABLE)
        events.send(("done", None))
        if session.on_gpu:
            # What is kept for tensors of this case's sizes is in the way of the next one's.
            torch.cuda.empty_cache()
    # Not by way of destructors, which may wait for a lost device.
    os._exit(0)
