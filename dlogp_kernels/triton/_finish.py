"""What kernels that finish a forward pass write: statistics of rows, and what ignored and bad targets make of them."""

import triton
import triton.language as tl

from . import _top


@triton.jit
def check_targets(target_ptr, n, mask, K, V, ignore_index):
    """Of rows n: whether a candidate is not ignored, and whether one is outside the vocabulary."""
    kept = tl.zeros(n.shape, tl.int1)
    bad = tl.zeros(n.shape, tl.int1)
    for k in range(K):
        target = tl.load(target_ptr + n * K + k, mask=mask, other=0)
        valid = target != ignore_index
        kept = kept | valid
        bad = bad | (valid & ((target < 0) | (target >= V)))
    return kept, bad


@triton.jit
def mask_ignored_and_invalid(value, kept, bad):
    """0 where ignored, NaN where a target is outside the vocabulary."""
    return tl.where(bad, float("nan"), tl.where(kept, value, 0.0))


@triton.jit
def store_row_statistics(out, n, values, kept, bad, mask, FIRST: tl.constexpr):
    """To fields of `out` that are a number a row, from the one at FIRST on."""
    for i in tl.static_range(len(values)):
        tl.store(out[FIRST + i] + n, mask_ignored_and_invalid(values[i], kept, bad), mask=mask)


@triton.jit
def store_extra(extra_ptr, n, N, values, kept, bad, mask, FIRST: tl.constexpr):
    """To extra (rows, N), see results.Outputs, from the row FIRST on."""
    for i in tl.static_range(len(values)):
        pointer = extra_ptr + (FIRST + i) * tl.cast(N, tl.int64) + n
        tl.store(pointer, mask_ignored_and_invalid(values[i], kept, bad), mask=mask)


@triton.jit
def store_top(extra_ptr, n, N, top, state, kept, bad, mask, FIRST: tl.constexpr):
    """Likewise, token −1 where ignored, and where log p is NaN."""
    logp = mask_ignored_and_invalid(_top.top_logp_of(top, state), kept, bad)
    token = tl.where(kept & (logp == logp), top.token, -1).to(tl.float32)
    pointer = extra_ptr + FIRST * tl.cast(N, tl.int64) + n
    tl.store(pointer, token, mask=mask)
    tl.store(pointer + N, logp, mask=mask)
