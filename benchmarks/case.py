"""A case of a run: what it is called and what yields its records; and what most cases do, time candidates."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .harness import PHASES, Budget, Candidate, Clock, NotMeasuredError, WrongResultError, measure
from .records import Record, record, time_fields
from .shapes import Workload

MODES = ("quick", "default", "full")

Measured = Callable[..., Iterator[Record]]


@dataclass(frozen=True)
class Case:
    label: str
    run: Callable[[], Iterator[Record]]


#: The cases of an op (or of something built on ops) on a device, in a mode.
Plan = Callable[[torch.device, str], Iterable[Case]]


def case_of(kind: str, measured: Measured, work: Workload, *arguments: object) -> Case:
    """`measured(kind, work, *arguments)` as a case; where it raises NotMeasuredError, a record says why."""
    return Case(f"{kind}: {work}", partial(_run, kind, measured, work, *arguments))


def _run(kind: str, measured: Measured, work: Workload, *arguments: object) -> Iterator[Record]:
    try:
        yield from measured(kind, work, *arguments)
    except NotMeasuredError as error:
        yield skipped(kind, work, "ours", error)


def budget(mode: str) -> Budget:
    """Of the rounds of a case."""
    return Budget(seconds=4) if mode == "quick" else Budget(seconds=20, least=5)


def timed(
    kind: str,
    work: Workload,
    candidates: Sequence[Candidate],
    rounds: Budget,
    device: torch.device,
    *,
    errors: Mapping[str, dict[str, float]],
    backend: str,
) -> Iterator[Record]:
    """Records of the candidates' rounds; `backend` is that of those whose name begins with "ours"."""
    timings = measure(candidates, rounds, Clock(device))
    names = [candidate.name for candidate in candidates]
    for phase in PHASES if work.training else PHASES[:1]:
        for name in names:
            measured = time_fields(timings, name, names, phase)
            served = backend if name.startswith("ours") else None
            yield record(kind, work, name, phase, backend=served, errors=errors.get(name, {}), **measured)


def whole(work: Workload) -> str:
    """The phase of all that a call does."""
    return "both" if work.training else "forward"


def skipped(kind: str, work: Workload, name: str, reason: NotMeasuredError) -> Record:
    return record(kind, work, name, whole(work), skipped=str(reason), wrong=isinstance(reason, WrongResultError))
