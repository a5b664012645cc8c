"""The cases of an op that has a `Bench`, and which of them a mode has."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .bench import Bench, tolerances
from .case import Case, budget, case_of, skipped, timed, whole
from .harness import Candidate, NotMeasuredError, verify
from .memory import MIB, Request, in_fresh_process
from .problem import Truth, build
from .records import Record, record
from .shapes import (
    LINEARITY_N,
    LONG_N,
    MAIN,
    MAIN_N,
    OTHER,
    SHAPES,
    SWEEP_N,
    Shape,
    Workload,
    require_fit,
    require_products,
)

#: Candidates of a comparison, beside the floor.
ALL = ("ours", "eager", "compiled", "chunked")
_QUICK = ("ours", "eager")


@dataclass(frozen=True)
class Planner:
    """Cases of one benchmark on one device."""

    bench: Bench
    device: torch.device
    mode: str

    def cases(self) -> Iterator[Case]:
        op, quick = self.bench.op, self.mode == "quick"
        linear = op.startswith("linear")
        dtype = "bfloat16" if linear else "float32"
        yield self._compare(MAIN, MAIN_N, dtype)
        if op == "linear_logp" or not quick:
            yield self._compare(MAIN, MAIN_N, dtype, training=True)
            yield case_of("half ignored", self._half_ignored, Workload(op, MAIN, MAIN_N, dtype))
        yield from map(self._memory, self._memory_works(dtype))
        if op == "linear_delta_logp":
            sizes = [n // 2 for n in LINEARITY_N] if quick else LINEARITY_N
            yield case_of("linearity", self._linearity, Workload(op, MAIN, max(sizes)), sizes)
        if not quick:
            yield from self._more(linear)
        if op == "linear_delta_logp" and self.mode == "full":
            yield self._memory(Workload(op, MAIN, LONG_N), case="long")

    def _memory_works(self, dtype: str) -> Iterator[Workload]:
        """More than one N and V; in training so many rows that no kernel has all their gradients at hand at once."""
        op, quick = self.bench.op, self.mode == "quick"
        for shape, n in ((MAIN, MAIN_N), (OTHER, 4 * MAIN_N)):
            yield Workload(op, shape, n, dtype)
            if shape is OTHER or not quick:
                yield Workload(op, shape, n, dtype, training=True)
        if op.startswith("linear") and not quick:
            yield Workload(op, MAIN, 4 * MAIN_N, dtype, training=True)
            yield Workload(op, SHAPES["gemma-2-2b"], MAIN_N, dtype)

    def _more(self, linear: bool) -> Iterator[Case]:
        op = self.bench.op
        yield self._compare(MAIN, MAIN_N, "float32" if linear else "bfloat16")
        if not linear:
            return
        for shape in SHAPES.values():
            if shape is not MAIN:
                yield self._compare(shape, MAIN_N // 2, "bfloat16")
        for n in SWEEP_N:
            work = Workload(op, MAIN, n)
            yield case_of("sweep", self._comparison, work, ALL)
            for name in ALL:
                yield self._memory(work, name, case="sweep memory")

    def _compare(self, shape: Shape, n: int, dtype: str, training: bool = False) -> Case:
        work = Workload(self.bench.op, shape, n, dtype, training)
        return case_of("compare", self._comparison, work, _QUICK if self.mode == "quick" else ALL)

    def _memory(self, work: Workload, name: str = "ours", case: str = "memory") -> Case:
        return case_of(case, self._peak, work, name)

    def _comparison(self, case: str, work: Workload, names: Sequence[str]) -> Iterator[Record]:
        require_fit(work, "ours", self.device)
        if work.training:
            require_products(work, self.device)
        problem = build(work, self.device)
        truth = Truth(problem)
        candidates, errors = [], {}
        for name in names:
            function = self.bench.function(name)
            try:
                require_fit(work, name, self.device, built=True)
                errors[name] = truth.errors(function)
                verify(name, errors[name], tolerances(name, errors[name]))
            except NotMeasuredError as error:
                yield skipped(case, work, name, error)
            else:
                candidates.append(problem.candidate(name, function))
        del truth
        candidates += self.bench.floor(problem)
        yield from self._timed(case, work, candidates, errors)

    def _timed(
        self, case: str, work: Workload, candidates: Sequence[Candidate], errors: dict[str, dict[str, float]]
    ) -> Iterator[Record]:
        yield from timed(
            case,
            work,
            candidates,
            budget(self.mode),
            self.device,
            errors=errors,
            backend=self.bench.backend(self.device),
        )

    def _half_ignored(self, case: str, work: Workload) -> Iterator[Record]:
        problem = build(work, self.device)
        candidates = [
            problem.candidate("ours", self.bench.ours),
            problem.half_ignored().candidate("ours, half ignored", self.bench.ours),
        ]
        yield from self._timed(case, work, candidates, {})

    def _linearity(self, case: str, work: Workload, sizes: Sequence[int]) -> Iterator[Record]:
        require_fit(work, "ours", self.device)
        problem = build(work, self.device)
        by_name = {f"ours, N={n}": n for n in sizes}
        candidates = [problem.first_rows(n).candidate(name, self.bench.ours) for name, n in by_name.items()]
        for entry in self._timed(case, work, candidates, {}):
            yield dataclasses.replace(entry, n=by_name[entry.candidate])

    def _peak(self, case: str, work: Workload, name: str) -> Iterator[Record]:
        try:
            require_fit(work, name, self.device)
            # The long batch is also timed, and its time counts only if its result is right.
            answer = in_fresh_process(
                Request(work, name, self.device.type, torch.get_num_threads(), check=case == "long")
            )
            verify(name, answer.errors, tolerances(name, answer.errors))
        except NotMeasuredError as error:
            yield skipped(case, work, name, error)
            return
        yield record(
            case,
            work,
            name,
            whole(work),
            backend=self.bench.backend(self.device) if name.startswith("ours") else None,
            median_ms=1e3 * answer.seconds if case == "long" else None,
            rounds=1,
            errors=answer.errors,
            peak_mib=answer.peak / MIB,
            output_mib=answer.outputs / MIB,
        )
