"""Cases are measured in a process of their own, which the run survives.

A kernel that reads out of bounds leaves the GPU unusable for its whole process, and one that waits for a lock that
never comes holds it for ever. Then the process is ended, what it ran is recorded as the reason, and the case is
measured again in a new process without that candidate.
"""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from ..peers import Peer
from ..records import Record, record
from .cases import Case
from .measure import run_case
from .session import OUT_OF_TIME, DeviceLostError, Session

#: Seconds without any progress, compilation included, after which a candidate counts as hanging.
HANG_SECONDS = 90.0
_START_SECONDS = 120.0
_NAME_BYTES = 200
#: A candidate that ended the process in as many cases is not tried any more.
_MOST_DEATHS = 2
_SLICE = 0.2


class _DeathError(RuntimeError):
    """The process is gone; `candidate` ran last, "" if none did."""

    def __init__(self, candidate: str, reason: str) -> None:
        super().__init__(reason)
        self.candidate = candidate


@dataclass
class Worker:
    """Measures cases one after the other, until `deadline` (of time.monotonic)."""

    device: torch.device
    peers: Sequence[Peer]
    deadline: float
    hang_seconds: float = HANG_SECONDS
    #: How many processes each candidate has ended.
    deaths: Counter[str] = field(default_factory=Counter)
    _process: SpawnProcess | None = None
    _connection: Connection | None = None
    _current: Any = None

    def run(self, case: Case) -> list[Record]:
        """The case's records, whatever happens to the process."""
        if time.monotonic() > self.deadline:
            return [_skipped(case, "ours", OUT_OF_TIME)]
        excluded = {name: f"ended its process {n} times" for name, n in self.deaths.items() if n >= _MOST_DEATHS}
        while True:
            try:
                return self._measured(case, excluded)
            except _DeathError as death:
                self.close()
                if not death.candidate or death.candidate in excluded or time.monotonic() > self.deadline:
                    reasons = {**excluded, death.candidate or "ours": str(death)}
                    return [_skipped(case, name, reason) for name, reason in reasons.items()]
                self.deaths[death.candidate] += 1
                excluded[death.candidate] = str(death)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    def _measured(self, case: Case, excluded: dict[str, str]) -> list[Record]:
        connection = self._started()
        try:
            connection.send((case, excluded, self.deadline - time.monotonic()))
        except BrokenPipeError as error:
            raise _DeathError("", "the process ended between two cases") from error
        records: list[Record] = []
        while isinstance(message := self._received(connection), Record):
            records.append(message)
        if message is not None:
            raise _DeathError(*message)
        return records

    def _started(self) -> Connection:
        if self._process is not None and self._connection is not None:
            return self._connection
        # Not forked: a fork of a process that has used the GPU can not use it.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Shared memory: to write it costs a microsecond, and it is there when the process is not.
        self._current = context.Array("c", _NAME_BYTES, lock=False)
        self._process = context.Process(target=_serve, args=(theirs, self._current, self.device, self.peers))
        self._process.start()
        theirs.close()
        if not self._connection.poll(_START_SECONDS):
            raise _DeathError("", f"the process did not start within {_START_SECONDS:.0f} s")
        self._received(self._connection)
        return self._connection

    def _received(self, connection: Connection) -> Any:
        """The next message: a record, None at the end of a case, (candidate, reason) if the GPU is lost."""
        assert self._current is not None and self._process is not None
        seen, since = self._current.value, time.monotonic()
        while not connection.poll(_SLICE):
            now = time.monotonic()
            if self._current.value != seen:
                seen, since = self._current.value, now
            if now - since > self.hang_seconds:
                raise _DeathError(seen.decode(), f"no progress for {self.hang_seconds:.0f} s, its process was ended")
            if now > self.deadline:
                raise _DeathError("", OUT_OF_TIME)
        try:
            return connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise _DeathError(self._current.value.decode(), f"its process ended with exit status {code}") from None


def _serve(connection: Connection, current: Any, device: torch.device, peers: Sequence[Peer]) -> None:
    """The process: answers each case with its records and None."""
    # What other libraries print must not come between the lines of the table.
    os.dup2(2, 1)
    connection.send("ready")
    while True:
        try:
            case, excluded, seconds = connection.recv()
        except EOFError:
            return
        current.value = b""
        session = Session(device, peers, time.monotonic() + min(seconds, case.patience), excluded)

        def watch(name: str) -> None:
            current.value = name.encode()[: _NAME_BYTES - 1]

        session.watch = watch
        try:
            for entry in run_case(case, session):
                connection.send(entry)
        except DeviceLostError as lost:
            connection.send((current.value.decode(), str(lost)))
            return
        # What is kept for tensors of this case's sizes is in the way of the next one's.
        torch.cuda.empty_cache()
        connection.send(None)


def _skipped(case: Case, name: str, reason: str) -> Record:
    return record(case.kind, case.work, name, "both" if case.work.training else "forward", skipped=reason)
