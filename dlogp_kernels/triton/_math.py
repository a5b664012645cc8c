"""Device functions shared by the kernels: the logit transform, the softmax states, the gradient. Each formula once.

Kernels hold a model's logits as z = output_scale · x: x = raw + bias and output_scale = logit_scale / temperature, or
with a softcap c, x = tanh((raw + bias) · tanh_scale), tanh_scale = logit_scale / c and output_scale = c / temperature.
A state is centred on the maximum m of x, and d = x − m, so that a common offset of the logits costs no accuracy. With s
the output_scale:

    rest = Σ e^{s·d} − 1   weighted = Σ e^{s·d}·d
    cross = Σ e^{s·d}·u    base_cross = −Σ e^{base_s·base_d}·u    with u = s·d − base_s·base_d

The 1 is the term of one token with x = m, and log p of that token is −log(1 + rest). Near 0 it is exact only if rest
never was a part of a sum with that 1: see `fold`.

All in float32. A token that is impossible (logit −inf), and a column beyond the vocabulary, has x = MASKED_LOGIT:
finite, so that nothing here makes 0 · inf, and so small that its terms are exactly 0 next to any other token's.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

MASKED_LOGIT = tl.constexpr(-1e25)
LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # exact in 16 bits: its product with an exponent is too
_LN2_LOW = tl.constexpr(1.4286068203094172e-06)


class State(NamedTuple):
    """One model's softmax over the part of the vocabulary that was seen, a row each."""

    m: Any
    rest: Any
    weighted: Any


class PairState(NamedTuple):
    """Both models' states, a row each, and their cross terms.

    `unsupported` is 1 where some token is possible for the model and impossible for the base, so that KL is infinite;
    `base_unsupported` the reverse.
    """

    model: Any
    base: Any
    cross: Any
    base_cross: Any
    unsupported: Any
    base_unsupported: Any


#: A rest that is larger is exact enough if taken from a sum with the 1; with a smaller one no other token has x = m.
LARGE_REST = tl.constexpr(0.5)
#: Numbers that a state has in memory, a row and split of the vocabulary. Behind them come those of each model's Top.
STATE_SIZE = tl.constexpr(3)
PAIR_STATE_SIZE = tl.constexpr(10)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x):
    """e^x − 1, with what e^x loses to rounding."""
    return tl.where(tl.abs(x) < 0.01, x * (1.0 + x * (0.5 + x * (1.0 / 6.0))), exp(x) - 1.0)


@triton.jit
def next_below(x):
    """The next float32 below x, which is not 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x > 0.0, bits - 1, bits + 1).to(tl.float32, bitcast=True)


@triton.jit
def log(x):
    """Natural logarithm of a normal number: the hardware's is off by 3e-6 where x is a vocabulary's size."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the fraction then lies in [√½, √2)
    fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    r = (fraction - 1.0) / (fraction + 1.0)
    r2 = r * r
    series = 2.0 * r * (1.0 + r2 * (1.0 / 3 + r2 * (1.0 / 5 + r2 * (1.0 / 7 + r2 * (1.0 / 9)))))
    result = exponent * _LN2_HIGH + (exponent * _LN2_LOW + series)
    return tl.where(x < float("inf"), result, x)  # keeps NaN


@triton.jit
def log1p(x):
    """log(1 + x) of x > −1, with what 1 + x loses to rounding."""
    sum = 1.0 + x
    return log(sum) + (x - (sum - 1.0)) / sum


@triton.jit
def tanh(x):
    """Within a rounding or two of the exact value also near 0, where 1 − 2 / (e^{2x} + 1) cancels."""
    x2 = x * x
    # A minimax polynomial of (tanh x − x) / x³ on |x| < 0.625.
    polynomial = -0.0537397148 + x2 * (0.0206390866 - x2 * 0.00570498633)
    near = x + x * x2 * (-0.333332819 + x2 * (0.133314422 + x2 * polynomial))
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def transform(raw, bias, tanh_scale):
    """x of raw logits; `bias` broadcasts to them or is None, `tanh_scale` is logit_scale / softcap or None."""
    x = raw
    if bias is not None:
        x += bias
    if tanh_scale is not None:
        x = tanh(x * tanh_scale)
    return x


@triton.jit
def empty_state(BLOCK_N: tl.constexpr, WITH_ONE: tl.constexpr = False):
    zero = tl.zeros([BLOCK_N], tl.float32)
    return State(zero + MASKED_LOGIT, zero if WITH_ONE else zero - 1.0, zero)


@triton.jit
def empty_pair_state(BLOCK_N: tl.constexpr, WITH_ONE: tl.constexpr = False):
    zero = tl.zeros([BLOCK_N], tl.float32)
    return PairState(empty_state(BLOCK_N, WITH_ONE), empty_state(BLOCK_N, WITH_ONE), zero, zero, zero, zero)


@triton.jit
def state_unless(reset, state):
    """`state`, or an empty one where the scalar `reset` is true."""
    return State(
        tl.where(reset, MASKED_LOGIT, state.m), tl.where(reset, -1.0, state.rest), tl.where(reset, 0.0, state.weighted)
    )


@triton.jit
def pair_state_unless(reset, state):
    return PairState(
        state_unless(reset, state.model),
        state_unless(reset, state.base),
        tl.where(reset, 0.0, state.cross),
        tl.where(reset, 0.0, state.base_cross),
        tl.where(reset, 0.0, state.unsupported),
        tl.where(reset, 0.0, state.base_unsupported),
    )


@triton.jit
def sum_of(state, WITH_ONE: tl.constexpr = False):
    """Σ e^{s·d}. WITH_ONE, here and below: the states are lanes (`merge_lanes`), whose rest still has the 1."""
    return state.rest if WITH_ONE else 1.0 + state.rest


@triton.jit
def about(state, m, output_scale, WITH_ONE: tl.constexpr = False):
    """The state's Σ e^{s·d} and Σ e^{s·d}·d, centred on an m that is no smaller."""
    shift, sum = state.m - m, sum_of(state, WITH_ONE)
    factor = exp(output_scale * shift)
    return factor * sum, factor * (state.weighted + shift * sum)


@triton.jit
def cross_about(state, m, base_m, output_scale, base_output_scale, WITH_ONE: tl.constexpr = False):
    """The same of the cross terms."""
    shift, base_shift = output_scale * (state.model.m - m), base_output_scale * (state.base.m - base_m)
    change = shift - base_shift
    cross = exp(shift) * (state.cross + change * sum_of(state.model, WITH_ONE))
    return cross, exp(base_shift) * (state.base_cross - change * sum_of(state.base, WITH_ONE))


@triton.jit
def without_ones(e):
    """Terms without that of m."""
    return tl.where(e < 1.0, e, 0.0)


@triton.jit
def any_row(holds):
    """Whether it holds for some row; by way of a row of them all, because neither Triton 3.6 nor 3.7 can compile a
    reduction of a reduction of a tile for Blackwell."""
    return tl.max(tl.max(holds.to(tl.int32)[None, :], 1), 0) > 0


@triton.jit
def rest_with_tile(state, m, before, total):
    """rest with the terms of a tile about m, whose sum is `total`, the state's being `before`; and whether m is new.

    A tile that brings m has its 1 among the terms: rest is then their sum less 1, off by some 1e-7.
    """
    brings_m = m > state.m
    return tl.where(brings_m, before + (total - 1.0), state.rest + total), brings_m


@triton.jit
def fold(state, x, output_scale, has_target=None, found=None, WITH_ONE: tl.constexpr = False):
    """`state` with the columns of the tile x (rows, columns).

    rest is exact in rows that have a target in the tile, `has_target`: for another one log p is no nearer to 0 than the
    difference of both x. `found`: whether some row has one. Both are None for a rest that need never be exact.
    """
    m = tl.maximum(state.m, tl.max(x, 1))
    before, weighted = about(state, m, output_scale, WITH_ONE)
    d = x - m[:, None]
    e = tl.exp2(d * (output_scale * LOG2E))
    weighted += tl.sum(e * d, 1)
    total = tl.sum(e, 1)
    if WITH_ONE:
        rest = before + total
    elif found is None:
        rest = before + (total - 1.0)
    else:
        rest, brings_m = rest_with_tile(state, m, before, total)
        if found:  # in few tiles
            close = has_target & brings_m & (rest < LARGE_REST)
            if any_row(close):
                rest = tl.where(close, before + tl.sum(without_ones(e), 1), rest)
    return State(m, rest, weighted)


@triton.jit
def fold_pair(
    state, x, base_x, output_scale, base_output_scale, has_target=None, found=None, WITH_ONE: tl.constexpr = False
):
    """`state` with the columns of both models' tiles; the last two as in `fold`."""
    model, base = state.model, state.base
    m, base_m = tl.maximum(model.m, tl.max(x, 1)), tl.maximum(base.m, tl.max(base_x, 1))
    before, weighted = about(model, m, output_scale, WITH_ONE)
    base_before, base_weighted = about(base, base_m, base_output_scale, WITH_ONE)
    cross, base_cross = cross_about(state, m, base_m, output_scale, base_output_scale, WITH_ONE)
    d, base_d = x - m[:, None], base_x - base_m[:, None]
    e, base_e = tl.exp2(d * (output_scale * LOG2E)), tl.exp2(base_d * (base_output_scale * LOG2E))
    u = output_scale * d - base_output_scale * base_d
    weighted += tl.sum(e * d, 1)
    base_weighted += tl.sum(base_e * base_d, 1)
    cross += tl.sum(e * u, 1)
    base_cross -= tl.sum(base_e * u, 1)
    total, base_total = tl.sum(e, 1), tl.sum(base_e, 1)
    if WITH_ONE:
        rest, base_rest = before + total, base_before + base_total
    elif found is None:
        rest, base_rest = before + (total - 1.0), base_before + (base_total - 1.0)
    else:
        rest, brings_m = rest_with_tile(model, m, before, total)
        base_rest, base_brings_m = rest_with_tile(base, base_m, base_before, base_total)
        if found:
            close = has_target & brings_m & (rest < LARGE_REST)
            if any_row(close):
                rest = tl.where(close, before + tl.sum(without_ones(e), 1), rest)
        if found:
            close = has_target & base_brings_m & (base_rest < LARGE_REST)
            if any_row(close):
                base_rest = tl.where(close, base_before + tl.sum(without_ones(base_e), 1), base_rest)
    return PairState(
        State(m, rest, weighted),
        State(base_m, base_rest, base_weighted),
        cross,
        base_cross,
        state.unsupported,
        state.base_unsupported,
    )


@triton.jit
def with_models(state, model, base):
    """The pair state with these states of the models."""
    return PairState(model, base, state.cross, state.base_cross, state.unsupported, state.base_unsupported)


@triton.jit
def with_unsupported(state, x, base_x):
    """`state` with what tiles of x (or of biases, one row for all) say of tokens that one model alone can give."""
    possible, base_possible = x > MASKED_LOGIT, base_x > MASKED_LOGIT
    unsupported = tl.max((possible & (base_x <= MASKED_LOGIT)).to(tl.float32), 1)
    base_unsupported = tl.max((base_possible & (x <= MASKED_LOGIT)).to(tl.float32), 1)
    return PairState(
        state.model,
        state.base,
        state.cross,
        state.base_cross,
        tl.maximum(state.unsupported, unsupported),
        tl.maximum(state.base_unsupported, base_unsupported),
    )


@triton.jit
def as_splits(state):
    """States of rows as (rows, 1): splits of one row."""
    return State(state.m[:, None], state.rest[:, None], state.weighted[:, None])


@triton.jit
def as_pair_splits(state):
    return PairState(
        as_splits(state.model),
        as_splits(state.base),
        state.cross[:, None],
        state.base_cross[:, None],
        state.unsupported[:, None],
        state.base_unsupported[:, None],
    )


@triton.jit
def merge_lanes(lanes, output_scale):
    """One state, (1,), of lanes: states of parts of one row, folded WITH_ONE. A small rest lacks precision then."""
    splits = as_splits(lanes)
    m = tl.max(splits.m, 0)
    sum, weighted = about(splits, m[None, :], output_scale, True)
    return State(m, tl.sum(sum, 0) - 1.0, tl.sum(weighted, 0))


@triton.jit
def merge_pair_lanes(lanes, output_scale, base_output_scale):
    model, base = merge_lanes(lanes.model, output_scale), merge_lanes(lanes.base, base_output_scale)
    return merge_cross(as_pair_splits(lanes), model, base, output_scale, base_output_scale, True)


@triton.jit
def largest_lane(lanes, output_scale):
    """The first lane that has the largest m, (1,), and the sum of all others about that."""
    splits = as_splits(lanes)
    m, largest = tl.max(splits.m, 0, return_indices=True)
    sum, _ = about(splits, m[None, :], output_scale, True)
    is_largest = tl.arange(0, splits.m.shape[0])[:, None] == largest[None, :]
    return largest, tl.sum(tl.where(is_largest, 0.0, sum), 0)


@triton.jit
def merge(splits, output_scale):
    """One state of `splits`, whose fields are (splits, rows)."""
    m = tl.max(splits.m, 0)
    sum, weighted = about(splits, m[None, :], output_scale)
    has_m = splits.m == m[None, :]
    more_ones = tl.sum(has_m.to(tl.float32), 0) - 1.0
    rest = tl.sum(tl.where(has_m, splits.rest, sum), 0) + more_ones
    return State(m, rest, tl.sum(weighted, 0))


@triton.jit
def merge_pair(splits, output_scale, base_output_scale):
    model, base = merge(splits.model, output_scale), merge(splits.base, base_output_scale)
    return merge_cross(splits, model, base, output_scale, base_output_scale)


@triton.jit
def merge_cross(splits, model, base, output_scale, base_output_scale, WITH_ONE: tl.constexpr = False):
    """The pair state of `splits` whose models' states are merged already."""
    cross, base_cross = cross_about(
        splits, model.m[None, :], base.m[None, :], output_scale, base_output_scale, WITH_ONE
    )  # fmt: skip
    return PairState(
        model,
        base,
        tl.sum(cross, 0),
        tl.sum(base_cross, 0),
        tl.max(splits.unsupported, 0),
        tl.max(splits.base_unsupported, 0),
    )


@triton.jit
def store_state(pointer, stride, state, mask):
    """To `pointer`, the first of STATE_SIZE tensors `stride` apart."""
    tl.store(pointer, state.m, mask=mask)
    tl.store(pointer + stride, state.rest, mask=mask)
    tl.store(pointer + 2 * stride, state.weighted, mask=mask)


@triton.jit
def store_pair_state(pointer, stride, state, mask):
    store_state(pointer, stride, state.model, mask)
    store_state(pointer + 3 * stride, stride, state.base, mask)
    tl.store(pointer + 6 * stride, state.cross, mask=mask)
    tl.store(pointer + 7 * stride, state.base_cross, mask=mask)
    tl.store(pointer + 8 * stride, state.unsupported, mask=mask)
    tl.store(pointer + 9 * stride, state.base_unsupported, mask=mask)


@triton.jit
def load_state(pointer, stride, mask):
    """Empty where masked out."""
    return State(
        tl.load(pointer, mask=mask, other=MASKED_LOGIT),
        tl.load(pointer + stride, mask=mask, other=-1.0),
        tl.load(pointer + 2 * stride, mask=mask, other=0.0),
    )


@triton.jit
def load_pair_state(pointer, stride, mask):
    return PairState(
        load_state(pointer, stride, mask),
        load_state(pointer + 3 * stride, stride, mask),
        tl.load(pointer + 6 * stride, mask=mask, other=0.0),
        tl.load(pointer + 7 * stride, mask=mask, other=0.0),
        tl.load(pointer + 8 * stride, mask=mask, other=0.0),
        tl.load(pointer + 9 * stride, mask=mask, other=0.0),
    )


@triton.jit
def logp_of(x, state, output_scale):
    """log p of the token with this x."""
    logp = output_scale * (x - state.m) - log1p(state.rest)
    logp = tl.where(x <= MASKED_LOGIT, float("-inf"), logp)
    return tl.where(state.m <= MASKED_LOGIT, float("nan"), logp)


@triton.jit
def entropy_of(state, output_scale):
    entropy = log1p(state.rest) - output_scale * state.weighted / sum_of(state)
    return tl.where(state.m <= MASKED_LOGIT, float("nan"), entropy)


@triton.jit
def lse_of(state, output_scale):
    lse = output_scale * state.m + log1p(state.rest)
    return tl.where(state.m <= MASKED_LOGIT, float("-inf"), lse)


@triton.jit
def normalizer_of(state, output_scale):
    """The largest z, rounded down, and Σ e^{z − that} less 1: what `logp_of_x` takes."""
    largest = output_scale * state.m
    # What rounding down takes away is added to the rest; rounding up would take from it, and could leave −1.
    largest = tl.where(tl.fma(output_scale, state.m, -largest) < 0.0, next_below(largest), largest)
    rest = state.rest + expm1(tl.fma(output_scale, state.m, -largest)) * sum_of(state)
    nothing = state.m <= MASKED_LOGIT
    return tl.where(nothing, float("-inf"), largest), tl.where(nothing, float("nan"), rest)


@triton.jit
def logp_of_x(x, normalizer, output_scale):
    """log p of tokens of a row in backward: exact under any common offset, as lse, a sum, would not be."""
    largest, rest = normalizer
    return tl.fma(output_scale, x, -largest) - log1p(rest)


@triton.jit
def divergence_of(state, other, cross, unsupported):
    """KL from `state` to `other`: ≥ 0, NaN kept, +inf where a token is possible for `state` alone."""
    kl = cross / sum_of(state) - log1p(state.rest) + log1p(other.rest)
    kl = tl.where(kl < 0.0, 0.0, kl)
    return tl.where(unsupported > 0.0, float("inf"), kl)


@triton.jit
def row_statistics_of(state, output_scale):
    """The fields of LogpStats that are a number a row, in their order."""
    return entropy_of(state, output_scale), lse_of(state, output_scale)


@triton.jit
def pair_row_statistics_of(state, output_scale, base_output_scale):
    """Those of DeltaLogpStats."""
    model, base = state.model, state.base
    return (
        entropy_of(model, output_scale),
        entropy_of(base, base_output_scale),
        divergence_of(model, base, state.cross, state.unsupported),
        divergence_of(base, model, state.base_cross, state.base_unsupported),
        lse_of(model, output_scale),
        lse_of(base, base_output_scale),
    )


@triton.jit
def logits_gradient(logp_all, entropy, grad_logp_sum, grad_entropy, grad_lse):
    """`reference.logits_gradient` of one model: of its statistics by z, without the 1-hot term of log p.

    `logp_all` are log-probabilities of a row, the others its scalars.
    """
    p = exp(logp_all)
    finite_logp = tl.where(p == 0.0, 0.0, logp_all)
    return p * (grad_lse - grad_logp_sum - grad_entropy * (finite_logp + entropy))


@triton.jit
def divergence_gradient(logp_all, other_logp_all, kl, grad_kl, grad_reverse_kl):
    """Of both KLs by the z of the model with `logp_all`; `kl` is from it to the other."""
    p = exp(logp_all)
    excess = tl.where(p == 0.0, 0.0, logp_all) - other_logp_all - kl
    excess = tl.where(p == 0.0, 0.0, excess)
    excess = tl.where(grad_kl == 0.0, 0.0, excess)
    difference = tl.where(grad_reverse_kl == 0.0, 0.0, p - exp(other_logp_all))
    return grad_kl * p * excess + grad_reverse_kl * difference


@triton.jit
def raw_gradient(grad_z, x, tanh_scale, output_scale):
    """By the raw logits, given that by z."""
    grad = grad_z * output_scale
    if tanh_scale is not None:
        grad = grad * (tanh_scale * (1.0 - x * x))
    return grad
