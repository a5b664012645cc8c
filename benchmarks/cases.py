"""What is measured: the ops, their shapes in each mode, and how a case becomes rows of results."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from dlogp_kernels import backends
from dlogp_kernels.demo.memory import Peak, peak_over

from . import bench_generate, bench_policy, bench_sampling, bench_statistics
from .shapes import LONG_N, MAIN, MAIN_N, OTHER, SHAPES, SWEEP_N, Shape, Workload, require_fit, require_products
from .timing import PHASES, Budget, Candidate, Clock, NotMeasuredError, Timings, WrongResultError, measure

MODES = ("quick", "default", "full")
MIB = 2**20
_WARM_UP, _WARM_UP_N = Shape("warm-up", 64, 4096), 64
#: A process that has imported all of this, and done nothing, forks those that do one call.
_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["benchmarks.cases"])
#: A line of results: a candidate's time (a phase each) or its memory, or why there is none.
Row = dict[str, Any]


class Bench(NamedTuple):
    """One op: its inputs, what computes it (ours first), and what no implementation can do without."""

    build: Callable[[Workload, torch.device], Any]
    candidates: Callable[[Any], list[Candidate]]
    floor: Callable[[Any], list[Candidate]] = lambda problem: []


_STATISTICS = Bench(bench_statistics.build, bench_statistics.candidates, bench_statistics.floor)
_SAMPLING = Bench(bench_sampling.build, bench_sampling.candidates, bench_sampling.floor)
BENCHES = {
    **dict.fromkeys(bench_statistics.OPS, _STATISTICS),
    "extrapolated_sample": _SAMPLING,
    "linear_extrapolated_sample": _SAMPLING,
    "policy_loss": Bench(bench_policy.build, bench_policy.candidates),
    "linear_policy_loss": Bench(bench_policy.build_linear, bench_policy.linear_candidates, bench_policy.linear_floor),
    bench_generate.OP: Bench(bench_generate.build, bench_generate.candidates),
}
_QUICK = ("ours", f"ours, {bench_statistics.HALF_IGNORED}", "eager", "TRL", "warpers", "forwards", "generate calls")


def cases(op: str, device: torch.device, mode: str) -> Iterator[tuple[str, Callable[[], Iterable[Row]]]]:
    """The cases of an op in a mode, each with its description: times first, then memory."""
    quick = mode == "quick"
    budget = Budget(seconds=4) if quick else Budget(seconds=20, least=5)
    for work in dict.fromkeys(_timed(op, quick)):
        yield f"time: {work}", partial(compare, work, device, budget, _QUICK if quick else None)
    for work, names in _measured(op, mode):
        for name in names:
            yield f"memory: {work} {name}", partial(memory, work, name, device)


def _timed(op: str, quick: bool) -> Iterator[Workload]:
    if op == bench_generate.OP:
        yield bench_generate.WORK
    elif op == "policy_loss":
        for variant in [*bench_policy.LOSSES][: 1 if quick else None]:
            yield Workload(op, bench_policy.SHAPE, bench_policy.TOKENS, "float32", training=True, variant=variant)
    elif op == "extrapolated_sample":
        for variant in ("top-p 0.7",) if quick else bench_sampling.FILTERS:
            yield Workload(op, MAIN, 8, "float32", variant=variant)
    elif op == "linear_extrapolated_sample":
        yield from (Workload(op, MAIN, rows) for rows in ((8,) if quick else (1, 8, 64)))
        yield Workload(op, MAIN, 8, variant="top-p 0.7")
    else:
        first, second = ("bfloat16", "float32") if op.startswith("linear") else ("float32", "bfloat16")
        if op != "linear_policy_loss":
            yield Workload(op, MAIN, MAIN_N, first)
        if not quick or op in ("linear_logp", "linear_policy_loss"):
            yield Workload(op, MAIN, MAIN_N, first, training=True)
        if op == "linear_logp":
            yield Workload(op, MAIN, MAIN_N, variant=bench_statistics.HALF_IGNORED)
        if not quick:
            yield Workload(op, MAIN, MAIN_N, second, training=op == "linear_policy_loss")
            if op in ("linear_logp", "linear_delta_logp"):
                yield from (Workload(op, shape, MAIN_N // 2) for shape in SHAPES.values())
                yield from (Workload(op, MAIN, n) for n in SWEEP_N)


def _measured(op: str, mode: str) -> Iterator[tuple[Workload, Sequence[str]]]:
    """More than one N and V; in training so many rows that no kernel has all their gradients at hand at once."""
    if op == "policy_loss":
        # So large that the process' own memory does not matter.
        work = Workload(op, bench_policy.SHAPE, 16 * bench_policy.TOKENS, "float32", training=True, variant="DAPO")
        yield work, ("ours",) if mode == "quick" else ("ours", "TRL")
    elif op == "linear_policy_loss":
        yield from ((Workload(op, MAIN, n, training=True), ("ours",)) for n in (MAIN_N, 2 * MAIN_N))
    elif op in bench_statistics.OPS:
        dtype = "bfloat16" if op.startswith("linear") else "float32"
        for training in (False, True):
            yield Workload(op, OTHER, 4 * MAIN_N, dtype, training), ("ours",)
            if mode != "quick" or not training:
                yield Workload(op, MAIN, MAIN_N, dtype, training), ("ours",)
        if op.startswith("linear") and mode != "quick":
            yield Workload(op, MAIN, 4 * MAIN_N, dtype, training=True), ("ours",)
            yield from ((Workload(op, MAIN, n), ("ours", "eager", "compiled", "chunked")) for n in SWEEP_N)
        if op == "linear_delta_logp" and mode == "full":
            yield Workload(op, MAIN, LONG_N), ("ours",)


def compare(work: Workload, device: torch.device, budget: Budget, names: Sequence[str] | None = None) -> Iterator[Row]:
    """Candidates of these names (None: all), and the floor, in rounds; those that are wrong or do not fit say so.

    `over_ours` is the median of the ratios to ours within a round.
    """
    bench, right, errors = BENCHES[work.op], list[Candidate](), dict[str, Row]()
    try:
        require_fit(work, "ours", device)
        if work.training:
            require_products(work, device)
        problem = bench.build(work, device)
    except NotMeasuredError as error:
        yield _row(work, "time", "ours", skipped=str(error))
        return
    for candidate in bench.candidates(problem):
        name = candidate.name
        if names is not None and name not in names:
            continue
        try:
            require_fit(work, name, device, built=True)
            errors[name] = {f"error_{output}": error for output, error in candidate.errors().items()}
        except NotMeasuredError as error:
            yield _row(work, "time", name, skipped=str(error), wrong=isinstance(error, WrongResultError))
        else:
            right.append(candidate)
    found = [*right, *bench.floor(problem)]
    timings = measure(found, budget, Clock(device)) if found else Timings([])
    for phase in PHASES if work.training else PHASES[:1]:
        for name in (candidate.name for candidate in found):
            ms = [1e3 * seconds for seconds in timings.quantiles(name, phase)]
            row = _row(work, "time", name, phase=phase, rounds=len(timings.rounds), **errors.get(name, {}))
            row |= dict(zip(("ms", "p20_ms", "p80_ms"), ms, strict=True))
            if found[0].name == "ours":
                row["over_ours"] = timings.ratio(name, "ours", phase).median
            if name.startswith("ours"):
                row["backend"] = served_by(work, device)
            yield row


def memory(work: Workload, name: str, device: torch.device) -> Iterator[Row]:
    """The peak of one call over its inputs and outputs, in a process of its own."""
    try:
        require_fit(work, name, device)
        with ProcessPoolExecutor(1, _FRESH) as pool:
            peak = pool.submit(_peak_of, work, name, device, torch.get_num_threads()).result()
    except Exception as error:
        reason = str(error) if isinstance(error, NotMeasuredError) else f"{type(error).__name__}: {error}"
        yield _row(work, "memory", name, skipped=reason)
    else:
        yield _row(work, "memory", name, peak_mib=peak.extra / MIB, output_mib=peak.outputs / MIB)


def _peak_of(work: Workload, name: str, device: torch.device, threads: int) -> Peak:
    """In a process that does nothing else, after a call so small that nothing of the workload's size is in a cache."""
    torch.set_num_threads(threads)
    bench = BENCHES[work.op]

    def candidate(work: Workload) -> Callable[[], list[torch.Tensor]]:
        return next(c.step for c in bench.candidates(bench.build(work, device)) if c.name == name)

    step = candidate(work)
    # A compiled graph is of one shape: there the compiler's own memory counts unless it ran before.
    (step if name == "compiled" else candidate(replace(work, shape=_WARM_UP, n=_WARM_UP_N)))()
    return peak_over(step, device)


def served_by(work: Workload, device: torch.device) -> str:
    """The backends of the op's forward and backward here."""
    op = "extrapolated_sample" if work.op == bench_generate.OP else work.op
    steps = [op] if "sample" in op else [f"{op}_fwd", f"{op}_bwd"]
    of_inputs = getattr(torch, work.dtype), work.shape.d or None
    return "+".join(dict.fromkeys(backends.select(step, device, *of_inputs) for step in steps))


def _row(work: Workload, kind: str, name: str, phase: str | None = None, **measured: Any) -> Row:
    return {
        "kind": kind, "op": work.op, "variant": work.variant, "shape": work.shape.name, "n": work.n,
        "d": work.shape.d if work.linear else 0, "v": work.shape.v, "dtype": work.dtype, "training": work.training,
        "candidate": name, "phase": phase or ("both" if work.training else "forward"), **measured,
    }  # fmt: skip
