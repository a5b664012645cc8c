"""`delta_logp` on GPUs: statistics of a pair's given logits, and what every forward of a pair ends with."""

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Asked, Logits, PairGradients, PairSaved, Targets
from ..results import DeltaLogpStats, Outputs
from . import _math, _top
from ._device import on_device_of
from ._finish import check_targets, mask_ignored_and_invalid, store_extra, store_row_statistics, store_top
from ._launch import Launch, call_of, launch_anew
from ._math import MASKED_LOGIT
from ._rows import Matrix, Rows, matrix
from ._sizes import ceil_div, next_power_of_2
from .logp import (
    EVERY_ROW,
    Tile,
    contiguous,
    fold_constants,
    is_kept,
    load_or_zero,
    load_raw,
    load_x,
    logp_all_of,
    model_gradient,
    new_outputs,
    new_states,
    num_warps,
    pick,
    row_of,
    split_of,
    store_raw_gradient,
    target_gradient,
    tile_of,
    tile_of_logits,
    tile_width,
    with_exact_rest,
)

_FINISH_ROWS = 8


@triton.jit(do_not_specialize=["first", "raw_first", "R", "column", "split", "num_splits", "ignore_index"])
def _delta_logp_fwd_kernel(
    raw, transform, base_raw, base_transform, target_ptr, index_ptr, count_ptr, state_ptr, target_logits_ptr, first,
    raw_first, R, width, column, K, ignore_index, split, num_splits, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    EACH: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Pair states (_math.py) of splits of both models' tiles, and both x at the targets.

    As `_logp_fwd_kernel`, with state (10, or with TOP 14, num_splits, R) and target_logits (2·K, R), the base's K last.
    Deterministic.
    """
    i, s = tl.program_id(0), tl.program_id(1)
    kept = first + i < tl.load(count_ptr) if count_ptr is not None else True
    if kept:
        n = row_of(index_ptr, first, i)
        if is_kept(target_ptr, n, K, ignore_index):
            raw_row, begin, base_target_logits = raw_first + i, s * SPLIT, target_logits_ptr + K * R
            end = tl.minimum(begin + SPLIT, width)
            local = begin + tl.arange(0, BLOCK)
            values = load_raw(raw, raw_row, local, local < end)
            base_values = load_raw(base_raw, raw_row, local, local < end)
            lanes = _math.empty_pair_state(BLOCK // EACH, WITH_ONE=True)
            if TOP:
                top_token = _top.empty_top(BLOCK // EACH).token
                base_top_token = top_token
            least = tl.zeros([BLOCK // EACH], tl.float32)
            for _ in range(0, end - begin, BLOCK):
                following = load_raw(raw, raw_row, local + BLOCK, local + BLOCK < end)
                base_following = load_raw(base_raw, raw_row, local + BLOCK, local + BLOCK < end)
                x = tile_of(values, transform, column + local, local < end, EACH)
                base_x = tile_of(base_values, base_transform, column + local, local < end, EACH)
                if TOP:
                    tokens = tl.reshape(column + local, [BLOCK // EACH, EACH])
                    top_token = _top.first_with_m(top_token, lanes.model, x, tokens)
                    base_top_token = _top.first_with_m(base_top_token, lanes.base, base_x, tokens)
                lanes = _math.fold_pair(
                    lanes, x, base_x, transform.output_scale, base_transform.output_scale, WITH_ONE=True
                )
                least = tl.minimum(least, tl.minimum(tl.min(x, 1), tl.min(base_x, 1)))
                values, base_values = following, base_following
                local += BLOCK
            # Few logits are −inf: only where some are, another walk asks which model they belong to.
            if tl.min(least, 0) <= MASKED_LOGIT:
                local = begin + tl.arange(0, BLOCK)
                for _ in range(0, end - begin, BLOCK):
                    inside = local < end
                    values = load_raw(raw, raw_row, local, inside)
                    base_values = load_raw(base_raw, raw_row, local, inside)
                    x = tile_of(values, transform, column + local, inside, EACH)
                    base_x = tile_of(base_values, base_transform, column + local, inside, EACH)
                    lanes = _math.with_unsupported(lanes, x, base_x)
                    local += BLOCK
            state = _math.merge_pair_lanes(lanes, transform.output_scale, base_transform.output_scale)
            model = with_exact_rest(
                state.model, lanes.model, raw, transform, raw_row, begin, end, column, SPLIT, BLOCK, EACH
            )
            base = with_exact_rest(
                state.base, lanes.base, base_raw, base_transform, raw_row, begin, end, column, SPLIT, BLOCK, EACH
            )
            state = _math.with_models(state, model, base)
            one = tl.arange(0, 1)
            place = state_ptr + (split + s) * R + i + one
            _math.store_pair_state(place, num_splits * R, state, one == 0)
            if TOP:
                store_pair_top(
                    place, num_splits * R, _top.top_of_lanes(top_token, lanes.model, model),
                    _top.top_of_lanes(base_top_token, lanes.base, base), one == 0,
                )  # fmt: skip
            pick(raw, transform, target_logits_ptr, target_ptr, n, i, raw_row, begin, end, column, K, R)
            pick(base_raw, base_transform, base_target_logits, target_ptr, n, i, raw_row, begin, end, column, K, R)


@triton.jit
def store_pair_top(pointer, stride, top, base_top, mask):
    """Behind a pair state that begins at `pointer`."""
    pointer += _math.PAIR_STATE_SIZE * stride
    _top.store_top(pointer, stride, top, mask)
    _top.store_top(pointer + _top.TOP_SIZE * stride, stride, base_top, mask)


@triton.jit(do_not_specialize=["first", "N", "R", "V", "num_splits", "ignore_index"])
def _finish_delta_logp_kernel(
    state_ptr, target_logits_ptr, target_ptr, index_ptr, count_ptr, out, extra_ptr, first, N, R,
    V, K, num_splits, output_scale, base_output_scale, ignore_index, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """DeltaLogpStats `out` and `extra` (results.Outputs), float32, of rows index[first + i], i < R.

    From their states and both x at the targets.

    Shapes as in `_delta_logp_fwd_kernel`; a program finishes ROWS rows, merging in one fixed order. Deterministic.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(count_ptr) if count_ptr is not None else N
    mask = (i < R) & (first + i < count)
    n = (first + i).to(tl.int64)
    if index_ptr is not None:
        n = tl.load(index_ptr + n, mask=mask, other=0)
    splits = tl.arange(0, SPLITS)[:, None]
    states = _math.load_pair_state(
        state_ptr + splits * R + i[None, :],
        num_splits * R,
        (splits < num_splits) & mask[None, :],
    )
    state = _math.merge_pair(states, output_scale, base_output_scale)
    kept, bad = check_targets(target_ptr, n, mask, K, V, ignore_index)
    for k in range(K):
        valid = tl.load(target_ptr + n * K + k, mask=mask, other=0) != ignore_index
        x = tl.load(target_logits_ptr + k * R + i, mask=mask, other=0.0)
        base_x = tl.load(target_logits_ptr + (K + k) * R + i, mask=mask, other=0.0)
        logp = _math.logp_of(x, state.model, output_scale)
        base_logp = _math.logp_of(base_x, state.base, base_output_scale)
        tl.store(out.logp + n * K + k, mask_ignored_and_invalid(logp, valid, bad), mask=mask)
        tl.store(out.base_logp + n * K + k, mask_ignored_and_invalid(base_logp, valid, bad), mask=mask)
        tl.store(out.delta_logp + n * K + k, mask_ignored_and_invalid(logp - base_logp, valid, bad), mask=mask)
    values = _math.pair_row_statistics_of(state, output_scale, base_output_scale)
    store_row_statistics(out, n, values, kept, bad, mask, 3)
    if TOP:
        stride, splits_mask = num_splits * R, (splits < num_splits) & mask[None, :]
        pointer = state_ptr + _math.PAIR_STATE_SIZE * stride + splits * R + i[None, :]
        top = _top.merge_top(_top.load_top(pointer, stride, splits_mask), states.model, output_scale)
        store_top(extra_ptr, n, N, top, state.model, kept, bad, mask, 4)
        base_top = _top.load_top(pointer + _top.TOP_SIZE * stride, stride, splits_mask)
        base_top = _top.merge_top(base_top, states.base, base_output_scale)
        store_top(extra_ptr, n, N, base_top, state.base, kept, bad, mask, 6)
    normalizer = _math.normalizer_of(state.model, output_scale)
    base_normalizer = _math.normalizer_of(state.base, base_output_scale)
    store_extra(extra_ptr, n, N, normalizer, kept, bad, mask, 0)
    store_extra(extra_ptr, n, N, base_normalizer, kept, bad, mask, 2)


@triton.jit(do_not_specialize=["first", "N", "column", "ignore_index"])
def _delta_logp_bwd_kernel(
    raw, transform, base_raw, base_transform, out, base_out, target_ptr, saved, grads,
    base_grads, grad_kl_ptr, grad_reverse_kl_ptr, scale_ptr, first, N, width, column, K, ignore_index,
    IN_PLACE: tl.constexpr, BASE_IN_PLACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients by both models' raw logits of a tile's rows, 0 for an ignored row.

    As `_logp_bwd_kernel`; out or base_out is None where that gradient is not wanted. float32, deterministic.
    """
    i, s = tl.program_id(0), tl.program_id(1)
    n = (first + i).to(tl.int64)
    local = s * TILE + tl.arange(0, TILE)
    inside = local < width
    begin = column + s * TILE
    if is_kept(target_ptr, n, K, ignore_index):
        x = load_x(raw, transform, i, local, column, inside)
        base_x = load_x(base_raw, base_transform, i, local, column, inside)
        logp_all = logp_all_of(x, transform, saved.extra, n, N, 0)
        base_logp_all = logp_all_of(base_x, base_transform, saved.extra, n, N, 2)
        grad_kl, grad_reverse_kl = load_or_zero(grad_kl_ptr, n), load_or_zero(grad_reverse_kl_ptr, n)
        if out is not None:
            total, at_target = target_gradient(grads.logp, target_ptr, n, column + local, begin, K, ignore_index, TILE)
            grad_z = model_gradient(logp_all, at_target, total, grads, saved.entropy, n)
            kl = tl.load(saved.kl + n)
            grad_z += _math.divergence_gradient(logp_all, base_logp_all, kl, grad_kl, grad_reverse_kl)
            store_raw_gradient(out, i, local, inside, grad_z, x, raw, transform, scale_ptr, IN_PLACE)
        if base_out is not None:
            total, at_target = target_gradient(
                base_grads.logp, target_ptr, n, column + local, begin, K, ignore_index, TILE
            )
            grad_z = model_gradient(base_logp_all, at_target, total, base_grads, saved.base_entropy, n)
            kl = tl.load(saved.reverse_kl + n)
            grad_z += _math.divergence_gradient(base_logp_all, logp_all, kl, grad_reverse_kl, grad_kl)
            store_raw_gradient(
                base_out, i, local, inside, grad_z, base_x, base_raw, base_transform, scale_ptr, BASE_IN_PLACE
            )
    else:
        zero = tl.zeros([TILE], tl.float32)
        if out is not None:
            store_raw_gradient(out, i, local, inside, zero, zero, raw, transform, None, IN_PLACE)
        if base_out is not None:
            store_raw_gradient(base_out, i, local, inside, zero, zero, base_raw, base_transform, None, BASE_IN_PLACE)


def pair_state_size(top: bool) -> int:
    return _math.PAIR_STATE_SIZE.value + 2 * top * _top.TOP_SIZE.value


def fold_pair_tile(
    logits: Tile,
    base_logits: Tile,
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
    """States of both tiles of `shape` into state (pair_state_size, splits, R) from `split` on; raw_first as for one."""
    columns = split_of(shape[1])
    arguments = (
        *logits, *base_logits, target, *rows, state, target_logits, first, raw_first, state.shape[2], shape[1], column,
        target.shape[1], ignore_index, split, state.shape[1],
    )  # fmt: skip
    grid = shape[0], ceil_div(shape[1], columns)
    top = state.shape[0] > pair_state_size(top=False)
    launch(_delta_logp_fwd_kernel, grid, arguments, fold_constants(logits.raw, columns, top))


def finish_delta_logp(
    state: Tensor,
    target_logits: Tensor,
    target: Tensor,
    rows: Rows,
    out: Outputs,
    vocabulary: int,
    output_scale: float,
    base_output_scale: float,
    ignore_index: int,
    first: int = 0,
    launch: Launch = launch_anew,
) -> None:
    """Write the outputs of the rows whose states are in state (pair_state_size, splits, R)."""
    size, num_splits, num_rows = state.shape
    arguments = (
        state, target_logits, target, *rows, *out, first, target.shape[0], num_rows, vocabulary,
        target.shape[1], num_splits, output_scale, base_output_scale, ignore_index,
    )  # fmt: skip
    top = size > pair_state_size(top=False)
    constants = {"SPLITS": next_power_of_2(num_splits), "ROWS": _FINISH_ROWS, "TOP": top}
    launch(_finish_delta_logp_kernel, (ceil_div(num_rows, _FINISH_ROWS),), arguments, constants)


def delta_logp_fwd(model: Logits, base: Logits, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    logits, (target, ignore_index) = model.logits, (targets.target.contiguous(), targets.ignore_index)
    uncapped, v = (model.transform.softcap is None, base.transform.softcap is None), logits.shape[-1]
    launch = call_of(
        "delta_logp_fwd", logits.device, logits, base.logits, target, uncapped, ignore_index, asked, workspace
    ).launch  # fmt: skip
    out = new_outputs(DeltaLogpStats, target, EVERY_ROW, asked.top)
    tile, base_tile = tile_of_logits(model), tile_of_logits(base)
    with on_device_of(logits):
        state, target_logits = new_states(target, v, pair_state_size(asked.top), 2, workspace)
        for first in range(0, target.shape[0], state.shape[2]):
            shape = (min(state.shape[2], target.shape[0] - first), v)
            fold_pair_tile(
                tile, base_tile, shape, target, EVERY_ROW, ignore_index, state, target_logits, first, raw_first=first,
                launch=launch,
            )  # fmt: skip
            finish_delta_logp(
                state, target_logits, target, EVERY_ROW, out, v, tile.output_scale,
                base_tile.output_scale, ignore_index, first, launch,
            )  # fmt: skip
    return out.flat()


def pair_tile_gradient(
    logits: Tile,
    base_logits: Tile,
    out: Matrix | None,
    base_out: Matrix | None,
    shape: tuple[int, int],
    target: Tensor,
    saved: PairSaved,
    grads: PairGradients,
    ignore_index: int,
    scale: Tensor | None = None,
    first: int = 0,
    column: int = 0,
    in_place: tuple[bool, bool] = (False, False),
) -> None:
    """Gradients by the raw logits of both tiles of `shape`, into out and base_out; `in_place` as for one model."""
    width = tile_width(shape[1])
    _delta_logp_bwd_kernel[(shape[0], ceil_div(shape[1], width))](
        *logits, *base_logits, out, base_out, target, saved, *grads, scale, first, target.shape[0], shape[1], column,
        target.shape[1], ignore_index, IN_PLACE=in_place[0], BASE_IN_PLACE=in_place[1], TILE=width,
        num_warps=num_warps(width),
    )  # fmt: skip


def contiguous_pair(grads: PairGradients) -> PairGradients:
    divergences = [None if grad is None else grad.contiguous() for grad in (grads.kl, grads.reverse_kl)]
    return PairGradients(contiguous(grads.model), contiguous(grads.base), *divergences)


def delta_logp_bwd(
    grads: PairGradients,
    model: Logits,
    base: Logits,
    targets: Targets,
    saved: PairSaved,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    gradients = tuple(
        x.logits.new_empty(x.logits.shape if wanted else 0)
        for x, wanted in zip((model, base), output_mask, strict=True)
    )
    shape = (targets.target.shape[0], model.logits.shape[-1])
    if shape[0] > 0 and any(output_mask):
        out, base_out = (matrix(x) if wanted else None for x, wanted in zip(gradients, output_mask, strict=True))
        with on_device_of(model.logits):
            pair_tile_gradient(
                tile_of_logits(model), tile_of_logits(base), out, base_out, shape, targets.target.contiguous(), saved,
                contiguous_pair(grads), targets.ignore_index,
            )  # fmt: skip
    return gradients
