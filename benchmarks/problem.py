"""The inputs of a workload, its candidates, and how far they are from its definition in float64."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dlogp_kernels.reference import policy as reference_policy
from dlogp_kernels.reference import statistics as reference

from .shapes import DTYPES, Workload
from .timing import Candidate, absolute_error, relative_error

Function = Callable[..., Any]
IGNORE_INDEX = -100

_LOGIT_STD = 3.0
_BASE_NOISE = 0.1
_BLOCK = 8192
#: Rows that are compared with float64: enough to see a wrong tile, few enough for the time of a float64 matmul.
_CHECKED_ROWS = 32


@dataclass(frozen=True)
class Problem:
    """Inputs and options by the names of the public function's arguments.

    `leaves` are the inputs that are trained, `upstream` is what flows back into outputs. `rows` are compared with
    float64 (None: all), or all of the smaller problem `part`, where outputs are not of single rows.
    """

    work: Workload
    inputs: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    upstream: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    part: "Problem | None" = None

    def call(self, function: Function) -> Any:
        with torch.set_grad_enabled(bool(self.leaves)):
            return function(**self.inputs, **self.options)

    def gradients(self, outputs: object) -> tuple[Tensor, ...]:
        found = dict(named(outputs))
        trained = [self.inputs[name] for name in self.leaves]
        return torch.autograd.grad([found[name] for name in self.upstream], trained, [*self.upstream.values()])

    def candidate(self, name: str, function: Function, limits: Mapping[str, float] | None = None) -> Candidate:
        check = partial((self.part or self).errors, function)
        return Candidate(
            name, partial(self.call, function), self.gradients if self.leaves else None, check, limits or {}
        )

    def asking(self, outputs: Collection[str]) -> "Problem":
        """The same training step of a loss on these outputs only."""
        return replace(self, upstream={name: x for name, x in self.upstream.items() if name in outputs})

    def half_ignored(self) -> "Problem":
        """The same inputs with every second target, at random, to be ignored."""
        n, target = self.work.n, self.inputs["target"].clone()
        generator = torch.Generator(target.device).manual_seed(1)
        target[torch.randperm(n, generator=generator, device=target.device)[: n // 2]] = IGNORE_INDEX
        return replace(self, inputs={**self.inputs, "target": target})

    def errors(self, function: Function, scaled: bool = False) -> dict[str, float]:
        """Largest absolute error of each output (`scaled`: per max(1, |truth|)), relative of a gradient, d_<input>."""
        outputs = self.call(function)
        errors = {
            name: absolute_error(self._few(name, x.detach()), self.truth[name], scaled) for name, x in named(outputs)
        }
        if self.leaves:
            # The gradient of a weight needs all rows; where only those that count have an upstream gradient, they do.
            upstream = {
                name: x if self.rows is None else torch.zeros_like(x).index_copy(0, self.rows, x[self.rows])
                for name, x in self.upstream.items()
            }
            for name, gradient in zip(self.leaves, replace(self, upstream=upstream).gradients(outputs), strict=True):
                errors[f"d_{name}"] = relative_error(self._few(name, gradient), self.truth[f"d_{name}"])
        return errors

    @cached_property
    def truth(self) -> Mapping[str, Tensor]:
        """Outputs, and gradients as d_<input>, of the rows that count."""
        inputs = {name: self._few(name, x.detach()) for name, x in self.inputs.items()}
        inputs |= {name: inputs[name].double().requires_grad_() for name in self.leaves}
        with torch.set_grad_enabled(bool(self.leaves)):
            outputs = dict(named(definition(self.work.op, inputs, self.options)))
        found = {name: x.detach() for name, x in outputs.items()}
        if self.leaves:
            upstream = [self._few(name, x).double() for name, x in self.upstream.items()]
            asked, trained = [outputs[name] for name in self.upstream], [inputs[name] for name in self.leaves]
            gradients = torch.autograd.grad(asked, trained, upstream)
            found |= {f"d_{name}": gradient for name, gradient in zip(self.leaves, gradients, strict=True)}
        return found

    def _few(self, name: str, x: Tensor) -> Tensor:
        return x if self.rows is None or "weight" in name else x[self.rows]


def named(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a NamedTuple, those of its fields too."""
    for name, value in outputs._asdict().items():
        if isinstance(value, Tensor):
            yield name, value
        elif value is not None:
            yield from named(value)


def definition(op: str, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    """What `op` has to return, in float64."""
    if "policy" in op:
        exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        heads: dict[str, Any] = {"heads": {}} if op.startswith("linear") else {}
        policy = reference_policy.PolicyOptions(**options)
        return getattr(reference_policy, op)(**exact, **heads, options=policy)
    logits = {f"{prefix}logits": float64_logits(inputs, prefix) for prefix in ("", "base_")[: 1 + ("delta" in op)]}
    return getattr(reference, op.removeprefix("linear_"))(**logits, target=inputs["target"], **options)


def float64_logits(inputs: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Of one model; a weight is converted in blocks."""
    if f"{prefix}logits" in inputs:
        return inputs[f"{prefix}logits"].double()
    hidden, bias = inputs[f"{prefix}hidden"].double(), inputs.get(f"{prefix}bias")
    logits = torch.cat([hidden @ block.double().t() for block in inputs[f"{prefix}weight"].split(_BLOCK)], 1)
    return logits if bias is None else logits + bias.double()


def build(work: Workload, device: torch.device) -> Problem:
    """Random inputs, the same in every process: logits of standard deviation 3 and a base model near the other one.

    A training step is that of a loss on log p and entropy (of a pair: on Δlog p and KL, with a frozen base model).
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype, shape = DTYPES[work.dtype], work.shape

    def add_noise(x: Tensor, std: float) -> Tensor:
        for block in x.split(_BLOCK):
            block.add_(torch.randn(block.shape, generator=generator, device=device).mul_(std))
        return x

    sizes = (
        {"hidden": (work.n, shape.d, 1.0), "weight": (shape.v, shape.d, _LOGIT_STD / shape.d**0.5)}
        if work.linear
        else {"logits": (work.n, shape.v, _LOGIT_STD)}
    )
    inputs = {
        name: add_noise(torch.zeros(n, columns, dtype=dtype, device=device), std)
        for name, (n, columns, std) in sizes.items()
    }
    if work.pair:
        for name, (_, _, std) in sizes.items():
            inputs[f"base_{name}"] = add_noise(inputs[name].clone(), std * _BASE_NOISE)
    inputs["target"] = torch.randint(shape.v, (work.n,), generator=generator, device=device)
    softcap = dict.fromkeys(("softcap", "base_softcap")[: 1 + work.pair], shape.softcap)
    options = {} if shape.softcap is None else softcap
    rows = torch.linspace(0, work.n - 1, min(work.n, _CHECKED_ROWS), device=device).long()
    if not work.training:
        return Problem(work, inputs, options, rows=rows)
    outputs = ("delta_logp", "kl") if work.pair else ("logp", "entropy")
    upstream = {name: torch.randn(work.n, generator=generator, device=device) for name in outputs}
    leaves = ("hidden", "weight") if work.linear else ("logits",)
    for name in leaves:
        inputs[name].requires_grad_()
    return Problem(work, inputs, options, leaves, upstream, rows)
