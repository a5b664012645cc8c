"""`extrapolated_sample`: a step of selective replacement over a batch of logits, and whether its draws are exact."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from dlogp_kernels import backends, extrapolated_sample

from . import frequencies, sampling
from .case import Case, budget, case_of, skipped, timed
from .harness import Candidate, NotMeasuredError, verify
from .records import Record, record
from .shapes import MAIN, Shape, Workload

OP = "extrapolated_sample"
#: The batch and the filter of the acceptance table.
ROWS, MAIN_FILTER = 8, "top-p 0.7"
DRAWS, SEEDS = 1_000_000, (1, 2, 3)
#: Tokens of the tail, the probability of each, and rows of a batch. Both draws of a row count.
TAIL, RARE = Shape("tail", 0, 100_001), 1e-8
_TAIL_ROWS = 20_000

_CANDIDATES: Mapping[str, sampling.Draw] = {
    "ours": sampling.ours,
    "ours, all replaced": sampling.ours_all_replaced,
    "eager": sampling.eager,
    "warpers": sampling.warpers,
    "numpy": sampling.in_numpy,
}


def plan(device: torch.device, mode: str) -> Iterator[Case]:
    for variant in (MAIN_FILTER,) if mode == "quick" else sampling.FILTERS:
        work = Workload(OP, MAIN, ROWS, "float32", variant=variant)
        yield case_of("compare", _comparison, work, device, mode)
    if mode == "full":  # minutes
        yield case_of("frequencies", _frequencies, Workload(OP, MAIN, DRAWS, "float32"), device)
        yield case_of("tail", _tail, Workload(OP, TAIL, DRAWS, "float32"), device)


def _comparison(kind: str, work: Workload, device: torch.device, mode: str) -> Iterator[Record]:
    draws = sampling.build(work, device)
    candidates, errors = [], {}
    for name, draw in _CANDIDATES.items():
        try:
            errors[name] = sampling.errors_of(draw, draws)
            verify(name, errors[name], sampling.TOLERANCES)
        except NotMeasuredError as error:
            yield skipped(kind, work, name, error)
        else:
            candidates.append(Candidate(name, partial(draw, draws)))
    yield from timed(kind, work, candidates, budget(mode), device, errors=errors, backend=_backend(device))


def _frequencies(kind: str, work: Workload, device: torch.device) -> Iterator[Record]:
    """One p a seed; draft and replacement of a row have independent noise."""
    p = {f"p, seed {seed}": frequencies.p_value(_both, work.shape.v, work.n, seed, device) for seed in SEEDS}
    yield record(kind, work, "ours", "forward", backend=_backend(device), statistics=p)


def _tail(kind: str, work: Workload, device: torch.device) -> Iterator[Record]:
    batches = math.ceil(work.n / (2 * _TAIL_ROWS))
    found = frequencies.tail(_both, RARE, work.shape.v - 1, _TAIL_ROWS, batches, SEEDS[0], device)
    statistics = {"drawn": float(found.tokens.numel()), "expected": found.expected}
    yield record(kind, work, "ours", "forward", backend=_backend(device), statistics=statistics)


def _both(logits: Tensor, seed: int, step: int) -> Iterable[Tensor]:
    drawn = extrapolated_sample(logits, logits, seed=seed, step=step)
    return drawn.token, drawn.draft_token


def _backend(device: torch.device) -> str:
    return backends.select(OP, device)
