"""Inputs of the linear policy loss, its float64 truth, and the size of the terms that rounding goes by."""

import math
from typing import Any

import cases
import policy_cases
import torch
from policy_cases import Inputs, Outcome, Sizes
from torch import Tensor

import dlogp_kernels
from dlogp_kernels.reference import policy as reference_policy

#: Of both models' last layers; those of the base count where there is one.
HEADS = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3}
BASE_HEADS = {"base_softcap": 4.0, "base_logit_scale": 0.6}
#: The policy's inputs that have a gradient.
DIFFERENTIABLE = ("hidden", "weight", "bias")
_TOKENS = ("old_logp", "ref_logp", "token_weight", "mask", "target")


def make_inputs(
    b: int = 3,
    t: int = 11,
    *,
    v: int = 301,
    d: int = 24,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    base: bool = False,
    spread: float = 2.0,
    seed: int = 0,
) -> Inputs:
    """Every tensor argument (ref_logp unless there is a base): ratios near 1, some of them clipped."""
    op = "linear_delta_logp" if base else "linear_logp"
    inputs = cases.make_inputs(op, (b, t), v=v, d=d, dtype=dtype, bias=bias, spread=spread, seed=seed)
    tokens = policy_cases.make_inputs(b, t, seed=seed)
    logp = cases.truth("linear_logp", {name: x for name, x in inputs.items() if not name.startswith("base_")}).logp
    old_logp = (logp + tokens["old_logp"] - tokens["logp"]).float()
    inputs |= {name: tokens[name].float() for name in ("advantage", "token_weight")}
    inputs |= {"old_logp": old_logp, "mask": tokens["mask"], "group": tokens["group"]}
    return inputs if base else inputs | {"ref_logp": (old_logp + 0.3).float()}


def near(inputs: Inputs, **heads: Any) -> Inputs:
    """The same with old_logp where these options of the last layers move log-probabilities to."""
    names = ("hidden", "weight", "bias", "target")
    head = {name: inputs[name] for name in names if name in inputs}
    before, after = cases.truth("linear_logp", head).logp, cases.truth("linear_logp", head, **heads).logp
    moved = {name: (inputs[name] + after - before).float() for name in ("old_logp", "ref_logp") if name in inputs}
    return inputs | moved


def flat(inputs: Inputs, lengths: list[int]) -> Inputs:
    """The first `lengths[b]` tokens of each response, one after another."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)

    def bring(name: str, x: Tensor) -> Tensor:
        if name in _TOKENS or name.endswith("hidden"):
            return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
        return x

    return {name: bring(name, x) for name, x in inputs.items()} | {"offsets": offsets}


def call(inputs: Inputs, *, upstream: float = 1.0, wanted: tuple[str, ...] = DIFFERENTIABLE, **options: Any) -> Outcome:
    """`linear_policy_loss` and its backward on the device under test."""
    moved = {name: x.to(cases.DEVICE) for name, x in inputs.items()}
    return _outcome(dlogp_kernels.linear_policy_loss, moved, upstream, wanted, options)


def truth(inputs: Inputs, *, upstream: float = 1.0, **options: Any) -> Outcome:
    """The definition in float64, differentiated by autograd."""
    heads = {name: value for name, value in options.items() if name in (*HEADS, *BASE_HEADS)}
    rest = {name: value for name, value in options.items() if name not in heads}

    def definition(**given: Tensor) -> Any:
        own = {name: given.pop(name) for name in ("bias", "base_bias") if name in given}
        chosen = policy_cases.options_of(**rest)
        return reference_policy.linear_policy_loss(**given, heads=heads | own, options=chosen)

    return _outcome(definition, policy_cases.upcast(inputs), upstream, DIFFERENTIABLE, {})


def _outcome(function: Any, inputs: Inputs, upstream: float, wanted: tuple[str, ...], options: Any) -> Outcome:
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted if name in inputs}
    loss, metrics = function(**(inputs | leaves), **options)
    found = torch.autograd.grad(loss * upstream, list(leaves.values())) if leaves else ()
    grads = {name: grad.cpu() for name, grad in zip(leaves, found, strict=True)}
    return Outcome(loss.detach().cpu(), torch.stack(list(metrics)).cpu(), grads)


def check_against_truth(accuracy: Any, inputs: Inputs, *, upstream: float = 1.0, **options: Any) -> Outcome:
    """Loss, metrics and gradients within tolerance of float64; returns them.

    The gradients are those of `linear_logp` (with a base, `linear_delta_logp`), given the loss' gradients by its
    outputs; a log-probability that is off by its tolerance moves the loss by that times those gradients.
    """
    return check(accuracy, inputs, call(inputs, upstream=upstream, **options), upstream=upstream, **options)


def check(accuracy: Any, inputs: Inputs, actual: Outcome, *, upstream: float = 1.0, **options: Any) -> Outcome:
    """The same of what was found elsewhere."""
    expected = truth(inputs, upstream=upstream, **options)
    heads = {name: value for name, value in options.items() if name in (*HEADS, *BASE_HEADS)}
    rest = {name: value for name, value in options.items() if name not in heads}
    pair = "base_hidden" in inputs
    op = "linear_delta_logp" if pair else "linear_logp"
    names = [f"{model}{name}" for model in ("", "base_")[: 1 + pair] for name in ("hidden", "weight", "bias")]
    masked = {"target": inputs["target"].masked_fill(~inputs["mask"], -100)}
    head = {name: inputs[name] for name in names if name in inputs} | masked
    stats = cases.truth(op, head, **heads)
    tokens = _tokens_of(inputs, stats)
    of_tokens = policy_cases.truth(tokens, upstream=upstream, **rest).gradients
    size, magnitude = policy_cases.sizes(tokens, upstream=upstream, **rest), cases.magnitude(op, head, **heads)
    # Where the terms of a token's gradient cancel, what is left is no measure of what was rounded.
    by_name = {
        "logp": size.grad_logp.view_as(of_tokens["logp"]),
        "entropy": of_tokens["entropy"],
        "kl": of_tokens.get("kl"),
    }
    grads = [by_name.get(name) for name in stats._fields]
    scales = cases.gradient_scales(op, head, _filled(stats, grads), **heads)
    accuracy.linear_policy(
        actual,
        expected,
        Sizes(_loss_size(size, magnitude, of_tokens, upstream), size.grad_logp),
        {name: scales[name] for name in actual.gradients},
        magnitude,
        cases.widest({name: x for name, x in head.items() if name != "target"} | masked),
    )
    for name, grad in actual.gradients.items():
        assert grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape
    return actual


def _tokens_of(inputs: Inputs, stats: Any) -> Inputs:
    names = ("old_logp", "advantage", "mask", "group", "ref_logp", "token_weight", "offsets")
    tokens = {name: inputs[name] for name in names if name in inputs}
    tokens |= {"logp": stats.logp, "entropy": stats.entropy}
    return tokens | {"kl": stats.kl} if "base_hidden" in inputs else tokens


def _filled(stats: Any, grads: list[Tensor | None]) -> list[Tensor]:
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(stats, grads, strict=True)]


def _loss_size(size: Sizes, magnitude: Tensor, of_tokens: Inputs, upstream: float) -> Tensor:
    """What rounding logp, entropy and kl within their tolerance adds."""
    moved = sum((grad.abs() * magnitude.clamp_min(1.0)).sum() for grad in of_tokens.values()) / abs(upstream)
    return size.loss + moved * math.log(10.0)
