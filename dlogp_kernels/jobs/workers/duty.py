"""What workers are for, what they are given and what they say, whatever it is that they compute."""

import socket
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import JobError
from ..inputs.models import ModelPlace
from ..resume.fingerprint import Fingerprints


class Computing(Protocol):
    """Has in memory what a duty needs."""

    @property
    def greeting(self) -> Any:
        """What it says when it is ready, where the run has to know something of it."""

    def __call__(self, payload: Any, /) -> Any:
        """What a task is worth."""


class Duty(Protocol):
    """What workers are for; the same for all of a run, but for the device. It is pickled for another process."""

    def on(self, device: str) -> "Duty":
        """The same on one of the devices."""

    def absolute(self) -> "Duty":
        """The same with paths that mean the same in another directory."""

    def load(self, here: Any = None) -> Computing:
        """Have everything in memory; JobError where it can not be had on this machine, or is something else there.

        `here` is what the process of the run has of it already, and how it shows how far it is; None elsewhere.
        """


class Task(NamedTuple):
    """What is computed at once, and given out again if it is lost; its place in the run, and a name for the user."""

    key: tuple[int, ...]
    payload: Any
    name: str

    def __str__(self) -> str:
        return self.name


class Team(Protocol):
    """Workers who have what they need in memory; or one of them, this process."""

    @property
    def greeting(self) -> Any:
        """What the first of them said when it was ready."""

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Each task once, with what `Computing` gives for its payload; in any order."""


#: Gathers a team for a duty; whoever is one of it in this process is given what is `here`, see `Duty.load`.
Engine = Callable[[Duty, Any], AbstractContextManager[Team]]


class Reply(NamedTuple):
    """What a worker says when it is ready, and for each task: a value, or the error that ended it; and warnings."""

    value: Any = None
    error: Exception | None = None
    warnings: Sequence[str] = ()


def answered(function: Callable[..., Any], *arguments: Any) -> Reply:
    """What the function gives, raises and warns of, so that another process can be told."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            value, error = function(*arguments), None
        except Exception as raised:
            value, error = None, _portable(raised)
    return Reply(value, error, [str(one.message) for one in caught if one.category is UserWarning])


def _portable(error: Exception) -> Exception:
    """What a user can do something about as it is; of a fault of ours where it is."""
    if isinstance(error, JobError | OSError | MemoryError):
        return error.with_traceback(None)
    return RuntimeError("".join(traceback.format_exception(error)).rstrip())


def worker_here() -> str:
    """How an error calls this worker, of many."""
    return f"the worker on {socket.gethostname()}"


def check_versions(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """JobError unless this machine has the versions of the run."""
    for name, version in expected.items():
        if found.get(name) != version:
            raise JobError(
                f"{worker_here()} has {name} {found.get(name)}, this run is of {version}: all machines need the same "
                "versions"
            )


def load_model(place: ModelPlace, fingerprints: Fingerprints, dtype: str, device: torch.device) -> Any:
    """A model of the run in memory; JobError if it is not there, or is another one."""
    if not place.directory.is_dir():
        raise JobError(
            f"{place}: {worker_here()} has no directory {place.directory}: all machines need the models at the same "
            "place"
        )
    return fingerprints.load(place, dtype, device)
