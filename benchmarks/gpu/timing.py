"""What the GPU needs for each op, beside products by cuBLAS and copies, in rounds that every candidate takes part in.

A candidate is checked against float64 first: what is wrong gets no time. Several configurations of a kernel are
candidates of one case; the fastest is written as configs.py takes it. Peers have a process of their own each: one that
does not import, hangs or crashes costs its own figures only.
"""

import itertools
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.demo.memory import peak_over

from .. import bench_policy, timing
from ..cases import BENCHES
from ..floors import Cost, bare_copy, cost
from ..memory import MIB
from ..peers import PEERS, Peer
from ..problem import build
from ..shapes import Shape, Workload
from ..timing import BASELINE, PHASES, Budget, Candidate, Clock, NotMeasuredError, verify
from . import library
from .processes import Case, Entry, Session, failure, usable

#: By name: how ours is called, and what the entry says of it.
Variants = Iterator[tuple[str, Callable[[], AbstractContextManager[None]], Entry]]


class Sizes(NamedTuple):
    """What is measured, scaled: REAL, PREWARM (the same kernels, few rows) or TINY."""

    n: int
    heads: tuple[Shape, ...]
    logits_n: int
    batches: tuple[int, ...]
    tokens: int
    copy: int
    #: Block rows, tokens, dims, warps, stages, group: of one model, of a pair, of draws from hidden states.
    single: tuple[tuple[int, ...], ...]
    pair: tuple[tuple[int, ...], ...]
    draws: tuple[tuple[int, ...], ...]
    #: Rows, tokens of the tiles of a GEMM.
    gemm: tuple[tuple[int, int], ...]
    #: Of linear_policy_loss: rows of a slice of logits, and of a block of gradients.
    policy_rows: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    budget: Budget = Budget(seconds=2.0, least=5, most=9)


REAL = Sizes(
    n=8192, logits_n=2048, batches=(1, 64, 512), tokens=256 * 4096, copy=2**30,
    heads=(Shape("D 4096", 4096, 151_936), Shape("D 896", 896, 151_936), Shape("D 2048", 2048, 128_256)),
    single=(*((128, 256, 64, 8, 3, group) for group in (8, 16, 32)), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
    pair=(*((128, 128, 64, 8, 4, group) for group in (8, 16, 32)), (128, 128, 64, 8, 5), (128, 128, 128, 8, 3)),
    draws=((64, 64, 64, 8, 3), (64, 64, 64, 8, 8), (64, 64, 64, 4, 8), (64, 64, 128, 8, 6), (64, 128, 64, 8, 8)),
    gemm=((1024, 4096), (2048, 4096), (4096, 4096), (8192, 1024)),
    policy_rows=((384, 1920), (512, 2048), (1024, 4096)),
)  # fmt: skip
PREWARM = REAL._replace(n=512, logits_n=64, copy=2**20)
TINY = Sizes(
    n=8, logits_n=4, batches=(2,), tokens=32, copy=2**16,
    heads=(Shape("D 16", 16, 70),),
    single=((32, 64, 32, 1, 1), (16, 128, 16, 1, 1)), pair=((32, 64, 32, 1, 1),), draws=((32, 64, 32, 1, 1),),
    gemm=((16, 64), (16, 48)), policy_rows=((16, 16),), dtype="float32", budget=Budget(seconds=0.0, least=1, most=1),
)  # fmt: skip


def cases(session: Session, configurations: bool = True) -> list[Case]:
    """In order of importance: what time runs out on is left out."""
    sizes = _sizes(session)
    if not configurations:
        sizes = sizes._replace(single=(), pair=(), draws=(), gemm=(), policy_rows=())
    first, *others = sizes.heads

    def case(name: str, op: str, shape: Shape, n: int, dtype: str = sizes.dtype, **changes: Any) -> Case:
        return Case(name, partial(_timed, session, sizes, Workload(op, shape, n, dtype, **changes)))

    def linear(op: str, head: Shape, training: bool = False) -> Case:
        return case(f"{op} {head.name}{' training' * training}", op, head, sizes.n, training=training)

    # The host's time first: a process that has profiled its kernels launches more slowly.
    found = [Case("host time", partial(_host, session, sizes))]
    found += [] if session.prewarm else [Case("ceilings", partial(_ceilings, session, sizes))]
    found += [linear("linear_logp", first), linear("linear_delta_logp", first), linear("linear_logp", first, True)]
    found += [case("linear_policy_loss", "linear_policy_loss", first, sizes.n, training=True)]
    op = "extrapolated_sample"
    for batch in sizes.batches:
        for variant in ("top-p 0.7", ""):
            found += [case(f"{op} B {batch} {variant or 'no filter'}", op, first, batch, variant=variant)]
    losses: dict[str, Any] = {"dtype": "float32", "training": True, "variant": "DAPO"}
    found += [case("policy_loss", "policy_loss", bench_policy.SHAPE, sizes.tokens, **losses)]
    found += [linear("linear_delta_logp", first, True)]
    given = Shape("given", 0, first.v)
    found += [case(op, op, given, sizes.logits_n, training=True) for op in ("logp", "delta_logp")]
    found += [linear(op, other) for other in others for op in ("linear_logp", "linear_delta_logp")]
    op = "linear_extrapolated_sample"
    return found + [case(f"{op} B {batch}", op, first, batch) for batch in sizes.batches[:2]]


def prewarm(session: Session) -> list[Case]:
    """Of the request's group i/n every n-th one."""
    first, step = map(int, session.group.split("/"))
    return cases(session)[first::step]


def headline(session: Session) -> list[Case]:
    """The same by what is chosen by default, where visit 1 compares configurations."""
    return cases(session, configurations=False)


def peers(session: Session) -> list[Case]:
    """The peers of the request's group, each beside ours."""
    sizes, found = _sizes(session), []
    for peer in PEERS[session.group]:
        policy = "policy" in peer.op
        for training in (True,) if policy else (False, True)[: 1 + bool(peer.gives)]:
            work = Workload(peer.op, sizes.heads[0], sizes.n, sizes.dtype, training)
            name = f"{peer.op}{' training' * (training and not policy)} beside {peer.name}"
            found.append(Case(name, partial(_beside, session, work, peer)))
    return found


def _sizes(session: Session) -> Sizes:
    return TINY if session.tiny else PREWARM if session.prewarm else REAL


class _WatchedClock(Clock):
    """Says whose turn it is before each sample, so that what hangs has a name."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.device)
        self._session = session

    def sample(self, candidate: Candidate, repeats: int = 1) -> timing.Sample:
        self._session.watch(candidate.name)
        return super().sample(candidate, repeats)


def measured(session: Session, found: Sequence[Candidate], needs: Cost) -> Iterator[Entry]:
    """Entries of all candidates that are right; the others are compared with the first."""
    unit, forward, backward = needs
    scale = 1e12 if unit == "tflops" else 1e9
    needed = {"forward": forward / scale, "backward": backward / scale, "both": (forward + backward) / scale}
    right: dict[str, Candidate] = {}
    notes: dict[str, Entry] = {}
    for candidate in found:
        name = candidate.name
        if name in session.excluded.get(session.case, []):
            continue
        session.watch(name)
        try:
            notes[name] = _checked(session, candidate)
            right[name] = candidate
        except Exception as error:
            yield {**failure(error), "candidate": name}
            if not usable(session.device):
                return
    if session.prewarm or not right:
        return
    timings = timing.measure([*right.values()], _sizes(session).budget, _WatchedClock(session))
    first = found[0].name
    for name, candidate in right.items():
        phases = PHASES if candidate.backward is not None else PHASES[:1]
        for phase in phases:
            seconds = timings.quantiles(name, phase)
            entry: Entry = {
                "candidate": name, "phase": phase, "ms": 1e3 * seconds.median, "rounds": len(timings.rounds),
                "spread": [1e3 * seconds.p20, 1e3 * seconds.p80], unit: needed[phase] / seconds.median,
            }  # fmt: skip
            if first in right and first != name:
                # How much of the reference's speed it has.
                entry["of"] = [first, 1 / timings.ratio(name, first, phase).median]
            if phase == phases[-1]:
                entry |= candidate.facts
            yield entry | notes[name]


def _checked(session: Session, candidate: Candidate) -> Entry:
    """The errors of a call; its memory over inputs and outputs, and the time of its kernels. Compiles it."""
    entry: Entry = {}
    if candidate.check is not None and not session.prewarm:
        entry["error_of"] = errors = dict(candidate.check())
        verify(candidate.name, errors, candidate.limits)
    if session.on_gpu or not entry:
        # What a first call allocates for good does not count. Where no memory is measured, the check was that call.
        candidate.step()
    if session.on_gpu and not session.prewarm:
        entry["peak_mib"] = peak_over(candidate.step, session.device).extra / MIB
        entry["kernels_us"] = _kernels(candidate)
    return entry


def _kernels(candidate: Candidate) -> dict[str, float]:
    """Microseconds of the GPU in each kernel of a call, the longest first: what is left where the host takes longer."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        candidate.step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:80]: event.self_device_time_total for event in events[:10] if event.self_device_time_total > 0}


def _timed(session: Session, sizes: Sizes, work: Workload) -> Iterator[Entry]:
    """Bare products, or a copy of as many bytes; ours in all its variants; and of policy losses TRL's."""
    session.watch("inputs")
    bench, needs = BENCHES[work.op], cost(work)
    problem = bench.build(work, session.device)
    by_name = {candidate.name: candidate for candidate in bench.candidates(problem)}
    if needs.unit == "tflops":
        found = bench.floor(problem)
    else:
        found = [bare_copy(session.device, needs.forward, needs.backward if work.training else None)]
    # What draws has the most to do where every row draws twice.
    ours = by_name.get("ours, all replaced", by_name["ours"])
    found += [ours.within(context, name, **facts) for name, context, facts in _variants(session, sizes, work)]
    yield from measured(session, [*found, *(by_name[name] for name in ("TRL",) if name in by_name)], needs)


def _variants(session: Session, sizes: Sizes, work: Workload) -> Variants:
    """The default, every configuration of the fused kernel and tile of a GEMM; in training every tile of backward."""
    if "sample" in work.op:
        for backend in ("triton", "cuda"):
            if backends.unavailable(backend, work.op, session.device) is None:
                yield backend, partial(backends.use_backend, backend), {}
    elif work.op in ("linear_logp", "linear_delta_logp"):
        yield "ours", nullcontext, {}
    else:
        yield "ours", library.fused, {}
    if "policy" in work.op:
        for rows in sizes.policy_rows if work.linear else ():
            yield f"rows {rows}", partial(library.policy_rows, *rows), {}
    elif work.linear and not work.training:
        for shape in sizes.draws if "sample" in work.op else sizes.pair if work.pair else sizes.single:
            config = library.configs.Config(*shape)
            name = library.named(config)
            yield name.removeprefix("Config"), partial(library.fused, config), {"config": name}
    if work.op in ("linear_logp", "linear_delta_logp"):
        name, backend = ("backward tile", "triton") if work.training else ("gemm", "gemm")
        for tile in sizes.gemm[work.training :]:
            context = partial(library.gemm, *tile, backend=backend)
            yield f"{name} {tile[0]}x{tile[1]}", context, {"config": f"gemm tile {tile}"}


def _beside(session: Session, work: Workload, peer: Peer) -> Iterator[Entry]:
    session.watch("inputs")
    bench = BENCHES[work.op]
    problem = bench.build(work, session.device)
    ours = next(candidate for candidate in bench.candidates(problem) if candidate.name == "ours")
    session.watch(f"import of {peer.name}")
    try:
        function = peer.load()
    except ImportError as error:
        raise NotMeasuredError(f"does not import: {error}") from error
    if "policy" in work.op:
        theirs = bench_policy.as_others(problem).candidate(peer.name, function, bench_policy.LINEAR_LIMITS["eager"])
        yield from measured(session, [ours.within(library.fused, "ours"), theirs], cost(work))
    else:
        asked = problem.asking(peer.gives) if work.training else problem
        theirs = replace(asked.candidate(peer.name, function, BASELINE), facts={"note": peer.note})
        yield from measured(session, [ours, bench.floor(problem)[0], theirs], cost(work))


def _ceilings(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """cuBLAS with bf16 and with float32 output, and a copy."""
    work = Workload("linear_logp", sizes.heads[0], sizes.n, sizes.dtype)
    session.watch("inputs")
    inputs = build(work, session.device).inputs
    hidden, weight = inputs["hidden"], inputs["weight"].t()
    found = []
    for name, dtype in (("bf16", hidden.dtype), ("float32", torch.float32)):
        out = torch.empty(sizes.n, work.shape.v, dtype=dtype, device=session.device)
        wider, product = torch.ops.aten.mm.dtype_out, partial(torch.mm, hidden, weight, out=out)
        call = product if dtype == hidden.dtype else partial(wider, hidden, weight, dtype, out=out)
        found.append(Candidate(f"cuBLAS {name} out", call))
    yield from measured(session, found, cost(work))
    size = 2.0 * sizes.copy
    yield from measured(session, [bare_copy(session.device, size)], Cost("gb_per_s", size))


def _host(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """Microseconds until a call returns, of inputs so small that the GPU keeps up."""
    session.watch("inputs")
    shape = Shape("small", 64, 4096) if session.on_gpu else sizes.heads[0]

    works = (Workload(op, shape, 1, sizes.dtype) for op in ("linear_logp", "linear_delta_logp", "delta_logp"))
    given: list[dict[str, Any]] = [{**build(work, session.device).inputs} for work in works]
    one, pair, logits = given
    del logits["target"]
    batch: Any = bench_policy.build_batch(2, 16, session.device)
    batch["logp"].requires_grad_()
    steps = itertools.count()

    def loss() -> Tensor:
        return dlogp_kernels.policy_loss(**batch).loss

    calls: dict[str, Callable[[], Any]] = {
        "linear_logp": lambda: dlogp_kernels.linear_logp(**one),
        "linear_delta_logp": lambda: dlogp_kernels.linear_delta_logp(**pair),
        # The step changes at every call, as in decoding.
        "extrapolated_sample": lambda: dlogp_kernels.extrapolated_sample(
            **logits, gamma=0.5, seed=1, step=next(steps), top_p=0.7
        ),
        "policy_loss": loss,
        "policy_loss with backward": lambda: torch.autograd.grad(loss(), batch["logp"]),
    }
    wait = torch.cuda.synchronize if session.on_gpu else lambda: None
    number = 50 if session.on_gpu and not session.prewarm else 1
    for name, call in calls.items():
        session.watch(name)
        try:
            call()
            seconds = timing.quantiles(timeit.repeat(call, wait, number=number, repeat=7)).median
            yield {"candidate": name, "host_us": 1e6 * seconds / number}
        except Exception as error:
            yield {**failure(error), "candidate": name}
