"""Lines of JSONL, none of which takes more memory than its limit allows."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import DatasetError

#: The limit on a line of the data where no other is set: parsed, a line may take forty times its size in memory.
MAX_LINE_BYTES = 16 * 2**20
#: The limit on a line that a run wrote: a response of a million tokens, all of them replaced, fits.
MAX_WRITTEN_LINE_BYTES = 128 * 2**20
_PIECE = 2**16


def bounded_lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and bytes of each line; None for one of more than `limit` bytes, which is never held whole."""
    for number in itertools.count(1):
        line = file.readline(limit + 1)
        if not line:
            return
        if len(line) <= limit or line.endswith(b"\n"):
            yield number, line
            continue
        while (piece := file.readline(_PIECE)) and not piece.endswith(b"\n"):
            pass
        yield number, None


def written_lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that a run wrote; a last one that a killed process left unfinished is left out.

    Raises DatasetError for a longer line than a run writes.
    """
    with open(path, "rb") as file:
        for number, line in bounded_lines(file, limit):
            if line is None:
                raise DatasetError(f"{path}: line {number} is longer than {limit:,} bytes")
            if line.endswith(b"\n"):
                yield number, line
