"""Processes of one gloo group, which run functions of this file and of sharded_cases.py for the tests."""

import io
import os
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

#: Of a group; what has to end by it is waited for three times as long.
TIMEOUT_SECONDS = 20
#: What takes seconds to import, once for all processes; what of it is not installed is left out.
_PRELOADED = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "dlogp_kernels.hf.tiny"]


class Ranks:
    """`size` processes with one thread each. A function is called on each with a process group, and other arguments."""

    def __init__(self, size: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, os.path.join(self._directory.name, "store"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self.processes.append(process)

    def send(self, function: Callable[..., Any], *arguments: Any, size: int | None = None) -> list[Connection]:
        """Have the first `size` ranks begin, in a group of theirs."""
        pipes = self._pipes[:size]
        for pipe in pipes:
            pipe.send_bytes(_to_bytes((function, len(pipes), arguments)))
        return pipes

    def __call__(self, function: Callable[..., Any], *arguments: Any, size: int | None = None) -> list[Any]:
        """What the function returns on each rank; an exception is returned, not raised."""
        pipes = self.send(function, *arguments, size=size)
        return [received(pipe) for pipe in pipes]

    def values(self, function: Callable[..., Any], *arguments: Any, size: int | None = None) -> list[Any]:
        """The same; an exception of a rank is raised."""
        results = self(function, *arguments, size=size)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._directory.cleanup()


def received(pipe: Connection) -> Any:
    assert pipe.poll(3 * TIMEOUT_SECONDS), "a rank does not answer"
    return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)


def _to_bytes(x: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # As torchrun does, for those that ask it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    distributed.init_process_group("gloo", f"file://{store}", timeout, world_size=size, rank=rank)
    groups = {n: distributed.new_group(list(range(n)), timeout) for n in range(1, size + 1)}
    while True:
        try:
            function, ranks, arguments = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
        except EOFError:
            return
        try:
            answer = function(groups[ranks], *arguments)
        except Exception as error:
            answer = type(error)(*map(str, error.args))
        pipe.send_bytes(_to_bytes(answer))
