"""The backend "cuda" of the linear forward ops, on Hopper: softmax states by a kernel of CUDA C++, merged by Triton.

csrc/cuda/linear_forward_sm90.cuh has the kernel: at a hidden size of 2048 and more it runs at the speed of the bare
products. It takes bfloat16 and float16, and weights with rows that begin on 16 bytes; `why_not` says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inputs import Asked, Head, Targets
from ..results import DeltaLogpStats, LogpStats
from ._device import on_device_of, properties
from ._launch import call_of
from ._math import MASKED_LOGIT
from ._sizes import round_up
from .configs import Config
from .delta_logp import finish_delta_logp, pair_state_size
from .linear_forward import Plan, gather_buffer, hidden_of, plan_of, rows_of
from .logp import finish_logp, new_outputs, state_size, transform_of

#: Number of models → the kernel's tile and stages, `Tile` and kGroup there. A unit is of two row tiles.
_TILES = {1: Config(128, 256, 64, 12, 4, group=32), 2: Config(128, 160, 64, 12, 6, group=32)}


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
        biases = [_padded_bias(head, cut.tile.block_v) for head in heads]
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


def _padded_bias(head: Head, columns: int) -> Tensor | None:
    """float32, of whole tiles, and nothing below MASKED_LOGIT."""
    if head.bias is None:
        return None
    vocabulary = head.bias.shape[0]
    padded = torch.zeros(round_up(vocabulary, columns), dtype=torch.float32, device=head.bias.device)
    padded[:vocabulary] = head.bias
    return padded.clamp_(min=MASKED_LOGIT.value)
