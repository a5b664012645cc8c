"""The directory of a run: whose it is, what is in it, and that only one process writes there.

DIR/manifest.json   what the run is of: arguments, data and model files; it appears with the first results
DIR/tokens/         the data set of `dlogp metrics`, see report.dataset
DIR/responses.jsonl what `dlogp generate` and `dlogp sweep` drew, see report.responses
DIR/summary.json    appears when the run is complete
DIR/.work/          what the run needs while it is under way
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ..report.dataset import SUMMARY_FILE, TOKENS_DIRECTORY
from ..report.files import temporary_path, write_atomically
from .errors import JobError, explained_writes

MANIFEST_FILE = "manifest.json"
WORK_DIRECTORY = ".work"
_FORMAT = 1


class State(Enum):
    """How far the run in a directory has come."""

    NEW = "new"
    PARTIAL = "partial"
    COMPLETE = "complete"


class RunDirectory:
    """The directory `out` of the run that `identity` describes (plain JSON values).

    A directory belongs to the run whose results it holds; a run with another identity is refused, and nothing in the
    directory is touched.
    """

    def __init__(self, out: str | Path, identity: Mapping[str, Any]) -> None:
        self.out = Path(out)
        self.work = self.out / WORK_DIRECTORY
        self._identity = json.loads(json.dumps(identity))

    def state(self) -> State:
        """How far the run has come; JobError if the directory is another run's, or holds something else."""
        if not self.out.exists():
            return State.NEW
        if not self.out.is_dir():
            raise JobError(f"--out {self.out}: it is a file, expected a directory or a name that is free")
        manifest = self.out / MANIFEST_FILE
        if not manifest.exists():
            ours = (WORK_DIRECTORY, temporary_path(manifest).name)
            strangers = sorted(entry.name for entry in self.out.iterdir() if entry.name not in ours)
            if strangers:
                raise JobError(
                    f"--out {self.out}: it holds other files ({', '.join(strangers[:3])}{'…' * (len(strangers) > 3)}), "
                    "expected a new or empty directory, or that of a run to go on with"
                )
            return State.NEW
        self._check_identity(manifest)
        return State.COMPLETE if (self.out / SUMMARY_FILE).exists() else State.PARTIAL

    def _check_identity(self, manifest: Path) -> None:
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
            format_number, identity = found["format"], found["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(f"--out {self.out}: {manifest} is not the manifest of a run: {error}") from error
        if format_number != _FORMAT:
            raise JobError(f"--out {self.out}: a run in format {format_number}, this version writes {_FORMAT}")
        differences = list(_differences(identity, self._identity))
        if differences:
            raise JobError(
                f"--out {self.out}: it holds the run of other arguments or data; choose another directory, or give "
                "the same again to go on with that run. What differs:\n  " + "\n  ".join(differences)
            )

    @contextlib.contextmanager
    def claimed(self) -> Iterator[State]:
        """Within this context this process alone writes to the directory, which exists, with its work directory.

        If it is left by an exception before there were any results, the directory is as it was before.
        """
        created = not self.out.exists()
        with explained_writes(self.out, "choose another directory"):
            self.out.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.out, os.O_RDONLY)
        try:
            self._lock(descriptor)
            state = self.state()
            with explained_writes(self.out, "choose another directory"):
                self._clean(state)
            try:
                yield state
            finally:
                self._tidy(created)
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobError(f"--out {self.out}: another process is writing there") from error

    def _clean(self, state: State) -> None:
        """Remove what a killed process left half-written."""
        if state is State.NEW and self.work.exists():
            shutil.rmtree(self.work)
        for directory in (self.out, self.out / TOKENS_DIRECTORY):
            for leftover in directory.glob(".*.tmp"):
                leftover.unlink()
        if state is not State.COMPLETE:
            self.work.mkdir(exist_ok=True)

    def _tidy(self, created: bool) -> None:
        has_results = (self.out / MANIFEST_FILE).exists()
        if has_results and not (self.out / SUMMARY_FILE).exists():
            return
        shutil.rmtree(self.work, ignore_errors=True)
        if not has_results and created:
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def begin(self, *subdirectories: str) -> None:
        """Record whose directory this is, before the first results, and make directories in it; again has no effect."""
        manifest = self.out / MANIFEST_FILE
        if not manifest.exists():
            write_atomically(manifest, to_json({"format": _FORMAT, "identity": self._identity}))
        for name in subdirectories:
            (self.out / name).mkdir(exist_ok=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which completes the run."""
        write_atomically(self.out / SUMMARY_FILE, to_json(summary))

    def summary(self) -> dict[str, Any]:
        """The summary of a complete run."""
        return json.loads((self.out / SUMMARY_FILE).read_text(encoding="utf-8"))


def to_json(value: Mapping[str, Any]) -> bytes:
    """Indented JSON without NaN and infinities, which JSON does not have."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """One line for each leaf in which two JSON values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(key), here.get(key), f"{name} {key}".strip())
    elif there != here:
        yield f"{name}: {json.dumps(there)} there, {json.dumps(here)} now"
