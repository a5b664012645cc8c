"""One case, in this process: every candidate is verified against float64, then timed in rounds with the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlogp_kernels import backends

from ..baselines import bare_matmuls, bare_reads
from ..bench import Bench, tolerances
from ..harness import PHASES, Candidate, NotMeasuredError, verify
from ..memory import MIB, peak_over
from ..peers import Peer, peers_for
from ..problem import IGNORE_INDEX, Function, Problem, Truth, build, checked_rows
from ..records import Record, record, time_fields
from ..registry import BENCHES
from ..shapes import DTYPES, Workload, require_fit
from . import policy, sampling
from .cases import Case
from .session import (
    Option,
    Session,
    attempt,
    copies,
    forced,
    host_us,
    in_context,
    prepared,
    reason,
    require_wanted,
    rounds,
    skipped,
)

#: Whom the others are compared with, within a round.
REFERENCES = ("ours", "ours, triton", "ours, gemm", "eager", "matmul", "copy", "read")
#: Backends that are forced, beside the library's own choice.
_FORCED = ("triton", "gemm", "reference")


@dataclass(frozen=True)
class _Option(Option):
    """`gives`: outputs that gradients can flow into, all that there are if None."""

    gives: tuple[str, ...] | None = None
    summed: bool = False
    peer: bool = False


class _Prepared(NamedTuple):
    option: _Option
    candidate: Candidate
    errors: dict[str, float]
    peak: int
    outputs: int
    host_us: float | None


def run_case(case: Case, session: Session) -> Iterator[Record]:
    """The case's records. A case that can not be measured, or not to its end, has one that says why."""
    records = _KINDS.get(case.kind, _comparison)(case, session)
    while (outcome := attempt(lambda: next(records, None), session.device)) is not None:
        if isinstance(outcome, Exception):
            yield skipped(case, "ours", reason(outcome))
            return
        yield outcome


def _comparison(case: Case, session: Session) -> Iterator[Record]:
    work = case.work
    require_fit(work, "ours", session.device)
    problem = build(work, session.device)
    prepare = partial(_prepared, case, _Truths(problem), session)
    found = yield from prepared(case, _options(case, session), prepare, session)
    del prepare  # which holds the truths
    if found:
        yield from _timed(case, problem, found, session)


def _options(case: Case, session: Session) -> list[_Option]:
    bench, work = BENCHES[case.work.op], case.work
    ours, eager, compiled = (_plain(bench, name) for name in ("ours", "eager", "compiled"))
    if case.kind == "tune":
        return [ours, *_tile_configurations(bench, work, session.device)]
    if case.kind == "peers":
        return [ours, compiled, *(_of_peer(peer) for peer in peers_for(work, session.peers))]
    # Given logits are not multiplied: there "gemm" has nothing to do.
    names = [name for name in _FORCED if work.linear or name != "gemm"]
    return [ours, *(forced(ours, name, f"{bench.op}_fwd") for name in names), eager]


def _plain(bench: Bench, name: str) -> _Option:
    return _Option(name, lambda: bench.function(name))


def _of_peer(peer: Peer) -> _Option:
    return _Option(
        peer.name,
        peer.load,
        peer.unavailable,
        gives=peer.gives,
        summed=peer.summed,
        peer=True,
        note=peer.note,
    )


def _tile_configurations(bench: Bench, work: Workload, device: torch.device) -> list[_Option]:
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
    return [
        _Option(_config_name(config), lambda: bench.ours, unavailable, partial(context, config)) for config in found
    ]


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


def _prepared(case: Case, truths: _Truths, session: Session, option: _Option) -> _Prepared:
    """`option` loaded, verified, and its memory measured."""
    work, device = case.work, session.device
    require_wanted(option.name, session, option.unavailable(work, device))
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
    candidate = in_context(option.context, problem.candidate(option.name, function))
    host = host_us(candidate, device) if case.kind == "small" else None
    return _Prepared(option, candidate, errors, answer.peak, answer.outputs, host)


def _tolerances(option: _Option, errors: Mapping[str, float]) -> dict[str, float]:
    allowed = tolerances(option.name, errors)
    # Some libraries leave small gradients out on purpose: recorded, not refused.
    return {name: float("inf") if option.peer and name.startswith("d_") else most for name, most in allowed.items()}


def _timed(case: Case, problem: Problem, by_name: Mapping[str, _Prepared], session: Session) -> Iterator[Record]:
    work = case.work
    timings, failed = rounds(case, [own.candidate for own in by_name.values()] + _floor(case, problem), session)
    for name, error in failed.items():
        yield skipped(case, name, reason(error))
    names = list(timings.rounds[0])
    for phase in PHASES if work.training else PHASES[:1]:
        for name in names:
            fields = time_fields(timings, name, [other for other in REFERENCES if other in names], phase)
            fields |= _rates(case, phase, fields["median_ms"] / 1e3)
            if name in by_name:
                fields |= _own_fields(by_name[name], work, session)
            yield record(case.kind, work, name, phase, **fields)


def _own_fields(own: _Prepared, work: Workload, session: Session) -> dict[str, Any]:
    return {
        "errors": own.errors,
        "note": own.option.note,
        "backend": _backend(own.option, work, session),
        "peak_mib": own.peak / MIB,
        "output_mib": own.outputs / MIB,
        "host_us": own.host_us,
    }


def _backend(option: _Option, work: Workload, session: Session) -> str | None:
    if not option.is_ours:
        return None
    with option.context():
        return BENCHES[work.op].backend(session.device)


def _floor(case: Case, problem: Problem) -> list[Candidate]:
    work = problem.work
    if case.kind == "small":
        return copies(problem.work, _weights(problem))
    if work.linear:
        return bare_matmuls(problem)
    return [*bare_reads(problem), *copies(problem.work, [problem.inputs["logits"].detach()])]


def _weights(problem: Problem) -> list[Tensor]:
    return [x.detach() for name, x in problem.inputs.items() if "weight" in name]


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
    timings, failed = rounds(case, candidates, session)
    for name, error in failed.items():
        yield skipped(case, name, reason(error))
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
    timings, _ = rounds(case, candidates, session)
    rates = {
        "matmul": ("tflops", 2 * side**3 / 1e12),
        "copy": ("gb_per_s", 2 * source.nbytes / 1e9),
        "read": ("gb_per_s", source.nbytes / 1e9),
    }
    for name, (unit, amount) in rates.items():
        fields = time_fields(timings, name, (), "forward")
        rate = {unit: 1e3 * amount / fields["median_ms"]}
        yield record(case.kind, work, name, "forward", **fields, **rate)


_KINDS: Mapping[str, Callable[[Case, Session], Iterator[Record]]] = {
    "half ignored": _half_ignored,
    "sample": sampling.records,
    "policy loss": policy.loss_records,
    "policy step": policy.step_records,
    "ceilings": _ceilings,
}
