"""`linear_policy_loss` of ratios of tokens: loss and gradients from hidden states, formed while logits are at hand."""

from typing import Any

import torch
from torch import Tensor

from ..results import PolicyMetrics
from . import library

#: Places of hidden, weight and bias among the arguments.
_DIFFERENTIABLE = (0, 1, 3)


def _fake_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, _, bias = arguments[:4]
    output_mask = arguments[-1]
    dtype = library.output_dtype(*(x for x in arguments if isinstance(x, Tensor)))
    inputs = (hidden, weight, weight if bias is None else bias)
    gradients = (
        x.new_empty(x.shape if wanted else (0,), dtype=dtype) for x, wanted in zip(inputs, output_mask, strict=True)
    )
    loss, metrics = (hidden.new_empty(shape, dtype=dtype) for shape in ((), len(PolicyMetrics._fields)))
    return loss, metrics, *gradients


def _fake_bwd(
    grad_loss: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    gradients, dtypes = (grad_hidden, grad_weight, grad_bias), (hidden_dtype, weight_dtype, bias_dtype)
    return tuple(
        x.new_empty(x.shape if wanted else (0,), dtype=dtype)
        for x, dtype, wanted in zip(gradients, dtypes, output_mask, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    given = [inputs[i] for i in _DIFFERENTIABLE]
    ctx.dtypes = [inputs[0].dtype if x is None else x.dtype for x in given]
    ctx.output_mask, ctx.num_inputs = inputs[-1], len(inputs)
    # The gradients count as differentiable, so that deriving what backward makes of them raises (library.py).
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.num_inputs
    needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    output_mask = [formed and needs for formed, needs in zip(ctx.output_mask, needed, strict=True)]
    if grad_loss is not None:
        found = torch.ops.dlogp.linear_policy_loss_bwd(grad_loss, *ctx.saved_tensors, *ctx.dtypes, output_mask)
        for i, gradient in zip(_DIFFERENTIABLE, library.wanted(found, output_mask), strict=True):
            gradients[i] = gradient
    return tuple(gradients)


library.register("linear_policy_loss_fwd", _fake_fwd)
library.register("linear_policy_loss_bwd", _fake_bwd)
library.register_autograd("linear_policy_loss", _setup_context, _backward)
