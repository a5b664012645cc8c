"""`linear_logp`: log-probabilities, entropy and lse of one model from hidden states and the last layer's weight."""

from typing import Any

import torch
from torch import Tensor

from ..results import LogpStats
from . import library


def _fake_fwd(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    return library.fake_stats(LogpStats, target, hidden, weight, bias)


def _fake_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, _, bias = arguments[3:7]
    return library.fake_gradients((hidden, weight, bias), arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, *options = inputs
    _, entropy, lse = output
    ctx.save_for_backward(hidden, weight, target, bias, entropy, lse)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    output_mask = [needs_hidden, needs_weight, needs_bias]
    gradients = torch.ops.dlogp.linear_logp_bwd(
        grad_logp, grad_entropy, grad_lse, *ctx.saved_tensors, *ctx.options, output_mask
    )
    hidden, weight, bias = library.wanted(gradients, output_mask)
    return hidden, weight, None, bias, *(None for _ in ctx.options)


library.register("linear_logp_fwd", _fake_fwd)
library.register("linear_logp_bwd", _fake_bwd)
library.register_autograd("linear_logp", _setup_context, _backward)
