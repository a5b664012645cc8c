"""Files that grow by whole pieces while a run is under way; the ledger has a digest of each piece."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...report.files import sync, write_atomically
from ...report.ledger import Ledger, Piece, is_there, piece_of
from ...report.responses import Response, from_line, to_line
from ..errors import JobError


class PieceFile:
    """The file `path`; a piece is in it once the ledger says so, whatever a killed process left."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._path = path
        self._ledger = ledger

    def keep(self, most: int) -> tuple[int, list[int]]:
        """Cut the file off after `most` pieces or the last whole one; how many are left, and which are damaged or gone.

        The file is made where there is none.
        """
        self._path.touch()
        known = self._ledger.pieces(self._path)
        whole = [index for index, piece in known.items() if index < most and is_there(self._path, piece)]
        number = max(whole, default=-1) + 1
        os.truncate(self._path, known[number - 1].end if number else 0)
        sync(self._path)
        sync(self._path.parent)
        self._ledger.forget_pieces(self._path, number)
        return number, sorted({*range(number), *(index for index in known if index < most)}.difference(whole))

    def restart(self, data: bytes) -> None:
        """Let the file hold `data`, as one piece, and nothing else."""
        write_atomically(self._path, data)
        self._ledger.record_files([self._path])

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self._path

    def add(self, data: bytes) -> None:
        """Write a piece behind the others and wait until it is on the disk."""
        self._write(len(self._ledger.pieces(self._path)), piece_of(data, self._path.stat().st_size), data)

    def replace(self, index: int, data: bytes) -> bool:
        """Write a damaged piece again, in its place; whether `data` is what had been there, or else may have been."""
        before, there, after = map(self._ledger.pieces(self._path).get, (index - 1, index, index + 1))
        piece = piece_of(data, before.end if before else 0)
        if (there and there != piece) or (after and after.begin != piece.end):
            return False
        self._write(index, piece, data)
        return True

    def _write(self, index: int, piece: Piece, data: bytes) -> None:
        with open(self._path, "r+b") as file:
            file.seek(piece.begin)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._ledger.record(self._path, piece, index)


class ResponseFile(PieceFile):
    """The file of responses, whose pieces are chunks of lines."""

    def append(self, responses: Sequence[Response]) -> None:
        """Write a chunk and wait until it is on the disk."""
        self.add(_to_lines(responses))

    def mend(self, index: int, responses: Sequence[Response], line: int) -> None:
        """Write a damaged chunk, which begins at `line`, again; JobError if these are not the responses it had."""
        if not self.replace(index, _to_lines(responses)):
            raise JobError(
                f"{self._path}: line {line} or one of the {len(responses) - 1} after it is damaged, and what is drawn "
                "now differs from what was there (another machine or number of threads): remove that line and all "
                "after it to draw them again"
            )

    def responses(self) -> Iterator[Response]:
        """All that are there."""
        with open(self._path, "rb") as file:
            yield from map(from_line, file)


def _to_lines(responses: Sequence[Response]) -> bytes:
    return b"".join(map(to_line, responses))
