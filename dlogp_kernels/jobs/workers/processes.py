"""Workers that are processes of this machine, each with a device: without Ray."""

import contextlib
import json
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from .duty import Duty, Reply, Task
from .pool import Pool, WorkerLost

#: It begins anew, as one of `multiprocessing` that is spawned does, and runs nothing of the program that started it.
#: A worker that is to end ends its grader first.
_SECONDS_TO_END = 2.0
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from dlogp_kernels.jobs.workers.process_worker "
    "import main; main(int(sys.argv[1]))"
)


def processes(devices: Sequence[str], threads: int, duty: Duty) -> Pool:
    """A team of one process for each device, of so many threads each."""

    def start(place: int) -> ProcessWorker:
        return ProcessWorker(duty, devices[place], threads, greets=place == 0)

    return Pool(start, len(devices), _speaking)


class ProcessWorker:
    """The process of `process_worker`, and a socket to it over which pickles go both ways; it ends with this one."""

    def __init__(self, duty: Duty, device: str, threads: int, *, greets: bool) -> None:
        self._device = device
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                # A signal from the keyboard is for the process that started it, which ends the others.
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self._send((duty.on(device), threads, greets))

    def give(self, task: Task) -> None:
        """Give it a task: it has a thread that takes them at any time."""
        self._send(task.payload)

    def take(self) -> Reply:
        """What it says next; WorkerLost if it has ended."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise WorkerLost(f"the process on {self._device} {_ending(self._process.wait())}") from None

    def stop(self) -> None:
        """End it, and what it has started."""
        self.connection.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Any) -> None:
        # Of one that has ended, `take` tells.
        with contextlib.suppress(OSError):
            self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def _speaking(workers: Sequence[Any]) -> list[Any]:
    by_connection = {worker.connection: worker for worker in workers}
    return [by_connection[connection] for connection in wait(list(by_connection))]  # type: ignore[index]


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}" + " (the memory may be full)" * (-status == signal.SIGKILL)
