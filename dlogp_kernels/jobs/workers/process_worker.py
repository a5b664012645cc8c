"""A process that computes tasks: what `processes` starts. It ends when the other end of its socket is closed."""

import os
import pickle
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers.utils import logging

from ..grader_process import stop_graders
from .duty import Reply, answered
from .freed_memory import keep_freed_memory


def main(descriptor: int) -> None:
    """Have what the duty of the first message needs in memory, say so, and answer the others."""
    connection = Connection(descriptor)
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # Apart, so that the other process never waits for this one to take something.
    threading.Thread(target=_receive, args=(connection, received), daemon=True).start()
    duty, threads, greets = pickle.loads(received.get())
    set_up(threads)
    computing: Any = None

    def begin() -> Any:
        nonlocal computing
        computing = duty.load()
        return computing.greeting if greets else None

    _send(connection, answered(begin))
    while True:
        _send(connection, answered(computing, pickle.loads(received.get())))


def set_up(threads: int) -> None:
    """What is set once in the process of a worker."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    logging.disable_progress_bar()


def _send(connection: Connection, reply: Reply) -> None:
    connection.send_bytes(pickle.dumps(reply, pickle.HIGHEST_PROTOCOL))


def _receive(connection: Connection, received: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            received.put(connection.recv_bytes())
    finally:  # the other process has ended, or does not need this one any more
        stop_graders()
        os._exit(0)
