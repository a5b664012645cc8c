"""The directory of a run: whose it is, what is in it, and that only one process writes there.

DIR/manifest.json   what the run is of: arguments, data and model files; it appears with the first results, and in the
                    end tells digests of all files and the summary
DIR/tokens/, DIR/responses/   the data set of `dlogp metrics`, see report.dataset
DIR/responses.jsonl what `dlogp generate` and `dlogp sweep` drew, see report.responses
DIR/summary.json    appears when the run is complete
DIR/.work/          what the run needs while it is under way, with digests of what it has finished, see report.ledger
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...report.dataset import RESPONSES_DIRECTORY, SUMMARY_FILE, TOKENS_DIRECTORY
from ...report.files import TEMPORARY_SUFFIX, sealed, write_atomically
from ...report.ledger import MANIFEST_FILE, WORK_DIRECTORY, Ledger, read_manifest
from ..errors import JobError, explained_writes

_FORMAT = 3
_GO_ON = "what is finished stays: make room and start again with the same arguments to go on"
_HALF_WRITTEN = f".*{TEMPORARY_SUFFIX}"

#: Descriptors that hold a lock. A copy of this process does not keep it: were it to live on, no run could go on there.
_LOCKS: set[int] = set()


def _let_go_of_locks() -> None:
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_let_go_of_locks)


class RunDirectory:
    """The directory `out` of the run that `identity` describes (plain JSON values).

    A directory belongs to the run whose results it holds; a run with another identity is refused, and nothing in the
    directory is touched. `stamps` are kept in the manifest for `Fingerprints`, and may differ.
    """

    def __init__(self, out: str | Path, identity: Mapping[str, Any], stamps: Mapping[str, Any] | None = None) -> None:
        self.out = Path(out)
        self.work = self.out / WORK_DIRECTORY
        #: What is finished, while the directory is claimed.
        self.ledger = Ledger(self.out)
        self._identity = json.loads(json.dumps(identity))
        self._stamps = dict(stamps or {})
        self._owner = os.getpid()
        self._lap_began = time.monotonic()

    def _own_manifest(self) -> dict[str, Any] | None:
        """None before the first results; JobError if the directory is another run's, or holds something else."""
        if not self.out.exists():
            return None
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
            return None
        try:
            found = read_manifest(manifest)
        except ValueError as error:
            raise JobError(
                f"--out {self.out}: {manifest} is damaged ({error}), and nothing else says whose results these are: "
                f"remove {self.out} to begin again"
            ) from error
        if found.get("format") != _FORMAT:
            raise JobError(
                f"--out {self.out}: a run in format {found.get('format')}, this version writes {_FORMAT}: choose "
                "another directory (what is there can be plotted and viewed as it is)"
            )
        differences = list(_differences(found["identity"], self._identity))
        if differences:
            raise JobError(
                f"--out {self.out}: it holds the run of other arguments or data; choose another directory, or give "
                "the same again to go on with that run. What differs:\n  " + "\n  ".join(differences)
            )
        return found

    @contextlib.contextmanager
    def claimed(self, *, resume: bool = False, mends: bool = True) -> Iterator[dict[str, Any] | None]:
        """Within this context this process alone writes to the directory, which exists, with its work directory.

        It gives the summary of a complete run, for which there is nothing to do. If it is left by an exception before
        there were any results, the directory is as it was before. A complete run of which a file is damaged is one to
        go on with where the job `mends` such files; else a JobError. So is a directory without a run where the user
        insists to `resume` one.
        """
        if self._own_manifest() is None and resume:
            raise JobError(f"--out {self.out}: --resume is given, but there is no run to go on with")
        created = not self.out.exists()
        with explained_writes(self.out, "choose another directory"):
            self.out.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.out, os.O_RDONLY)
        _LOCKS.add(descriptor)
        try:
            self._lock(descriptor)
            manifest = self._own_manifest()
            with explained_writes(self.out, "choose another directory"):
                self._clean(manifest is None)
                self.ledger = Ledger.read(self.out)
                finished = (manifest or {}).get("finished")
                summary = None if finished is None else self._summary(finished["summary"], mends)
                if summary is None:
                    self.work.mkdir(exist_ok=True)
            try:
                yield summary
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

    def _clean(self, new: bool) -> None:
        """Remove what a killed process left half-written."""
        if new and self.work.exists():
            shutil.rmtree(self.work)
        for leftover in (
            *self.out.glob(_HALF_WRITTEN),
            *(self.out / TOKENS_DIRECTORY).glob(_HALF_WRITTEN),
            *(self.out / RESPONSES_DIRECTORY).glob(_HALF_WRITTEN),
            *self.work.rglob(_HALF_WRITTEN),
        ):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def _summary(self, written: dict[str, Any], mends: bool) -> dict[str, Any] | None:
        """That of a complete run whose files are as they were; it was `written` to the manifest before its own file."""
        summary, damaged = self.out / SUMMARY_FILE, next(self.ledger.damaged(), None)
        if damaged is not None and not mends:
            raise JobError(
                f"--out {self.out}: {damaged} is not what the run wrote, or gone, and can not be made again alone: "
                f"put it back, or remove {self.out} to begin again"
            )
        if damaged is not None:
            summary.unlink(missing_ok=True)
            return None
        if not summary.exists() or summary.read_bytes() != to_json(written):
            if summary.exists():
                warnings.warn(f"{summary} is damaged: it is made again", stacklevel=2)
            write_atomically(summary, to_json(written))
        return written

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
        """For what writes to the directory: a failure is a JobError, and a copy of this process does not come here.

        One that a user's code (a grader) forked and let go on ends: two would write.
        """
        if os.getpid() != self._owner:
            print(f"--out {self.out}: a forked copy of the process that writes there ends here", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        with explained_writes(self.out, _GO_ON):
            yield

    def begin(self, *subdirectories: str) -> None:
        """Record whose directory this is, before the first results, and make directories in it; again has no effect."""
        if not (self.out / MANIFEST_FILE).exists():
            self._write_manifest({})
        for name in subdirectories:
            (self.out / name).mkdir(exist_ok=True)

    def start_lap(self) -> None:
        """Begin to take the time of a stretch of computation."""
        self._lap_began = time.monotonic()

    def save_lap(self) -> None:
        """Keep the time it took in the ledger, where the next process finds it, and begin the next one."""
        now = time.monotonic()
        seconds, self._lap_began = self.ledger.seconds + now - self._lap_began, now
        self.ledger.record_seconds(seconds)

    def rate(self, count: int) -> float | None:
        """So many of something, a second of computation; None where nothing was computed."""
        return round(count / self.ledger.seconds, 1) if self.ledger.seconds else None

    def finish(self, found: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Write what was found, with arguments, versions and seconds, as the summary, which completes the run."""
        versions = {"python": platform.python_version(), **self._identity["versions"]}
        summary = {**found, "seconds": round(self.ledger.seconds, 3), "arguments": arguments, "versions": versions}
        with self.writing():
            self._write_manifest({"finished": self.ledger.to_json() | {"summary": summary}})
            write_atomically(self.out / SUMMARY_FILE, to_json(summary))
        return summary

    def _write_manifest(self, more: Mapping[str, Any]) -> None:
        manifest = {"format": _FORMAT, "identity": self._identity, "stamps": self._stamps, **more}
        # Through JSON, so that the digest is of what will be read.
        write_atomically(self.out / MANIFEST_FILE, to_json(sealed(json.loads(json.dumps(manifest)))))


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
