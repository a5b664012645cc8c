"""The files that a run has finished, with digests of their content: what is damaged is not taken for what was written.

DIR/.work/ledger.jsonl  a line for each file, or for each piece of a file that grows, written when it is on the disk
DIR/manifest.json       whose the directory is; once the run is complete, what stays of the ledger under "finished"

A line that is damaged itself counts as not written: its file is then not known to be finished.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DatasetError
from .files import digest, file_digest, sealed, unsealed

MANIFEST_FILE = "manifest.json"
WORK_DIRECTORY = ".work"
_JOURNAL_FILE = "ledger.jsonl"
_START_AGAIN = "start the run again with the same arguments, which makes it again or says what to remove"


class Piece(NamedTuple):
    """A stretch of a file, whole files included."""

    begin: int
    length: int
    sha256: str

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.begin + self.length


def piece_of(data: bytes, begin: int = 0) -> Piece:
    """The piece that `data` is, which stands at `begin` in its file."""
    return Piece(begin, len(data), digest(data))


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest holds; ValueError if it is damaged, OSError if it can not be read.

    Those of the first format have no digest that they could be checked by.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested without end") from error
    if isinstance(found, dict) and "check" not in found and found.get("format", 1) == 1:
        return found
    return unsealed(found)


class Ledger:
    """The digests of the run in the directory `out`. Files are named by their paths; all lie below `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        #: Seconds of computation when the last entry was made.
        self.seconds = 0.0
        #: Whether it is that of a complete run, which has no other files.
        self.complete = False
        self._journal = out / WORK_DIRECTORY / _JOURNAL_FILE
        self._files: dict[str, dict[int, Piece]] = {}

    @classmethod
    def read(cls, out: Path) -> "Ledger":
        """What is known of the run in `out`: nothing if there is none. DatasetError if its manifest is damaged."""
        ledger = cls(out)
        manifest = out / MANIFEST_FILE
        if manifest.exists():
            try:
                finished = read_manifest(manifest).get("finished")
            except ValueError as error:
                raise DatasetError(
                    f"{manifest} is damaged ({error}): remove it to read the directory without any check"
                ) from error
            if finished is not None:
                ledger.complete, ledger.seconds = True, finished["seconds"]
                for name, pieces in finished["files"].items():
                    ends = list(itertools.accumulate((piece["bytes"] for piece in pieces), initial=0))
                    ledger._files[name] = {
                        index: Piece(ends[index], piece["bytes"], piece["sha256"]) for index, piece in enumerate(pieces)
                    }
        ledger._read_journal()
        return ledger

    def _read_journal(self) -> None:
        if not self._journal.exists():
            return
        for line in self._journal.read_bytes().splitlines():
            try:
                entry = unsealed(json.loads(line))
            except ValueError:
                continue
            self.seconds = entry["seconds"]
            self._take([(name, index, Piece(*piece)) for name, index, *piece in entry["pieces"]], entry["whole"])

    def _take(self, entries: Iterable[tuple[str, int, Piece]], whole: bool) -> None:
        for name, index, piece in entries:
            if whole:
                self._files[name] = {}
            self._files.setdefault(name, {})[index] = piece

    def record(self, path: Path, piece: Piece, index: int = 0) -> None:
        """Piece `index` of a file is on the disk; a file that does not grow has one."""
        self._record([(self._name(path), index, piece)], whole=False)

    def record_files(self, paths: Iterable[Path]) -> None:
        """The files are on the disk, as they are now, a piece each; all of them are recorded or none."""
        entries = [(self._name(path), 0, Piece(0, path.stat().st_size, file_digest(path))) for path in paths]
        self._record(entries, whole=True)

    def record_seconds(self, seconds: float) -> None:
        """Seconds of computation so far, over all the processes that worked on the run."""
        self.seconds = seconds
        self._record([], whole=False)

    def _record(self, entries: list[tuple[str, int, Piece]], *, whole: bool) -> None:
        self._take(entries, whole)
        pieces = [[name, index, *piece] for name, index, piece in entries]
        line = json.dumps(sealed({"pieces": pieces, "whole": whole, "seconds": self.seconds}))
        with open(self._journal, "ab") as file:
            # What a killed process left of a line is ended first.
            file.write(b"\n" * (file.tell() > 0) + line.encode())
            file.flush()
            os.fsync(file.fileno())

    def forget_pieces(self, path: Path, number: int) -> None:
        """The file was cut off: it has so many pieces now."""
        pieces = self._files.get(self._name(path), {})
        for index in [index for index in pieces if index >= number]:
            del pieces[index]

    def pieces(self, path: Path) -> dict[int, Piece]:
        """What is known of a file, by the index of the piece; nothing if it is not known to be finished."""
        return dict(self._files.get(self._name(path), {}))

    def holds(self, path: Path) -> bool:
        """Whether the file was finished and is as it was then."""
        pieces = self._files.get(self._name(path))
        if not pieces or not path.is_file() or path.stat().st_size != max(piece.end for piece in pieces.values()):
            return False
        return all(is_there(path, piece) for piece in pieces.values())

    def holds_tree(self, directory: Path) -> bool:
        """Whether the directory has the files that were finished in it, as they were then, and no others."""
        files = {path for path in directory.rglob("*") if path.is_file()}
        return bool(files) and files == set(self.known_below(directory)) and all(map(self.holds, files))

    def known_below(self, directory: Path) -> list[Path]:
        """The finished files below a directory, or the file itself; sorted."""
        paths = (self.out / name for name in self._files)
        return sorted(path for path in paths if path.is_relative_to(directory))

    def damaged(self) -> Iterator[Path]:
        """The finished files of those that stay that are not as they were, or gone."""
        return (path for path in map(self.out.joinpath, self._staying()) if not self.holds(path))

    def to_json(self) -> dict[str, Any]:
        """All that stays when the run is complete."""
        files = {}
        for name in self._staying():
            pieces = self._files[name]
            files[name] = [{"bytes": pieces[i].length, "sha256": pieces[i].sha256} for i in sorted(pieces)]
        return {"files": files, "seconds": self.seconds}

    def _staying(self) -> list[str]:
        """Names of files but those in the work directory, of which a kill may leave a part when the run is complete."""
        return sorted(name for name in self._files if not name.startswith(f"{WORK_DIRECTORY}/"))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()


def is_there(path: Path, piece: Piece) -> bool:
    """Whether a file has this piece, as it was written."""
    return file_digest(path, piece.begin, piece.length) == piece.sha256


def check(ledger: Ledger, directory: Path, paths: Iterable[Path]) -> None:
    """DatasetError unless these files below `directory` are those that the run finished there, as it wrote them.

    Of a run that is under way, what it has not recorded yet is taken as it is.
    """
    paths, known = set(paths), set(ledger.known_below(directory))
    for path in sorted(known):
        pieces = ledger.pieces(path).values()
        if not path.exists():
            raise DatasetError(f"{path} is gone: {_START_AGAIN}")
        if not (ledger.holds(path) if ledger.complete else all(is_there(path, piece) for piece in pieces)):
            raise DatasetError(f"{path} is damaged: {_START_AGAIN}")
    strangers = paths - known
    if ledger.complete and strangers:
        raise DatasetError(f"{min(strangers)} is not a file of the run in {ledger.out}: remove it")
