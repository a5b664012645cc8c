"""`linear_delta_logp` forward on GPUs: both models' tiles of logits are in registers at once, so KL is there too."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Asked, Head, Targets
from ..results import DeltaLogpStats
from . import _math, _top
from ._device import on_device_of, precision, properties
from ._launch import call_of
from ._math import MASKED_LOGIT
from .delta_logp import finish_delta_logp, pair_state_size, store_pair_top
from .linear_forward import (
    Plan,
    bias_of,
    gather_buffer,
    is_masked,
    operands_of,
    pair_of_logits_tiles,
    pick_targets,
    plan,
    rows_of,
    share_weight,
    stages_of_one_weight,
    unit_of,
    with_contiguous_bias,
    with_softcap,
)
from .logp import new_outputs


@triton.jit(do_not_specialize=["first", "N", "R"])
def _linear_delta_logp_fwd_kernel(
    hidden, weight, layout, base_hidden, base_weight, base_layout, target_ptr, index_ptr, count_ptr, state_ptr,
    target_logits_ptr, first, N, R, V, K, blocks_per_split, num_splits, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, ONE_TARGET: tl.constexpr, ONE_WEIGHT: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Pair states (_math.py) of rows × splits of the vocabulary from both models' x, and both x at the targets.

    As `_linear_logp_fwd_kernel`, with state (10, or with TOP 14, num_splits, R) and target_logits (2·K, R), the base's
    K last. Accumulates in float32; deterministic, and a row's bits do not depend on others.
    """
    count = tl.load(count_ptr) if count_ptr is not None else N
    num_rows = tl.minimum(count - first, R)
    row_tiles = tl.cdiv(num_rows, BLOCK_N)
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_units = tl.cdiv(tl.maximum(row_tiles * num_splits - program, 0), programs)
    state = _math.empty_pair_state(BLOCK_N)
    if TOP:
        top, base_top = _top.empty_top(BLOCK_N), _top.empty_top(BLOCK_N)
    for step in range(0, num_units * blocks_per_split):
        block = step % blocks_per_split
        row_tile, split = unit_of(program + step // blocks_per_split * programs, row_tiles, num_splits, GROUP)
        column = (split * blocks_per_split + block) * BLOCK_V
        row = row_tile * BLOCK_N
        tokens = column + tl.arange(0, BLOCK_V)
        x, base_x = pair_of_logits_tiles(
            hidden, weight, layout, base_hidden, base_weight, base_layout, row, column, num_rows, V, BLOCK_N, BLOCK_V,
            BLOCK_D, DESCRIPTORS, PRECISION, ONE_WEIGHT,
        )  # fmt: skip
        state = _math.pair_state_unless(block == 0, state)
        if MASKED:
            bias, base_bias = bias_of(layout, tokens, V), bias_of(base_layout, tokens, V)
            x += bias[None, :]
            base_x += base_bias[None, :]
            if layout.tanh_scale is not None:  # a softcap makes every token possible
                bias = tl.where(tokens < V, 0.0, MASKED_LOGIT)
            if base_layout.tanh_scale is not None:
                base_bias = tl.where(tokens < V, 0.0, MASKED_LOGIT)
            state = _math.with_unsupported(state, bias[None, :], base_bias[None, :])
        x, base_x = with_softcap(x, layout, tokens, V), with_softcap(base_x, base_layout, tokens, V)
        i = row + tl.arange(0, BLOCK_N)
        mask = i < num_rows
        n = first + i.to(tl.int64)
        if index_ptr is not None:
            n = tl.load(index_ptr + n, mask=mask, other=0)
        has_target, found = pick_targets(
            x, base_x, target_logits_ptr, target_ptr, n, i, mask, column, K, R, BLOCK_V, ONE_TARGET
        )
        if TOP:
            top, base_top = _top.top_unless(block == 0, top), _top.top_unless(block == 0, base_top)
            top = _top.fold_top(top, state.model, x, tokens[None, :], layout.output_scale)
            base_top = _top.fold_top(base_top, state.base, base_x, tokens[None, :], base_layout.output_scale)
        state = _math.fold_pair(
            state, x, base_x, layout.output_scale, base_layout.output_scale, has_target, found
        )  # fmt: skip
        place, done = state_ptr + split * R + i, mask & (block == blocks_per_split - 1)
        _math.store_pair_state(place, num_splits * R, state, done)
        if TOP:
            store_pair_top(place, num_splits * R, top, base_top, done)


def _plan(head: Head, base: Head, target: Tensor, asked: Asked, workspace: int) -> tuple[Plan, dict[str, Any]]:
    """And what the kernel is compiled for."""
    cut = plan([head, base], target, pair_state_size(asked.top), workspace)
    constants = cut.constants(is_masked(head, cut) or is_masked(base, cut))
    constants |= {"ONE_TARGET": target.shape[1] == 1, "ONE_WEIGHT": share_weight(head, base, cut), "TOP": asked.top}
    if constants["ONE_WEIGHT"]:
        constants["num_stages"] = stages_of_one_weight(cut, head.dtype.itemsize)
    return cut, constants


def linear_delta_logp_fwd(head: Head, base: Head, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    head, base = with_contiguous_bias(head), with_contiguous_bias(base)
    target, ignore_index = targets.target.contiguous(), targets.ignore_index
    hidden, vocabulary = head.hidden, head.weight.shape[0]
    with on_device_of(hidden):
        call = call_of(
            "linear_delta_logp_fwd", hidden.device, *head, *base, target, ignore_index, asked, workspace,
            precision(properties(hidden.device), head.dtype), head.weight.data_ptr() == base.weight.data_ptr(),
        )  # fmt: skip
        if call.plan is None:
            call.plan = _plan(head, base, target, asked, workspace)
        cut, constants = call.plan
        rows = rows_of(target, cut, ignore_index)
        out = new_outputs(DeltaLogpStats, target, rows, asked.top)
        state = hidden.new_empty((pair_state_size(asked.top), cut.num_splits, cut.num_rows), dtype=torch.float32)
        target_logits = hidden.new_empty((2 * target.shape[1], cut.num_rows), dtype=torch.float32)
        gathered, base_gathered = gather_buffer(head, cut, rows), gather_buffer(base, cut, rows)
        for first in range(0, target.shape[0], cut.num_rows):
            operands = operands_of(head, cut, rows, gathered, first)
            base_operands = operands_of(base, cut, rows, base_gathered, first)
            arguments = (
                *operands, *base_operands, target, *rows, state, target_logits, first, target.shape[0], cut.num_rows,
                vocabulary, target.shape[1], cut.blocks_per_split, cut.num_splits,
            )  # fmt: skip
            call.launch(_linear_delta_logp_fwd_kernel, (cut.programs,), arguments, constants)
            finish_delta_logp(
                state, target_logits, target, rows, out, vocabulary, operands.layout.output_scale,
                base_operands.layout.output_scale, ignore_index, first, call.launch,
            )  # fmt: skip
    return out.flat()
