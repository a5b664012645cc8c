"""What the GPU needs for each op, beside products by cuBLAS and copies, in rounds that every candidate takes part in.

A candidate is checked against float64 first: what is wrong gets no time. Several configurations of a kernel are
candidates of one case; the fastest is written as configs.py takes it. Peers have a process of their own each: one that
does not import, hangs or crashes costs its own figures only.
"""

import itertools
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import Sample, backends
from dlogp_kernels.demo.memory import peak_over

from .. import bench_policy, bench_statistics, timing
from ..bench_sampling import check_draws
from ..floors import bare_copy
from ..memory import MIB
from ..peers import PEERS, Peer
from ..problem import Problem, Truth, build
from ..shapes import Shape, Workload
from ..timing import BASELINE, OURS, PHASES, Budget, Candidate, Clock, NotMeasuredError, verify
from . import library
from .child import Case, Entry, Session, failure, usable

Context = Callable[[], AbstractContextManager[None]]
Options = dict[str, Any]
#: Of what multiplies there: their sums are truncated.
_ON_TENSOR_CORES = OURS | {"output": 1e-3}
_FILTERS: Mapping[str, Options] = {"top-p 0.7": {"top_p": 0.7}, "no filter": {}}


class Sizes(NamedTuple):
    """What is measured, scaled: REAL, PREWARM (the same kernels, few rows) or TINY."""

    n: int
    heads: tuple[Shape, ...]
    logits_n: int
    batches: tuple[int, ...]
    responses: tuple[int, int]
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
    n=8192, logits_n=2048, batches=(1, 64, 512), responses=(256, 4096), copy=2**30,
    heads=(Shape("D 4096", 4096, 151_936), Shape("D 896", 896, 151_936), Shape("D 2048", 2048, 128_256)),
    single=(*((128, 256, 64, 8, 3, group) for group in (8, 16, 32)), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
    pair=(*((128, 128, 64, 8, 4, group) for group in (8, 16, 32)), (128, 128, 64, 8, 5), (128, 128, 128, 8, 3)),
    draws=((64, 64, 64, 8, 3), (64, 64, 64, 8, 8), (64, 64, 64, 4, 8), (64, 64, 128, 8, 6), (64, 128, 64, 8, 8)),
    gemm=((1024, 4096), (2048, 4096), (4096, 4096), (8192, 1024)),
    policy_rows=((384, 1920), (512, 2048), (1024, 4096)),
)  # fmt: skip
PREWARM = REAL._replace(n=512, logits_n=64, copy=2**20)
TINY = Sizes(
    n=8, logits_n=4, batches=(2,), responses=(2, 16), copy=2**16,
    heads=(Shape("D 16", 16, 130), Shape("D 8", 8, 60)),
    single=((32, 64, 32, 1, 1), (16, 128, 16, 1, 1)), pair=((32, 64, 32, 1, 1),), draws=((32, 64, 32, 1, 1),),
    gemm=((32, 128), (16, 128)), policy_rows=((16, 16),), dtype="float32", budget=Budget(seconds=0.0, least=1, most=1),
)  # fmt: skip


def cases(session: Session, configurations: bool = True) -> list[Case]:
    """In order of importance: what time runs out on is left out."""
    sizes = _sizes(session)
    if not configurations:
        sizes = sizes._replace(single=(), pair=(), draws=(), gemm=(), policy_rows=())
    head = sizes.heads[0]

    def case(name: str, run: Callable[..., Iterator[Entry]], *arguments: Any) -> Case:
        return Case(name, partial(run, session, sizes, *arguments))

    def linear(op: str, head: Shape, training: bool = False) -> Case:
        return case(f"{op} {head.name}{' training' * training}", _linear, op, head, training)

    # The host's time first: a process that has profiled its kernels launches more slowly.
    found = [case("host time", _host)] + ([] if session.prewarm else [case("ceilings", _ceilings)])
    found += [linear("linear_logp", head), linear("linear_delta_logp", head), linear("linear_logp", head, True)]
    found += [case("linear_policy_loss", _policy_step)]
    for batch in sizes.batches:
        for name, options in _FILTERS.items():
            found.append(
                case(f"extrapolated_sample B {batch} {name}", _sampling, "extrapolated_sample", batch, options)
            )
    found += [case("policy_loss", _policy_loss), linear("linear_delta_logp", head, True)]
    found += [case(op, _logits, op) for op in ("logp", "delta_logp")]
    found += [linear(op, other) for other in sizes.heads[1:] for op in ("linear_logp", "linear_delta_logp")]
    op = "linear_extrapolated_sample"
    return found + [case(f"{op} B {batch}", _sampling, op, batch, {}) for batch in sizes.batches[:2]]


def headline(session: Session) -> list[Case]:
    """The same by what is chosen by default, where visit 1 compares configurations."""
    return cases(session, configurations=False)


def peers(session: Session) -> list[Case]:
    """The peers of the request's group, each beside ours."""
    sizes, found = _sizes(session), []
    for peer in PEERS[session.group]:
        for training in (False, True)[: 1 + bool(peer.gives)]:
            run = (
                partial(_policy_step, session, sizes)
                if "policy" in peer.op
                else partial(_linear, session, sizes, peer.op, sizes.heads[0], training)
            )
            found.append(Case(f"{peer.op}{' training' * training} beside {peer.name}", partial(run, peer=peer)))
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


def measured(
    session: Session, found: Sequence[Candidate], unit: str, forward: float, backward: float = 0.0
) -> Iterator[Entry]:
    """Entries of all candidates that are right; the others are compared with the first.

    Forward and backward need so many operations, unit "tflops", or bytes, "gb_per_s".
    """
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


def _within(context: Context, call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        with context():
            return call(*arguments, **options)

    return called


def _loaded(session: Session, peer: Peer) -> Callable[..., Any]:
    session.watch(f"import of {peer.name}")
    try:
        return peer.load()
    except ImportError as error:
        raise NotMeasuredError(f"does not import: {error}") from error


def _inputs(session: Session, work: Workload) -> Problem:
    session.watch("inputs")
    return build(work, session.device)


def _ceilings(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """cuBLAS with bf16 and with float32 output, and a copy."""
    head = sizes.heads[0]
    inputs = _inputs(session, Workload("linear_logp", head, sizes.n, sizes.dtype)).inputs
    hidden, weight = inputs["hidden"], inputs["weight"].t()
    found = []
    for name, dtype in (("bf16", hidden.dtype), ("float32", torch.float32)):
        out = torch.empty(sizes.n, head.v, dtype=dtype, device=session.device)
        wider, product = torch.ops.aten.mm.dtype_out, partial(torch.mm, hidden, weight, out=out)
        call = product if dtype == hidden.dtype else partial(wider, hidden, weight, dtype, out=out)
        found.append(Candidate(f"cuBLAS {name} out", call))
    yield from measured(session, found, "tflops", 2.0 * sizes.n * head.v * head.d)
    yield from measured(session, [bare_copy(session.device, 2.0 * sizes.copy)], "gb_per_s", 2.0 * sizes.copy)


def _candidates(session: Session, problem: Problem, limits: Mapping[str, float]) -> Callable[..., Candidate]:
    """Makes functions of the problem's inputs candidates, compared with float64 on some rows."""
    session.watch("float64")
    truth = None if session.prewarm else Truth(problem)

    def timed(name: str, function: Callable[..., Any], context: Context = nullcontext, **facts: Any) -> Candidate:
        function = _within(context, function)
        plain = problem.candidate(name, function)
        backward = None if plain.backward is None else _within(context, plain.backward)
        check = None if truth is None else _within(context, partial(truth.errors, function))
        return Candidate(name, plain.forward, backward, check, limits, facts)

    return timed


def _linear(
    session: Session, sizes: Sizes, op: str, head: Shape, training: bool, peer: Peer | None = None
) -> Iterator[Entry]:
    """Bare products, the default, every configuration of the fused kernel and tile of the GEMM; or a peer beside ours.

    In training every tile of backward; of a pair that is trained the base is frozen.
    """
    work = Workload(op, head, sizes.n, sizes.dtype, training)
    problem = _inputs(session, work)
    # Products of N·V·D: one a model, in backward once more and two for the gradients of the model that is trained.
    one = 2.0 * work.n * head.v * head.d
    cost = ("tflops", one * (1 + work.pair), one * (3 + work.pair) * training)
    timed, function = _candidates(session, problem, _ON_TENSOR_CORES), getattr(dlogp_kernels, op)
    ours, products = timed("ours", function), bench_statistics.floor(problem)
    if peer is not None:
        beside = _candidates(session, problem.asking(peer.gives) if training else problem, BASELINE)
        theirs = beside(peer.name, _loaded(session, peer), note=peer.note)
        yield from measured(session, [ours, products[0], theirs], *cost)
        return

    def tiled(name: str, backend: str, tile: tuple[int, int]) -> Candidate:
        context = partial(library.gemm, *tile, backend=backend)
        return timed(f"{name} {tile[0]}x{tile[1]}", function, context, config=f"gemm tile {tile}")

    def configured(config: Any) -> Candidate:
        name = library.named(config)
        return timed(name.removeprefix("Config"), function, partial(library.fused, config), config=name)

    configs = [library.configs.Config(*shape) for shape in (sizes.pair if work.pair else sizes.single)]
    found = [*map(configured, configs), *(tiled("gemm", "gemm", tile) for tile in sizes.gemm)]
    if training:
        found = [tiled("backward tile", "triton", tile) for tile in sizes.gemm[1:]]
    yield from measured(session, [*products, ours, *found], *cost)


def _policy_step(session: Session, sizes: Sizes, peer: Peer | None = None) -> Iterator[Entry]:
    """Reweighting, which others have not, is off where a form is checked."""
    work = Workload("linear_policy_loss", sizes.heads[0], sizes.n, sizes.dtype, training=True)
    session.watch("inputs")
    step = bench_policy.build_step(work, session.device)
    limits = bench_policy.LINEAR_LIMITS["eager" if peer else "ours"]

    def timed(name: str, function: Callable[..., Tensor], context: Context = nullcontext, **plain: Any) -> Candidate:
        function = _within(context, function)
        check = partial(bench_policy.linear_errors_of, partial(function, **plain), step)
        return Candidate(name, partial(function, step), step.gradients, check, limits)

    found: list[Candidate] = [timed("ours", bench_policy.linear_ours, library.fused, reweight="none")]
    if peer is None:
        found = [*bench_policy.linear_floor(step), *found]
        for rows in sizes.policy_rows:
            context = partial(library.policy_rows, *rows)
            found.append(timed(f"rows {rows}", bench_policy.linear_ours, context, reweight="none"))
    else:
        theirs = _loaded(session, peer)
        found.append(timed(peer.name, lambda step: theirs(**step.inputs)))
    one = 2.0 * work.n * work.shape.v * work.shape.d
    yield from measured(session, found, "tflops", one, 2 * one)


def _logits(session: Session, sizes: Sizes, op: str) -> Iterator[Entry]:
    work = Workload(op, Shape("given", 0, sizes.heads[0].v), sizes.logits_n, sizes.dtype, training=True)
    problem = _inputs(session, work)
    # Backward reads the logits again and writes a gradient.
    size = float(work.n * work.shape.v * work.element_size)
    forward, backward = size * (1 + work.pair), size * (2 + work.pair)
    ours = _candidates(session, problem, OURS)("triton", getattr(dlogp_kernels, op), library.fused)
    found = [bare_copy(session.device, forward, backward), ours]
    yield from measured(session, found, "gb_per_s", forward, backward)


def _sampling(session: Session, sizes: Sizes, op: str, batch: int, options: Options) -> Iterator[Entry]:
    """Both backends beside a copy of both models' logits, or weights."""
    work = Workload(op, sizes.heads[0], batch, sizes.dtype)
    inputs = {name: x for name, x in _inputs(session, work).inputs.items() if name != "target"}
    chosen: Options = {"gamma": 0.5, "seed": 7, **options}

    def ours(name: str, context: Context, **facts: Any) -> Candidate:
        draw = _within(context, partial(getattr(dlogp_kernels, op), **inputs, **chosen))

        def check() -> Mapping[str, float]:
            few = {name: x if "weight" in name else x[:4] for name, x in inputs.items()}
            return check_draws(Sample(*(x[:4] for x in draw())), few, chosen, OURS["output"])

        return Candidate(name, draw, None, check, OURS, facts)

    size = 2.0 * work.element_size * work.shape.v * (work.shape.d if work.linear else batch)
    found: list[Candidate] = [bare_copy(session.device, size)]
    for backend in ("triton", "cuda"):
        problem = backends.unavailable(backend, op, session.device)
        if problem is None:
            found.append(ours(backend, partial(backends.use_backend, backend)))
        elif not work.linear:
            yield {"candidate": backend, "status": "skipped", "error": problem}
    for config in (library.configs.Config(*shape) for shape in sizes.draws if work.linear):
        name = library.named(config)
        found.append(ours(name.removeprefix("Config"), partial(library.fused, config), config=name))
    yield from measured(session, found, "gb_per_s", size)


def _policy_loss(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """float32: reads logp, old_logp, mask and writes the gradient unscaled; backward reads that and scales it."""
    session.watch("inputs")
    batch = bench_policy.build_batch(*sizes.responses, session.device)
    loss = bench_policy.DAPO
    check = partial(bench_policy.errors_of, partial(bench_policy.ours, reweight="none"), batch, loss)
    forward, backward = 13.0 * batch.logp.numel(), 8.0 * batch.logp.numel()
    ours = Candidate("ours", partial(bench_policy.ours, batch, loss), batch.gradient, check, bench_policy.LIMITS)
    eager = Candidate("eager", partial(bench_policy.trl_loss, batch, loss), batch.gradient)
    found = [bare_copy(session.device, forward, backward), ours, eager]
    yield from measured(session, found, "gb_per_s", forward, backward)


def _host(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """Microseconds until a call returns, of inputs so small that the GPU keeps up."""
    shape = Shape("small", 64, 4096) if session.on_gpu else sizes.heads[0]
    works = (Workload(op, shape, 1, sizes.dtype) for op in ("linear_logp", "linear_delta_logp", "delta_logp"))
    given: list[Options] = [{**_inputs(session, work).inputs} for work in works]
    one, pair, logits = given
    del logits["target"]
    batch, steps = bench_policy.build_batch(2, 16, session.device), itertools.count()
    calls: dict[str, Callable[[], Any]] = {
        "linear_logp": lambda: dlogp_kernels.linear_logp(**one),
        "linear_delta_logp": lambda: dlogp_kernels.linear_delta_logp(**pair),
        # The step changes at every call, as in decoding.
        "extrapolated_sample": lambda: dlogp_kernels.extrapolated_sample(**logits, seed=1, step=next(steps), top_p=0.7),
        "policy_loss": lambda: bench_policy.ours(batch, bench_policy.DAPO),
        "policy_loss with backward": lambda: batch.gradient(bench_policy.ours(batch, bench_policy.DAPO)),
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
