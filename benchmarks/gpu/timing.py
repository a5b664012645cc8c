"""What the GPU needs for each op, beside products by cuBLAS and copies, in rounds that every candidate takes part in.

A candidate is checked against float64 first: what is wrong gets no time. Several configurations of a kernel are
candidates of one case; the fastest is written as configs.py takes it. Peers have a process of their own each: one that
does not import, hangs or crashes costs its own figures only.
"""

import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from dlogp_kernels import backends
from dlogp_kernels.demo.memory import peak_over

from .. import bench_policy, bench_sampling, timing
from ..cases import BENCHES, MIB
from ..floors import Cost, bare_copy, cost
from ..peers import PEERS, Peer
from ..problem import Problem
from ..shapes import Shape, Workload
from ..timing import BASELINE, PHASES, Budget, Candidate, Clock, NotMeasuredError
from .processes import Case, Entry, Session, failure, usable

configs: Any
try:
    from dlogp_kernels.triton import configs
except ImportError:  # without Triton nothing of it is measured
    configs = None

#: Of draws: every row draws twice, by the options of the earlier figures.
_DRAWS = {"gamma": 0.5, "seed": 7}
#: How ours is called, its name then, and what its entry says of it.
Variants = Iterator[tuple[Callable[[], AbstractContextManager[None]], str, Entry]]


class Sizes(NamedTuple):
    """What is measured, scaled: REAL, PREWARM (the same kernels, few rows) or TINY."""

    n: int
    heads: tuple[Shape, ...]
    logits_n: int
    batches: tuple[int, ...]
    #: Of given log-probabilities.
    tokens: int
    #: Bytes of the copy that is a ceiling.
    copy: int
    #: Block rows, tokens, dims, warps, stages, group: of one model, of a pair, of draws from hidden states.
    single: tuple[tuple[int, ...], ...]
    pair: tuple[tuple[int, ...], ...]
    draws: tuple[tuple[int, ...], ...]
    #: Rows, tokens of the tiles of a GEMM.
    gemm: tuple[tuple[int, int], ...]
    #: Of linear_policy_loss: rows of a slice of logits at least, and of a block of gradients at most.
    policy_rows: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    budget: Budget = Budget(seconds=2.0, least=5, most=9)


REAL = Sizes(
    n=8192, logits_n=2048, batches=(1, 64, 512), tokens=256 * 4096, copy=2**30,
    heads=(
        Shape("D 4096", 4096, 151_936), Shape("D 896", 896, 151_936), Shape("D 2048", 2048, 128_256),
        Shape("D 8192", 8192, 128_256),
    ),
    single=((128, 256, 64, 8, 3, 32), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
    pair=((128, 128, 64, 8, 4), (128, 128, 64, 8, 5), (128, 128, 128, 8, 3)),
    draws=((64, 64, 64, 8, 3), (64, 64, 64, 8, 8), (64, 64, 64, 4, 8), (64, 64, 128, 8, 6), (64, 128, 64, 8, 8)),
    gemm=((2048, 4096), (4096, 4096)),
    policy_rows=((256, 1536), (256, 1792), (512, 4096)),
)  # fmt: skip
PREWARM = REAL._replace(n=512, logits_n=64, copy=2**20)
TINY = Sizes(
    n=8, logits_n=4, batches=(2,), tokens=32, copy=2**16,
    heads=(Shape("D 16", 16, 40),),
    single=((32, 64, 32, 1, 1), (16, 128, 16, 1, 1)), pair=((32, 64, 32, 1, 1),), draws=((32, 64, 32, 1, 1),),
    gemm=((16, 64), (16, 32)), policy_rows=((16, 16),), dtype="float32", budget=Budget(seconds=0.0, least=1, most=1),
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
    found += [linear("linear_logp", other, True) for other in others]
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
        for training in (False, True) if peer.gives else (False,):
            work = Workload(peer.op, sizes.heads[0], sizes.n, sizes.dtype, training or "policy" in peer.op)
            name = f"{peer.op}{' training' * training} beside {peer.name}"
            found.append(Case(name, partial(_timed, session, sizes, work, peer)))
    return found


def _sizes(session: Session) -> Sizes:
    return TINY if session.tiny else PREWARM if session.prewarm else REAL


def measured(session: Session, found: Sequence[Candidate], needs: Cost) -> Iterator[Entry]:
    """Entries of all candidates that are right; the others are compared with the first."""
    scale = 1e12 if needs.unit == "tflops" else 1e9
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
    timings = timing.measure([*right.values()], _sizes(session).budget, Clock(session.device, session.watch))
    first = found[0].name
    for name, candidate in right.items():
        phases = PHASES if candidate.backward is not None else PHASES[:1]
        for phase in phases:
            seconds, needed = timings.quantiles(name, phase), getattr(needs, phase) / scale
            entry: Entry = {
                "candidate": name, "phase": phase, "ms": 1e3 * seconds.median, "rounds": len(timings.rounds),
                "spread": [1e3 * seconds.p20, 1e3 * seconds.p80], needs.unit: needed / seconds.median,
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
        entry["error_of"] = candidate.errors()
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


def _timed(session: Session, sizes: Sizes, work: Workload, peer: Peer | None = None) -> Iterator[Entry]:
    """Bare products, or a copy of as many bytes; ours in all variants; of policy losses TRL's. Or ours and a peer."""
    session.watch("inputs")
    bench, needs = BENCHES[work.op], cost(work)
    problem = bench.build(work, session.device)
    by_name = {candidate.name: candidate for candidate in bench.candidates(problem)}
    if needs.unit == "tflops":
        floor = bench.floor(problem)
    else:
        floor = [bare_copy(session.device, needs.forward, needs.backward if work.training else None)]
    if peer is not None:
        found = [by_name["ours"], floor[0], _of_peer(session, problem, peer)]
    else:
        draws = "sample" in work.op
        ours = bench_sampling.of_ours(problem, "ours", _DRAWS) if draws else by_name["ours"]
        for backend in ("triton", "cuda") if draws and not work.linear else ():
            reason = backends.unavailable(backend, work.op, session.device)
            if reason is not None:
                yield {"candidate": backend, "status": "skipped", "error": reason}
        found = [*floor, *(ours.within(*variant) for variant in _variants(session, sizes, work))]
        found += [by_name["TRL"]] if "TRL" in by_name else []
    yield from measured(session, found, needs)


def _ceilings(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """cuBLAS with output of the inputs' dtype and with float32 output, and a copy."""
    work = Workload("linear_logp", sizes.heads[0], sizes.n, sizes.dtype)
    inputs = BENCHES[work.op].build(work, session.device).inputs
    hidden, weight, found = inputs["hidden"], inputs["weight"].t(), []
    for name, dtype in (("bf16", hidden.dtype), ("float32", torch.float32)):
        out = torch.empty(work.n, work.shape.v, dtype=dtype, device=session.device)
        wider, product = torch.ops.aten.mm.dtype_out, partial(torch.mm, hidden, weight, out=out)
        call = product if dtype == hidden.dtype else partial(wider, hidden, weight, dtype, out=out)
        found.append(Candidate(f"cuBLAS {name} out", call))
    yield from measured(session, found, cost(work))
    size = 2.0 * sizes.copy
    yield from measured(session, [bare_copy(session.device, size)], Cost("gb_per_s", size))


def _of_peer(session: Session, problem: Problem, peer: Peer) -> Candidate:
    session.watch(f"import of {peer.name}")
    try:
        function = peer.load()
    except ImportError as error:
        raise NotMeasuredError(f"does not import: {error}") from error
    if "policy" in peer.op:
        return bench_policy.as_others(problem).candidate(peer.name, function, bench_policy.LINEAR_LIMITS["eager"])
    candidate = problem.asking(peer.gives).candidate(peer.name, function, BASELINE)
    return replace(candidate, facts={"note": peer.note})


def _variants(session: Session, sizes: Sizes, work: Workload) -> Variants:
    """The default, every configuration of the fused kernel and tile of a GEMM; in training every tile of backward."""
    draws, head = "sample" in work.op, work.op in ("linear_logp", "linear_delta_logp")
    for backend in ("triton", "cuda") if draws else ():
        if backends.unavailable(backend, work.op, session.device) is None:
            yield partial(backends.use_backend, backend), backend, {}
    if not draws:
        yield nullcontext if head else fused, "ours", {}
    if head and _has_kernels_beside_those_chosen(session, work):
        yield partial(backends.use_backend, "cuda"), "cuda", {}
    if work.op == "linear_policy_loss":
        for rows in sizes.policy_rows:
            yield partial(policy_rows, *rows), f"rows {rows}", {}
    elif work.linear and not work.training:
        for shape in sizes.draws if draws else sizes.pair if work.pair else sizes.single:
            config = configs.Config(*shape)
            name = f"({', '.join(map(str, config))})"
            yield partial(fused, config), name, {"config": f"Config{name}"}
    if head:
        name, backend = ("backward tile", "triton") if work.training else ("gemm", "gemm")
        for tile in sizes.gemm[work.training :]:
            context = partial(gemm, *tile, backend=backend)
            yield context, f"{name} {tile[0]}x{tile[1]}", {"config": f"gemm tile {tile}"}


def _has_kernels_beside_those_chosen(session: Session, work: Workload) -> bool:
    """Whether "cuda" could serve a pass that another backend serves by default."""
    at = session.device, getattr(torch, work.dtype)
    ops = [f"{work.op}_{phase}" for phase in ("fwd", "bwd")[: 1 + work.training]]
    chosen = {backends.select(op, *at, work.shape.d) for op in ops}
    return chosen != {"cuda"} and all(backends.unavailable("cuda", op, *at) is None for op in ops)


def _host(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """Microseconds until a call returns, of inputs so small that the GPU keeps up."""
    shape = Shape("small", 64, 4096) if session.on_gpu else sizes.heads[0]
    wait = torch.cuda.synchronize if session.on_gpu else lambda: None
    number = 50 if session.on_gpu and not session.prewarm else 1
    variants = {"linear_logp": "", "linear_delta_logp": "", "extrapolated_sample": "top-p 0.7", "policy_loss": "DAPO"}
    for op, variant in variants.items():
        training = op == "policy_loss"
        work = Workload(op, shape, 32 if training else 1, "float32" if training else sizes.dtype, training, variant)
        session.watch(op)
        try:
            problem = BENCHES[op].build(work, session.device)
            draws = "sample" in op
            ours = bench_sampling.of_ours(problem, op, {"seed": 1}) if draws else BENCHES[op].candidates(problem)[0]
            for name, call in [(op, ours.forward), (f"{op} with backward", ours.step)][: 1 + training]:
                session.watch(name)
                call()
                seconds = timing.quantiles(timeit.repeat(call, wait, number=number, repeat=7)).median
                yield {"candidate": name, "host_us": 1e6 * seconds / number}
        except Exception as error:
            yield {**failure(error), "candidate": op}


@contextmanager
def fused(config: Any | None = None) -> Iterator[None]:
    """Ops by the Triton kernels, with this tile."""
    with backends.use_backend("triton"), nullcontext() if config is None else configs.use_config(config):
        yield


@contextmanager
def gemm(rows: int, tokens: int, backend: str = "gemm") -> Iterator[None]:
    """Ops by the vendor's GEMM, with tiles of this size; by "triton", its backward has them."""
    names = ("_GEMM_TILE", "_BACKWARD_TILE", "_INTERPRETED_GEMM_TILE")
    tiles: dict[str, Any] = dict.fromkeys(names, (rows, tokens))
    with backends.use_backend(backend), patch.multiple(configs, **tiles):
        yield


@contextmanager
def policy_rows(of_slice: int, of_block: int) -> Iterator[None]:
    """`linear_policy_loss` by the Triton kernels, with so many rows of logits at least, and of gradients at most."""
    from dlogp_kernels.triton import linear_policy_loss as launcher

    rows: dict[str, Any] = {"_SLICE_ROWS": of_slice, "_BLOCK_ROWS": of_block}
    # The default workspace would cut larger ones down.
    with backends.use_backend("triton"), backends.workspace_limit(2**30), patch.multiple(launcher, **rows):
        yield
