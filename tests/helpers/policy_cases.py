"""Inputs of the policy loss, its float64 truth, and the size of the terms that rounding goes by."""

import math
from typing import Any, NamedTuple

import cases
import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels.reference import policy as reference_policy
from dlogp_kernels.reference.policy import PolicyOptions

Inputs = dict[str, Tensor]
#: Optional arguments, and what makes each of them count.
EXTRAS = {"ref_logp": {"kl_beta": 0.3}, "entropy": {"entropy_coef": 0.2}, "kl": {"kl_beta": 0.3}, "token_weight": {}}
ALL_EXTRAS = {"kl_beta": 0.3, "entropy_coef": 0.2}
DIFFERENTIABLE = ("logp", "entropy", "kl")


def make_inputs(
    b: int = 5, t: int = 37, *, dtype: torch.dtype = torch.float32, spread: float = 0.5, seed: int = 0
) -> Inputs:
    """Every tensor argument but `kl`, which stands for ref_logp: (b, t), padded.

    Responses have different lengths with holes; one has no tokens if b > 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    old_logp = -(normal(b, t).abs() * 2.0)
    logp = old_logp + spread * normal(b, t)
    mask = torch.rand(b, t, generator=generator) < 0.7
    if b > 2:
        mask[2] = False
    inputs = {
        "logp": logp,
        "old_logp": old_logp,
        "advantage": normal(b),
        "ref_logp": logp + spread * normal(b, t),
        "entropy": normal(b, t).abs(),
        "token_weight": torch.rand(b, t, generator=generator, dtype=torch.float64) * 2.0,
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    return inputs | {"mask": mask, "group": torch.arange(b) // 2}


def with_kl(inputs: Inputs) -> Inputs:
    """An exact divergence instead of the reference model's log-probabilities."""
    rest = {name: x for name, x in inputs.items() if name != "ref_logp"}
    return rest | {"kl": (inputs["entropy"] * 0.7).flip(-1)}


def without_extras(inputs: Inputs) -> Inputs:
    return {name: x for name, x in inputs.items() if name not in EXTRAS}


def pack(inputs: Inputs, lengths: list[int]) -> Inputs:
    """The first `lengths[b]` tokens of each response, one after another."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)

    def bring(x: Tensor) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)]) if x.dim() == 2 else x

    return {name: bring(x) for name, x in inputs.items()} | {"offsets": offsets}


def cut(inputs: Inputs, lengths: list[int]) -> Inputs:
    """Padded inputs whose masks end where `pack` cuts."""
    inside = torch.arange(inputs["mask"].shape[1]) < torch.tensor(lengths)[:, None]
    return inputs | {"mask": inputs["mask"] & inside}


def upcast(inputs: Inputs) -> Inputs:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


class Outcome(NamedTuple):
    """Loss, metrics in order, and gradients by name."""

    loss: Tensor
    metrics: Tensor
    gradients: Inputs


def _outcome(function: Any, inputs: Inputs, upstream: float, **options: Any) -> Outcome:
    leaves = {name: inputs[name].detach().clone() for name in DIFFERENTIABLE if name in inputs}
    if inputs["logp"].device != cases.DEVICE or not inputs["logp"].is_contiguous():
        leaves = {name: inputs[name].detach() for name in leaves}
    for x in leaves.values():
        x.requires_grad_()
    loss, metrics = function(**(inputs | leaves), **options)
    grads = torch.autograd.grad(loss * upstream, list(leaves.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), grads, strict=True)
    }
    return Outcome(loss.detach().cpu(), torch.stack(list(metrics)).cpu(), {name: x.cpu() for name, x in found.items()})


def call(inputs: Inputs, *, upstream: float = 1.0, **options: Any) -> Outcome:
    """`policy_loss` and its backward on the device under test."""
    moved = {name: x.to(cases.DEVICE) for name, x in inputs.items()}
    return _outcome(dlogp_kernels.policy_loss, moved, upstream, **options)


def options_of(dual_clip: float | None = None, **options: Any) -> PolicyOptions:
    return PolicyOptions(**options, dual_clip=math.inf if dual_clip is None else dual_clip)


def _definition(options: PolicyOptions, denominator: float | None) -> Any:
    number = None if denominator is None else torch.tensor(denominator, dtype=torch.float64)
    return lambda **inputs: reference_policy.policy_loss(**inputs, options=options, denominator=number)


def truth(inputs: Inputs, *, upstream: float = 1.0, denominator: float | None = None, **options: Any) -> Outcome:
    """The definition in float64, differentiated by autograd."""
    return _outcome(_definition(options_of(**options), denominator), upcast(inputs), upstream)


class Sizes(NamedTuple):
    """What an error is relative to: of the loss, and of each token's gradient by logp."""

    loss: Tensor
    grad_logp: Tensor


def sizes(inputs: Inputs, *, upstream: float = 1.0, **options: Any) -> Sizes:
    """Absolute terms, times 1 + |log ratio|, which the exponential multiplies roundings by."""
    chosen, inputs = options_of(**options), upcast(inputs)
    offsets, advantage = inputs.get("offsets"), inputs["advantage"]
    sequences = inputs["logp"].shape[0] if offsets is None else offsets.numel() - 1
    names = ("logp", "old_logp", "advantage", "mask", "ref_logp", "entropy", "kl", "token_weight")
    given = reference_policy.PolicyTokens(*(inputs.get(name) for name in names))
    tokens = reference_policy.as_padded(given, offsets, torch.float64, sequence_level=advantage.shape == (sequences,))
    raw = reference_policy.raw_log_ratio(tokens.logp, tokens.old_logp, tokens.mask, chosen.importance)
    ratio = reference_policy.ratio_of(raw).expand_as(tokens.logp)
    weighted = tokens.advantage * 2.0  # at least what any of the weights of these tests makes of it
    slope = reference_policy.surrogate_gradient(ratio, weighted, chosen).abs() + ratio.clamp_max(1.0) * weighted.abs()
    surrogate = reference_policy.surrogate(ratio, tokens.logp, weighted, chosen).abs() + slope
    slope = slope if tokens.token_weight is None else slope * tokens.token_weight
    surrogate = surrogate if tokens.token_weight is None else surrogate * tokens.token_weight
    spread = 1.0 + (tokens.logp - tokens.old_logp).abs()
    loss, grad = surrogate * spread, slope * spread
    if chosen.importance != "token":
        count = tokens.mask.sum(-1, keepdim=True).clamp_min(1)
        of_sequence = spread.masked_fill(~tokens.mask, 0.0).sum(-1, keepdim=True) / count
        loss = loss * of_sequence
        if chosen.importance == "sequence_token":
            grad = grad * of_sequence
        elif chosen.loss_type != "cispo":
            grad = (grad.masked_fill(~tokens.mask, 0.0).sum(-1, keepdim=True) / count).expand_as(loss)
    if tokens.ref_logp is not None and chosen.kl_beta:
        x = (tokens.ref_logp - tokens.logp).clamp_max(reference_policy.LOG_RATIO_LIMIT)
        loss, grad = loss + chosen.kl_beta * (x.exp() + x.abs()), grad + chosen.kl_beta * (x.exp() + 1.0)
    if tokens.kl is not None:
        loss = loss + chosen.kl_beta * tokens.kl
    if tokens.entropy is not None:
        loss = loss + abs(chosen.entropy_coef) * tokens.entropy.abs()
    counts = tokens.mask.sum(-1)
    longest = tokens.mask.shape[1] if chosen.max_length is None else chosen.max_length
    scale = reference_policy.sequence_scale(counts, counts.sum(), sequences, longest, None, chosen.loss_type)
    loss, grad = (x.masked_fill(~tokens.mask, 0.0) * scale[:, None] for x in (loss, grad))
    if offsets is not None:
        inside = torch.arange(grad.shape[1]) < offsets.diff()[:, None]
        grad = grad[inside]
    return Sizes(loss.sum(), grad * abs(upstream))


def check_against_truth(accuracy: Any, inputs: Inputs, *, upstream: float = 1.0, **options: Any) -> Outcome:
    """Loss, metrics and gradients within tolerance of float64; returns them."""
    actual, expected = call(inputs, upstream=upstream, **options), truth(inputs, upstream=upstream, **options)
    size = sizes(inputs, upstream=upstream, **options)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, grad in actual.gradients.items():
        assert grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape
    accuracy.policy("policy_loss", actual, expected, size, max(x.dtype.itemsize for x in _floats(inputs)))
    return actual


def _floats(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs.values() if x.is_floating_point()]
