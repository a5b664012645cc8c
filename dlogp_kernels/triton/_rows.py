"""Rows: which are kept, gathered next to each other, and how they lie in memory."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sizes import ceil_div

_COMPACT_BLOCK = 1024
_GATHER_ROWS = 16
_GATHER_COLUMNS = 512
#: More than any number of rows, so that n // inner is 0 whatever N is, and a kernel compiles once.
_ANY_ROW = 2**40


class Rows(NamedTuple):
    """Rows to work on, on the device: their indices (N,) int64, −1 for one to take as zeros, and how many (1,) int32.

    Both are None where every row is taken as it is; what belongs to an ignored row is then discarded at the end.
    """

    row_index: Tensor | None
    num_rows: Tensor | None


class Matrix(NamedTuple):
    """Rows of a tensor (…, columns) as kernels find them.

    Row n of the tensor lies at ⌊n / inner⌋ · stride_outer + n mod inner · stride_row.
    """

    data: Any
    inner: int
    stride_outer: int
    stride_row: int
    stride_column: int


@triton.jit
def row_offset(matrix, n):
    """Where the n-th row of a Matrix begins, int64."""
    n = n.to(tl.int64)
    return n // matrix.inner * matrix.stride_outer + n % matrix.inner * matrix.stride_row


def matrix(x: Tensor) -> Matrix:
    """A view where two strides reach every row, as in `logits[:, :-1]`; else of a copy."""
    # One row gets the stride of whole ones: a kernel is compiled anew for a number that is a multiple of 16, as 0 is.
    sizes, strides = [1], [x.shape[-1]]
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes[-1] == 1 or strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return matrix(x.contiguous())
    if len(sizes) == 1:
        return Matrix(x, _ANY_ROW, 0, strides[0], x.stride(-1))
    return Matrix(x, sizes[1], strides[0], strides[1], x.stride(-1))


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _compact_rows_kernel(target_ptr, index_ptr, count_ptr, N, K, ignore_index, BLOCK: tl.constexpr):
    """index (N,) int64 = rows n with some target[n, k] ≠ ignore_index, in order; count (1,) int32 = how many.

    target (N, K) int64. One program goes through all rows. Deterministic.
    """
    count = tl.zeros([1], tl.int32)
    for begin in range(0, N, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        kept = tl.zeros([BLOCK], tl.int32)
        for k in range(K):
            offset = rows.to(tl.int64) * K + k
            target = tl.load(target_ptr + offset, mask=rows < N, other=ignore_index)
            kept = tl.maximum(kept, (target != ignore_index).to(tl.int32))
        place = count + tl.cumsum(kept, 0) - kept
        tl.store(index_ptr + place, rows.to(tl.int64), mask=kept > 0)
        count += tl.sum(kept, 0)
    tl.store(count_ptr + tl.arange(0, 1), count)


def kept_rows(target: Tensor, ignore_index: int) -> Rows:
    """The rows of target (N, K), contiguous int64, that have a candidate which is not ignored."""
    index = torch.empty(target.shape[0], dtype=torch.int64, device=target.device)
    count = torch.empty(1, dtype=torch.int32, device=target.device)
    _compact_rows_kernel[(1,)](target, index, count, *target.shape, ignore_index, BLOCK=_COMPACT_BLOCK, num_warps=8)
    return Rows(index, count)


def rows_in_place(target: Tensor, ignore_index: int) -> Rows:
    """Every row of target (N, K) at its own place; the ignored ones as zeros."""
    n = target.shape[0]
    kept = (target != ignore_index).any(-1)
    index = torch.where(kept, torch.arange(n, device=target.device), -1)
    return Rows(index, torch.full((1,), n, dtype=torch.int32, device=target.device))


@triton.jit(do_not_specialize=["first"])
def _gather_rows_kernel(
    source, index_ptr, count_ptr, out_ptr, first, D, stride_out, ZERO_REST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr
):  # fmt: skip
    """out[i] = source[index[first + i]] in out's dtype, 0 where the index is −1.

    Rows from `count` on are not written, or are 0 with ZERO_REST.

    out (rows, stride_out) with stride_out ≥ D; columns from D on become 0. A program copies ROWS × COLUMNS.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = first + i < tl.load(count_ptr)
    n = tl.load(index_ptr + first + i, mask=kept, other=0)
    pointers = source.data + row_offset(source, n)[:, None] + columns.to(tl.int64)[None, :] * source.stride_column
    values = tl.load(pointers, mask=(kept & (n >= 0))[:, None] & (columns < D)[None, :], other=0.0)
    out = out_ptr + i.to(tl.int64)[:, None] * stride_out + columns[None, :]
    inside = (columns < stride_out)[None, :]
    if not ZERO_REST:
        inside = inside & kept[:, None]
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=inside)


def gather_rows(x: Tensor, rows: Rows, first: int, out: Tensor, zero_rest: bool) -> None:
    """Into out (R, D or wider), R a multiple of 16: kept rows first … first + R of x (…, D)."""
    grid = (ceil_div(out.shape[0], _GATHER_ROWS), ceil_div(out.shape[1], _GATHER_COLUMNS))
    _gather_rows_kernel[grid](
        matrix(x), rows.row_index, rows.num_rows, out, first, x.shape[-1], out.stride(0),
        ZERO_REST=zero_rest, ROWS=_GATHER_ROWS, COLUMNS=_GATHER_COLUMNS,
    )  # fmt: skip
