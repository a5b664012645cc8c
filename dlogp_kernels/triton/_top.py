"""Device functions of the most likely token of each row, which is looked for only where it is asked for."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import _math

#: Larger than any token.
NO_TOKEN = tl.constexpr(2**31 - 1)
#: Numbers that a Top has in memory, behind the state's.
TOP_SIZE = tl.constexpr(2)


class Top(NamedTuple):
    """The first token with x = m, int32, and a rest that is exact for it whatever the targets are, a row each."""

    token: Any
    rest: Any


@triton.jit
def empty_top(BLOCK_N: tl.constexpr):
    return Top(tl.zeros([BLOCK_N], tl.int32) + NO_TOKEN, tl.zeros([BLOCK_N], tl.float32) - 1.0)


@triton.jit
def top_unless(reset, top):
    return Top(tl.where(reset, NO_TOKEN, top.token), tl.where(reset, -1.0, top.rest))


@triton.jit
def first_with_m(token, state, x, tokens):
    """Top.token with a tile x whose columns are `tokens`, given that and the state before."""
    largest = tl.max(x, 1)
    first = tl.min(tl.where(x == largest[:, None], tokens, NO_TOKEN), 1)
    return tl.where(largest > state.m, first, token)


@triton.jit
def fold_top(top, state, x, tokens, output_scale):
    """`top` with the tile x whose columns are `tokens`, given the state before."""
    m = tl.maximum(state.m, tl.max(x, 1))
    before = _math.exp(output_scale * (state.m - m)) * (1.0 + top.rest)
    e = tl.exp2((x - m[:, None]) * (output_scale * _math.LOG2E))
    rest, brings_m = _math.rest_with_tile(_math.State(state.m, top.rest, state.weighted), m, before, tl.sum(e, 1))
    close = brings_m & (rest < _math.LARGE_REST)
    # In every tile: a branch, besides the one of `fold`, would need both x and e behind it.
    rest = tl.where(close, before + tl.sum(_math.without_ones(e), 1), rest)
    return Top(first_with_m(top.token, state, x, tokens), rest)


@triton.jit
def merge_top(top, splits, output_scale):
    """One Top of those of `splits`, whose fields are (splits, rows)."""
    state = _math.merge(_math.State(splits.m, top.rest, splits.weighted), output_scale)
    return Top(tl.min(tl.where(splits.m == state.m[None, :], top.token, NO_TOKEN), 0), state.rest)


@triton.jit
def store_top(pointer, stride, top, mask):
    tl.store(pointer, top.token.to(tl.float32, bitcast=True), mask=mask)
    tl.store(pointer + stride, top.rest, mask=mask)


@triton.jit
def load_top(pointer, stride, mask):
    """Anything where masked out, as those splits' m is not the row's."""
    token = tl.load(pointer, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    return Top(token, tl.load(pointer + stride, mask=mask, other=-1.0))


@triton.jit
def top_logp_of(top, state):
    return tl.where(state.m <= _math.MASKED_LOGIT, float("nan"), 0.0 - _math.log1p(top.rest))


@triton.jit
def top_of_lanes(top_token, lanes, state):
    """The Top of what lanes were merged to; its rest is exact."""
    return Top(tl.min(tl.where(lanes.m == state.m, top_token, NO_TOKEN)[:, None], 0), state.rest)
