"""What a visit has found so far: one JSON file, complete after every entry, and the table at its end."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from . import machine, table


class Visit:
    """`add` may be called from several threads. `left()` are the seconds until `limit` is over."""

    def __init__(self, number: int, folder: Path, limit: float, environment: dict[str, Any]) -> None:
        self._start = time.monotonic()
        self._limit = limit
        self._lock = threading.Lock()
        self.document: dict[str, Any] = {
            "visit": number,
            "environment": environment,
            "parts": {},
            "entries": [],
            "stopped": None,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{machine.card(environment)}_visit{number}.json"
        self._write()

    def passed(self) -> float:
        return time.monotonic() - self._start

    def left(self) -> float:
        return self._limit - self.passed()

    def deadline(self, seconds: float, reserve: float = 0.0) -> float:
        """Of time.monotonic(): in so many seconds, or `reserve` seconds before the end of the visit."""
        return time.monotonic() + max(0.0, min(seconds, self.left() - reserve))

    def add(self, part: str, job: str, entry: dict[str, Any]) -> None:
        with self._lock:
            self.document["entries"].append({"part": part, "job": job, **entry, "at": round(self.passed(), 1)})
            self._write()

    def put(self, **facts: Any) -> None:
        """Facts that are no entry of a case."""
        with self._lock:
            self.document |= facts
            self._write()

    def end_part(self, part: str, since: float) -> None:
        with self._lock:
            self.document["parts"][part] = round(self.passed() - since, 1)
            self._write()

    def finish(self) -> str:
        """Write the table beside the JSON, and return it."""
        with self._lock:
            self.document["seconds"] = round(self.passed(), 1)
            self._write()
            try:
                text = "\n".join(table.lines(self.document)) + "\n"
            except Exception as error:  # all that matters is in the JSON
                text = f"no table: {type(error).__name__}: {error}\n"
            self.path.with_suffix(".txt").write_text(text)
        return text

    def _write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1, ensure_ascii=False) + "\n")
        part.replace(self.path)
