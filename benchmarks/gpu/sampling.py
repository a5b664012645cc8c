"""Cases of kind "sample": a step of decoding from a pair's logits, and ordinary sampling from one model's."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlogp_kernels import backends

from .. import sampling
from ..harness import Candidate, WrongResultError, verify
from ..memory import MIB, peak_over
from ..peers import Peer, peers_for
from ..records import Record, record, time_fields
from ..sampling import Draw, Draws
from ..shapes import Workload, require_fit
from .cases import Case
from .session import Session, attempt, copies, host_us, in_context, reason, require_wanted, rounds, skipped

#: Whom the others are compared with, within a round.
_REFERENCES = ("ours", "ours, one model", "eager", "copy")


@dataclass(frozen=True)
class _Option:
    """A candidate before it is loaded; `one_model`: it looks at the RL model's logits alone."""

    name: str
    load: Callable[[], Draw]
    unavailable: Callable[[Workload, torch.device], str | None] = lambda *_: None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    one_model: bool = False
    note: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")


class _Prepared(NamedTuple):
    candidate: Candidate
    models: int
    fields: dict[str, Any]


def records(case: Case, session: Session) -> Iterator[Record]:
    require_fit(case.work, "ours", session.device)
    draws = sampling.build(case.work, session.device)
    prepared: dict[str, _Prepared] = {}
    for option in _options(case.work, session):
        session.watch(option.name)
        outcome = attempt(partial(_prepared, option, draws, session), session.device)
        if isinstance(outcome, Exception):
            wrong = isinstance(outcome, WrongResultError)
            yield skipped(case, option.name, reason(outcome), option.note, wrong)
        else:
            prepared[option.name] = outcome
    if prepared:
        session.watch("floor")
        yield from _timed(case, draws, prepared, session)


def _options(work: Workload, session: Session) -> Iterator[_Option]:
    yield _Option("ours", lambda: sampling.ours)
    for backend in backends.BACKENDS:
        # Those for the CPU have nothing to do on a GPU.
        if backends.unavailable(backend, work.op, session.device) is None or backend not in ("cpu", "gemm"):
            yield _forced(backend)
    yield _Option("ours, all replaced", lambda: sampling.ours_all_replaced)
    yield _Option("ours, one model", lambda: sampling.ours_one_model, one_model=True)
    yield _Option("eager", lambda: sampling.eager)
    yield _Option("compiled", _compiled)
    yield from map(_of_peer, peers_for(work, session.peers))


def _forced(backend: str) -> _Option:
    def unavailable(work: Workload, device: torch.device) -> str | None:
        return backends.unavailable(backend, work.op, device)

    return _Option(f"ours, {backend}", lambda: sampling.ours, unavailable, partial(backends.use_backend, backend))


def _compiled() -> Draw:
    # One shape, one graph, whatever was compiled before.
    torch.compiler.reset()
    function = torch.compile(sampling.eager_pair, dynamic=False)
    return lambda draws: function(draws.logits, draws.base_logits, **draws.filters)


def _of_peer(peer: Peer) -> _Option:
    def load() -> Draw:
        function = peer.load()
        return lambda draws: function(draws.logits, **draws.filters)

    return _Option(peer.name, load, peer.unavailable, one_model=True, note=peer.note)


def _prepared(option: _Option, draws: Draws, session: Session) -> _Prepared:
    """`option` loaded, verified, and its memory and the host's time measured."""
    require_wanted(option.name, session, option.unavailable(draws.work, session.device))
    require_fit(draws.work, option.name, session.device, built=True)
    with option.context():
        draw = option.load()
        errors = sampling.errors_of(draw, draws, one_model=option.one_model)
        verify(option.name, errors, sampling.TOLERANCES)
        answer = peak_over(lambda: _tensors(draw(draws)), session.device)
        backend = backends.select(draws.work.op, session.device) if option.is_ours else None
    candidate = in_context(option.context, Candidate(option.name, partial(draw, draws)))
    fields = {
        "errors": errors,
        "note": option.note,
        "backend": backend,
        "peak_mib": answer.peak / MIB,
        "output_mib": answer.outputs / MIB,
        "host_us": host_us(candidate, session.device),
    }
    return _Prepared(candidate, 1 if option.one_model else 2, fields)


def _tensors(drawn: Any) -> list[Tensor]:
    return [drawn] if isinstance(drawn, Tensor) else list(drawn)


def _timed(case: Case, draws: Draws, prepared: dict[str, _Prepared], session: Session) -> Iterator[Record]:
    candidates = [*(one.candidate for one in prepared.values()), *copies(case.work, [draws.logits])]
    timings, failed = rounds(case, candidates, session)
    for name, error in failed.items():
        yield skipped(case, name, reason(error))
    names = list(timings.rounds[0])
    for name in names:
        fields = time_fields(timings, name, [other for other in _REFERENCES if other in names], "forward")
        models = 2
        if name in prepared:
            models = prepared[name].models
            fields |= prepared[name].fields
        fields["gb_per_s"] = models * draws.logits.nbytes / fields["median_ms"] / 1e6
        yield record(case.kind, case.work, name, "forward", **fields)
