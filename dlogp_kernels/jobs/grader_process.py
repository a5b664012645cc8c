"""A process beside this one in which a grader runs, with a time limit.

What a grader does there, hanging, crashing and forking included, leaves this process and its files alone: this process
does not fork, and the other one does not know them.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("grader_worker.py")
#: For imports, which may be large.
_SECONDS_TO_START = 120.0
_CHUNK = 2**16


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
        self._process: subprocess.Popen[bytes] | None = None
        #: What identifies the grader: the version of its package, or the digest of its module.
        self.identity: Mapping[str, Any] = self._start()

    def grade(self, response: str, problem: Mapping[str, Any]) -> Mapping[str, Any]:
        """`{"score": …}`, or `{"error": …}` with what the grader raised; GraderFailure if it did not come back."""
        request = {"response": response, "problem": problem}
        if self._process is None:
            self._start()
        return self._ask(request, self._timeout)

    def _start(self) -> Mapping[str, Any]:
        self._process = subprocess.Popen(
            # -P: the modules beside the worker are not the user's.
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # A group of its own, so that the children of a grader end with it.
            start_new_session=True,
        )
        self._stop = weakref.finalize(self, _stop, self._process)
        # A script that is started by its name finds modules beside it, not those of the current directory.
        path = sys.path if os.getcwd() in sys.path else [os.getcwd(), *sys.path]
        reply = self._ask({"path": path, "grader": self._name}, max(_SECONDS_TO_START, self._timeout))
        if "unusable" in reply:
            self._end()
            raise GraderFailure(reply["unusable"])
        return reply["identity"]

    def _ask(self, request: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        assert self._process is not None
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise GraderFailure(f"the grader can not be given this: {type(error).__name__}: {error}") from error
        try:
            return json.loads(_exchange(self._process, line, seconds))
        except TimeoutError:
            self._end()
            raise GraderFailure(f"TimeoutError: the grader took more than {seconds:g} s") from None
        except (OSError, EOFError):
            process = self._process
            self._end()
            raise GraderFailure(f"the process of the grader ended, with status {process.returncode}") from None
        except BaseException:
            self._end()  # of a request that has no answer yet, which the next one would be given
            raise

    def _end(self) -> None:
        self._stop()
        self._process = None


def _exchange(process: "subprocess.Popen[bytes]", request: bytes, seconds: float) -> bytes:
    """Write the request and read a line; TimeoutError, or EOFError or OSError if the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    end = time.monotonic() + seconds
    left, reply = memoryview(request), bytearray()
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while not reply.endswith(b"\n"):
            ready = selector.select(max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    left = left[os.write(key.fd, left[:_CHUNK]) :]
                    if not left:
                        selector.unregister(process.stdin)
                elif chunk := os.read(key.fd, _CHUNK):
                    reply += chunk
                else:
                    raise EOFError
    return bytes(reply)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its children, and keep its status."""
    process.poll()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
