"""A process beside this one in which a grader runs, with a time limit.

What a grader does there, hanging, crashing and forking included, leaves this process and its files alone: this process
does not fork, and the other one does not know them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_WORKER = Path(__file__).with_name("grader_worker.py")
#: For imports, which may be large.
_SECONDS_TO_START = 120.0
#: A limit of 0 would mean not to wait at all.
_LEAST_SECONDS = 1e-3
_running: "weakref.WeakSet[GraderProcess]" = weakref.WeakSet()


class Grade(NamedTuple):
    """A score, usually 0 or 1; or what the grader raised."""

    score: float | None = None
    error: str | None = None


class GraderFailure(Exception):
    """The process has ended, was stopped, or has no such grader; the message says what."""


class GraderProcess:
    """Grades one response after another; the process starts at once, and anew after it was stopped.

    Args:
        name: `math-verify` or `module:function`.
        timeout: seconds that a response may take.

    Raises GraderFailure if there is no such grader.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self._name = name
        self._timeout = timeout
        #: What identifies the grader: the version of its package, or the digest of its module.
        self.identity: Mapping[str, Any] = self._start()

    def __call__(self, response: str, problem: Mapping[str, Any]) -> Grade:
        """The score, or what the grader raised; or why it did not come back."""
        try:
            if not self._stop.alive:
                self._start()
            return Grade(**self._ask({"response": response, "problem": problem}, self._timeout))
        except GraderFailure as error:
            return Grade(error=str(error))

    def _start(self) -> Mapping[str, Any]:
        self._socket, other_end = socket.socketpair()
        with other_end:
            self._process = subprocess.Popen(
                # -P: the modules beside the worker are not the user's.
                [sys.executable, "-P", str(_WORKER), str(other_end.fileno())],
                # What the grader and its children read and print has nothing to do with what is asked and answered.
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[other_end.fileno()],
                # A group of its own, so that the children of a grader end with it.
                start_new_session=True,
            )
        self._stop = weakref.finalize(self, _stop, self._process, self._socket)
        _running.add(self)
        # A script that is started by its name finds modules beside it, not those of the current directory.
        path = sys.path if os.getcwd() in sys.path else [os.getcwd(), *sys.path]
        reply = self._ask({"path": path, "grader": self._name}, max(_SECONDS_TO_START, self._timeout))
        if "unusable" in reply:
            self._stop()
            raise GraderFailure(reply["unusable"])
        return reply["identity"]

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise GraderFailure(f"the grader can not be given this: {type(error).__name__}: {error}") from error
        end = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(line)
            self._socket.settimeout(max(end - time.monotonic(), _LEAST_SECONDS))
            with self._socket.makefile("rb") as replies:
                reply = replies.readline()
            if not reply.endswith(b"\n"):
                raise EOFError
            return json.loads(reply)
        except TimeoutError:
            self._stop()
            raise GraderFailure(f"TimeoutError: the grader took more than {seconds:g} s") from None
        except (OSError, EOFError):
            self._stop()
            raise GraderFailure(f"the process of the grader ended, with status {self._process.returncode}") from None
        except BaseException:
            self._stop()  # of a request that has no answer yet, which the next one would be given
            raise


def stop_graders() -> None:
    """End all that run, before this process ends without more ado."""
    for grader in list(_running):
        grader._stop()


def _stop(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    """End the process and its children, and keep its status."""
    process.poll()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
