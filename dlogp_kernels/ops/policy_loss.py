"""`policy_loss`: a policy-gradient loss of given log-probabilities, whose forward also leaves the gradient."""

from typing import Any

import torch
from torch import Tensor

from ..reference.policy import PolicyOptions, TokenInputs
from ..reference.statistics import accumulation_dtype
from ..results import PolicyLoss, PolicyMetrics
from . import library

#: The arguments that are tensors, which come first.
_TENSORS = ("logp", *TokenInputs._fields)
#: Places among the arguments.
_DIFFERENTIABLE = tuple(map(_TENSORS.index, ("logp", "entropy", "kl")))


def loss_of(logp: Tensor, tokens: TokenInputs, options: PolicyOptions) -> PolicyLoss:
    with_gradient = torch.is_grad_enabled() and logp.requires_grad
    loss, metrics, *_ = torch.ops.dlogp.policy_loss_fwd(logp, *tokens, *options.arguments(), with_gradient)
    return PolicyLoss(loss, PolicyMetrics(*metrics.unbind()))


def _fake_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    logp, _, _, _, offsets = arguments[:5]
    with_gradient = arguments[-1]
    dtype = accumulation_dtype(*(x for x in arguments if isinstance(x, Tensor)))
    sequences = logp.shape[0] if offsets is None else offsets.shape[0] - 1
    return (
        logp.new_empty((), dtype=dtype),
        logp.new_empty(len(PolicyMetrics._fields), dtype=dtype),
        logp.new_empty(logp.shape if with_gradient else (0,), dtype=dtype),
        logp.new_empty(sequences, dtype=dtype),
    )


def _fake_bwd(
    grad_loss: Tensor,
    grad_logp_unscaled: Tensor,
    scale: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    entropy_coef: float,
    kl_beta: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(scale.new_empty(mask.shape if wanted else (0,)) for wanted in output_mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens = TokenInputs._make(inputs[1 : len(_TENSORS)])
    _, metrics, grad_logp_unscaled, scale = output
    ctx.save_for_backward(grad_logp_unscaled, scale, tokens.mask, tokens.offsets)
    options = PolicyOptions.of(*inputs[len(_TENSORS) : -1])
    ctx.coefficients = (options.entropy_coef, options.kl_beta)
    ctx.num_inputs = len(inputs)
    # grad_logp_unscaled counts as differentiable, so that deriving what backward makes of it raises (library.py).
    ctx.mark_non_differentiable(metrics, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.num_inputs
    output_mask = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    found = torch.ops.dlogp.policy_loss_bwd(grad_loss, *ctx.saved_tensors, *ctx.coefficients, output_mask)
    return library.by_inputs(ctx.num_inputs, _DIFFERENTIABLE, found, output_mask)


library.register("policy_loss_fwd", _fake_fwd)
library.register("policy_loss_bwd", _fake_bwd)
library.register_autograd("policy_loss", _setup_context, _backward)
