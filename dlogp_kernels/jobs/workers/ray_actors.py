"""Workers that are actors of Ray, which it starts on this machine, or finds on those of a cluster.

Not Ray Data: what is lost with an actor has to be given to another one so many times and then be named, and each task
has to arrive as soon as it is done, which `pool` sees to for processes anyway. An actor is therefore neither restarted
nor asked again by Ray.
"""

import contextlib
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import JobError
from .duty import Duty, Engine, Reply, Task, answered
from .pool import Pool, WorkerLost
from .process_worker import set_up

_SECONDS_TO_CONNECT = 30
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
#: Connecting ends this process, or does not end, where something else than Ray answers: another one tries it first.
_TRIAL = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level=40)"
_ERROR = re.compile(r"\w*(Error|Exception|Timeout): ")


@contextlib.contextmanager
def ray_engine(address: str | None, number: int | None, device: str, *, may_leave_gpus: bool) -> Iterator[Engine]:
    """Actors on a cluster, or of this machine; so many, or one for each GPU, or for each machine without any.

    Raises JobError if the cluster can not be reached, or has no room for so many; or if they would leave its GPUs alone
    where they may not.
    """
    # Ray reports to its makers otherwise.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    found = ray.is_initialized()
    threads = torch.get_num_threads()
    if address is not None:
        _check_cluster(address)
    else:
        number = number or (max(1, torch.cuda.device_count()) if device == "cuda" else 1)
        # This process computes nothing meanwhile.
        threads = max(1, threads // number)
    wanted = {"num_cpus": 1, "num_gpus": 1} if device == "cuda" else {"num_cpus": threads, "num_gpus": 0}
    if not found and address is not None:
        ray.init(address, **_QUIET)
    elif not found:
        # They give way to every other process otherwise, to this one as well, which waits for them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        room: dict[str, Any] = {resource: int(number or 1) * count for resource, count in wanted.items()}
        ray.init("local", include_dashboard=False, **room, **_QUIET)
    try:
        if not may_leave_gpus:
            _check_gpus(device)
        number = _number_of_actors(number, wanted)

        def gather(duty: Duty, here: Any) -> Pool:
            # That of an actor is `cuda` too, of which Ray lets it see its own.
            return Pool(lambda place: RayWorker(duty.absolute(), threads, wanted, place), number, _speaking)

        yield gather
    finally:
        if not found:
            ray.shutdown()


def _check_cluster(address: str) -> None:
    try:
        _try(address)
    except JobError as error:
        raise JobError(
            f"--address {address}: {error}; start a cluster by `ray start --head`, or leave --address out"
        ) from error


def _try(address: str) -> None:
    """JobError if no cluster of Ray answers there in time."""
    host, _, port = address.rpartition(":")
    try:
        if host:
            socket.create_connection((host, int(port)), _SECONDS_TO_CONNECT).close()
        tried = subprocess.run(
            [sys.executable, "-c", _TRIAL, address], capture_output=True, text=True, timeout=_SECONDS_TO_CONNECT,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise JobError(f"no cluster of Ray answered within {_SECONDS_TO_CONNECT} s") from error
    except (OSError, OverflowError) as error:
        raise JobError(f"no cluster of Ray can be reached ({error})") from error
    if tried.returncode != 0:
        raise JobError(f"no cluster of Ray can be reached ({_reason(tried.stderr)})")


def _check_gpus(device: str) -> None:
    """JobError where Ray has GPUs, but this machine none, after which the device is chosen."""
    import ray

    if device == "cpu" and ray.cluster_resources().get("GPU"):
        raise JobError(
            "--engine ray: Ray has GPUs, and this machine none: start the command on a machine with one, or give "
            "--device cpu"
        )


def _room(wanted: dict[str, int]) -> list[int]:
    """How many such actors each machine has room for, were it idle."""
    import ray

    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return [
        min(int(node["Resources"].get(names[what], 0)) // count for what, count in wanted.items() if count)
        for node in ray.nodes()
        if node["Alive"]
    ]


def _number_of_actors(number: int | None, wanted: dict[str, int]) -> int:
    """The number, or that of all that there is room for; JobError if there is not."""
    room = _room(wanted)
    if number is None:
        number = sum(room) if wanted["num_gpus"] else sum(map(bool, room))
    if not 1 <= number <= sum(room):
        each = "a GPU" if wanted["num_gpus"] else f"{wanted['num_cpus']} CPUs (--threads)"
        raise JobError(
            f"--devices: Ray has room for {sum(room)} workers of {each} each, expected room for {max(number, 1)}: "
            "give fewer --devices or --threads"
        )
    return number


class Actor:
    """What Ray runs on a machine of its choice."""

    def begin(self, duty: Duty, threads: int, directory: str, greets: bool) -> bytes:
        """Have what the duty needs in memory; the reply may hold the greeting."""
        # An adapter may name its base by a relative path.
        with contextlib.suppress(OSError):
            os.chdir(directory)
        set_up(threads)

        def load() -> Any:
            self._computing = duty.load()
            return self._computing.greeting if greets else None

        return pickle.dumps(answered(load), pickle.HIGHEST_PROTOCOL)

    def compute(self, payload: bytes) -> bytes:
        """What a task is worth; in one piece, where Ray would handle each array by itself."""
        return pickle.dumps(answered(self._computing, pickle.loads(payload)), pickle.HIGHEST_PROTOCOL)


class RayWorker:
    """An actor, and what it was asked that has no answer yet."""

    def __init__(self, duty: Duty, threads: int, wanted: dict[str, int], place: int) -> None:
        import ray

        kind: Any = ray.remote(Actor)
        self._actor = kind.options(**wanted, max_restarts=0, max_task_retries=0).remote()
        self.asked: deque[Any] = deque([self._actor.begin.remote(duty, threads, os.getcwd(), place == 0)])

    def give(self, task: Task) -> None:
        """Give it a task, without waiting."""
        self.asked.append(self._actor.compute.remote(pickle.dumps(task.payload, pickle.HIGHEST_PROTOCOL)))

    def take(self) -> Reply:
        """What it says next; WorkerLost if it has ended."""
        import ray

        try:
            return pickle.loads(ray.get(self.asked.popleft()))
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"an actor of Ray: {_reason(str(error))}") from None

    def stop(self) -> None:
        """End it at once."""
        import ray

        ray.kill(self._actor)


def _speaking(workers: Sequence[Any]) -> list[Any]:
    import ray

    by_answer = {worker.asked[0]: worker for worker in workers if worker.asked}
    ray.wait(list(by_answer), num_returns=1)
    answers, _ = ray.wait(list(by_answer), num_returns=len(by_answer), timeout=0)
    return [by_answer[answer] for answer in answers]


def _reason(text: str) -> str:
    """The line of a long explanation that says most: the last error, or the first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if _ERROR.match(line)), lines[0] if lines else "it says nothing")
    return line.partition(". ")[0].removesuffix(".")
