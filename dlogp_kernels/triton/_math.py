"""Device functions shared by the kernels: the logit transform, the softmax states, the gradient. Each formula once.

Kernels hold a model's logits as z = output_scale · x: x = raw + bias and output_scale = logit_scale / temperature, or
with a softcap c, x = tanh((raw + bias) · tanh_scale), tanh_scale = logit_scale / c and output_scale = c / temperature.
A state is centred on the maximum m of x, and d = x − m, so that a common offset of the logits costs no accuracy. With s
the output_scale:

    sum = Σ e^{s·d}        weighted = Σ e^{s·d}·d
    cross = Σ e^{s·d}·u    base_cross = −Σ e^{base_s·base_d}·u    with u = s·d − base_s·base_d

All in float32. A token that is impossible (logit −inf), and a column beyond the vocabulary, has x = MASKED_LOGIT:
finite, so that nothing here makes 0 · inf, and so small that its terms are exactly 0 next to any other token's.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

MASKED_LOGIT = tl.constexpr(-1e25)
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

    `unsupported` is 1 where some token is possible for the model and impossible for the base, so that KL is infinite;
    `base_unsupported` the reverse.
    """

    model: Any
    base: Any
    cross: Any
    base_cross: Any
    unsupported: Any
    base_unsupported: Any


#: Numbers that a state has in memory, a row and split of the vocabulary.
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
def transform(raw, bias, tanh_scale):
    """x of raw logits; `bias` broadcasts to them or is None, `tanh_scale` is logit_scale / softcap or None."""
    x = raw
    if bias is not None:
        x += bias
    if tanh_scale is not None:
        x = tanh(x * tanh_scale)
    return x


@triton.jit
def empty_state(BLOCK_N: tl.constexpr):
    zero = tl.zeros([BLOCK_N], tl.float32)
    return State(zero + MASKED_LOGIT, zero, zero)


@triton.jit
def empty_pair_state(BLOCK_N: tl.constexpr):
    zero = tl.zeros([BLOCK_N], tl.float32)
    return PairState(empty_state(BLOCK_N), empty_state(BLOCK_N), zero, zero, zero, zero)


@triton.jit
def state_unless(reset, state):
    """`state`, or an empty one where the scalar `reset` is true."""
    return State(
        tl.where(reset, MASKED_LOGIT, state.m), tl.where(reset, 0.0, state.sum), tl.where(reset, 0.0, state.weighted)
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
def rebase(state, m, output_scale):
    """The same state, centred on a larger m."""
    shift = state.m - m
    factor = exp(output_scale * shift)
    return State(m, factor * state.sum, factor * (state.weighted + shift * state.sum))


@triton.jit
def rebase_pair(state, m, base_m, output_scale, base_output_scale):
    shift, base_shift = output_scale * (state.model.m - m), base_output_scale * (state.base.m - base_m)
    change = shift - base_shift
    return PairState(
        rebase(state.model, m, output_scale),
        rebase(state.base, base_m, base_output_scale),
        exp(shift) * (state.cross + change * state.model.sum),
        exp(base_shift) * (state.base_cross - change * state.base.sum),
        state.unsupported,
        state.base_unsupported,
    )


@triton.jit
def fold(state, x, output_scale):
    """`state` with the columns of the tile x (rows, columns)."""
    state = rebase(state, tl.maximum(state.m, tl.max(x, 1)), output_scale)
    d = x - state.m[:, None]
    e = tl.exp2(d * (output_scale * _LOG2E))
    return State(state.m, state.sum + tl.sum(e, 1), state.weighted + tl.sum(e * d, 1))


@triton.jit
def fold_pair(state, x, base_x, output_scale, base_output_scale):
    """`state` with the columns of both models' tiles."""
    m = tl.maximum(state.model.m, tl.max(x, 1))
    base_m = tl.maximum(state.base.m, tl.max(base_x, 1))
    state = rebase_pair(state, m, base_m, output_scale, base_output_scale)
    d, base_d = x - m[:, None], base_x - base_m[:, None]
    e, base_e = tl.exp2(d * (output_scale * _LOG2E)), tl.exp2(base_d * (base_output_scale * _LOG2E))
    u = output_scale * d - base_output_scale * base_d
    model, base = state.model, state.base
    return PairState(
        State(m, model.sum + tl.sum(e, 1), model.weighted + tl.sum(e * d, 1)),
        State(base_m, base.sum + tl.sum(base_e, 1), base.weighted + tl.sum(base_e * base_d, 1)),
        state.cross + tl.sum(e * u, 1),
        state.base_cross - tl.sum(base_e * u, 1),
        state.unsupported,
        state.base_unsupported,
    )


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
def merge_rows(state, output_scale):
    """One state, (1,), of those of all rows."""
    return merge(State(state.m[:, None], state.sum[:, None], state.weighted[:, None]), output_scale)


@triton.jit
def merge_pair_rows(state, output_scale, base_output_scale):
    model, base = state.model, state.base
    splits = PairState(
        State(model.m[:, None], model.sum[:, None], model.weighted[:, None]),
        State(base.m[:, None], base.sum[:, None], base.weighted[:, None]),
        state.cross[:, None],
        state.base_cross[:, None],
        state.unsupported[:, None],
        state.base_unsupported[:, None],
    )
    return merge_pair(splits, output_scale, base_output_scale)


@triton.jit
def merge(splits, output_scale):
    """One state of `splits`, whose fields are (splits, rows)."""
    m = tl.max(splits.m, 0)
    splits = rebase(splits, m[None, :], output_scale)
    return State(m, tl.sum(splits.sum, 0), tl.sum(splits.weighted, 0))


@triton.jit
def merge_pair(splits, output_scale, base_output_scale):
    m, base_m = tl.max(splits.model.m, 0), tl.max(splits.base.m, 0)
    splits = rebase_pair(splits, m[None, :], base_m[None, :], output_scale, base_output_scale)
    return PairState(
        State(m, tl.sum(splits.model.sum, 0), tl.sum(splits.model.weighted, 0)),
        State(base_m, tl.sum(splits.base.sum, 0), tl.sum(splits.base.weighted, 0)),
        tl.sum(splits.cross, 0),
        tl.sum(splits.base_cross, 0),
        tl.max(splits.unsupported, 0),
        tl.max(splits.base_unsupported, 0),
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
    tl.store(pointer + 8 * stride, state.unsupported, mask=mask)
    tl.store(pointer + 9 * stride, state.base_unsupported, mask=mask)


@triton.jit
def load_state(pointer, stride, mask):
    """Empty where masked out."""
    return State(
        tl.load(pointer, mask=mask, other=MASKED_LOGIT),
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
def logp_of(x, state, output_scale):
    """log p of the token with this x."""
    logp = output_scale * (x - state.m) - log(state.sum)
    logp = tl.where(x <= MASKED_LOGIT, float("-inf"), logp)
    return tl.where(state.m <= MASKED_LOGIT, float("nan"), logp)


@triton.jit
def entropy_of(state, output_scale):
    entropy = log(state.sum) - output_scale * state.weighted / state.sum
    return tl.where(state.m <= MASKED_LOGIT, float("nan"), entropy)


@triton.jit
def lse_of(state, output_scale):
    lse = output_scale * state.m + log(state.sum)
    return tl.where(state.m <= MASKED_LOGIT, float("-inf"), lse)


@triton.jit
def divergence_of(state, other, cross, unsupported):
    """KL from `state` to `other`: ≥ 0, NaN kept, +inf where a token is possible for `state` alone."""
    kl = cross / state.sum - log(state.sum) + log(other.sum)
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
