"""Seconds of computation, over all the processes that worked on a run."""

import time

from ...report.ledger import Ledger


class Stopwatch:
    """Keeps its seconds in the ledger of a run, where the next process finds them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Up to the end of the last lap."""
        return self._ledger.seconds

    def start(self) -> None:
        """Begin a lap."""
        self._started = time.monotonic()

    def save_lap(self) -> None:
        """End a lap, keep its time on disk, begin the next one."""
        now = time.monotonic()
        seconds, self._started = self.seconds + now - self._started, now
        self._ledger.record_seconds(seconds)
