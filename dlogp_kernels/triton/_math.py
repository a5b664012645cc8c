"""Device functions shared by the kernels: the logit transform, the softmax states, the gradient. Each formula once.

Kernels hold a model's logits as z = slope · x: x = raw + bias and slope = logit_scale / temperature, or with a softcap
c, x = tanh((raw + bias) · logit_scale / c) and slope = c / temperature. A state is centred on the maximum m of x, and
d = x − m, so that a common offset of the logits costs no accuracy:

    sum = Σ e^{slope·d}        weighted = Σ e^{slope·d}·d
    cross = Σ e^{slope·d}·u    base_cross = −Σ e^{base_slope·base_d}·u    with u = slope·d − base_slope·base_d

All in float32. A token that is impossible (logit −inf), and a column beyond the vocabulary, has x = IMPOSSIBLE: finite,
so that nothing here makes 0 · inf, and so small that its terms are exactly 0 next to any other token's.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

IMPOSSIBLE = tl.constexpr(-1e25)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # exact in 16 bits: its product with an exponent is too
_LN2_LOW = tl.constexpr(1.4286068203094172e-06)


class State(NamedTuple):
    """One model's softmax over the part of the vocabulary that was seen, a row each."""

    m: Any
    sum: Any
    weighted: Any


class PairState(NamedTuple):
    """Both models' states, a row each, and their cross terms.

    `alone` is 1 where some token is possible for the model and impossible for the base, `base_alone` the reverse.
    """

    model: Any
    base: Any
    cross: Any
    base_cross: Any
    alone: Any
    base_alone: Any


#: Numbers that a state has in memory, a row and part of the vocabulary.
STATE_SIZE = tl.constexpr(3)
PAIR_STATE_SIZE = tl.constexpr(10)


@triton.jit
def exp(x):
    return tl.exp2(x * _LOG2E)


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
def transform(raw, bias, inner):
    """x of raw logits; `bias` broadcasts to them or is None, `inner` is logit_scale / softcap or None."""
    x = raw
    if bias is not None:
        x += bias
    if inner is not None:
        x = tanh(x * inner)
    return x


@triton.jit
def empty_state(BLOCK_N: tl.constexpr):
    zero = tl.zeros([BLOCK_N], tl.float32)
    return State(zero + IMPOSSIBLE, zero, zero)


@triton.jit
def empty_pair_state(BLOCK_N: tl.constexpr):
    zero = tl.zeros([BLOCK_N], tl.float32)
    return PairState(empty_state(BLOCK_N), empty_state(BLOCK_N), zero, zero, zero, zero)


@triton.jit
def state_unless(reset, state):
    """`state`, or an empty one where the scalar `reset` is true."""
    return State(
        tl.where(reset, IMPOSSIBLE, state.m), tl.where(reset, 0.0, state.sum), tl.where(reset, 0.0, state.weighted)
    )


@triton.jit
def pair_state_unless(reset, state):
    return PairState(
        state_unless(reset, state.model),
        state_unless(reset, state.base),
        tl.where(reset, 0.0, state.cross),
        tl.where(reset, 0.0, state.base_cross),
        tl.where(reset, 0.0, state.alone),
        tl.where(reset, 0.0, state.base_alone),
    )


@triton.jit
def rebase(state, m, slope):
    """The same state, centred on a larger m."""
    shift = state.m - m
    factor = exp(slope * shift)
    return State(m, factor * state.sum, factor * (state.weighted + shift * state.sum))


@triton.jit
def rebase_pair(state, m, base_m, slope, base_slope):
    shift, base_shift = slope * (state.model.m - m), base_slope * (state.base.m - base_m)
    change = shift - base_shift
    return PairState(
        rebase(state.model, m, slope),
        rebase(state.base, base_m, base_slope),
        exp(shift) * (state.cross + change * state.model.sum),
        exp(base_shift) * (state.base_cross - change * state.base.sum),
        state.alone,
        state.base_alone,
    )


@triton.jit
def fold(state, x, slope):
    """`state` with the columns of the tile x (rows, columns)."""
    state = rebase(state, tl.maximum(state.m, tl.max(x, 1)), slope)
    d = x - state.m[:, None]
    e = tl.exp2(d * (slope * _LOG2E))
    return State(state.m, state.sum + tl.sum(e, 1), state.weighted + tl.sum(e * d, 1))


@triton.jit
def fold_pair(state, x, base_x, slope, base_slope):
    """`state` with the columns of both models' tiles."""
    m = tl.maximum(state.model.m, tl.max(x, 1))
    base_m = tl.maximum(state.base.m, tl.max(base_x, 1))
    state = rebase_pair(state, m, base_m, slope, base_slope)
    d, base_d = x - m[:, None], base_x - base_m[:, None]
    e, base_e = tl.exp2(d * (slope * _LOG2E)), tl.exp2(base_d * (base_slope * _LOG2E))
    u = slope * d - base_slope * base_d
    model, base = state.model, state.base
    return PairState(
        State(m, model.sum + tl.sum(e, 1), model.weighted + tl.sum(e * d, 1)),
        State(base_m, base.sum + tl.sum(base_e, 1), base.weighted + tl.sum(base_e * base_d, 1)),
        state.cross + tl.sum(e * u, 1),
        state.base_cross - tl.sum(base_e * u, 1),
        state.alone,
        state.base_alone,
    )


@triton.jit
def with_alone(state, x, base_x):
    """`state` with what tiles of x (or of biases, one row for all) say of tokens that one model alone can give."""
    possible, base_possible = x > IMPOSSIBLE, base_x > IMPOSSIBLE
    alone = tl.max((possible & (base_x <= IMPOSSIBLE)).to(tl.float32), 1)
    base_alone = tl.max((base_possible & (x <= IMPOSSIBLE)).to(tl.float32), 1)
    return PairState(
        state.model,
        state.base,
        state.cross,
        state.base_cross,
        tl.maximum(state.alone, alone),
        tl.maximum(state.base_alone, base_alone),
    )


@triton.jit
def merge_rows(state, slope):
    """One state, (1,), of those of all rows."""
    return merge(State(state.m[:, None], state.sum[:, None], state.weighted[:, None]), slope)


@triton.jit
def merge_pair_rows(state, slope, base_slope):
    model, base = state.model, state.base
    parts = PairState(
        State(model.m[:, None], model.sum[:, None], model.weighted[:, None]),
        State(base.m[:, None], base.sum[:, None], base.weighted[:, None]),
        state.cross[:, None],
        state.base_cross[:, None],
        state.alone[:, None],
        state.base_alone[:, None],
    )
    return merge_pair(parts, slope, base_slope)


@triton.jit
def merge(parts, slope):
    """One state of `parts`, whose fields are (parts, rows)."""
    m = tl.max(parts.m, 0)
    parts = rebase(parts, m[None, :], slope)
    return State(m, tl.sum(parts.sum, 0), tl.sum(parts.weighted, 0))


@triton.jit
def merge_pair(parts, slope, base_slope):
    m, base_m = tl.max(parts.model.m, 0), tl.max(parts.base.m, 0)
    parts = rebase_pair(parts, m[None, :], base_m[None, :], slope, base_slope)
    return PairState(
        State(m, tl.sum(parts.model.sum, 0), tl.sum(parts.model.weighted, 0)),
        State(base_m, tl.sum(parts.base.sum, 0), tl.sum(parts.base.weighted, 0)),
        tl.sum(parts.cross, 0),
        tl.sum(parts.base_cross, 0),
        tl.max(parts.alone, 0),
        tl.max(parts.base_alone, 0),
    )


@triton.jit
def store_state(pointer, stride, state, mask):
    """To `pointer`, the first of STATE_SIZE tensors `stride` apart."""
    tl.store(pointer, state.m, mask=mask)
    tl.store(pointer + stride, state.sum, mask=mask)
    tl.store(pointer + 2 * stride, state.weighted, mask=mask)


@triton.jit
def store_pair_state(pointer, stride, state, mask):
    store_state(pointer, stride, state.model, mask)
    store_state(pointer + 3 * stride, stride, state.base, mask)
    tl.store(pointer + 6 * stride, state.cross, mask=mask)
    tl.store(pointer + 7 * stride, state.base_cross, mask=mask)
    tl.store(pointer + 8 * stride, state.alone, mask=mask)
    tl.store(pointer + 9 * stride, state.base_alone, mask=mask)


@triton.jit
def load_state(pointer, stride, mask):
    """Empty where masked out."""
    return State(
        tl.load(pointer, mask=mask, other=IMPOSSIBLE),
        tl.load(pointer + stride, mask=mask, other=0.0),
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
def logp_of(x, state, slope):
    """log p of the token with this x."""
    logp = slope * (x - state.m) - log(state.sum)
    logp = tl.where(x <= IMPOSSIBLE, float("-inf"), logp)
    return tl.where(state.m <= IMPOSSIBLE, float("nan"), logp)


@triton.jit
def entropy_of(state, slope):
    entropy = log(state.sum) - slope * state.weighted / state.sum
    return tl.where(state.m <= IMPOSSIBLE, float("nan"), entropy)


@triton.jit
def lse_of(state, slope):
    lse = slope * state.m + log(state.sum)
    return tl.where(state.m <= IMPOSSIBLE, float("-inf"), lse)


@triton.jit
def divergence_of(state, other, cross, alone):
    """KL from `state` to `other`: ≥ 0, NaN kept, +inf where a token is possible for `state` alone."""
    kl = cross / state.sum - log(state.sum) + log(other.sum)
    kl = tl.where(kl < 0.0, 0.0, kl)
    return tl.where(alone > 0.0, float("inf"), kl)


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
def raw_gradient(grad_z, x, inner, slope):
    """By the raw logits, given that by z."""
    grad = grad_z * slope
    if inner is not None:
        grad = grad * (inner * (1.0 - x * x))
    return grad
