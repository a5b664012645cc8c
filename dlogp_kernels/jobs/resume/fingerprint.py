"""What a run is of: data and model files by their content, arguments, versions."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ... import __version__
from ...ops import backends
from ...report.files import file_digest
from ...report.ledger import MANIFEST_FILE, read_manifest
from ..errors import JobError
from ..inputs.models import ModelPlace, load_weights
from ..inputs.rollouts import files_of
from ..progress import bar

_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_SHOWN_AFTER_SECONDS = 1.0


def versions(device: str, op: str = "linear_delta_logp_fwd") -> dict[str, str]:
    """The versions of what the numbers come from, and the backend that serves the op on this device."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {
        "dlogp_kernels": __version__,
        **packages,
        # On a GPU that of most models' dtype: in float32 another one may serve.
        "backend": backends.select(op, device, torch.float32 if device == "cpu" else torch.bfloat16),
    }


class Fingerprints:
    """Sizes and SHA-256 of whole files, several read at once; `stamps` is for the next time that they are asked for.

    Args:
        out: the directory of a run whose manifest may have the `stamps` of an earlier time. A file that has the size
            and the times of change that it had then is not read again; any other is, whatever it turns out to hold.
        progress: show progress on stderr, where it takes a while.
    """

    def __init__(self, out: str | Path, *, progress: bool) -> None:
        #: By the file's path: its size, its times of change and its digest.
        self.stamps: dict[str, list[Any]] = {}
        self._known: Mapping[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = read_manifest(Path(out) / MANIFEST_FILE).get("stamps", {})
        self._progress = progress

    def model(self, place: ModelPlace) -> dict[str, Any]:
        """The files of a model that loading reads, by name, of an adapter with `base`; of the Hub its commit."""
        directory = place.directory
        base = {} if place.base is None else {"base": self.model(place.base)}
        if place.revision is not None:
            return base | {"hub_name": place.name, "commit": place.revision}
        files = _model_files(directory)
        return base | {path.name: found for path, found in zip(files, self.files(files), strict=True)}

    def load(self, place: ModelPlace, dtype: str, device: torch.device) -> Any:
        """The model in memory; JobError if a file is not the one whose fingerprint was taken, perhaps hours ago."""
        model = load_weights(place, dtype, device)
        for path in {*_model_files(place.whole.directory), *_model_files(place.directory)}:
            *stamp, digest = self.stamps.get(str(path.resolve()), [None])
            if digest is not None and stamp != _stamp(path) and digest != file_digest(path):
                raise JobError(f"{place}: {path.name} was changed since the run began; it is not the model of this run")
        return model

    def data(self, path: Path) -> dict[str, Any]:
        """Size and digest of a file of data, or of the files of a directory by name."""
        paths = files_of(path)
        if paths == [path]:
            return self.file(path)
        return {path.name: found for path, found in zip(paths, self.files(paths), strict=True)}

    def file(self, path: Path) -> dict[str, Any]:
        """Size and digest of one file."""
        return self.files([path])[0]

    def files(self, paths: Sequence[Path]) -> list[dict[str, Any]]:
        """Size and digest of each of the files."""
        total = sum(path.stat().st_size for path in paths)
        with (
            bar(
                desc="fingerprint",
                total=total,
                unit="B",
                unit_scale=True,
                delay=_SHOWN_AFTER_SECONDS,
                enabled=self._progress,
                leave=False,
            ) as shown,
            ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
        ):
            return list(pool.map(lambda path: self._file(path, shown), paths))

    def _file(self, path: Path, shown: tqdm) -> dict[str, Any]:
        key, stamp = str(path.resolve()), _stamp(path)
        known = self._known.get(key)
        if known is not None and known[:-1] == stamp:
            digest = known[-1]
            shown.update(stamp[0])
        else:
            digest = file_digest(path, on_read=shown.update)
        self.stamps[key] = [*stamp, digest]
        return {"bytes": stamp[0], "sha256": digest}


def _model_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix in _MODEL_SUFFIXES and path.is_file())


def _stamp(path: Path) -> list[int]:
    """Size and times of change; that of the inode can not be set, so a copy that keeps the other does not pass."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
