"""Device functions of the policy loss: each formula of reference/policy.py once, in float32, and its options.

r is the importance ratio, A the reweighted advantage. A number that is not finite arrives as it is in the definition.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..reference import policy as reference_policy
from ..reference.policy import PolicyOptions
from ..results import PolicyMetrics
from . import _math

_LIMIT = tl.constexpr(reference_policy.LOG_RATIO_LIMIT)
GROUP_EPSILON = tl.constexpr(reference_policy.GROUP_EPSILON)
_SERIES = tl.constexpr(0.3)

#: The order of sums over tokens: the numerators of the metrics (of max_ratio the largest), the loss, how many they are.
METRICS = tl.constexpr(len(PolicyMetrics._fields))
MAX_RATIO = tl.constexpr(PolicyMetrics._fields.index("max_ratio"))
LOSS, COUNT = tl.constexpr(METRICS.value), tl.constexpr(METRICS.value + 1)
NUM_SUMS = tl.constexpr(METRICS.value + 2)


class PolicyScalars(NamedTuple):
    """The options that are numbers; clip_low and clip_high as bounds of r."""

    alpha: float
    lower: float
    upper: float
    dual: float
    kl_beta: float
    entropy_coef: float
    temperature_pos: float
    temperature_neg: float


class PolicyVariant(NamedTuple):
    """The options that choose code: surrogate "clipped", "cispo" or "sapo", and the names of reference/policy.py."""

    surrogate: str
    reweight: str
    sign: str
    importance: str


def variant_of(options: PolicyOptions) -> PolicyVariant:
    surrogate = options.loss_type if options.loss_type in ("cispo", "sapo") else "clipped"
    return PolicyVariant(surrogate, options.reweight, options.reweight_sign, options.importance)


def scalars_of(options: PolicyOptions) -> PolicyScalars:
    cispo = options.loss_type == "cispo"
    return PolicyScalars(
        options.alpha,
        1.0 - options.clip_low,
        options.clip_high if cispo else 1.0 + options.clip_high,
        options.dual_clip,
        options.kl_beta,
        options.entropy_coef,
        options.sapo_temperature_pos,
        options.sapo_temperature_neg,
    )


@triton.jit
def ratio_of(log_ratio):
    clamped = tl.where(log_ratio < -_LIMIT, -_LIMIT, log_ratio)
    return _math.exp(tl.where(clamped > _LIMIT, _LIMIT, clamped))


@triton.jit
def within_limit(slope, log_ratio):
    """∂/∂ log r, which a log-ratio that was clamped has not."""
    return tl.where(tl.abs(log_ratio) > _LIMIT, 0.0, slope)


@triton.jit
def weight_of(old_logp, advantage, score, alpha, REWEIGHT: tl.constexpr, SIGN: tl.constexpr):
    """Ã / Â; `score` is the normalised log-perplexity of the response."""
    if REWEIGHT == "none":
        return tl.full(old_logp.shape, 1.0, tl.float32)
    if REWEIGHT == "ppl":
        weight = tl.full(old_logp.shape, 1.0, tl.float32) - alpha * score
    else:
        p = _math.exp(tl.where(old_logp > 0.0, 0.0, old_logp))
        weight = 1.0 + alpha * (1.0 - p) if REWEIGHT == "low_prob" else alpha * p + (1.0 - alpha)
    if SIGN == "positive":
        weight = tl.where(advantage > 0.0, weight, 1.0)
    if SIGN == "negative":
        weight = tl.where(advantage < 0.0, weight, 1.0)
    return weight


@triton.jit
def term_of(ratio, advantage, logp, scalars, SURROGATE: tl.constexpr):
    """What the ratio contributes to a token's loss; that by log r, of cispo by log π; where a bound took it away."""
    nowhere = (advantage < 0.0) & (advantage > 0.0)
    if SURROGATE == "cispo":
        slope = -advantage * tl.where(ratio > scalars.upper, scalars.upper, ratio)
        return slope * logp, slope, nowhere, (advantage > 0.0) & (ratio > scalars.upper), nowhere
    if SURROGATE == "sapo":
        temperature = tl.where(advantage > 0.0, scalars.temperature_pos, scalars.temperature_neg)
        x = -temperature * (ratio - 1.0)
        exponential = _math.exp(tl.where(x > 80.0, 80.0, x))
        sigmoid = 1.0 / (1.0 + exponential)
        four = -4.0 * advantage * sigmoid
        return four / temperature, four * (exponential * sigmoid) * ratio, nowhere, nowhere, nowhere
    low = (advantage < 0.0) & (ratio < scalars.lower)
    high = (advantage > 0.0) & (ratio > scalars.upper)
    dual = (advantage < 0.0) & (ratio > scalars.dual)
    bound = tl.where(low, scalars.lower, tl.where(high, scalars.upper, tl.where(dual, scalars.dual, ratio)))
    slope = tl.where(low | high | dual, 0.0, -advantage * ratio)
    return -advantage * bound, slope, low, high, dual


@triton.jit
def times(factor, x):
    """0 where the factor is: what has no part in the loss may be infinite, or no number."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def k3_of(x):
    """eˣ − x − 1 and eˣ − 1 for x ≤ 20; near 0, where both cancel, by the series."""
    exponential = _math.exp(x)
    series = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x / 40320)))))
    near = tl.abs(x) < _SERIES
    k3 = tl.where(near, series * x * x, exponential - x - 1.0)
    return k3, tl.where(near, k3 + x, exponential - 1.0)


@triton.jit
def k3_of_reference(ref_logp, logp):
    """k3 of min(ref_logp − logp, 20), and what it adds to the gradient by logp, both without kl_beta."""
    full = ref_logp - logp
    k3, slope = k3_of(tl.where(full > _LIMIT, _LIMIT, full))
    return k3, tl.where(full > _LIMIT, 0.0, -slope)


@triton.jit
def k3_of_log_ratio(log_ratio):
    clamped = tl.where(log_ratio < -_LIMIT, -_LIMIT, log_ratio)
    k3, _ = k3_of(tl.where(clamped > _LIMIT, _LIMIT, clamped))
    return k3
