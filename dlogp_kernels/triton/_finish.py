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
def store_top(token_ptr, logp_ptr, n, top, state, kept, bad, mask):
    """Token −1 where ignored, and where log p is NaN."""
    logp = mask_ignored_and_invalid(_top.top_logp_of(top, state), kept, bad)
    tl.store(token_ptr + n, tl.where(kept & (logp == logp), top.token, -1).to(tl.int64), mask=mask)
    tl.store(logp_ptr + n, logp, mask=mask)


@triton.jit
def store_normalizer(normalizer_ptr, n, N, normalizer, kept, bad, mask):
    """To normalizer (2, N)."""
    for i in tl.static_range(2):
        tl.store(normalizer_ptr + i * N + n, mask_ignored_and_invalid(normalizer[i], kept, bad), mask=mask)
