"""What the library takes by default, and beside it other libraries, each in a process of its own: one that does not
import, hangs or crashes costs its own figures only.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from dlogp_kernels import reference_sample

from .. import bench_linear_policy_loss as policy_step
from ..baselines import bare_matmuls
from ..harness import Candidate, NotMeasuredError, WrongResultError
from ..peers import PEERS, Peer
from ..problem import build
from ..shapes import Workload
from . import timing
from .child import Case, Entry, Session
from .timing import Sizes, Timed

#: Of logits that are rounded to bfloat16.
_LIMITS = {"statistic": 0.2, "gradient": 0.1}
_BATCH, _TOP_P = 64, 0.7
#: Mass by which a filter may be looser: others sum in float32.
_SLACK = 1e-3


def cases(session: Session) -> list[Case]:
    """Those of visit 1 without the configurations that it compares."""
    return timing.cases(session, _sizes(session))


def peers(session: Session) -> list[Case]:
    """The peers of the request's group."""
    sizes = _sizes(session)
    found = []
    for peer in PEERS[session.group]:
        runs = {"linear_policy_loss": _policy_step, "extrapolated_sample": _sampling}
        if peer.op in runs:
            found.append(Case(f"{peer.op} beside {peer.name}", partial(runs[peer.op], session, sizes, peer)))
            continue
        for training in (False, True)[: 1 + bool(peer.gives)]:
            name = f"{peer.op}{' training' if training else ''} beside {peer.name}"
            found.append(Case(name, partial(_linear, session, sizes, peer, training)))
    return found


def _sizes(session: Session) -> Sizes:
    return timing.sizes_of(session)._replace(single=(), pair=(), draws=(), gemm=(), policy_rows=())


def _loaded(session: Session, peer: Peer) -> Callable[..., Any]:
    session.watch(f"import of {peer.name}")
    try:
        return peer.load()
    except ImportError as error:
        raise NotMeasuredError(f"does not import: {error}") from error


def _linear(session: Session, sizes: Sizes, peer: Peer, training: bool) -> Iterator[Entry]:
    function = _loaded(session, peer)
    work = Workload(peer.op, sizes.heads[0], sizes.n, sizes.dtype, training)
    session.watch("inputs")
    problem = build(work, session.device)
    ours = timing.ours(problem, timing.truth_check(session, problem), "ours", nullcontext)
    asked = problem.asking(peer.gives) if training else problem
    check = partial(timing.truth_check(session, asked, _LIMITS), function)
    found = [Timed(bare_matmuls(problem)[0]), ours, Timed(asked.candidate(peer.name, function), check)]
    yield from timing.measured(session, found, timing.products(work), "ours")


def _policy_step(session: Session, sizes: Sizes, peer: Peer) -> Iterator[Entry]:
    function = _loaded(session, peer)
    work = Workload(peer.op, sizes.heads[0], sizes.n, sizes.dtype, training=True)
    session.watch("inputs")
    step = policy_step.build(work, session.device)
    theirs = timing.policy_candidate(step, peer.name, lambda given: function(**given.inputs), ours=False)
    found = [timing.policy_candidate(step, "ours", policy_step.ours), theirs]
    one = 2.0 * work.n * work.shape.v * work.shape.d
    yield from timing.measured(session, found, timing.tflop(one, 2 * one), "ours")


def _sampling(session: Session, sizes: Sizes, peer: Peer) -> Iterator[Entry]:
    function = _loaded(session, peer)
    work, inputs = timing.sampling_inputs(session, peer.op, _BATCH)
    logits = inputs["logits"]

    def check() -> Mapping[str, float]:
        tokens = function(logits, _TOP_P).long()
        kept = reference_sample.kept_tokens(logits.double(), 0, _TOP_P + _SLACK, 0.0)
        excluded = (~kept.gather(-1, tokens[:, None])).double().mean().item()
        if excluded:
            raise WrongResultError(f"{excluded:.0%} of the tokens are excluded by the filter")
        return {"excluded": excluded}

    one_model = {"logits": logits, "base_logits": logits}
    found = [
        timing.sampler(peer.op, "ours", nullcontext, inputs, {"top_p": _TOP_P}),
        timing.sampler(peer.op, "ours, one model", nullcontext, one_model, {"top_p": _TOP_P, "criterion": "none"}),
        Timed(Candidate(peer.name, partial(function, logits, _TOP_P)), check),
    ]
    yield from timing.measured(session, found, timing.gigabytes(timing.sampling_bytes(work)), "ours")
