"""The backend "cuda" of `linear_logp` and `linear_delta_logp`, on Hopper: kernels of CUDA C++ amid those of Triton.

csrc/cuda/linear_products.cuh says how they multiply. Forward leaves softmax states, which Triton merges; backward the
gradient by a block's logits, for two GEMMs. They take bfloat16 and float16, and weights whose rows begin on 16 bytes
(backends.py sees to that). The gradient of a divergence, or by a bias, is left to Triton.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inputs import Asked, Gradients, Head, Saved, Targets
from ..results import DeltaLogpStats, LogpStats
from . import linear_backward
from ._device import on_device_of, properties
from ._launch import call_of
from ._math import MASKED_LOGIT
from ._sizes import round_up
from .configs import Config
from .delta_logp import finish_delta_logp, pair_state_size
from .linear_backward import BackwardSchedule, HeadGradients
from .linear_forward import Plan, gather_buffer, hidden_of, plan_of, rows_of
from .logp import finish_logp, new_outputs, state_size, transform_of

#: Number of models → the kernel's tile and stages, `Tile` there, and row tiles of whole panels. A unit is of two.
_TILES = {1: Config(128, 256, 64, 12, 4, group=32), 2: Config(128, 160, 64, 12, 6, group=32)}
#: Of blocks of tokens in backward: with 32 pairs of row tiles they are whole rounds of the clusters of 132
#: multiprocessors.
_BLOCK_TOKENS = 33 * 256
#: In place of log Σ e^{z − …} of an ignored row: e^{−this} is 0, and 0 · this is.
_NOTHING = 1e30


def linear_logp_fwd(head: Head, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    return _forward([head], targets, LogpStats, state_size(asked.top), finish_logp, workspace)


def linear_delta_logp_fwd(head: Head, base: Head, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    size = pair_state_size(asked.top)
    return _forward([head, base], targets, DeltaLogpStats, size, finish_delta_logp, workspace)


def _forward(
    heads: list[Head], targets: Targets, stats: Any, size: int, finish: Callable[..., None], workspace: int
) -> tuple[Tensor, ...]:
    target, ignore_index = targets.target.contiguous(), targets.ignore_index
    vocabulary, device = heads[0].weight.shape[0], target.device
    with on_device_of(target):
        flat = [field for head in heads for field in head]
        call = call_of(f"hopper {len(heads)}", device, *flat, target, ignore_index, workspace)
        if call.plan is None:
            call.plan = _plan(heads, target, size, workspace)
        cut: Plan = call.plan
        rows = rows_of(target, cut, ignore_index)
        out = new_outputs(stats, target, rows, top=False)
        state = torch.empty((size, cut.num_splits, cut.num_rows), dtype=torch.float32, device=device)
        target_logits = torch.empty(
            (len(heads) * target.shape[1], cut.num_rows), dtype=torch.float32, device=device
        )  # fmt: skip
        gathered = [gather_buffer(head, cut, rows) for head in heads]
        biases = [_padded_bias(head, round_up(vocabulary, cut.tile.block_v)) for head in heads]
        scales = [transform_of(head.transform)[1:] for head in heads]
        for first in range(0, target.shape[0], cut.num_rows):
            models: list[Any] = []
            for head, buffer, bias, (tanh_scale, output_scale) in zip(heads, gathered, biases, scales, strict=True):
                hidden = hidden_of(head, cut, rows, buffer, first)
                models += [hidden, head.weight, bias, tanh_scale or 0.0, output_scale]
            if len(heads) == 1:
                models += [None, None, None, 0.0, 1.0]
            torch.ops.dlogp._cuda_linear_states(*models, target, *rows, first, state, target_logits)
            finish(
                state, target_logits, target, rows, out, vocabulary, *(scale for _, scale in scales), ignore_index,
                first, call.launch,
            )  # fmt: skip
    return out.flat()


def _plan(heads: list[Head], target: Tensor, size: int, workspace: int) -> Plan:
    """As many splits as there are multiprocessors, so that they all have work at any number of rows."""
    numbers, splits = len(heads) * target.shape[1], properties(target.device).programs
    return plan_of(heads, target.shape[0], size, numbers, lambda *_: _TILES[len(heads)], workspace, splits)


def _padded_bias(head: Head, size: int) -> Tensor | None:
    """float32 of this size, since kernels read that of whole tiles, and nothing below MASKED_LOGIT."""
    if head.bias is None:
        return None
    padded = torch.zeros(size, dtype=torch.float32, device=head.bias.device)
    padded[: head.bias.shape[0]] = head.bias
    return padded.clamp_(min=MASKED_LOGIT.value)


def linear_logp_bwd(
    grads: Gradients, head: Head, targets: Targets, saved: Saved, output_mask: list[bool], workspace: int
) -> tuple[Tensor, ...]:
    if head.bias is not None and output_mask[2]:  # its sum is taken of numbers that are not rounded yet
        return linear_backward.linear_logp_bwd(grads, head, targets, saved, output_mask, workspace)
    target, ignore_index = targets.target.contiguous(), targets.ignore_index
    model = HeadGradients(head, output_mask, tile=(0, _BLOCK_TOKENS))
    if not model.wanted:
        return model.gradients()
    with on_device_of(target):
        scale, inverse_scale = linear_backward.scale_of(head.dtype, target, ignore_index, *grads)
        row_terms, target_terms = _terms(grads, saved, target, ignore_index, scale)
        # A block may begin within a tile, and end behind the last one.
        padded = _padded_bias(head, head.weight.shape[0] + _TILES[1].block_v)
        _, tanh_scale, output_scale = transform_of(head.transform)

        def block_gradient(head: Head, hidden: Tensor, first: int, column: int, gradient: Tensor) -> None:
            tokens = gradient.shape[1]
            bias = None if padded is None else padded[column : column + round_up(tokens, _TILES[1].block_v)]
            torch.ops.dlogp._cuda_linear_gradient(
                hidden, head.weight[column : column + tokens], bias, tanh_scale or 0.0, output_scale, target,
                target_terms, row_terms, first, column, gradient,
            )  # fmt: skip

        BackwardSchedule([model], target, ignore_index, None, inverse_scale, workspace, block_gradient).run()
    return model.gradients()


linear_delta_logp_bwd = functools.partial(linear_backward.linear_delta_logp_bwd, of_one=linear_logp_bwd)


def _terms(
    grads: Gradients, saved: Saved, target: Tensor, ignore_index: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """row_terms (4, N) and target_terms (N, K) of csrc/cuda/linear_sm90.h, `_math.logits_gradient` term by term.

    What arrives for ignored rows does not count.
    """
    kept = target != ignore_index
    row_kept = kept.any(-1)
    zero = torch.zeros(target.shape[0], dtype=torch.float32, device=target.device)
    of_targets = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    if grads.logp is not None:
        of_targets = torch.where(kept, grads.logp, 0.0)
    entropy, lse = (zero if grad is None else torch.where(row_kept, grad, 0.0) for grad in (grads.entropy, grads.lse))
    if scale is not None:
        of_targets, entropy, lse = of_targets * scale, entropy * scale, lse * scale
    constant = lse - of_targets.sum(-1) - entropy * torch.where(row_kept, saved.entropy, 0.0)
    largest = torch.where(row_kept, saved.extra[0], 0.0)
    log_sum = torch.where(row_kept, saved.extra[1].log1p(), _NOTHING)
    return torch.stack([largest, log_sum, constant, -entropy]), of_targets
