"""What cases of every kind share: the session, candidates, calls that may raise anything, rounds, floors of bytes."""

import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from dlogp_kernels import backends

from ..harness import Budget, Candidate, Clock, NotMeasuredError, Sample, Timings, WrongResultError, measure
from ..peers import Peer
from ..records import Record, record
from ..shapes import Workload
from .cases import Case

OUT_OF_TIME = "out of time"
_MOST_ROUNDS = 30
_HOST_CALLS, _HOST_REPEATS = 20, 7
#: The innermost frames of an exception, which are printed.
_FRAMES = 5

_Result = TypeVar("_Result")
_Option = TypeVar("_Option", bound="Option")


class DeviceLostError(RuntimeError):
    """A candidate left the GPU unusable for this process, as an access out of bounds does."""


@dataclass
class Session:
    """What a case needs to know of the run. `excluded`: candidates that are not to be tried again, and why.

    `watch` tells the parent process which candidate runs now: the one to blame if this process dies.
    """

    device: torch.device
    peers: Sequence[Peer]
    deadline: float
    excluded: Mapping[str, str] = field(default_factory=dict)
    watch: Callable[[str], None] = lambda _: None

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


@dataclass(frozen=True)
class Option:
    """A candidate before it is loaded."""

    name: str
    load: Callable[[], Callable[..., Any]]
    unavailable: Callable[[Workload, torch.device], str | None] = lambda *_: None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    note: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")


def forced(option: _Option, backend: str, op: str) -> _Option:
    """`option` served by `backend`, whatever the library would choose; `op` says whether that is there."""

    def unavailable(work: Workload, device: torch.device) -> str | None:
        return backends.unavailable(backend, op, device)

    context = partial(backends.use_backend, backend)
    return replace(option, name=f"{option.name}, {backend}", unavailable=unavailable, context=context)


def prepared(
    case: Case, options: Iterable[_Option], prepare: Callable[[_Option], _Result], session: Session
) -> Generator[Record, None, dict[str, _Result]]:
    """What `prepare` makes of each option, by name; yields a record of each that raised."""
    found: dict[str, _Result] = {}
    for option in options:
        session.watch(option.name)
        outcome = attempt(partial(prepare, option), session.device)
        if isinstance(outcome, Exception):
            wrong = isinstance(outcome, WrongResultError)
            yield skipped(case, option.name, reason(outcome), option.note, wrong)
        else:
            found[option.name] = outcome
    if found:
        session.watch("floor")
    return found


def require_wanted(name: str, session: Session, unavailable: str | None) -> None:
    """NotMeasuredError if the candidate can not be measured, or not any more."""
    why = session.excluded.get(name) or (OUT_OF_TIME if session.out_of_time else None) or unavailable
    if why is not None:
        raise NotMeasuredError(why)


def attempt(call: Callable[[], _Result], device: torch.device) -> _Result | Exception:
    """What `call` returns, or what it raised."""
    try:
        return call()
    except DeviceLostError:
        raise
    except Exception as error:
        # The one place where anything may be raised: by other libraries, by their compilers, and by kernels of ours
        # that meet a GPU for the first time. It is recorded, and the run goes on with the next candidate.
        if not isinstance(error, NotMeasuredError):
            traceback.print_exception(error, limit=-_FRAMES)
        error.__traceback__ = None  # whose frames hold the candidate's tensors
        _require_device(device, error)
        return error


def _require_device(device: torch.device, error: Exception) -> None:
    """Raise DeviceLostError if `device` does not answer any more; give back what the failed call held."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as lost:
        raise DeviceLostError(reason(error)) from lost


def reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, NotMeasuredError) else f"{type(error).__name__}: {text[:300]}"


class _WatchedClock(Clock):
    """Tells the session whose turn it is."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.device)
        self._watch = session.watch
        self.current = ""

    def sample(self, candidate: Candidate, repeats: int = 1) -> Sample:
        self.current = candidate.name
        self._watch(candidate.name)
        return super().sample(candidate, repeats)


def rounds(case: Case, candidates: Sequence[Candidate], session: Session) -> tuple[Timings, dict[str, Exception]]:
    """Timings of the candidates that can be called again and again, and what the others raised."""
    clock = _WatchedClock(session)
    failed: dict[str, Exception] = {}
    seconds = max(0.0, min(case.seconds, session.deadline - time.monotonic()))
    budget = Budget(seconds, case.rounds, _MOST_ROUNDS)
    while candidates:
        outcome = attempt(partial(measure, candidates, budget, clock), session.device)
        if not isinstance(outcome, Exception):
            return outcome, failed
        failed[clock.current] = outcome
        candidates = [candidate for candidate in candidates if candidate.name != clock.current]
    raise NotMeasuredError("no candidate could be timed: " + "; ".join(map(reason, failed.values())))


def in_context(context: Callable[[], AbstractContextManager[object]], candidate: Candidate) -> Candidate:
    """The candidate with each of its calls inside a context of its own."""
    if context is nullcontext:
        return candidate

    def forward() -> object:
        with context():
            return candidate.forward()

    def backward(outputs: object) -> object:
        assert candidate.backward is not None
        with context():
            return candidate.backward(outputs)

    return Candidate(candidate.name, forward, None if candidate.backward is None else backward)


def host_us(candidate: Candidate, device: torch.device) -> float:
    """Microseconds of the host for one call, while the GPU still works on the calls before; the least of some repeats.

    A call that waits for the GPU shows the GPU's time here.
    """
    seconds = []
    for _ in range(_HOST_REPEATS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(_HOST_CALLS):
            candidate.forward()
        seconds.append((time.perf_counter() - start) / _HOST_CALLS)
    _wait(device)
    return 1e6 * min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies(work: Workload, of: Sequence[Tensor]) -> list[Candidate]:
    """Copies that move as many bytes, read and written together, as the work must.

    Forward reads the tensors of each model once, so it is as half a copy of each; backward of given logits also writes
    the gradient.
    """
    flat = of[0].reshape(-1)
    half, target = flat[: flat.numel() // 2], torch.empty_like(flat)

    def move(halves: int) -> None:
        for _ in range(halves):
            target[: half.numel()].copy_(half)

    models = 2 if work.pair else 1
    backward = (lambda _: move(models + 1)) if work.training else None
    return [Candidate("copy", lambda: move(models), backward)]


def copy_of(forward: int, backward: int, device: torch.device) -> Candidate:
    """A copy that moves so many bytes in each phase, read and written together."""
    source = torch.zeros(max(forward, backward) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def move(size: int) -> None:
        target[: size // 2].copy_(source[: size // 2])

    return Candidate("copy", lambda: move(forward), lambda _: move(backward))


def skipped(case: Case, name: str, reason: str, note: str | None = None, wrong: bool = False) -> Record:
    phase = "both" if case.work.training else "forward"
    return record(case.kind, case.work, name, phase, skipped=reason, wrong=wrong, note=note)
