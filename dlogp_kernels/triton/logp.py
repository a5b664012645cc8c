"""`logp` on GPUs: statistics of given logits, and what every forward of one model ends with."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Asked, Gradients, Logits, Saved, Targets, Transform
from ..results import LogpStats, Outputs, allocated
from . import _math, _top
from ._device import on_device_of
from ._finish import check_targets, mask_ignored_and_invalid, store_extra, store_row_statistics, store_top
from ._launch import Launch, call_of, launch_anew
from ._math import MASKED_LOGIT
from ._rows import Matrix, Rows, matrix, row_offset
from ._sizes import ceil_div, next_power_of_2

#: Columns that one program reduces, block by block; how a row is cut depends on nothing but V.
_SPLIT = 16384
#: Threads of a program, each with two loads of 16 bytes a block.
_THREADS, _LOADS = 128, 2
#: Columns of a program of backward, which has nothing to reduce.
_TILE = 2048
_FINISH_ROWS = 16
#: States take this part of the workspace at most.
_STATE_SHARE = 8
EVERY_ROW = Rows(None, None)


class TileTransform(NamedTuple):
    """What makes x of raw logits, see _math.py: bias (V,) or None, and both scales."""

    bias: Any
    tanh_scale: float | None
    output_scale: float


class Tile(NamedTuple):
    """One model's logits before the transform, and that: two arguments of a kernel."""

    raw: Matrix
    transform: TileTransform

    @property
    def output_scale(self) -> float:
        return self.transform.output_scale


@triton.jit
def load_raw(raw, i, local, mask):
    """Columns `local` of row i, in their own dtype; −inf where masked out."""
    pointers = raw.data + row_offset(raw, i) + local.to(tl.int64) * raw.stride_column
    return tl.load(pointers, mask=mask, other=float("-inf"))


@triton.jit
def x_of(values, transform, tokens, mask):
    """x of _math.py of raw logits of these tokens; −inf stays."""
    bias = transform.bias
    if bias is not None:
        bias = tl.load(transform.bias + tokens, mask=mask, other=0.0).to(tl.float32)
    return _math.transform(values.to(tl.float32), bias, transform.tanh_scale)


@triton.jit
def load_x(raw, transform, i, local, column, mask):
    """x at row i of `raw` and its columns `local`, which are tokens column + local."""
    return x_of(load_raw(raw, i, local, mask), transform, column + local, mask)


@triton.jit
def masked_x_of(values, transform, tokens, mask):
    """x of raw logits, MASKED_LOGIT where masked out or −inf; a softcap makes every token possible."""
    x = x_of(values, transform, tokens, mask)
    return possible(x) if transform.tanh_scale is None else tl.where(mask, x, MASKED_LOGIT)


@triton.jit
def tile_of(values, transform, tokens, mask, EACH: tl.constexpr):
    """Their x in rows of EACH columns: those of one load of a thread.

    A row then has a state of its own, and no thread waits for another before the last block.
    """
    x = masked_x_of(values, transform, tokens, mask)
    return tl.reshape(x, [x.shape[0] // EACH, EACH])


@triton.jit
def with_exact_rest(
    state, lanes, raw, transform, raw_row, begin, end, column, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """`state`, (1,), of the columns from `begin` to `end`, which lanes, rows of `tile_of`, were merged to.

    A small rest lacks precision: the columns of the lane with the largest x are read again.
    """
    rest = state.rest
    if _math.any_row(rest < _math.LARGE_REST):
        lane, others = _math.largest_lane(lanes, transform.output_scale)
        j = tl.arange(0, SPLIT // BLOCK * EACH)
        local = begin + j // EACH * BLOCK + tl.max(lane, 0) * EACH + j % EACH
        values = load_raw(raw, raw_row, local, local < end)
        x = masked_x_of(values, transform, column + local, local < end)
        e = _math.exp((x - tl.max(state.m, 0)) * transform.output_scale)
        rest = others + tl.sum(_math.without_ones(e), 0)
    return _math.State(state.m, rest, state.weighted)


@triton.jit
def possible(x):
    """x with MASKED_LOGIT for −inf; NaN stays."""
    return tl.maximum(x, MASKED_LOGIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_of(index_ptr, first, i):
    """The row that tile row i belongs to."""
    n = (first + i).to(tl.int64)
    if index_ptr is not None:
        n = tl.load(index_ptr + n)
    return n


@triton.jit
def is_kept(target_ptr, n, K, ignore_index):
    """Whether some candidate of row n is not ignored."""
    kept = tl.load(target_ptr + n * K) != ignore_index
    for k in range(1, K):
        kept = kept | (tl.load(target_ptr + n * K + k) != ignore_index)
    return kept


@triton.jit
def pick(raw, transform, target_logits_ptr, target_ptr, n, i, raw_row, begin, end, column, K, R):
    """x of `raw_row` at the targets of row n that lie in the columns from `begin` to `end`, to target_logits (K, R)."""
    for k in range(K):
        local = tl.load(target_ptr + n * K + k) - column
        if (local >= begin) & (local < end):
            tl.store(
                target_logits_ptr + k * R + i, possible(load_x(raw, transform, raw_row, local, column, local >= 0))
            )


@triton.jit(do_not_specialize=["first", "raw_first", "R", "column", "split", "num_splits", "ignore_index"])
def _logp_fwd_kernel(
    raw, transform, target_ptr, index_ptr, count_ptr, state_ptr, target_logits_ptr, first, raw_first, R, width, column,
    K, ignore_index, split, num_splits, SPLIT: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """Softmax states (_math.py) of splits of a tile's rows, and x at their targets.

    raw: rows raw_first … raw_first + R are the tile (R, width), of any floating dtype, whose columns are the tokens
    from `column` on; target (N, K) int64; index (N,) int64 and count (1,) as in Rows; state (3, or with TOP 5,
    num_splits, R) and target_logits (K, R) float32. Program (i, s) reduces columns s·SPLIT … of row i, the row
    index[first + i], to the state of split + s, BLOCK columns at a time, each in rows of EACH; an ignored row is not
    read. float32, deterministic.
    """
    i, s = tl.program_id(0), tl.program_id(1)
    kept = first + i < tl.load(count_ptr) if count_ptr is not None else True
    if kept:
        n = row_of(index_ptr, first, i)
        if is_kept(target_ptr, n, K, ignore_index):
            raw_row, begin = raw_first + i, s * SPLIT
            end = tl.minimum(begin + SPLIT, width)
            local = begin + tl.arange(0, BLOCK)
            values = load_raw(raw, raw_row, local, local < end)
            lanes = _math.empty_state(BLOCK // EACH, WITH_ONE=True)
            if TOP:
                top_token = _top.empty_top(BLOCK // EACH).token
            for _ in range(0, end - begin, BLOCK):
                following = load_raw(raw, raw_row, local + BLOCK, local + BLOCK < end)
                x = tile_of(values, transform, column + local, local < end, EACH)
                if TOP:
                    tokens = tl.reshape(column + local, [BLOCK // EACH, EACH])
                    top_token = _top.first_with_m(top_token, lanes, x, tokens)
                lanes = _math.fold(lanes, x, transform.output_scale, WITH_ONE=True)
                values = following
                local += BLOCK
            state = _math.merge_lanes(lanes, transform.output_scale)
            state = with_exact_rest(state, lanes, raw, transform, raw_row, begin, end, column, SPLIT, BLOCK, EACH)
            one = tl.arange(0, 1)
            place = state_ptr + (split + s) * R + i + one
            _math.store_state(place, num_splits * R, state, one == 0)
            if TOP:
                top = _top.top_of_lanes(top_token, lanes, state)
                _top.store_top(place + _math.STATE_SIZE * num_splits * R, num_splits * R, top, one == 0)
            pick(raw, transform, target_logits_ptr, target_ptr, n, i, raw_row, begin, end, column, K, R)


@triton.jit(do_not_specialize=["first", "N", "R", "V", "num_splits", "ignore_index"])
def _finish_logp_kernel(
    state_ptr, target_logits_ptr, target_ptr, index_ptr, count_ptr, out, extra_ptr, first, N, R, V, K, num_splits,
    output_scale, ignore_index, SPLITS: tl.constexpr, ROWS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """LogpStats `out` and `extra` (results.Outputs), float32, of rows index[first + i], i < R, of their states and x.

    Shapes as in `_logp_fwd_kernel`; a program merges the states of ROWS rows in one fixed order. Deterministic.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(count_ptr) if count_ptr is not None else N
    mask = (i < R) & (first + i < count)
    n = (first + i).to(tl.int64)
    if index_ptr is not None:
        n = tl.load(index_ptr + n, mask=mask, other=0)
    splits = tl.arange(0, SPLITS)[:, None]
    splits_mask = (splits < num_splits) & mask[None, :]
    states = _math.load_state(state_ptr + splits * R + i[None, :], num_splits * R, splits_mask)
    state = _math.merge(states, output_scale)
    kept, bad = check_targets(target_ptr, n, mask, K, V, ignore_index)
    for k in range(K):
        valid = tl.load(target_ptr + n * K + k, mask=mask, other=0) != ignore_index
        x = tl.load(target_logits_ptr + k * R + i, mask=mask, other=0.0)
        tl.store(
            out.logp + n * K + k, mask_ignored_and_invalid(_math.logp_of(x, state, output_scale), valid, bad), mask=mask
        )
    store_row_statistics(out, n, _math.row_statistics_of(state, output_scale), kept, bad, mask, 1)
    if TOP:
        pointer, stride = state_ptr + splits * R + i[None, :], num_splits * R
        top = _top.load_top(pointer + _math.STATE_SIZE * stride, stride, splits_mask)
        top = _top.merge_top(top, states, output_scale)
        store_top(extra_ptr, n, N, top, state, kept, bad, mask, 2)
    store_extra(extra_ptr, n, N, _math.normalizer_of(state, output_scale), kept, bad, mask, 0)


@triton.jit
def load_or_zero(pointer, n):
    value = tl.full([], 0.0, tl.float32)
    if pointer is not None:
        value = tl.load(pointer + n)
    return value


@triton.jit
def target_gradient(grad_ptr, target_ptr, n, tokens, begin, K, ignore_index, TILE: tl.constexpr):
    """Σ_k of the gradients by log p of row n's targets, and at each of `tokens` (from `begin` on) that of its own."""
    total = tl.full([], 0.0, tl.float32)
    at_target = tl.zeros([TILE], tl.float32)
    if grad_ptr is not None:
        for k in range(K):
            target = tl.load(target_ptr + n * K + k)
            grad = tl.where(target != ignore_index, tl.load(grad_ptr + n * K + k), 0.0)
            total += grad
            if (target >= begin) & (target < begin + TILE):
                at_target += tl.where(tokens == target, grad, 0.0)
    return total, at_target


@triton.jit
def logp_all_of(x, transform, extra_ptr, n, N, FIRST: tl.constexpr):
    """log p of tokens of row n, of N, with these x; the normalizer begins at row FIRST of extra."""
    pointer = extra_ptr + FIRST * tl.cast(N, tl.int64) + n
    return _math.logp_of_x(x, (tl.load(pointer), tl.load(pointer + N)), transform.output_scale)


@triton.jit
def model_gradient(logp_all, at_target, total, grads, entropy_ptr, n):
    """By z, of one model's own statistics."""
    own = _math.logits_gradient(
        logp_all, tl.load(entropy_ptr + n), total, load_or_zero(grads.entropy, n), load_or_zero(grads.lse, n)
    )
    return at_target + own


@triton.jit
def store_raw_gradient(out, i, local, mask, grad_z, x, raw, transform, scale_ptr, IN_PLACE: tl.constexpr):
    """Into the Matrix `out`, in its dtype; with IN_PLACE also over the raw logits, in full."""
    grad = _math.raw_gradient(grad_z, x, transform.tanh_scale, transform.output_scale)
    if IN_PLACE:
        pointers = raw.data + row_offset(raw, i) + local.to(tl.int64) * raw.stride_column
        tl.store(pointers, grad.to(raw.data.dtype.element_ty), mask=mask)
    if scale_ptr is not None:
        grad *= tl.load(scale_ptr)
    pointers = out.data + row_offset(out, i) + local.to(tl.int64) * out.stride_column
    tl.store(pointers, grad.to(out.data.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "N", "column", "ignore_index"])
def _logp_bwd_kernel(
    raw, transform, out, target_ptr, saved, grads, scale_ptr, first, N, width, column, K, ignore_index,
    IN_PLACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient by the raw logits of a tile's rows, 0 for an ignored row.

    raw: tile (R, width) as in `_logp_fwd_kernel`, whose row i is the row first + i; out: a Matrix of the same shape,
    in its own dtype, times scale (1,) float32 if there is one; with IN_PLACE the tile itself also becomes the gradient,
    unscaled; saved, grads: as in Saved and Gradients.
    Program (i, s) does columns s·TILE … of row i. float32, deterministic.
    """
    i, s = tl.program_id(0), tl.program_id(1)
    n = (first + i).to(tl.int64)
    local = s * TILE + tl.arange(0, TILE)
    inside = local < width
    if is_kept(target_ptr, n, K, ignore_index):
        x = load_x(raw, transform, i, local, column, inside)
        begin = column + s * TILE
        total, at_target = target_gradient(grads.logp, target_ptr, n, column + local, begin, K, ignore_index, TILE)
        logp_all = logp_all_of(x, transform, saved.extra, n, N, 0)
        grad_z = model_gradient(logp_all, at_target, total, grads, saved.entropy, n)
        store_raw_gradient(out, i, local, inside, grad_z, x, raw, transform, scale_ptr, IN_PLACE)
    else:
        zero = tl.zeros([TILE], tl.float32)
        store_raw_gradient(out, i, local, inside, zero, zero, raw, transform, None, IN_PLACE)


def transform_of(transform: Transform, bias: Tensor | None = None) -> TileTransform:
    temperature, softcap, logit_scale = transform
    if softcap is None:
        return TileTransform(bias, None, logit_scale / temperature)
    return TileTransform(bias, logit_scale / softcap, softcap / temperature)


def tile_of_logits(model: Logits) -> Tile:
    return Tile(matrix(model.logits), transform_of(model.transform))


def split_of(width: int) -> int:
    return min(_SPLIT, max(128, next_power_of_2(width)))


def fold_constants(raw: Matrix, split: int, top: bool) -> dict[str, int]:
    """What forward kernels of given logits are compiled for."""
    each = 16 // raw.data.element_size()
    block = min(_THREADS * _LOADS * each, split)
    warps = max(1, block // (32 * _LOADS * each))
    return {"SPLIT": split, "BLOCK": block, "EACH": each, "TOP": top, "num_warps": warps}


def tile_width(width: int) -> int:
    """Of backward."""
    return min(_TILE, max(128, next_power_of_2(width)))


def num_warps(columns: int) -> int:
    return max(1, columns // 512)


def new_outputs(kind: Any, target: Tensor, rows: Rows, top: bool) -> Outputs:
    """Of float32 tensors: zeros where ignored rows are left out; else every row will be written."""
    new = target.new_empty if rows.row_index is None else target.new_zeros
    return allocated(kind, target, new, torch.float32, top)


def state_size(top: bool) -> int:
    return _math.STATE_SIZE.value + top * _top.TOP_SIZE.value


def new_states(target: Tensor, vocabulary: int, state_size: int, models: int, workspace: int) -> tuple[Tensor, Tensor]:
    """State (size, splits, R) and target_logits (models · K, R), R as many rows as the workspace allows."""
    num_splits = ceil_div(vocabulary, split_of(vocabulary))
    row_bytes = 4 * (state_size * num_splits + models * target.shape[1])
    num_rows = max(1, min(target.shape[0], workspace // _STATE_SHARE // row_bytes))
    state = torch.empty((state_size, num_splits, num_rows), dtype=torch.float32, device=target.device)
    target_logits = torch.empty((models * target.shape[1], num_rows), dtype=torch.float32, device=target.device)
    return state, target_logits


def fold_tile(
    logits: Tile,
    shape: tuple[int, int],
    target: Tensor,
    rows: Rows,
    ignore_index: int,
    state: Tensor,
    target_logits: Tensor,
    first: int = 0,
    column: int = 0,
    split: int = 0,
    raw_first: int = 0,
    launch: Launch = launch_anew,
) -> None:
    """States of a tile of `shape`, which begins at the row raw_first of the logits, to state (size, splits, R)."""
    columns = split_of(shape[1])
    arguments = (
        *logits, target, *rows, state, target_logits, first, raw_first, state.shape[2], shape[1], column,
        target.shape[1], ignore_index, split, state.shape[1],
    )  # fmt: skip
    grid = shape[0], ceil_div(shape[1], columns)
    top = state.shape[0] > state_size(top=False)
    launch(_logp_fwd_kernel, grid, arguments, fold_constants(logits.raw, columns, top))


def finish_logp(
    state: Tensor,
    target_logits: Tensor,
    target: Tensor,
    rows: Rows,
    out: Outputs,
    vocabulary: int,
    output_scale: float,
    ignore_index: int,
    first: int = 0,
    launch: Launch = launch_anew,
) -> None:
    """Write the outputs of the rows whose states are in state (state_size, splits, R)."""
    size, num_splits, num_rows = state.shape
    arguments = (
        state, target_logits, target, *rows, *out, first, target.shape[0], num_rows, vocabulary,
        target.shape[1], num_splits, output_scale, ignore_index,
    )  # fmt: skip
    top = size > state_size(top=False)
    constants = {"SPLITS": next_power_of_2(num_splits), "ROWS": _FINISH_ROWS, "TOP": top}
    launch(_finish_logp_kernel, (ceil_div(num_rows, _FINISH_ROWS),), arguments, constants)


def logp_fwd(model: Logits, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    logits, (target, ignore_index) = model.logits, (targets.target.contiguous(), targets.ignore_index)
    uncapped, v = model.transform.softcap is None, logits.shape[-1]
    launch = call_of("logp_fwd", logits.device, logits, target, uncapped, ignore_index, asked, workspace).launch
    out = new_outputs(LogpStats, target, EVERY_ROW, asked.top)
    tile = tile_of_logits(model)
    with on_device_of(logits):
        state, target_logits = new_states(target, v, state_size(asked.top), 1, workspace)
        for first in range(0, target.shape[0], state.shape[2]):
            shape = (min(state.shape[2], target.shape[0] - first), v)
            fold_tile(
                tile, shape, target, EVERY_ROW, ignore_index, state, target_logits, first, raw_first=first,
                launch=launch,
            )  # fmt: skip
            finish_logp(
                state, target_logits, target, EVERY_ROW, out, v, tile.output_scale, ignore_index, first,
                launch,
            )  # fmt: skip
    return out.flat()


def tile_gradient(
    logits: Tile,
    out: Matrix,
    shape: tuple[int, int],
    target: Tensor,
    saved: Saved,
    grads: Gradients,
    ignore_index: int,
    scale: Tensor | None = None,
    first: int = 0,
    column: int = 0,
    in_place: bool = False,
) -> None:
    """Gradient by the raw logits of a tile of `shape`, into `out`; `in_place`: also over the tile, in float32."""
    width = tile_width(shape[1])
    _logp_bwd_kernel[(shape[0], ceil_div(shape[1], width))](
        *logits, out, target, saved, grads, scale, first, target.shape[0], shape[1], column, target.shape[1],
        ignore_index, IN_PLACE=in_place, TILE=width, num_warps=num_warps(width),
    )  # fmt: skip


def contiguous(grads: Gradients) -> Gradients:
    """Gradients may arrive expanded, as from `loss.sum().backward()`."""
    return Gradients(*[None if grad is None else grad.contiguous() for grad in grads])


def logp_bwd(
    grads: Gradients, model: Logits, targets: Targets, saved: Saved, output_mask: list[bool], workspace: int
) -> tuple[Tensor, ...]:
    grad_logits = model.logits.new_empty(model.logits.shape if output_mask[0] else 0)
    if grad_logits.numel() > 0:
        target, shape = targets.target.contiguous(), (targets.target.shape[0], model.logits.shape[-1])
        with on_device_of(target):
            tile_gradient(
                tile_of_logits(model), matrix(grad_logits), shape, target, saved, contiguous(grads),
                targets.ignore_index,
            )  # fmt: skip
    return (grad_logits,)
