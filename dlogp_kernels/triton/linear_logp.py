"""`linear_logp` forward on GPUs: tiles of logits, folded into softmax states without leaving registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Asked, Head, Targets
from ..results import LogpStats
from . import _math, _top
from ._device import on_device_of, precision, properties
from ._launch import call_of
from .linear_forward import (
    bias_of,
    gather_buffer,
    is_masked,
    logits_tile,
    operands_of,
    pick_targets,
    plan,
    rows_of,
    unit_of,
    with_contiguous_bias,
    with_softcap,
)
from .logp import finish_logp, new_outputs, state_size


@triton.jit(do_not_specialize=["first", "N", "R"])
def _linear_logp_fwd_kernel(
    hidden, weight, layout, target_ptr, index_ptr, count_ptr, state_ptr, target_logits_ptr, first, N, R, V, K,
    blocks_per_split, num_splits, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    ONE_TARGET: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Softmax states (_math.py) of rows × splits of the vocabulary, and x = transform(hidden · weightᵀ) at the targets.

    hidden, weight, layout: as HeadOperands, hidden (R, D) holding rows index[first + i]; target (N, K), index (N,)
    int64, count (1,) int32 as in Rows; state (3, or with TOP 5, num_splits, R) and target_logits (K, R) float32. A
    program takes units (row tile, split) in turn, each of `blocks_per_split` tiles of logits. Accumulates in float32;
    deterministic, and a row's bits do not depend on others.
    """
    count = tl.load(count_ptr) if count_ptr is not None else N
    num_rows = tl.minimum(count - first, R)
    row_tiles = tl.cdiv(num_rows, BLOCK_N)
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_units = tl.cdiv(tl.maximum(row_tiles * num_splits - program, 0), programs)
    state = _math.empty_state(BLOCK_N)
    if TOP:
        top = _top.empty_top(BLOCK_N)
    # One loop over all tiles of all units: the next tile's loads begin while this one is folded.
    for step in tl.range(0, num_units * blocks_per_split, flatten=True):
        block = step % blocks_per_split
        row_tile, split = unit_of(program + step // blocks_per_split * programs, row_tiles, num_splits, GROUP)
        column = (split * blocks_per_split + block) * BLOCK_V
        row = row_tile * BLOCK_N
        x = logits_tile(
            hidden, weight, layout, row, column, num_rows, V, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, PRECISION
        )
        tokens = column + tl.arange(0, BLOCK_V)
        if MASKED:
            x += bias_of(layout, tokens, V)[None, :]
        x = with_softcap(x, layout, tokens, V)
        i = row + tl.arange(0, BLOCK_N)
        mask = i < num_rows
        n = first + i.to(tl.int64)
        if index_ptr is not None:
            n = tl.load(index_ptr + n, mask=mask, other=0)
        has_target, found = pick_targets(
            x, None, target_logits_ptr, target_ptr, n, i, mask, column, K, R, BLOCK_V, ONE_TARGET
        )
        state = _math.state_unless(block == 0, state)
        if TOP:
            top = _top.fold_top(_top.top_unless(block == 0, top), state, x, tokens[None, :], layout.output_scale)
        state = _math.fold(state, x, layout.output_scale, has_target, found)
        place, done = state_ptr + split * R + i, mask & (block == blocks_per_split - 1)
        _math.store_state(place, num_splits * R, state, done)
        if TOP:
            _top.store_top(place + _math.STATE_SIZE * num_splits * R, num_splits * R, top, done)


def linear_logp_fwd(head: Head, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    head, target, ignore_index = with_contiguous_bias(head), targets.target.contiguous(), targets.ignore_index
    hidden, vocabulary = head.hidden, head.weight.shape[0]
    with on_device_of(hidden):
        arithmetic = precision(properties(hidden.device), head.dtype)
        call = call_of("linear_logp_fwd", hidden.device, *head, target, ignore_index, asked, workspace, arithmetic)
        if call.plan is None:
            cut = plan([head], target, state_size(asked.top), workspace)
            constants = {"ONE_TARGET": target.shape[1] == 1, "TOP": asked.top}
            call.plan = cut, cut.constants(is_masked(head, cut)) | constants
        cut, constants = call.plan
        rows = rows_of(target, cut, ignore_index)
        out = new_outputs(LogpStats, target, rows, asked.top)
        state = hidden.new_empty((state_size(asked.top), cut.num_splits, cut.num_rows), dtype=torch.float32)
        target_logits = hidden.new_empty((target.shape[1], cut.num_rows), dtype=torch.float32)
        gathered = gather_buffer(head, cut, rows)
        for first in range(0, target.shape[0], cut.num_rows):
            operands = operands_of(head, cut, rows, gathered, first)
            arguments = (
                *operands, target, *rows, state, target_logits, first, target.shape[0], cut.num_rows, vocabulary,
                target.shape[1], cut.blocks_per_split, cut.num_splits,
            )  # fmt: skip
            call.launch(_linear_logp_fwd_kernel, (cut.programs,), arguments, constants)
            finish_logp(
                state, target_logits, target, rows, out, vocabulary, operands.layout.output_scale,
                ignore_index, first, call.launch,
            )  # fmt: skip
    return out.flat()
