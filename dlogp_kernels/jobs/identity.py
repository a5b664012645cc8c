"""What a run is of: data and model files by their content, arguments, versions."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..ops import backends

_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py")
_SAMPLE_SIZE = 64 * 2**10
_NUM_SAMPLES = 16


def versions(device: str, op: str = "linear_delta_logp_fwd") -> dict[str, str]:
    """Of the packages that the numbers come from, and the backend that serves the op on this device."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {
        "dlogp_kernels": __version__,
        **packages,
        "backend": backends.select(op, device),
    }


def file_identity(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a whole file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def model_identity(name_or_path: str | Path) -> dict[str, Any]:
    """Names and sizes of a model directory's files with a digest of samples of each; of a Hub model its name.

    Weights are too large to read whole: 16 samples of 64 KiB, evenly spread, tell two trainings apart.
    """
    directory = Path(name_or_path)
    if not directory.is_dir():
        return {"hub_name": str(name_or_path)}
    files = sorted(path for path in directory.iterdir() if path.suffix in _MODEL_SUFFIXES and path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sampled_sha256": _sampled_digest(path)} for path in files}


def _sampled_digest(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _SAMPLE_SIZE * _NUM_SAMPLES:
            digest.update(file.read())
        else:
            for index in range(_NUM_SAMPLES):
                file.seek((size - _SAMPLE_SIZE) * index // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_SIZE))
    return digest.hexdigest()
