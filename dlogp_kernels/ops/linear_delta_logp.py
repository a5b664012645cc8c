"""`linear_delta_logp`: both models' statistics from hidden states and the last layers' weights, in one pass."""

from typing import Any

import torch
from torch import Tensor

from ..results import DeltaLogpStats
from . import library


def _fake_fwd(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    base_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    return library.fake_stats(
        DeltaLogpStats, target, hidden, weight, base_hidden, base_weight, bias, base_bias
    )  # fmt: skip


def _fake_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, base_hidden, base_weight, _, bias, base_bias = arguments[8:15]
    inputs = (hidden, weight, base_hidden, base_weight, bias, base_bias)
    return library.fake_gradients(inputs, arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[3:])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_hidden, needs_weight, needs_base_hidden, needs_base_weight, _, needs_bias, needs_base_bias = (
        ctx.needs_input_grad[:7]
    )
    output_mask = [
        needs_hidden, needs_weight, needs_base_hidden, needs_base_weight, needs_bias, needs_base_bias
    ]  # fmt: skip
    gradients = torch.ops.dlogp.linear_delta_logp_bwd(
        *library.per_model(*grads), *ctx.saved_tensors, *ctx.options, output_mask
    )
    hidden, weight, base_hidden, base_weight, bias, base_bias = library.wanted(gradients, output_mask)
    return hidden, weight, base_hidden, base_weight, None, bias, base_bias, *(None for _ in ctx.options)


library.register("linear_delta_logp_fwd", _fake_fwd)
library.register("linear_delta_logp_bwd", _fake_bwd)
library.register_autograd("linear_delta_logp", _setup_context, _backward)
