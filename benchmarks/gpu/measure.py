"""One case, in this process: every candidate is verified against float64, then timed in rounds with the others."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dlogp_kernels import backends

from ..baselines import bare_matmuls, bare_reads
from ..bench import Bench, tolerances
from ..harness import (
    PHASES,
    Budget,
    Candidate,
    Clock,
    NotMeasuredError,
    Sample,
    Timings,
    WrongResultError,
    measure,
    verify,
)
from ..memory import MIB, peak_over
from ..peers import Peer, peers_for
from ..problem import IGNORE_INDEX, Function, Problem, Truth, build, checked_rows
from ..records import Record, record, time_fields
from ..registry import BENCHES
from ..shapes import DTYPES, Workload, require_fit
from .cases import Case

OUT_OF_TIME = "out of time"
#: Whom the others are compared with, within a round.
_REFERENCES = ("ours", "ours, triton", "ours, gemm", "eager", "matmul", "copy", "read")
#: Backends that are forced, beside the library's own choice.
_FORCED = ("triton", "gemm", "reference")
_MOST_ROUNDS = 30
_HOST_CALLS, _HOST_REPEATS = 20, 7
#: The innermost frames of an exception, which are printed.
_FRAMES = 5

_Result = TypeVar("_Result")


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
    """A candidate before it is loaded. `gives`: outputs that gradients can flow into, all that there are if None."""

    name: str
    load: Callable[[], Function]
    unavailable: Callable[[Workload, torch.device], str | None] = lambda *_: None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    gives: tuple[str, ...] | None = None
    summed: bool = False
    peer: bool = False
    note: str | None = None


class Prepared(NamedTuple):
    option: Option
    candidate: Candidate
    errors: dict[str, float]
    peak: int
    outputs: int
    host_us: float | None


def run_case(case: Case, session: Session) -> Iterator[Record]:
    """The case's records. A case that can not be measured, or not to its end, has one that says why."""
    records = _KINDS.get(case.kind, _comparison)(case, session)
    while (outcome := _attempt(lambda: next(records, None), session.device)) is not None:
        if isinstance(outcome, Exception):
            yield _skipped(case, "ours", _reason(outcome))
            return
        yield outcome


def _comparison(case: Case, session: Session) -> Iterator[Record]:
    work = case.work
    require_fit(work, "ours", session.device)
    problem = build(work, session.device)
    truths = _Truths(problem)
    prepared = []
    for option in _options(case, session):
        session.watch(option.name)
        outcome = _attempt(partial(_prepared, case, option, truths, session), session.device)
        if isinstance(outcome, Exception):
            yield _skipped(case, option.name, _reason(outcome), option.note, isinstance(outcome, WrongResultError))
        else:
            prepared.append(outcome)
    del truths
    if prepared:
        session.watch("floor")
        yield from _timed(case, problem, prepared, session)


def _options(case: Case, session: Session) -> list[Option]:
    bench, work = BENCHES[case.work.op], case.work
    ours, eager, compiled = (_plain(bench, name) for name in ("ours", "eager", "compiled"))
    if case.kind == "tune":
        return [ours, *_tile_configurations(bench, work, session.device)]
    if case.kind == "peers":
        return [ours, compiled, *(_of_peer(peer) for peer in peers_for(work, session.peers))]
    # Given logits are not multiplied: there "gemm" has nothing to do.
    forced = [_forced(bench, name) for name in _FORCED if work.linear or name != "gemm"]
    return [ours, *forced, eager]


def _plain(bench: Bench, name: str) -> Option:
    return Option(name, lambda: bench.function(name))


def _forced(bench: Bench, backend: str) -> Option:
    def unavailable(work: Workload, device: torch.device) -> str | None:
        return backends.unavailable(backend, f"{bench.op}_fwd", device)

    return Option(f"ours, {backend}", lambda: bench.ours, unavailable, partial(backends.use_backend, backend))


def _of_peer(peer: Peer) -> Option:
    return Option(
        peer.name,
        peer.load,
        peer.unavailable,
        gives=peer.gives,
        summed=peer.summed,
        peer=True,
        note=peer.note,
    )


def _tile_configurations(bench: Bench, work: Workload, device: torch.device) -> list[Option]:
    """Every tile configuration of the fused forward kernel, under the backend "triton"."""
    # Triton is not needed for anything else here.
    try:
        from dlogp_kernels.triton import configs
    except ImportError as error:
        raise NotMeasuredError(f"no configurations: {error}") from error

    @contextmanager
    def context(config: Any) -> Iterator[None]:
        with backends.use_backend("triton"), configs.use_config(config):
            yield

    def unavailable(work: Workload, device: torch.device) -> str | None:
        return backends.unavailable("triton", f"{bench.op}_fwd", device)

    found: Sequence[Any] = configs.candidates(2 if work.pair else 1, device)
    return [Option(_config_name(config), lambda: bench.ours, unavailable, partial(context, config)) for config in found]


def _config_name(config: Any) -> str:
    return "ours, " + " ".join(f"{name}={value}" for name, value in config._asdict().items())


class _Truths:
    """The truth of a problem, for candidates that give all outputs and for those that give only some."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._found: dict[tuple[str, ...], Truth] = {}

    def of(self, problem: Problem) -> Truth:
        asked = tuple(problem.upstream)
        if asked not in self._found:
            self._found[asked] = Truth(problem)
        return self._found[asked]

    def errors_of_sum(self, function: Function) -> dict[str, float]:
        """Of a sum over the checked tokens, all others ignored: that of the mean log p, and of the gradients."""
        problem = self.problem
        rows = checked_rows(problem)
        target = torch.full_like(problem.inputs["target"], IGNORE_INDEX)
        target[rows] = problem.inputs["target"][rows]
        checked = replace(problem.with_inputs(target=target), upstream={"logp": -torch.ones_like(target).float()})
        truth = Truth(checked)
        outputs: Any = checked.call(function)
        gradients = _summed(checked).gradients(outputs)
        mean = -outputs.nll.detach().double() / len(rows)
        return {"logp": (mean - truth.stats["logp"].mean()).abs().item(), **truth.gradient_errors(gradients)}


def _summed(problem: Problem) -> Problem:
    return replace(problem, upstream={"nll": torch.ones((), device=problem.device)})


def _prepared(case: Case, option: Option, truths: _Truths, session: Session) -> Prepared:
    """`option` loaded, verified, and its memory measured."""
    work, device = case.work, session.device
    reason = session.excluded.get(option.name) or (OUT_OF_TIME if session.out_of_time else None)
    reason = reason or option.unavailable(work, device)
    if reason is not None:
        raise NotMeasuredError(reason)
    require_fit(work, option.name, device, built=True)
    problem = truths.problem
    with option.context():
        function = option.load()
        if option.summed:
            problem = _summed(problem)
            errors = truths.errors_of_sum(function)
        else:
            problem = problem if option.gives is None else problem.asking(option.gives)
            errors = truths.of(problem).errors(function)
        verify(option.name, errors, _tolerances(option, errors))
        answer = peak_over(lambda: problem.step(function), device)
    candidate = _in_context(option, problem.candidate(option.name, function))
    host_us = _host_us(candidate, device) if case.kind == "small" else None
    return Prepared(option, candidate, errors, answer.peak, answer.outputs, host_us)


def _tolerances(option: Option, errors: Mapping[str, float]) -> dict[str, float]:
    allowed = tolerances(option.name, errors)
    # Some libraries leave small gradients out on purpose: recorded, not refused.
    return {name: float("inf") if option.peer and name.startswith("d_") else most for name, most in allowed.items()}


def _in_context(option: Option, candidate: Candidate) -> Candidate:
    if option.context is nullcontext:
        return candidate

    def forward() -> object:
        with option.context():
            return candidate.forward()

    def backward(outputs: object) -> object:
        assert candidate.backward is not None
        with option.context():
            return candidate.backward(outputs)

    return Candidate(candidate.name, forward, None if candidate.backward is None else backward)


def _attempt(call: Callable[[], _Result], device: torch.device) -> _Result | Exception:
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
        raise DeviceLostError(_reason(error)) from lost


def _reason(error: Exception) -> str:
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


def _timed(case: Case, problem: Problem, prepared: Sequence[Prepared], session: Session) -> Iterator[Record]:
    work = case.work
    timings, failed = _rounds(case, [p.candidate for p in prepared] + _floor(case, problem), session)
    for name, error in failed.items():
        yield _skipped(case, name, _reason(error))
    names = list(timings.rounds[0])
    by_name = {p.option.name: p for p in prepared}
    for phase in PHASES if work.training else PHASES[:1]:
        for name in names:
            fields = time_fields(timings, name, [other for other in _REFERENCES if other in names], phase)
            fields |= _rates(case, phase, fields["median_ms"] / 1e3)
            if name in by_name:
                fields |= _own_fields(by_name[name], work, session)
            yield record(case.kind, work, name, phase, **fields)


def _rounds(case: Case, candidates: Sequence[Candidate], session: Session) -> tuple[Timings, dict[str, Exception]]:
    """Timings of the candidates that can be called again and again, and what the others raised."""
    clock = _WatchedClock(session)
    failed: dict[str, Exception] = {}
    seconds = max(0.0, min(case.seconds, session.deadline - time.monotonic()))
    budget = Budget(seconds, case.rounds, _MOST_ROUNDS)
    while candidates:
        outcome = _attempt(partial(measure, candidates, budget, clock), session.device)
        if not isinstance(outcome, Exception):
            return outcome, failed
        failed[clock.current] = outcome
        candidates = [candidate for candidate in candidates if candidate.name != clock.current]
    raise NotMeasuredError("no candidate could be timed: " + "; ".join(map(_reason, failed.values())))


def _own_fields(own: Prepared, work: Workload, session: Session) -> dict[str, Any]:
    return {
        "errors": own.errors,
        "note": own.option.note,
        "backend": _backend(own.option, work, session),
        "peak_mib": own.peak / MIB,
        "output_mib": own.outputs / MIB,
        "host_us": own.host_us,
    }


def _backend(option: Option, work: Workload, session: Session) -> str | None:
    if not option.name.startswith("ours"):
        return None
    with option.context():
        return BENCHES[work.op].backend(session.device)


def _host_us(candidate: Candidate, device: torch.device) -> float:
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


def _floor(case: Case, problem: Problem) -> list[Candidate]:
    work = problem.work
    if case.kind == "small":
        return _copies(problem, _weights(problem))
    if work.linear:
        return bare_matmuls(problem)
    return [*bare_reads(problem), *_copies(problem, [problem.inputs["logits"].detach()])]


def _weights(problem: Problem) -> list[Tensor]:
    return [x.detach() for name, x in problem.inputs.items() if "weight" in name]


def _copies(problem: Problem, of: Sequence[Tensor]) -> list[Candidate]:
    """Copies that move as many bytes, read and written together, as the work must.

    Forward reads the tensors of each model once, so it is as half a copy of each; backward of given logits also writes
    the gradient.
    """
    work = problem.work
    flat = of[0].reshape(-1)
    half, target = flat[: flat.numel() // 2], torch.empty_like(flat)

    def move(halves: int) -> None:
        for _ in range(halves):
            target[: half.numel()].copy_(half)

    models = 2 if work.pair else 1
    backward = (lambda _: move(models + 1)) if work.training else None
    return [Candidate("copy", lambda: move(models), backward)]


def _rates(case: Case, phase: str, seconds: float) -> dict[str, float]:
    """Operations or bytes per second, of those that the workload needs."""
    work = case.work
    models = 2 if work.pair else 1
    times = {"forward": models, "backward": models + (2 if work.linear else 1)}
    times["both"] = times["forward"] + times["backward"]
    if case.kind == "small":
        return {"gb_per_s": models * work.shape.v * work.shape.d * work.element_size / seconds / 1e9}
    if work.linear:
        return {"tflops": times[phase] * 2 * work.n * work.shape.v * work.shape.d / seconds / 1e12}
    return {"gb_per_s": times[phase] * work.n * work.shape.v * work.element_size / seconds / 1e9}


def _half_ignored(case: Case, session: Session) -> Iterator[Record]:
    """Only timed: "compare" verifies the same op, and the tests what ignored rows give."""
    work, bench = case.work, BENCHES[case.work.op]
    problem = build(work, session.device)
    candidates = [
        problem.candidate("ours", bench.ours),
        problem.half_ignored().candidate("ours, half ignored", bench.ours),
    ]
    timings, failed = _rounds(case, candidates, session)
    for name, error in failed.items():
        yield _skipped(case, name, _reason(error))
    names = list(timings.rounds[0])
    for name in names:
        fields = time_fields(timings, name, [other for other in names if other == "ours"], "forward")
        yield record(case.kind, work, name, "forward", backend=bench.backend(session.device), **fields)


def _ceilings(case: Case, session: Session) -> Iterator[Record]:
    """The rate of a large matmul, and of a large copy, which no kernel here can pass."""
    work, side = case.work, case.work.n
    dtype, device = DTYPES[work.dtype], session.device
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(32 * side, side, device=device).to(dtype)
    target = torch.empty_like(source)
    candidates = [
        Candidate("matmul", lambda: torch.mm(a, b, out=out)),
        Candidate("copy", lambda: target.copy_(source)),
        Candidate("read", lambda: torch.amax(source, -1)),
    ]
    timings, _ = _rounds(case, candidates, session)
    rates = {
        "matmul": ("tflops", 2 * side**3 / 1e12),
        "copy": ("gb_per_s", 2 * source.nbytes / 1e9),
        "read": ("gb_per_s", source.nbytes / 1e9),
    }
    for name, (unit, amount) in rates.items():
        fields = time_fields(timings, name, (), "forward")
        rate = {unit: 1e3 * amount / fields["median_ms"]}
        yield record(case.kind, work, name, "forward", **fields, **rate)


def _skipped(case: Case, name: str, reason: str, note: str | None = None, wrong: bool = False) -> Record:
    phase = "both" if case.work.training else "forward"
    return record(case.kind, case.work, name, phase, skipped=reason, wrong=wrong, note=note)


_KINDS: Mapping[str, Callable[[Case, Session], Iterator[Record]]] = {
    "half ignored": _half_ignored,
    "ceilings": _ceilings,
}
