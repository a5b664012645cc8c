"""The file of responses while a run writes it: whole chunks are added, and a killed run goes on after the last one."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..report.files import sync_directory
from ..report.responses import Response, from_line, to_line
from .errors import JobError


class ResponseFile:
    """The file `path`, which is made when it is first looked at."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep_whole_chunks(self, chunk_lengths: Sequence[int], on_kept: Callable[[Response], None]) -> int:
        """How many chunks of so many lines are there whole; what a killed process left of another one is cut off.

        Every response that stays is given to `on_kept`.
        """
        with open(self._path, "a+b") as file:
            file.seek(0)
            end = num_lines = num_chunks = 0
            for length in chunk_lengths:
                lines = [file.readline() for _ in range(length)]
                if not lines[-1].endswith(b"\n"):
                    break
                for number, line in enumerate(lines, num_lines + 1):
                    on_kept(self._parse(line, number))
                end, num_lines, num_chunks = file.tell(), num_lines + length, num_chunks + 1
            file.truncate(end)
        sync_directory(self._path.parent)
        return num_chunks

    def append(self, responses: Sequence[Response]) -> None:
        """Write a chunk and wait until it is on the disk."""
        with open(self._path, "ab") as file:
            file.write(b"".join(map(to_line, responses)))
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, line: bytes, number: int) -> Response:
        try:
            return from_line(line)
        except ValueError as error:
            raise JobError(
                f"{self._path}: line {number} is damaged ({error}): remove it and all lines after it to draw them again"
            ) from error
