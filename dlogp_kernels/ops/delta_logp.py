"""`delta_logp`: both models' statistics from two tensors of given logits."""

from typing import Any

import torch
from torch import Tensor

from ..results import DeltaLogpStats
from . import library


def _fake_fwd(logits: Tensor, base_logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return library.fake_stats(DeltaLogpStats, target, logits, base_logits)


def _fake_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    return library.fake_gradients(arguments[8:10], arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[3:])
    ctx.options = inputs[3:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    output_mask = list(ctx.needs_input_grad[:2])
    gradients = torch.ops.dlogp.delta_logp_bwd(
        *library.per_model(*grads), *ctx.saved_tensors, *ctx.options, output_mask
    )
    return *library.wanted(gradients, output_mask), None, *(None for _ in ctx.options)


library.register("delta_logp_fwd", _fake_fwd)
library.register("delta_logp_bwd", _fake_bwd)
library.register_autograd("delta_logp", _setup_context, _backward)
