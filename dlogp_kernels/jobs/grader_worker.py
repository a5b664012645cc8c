"""The process in which a grader runs that may hang, crash, print, or fork: a program that `grader_process` starts.

It reads requests from the socket whose number it is given and writes a reply to each, a line of JSON each. It ends when
the other end is closed, that is with the process that started it. To start at once, it imports nothing of the package.
"""

import ctypes
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

_SHOWN = 300
_PR_SET_PDEATHSIG = 1

_Function = Callable[[str, Mapping[str, Any]], Any]


class _Unusable(Exception):
    """There is no such grader; the message says why."""


def main() -> None:
    """Load the grader that the first request names, then grade what the others hold."""
    _end_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    connection.setblocking(True)  # whatever the other process has for new sockets
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection.makefile("rb"), received), daemon=True).start()
    process = os.getpid()
    first = json.loads(received.get())
    sys.path[:] = first["path"]
    try:
        function, identity = load(first["grader"])
        reply: dict[str, Any] = {"identity": identity}
    except _Unusable as error:
        reply = {"unusable": str(error)}
    while True:
        if os.getpid() != process:
            os._exit(0)  # a child that the grader has forked, and that came back from it
        connection.sendall(json.dumps(reply).encode() + b"\n")
        request = json.loads(received.get())
        try:
            reply = {"score": as_score(function(request["response"], request["problem"]))}
        except BaseException as error:  # a user's code may raise anything, and even exit
            reply = {"error": _described(error)}


def _end_with_parent() -> None:
    """Where the system can be asked: end with who started this process, even if a grader lets nothing else run here."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _receive(requests: BinaryIO, received: "queue.SimpleQueue[bytes]") -> None:
    try:
        for request in requests:
            received.put(request)
    finally:  # an end with a reply that was not read is a ConnectionResetError
        os._exit(0)


def load(name: str) -> tuple[_Function, dict[str, Any]]:
    """The function `math-verify` or `module:function`, and what identifies it."""
    if ":" not in name:
        return _math_verify(), {"version": importlib.metadata.version("math-verify")}
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # the module is the user's code
        raise _Unusable(f"the module {module_name} can not be imported: {_described(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "has no" if function is None else "has something that can not be called as"
        raise _Unusable(f"the module {module_name} {found} {function_name}")
    return function, {"sha256": _source_digest(module)}


def _source_digest(module: Any) -> str | None:
    """The digest of the module's file: a grader that was edited is another one."""
    try:
        file = inspect.getsourcefile(module)
    except TypeError:  # one that is built in
        return None
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _math_verify() -> _Function:
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException
    except ImportError as error:
        raise _Unusable(f"{error.name or error} can not be imported") from error

    def same(one: Any, other: Any) -> bool | None:
        """None where the package stops itself; like the package, False where it fails."""
        try:
            return verify(one, other, raise_on_error=True)
        except TimeoutException:
            return None
        except Exception:
            return False

    def parsed(text: str) -> list[Any]:
        """Like the package, nothing where it fails, but for its time limit."""
        try:
            return parse(text, raise_on_error=True)
        except TimeoutException as error:
            # It would be taken for a text without mathematics.
            raise TimeoutError("math-verify took too long to read it") from error
        except Exception:
            return []

    def grade(response: str, problem: Mapping[str, Any]) -> bool:
        answer = str(problem["answer"])
        expected = parsed(answer if "$" in answer or r"\boxed" in answer else f"${answer}$")
        if not expected:
            raise ValueError(f"math-verify finds no mathematics in the answer {answer!r}")
        found = parsed(response)
        verdicts = [same(one, other) for one in expected for other in found]
        if True not in verdicts and None in verdicts:
            raise TimeoutError("math-verify took too long to compare it")
        return True in verdicts

    return grade


def as_score(value: Any) -> float:
    """What a grader returned as a finite number; TypeError or ValueError for anything else."""
    numpy = sys.modules.get("numpy")
    numbers = (bool, int, float) if numpy is None else (bool, int, float, numpy.bool_, numpy.integer, numpy.floating)
    if not isinstance(value, numbers):
        raise TypeError(f"the grader returned {value!r}, expected a bool or a number")
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"the grader returned {value!r}, expected a finite number")
    return score


def _described(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


if __name__ == "__main__":
    main()
