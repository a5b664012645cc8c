"""The inputs of a workload, its candidates, and its truth in float64."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dlogp_kernels.reference import statistics as reference
from dlogp_kernels.results import present

from .shapes import DTYPES, Workload
from .timing import Candidate, absolute_error, relative_error

Function = Callable[..., NamedTuple]
IGNORE_INDEX = -100

_LOGIT_STD = 3.0
_BASE_NOISE = 0.1
_BLOCK = 8192
#: Rows that are compared with float64: enough to see a wrong tile, few enough for the time of a float64 matmul.
_CHECKED_ROWS = 32


@dataclass(frozen=True)
class Problem:
    """Inputs by the names of the public function's arguments; in training also what flows back into the outputs.

    A training step is that of a loss on log p and entropy (of a pair: on Δlog p and KL, with a frozen base model).
    """

    work: Workload
    device: torch.device
    inputs: Mapping[str, Tensor]
    upstream: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("hidden", "weight") if self.work.linear else ("logits",)

    def call(self, function: Function) -> NamedTuple:
        with torch.set_grad_enabled(self.work.training):
            return function(**self.inputs, **self.work.options)

    def gradients(self, outputs: object) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            [getattr(outputs, name) for name in self.upstream],
            [self.inputs[name] for name in self.leaves],
            list(self.upstream.values()),
        )

    def candidate(
        self,
        name: str,
        function: Function,
        check: Callable[[], Mapping[str, float]] | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> Candidate:
        backward = self.gradients if self.work.training else None
        return Candidate(name, lambda: self.call(function), backward, check, limits or {})

    def asking(self, outputs: Collection[str]) -> "Problem":
        """The same training step of a loss on these outputs only."""
        return replace(self, upstream={name: x for name, x in self.upstream.items() if name in outputs})

    def half_ignored(self) -> "Problem":
        """The same inputs with every second target, at random, to be ignored."""
        n, target = self.work.n, self.inputs["target"].clone()
        generator = torch.Generator(self.device).manual_seed(1)
        target[torch.randperm(n, generator=generator, device=self.device)[: n // 2]] = IGNORE_INDEX
        return replace(self, inputs={**self.inputs, "target": target})


def build(work: Workload, device: torch.device) -> Problem:
    """Random inputs, the same in every process: logits of standard deviation 3 and a base model near the other one."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[work.dtype]

    def randn(rows: int, columns: int, std: float) -> Tensor:
        x = torch.empty(rows, columns, dtype=dtype, device=device)
        for block in x.split(_BLOCK):
            block.copy_(torch.randn(block.shape, generator=generator, device=device).mul_(std))
        return x

    def near(x: Tensor, std: float) -> Tensor:
        other = x.clone()
        for block in other.split(_BLOCK):
            block.add_(torch.randn(block.shape, generator=generator, device=device).mul_(std * _BASE_NOISE))
        return other

    shape = work.shape
    tensors = (
        {"hidden": (work.n, shape.d, 1.0), "weight": (shape.v, shape.d, _LOGIT_STD / shape.d**0.5)}
        if work.linear
        else {"logits": (work.n, shape.v, _LOGIT_STD)}
    )
    inputs = {name: randn(*size_and_std) for name, size_and_std in tensors.items()}
    if work.pair:
        inputs |= {f"base_{name}": near(inputs[name], tensors[name][-1]) for name in tensors}
    inputs["target"] = torch.randint(shape.v, (work.n,), generator=generator, device=device)
    if not work.training:
        return Problem(work, device, inputs)
    outputs = ("delta_logp", "kl") if work.pair else ("logp", "entropy")
    upstream = {name: torch.randn(work.n, generator=generator, device=device) for name in outputs}
    problem = Problem(work, device, inputs, upstream)
    for name in problem.leaves:
        inputs[name].requires_grad_()
    return problem


class Truth:
    """Statistics, and in training gradients, of some rows in float64, and how far a function is from them."""

    def __init__(self, problem: Problem) -> None:
        n = problem.work.n
        self.rows = torch.linspace(0, n - 1, min(n, _CHECKED_ROWS), device=problem.device).long()
        self._problem = problem
        with torch.set_grad_enabled(problem.work.training):
            raw = _float64_logits(problem, self.rows)
            stats = _stats(problem, raw, self.rows)
        self.stats = {name: value.detach().reshape(len(self.rows)) for name, value in present(stats).items()}
        if problem.work.training:
            # The gradient of a weight needs all rows; where only the checked ones have an upstream gradient, those do.
            checked = torch.zeros(n, device=problem.device).index_fill(0, self.rows, 1.0)
            masked = {name: gradient * checked for name, gradient in problem.upstream.items()}
            self._problem = replace(problem, upstream=masked)
            self._grad_logits = torch.autograd.grad(
                [getattr(stats, name).reshape(-1) for name in masked],
                raw[0],
                [gradient[self.rows].double() for gradient in masked.values()],
            )[0]

    def errors(self, function: Function) -> dict[str, float]:
        """Largest absolute error of each output, and the relative error of each gradient (`d_<input>`)."""
        outputs = self._problem.call(function)
        errors = {
            name: absolute_error(value.detach()[self.rows], self.stats[name])
            for name, value in outputs._asdict().items()
            if value is not None
        }
        if self._problem.work.training:
            errors |= self.gradient_errors(self._problem.gradients(outputs))
        return errors

    def gradient_errors(self, gradients: Sequence[Tensor]) -> dict[str, float]:
        """The relative error of each gradient of a step in which only the checked rows count."""
        if not self._problem.work.linear:
            return {"d_logits": relative_error(gradients[0][self.rows], self._grad_logits)}
        hidden, weight = (self._problem.inputs[name].detach() for name in ("hidden", "weight"))
        d_hidden = torch.zeros(len(self.rows), hidden.shape[1], dtype=torch.float64, device=hidden.device)
        norms = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        blocks = zip(self._grad_logits.split(_BLOCK, 1), weight.split(_BLOCK), gradients[1].split(_BLOCK), strict=True)
        for grad, block, found in blocks:
            d_hidden += grad @ block.double()
            d_weight = grad.t() @ hidden[self.rows].double()
            norms += torch.stack([(found.double() - d_weight).square().sum(), d_weight.square().sum()])
        of_weight = (norms[0] / norms[1]).sqrt().item()
        return {"d_hidden": relative_error(gradients[0][self.rows], d_hidden), "d_weight": of_weight}


def _float64_logits(problem: Problem, rows: Tensor) -> list[Tensor]:
    """Logits of the model and, for a pair, of the base, before softcap; leaves of the graph in training."""
    inputs = {name: x.detach() for name, x in problem.inputs.items()}
    raw = []
    for prefix in ("", "base_") if problem.work.pair else ("",):
        if problem.work.linear:
            hidden = inputs[f"{prefix}hidden"][rows].double()
            logits = torch.cat([hidden @ block.double().t() for block in inputs[f"{prefix}weight"].split(_BLOCK)], 1)
        else:
            logits = inputs[f"{prefix}logits"][rows].double()
        raw.append(logits.requires_grad_(problem.work.training and not prefix))
    return raw


def _stats(problem: Problem, raw: list[Tensor], rows: Tensor) -> NamedTuple:
    z = [reference.transform_logits(logits, softcap=problem.work.shape.softcap) for logits in raw]
    target = problem.inputs["target"][rows, None]
    if problem.work.pair:
        return reference.delta_logp_of_rows(z[0], z[1], target, IGNORE_INDEX)
    return reference.logp_of_rows(z[0], target, IGNORE_INDEX)
