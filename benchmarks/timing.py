"""Verify, then time: candidates take turns in rounds, and are compared within a round.

A machine's speed drifts by more than the differences of interest. So each round runs every candidate once, in an order
drawn anew (a GPU that has just rested is faster: whoever always follows a candidate that leaves it idle would gain), a
ratio is taken within each round, and the median of these ratios is reported, not a ratio of medians.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_Result = TypeVar("_Result")

PHASES = ("forward", "backward", "both")
#: Wrong, rather than inexact, from here on: absolute for an output, relative for a gradient. What is reached is
#: recorded; bfloat16 logits of |z| about 15 are rounded by up to 0.03 before a baseline's softmax sees them.
OURS = {"output": 1e-4, "gradient": 0.02}
BASELINE = {"output": 0.2, "gradient": 0.1}
#: A sample shorter than this repeats its call, so that the clock and the first miss of a cache do not count; on a GPU
#: so that it runs at the speed that its power limit leaves to this candidate, not to the one before.
_SHORTEST_SAMPLE = {"cpu": 0.02, "cuda": 0.06}
#: More than the L2 of any GPU, and long enough (a quarter of a millisecond) that the host is ahead of the GPU when the
#: clock starts: a launch is then not part of a short kernel's time.
_L2_FLUSH_BYTES = 2**30
#: Rows of a block of an error.
_ERROR_ROWS = 8192


class NotMeasuredError(RuntimeError):
    """Why there is no figure; the run goes on without it."""


class WrongResultError(NotMeasuredError):
    """A candidate that does not compute what it should: its time means nothing."""


@dataclass(frozen=True)
class Candidate:
    """Something to time: `forward()`, and `backward(what forward returned)`.

    `check()` gives its errors, at most those of `limits` (`verify`). Of the benchmarks on a GPU `facts` go into its
    last entry, the fact `config` as configs.py writes it.
    """

    name: str
    forward: Callable[[], object]
    backward: Callable[[object], object] | None = None
    check: Callable[[], Mapping[str, float]] | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def within(
        self, context: Callable[[], AbstractContextManager[None]], name: str, facts: Mapping[str, Any]
    ) -> "Candidate":
        """The same by another name, each call of it within a context."""

        def inside(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any) -> Any:
                with context():
                    return call(*arguments)

            return called

        backward, check = (call and inside(call) for call in (self.backward, self.check))
        return replace(self, name=name, forward=inside(self.forward), backward=backward, check=check, facts=facts)

    def errors(self) -> dict[str, float]:
        """Of `check`; WrongResultError if one is above its limit, or NaN.

        A limit is that of the error's name, or else of what it is of: an "output", or a "gradient" (`d_<input>`).
        """
        errors = {} if self.check is None else dict(self.check())
        verify(self.name, errors, self.limits)
        return errors

    def step(self) -> list[Tensor]:
        """All that one call leaves: its outputs and, if it has a backward, the gradients."""
        outputs = self.forward()
        gradients = () if self.backward is None else self.backward(outputs)
        return [x for x in tree_leaves((outputs, gradients)) if isinstance(x, Tensor)]


class Sample(NamedTuple):
    """Seconds of one call."""

    forward: float
    backward: float

    def phase(self, name: str) -> float:
        return self.forward + self.backward if name == "both" else getattr(self, name)


class Quantiles(NamedTuple):
    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Budget:
    """Rounds until `seconds` have passed: at least `least`, at most `most` of them."""

    seconds: float
    least: int = 3
    most: int = 50


class Clock:
    """Times one call on a device, with everything it started there; `watch` is told whose turn it is before each."""

    def __init__(self, device: torch.device, watch: Callable[[str], None] = lambda name: None) -> None:
        self.device, self._watch = device, watch
        on_cuda = device.type == "cuda"
        self._flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.uint8, device=device) if on_cuda else None

    def sample(self, candidate: Candidate, repeats: int = 1) -> Sample:
        """Mean seconds of `repeats` calls in a row, which the host starts ahead of the GPU."""
        self._watch(candidate.name)
        forward, backward = [], []
        for _ in range(repeats):
            seconds, outputs = self._begun(candidate.forward)
            forward.append(seconds)
            if candidate.backward is not None:
                backward.append(self._begun(partial(candidate.backward, outputs))[0])
            del outputs
        self._wait()
        return Sample(*(sum(seconds() for seconds in calls) / repeats for calls in (forward, backward)))

    def _begun(self, call: Callable[[], _Result]) -> tuple[Callable[[], float], _Result]:
        """What gives the call's seconds, once all is done that it started."""
        if self._flush is None:
            start = time.perf_counter()
            result = call()
            passed = time.perf_counter() - start
            return lambda: passed, result
        # Weights come from memory in use, not from the cache that the last call left.
        self._flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = call()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3, result

    def _wait(self) -> None:
        if self._flush is not None:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Timings:
    """Samples of every candidate in every round."""

    rounds: Sequence[Mapping[str, Sample]]

    def quantiles(self, name: str, phase: str) -> Quantiles:
        return quantiles([samples[name].phase(phase) for samples in self.rounds])

    def ratio(self, name: str, other: str, phase: str) -> Quantiles:
        """Time of `name` over that of `other`, taken within each round."""
        return quantiles([samples[name].phase(phase) / samples[other].phase(phase) for samples in self.rounds])


def quantiles(values: Sequence[float]) -> Quantiles:
    ordered = torch.tensor(values, dtype=torch.float64)
    return Quantiles(*(ordered.quantile(q).item() for q in (0.5, 0.2, 0.8)))


def measure(candidates: Sequence[Candidate], budget: Budget, clock: Clock) -> Timings:
    """Samples of `candidates` in rounds, after a warm-up call of each."""
    seconds = {candidate.name: clock.sample(candidate).phase("both") for candidate in candidates}
    shortest = _SHORTEST_SAMPLE[clock.device.type]
    repeats = {name: max(1, min(100, math.ceil(shortest / max(x, 1e-6)))) for name, x in seconds.items()}
    rounds: list[dict[str, Sample]] = []
    shuffled = random.Random(0)
    start = time.perf_counter()
    while len(rounds) < budget.most:
        passed = time.perf_counter() - start
        # A round that would end after the budget does not begin.
        if len(rounds) >= budget.least and passed + passed / len(rounds) > budget.seconds:
            break
        order = shuffled.sample([*candidates], len(candidates))
        rounds.append({candidate.name: clock.sample(candidate, repeats[candidate.name]) for candidate in order})
    return Timings(rounds)


def absolute_error(value: Tensor, truth: Tensor, scaled: bool = False) -> float:
    """Largest |value − truth|, `scaled` over max(1, |truth|); NaN where one is NaN and the other is not.

    Infinities are equal if their signs are; of another shape all is wrong.
    """
    if value.shape != truth.shape:
        return math.inf
    value = value.double()
    error = (value - truth).abs() / (truth.abs().clamp_min(1.0) if scaled else 1.0)
    return error.masked_fill((value == truth) | (value.isnan() & truth.isnan()), 0.0).max().item()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖, in blocks: a gradient of a weight in float64 is large."""
    blocks = zip(value.split(_ERROR_ROWS), truth.split(_ERROR_ROWS), strict=True)
    errors = sum((block.double() - exact).square().sum() for block, exact in blocks)
    return (errors**0.5 / truth.norm()).item()


def verify(name: str, errors: Mapping[str, float], limits: Mapping[str, float]) -> None:
    """Raise WrongResultError if an error is above its limit, or NaN."""
    for output, error in errors.items():
        limit = limits.get(output, limits.get("gradient" if output.startswith("d_") else "output", 0.0))
        if not error <= limit:
            raise WrongResultError(f"{name}: {output} is off by {error:.2e}, expected at most {limit:.2e}")
