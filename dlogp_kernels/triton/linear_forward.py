"""What the fused forward kernels of one model and of a pair share: the tile of logits, the order of tiles, the plan.

The vocabulary is cut into splits of a few tiles each. A program takes one tile of rows through one split, tile by
tile, with the softmax state in registers, stores the state, and goes on to its next unit; a second kernel merges the
splits. How the vocabulary is cut depends on V and the device alone, so a row's result does not depend on other rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..inputs import Head
from . import _math, _rows
from ._device import precision, properties
from ._math import MASKED_LOGIT
from ._rows import Rows
from ._sizes import ceil_div, round_up
from .configs import Config, config
from .logp import EVERY_ROW, transform_of

#: Forward takes this part of the workspace at most: 64 MiB by default.
_SHARE = 4
#: Dimensions of which float32 products are added up one after another.
_PART = tl.constexpr(512)
#: Of shared memory, where there are descriptors; a program may have 227 KiB there.
_TILE_BYTES = 224 * 2**10


class HeadLayout(NamedTuple):
    """What a kernel needs to know of a head besides hidden and weight; bias and both scales as in TileTransform."""

    bias: Any
    D: int
    stride_hidden: int
    stride_token: int
    stride_weight: int
    tanh_scale: float | None
    output_scale: float


class HeadOperands(NamedTuple):
    """One model's head as three arguments of a kernel.

    hidden (rows, D) and weight (V, D) are both pointers, or both tensor descriptors: those have to be arguments of
    their own, since Triton (3.6, 3.7) can not launch a kernel with a descriptor inside a tuple.
    """

    hidden: Any
    weight: Any
    layout: HeadLayout


def with_contiguous_bias(head: Head) -> Head:
    return head if head.bias is None else head._replace(bias=head.bias.contiguous())


@triton.jit
def add_part(tile, part):
    """(tile + part, what this sum lost by rounding, which the next part begins with): Kahan's summation."""
    total = tile + part
    lost = part - (total - tile)
    return total, tl.where(lost == lost, lost, 0.0)  # an infinite logit stays


@triton.jit
def add_product(tile, lost, hidden, weight, PRECISION: tl.constexpr):
    """`add_part` of a float32 product; narrower types are added up within the matrix units."""
    if hidden.dtype == tl.float32 and PRECISION != "tf32":
        return add_part(tile, tl.dot(hidden, weight, lost, input_precision=PRECISION))
    return tl.dot(hidden, weight, tile, input_precision=PRECISION), lost


@triton.jit
def logits_tile(
    hidden_source, weight_source, layout, row, column, num_rows, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden · weightᵀ of rows from `row` and tokens from `column` on, float32; 0 outside.

    In float32 the sum goes in parts, of _PART, or where registers lack for that of BLOCK_D. Log p at a hidden size of
    4096 and z up to 50 is off by 8.4e-6 on an H200 with parts of 512, by 1.4e-5 with one chain of all products.
    """
    tile, lost = tl.zeros([BLOCK_N, BLOCK_V], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if DESCRIPTORS and PRECISION == "tf32x3":
        for begin in range(0, layout.D, _PART):
            for d in range(begin, tl.minimum(begin + _PART, layout.D), BLOCK_D):
                lost = tl.dot(
                    hidden_source.load([row, d]), weight_source.load([column, d]).T, lost, input_precision=PRECISION
                )  # fmt: skip
            tile, lost = add_part(tile, lost)
    elif DESCRIPTORS:
        for d in range(0, layout.D, BLOCK_D):
            hidden = hidden_source.load([row, d])
            weight = weight_source.load([column, d])
            tile = tl.dot(hidden, weight.to(hidden.dtype).T, tile, input_precision=PRECISION)
    else:
        rows, tokens, dims = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
        hidden_ptrs = hidden_source + rows.to(tl.int64)[:, None] * layout.stride_hidden + dims[None, :]
        weight_ptrs = weight_source + tokens.to(tl.int64)[None, :] * layout.stride_token
        weight_ptrs += dims.to(tl.int64)[:, None] * layout.stride_weight
        for d in range(0, layout.D, BLOCK_D):
            inside = dims < layout.D - d
            hidden = tl.load(hidden_ptrs, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(tokens < V)[None, :] & inside[:, None], other=0.0)
            tile, lost = add_product(tile, lost, hidden, weight.to(hidden.dtype), PRECISION)
            hidden_ptrs += BLOCK_D
            weight_ptrs += layout.stride_weight * BLOCK_D
    return tile


@triton.jit
def logits_tiles_of_one_weight(
    hidden_source, base_hidden_source, weight_source, D, row, column, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both models' `logits_tile` by descriptors where they have the same weight: a tile of it is loaded once."""
    tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    base_tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for d in range(0, D, BLOCK_D):
        weight = weight_source.load([column, d])
        hidden = hidden_source.load([row, d])
        base_hidden = base_hidden_source.load([row, d])
        tile = tl.dot(hidden, weight.T, tile, input_precision=PRECISION)
        base_tile = tl.dot(base_hidden, weight.T, base_tile, input_precision=PRECISION)
    return tile, base_tile


@triton.jit
def pair_of_logits_tiles(
    hidden, weight, layout, base_hidden, base_weight, base_layout, row, column, num_rows, V, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    ONE_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Both models' `logits_tile`."""
    if ONE_WEIGHT:
        tile, base_tile = logits_tiles_of_one_weight(
            hidden, base_hidden, weight, layout.D, row, column, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION
        )
    else:
        tile = logits_tile(
            hidden, weight, layout, row, column, num_rows, V, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, PRECISION
        )
        base_tile = logits_tile(
            base_hidden, base_weight, base_layout, row, column, num_rows, V, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS,
            PRECISION,
        )  # fmt: skip
    return tile, base_tile


@triton.jit
def bias_of(layout, tokens, V):
    """The bias of `tokens`, MASKED_LOGIT where it is −inf and outside the vocabulary; 0 without a bias."""
    bias = tl.zeros(tokens.shape, tl.float32)
    if layout.bias is not None:
        bias = tl.load(layout.bias + tokens, mask=tokens < V, other=0.0).to(tl.float32)
        bias = tl.where(bias < MASKED_LOGIT, MASKED_LOGIT, bias)
    return tl.where(tokens < V, bias, MASKED_LOGIT)


@triton.jit
def with_softcap(x, layout, tokens, V):
    """x of a tile behind the softcap, if there is one: it makes every token of the vocabulary possible."""
    if layout.tanh_scale is not None:
        x = tl.where((tokens < V)[None, :], _math.transform(x, None, layout.tanh_scale), MASKED_LOGIT)
    return x


@triton.jit
def unit_of(unit, row_tiles, num_splits, GROUP: tl.constexpr):
    """(row tile, split) of a unit: `GROUP` row tiles side by side, then their next split."""
    first = unit // (GROUP * num_splits) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    local = unit - first * num_splits
    return first + local % size, local // size


@triton.jit
def pick_from_tile(x, base_x, target_logits_ptr, target_ptr, n, i, mask, column, k, K, R, BLOCK_V: tl.constexpr):
    """x at the k-th target of rows n, where the tile has it, to target_logits (K, R), and base_x to the K rows after.

    Returns in which rows that is so, and whether in any. base_x is None for one model.
    """
    local = tl.load(target_ptr + n * K + k, mask=mask, other=-1) - column
    here = (local >= 0) & (local < BLOCK_V) & mask
    found = tl.max(here.to(tl.int32), 0) > 0
    # Few tiles hold a target of their rows: the others skip the search.
    if found:
        hit = local[:, None] == tl.arange(0, BLOCK_V)[None, :]
        tl.store(target_logits_ptr + k * R + i, tl.sum(tl.where(hit, x, 0.0), 1), mask=here)
        if base_x is not None:
            tl.store(target_logits_ptr + (K + k) * R + i, tl.sum(tl.where(hit, base_x, 0.0), 1), mask=here)
    return here, found


@triton.jit
def pick_targets(
    x, base_x, target_logits_ptr, target_ptr, n, i, mask, column, K, R, BLOCK_V: tl.constexpr, ONE_TARGET: tl.constexpr
):
    """As `pick_from_tile`, of all targets; before the tile is folded, which leaves no register for its x."""
    if ONE_TARGET:  # a second loop in the kernel would keep the compiler from prefetching the next tile
        has_target, found = pick_from_tile(
            x, base_x, target_logits_ptr, target_ptr, n, i, mask, column, 0, 1, R, BLOCK_V
        )
    else:
        has_target, found = mask & False, False
        for k in range(K):
            here, any_here = pick_from_tile(
                x, base_x, target_logits_ptr, target_ptr, n, i, mask, column, k, K, R, BLOCK_V
            )
            has_target, found = has_target | here, found | any_here
    return has_target, found


class Plan(NamedTuple):
    """How one forward call is cut: the tile, splits of the vocabulary, and rows at a time."""

    tile: Config
    blocks_per_split: int
    num_splits: int
    num_rows: int
    programs: int
    descriptors: bool
    precision: str

    def constants(self, masked: bool) -> dict[str, Any]:
        """What the kernels are compiled for."""
        tile = self.tile
        return {
            "BLOCK_N": tile.block_n,
            "BLOCK_V": tile.block_v,
            "BLOCK_D": tile.block_d,
            "GROUP": tile.group,
            "DESCRIPTORS": self.descriptors,
            "PRECISION": self.precision,
            "MASKED": masked,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def plan(heads: list[Head], target: Tensor, state_size: int, workspace: int) -> Plan:
    return plan_of(heads, target.shape[0], state_size, len(heads) * target.shape[1], config, workspace)


def plan_of(
    heads: list[Head],
    rows: int,
    state_size: int,
    row_numbers: int,
    choose: Callable[[int, torch.device, torch.dtype, bool], Config],
    workspace: int,
    most_splits: int | None = None,
) -> Plan:
    """For tiles that `choose` takes, and so many numbers of 4 bytes a row: of each split, and besides.

    Splits are of equal numbers of tiles but for the last; with `most_splits` there are so many, of nearly equal ones.
    """
    where, dtype = heads[0].hidden.device, max((head.dtype for head in heads), key=lambda dtype: dtype.itemsize)
    device, aligned = properties(where), all(_can_copy_tiles(head) for head in heads)
    tile = choose(len(heads), where, dtype, aligned)
    v = heads[0].weight.shape[0]
    blocks = ceil_div(v, tile.block_v)
    blocks_per_split = ceil_div(blocks, device.programs)
    num_splits = ceil_div(blocks, blocks_per_split) if most_splits is None else min(blocks, most_splits)
    row_bytes = 4 * (num_splits * state_size + row_numbers)
    row_bytes += sum(head.dtype.itemsize * _padded(head.hidden.shape[-1]) for head in heads)
    fitting = workspace // _SHARE // row_bytes // tile.block_n
    row_tiles = _row_tiles(max(1, ceil_div(rows, tile.block_n)), max(1, fitting), tile.group)
    return Plan(
        tile,
        blocks_per_split,
        num_splits,
        row_tiles * tile.block_n,
        min(device.programs, row_tiles * num_splits),
        device.descriptors and aligned,
        precision(device, dtype),
    )


def _row_tiles(needed: int, fitting: int, group: int) -> int:
    """Of a pass: passes of nearly equal size, of whole groups, so that no weight is read for a few rows alone."""
    whole = group if min(needed, fitting) >= group else 1
    passes = ceil_div(needed, fitting // whole * whole)
    return min(round_up(ceil_div(needed, passes), whole), fitting)


def rows_of(target: Tensor, plan: Plan, ignore_index: int) -> Rows:
    """Ignored rows are left out, unless all rows are one tile, which costs the same."""
    return EVERY_ROW if target.shape[0] <= plan.tile.block_n else _rows.kept_rows(target, ignore_index)


def operands_of(head: Head, plan: Plan, rows: Rows, gathered: Tensor | None, first: int) -> HeadOperands:
    """The head, with the rows of this pass as `hidden_of` has them."""
    hidden, weight = hidden_of(head, plan, rows, gathered, first), head.weight
    d = hidden.shape[1]
    bias, tanh_scale, output_scale = transform_of(head.transform, head.bias)
    layout = HeadLayout(bias, d, hidden.stride(0), weight.stride(0), weight.stride(1), tanh_scale, output_scale)
    if not plan.descriptors:
        return HeadOperands(hidden, weight, layout)
    tile = plan.tile
    return HeadOperands(
        _descriptor(hidden, tile.block_n, tile.block_d), _descriptor(weight, tile.block_v, tile.block_d), layout
    )  # fmt: skip


def hidden_of(head: Head, plan: Plan, rows: Rows, gathered: Tensor | None, first: int) -> Tensor:
    """The rows of this pass (R, D), gathered into `gathered`, or all as they are where it is None."""
    if gathered is None:
        return _as_they_are(head, plan)
    _rows.gather_rows(head.hidden, rows, first, gathered, zero_rest=False)
    return gathered[:, : head.hidden.shape[-1]]


def _as_they_are(head: Head, plan: Plan) -> Tensor:
    """All rows (N, D), copied only where a kernel could not read them."""
    d, hidden = head.hidden.shape[-1], head.hidden
    if hidden.dim() != 2:
        hidden = hidden.reshape(-1, d)
    if hidden.dtype != head.dtype:
        hidden = hidden.to(head.dtype)
    if plan.descriptors and not _aligned(hidden):
        padded = hidden.new_empty((hidden.shape[0], _padded(d)))[:, :d]
        return padded.copy_(hidden)
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


class _Descriptor(TensorDescriptor):
    """Without checks at every launch: `_can_copy_tiles` and `_as_they_are` have seen to what they check."""

    def __post_init__(self) -> None:
        pass


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return _Descriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def gather_buffer(head: Head, plan: Plan, rows: Rows) -> Tensor | None:
    if rows.row_index is None:
        return None
    d = head.hidden.shape[-1]
    return torch.empty((plan.num_rows, _padded(d)), dtype=head.dtype, device=head.hidden.device)


def share_weight(head: Head, base: Head, plan: Plan) -> bool:
    """Whether both heads are one tensor, as where training froze it, and its tiles can be loaded once for both.

    In float32 there are no registers left for both models' sums and what these lost at once.
    """
    if head.dtype == torch.float32:
        return False
    same = head.weight.data_ptr() == base.weight.data_ptr() and head.weight.stride() == base.weight.stride()
    return plan.descriptors and same and head.weight.shape == base.weight.shape and head.dtype == base.dtype


def stages_of_one_weight(plan: Plan, itemsize: int) -> int:
    """Tiles ahead where both models' hidden states lie beside those of the weight: as many as there is room for."""
    tile = plan.tile
    return min(tile.num_stages, _TILE_BYTES // ((2 * tile.block_n + tile.block_v) * tile.block_d * itemsize))


def is_masked(head: Head, plan: Plan) -> bool:
    """Whether a tile needs `bias_of`: there is a bias, or the last tile reaches beyond the vocabulary."""
    whole = plan.num_splits * plan.blocks_per_split * plan.tile.block_v
    return head.bias is not None or head.weight.shape[0] != whole


def _can_copy_tiles(head: Head) -> bool:
    """Whether the weight is of the dtype that multiplies, and its rows begin on 16 bytes."""
    return head.weight.dtype == head.dtype and _aligned(head.weight)


def _aligned(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.stride(0) > 0 and x.data_ptr() % 16 == 0


def _padded(d: int) -> int:
    """Of every dtype, rows of this many elements begin on 16 bytes."""
    return ceil_div(d, 8) * 8
