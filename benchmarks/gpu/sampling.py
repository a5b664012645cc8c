"""Cases of kind "sample": a step of decoding from a pair's logits, and ordinary sampling from one model's."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlogp_kernels import backends

from .. import sampling
from ..harness import Candidate, verify
from ..memory import MIB, peak_over
from ..peers import Peer, peers_for
from ..records import Record, record, time_fields
from ..sampling import Draw, Draws
from ..shapes import Workload, require_fit
from .cases import Case
from .session import (
    Option,
    Session,
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
_REFERENCES = ("ours", "ours, one model", "eager", "copy")


@dataclass(frozen=True)
class _Option(Option):
    """`one_model`: it looks at the RL model's logits alone."""

    one_model: bool = False


class _Prepared(NamedTuple):
    candidate: Candidate
    models: int
    fields: dict[str, Any]


def records(case: Case, session: Session) -> Iterator[Record]:
    require_fit(case.work, "ours", session.device)
    draws = sampling.build(case.work, session.device)
    options = _options(case.work, session)
    found = yield from prepared(case, options, partial(_prepared, draws, session), session)
    if found:
        yield from _timed(case, draws, found, session)


def _options(work: Workload, session: Session) -> Iterator[_Option]:
    ours = _Option("ours", lambda: sampling.ours)
    yield ours
    for backend in backends.BACKENDS:
        # Those for the CPU have nothing to do on a GPU.
        if backends.unavailable(backend, work.op, session.device) is None or backend not in ("cpu", "gemm"):
            yield forced(ours, backend, work.op)
    yield _Option("ours, all replaced", lambda: sampling.ours_all_replaced)
    yield _Option("ours, one model", lambda: sampling.ours_one_model, one_model=True)
    yield _Option("eager", lambda: sampling.eager)
    yield _Option("compiled", _compiled)
    yield from map(_of_peer, peers_for(work, session.peers))


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


def _prepared(draws: Draws, session: Session, option: _Option) -> _Prepared:
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


def _timed(case: Case, draws: Draws, by_name: dict[str, _Prepared], session: Session) -> Iterator[Record]:
    candidates = [*(own.candidate for own in by_name.values()), *copies(case.work, [draws.logits])]
    timings, failed = rounds(case, candidates, session)
    for name, error in failed.items():
        yield skipped(case, name, reason(error))
    names = list(timings.rounds[0])
    for name in names:
        fields = time_fields(timings, name, [other for other in _REFERENCES if other in names], "forward")
        models = 2
        if name in by_name:
            models = by_name[name].models
            fields |= by_name[name].fields
        fields["gb_per_s"] = models * draws.logits.nbytes / fields["median_ms"] / 1e6
        yield record(case.kind, case.work, name, "forward", **fields)
