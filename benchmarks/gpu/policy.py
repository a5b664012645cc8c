"""Cases of the policy losses, forward and backward: of log-probabilities that are given, and from hidden states."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dlogp_kernels import backends

from .. import bench_linear_policy_loss as linear_policy
from .. import bench_policy_loss as given
from .. import policy
from ..harness import PHASES, Candidate, verify
from ..memory import MIB, peak_over
from ..peers import Peer, peers_for
from ..policy import DAPO
from ..records import Record, record, time_fields
from ..shapes import Workload, require_fit
from .cases import Case
from .session import (
    Option,
    Session,
    copy_of,
    forced,
    in_context,
    prepared,
    reason,
    require_wanted,
    rounds,
    skipped,
)

#: Whom the others are compared with, within a round.
_REFERENCES = ("ours", "eager", "compiled", "matmul", "copy")
#: Backends that are forced, beside the library's own choice; "gemm" has neither loss.
_FORCED = ("triton", "reference")

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class _Option(Option):
    """`peer`: another library's."""

    peer: bool = False


class _Prepared(NamedTuple):
    candidate: Candidate
    fields: dict[str, Any]


class _Problem(ABC):
    """Inputs of a loss, and what the two kinds of case differ in."""

    @abstractmethod
    def loss(self, function: Loss) -> Tensor: ...

    @abstractmethod
    def gradients(self, loss: object) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def errors(self, option: _Option, function: Loss) -> dict[str, float]:
        """Against TRL's formula in float64, verified."""

    @abstractmethod
    def own_fields(self, option: _Option, function: Loss) -> dict[str, Any]:
        """Of a record: memory, and what else is measured of one call."""

    @abstractmethod
    def floor(self) -> list[Candidate]: ...

    @abstractmethod
    def rate(self, phase: str, seconds: float) -> dict[str, float]:
        """Operations or bytes per second, of those that are needed."""

    def step(self, function: Loss) -> list[Tensor]:
        return list(self.gradients(self.loss(function)))


class _Given(_Problem):
    """`policy_loss` of tokens that all count, so that the bytes of the floor are those that have to be moved.

    What flows into the loss is there before: to fill it with a one is a launch of autograd's, not of the loss.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        batch = policy.build(case.sequences, case.work.n // case.sequences, device)
        self.batch = batch._replace(mask=torch.ones_like(batch.mask))
        self.upstream = torch.ones((), device=device)
        self.device = device

    def loss(self, function: Loss) -> Tensor:
        return function(self.batch, DAPO)

    def gradients(self, loss: object) -> tuple[Tensor, ...]:
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, self.batch.logp, self.upstream)

    def errors(self, option: _Option, function: Loss) -> dict[str, float]:
        errors = given.errors_of(_without_reweighting(option, function), self.batch, DAPO)
        verify(option.name, errors, given.TOLERANCES)
        return errors

    def own_fields(self, option: _Option, function: Loss) -> dict[str, Any]:
        answer = peak_over(lambda: self.step(function), self.device)
        launches = _launches(lambda: self.step(function), self.device)
        return {
            "peak_mib": answer.peak / MIB,
            "output_mib": answer.outputs / MIB,
            "statistics": {} if launches is None else {"launches": launches},
        }

    def floor(self) -> list[Candidate]:
        return [copy_of(self._bytes("forward"), self._bytes("backward"), self.device)]

    def rate(self, phase: str, seconds: float) -> dict[str, float]:
        return {"gb_per_s": self._bytes(phase) / seconds / 1e9}

    def _bytes(self, phase: str) -> int:
        """Those that have to be moved, read and written together.

        Of every token, forward reads logp and old_logp in float32 and a byte of the mask, and writes the coefficient in
        float32; backward reads the coefficient and writes the gradient.
        """
        coefficient = self.batch.logp.nbytes
        forward = self.batch.logp.nbytes + self.batch.old_logp.nbytes + self.batch.mask.nbytes + coefficient
        backward = coefficient + self.batch.logp.nbytes
        return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


class _FromHidden(_Problem):
    """`linear_policy_loss` and the gradients by hidden and weight."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.work, self.device = case.work, device
        self.inputs = linear_policy.build(case.work, device)

    def loss(self, function: Loss) -> Tensor:
        return function(self.inputs)

    def gradients(self, loss: object) -> tuple[Tensor, ...]:
        return self.inputs.gradients(loss)

    def errors(self, option: _Option, function: Loss) -> dict[str, float]:
        errors = linear_policy.errors_of(_without_reweighting(option, function), self.inputs)
        verify(option.name, errors, _step_tolerances(option))
        return errors

    def own_fields(self, option: _Option, function: Loss) -> dict[str, Any]:
        answer = peak_over(lambda: self.step(function), self.device)
        peak = self._peak_of_ours(function, answer.peak) if option.is_ours else answer.peak
        return {"peak_mib": peak / MIB, "output_mib": answer.outputs / MIB}

    def _peak_of_ours(self, function: Loss, whole: int) -> int:
        """Over the gradients, in whichever form they are there: float32 from forward on, in backward also the inputs'.

        `whole`, of a step, is over the latter; but while forward works there are only the former.
        """
        waiting = sum(4 * self.inputs.inputs[name].numel() for name in linear_policy.LEAVES)
        forward = peak_over(lambda: [self.loss(function)], self.device).peak
        return max(0, forward - waiting, whole - waiting)

    def floor(self) -> list[Candidate]:
        return linear_policy.bare_products(self.inputs)

    def rate(self, phase: str, seconds: float) -> dict[str, float]:
        """Of a whole step: gradients may be formed in either phase."""
        if phase != "both":
            return {}
        return {"tflops": 6 * self.work.n * self.work.shape.v * self.work.shape.d / seconds / 1e12}


def _without_reweighting(option: _Option, function: Loss) -> Loss:
    """As the others compute it."""
    return partial(function, reweight="none") if option.is_ours else function


def _step_tolerances(option: _Option) -> Mapping[str, float]:
    if option.peer:
        # Some libraries leave small gradients out on purpose: recorded, not refused.
        allowed = linear_policy.TOLERANCES["eager"]
        return {name: float("inf") if name.startswith("d_") else most for name, most in allowed.items()}
    return linear_policy.TOLERANCES["ours" if option.is_ours else "eager"]


def loss_records(case: Case, session: Session) -> Iterator[Record]:
    require_fit(case.work, "ours", session.device)
    yield from _records(case, session, _Given(case, session.device), _loss_options())


def step_records(case: Case, session: Session) -> Iterator[Record]:
    require_fit(case.work, "ours", session.device)
    yield from _records(case, session, _FromHidden(case, session.device), _step_options(case.work, session))


def _loss_options() -> Iterator[_Option]:
    yield from _ours(given.OP, given.ours)
    yield _Option("eager", lambda: policy.trl_loss)
    yield _Option("compiled", _compiled)


def _compiled() -> Loss:
    # One shape, one graph, whatever was compiled before.
    torch.compiler.reset()
    return torch.compile(policy.trl_loss, dynamic=False)


def _step_options(work: Workload, session: Session) -> Iterator[_Option]:
    yield from _ours(linear_policy.OP, linear_policy.ours)
    yield _Option("eager", lambda: linear_policy.eager)
    yield from map(_of_peer, peers_for(work, session.peers))


def _ours(op: str, function: Loss) -> Iterator[_Option]:
    ours = _Option("ours", lambda: function)
    yield ours
    for backend in _FORCED:
        yield forced(ours, backend, f"{op}_fwd")


def _of_peer(peer: Peer) -> _Option:
    def load() -> Loss:
        function = peer.load()
        return lambda step: function(**step.inputs)

    return _Option(peer.name, load, peer.unavailable, note=peer.note, peer=True)


def _records(case: Case, session: Session, problem: _Problem, options: Iterable[_Option]) -> Iterator[Record]:
    found = yield from prepared(case, options, partial(_prepared, case, problem, session), session)
    if found:
        yield from _timed(case, problem, found, session)


def _prepared(case: Case, problem: _Problem, session: Session, option: _Option) -> _Prepared:
    """`option` loaded, verified, and its memory measured."""
    require_wanted(option.name, session, option.unavailable(case.work, session.device))
    require_fit(case.work, option.name, session.device, built=True)
    with option.context():
        function = option.load()
        errors = problem.errors(option, function)
        backend = backends.select(f"{case.work.op}_fwd", session.device) if option.is_ours else None
        fields = problem.own_fields(option, function)
    candidate = Candidate(option.name, partial(problem.loss, function), problem.gradients)
    fields |= {"errors": errors, "note": option.note, "backend": backend}
    return _Prepared(in_context(option.context, candidate), fields)


def _timed(case: Case, problem: _Problem, by_name: Mapping[str, _Prepared], session: Session) -> Iterator[Record]:
    candidates = [*(own.candidate for own in by_name.values()), *problem.floor()]
    timings, failed = rounds(case, candidates, session)
    for name, error in failed.items():
        yield skipped(case, name, reason(error))
    names = list(timings.rounds[0])
    for phase in PHASES:
        for name in names:
            fields = time_fields(timings, name, [other for other in _REFERENCES if other in names], phase)
            fields |= problem.rate(phase, fields["median_ms"] / 1e3)
            fields |= by_name[name].fields if name in by_name else {}
            yield record(case.kind, case.work, name, phase, **fields)


def _launches(call: Callable[[], object], device: torch.device) -> int | None:
    """What one call starts on the GPU: kernels, and copies and fills too. None where nothing is seen of it.

    That is on a CPU, and where the profiler is not allowed to look.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    return _on_the_gpu(profiled.events()) or None


def _on_the_gpu(events: Iterable[Any]) -> int:
    return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)
