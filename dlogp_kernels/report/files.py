"""Files that appear whole or not at all, and digests by which damage to them is seen."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"
_CHECK = "check"
_BLOCK = 2**20

OnRead = Callable[[int], Any]


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that at any moment, a crash included, the file is absent, the old one or whole.

    Raises OSError as the file system does (a full disk, no permission), leaving no temporary file behind.
    """
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Within this context a temporary file is written, which then takes the place of `path` as `write_atomically` says.

    What was written is on the disk before it has its name, and the name before this returns.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def temporary_path(path: Path) -> Path:
    """Where this process writes `path` before it is renamed; readers of Parquet directories skip a leading dot."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until a directory is on the disk with all that is in it."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def digest(data: Any) -> str:
    """SHA-256 of bytes, in hexadecimal: about 1 GB/s with the instructions for it that CPUs have had since 2017."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path, begin: int = 0, length: int | None = None, *, on_read: OnRead | None = None) -> str:
    """`digest` of a file, or of a stretch of it, which is not held in memory; `on_read` gets numbers of bytes."""
    hasher = hashlib.sha256()
    left = math.inf if length is None else length
    with open(path, "rb") as file:
        file.seek(begin)
        while block := file.read(int(min(left, _BLOCK))):
            hasher.update(block)
            left -= len(block)
            if on_read is not None:
                on_read(len(block))
    return hasher.hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value`, which is to be written as JSON, with a digest of it."""
    return {**value, _CHECK: _digest_of(value)}


def unsealed(found: Any) -> dict[str, Any]:
    """What `sealed` was given; ValueError if `found`, which was read from JSON, is something else."""
    if not isinstance(found, dict) or _CHECK not in found:
        raise ValueError("it has no digest")
    value = {name: part for name, part in found.items() if name != _CHECK}
    if found[_CHECK] != _digest_of(value):
        raise ValueError("its digest is not that of its content")
    return value


def _digest_of(value: Mapping[str, Any]) -> str:
    return digest(json.dumps(value, sort_keys=True).encode())
