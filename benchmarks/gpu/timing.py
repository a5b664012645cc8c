"""What the GPU needs for each op, beside products by cuBLAS and copies, in rounds that every candidate takes part in.

A candidate is checked against float64 first: what is wrong gets no time. Several configurations of a kernel are
candidates of one case; the fastest is written as configs.py takes it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import Sample, backends

from .. import bench_linear_policy_loss as policy_step
from .. import bench_policy_loss as given_policy
from .. import harness, policy
from ..baselines import bare_matmuls
from ..harness import PHASES, Budget, Candidate, Clock, verify
from ..memory import MIB, peak_over
from ..problem import Problem, Truth, build
from ..shapes import Shape, Workload
from . import library
from .child import Case, DeviceLostError, Entry, Session, failure, usable
from .draws import check_draws

#: Largest error of a statistic, absolute, and of a gradient, relative.
LIMITS = {"statistic": 1e-3, "gradient": 0.03}
_SEED = 7
_HOST_CALLS = 200


class Sizes(NamedTuple):
    """What is measured, scaled: REAL, PREWARM (the same kernels, few rows) or TINY."""

    n: int
    heads: tuple[Shape, ...]
    logits_n: int
    batches: tuple[int, ...]
    linear_batches: tuple[int, ...]
    responses: tuple[int, int]
    copy: int
    #: Block rows, tokens, dims, warps, stages.
    single: tuple[tuple[int, ...], ...]
    pair: tuple[tuple[int, ...], ...]
    #: Rows, tokens.
    draws: tuple[tuple[int, ...], ...]
    gemm: tuple[tuple[int, int], ...]
    #: Of linear_policy_loss: rows of a slice of logits, and of a block of gradients.
    policy_rows: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    budget: Budget = Budget(seconds=2.0, least=5, most=9)


REAL = Sizes(
    n=8192,
    heads=(Shape("D 4096", 4096, 151_936), Shape("D 896", 896, 151_936), Shape("D 2048", 2048, 128_256)),
    logits_n=2048,
    batches=(1, 64, 512),
    linear_batches=(1, 64),
    responses=(256, 4096),
    copy=2**30,
    single=((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
    pair=(
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 5),
        (128, 128, 64, 8, 6),
        (128, 128, 128, 8, 3),
    ),
    draws=((64, 64, 64, 8, 3), (64, 64, 64, 8, 8), (64, 64, 64, 4, 8), (64, 64, 128, 8, 6), (64, 128, 64, 8, 8)),
    gemm=((1024, 4096), (2048, 4096), (4096, 4096), (8192, 1024)),
    policy_rows=((384, 1920), (512, 2048), (1024, 4096)),
)
PREWARM = REAL._replace(n=512, logits_n=64, copy=2**20)
TINY = Sizes(
    n=16,
    heads=(Shape("D 16", 16, 130), Shape("D 8", 8, 60)),
    logits_n=4,
    batches=(2,),
    linear_batches=(2,),
    responses=(2, 16),
    copy=2**16,
    single=((32, 64, 32, 1, 1), (16, 128, 16, 1, 1)),
    pair=((32, 64, 32, 1, 1),),
    draws=((32, 64, 32, 1, 1),),
    gemm=((32, 128), (16, 128)),
    policy_rows=((16, 16),),
    dtype="float32",
    budget=Budget(seconds=0.0, least=1, most=1),
)
_GROUPS = (8, 16, 24, 32)
FILTERS: Mapping[str, dict[str, Any]] = {"top-p 0.7": {"top_p": 0.7}, "no filter": {}}


@dataclass(frozen=True)
class Timed:
    """A candidate; `check()` gives its errors and raises if they are too large; `config` is as configs.py writes it."""

    candidate: Candidate
    check: Callable[[], Mapping[str, float]] | None = None
    config: str | None = None

    @property
    def name(self) -> str:
        return self.candidate.name


class Cost(NamedTuple):
    """Operations or bytes of forward and of backward, in units of the entry `speed`: TFLOP or GB."""

    speed: str
    forward: float
    backward: float = 0.0

    def of(self, phase: str) -> float:
        return self.forward + self.backward if phase == "both" else getattr(self, phase)


def tflop(forward: float, backward: float = 0.0) -> Cost:
    return Cost("tflops", forward / 1e12, backward / 1e12)


def gigabytes(forward: float, backward: float = 0.0) -> Cost:
    return Cost("gb_per_s", forward / 1e9, backward / 1e9)


def sizes_of(session: Session) -> Sizes:
    return TINY if session.tiny else PREWARM if session.prewarm else REAL


def cases(session: Session, sizes: Sizes | None = None) -> list[Case]:
    """In order of importance: what time runs out on is left out."""
    sizes = sizes_of(session) if sizes is None else sizes
    head = sizes.heads[0]

    def case(name: str, run: Callable[..., Iterator[Entry]], *arguments: Any) -> Case:
        return Case(name, partial(run, session, sizes, *arguments))

    def linear(op: str, head: Shape, training: bool = False) -> Case:
        return case(f"{op} {head.name}{' training' if training else ''}", _linear, op, head, training)

    def sampling(op: str, batches: Sequence[int], filters: Mapping[str, dict[str, Any]]) -> list[Case]:
        return [
            case(f"{op} B {batch} {name}", _sampling, op, batch, options)
            for batch in batches
            for name, options in filters.items()
        ]

    # The host's time first: a process that has profiled its kernels launches more slowly.
    found = [case("host time", _host)] + ([] if session.prewarm else [case("ceilings", _ceilings)])
    found += [linear("linear_logp", head), linear("linear_delta_logp", head), linear("linear_logp", head, True)]
    found += [case("linear_policy_loss", _policy_step), *sampling("extrapolated_sample", sizes.batches, FILTERS)]
    found += [case("policy_loss", _policy_loss), linear("linear_delta_logp", head, True)]
    found += [case(op, _logits, op) for op in ("logp", "delta_logp")]
    found += [linear(op, other) for other in sizes.heads[1:] for op in ("linear_logp", "linear_delta_logp")]
    return found + sampling("linear_extrapolated_sample", sizes.linear_batches, {"no filter": {}})


class _WatchedClock(Clock):
    """Says whose turn it is before each sample, so that what hangs has a name."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.device)
        self._session = session

    def sample(self, candidate: Candidate, repeats: int = 1) -> harness.Sample:
        self._session.watch(candidate.name)
        return super().sample(candidate, repeats)


def measured(session: Session, found: Sequence[Timed], cost: Cost, against: str | None = None) -> Iterator[Entry]:
    """Entries of all candidates that are right; `against` is the one that the others are compared with."""
    right: dict[str, Timed] = {}
    notes: dict[str, Entry] = {}
    for timed in found:
        if timed.name in session.excluded.get(session.case, []):
            continue
        session.watch(timed.name)
        try:
            notes[timed.name] = _checked(session, timed)
            right[timed.name] = timed
        except Exception as error:
            yield {**failure(error), "candidate": timed.name}
            if not usable(session.device):
                raise DeviceLostError from error
    if session.prewarm or not right:
        return
    candidates = [timed.candidate for timed in right.values()]
    timings = harness.measure(candidates, sizes_of(session).budget, _WatchedClock(session))
    for name, timed in right.items():
        phases = PHASES if timed.candidate.backward is not None else PHASES[:1]
        for phase in phases:
            seconds = timings.quantiles(name, phase)
            entry: Entry = {
                "candidate": name,
                "phase": phase,
                "ms": 1e3 * seconds.median,
                "spread": [1e3 * seconds.p20, 1e3 * seconds.p80],
                "rounds": len(timings.rounds),
                cost.speed: cost.of(phase) / seconds.median,
            }
            if against in right and against != name:
                # How much of the reference's speed it has.
                entry["of"] = [against, 1 / timings.ratio(name, against, phase).median]
            if timed.config is not None and phase == phases[-1]:
                entry["config"] = timed.config
            yield entry | notes[name]


def _checked(session: Session, timed: Timed) -> Entry:
    """The errors of a call, and the memory of one over inputs and outputs. Compiles it."""
    candidate = timed.candidate
    entry: Entry = {"error_of": dict(timed.check())} if timed.check is not None and not session.prewarm else {}
    _step(candidate)  # what a first call allocates for good does not count
    if session.on_gpu and not session.prewarm:
        entry["peak_mib"] = peak_over(lambda: _step(candidate), session.device).peak / MIB
        entry["kernels_us"] = _kernels(candidate)
    return entry


def _kernels(candidate: Candidate) -> dict[str, float]:
    """Microseconds of the GPU in each kernel of a call, the longest first: what is left where the host takes longer."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _step(candidate)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:80]: event.self_device_time_total for event in events[:10] if event.self_device_time_total > 0}


def _step(candidate: Candidate) -> list[Tensor]:
    outputs = candidate.forward()
    gradients = candidate.backward(outputs) if candidate.backward is not None else ()
    return [*_tensors(outputs), *_tensors(gradients)]


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, tuple | list):
        for output in outputs:
            yield from _tensors(output)


def within(context: Callable[[], AbstractContextManager[None]], call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        with context():
            return call(*arguments, **options)

    return called


def _ceilings(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """cuBLAS with bf16 and float32 output, whole and in blocks of the vocabulary, and a copy."""
    head = sizes.heads[0]
    inputs = build(Workload("linear_logp", head, sizes.n, sizes.dtype), session.device).inputs
    hidden, weight = inputs["hidden"], inputs["weight"]

    def product(out: Tensor, block: int) -> None:
        for first in range(0, head.v, block):
            part = out.view(-1)[: sizes.n * min(block, head.v - first)].view(sizes.n, -1)
            right = weight[first : first + block].t()
            if out.dtype == hidden.dtype:
                torch.mm(hidden, right, out=part)
            else:
                torch.ops.aten.mm.dtype_out(hidden, right, out.dtype, out=part)

    outputs = {
        f"cuBLAS {name} out": torch.empty(sizes.n, head.v, dtype=dtype, device=session.device)
        for name, dtype in (("bf16", hidden.dtype), ("float32", torch.float32))
    }
    found = [
        Timed(Candidate(f"{name}{where}", partial(product, out, block)))
        for name, out in outputs.items()
        for where, block in (("", head.v), (" by 16384", 16384))
    ]
    yield from measured(session, found, tflop(2.0 * sizes.n * head.v * head.d), found[0].name)
    yield from measured(session, [_copy(session.device, 2.0 * sizes.copy)], gigabytes(2.0 * sizes.copy))


def _copy(device: torch.device, forward: float, backward: float | None = None) -> Timed:
    """Moves so many bytes: reads half as many, and writes them."""

    def copy(size: float) -> Callable[..., Tensor]:
        source = torch.zeros(max(16, int(size) // 2), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda *_: target.copy_(source)

    return Timed(Candidate("copy", copy(forward), None if backward is None else copy(backward)))


def truth_check(
    session: Session, problem: Problem, limits: Mapping[str, float] = LIMITS
) -> Callable[[Any], Mapping[str, float]]:
    """A check of what a function of the problem's inputs returns, on some rows."""
    if session.prewarm:
        return lambda function: {}
    session.watch("float64")
    truth = Truth(problem)

    def check(function: Any) -> Mapping[str, float]:
        errors = truth.errors(function)
        verify(
            problem.work.op,
            errors,
            {name: limits["gradient" if name.startswith("d_") else "statistic"] for name in errors},
        )
        return errors

    return check


def ours(
    problem: Problem,
    check: Callable[[Any], Mapping[str, float]],
    name: str,
    context: Callable[[], AbstractContextManager[None]],
    config: str | None = None,
) -> Timed:
    """Our op of the problem, served as `context` says."""
    function = within(context, getattr(dlogp_kernels, problem.work.op))
    plain = problem.candidate(name, function)
    backward = None if plain.backward is None else within(context, plain.backward)
    return Timed(Candidate(name, plain.forward, backward), within(context, partial(check, function)), config)


def products(work: Workload) -> Cost:
    """Those of N·V·D: one a model, in backward once more and two for the gradients of the model that is trained."""
    one = 2.0 * work.n * work.shape.v * work.shape.d
    return tflop(one * (1 + work.pair), one * (3 + work.pair) if work.training else 0.0)


def _linear(session: Session, sizes: Sizes, op: str, head: Shape, training: bool) -> Iterator[Entry]:
    """The default, every configuration of the fused kernel, every tile of the GEMM; in training those of backward.

    Of a pair that is trained the base is frozen.
    """
    work = Workload(op, head, sizes.n, sizes.dtype, training)
    session.watch("inputs")
    problem = build(work, session.device)
    bare = list(map(Timed, bare_matmuls(problem)))
    check = truth_check(session, problem)
    first = [*bare, ours(problem, check, "ours", nullcontext)]

    def tiled(name: str, backend: str, tile: tuple[int, int]) -> Timed:
        context = partial(library.gemm, *tile, backend=backend)
        return ours(problem, check, f"{name} {tile[0]}x{tile[1]}", context, f"gemm tile {tile}")

    if training:
        tiles = [tiled("backward tile", "triton", tile) for tile in sizes.gemm[1:]]
        yield from measured(session, [*first, *tiles], products(work), bare[0].name)
        return

    def configured(config: Any) -> Timed:
        text = library.named(config)
        return ours(problem, check, text.removeprefix("Config"), partial(library.fused, config), text)

    configs = [library.tile(*shape) for shape in (sizes.pair if work.pair else sizes.single)]
    tiles = [tiled("gemm", "gemm", tile) for tile in sizes.gemm]
    entries = list(measured(session, [*first, *map(configured, configs), *tiles], products(work), bare[0].name))
    yield from entries
    if configs and head is sizes.heads[0]:
        seconds = {entry["config"]: entry["ms"] for entry in entries if "config" in entry}
        best = min(configs, key=lambda config: seconds.get(library.named(config), float("inf")))
        groups = [configured(library.with_group(best, group)) for group in _GROUPS if library.has_group()]
        yield from measured(session, [*bare, *groups], products(work), bare[0].name)


def _policy_step(session: Session, sizes: Sizes) -> Iterator[Entry]:
    work = Workload(policy_step.OP, sizes.heads[0], sizes.n, sizes.dtype, training=True)
    session.watch("inputs")
    step = policy_step.build(work, session.device)
    found = [
        *map(Timed, policy_step.bare_products(step)),
        policy_candidate(step, "ours", within(library.fused, policy_step.ours)),
    ]
    for rows in sizes.policy_rows:
        form = within(partial(library.policy_rows, *rows), policy_step.ours)
        found.append(policy_candidate(step, f"rows {rows}", form))
    one = 2.0 * work.n * work.shape.v * work.shape.d
    yield from measured(session, found, tflop(one, 2 * one), found[0].name)


def policy_candidate(step: policy_step.Step, name: str, function: Callable[..., Tensor], ours: bool = True) -> Timed:
    """A form of `linear_policy_loss`; reweighting, which others have not, is off where it is checked."""

    def check() -> Mapping[str, float]:
        errors = policy_step.errors_of(partial(function, reweight="none") if ours else function, step)
        found = {name: LIMITS["gradient" if name.startswith("d_") else "statistic"] for name in errors}
        verify(name, errors, found if ours else policy_step.TOLERANCES["eager"])
        return errors

    return Timed(Candidate(name, partial(function, step), step.gradients), check)


def _logits(session: Session, sizes: Sizes, op: str) -> Iterator[Entry]:
    work = Workload(op, Shape("given", 0, sizes.heads[0].v), sizes.logits_n, sizes.dtype, training=True)
    session.watch("inputs")
    problem = build(work, session.device)
    # Backward reads the logits again and writes a gradient.
    size = float(work.n * work.shape.v * work.element_size)
    forward, backward = size * (1 + work.pair), size * (2 + work.pair)
    found = [_copy(session.device, forward, backward)]
    found.append(ours(problem, truth_check(session, problem), "triton", library.fused))
    yield from measured(session, found, gigabytes(forward, backward), "copy")


def _sampling(session: Session, sizes: Sizes, op: str, batch: int, options: dict[str, Any]) -> Iterator[Entry]:
    work, inputs = sampling_inputs(session, op, batch)
    size = sampling_bytes(work)
    found = [_copy(session.device, size)]
    for backend in ("triton", "cuda") if op == "extrapolated_sample" else ("triton",):
        problem = backends.unavailable(backend, op, session.device)
        if problem is None:
            found.append(sampler(op, backend, partial(backends.use_backend, backend), inputs, options))
        else:
            yield {"candidate": backend, "status": "skipped", "error": problem}
    for config in (library.tile(*shape) for shape in sizes.draws if op.startswith("linear")):
        text = library.named(config)
        drawn = sampler(op, text.removeprefix("Config"), partial(library.fused, config), inputs, options)
        found.append(replace(drawn, config=text))
    yield from measured(session, found, gigabytes(size), "copy")


def sampling_inputs(session: Session, op: str, batch: int) -> tuple[Workload, dict[str, Any]]:
    sizes = sizes_of(session)
    work = Workload(op, sizes.heads[0], batch, sizes.dtype)
    session.watch("inputs")
    return work, {name: x for name, x in build(work, session.device).inputs.items() if name != "target"}


def sampling_bytes(work: Workload) -> float:
    """Both models' logits, or both weights."""
    return 2.0 * work.element_size * work.shape.v * (work.shape.d if work.linear else work.n)


def sampler(
    op: str,
    name: str,
    context: Callable[[], AbstractContextManager[None]],
    inputs: Mapping[str, Any],
    options: dict[str, Any],
) -> Timed:
    chosen = {"gamma": 0.5, **options}
    draw = within(context, partial(getattr(dlogp_kernels, op), **inputs, **chosen, seed=_SEED))

    def check() -> Mapping[str, float]:
        few = {name: x if "weight" in name else x[:4] for name, x in inputs.items()}
        return check_draws(Sample(*(x[:4] for x in draw())), few, _SEED, chosen, LIMITS["statistic"])["error_of"]

    return Timed(Candidate(name, draw), check)


def _policy_loss(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """float32: reads logp, old_logp, mask and writes a coefficient; backward reads that and writes the gradient."""
    session.watch("inputs")
    batch = policy.build(*sizes.responses, session.device)

    def check() -> Mapping[str, float]:
        errors = given_policy.errors_of(partial(given_policy.ours, reweight="none"), batch, policy.DAPO)
        verify(given_policy.OP, errors, given_policy.TOLERANCES)
        return errors

    def gradient(loss: Any) -> Tensor:
        return torch.autograd.grad(loss, batch.logp)[0]

    forward, backward = 13.0 * batch.logp.numel(), 8.0 * batch.logp.numel()
    found = [
        _copy(session.device, forward, backward),
        Timed(Candidate("ours", partial(given_policy.ours, batch, policy.DAPO), gradient), check),
        Timed(Candidate("eager", partial(policy.trl_loss, batch, policy.DAPO), gradient)),
    ]
    yield from measured(session, found, gigabytes(forward, backward), "copy")


def _host(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """Microseconds until a call returns, of inputs so small that the GPU keeps up."""
    shape = Shape("small", 64, 4096) if session.on_gpu else sizes.heads[0]

    def inputs(op: str) -> dict[str, Any]:
        return {**build(Workload(op, shape, 1, sizes.dtype), session.device).inputs}

    one, pair, logits = inputs("linear_logp"), inputs("linear_delta_logp"), inputs("delta_logp")
    del logits["target"]
    batch = policy.build(2, 16, session.device)
    calls: dict[str, Callable[[int], Any]] = {
        "linear_logp": lambda i: dlogp_kernels.linear_logp(**one),
        "linear_delta_logp": lambda i: dlogp_kernels.linear_delta_logp(**pair),
        # The step changes at every call, as in decoding.
        "extrapolated_sample": lambda i: dlogp_kernels.extrapolated_sample(**logits, seed=_SEED, step=i, top_p=0.7),
        "policy_loss": lambda i: given_policy.ours(batch, policy.DAPO),
        "policy_loss with backward": lambda i: torch.autograd.grad(given_policy.ours(batch, policy.DAPO), batch.logp),
    }
    for name, call in calls.items():
        session.watch(name)
        try:
            seconds = _host_seconds(session, call, _HOST_CALLS if session.on_gpu and not session.prewarm else 2)
            yield {"candidate": name, "host_us": 1e6 * seconds}
        except Exception as error:
            yield {**failure(error), "candidate": name}


def _host_seconds(session: Session, call: Callable[[int], Any], repeats: int) -> float:
    seconds = []
    for i in range(2 * repeats):
        if session.on_gpu and i % 50 == 0:
            torch.cuda.synchronize(session.device)
        start = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - start)
    return harness.quantiles(seconds[repeats:]).median
