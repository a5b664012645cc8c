"""What the GPU needs for each op, beside products by cuBLAS and copies, in rounds that every candidate takes part in.

A candidate is checked against float64 first: what is wrong gets no time. Several configurations of a kernel are
candidates of one case; the fastest is written as configs.py takes it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends

from .. import bench_linear_policy_loss as policy_step
from .. import bench_policy_loss as given_policy
from .. import policy
from ..baselines import bare_matmuls
from ..harness import Budget, Candidate, Clock, Sample, measure, quantiles, verify
from ..memory import MIB, peak_over
from ..problem import Problem, Truth, build
from ..shapes import Shape, Workload
from . import library
from .child import Case, DeviceLostError, Entry, Session, failure, usable
from .draws import check_draws

#: Of statistics: absolute; of gradients: relative.
_LIMITS = {"statistic": 1e-3, "gradient": 0.03}
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
    gemm: tuple[tuple[int, int], ...]
    #: Of linear_policy_loss: rows of a slice of logits, and of a block of gradients.
    policy_rows: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    budget: Budget = Budget(seconds=2.0, least=5, most=9)


REAL = Sizes(
    n=8192,
    heads=(Shape("d4096", 4096, 151_936), Shape("d896", 896, 151_936), Shape("d2048", 2048, 128_256)),
    logits_n=2048,
    batches=(1, 64, 512),
    linear_batches=(1, 64),
    responses=(256, 4096),
    copy=2**30,
    single=((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
    pair=((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 6), (128, 128, 128, 8, 3), (128, 64, 64, 8, 4)),
    gemm=((1024, 4096), (2048, 4096), (4096, 4096), (8192, 1024)),
    policy_rows=((512, 1536), (512, 2048), (1024, 4096)),
)
PREWARM = REAL._replace(n=512, logits_n=64, copy=2**20)
TINY = Sizes(
    n=24,
    heads=(Shape("tiny", 16, 300), Shape("tiny d8", 8, 200)),
    logits_n=8,
    batches=(1, 3),
    linear_batches=(2,),
    responses=(2, 16),
    copy=2**16,
    single=((32, 64, 32, 1, 1), (16, 128, 16, 1, 1)),
    pair=((32, 64, 32, 1, 1),),
    gemm=((32, 128), (16, 128)),
    policy_rows=((16, 16),),
    dtype="float32",
    budget=Budget(seconds=0.0, least=1, most=1),
)
_GROUPS = (8, 32)


@dataclass(frozen=True)
class Timed:
    """A candidate; `check()` gives its errors, and raises if they are too large."""

    candidate: Candidate
    check: Callable[[], Mapping[str, float]] | None = None
    config: str | None = None

    @property
    def name(self) -> str:
        return self.candidate.name


class Cost(NamedTuple):
    """Operations and bytes of a forward, and of a backward."""

    flops: tuple[float, float] = (0.0, 0.0)
    bytes: tuple[float, float] = (0.0, 0.0)


def cases(session: Session) -> list[Case]:
    """In order of importance: what time runs out on is left out."""
    sizes = TINY if session.tiny else PREWARM if session.prewarm else REAL
    head = sizes.heads[0]
    found: list[Case] = []

    def add(name: str, run: Callable[..., Iterable[Entry]], *arguments: Any) -> None:
        found.append(Case(name, partial(run, session, sizes, *arguments)))

    if not session.prewarm:
        add("ceilings", _ceilings)
    add(f"linear_logp {head.name}", _forward, "linear_logp", head)
    add(f"linear_delta_logp {head.name}", _forward, "linear_delta_logp", head)
    add(f"linear_logp {head.name} training", _training, "linear_logp", head)
    add("linear_policy_loss", _policy_step)
    for batch in sizes.batches:
        for name, options in (("top-p 0.7", {"top_p": 0.7}), ("no filter", {})):
            add(f"extrapolated_sample B {batch} {name}", _sampling, batch, options)
    add("policy_loss", _policy_loss)
    add(f"linear_delta_logp {head.name} training", _training, "linear_delta_logp", head)
    for op in ("logp", "delta_logp"):
        add(op, _logits, op)
    add("host time", _host)
    for head in sizes.heads[1:]:
        for op in ("linear_logp", "linear_delta_logp"):
            add(f"{op} {head.name}", _forward, op, head)
    for batch in sizes.linear_batches:
        add(f"linear_extrapolated_sample B {batch}", _linear_sampling, batch)
    return found


class _WatchedClock(Clock):
    """Says whose turn it is before each sample, so that what hangs has a name."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.device)
        self._session = session

    def sample(self, candidate: Candidate, repeats: int = 1) -> Sample:
        self._session.watch(candidate.name)
        return super().sample(candidate, repeats)


def _measured(
    session: Session, sizes: Sizes, found: Sequence[Timed], cost: Cost, against: str | None = None
) -> Iterator[Entry]:
    """Entries of all candidates that are right; `against` is the one that the others are compared with."""
    right: list[Timed] = []
    notes: dict[str, Entry] = {}
    for timed in found:
        if timed.name in session.excluded.get(session.case, []):
            continue
        session.watch(timed.name)
        try:
            notes[timed.name] = _checked(session, timed)
            right.append(timed)
        except Exception as error:
            yield {**failure(error), "candidate": timed.name}
            if not usable(session.device):
                raise DeviceLostError from error
    if session.prewarm or not right:
        return
    timings = measure([timed.candidate for timed in right], sizes.budget, _WatchedClock(session))
    names = [timed.name for timed in right]
    for timed in right:
        phases = ("forward", "backward", "both") if timed.candidate.backward is not None else ("forward",)
        for phase in phases:
            seconds = timings.quantiles(timed.name, phase)
            work = [
                {"forward": x[0], "backward": x[1], "both": x[0] + x[1]}[phase] if phases[1:] else x[0]
                for x in (cost.flops, cost.bytes)
            ]
            entry: Entry = {
                "candidate": timed.name,
                "phase": phase,
                "ms": 1e3 * seconds.median,
                "spread": [1e3 * seconds.p20, 1e3 * seconds.p80],
                "rounds": len(timings.rounds),
            }
            if work[0]:
                entry["tflops"] = work[0] / seconds.median / 1e12
            if work[1]:
                entry["gb_per_s"] = work[1] / seconds.median / 1e9
            if against in names and against != timed.name:
                # How much of the reference's speed it has.
                entry["of"] = [against, 1 / timings.ratio(timed.name, against, phase).median]
            if timed.config is not None:
                entry["config"] = timed.config
            yield entry | (notes[timed.name] if phase == phases[-1] else {})


def _checked(session: Session, timed: Timed) -> Entry:
    """One call, compiled; its memory over inputs and outputs, and its errors."""
    candidate = timed.candidate
    if session.prewarm:
        _step(candidate)
        return {}
    errors = dict(timed.check()) if timed.check is not None else {}
    _step(candidate)  # what a first call allocates for good does not count
    entry: Entry = {"error_of": errors} if errors else {}
    if session.on_gpu:
        entry["peak_mib"] = peak_over(lambda: _step(candidate), session.device).peak / MIB
    return entry


def _step(candidate: Candidate) -> list[Tensor]:
    outputs = candidate.forward()
    gradients = candidate.backward(outputs) if candidate.backward is not None else ()
    return [x for x in (*_tensors(outputs), *_tensors(gradients))]


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, tuple | list):
        for output in outputs:
            yield from _tensors(output)


def _within(context: Callable[[], AbstractContextManager[None]], call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        with context():
            return call(*arguments, **options)

    return called


def _ceilings(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """cuBLAS with bf16 and float32 output, whole and in blocks of the vocabulary, and a copy."""
    head = sizes.heads[0]
    problem = build(Workload("linear_logp", head, sizes.n, sizes.dtype), session.device)
    hidden, weight = problem.inputs["hidden"], problem.inputs["weight"]
    flops = 2.0 * sizes.n * head.v * head.d
    narrow = torch.empty(sizes.n, head.v, dtype=hidden.dtype, device=session.device)
    wide = torch.empty(sizes.n, head.v, dtype=torch.float32, device=session.device)

    def product(out: Tensor, block: int) -> None:
        for first in range(0, head.v, block):
            part = out.view(-1)[: sizes.n * min(block, head.v - first)].view(sizes.n, -1)
            _product(hidden, weight[first : first + block].t(), part)

    found = [
        Timed(Candidate(f"cuBLAS {name} out{where}", partial(product, out, block)))
        for name, out in (("bf16", narrow), ("float32", wide))
        for where, block in (("", head.v), (" by 16384", 16384))
    ]
    yield from _measured(session, sizes, found, Cost(flops=(flops, 0.0)), found[0].name)
    del narrow, wide
    source = torch.empty(sizes.copy, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    copy = Timed(Candidate("copy of 1 GiB", lambda: target.copy_(source)))
    yield from _measured(session, sizes, [copy], Cost(bytes=(2.0 * sizes.copy, 0.0)))


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


def _forward(session: Session, sizes: Sizes, op: str, head: Shape) -> Iterator[Entry]:
    """Every configuration of the fused kernel, and every tile of the GEMM, of one op at one shape."""
    work = Workload(op, head, sizes.n, sizes.dtype)
    problem, bare = _prepared(session, work)
    check = _truth_check(session, problem)
    shapes = sizes.pair if work.pair else sizes.single
    found = [_configured(op, problem, check, library.tile(*shape)) for shape in shapes]
    for tile in sizes.gemm:
        name = f"gemm {tile[0]}x{tile[1]}"
        found.append(_ours(op, problem, check, name, partial(library.gemm, *tile), f"gemm tile {tile}"))
    flops = 2.0 * work.n * head.v * head.d * (1 + work.pair)
    cost = Cost(flops=(flops, 0.0))
    entries = list(_measured(session, sizes, [*bare, *found], cost, bare[0].name))
    yield from entries
    if head is not sizes.heads[0] or not library.has_group():
        return
    best = _fastest([e for e in entries if str(e.get("config", "")).startswith("Config")])
    shape = next((shape for shape in shapes if best is not None and best in library.named(library.tile(*shape))), None)
    shape = shapes[0] if shape is None else shape
    groups = [_configured(op, problem, check, library.tile(*shape, group=group)) for group in _GROUPS]
    yield from _measured(session, sizes, [*bare, *groups], cost, bare[0].name)


def _fastest(entries: Iterable[Entry]) -> str | None:
    timed = [entry for entry in entries if "ms" in entry]
    return min(timed, key=lambda entry: entry["ms"])["config"] if timed else None


def _prepared(session: Session, work: Workload) -> tuple[Problem, list[Timed]]:
    session.watch("inputs")
    problem = build(work, session.device)
    bare = [Timed(candidate) for candidate in bare_matmuls(problem)] if work.linear else []
    return problem, bare


def _truth_check(session: Session, problem: Problem) -> Callable[[Any], Mapping[str, float]] | None:
    if session.prewarm:
        return None
    session.watch("float64")
    truth = Truth(problem)

    def check(function: Any) -> Mapping[str, float]:
        errors = truth.errors(function)
        limits = {name: _LIMITS["gradient" if name.startswith("d_") else "statistic"] for name in errors}
        verify(problem.work.op, errors, limits)
        return errors

    return check


def _ours(
    op: str,
    problem: Problem,
    check: Callable[[Any], Mapping[str, float]] | None,
    name: str,
    context: Callable[[], AbstractContextManager[None]],
    config: str | None = None,
) -> Timed:
    function = _within(context, getattr(dlogp_kernels, op))
    plain = problem.candidate(name, function)
    backward = None if plain.backward is None else _within(context, plain.backward)
    candidate = Candidate(name, plain.forward, backward)

    def within_check() -> Mapping[str, float]:
        assert check is not None
        with context():
            return check(function)

    return Timed(candidate, None if check is None else within_check, config)


def _configured(op: str, problem: Problem, check: Callable[[Any], Mapping[str, float]] | None, config: Any) -> Timed:
    text = library.named(config)
    return _ours(op, problem, check, text.removeprefix("Config"), partial(library.fused, config), text)


def _training(session: Session, sizes: Sizes, op: str, head: Shape) -> Iterator[Entry]:
    """Forward and backward (of a pair with a frozen base), beside as many products of N·V·D."""
    work = Workload(op, head, sizes.n, sizes.dtype, training=True)
    problem, bare = _prepared(session, work)
    check = _truth_check(session, problem)
    found = [_ours(op, problem, check, "triton", library.fused)]
    for tile in sizes.gemm[1:]:
        name = f"backward tile {tile[0]}x{tile[1]}"
        found.append(_ours(op, problem, check, name, partial(library.backward_tile, *tile), f"gemm tile {tile}"))
    one = 2.0 * work.n * head.v * head.d
    forward = one * (1 + work.pair)
    cost = Cost(flops=(forward, forward + 2 * one))
    yield from _measured(session, sizes, [*bare, *found], cost, bare[0].name)


def _policy_step(session: Session, sizes: Sizes) -> Iterator[Entry]:
    head = sizes.heads[0]
    work = Workload(policy_step.OP, head, sizes.n, sizes.dtype, training=True)
    session.watch("inputs")
    step = policy_step.build(work, session.device)

    def timed(name: str, context: Callable[[], AbstractContextManager[None]]) -> Timed:
        def check() -> Mapping[str, float]:
            with context():
                errors = policy_step.errors_of(partial(policy_step.ours, reweight="none"), step)
            verify(work.op, errors, {x: _LIMITS["gradient" if x.startswith("d_") else "statistic"] for x in errors})
            return errors

        return Timed(Candidate(name, _within(context, partial(policy_step.ours, step)), step.gradients), check)

    found = [*map(Timed, policy_step.bare_products(step)), timed("ours", library.fused)]
    found += [timed(f"rows {rows}", partial(library.policy_rows, *rows)) for rows in sizes.policy_rows]
    one = 2.0 * work.n * head.v * head.d
    yield from _measured(session, sizes, found, Cost(flops=(one, 2 * one)), found[0].name)


def _copy(device: torch.device, size: float) -> Timed:
    """Moves `size` bytes: reads half as many, and writes them."""
    source = torch.zeros(max(16, int(size) // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Timed(Candidate("copy", lambda: target.copy_(source)))


def _logits(session: Session, sizes: Sizes, op: str) -> Iterator[Entry]:
    work = Workload(op, Shape("v", 0, sizes.heads[0].v), sizes.logits_n, sizes.dtype, training=True)
    problem, _ = _prepared(session, work)
    check = _truth_check(session, problem)
    # Backward reads the logits again and writes a gradient.
    size = float(work.n * work.shape.v * work.element_size)
    forward, backward = size * (1 + work.pair), size * (2 + work.pair)
    copies = [_copy(session.device, forward).candidate, _copy(session.device, backward).candidate]
    copy = Timed(Candidate("copy", copies[0].forward, lambda _: copies[1].forward()))
    ours = _ours(op, problem, check, "triton", library.fused)
    yield from _measured(session, sizes, [copy, ours], Cost(bytes=(forward, backward)), "copy")


def _sampling(session: Session, sizes: Sizes, batch: int, options: dict[str, Any]) -> Iterator[Entry]:
    work = Workload("extrapolated_sample", Shape("v", 0, sizes.heads[0].v), batch, sizes.dtype)
    session.watch("inputs")
    inputs: dict[str, Any] = {name: x for name, x in build(work, session.device).inputs.items() if name != "target"}
    chosen: dict[str, Any] = {"gamma": 0.5, "seed": 7, **options}

    def call() -> Any:
        return dlogp_kernels.extrapolated_sample(**inputs, **chosen)

    size = 2.0 * batch * work.shape.v * work.element_size
    found = [_copy(session.device, size)]
    for backend in ("triton", "cuda"):
        problem = backends.unavailable(backend, "extrapolated_sample", session.device)
        if problem is None:
            found.append(_sampler(backend, call, inputs, chosen))
        else:
            yield {"candidate": backend, "status": "skipped", "error": problem}
    yield from _measured(session, sizes, found, Cost(bytes=(size, 0.0)), "copy")


def _sampler(backend: str, call: Callable[[], Any], inputs: Mapping[str, Tensor], chosen: dict[str, Any]) -> Timed:
    within = _within(partial(backends.use_backend, backend), call)

    def check() -> Mapping[str, float]:
        rows = slice(0, 4)
        exact = {name: (x if "weight" in name else x[rows]).double() for name, x in inputs.items()}
        if "hidden" in exact:
            z, base_z = (exact[f"{prefix}hidden"] @ exact[f"{prefix}weight"].t() for prefix in ("", "base_"))
        else:
            z, base_z = exact["logits"], exact["base_logits"]
        drawn = within()
        few = type(drawn)(*(x[rows] for x in drawn))
        rest = {name: value for name, value in chosen.items() if name != "seed"}
        ties, error = check_draws(few, z, base_z, seed=chosen["seed"], step=0, slack=_LIMITS["statistic"], options=rest)
        return {"logp": error, "ties": float(ties)}

    return Timed(Candidate(backend, within), check)


def _linear_sampling(session: Session, sizes: Sizes, batch: int) -> Iterator[Entry]:
    head = sizes.heads[0]
    work = Workload("linear_extrapolated_sample", head, batch, sizes.dtype)
    session.watch("inputs")
    inputs: dict[str, Any] = {name: x for name, x in build(work, session.device).inputs.items() if name != "target"}
    chosen: dict[str, Any] = {"gamma": 0.5, "seed": 7}

    def call() -> Any:
        return dlogp_kernels.linear_extrapolated_sample(**inputs, **chosen)

    size = 2.0 * head.v * head.d * work.element_size
    found = [_copy(session.device, size), _sampler("triton", call, inputs, chosen)]
    cost = Cost(flops=(4.0 * batch * head.v * head.d, 0.0), bytes=(size, 0.0))
    yield from _measured(session, sizes, found, cost, "copy")


def _policy_loss(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """float32: reads logp, old_logp, mask and writes a coefficient; backward reads that and writes the gradient."""
    session.watch("inputs")
    batch = policy.build(*sizes.responses, session.device)
    tokens = float(batch.logp.numel())
    forward, backward = 13 * tokens, 8 * tokens

    def check() -> Mapping[str, float]:
        errors = given_policy.errors_of(partial(given_policy.ours, reweight="none"), batch, policy.DAPO)
        verify(given_policy.OP, errors, given_policy.TOLERANCES)
        return errors

    def gradient(loss: Any) -> Tensor:
        return torch.autograd.grad(loss, batch.logp)[0]

    copies = [_copy(session.device, size).candidate for size in (forward, backward)]
    found = [
        Timed(Candidate("copy", copies[0].forward, lambda _: copies[1].forward())),
        Timed(
            Candidate("ours", _within(library.fused, partial(given_policy.ours, batch, policy.DAPO)), gradient), check
        ),
        Timed(Candidate("eager", partial(policy.trl_loss, batch, policy.DAPO), gradient)),
    ]
    yield from _measured(session, sizes, found, Cost(bytes=(forward, backward)), "copy")


def _host(session: Session, sizes: Sizes) -> Iterator[Entry]:
    """Microseconds until a call returns, of inputs so small that the GPU keeps up."""
    shape = Shape("small", 64, 4096) if session.on_gpu else sizes.heads[0]
    one: dict[str, Any] = {**build(Workload("linear_logp", shape, 1, sizes.dtype), session.device).inputs}
    pair: dict[str, Any] = {**build(Workload("linear_delta_logp", shape, 1, sizes.dtype), session.device).inputs}
    draw_from: dict[str, Any] = {**build(Workload("delta_logp", shape, 1, sizes.dtype), session.device).inputs}
    del draw_from["target"]
    batch = policy.build(2, 16, session.device)
    calls: dict[str, Callable[[int], Any]] = {
        "linear_logp": lambda i: dlogp_kernels.linear_logp(**one),
        "linear_delta_logp": lambda i: dlogp_kernels.linear_delta_logp(**pair),
        # The step changes at every call, as in decoding.
        "extrapolated_sample": lambda i: dlogp_kernels.extrapolated_sample(**draw_from, seed=7, step=i, top_p=0.7),
        "policy_loss": lambda i: given_policy.ours(batch, policy.DAPO),
        "policy_loss with backward": lambda i: torch.autograd.grad(given_policy.ours(batch, policy.DAPO), batch.logp),
    }
    repeats = 2 if session.tiny or session.prewarm else _HOST_CALLS
    for name, call in calls.items():
        session.watch(name)
        try:
            yield {"candidate": name, "host_us": 1e6 * _host_seconds(session, call, repeats)}
        except Exception as error:
            yield {**failure(error), "candidate": name}


def _host_seconds(session: Session, call: Callable[[int], Any], repeats: int) -> float:
    for i in range(min(repeats, 20)):
        call(i)
    seconds = []
    for i in range(repeats):
        if session.on_gpu and i % 50 == 0:
            torch.cuda.synchronize(session.device)
        start = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - start)
    return quantiles(seconds).median
