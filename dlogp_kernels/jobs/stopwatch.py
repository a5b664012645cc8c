"""Seconds of computation, over all the processes that worked on a run."""

import json
import time
from pathlib import Path

from ..report.files import write_atomically


class Stopwatch:
    """Keeps its seconds in the file `path`, where the next process finds them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: float = json.loads(path.read_text(encoding="utf-8")) if path.exists() else 0.0
        self._started = time.monotonic()

    def start(self) -> None:
        """Begin a lap."""
        self._started = time.monotonic()

    def save_lap(self) -> None:
        """End a lap, keep its time on disk, begin the next one."""
        now = time.monotonic()
        self.seconds, self._started = self.seconds + now - self._started, now
        write_atomically(self._path, json.dumps(self.seconds).encode())
