"""The directory of a run: whose it is, what is in it, and that only one process writes there.

DIR/manifest.json   what the run is of: arguments, data and model files; it appears with the first results, and in the
                    end tells digests of all files and the summary
DIR/tokens/         the data set of `dlogp metrics`, see report.dataset
DIR/responses.jsonl what `dlogp generate` and `dlogp sweep` drew, see report.responses
DIR/summary.json    appears when the run is complete
DIR/.work/          what the run needs while it is under way, with digests of what it has finished, see report.ledger
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ...report.dataset import SUMMARY_FILE, TOKENS_DIRECTORY
from ...report.files import TEMPORARY_SUFFIX, sealed, write_atomically
from ...report.ledger import MANIFEST_FILE, WORK_DIRECTORY, Ledger, read_manifest
from ..errors import JobError, explained_writes

_FORMAT = 2
_GO_ON = "what is finished stays: make room and start again with the same arguments to go on"
_HALF_WRITTEN = f".*{TEMPORARY_SUFFIX}"

#: Descriptors that hold a lock. A copy of this process does not keep it: were it to live on, no run could go on there.
_LOCKS: set[int] = set()


def _let_go_of_locks() -> None:
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_let_go_of_locks)


class State(Enum):
    """How far the run in a directory has come."""

    NEW = "new"
    PARTIAL = "partial"
    COMPLETE = "complete"


class RunDirectory:
    """The directory `out` of the run that `identity` describes (plain JSON values).

    A directory belongs to the run whose results it holds; a run with another identity is refused, and nothing in the
    directory is touched. `stamps` are kept in the manifest, see `known_stamps`, and may differ.
    """

    def __init__(self, out: str | Path, identity: Mapping[str, Any], stamps: Mapping[str, Any] | None = None) -> None:
        self.out = Path(out)
        self.work = self.out / WORK_DIRECTORY
        #: What is finished, while the directory is claimed.
        self.ledger = Ledger(self.out)
        self._identity = json.loads(json.dumps(identity))
        self._stamps = dict(stamps or {})
        self._owner = os.getpid()

    def state(self) -> State:
        """How far the run has come; JobError if the directory is another run's, or holds something else."""
        if not self.out.exists():
            return State.NEW
        if not self.out.is_dir():
            raise JobError(f"--out {self.out}: it is a file, expected a directory or a name that is free")
        manifest = self.out / MANIFEST_FILE
        if not manifest.exists():
            ours = {self.work, *self.out.glob(_HALF_WRITTEN)}
            strangers = sorted(entry.name for entry in self.out.iterdir() if entry not in ours)
            if strangers:
                raise JobError(
                    f"--out {self.out}: it holds other files ({', '.join(strangers[:3])}{'…' * (len(strangers) > 3)}), "
                    "expected a new or empty directory, or that of a run to go on with"
                )
            return State.NEW
        found = self._read_manifest()
        self._check_identity(found)
        return State.COMPLETE if "finished" in found else State.PARTIAL

    def _read_manifest(self) -> dict[str, Any]:
        manifest = self.out / MANIFEST_FILE
        try:
            found = read_manifest(manifest)
        except ValueError as error:
            raise JobError(
                f"--out {self.out}: {manifest} is damaged ({error}), and nothing else says whose results these are: "
                f"remove {self.out} to begin again"
            ) from error
        if found.get("format") != _FORMAT:
            raise JobError(f"--out {self.out}: a run in format {found.get('format')}, this version writes {_FORMAT}")
        return found

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        differences = list(_differences(found["identity"], self._identity))
        if differences:
            raise JobError(
                f"--out {self.out}: it holds the run of other arguments or data; choose another directory, or give "
                "the same again to go on with that run. What differs:\n  " + "\n  ".join(differences)
            )

    @contextlib.contextmanager
    def claimed(self, *, resume: bool = False, mends: bool = True) -> Iterator[State]:
        """Within this context this process alone writes to the directory, which exists, with its work directory.

        If it is left by an exception before there were any results, the directory is as it was before. A complete run
        of which a file is damaged is one to go on with where the job `mends` such files; else a JobError. So is a
        directory without a run where the user insists to `resume` one.
        """
        if self.state() is State.NEW and resume:
            raise JobError(f"--out {self.out}: --resume is given, but there is no run to go on with")
        created = not self.out.exists()
        with explained_writes(self.out, "choose another directory"):
            self.out.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.out, os.O_RDONLY)
        _LOCKS.add(descriptor)
        try:
            self._lock(descriptor)
            state = self.state()
            with explained_writes(self.out, "choose another directory"):
                self._clean(state)
                self.ledger = Ledger.read(self.out)
                if state is State.COMPLETE:
                    state = self._check_complete(mends)
            try:
                yield state
            finally:
                if os.getpid() == self._owner:
                    self._tidy(created)
        finally:
            if os.getpid() == self._owner:
                _LOCKS.discard(descriptor)
                # Let go by hand: a copy that has only just been forked holds it, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
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
        for leftover in (
            *self.out.glob(_HALF_WRITTEN),
            *(self.out / TOKENS_DIRECTORY).glob(_HALF_WRITTEN),
            *self.work.rglob(_HALF_WRITTEN),
        ):
            _remove(leftover)
        if state is not State.COMPLETE:
            self.work.mkdir(exist_ok=True)

    def _check_complete(self, mends: bool) -> State:
        """Compare every file of a complete run with what was written; the summary is in the manifest before it is."""
        damaged = list(self.ledger.damaged())
        if damaged and not mends:
            raise JobError(
                f"--out {self.out}: {damaged[0]} is not what the run wrote, or gone, and can not be made again alone: "
                f"put it back, or remove {self.out} to begin again"
            )
        if damaged:
            (self.out / SUMMARY_FILE).unlink(missing_ok=True)
            self.work.mkdir(exist_ok=True)
            return State.PARTIAL
        summary, path = to_json(self._read_manifest()["finished"]["summary"]), self.out / SUMMARY_FILE
        if not path.exists() or path.read_bytes() != summary:
            if path.exists():
                warnings.warn(f"{path} is damaged: it is made again", stacklevel=2)
            write_atomically(path, summary)
        return State.COMPLETE

    def _tidy(self, created: bool) -> None:
        has_results = (self.out / MANIFEST_FILE).exists()
        if has_results and not (self.out / SUMMARY_FILE).exists():
            return
        shutil.rmtree(self.work, ignore_errors=True)
        if not has_results and created:
            with contextlib.suppress(OSError):
                self.out.rmdir()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """For what writes to the directory: a failure is a JobError, and a copy of this process does not come here."""
        self.end_copies()
        with explained_writes(self.out, _GO_ON):
            yield

    def end_copies(self) -> None:
        """End this process if it is a copy that a user's code (a grader) forked and let go on: two would write."""
        if os.getpid() != self._owner:
            print(f"--out {self.out}: a forked copy of the process that writes there ends here", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)

    def begin(self, *subdirectories: str) -> None:
        """Record whose directory this is, before the first results, and make directories in it; again has no effect."""
        if not (self.out / MANIFEST_FILE).exists():
            self._write_manifest({})
        for name in subdirectories:
            (self.out / name).mkdir(exist_ok=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which completes the run."""
        self._write_manifest({"finished": self.ledger.to_json() | {"summary": summary}})
        write_atomically(self.out / SUMMARY_FILE, to_json(summary))

    def _write_manifest(self, more: Mapping[str, Any]) -> None:
        manifest = {"format": _FORMAT, "identity": self._identity, "stamps": self._stamps, **more}
        # Through JSON, so that the digest is of what will be read.
        write_atomically(self.out / MANIFEST_FILE, to_json(sealed(json.loads(json.dumps(manifest)))))

    def summary(self) -> dict[str, Any]:
        """The summary of a complete run."""
        return json.loads((self.out / SUMMARY_FILE).read_text(encoding="utf-8"))


def known_stamps(out: str | Path) -> Mapping[str, Any]:
    """The stamps in the manifest of the directory; none if it has no manifest that can be read."""
    try:
        return read_manifest(Path(out) / MANIFEST_FILE).get("stamps", {})
    except (OSError, ValueError):
        return {}


def to_json(value: Mapping[str, Any]) -> bytes:
    """Indented JSON without NaN and infinities, which JSON does not have."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """One line for each leaf in which two JSON values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from _differences(there.get(key), here.get(key), f"{name} {key}".strip())
    elif there != here:
        yield f"{name}: {json.dumps(there)} there, {json.dumps(here)} now"
