"""The tokens of sequences as kernels find them, and what is known of each sequence before its loss.

A sequence is a row of padded tokens, or a range of packed ones.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _policy
from ._launch import Launch

BLOCK = 1024
WARPS = 8
#: Sequences that a program looks at together.
TOGETHER = 128
#: Kernels count columns in such units where they can: then they know them to be aligned, for any number of them.
_UNIT = 16


class Tokens(NamedTuple):
    """One number a token, that of sequence b and token t at b · stride_row + t · stride_column.

    Packed tokens have a stride_row of 0, and t counts through all sequences. Without a stride_column the number is one
    of the sequence.
    """

    data: Any
    stride_row: int
    stride_column: int | None


@triton.jit
def range_of(offsets_ptr, b, T):
    """Where the tokens of sequence b begin and end; T is the number of columns."""
    begin, end = b * 0, b * 0 + T
    if offsets_ptr is not None:
        begin = tl.maximum(tl.load(offsets_ptr + b), 0)
        end = tl.minimum(tl.load(offsets_ptr + b + 1), T)
    return begin, end


@triton.jit
def written_range_of(offsets_ptr, b, B, T, begin, end):
    """`range_of`, where the first and the last sequence also have the tokens that no sequence reaches."""
    if offsets_ptr is not None:
        begin = tl.where(b == 0, 0, begin)
        end = tl.where(b == B - 1, T, end)
    return begin, end


@triton.jit
def is_inside(offsets_ptr, t, begin, end):
    """Of `range_of`, for t in `written_range_of`."""
    inside = t < end
    if offsets_ptr is not None:
        inside &= t >= begin
    return inside


@triton.jit
def row_of(offsets_ptr, b, T):
    """Where row b of a contiguous tensor begins; packed tokens are one row."""
    row = b * 0
    if offsets_ptr is None:
        row = b * T
    return row


@triton.jit
def load_tokens(tokens, b, t, inside):
    """float32 of tokens whether they count or not, so that neighbours are loaded together; 0 outside."""
    row = tokens.data + b * tokens.stride_row
    if tokens.stride_column is None:
        values = tl.load(row)
    else:
        values = tl.load(row + t * tokens.stride_column, mask=inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def load_mask(tokens, b, t, inside):
    return inside & (tl.load(tokens.data + b * tokens.stride_row + t * tokens.stride_column, mask=inside, other=0) != 0)


@triton.jit(do_not_specialize=["B", "T"])
def _sequences_kernel(
    logp, old_logp, mask_tokens, offsets_ptr, out_ptr, finished_ptr, B, T, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """out (3, B) float32: number of tokens, Σ old_logp and Σ (logp − old_logp) of the tokens that count.

    finished (1 + B,) int32 becomes 0. A program takes a sequence. Sums in float32. Deterministic.
    """
    b, T = tl.program_id(0).to(tl.int64), T * UNIT
    begin, end = range_of(offsets_ptr, b, T)
    zero = tl.zeros([BLOCK], tl.float32)
    count, old_sum, ratio_sum = zero, zero, zero
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < end
        mask = load_mask(mask_tokens, b, t, inside)
        old = load_tokens(old_logp, b, t, inside)
        count += mask.to(tl.float32)
        old_sum += tl.where(mask, old, 0.0)
        ratio_sum += tl.where(mask, load_tokens(logp, b, t, inside) - old, 0.0)
    tl.store(out_ptr + b, tl.sum(count, 0))
    tl.store(out_ptr + B + b, tl.sum(old_sum, 0))
    tl.store(out_ptr + 2 * B + b, tl.sum(ratio_sum, 0))
    tl.store(finished_ptr + 1 + b, 0)
    if b == 0:
        tl.store(finished_ptr, 0)


@triton.jit
def perplexities(sequences_ptr, group_ptr, group, start, B, BLOCK: tl.constexpr):
    """ℓ of BLOCK sequences, and 1 for those of this group that have tokens, else 0, in float64."""
    others = start + tl.arange(0, BLOCK)
    count = tl.load(sequences_ptr + others, mask=others < B, other=0.0)
    old_sum = tl.load(sequences_ptr + B + others, mask=others < B, other=0.0)
    groups = tl.load(group_ptr + others, mask=others < B, other=0)
    together = (count > 0.0) & (groups == group)
    return -old_sum.to(tl.float64) / tl.maximum(count, 1.0).to(tl.float64), together.to(tl.float64)


@triton.jit
def score_of(sequences_ptr, group_ptr, b, B, BLOCK: tl.constexpr):
    """(ℓ − mean_g ℓ) / (std_g ℓ + 1e-6) of sequence b; 0 for one without tokens.

    float64: of perplexities that are equal, the rounding of float32 would be a tenth of the 1e-6.
    """
    group, count = tl.load(group_ptr + b), tl.load(sequences_ptr + b)
    own = -tl.load(sequences_ptr + B + b).to(tl.float64) / tl.maximum(count, 1.0).to(tl.float64)
    zero = tl.zeros([BLOCK], tl.float64)
    size, total = zero, zero
    for start in range(0, B, BLOCK):
        perplexity, together = perplexities(sequences_ptr, group_ptr, group, start, B, BLOCK)
        size += together
        total += together * perplexity
    number = tl.maximum(tl.sum(size, 0), 1.0)
    mean = tl.sum(total, 0) / number
    squares = zero
    for start in range(0, B, BLOCK):
        perplexity, together = perplexities(sequences_ptr, group_ptr, group, start, B, BLOCK)
        squares += together * (perplexity - mean) * (perplexity - mean)
    deviation = tl.sqrt(tl.sum(squares, 0) / number)
    score = (own - mean) / (deviation + _policy.GROUP_EPSILON)
    return tl.where(count > 0.0, score, 0.0).to(tl.float32)


def sequence_sums(
    launch: Launch,
    logp: Tokens,
    old_logp: Tokens,
    mask: Tokens,
    offsets: Tensor | None,
    finished: Tensor,
    columns: int,
    unit: int,
) -> Tensor:
    """Those of `_sequences_kernel`, (3, B)."""
    sequences = finished.shape[0] - 1
    out = logp.data.new_empty((3, sequences), dtype=torch.float32)
    arguments = logp, old_logp, mask, offsets, out, finished, sequences, columns // unit
    launch(_sequences_kernel, (sequences,), arguments, {"UNIT": unit, "BLOCK": BLOCK, "num_warps": WARPS})
    return out


def tokens_of(x: Tensor, packed: bool) -> Tokens:
    return Tokens(x, 0, x.stride(0)) if packed else Tokens(x, *x.stride())


def tokens_if_any(x: Tensor | None, packed: bool) -> Tokens | None:
    return None if x is None else tokens_of(x, packed)


def advantages_of(x: Tensor, sequences: int, packed: bool) -> Tokens:
    """Of sequences (B,), or of tokens."""
    return Tokens(x, x.stride(0), None) if x.shape == (sequences,) else tokens_of(x, packed)


def unit_of(columns: int, packed: bool) -> int:
    """What kernels count columns in. Sequences that are packed begin anywhere."""
    return _UNIT if not packed and columns % _UNIT == 0 else 1
