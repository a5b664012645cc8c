"""`logp`: log-probabilities, entropy and lse of one model from given logits."""

from typing import Any

import torch
from torch import Tensor

from ..results import LogpStats
from . import library


def _fake_fwd(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return library.fake_stats(LogpStats, target, logits)


def _fake_bwd(*arguments: Any) -> Tensor:
    logits = arguments[3]
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[1:])
    ctx.options = inputs[2:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logits = torch.ops.dlogp.logp_bwd(*grads, *ctx.saved_tensors, *ctx.options)
    return grad_logits, None, *(None for _ in ctx.options)


library.register("logp_fwd", _fake_fwd)
library.register("logp_bwd", _fake_bwd)
library.register_autograd("logp", _setup_context, _backward)
