"""Errors that a user can do something about; the command line prints them without a traceback."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError


class JobError(ValueError):
    """What was given can not be used: an argument, a file, a directory. The message says what to do."""


@contextmanager
def explained_computation(
    failed: str, advice: str, kinds: tuple[type[Exception], ...] = (ValueError, TypeError, IndexError)
) -> Iterator[None]:
    """What models and ops can not do with these arguments, as a JobError; `advice` is for a device that is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise JobError(f"the device's memory is full: give {advice}, with another --out; {reason}") from error
    except kinds as error:
        raise JobError(f"{failed}: {error}") from error


@contextmanager
def explained_writes(out: Path, advice: str) -> Iterator[None]:
    """Turn a failed write below `out` into a JobError that says what happened and ends with `advice`."""
    try:
        yield
    except OSError as error:
        raise JobError(f"--out {out}: {_reason(error)}; {advice}") from error
    except SafetensorError as error:
        raise JobError(f"--out {out}: {_reason(_as_os_error(error))}; {advice}") from error


def _as_os_error(error: SafetensorError) -> OSError:
    """safetensors gives the system's error number in its text only."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(str(error)) if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full"
        case errno.EFBIG:
            return "a file grew beyond what the system allows (ulimit -f, or the file system)"
        case errno.EROFS:
            return "the file system is read-only"
        case errno.EACCES | errno.EPERM:
            return "there is no permission to write there"
        case _:
            return f"writing failed ({error.strerror or error})"
