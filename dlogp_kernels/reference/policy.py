"""The definition of `policy_loss` in plain PyTorch, float64-capable and differentiable: each formula once.

Tokens lie in padded sequences (B, T) with a mask (B, T) bool; `padded` makes them of packed ones (N,). What is masked
is set to 0 before anything is computed, so NaN and infinity there reach neither the loss nor a gradient.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..results import PolicyLoss, PolicyMetrics
from . import statistics as reference
from .statistics import accumulation_dtype

#: What each loss type divides by: all tokens, each sequence's tokens and all sequences, or sequences · max_length.
DENOMINATORS = {
    "dapo": "tokens",
    "grpo": "sequences",
    "bnpo": "tokens",
    "dr_grpo": "max_length",
    "cispo": "tokens",
    "sapo": "sequences",
}
LOSS_TYPES = tuple(DENOMINATORS)
#: Of these types the denominator is a number of tokens.
BY_TOKENS = tuple(name for name, denominator in DENOMINATORS.items() if denominator == "tokens")
REWEIGHTS = ("low_prob", "dominate", "ppl", "none")
REWEIGHT_SIGNS = ("both", "positive", "negative")
IMPORTANCES = ("token", "sequence", "sequence_token")
#: The options that are strings, in the order of PolicyOptions, and what they may be.
CHOICES = {
    "loss_type": LOSS_TYPES,
    "reweight": REWEIGHTS,
    "reweight_sign": REWEIGHT_SIGNS,
    "importance": IMPORTANCES,
}
#: Log-ratios are clamped to ± this, and have no gradient beyond.
LOG_RATIO_LIMIT = 20.0
#: What is added to the standard deviation of a group.
GROUP_EPSILON = 1e-6


class PolicyOptions(NamedTuple):
    """The options of `policy_loss`: those of CHOICES, numbers, and max_length last; a dual_clip of ∞ is none."""

    loss_type: str = "dapo"
    reweight: str = "low_prob"
    reweight_sign: str = "both"
    importance: str = "token"
    alpha: float = 0.1
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = math.inf
    kl_beta: float = 0.0
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    max_length: int | None = None

    @classmethod
    def of(cls, str_options: list[str], float_options: list[float], max_length: int | None) -> "PolicyOptions":
        """The inverse of `arguments`."""
        return cls._make((*str_options, *float_options, max_length))

    @property
    def denominator(self) -> str:
        return DENOMINATORS[self.loss_type]

    def arguments(self) -> tuple[list[str], list[float], int | None]:
        """As the ops take them: str_options, float_options, max_length."""
        values: tuple[Any, ...] = self
        first_float = len(CHOICES)
        return list(values[:first_float]), [float(x) for x in values[first_float:-1]], self.max_length


class TokenInputs(NamedTuple):
    """What the op `policy_loss` takes beside logp, in its order: of padded tokens (B, T) or packed ones (N,)."""

    old_logp: Tensor
    advantage: Tensor
    mask: Tensor
    offsets: Tensor | None
    group: Tensor | None
    ref_logp: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None
    token_weight: Tensor | None
    denominator: Tensor | None = None


class PolicyTokens(NamedTuple):
    """What `policy_loss` is given of its tokens, (B, T) each."""

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    mask: Tensor
    ref_logp: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None
    token_weight: Tensor | None

    @classmethod
    def of(cls, logp: Tensor, given: TokenInputs) -> "PolicyTokens":
        return cls(logp, *(getattr(given, name) for name in cls._fields[1:]))


def log_perplexity(old_logp: Tensor, mask: Tensor) -> Tensor:
    """ℓ = −mean_t log π_old of each response (B,); 0 for one without tokens."""
    return -_mean(old_logp, mask)


def normalized_in_group(x: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """(x − mean_g x) / (std_g x + 1e-6) of (B,), population statistics over those of a group that count; else 0."""
    together = ((group[:, None] == group[None, :]) & counts[None, :]).to(x.dtype)
    size = together.sum(-1).clamp_min(1.0)
    mean = together @ x / size
    variance = (together * (x[None, :] - mean[:, None]).square()).sum(-1) / size
    return ((x - mean) / (variance.sqrt() + GROUP_EPSILON)).masked_fill(~counts, 0.0)


def reweighting(old_logp: Tensor, advantage: Tensor, s: Tensor | None, options: PolicyOptions) -> Tensor:
    """Ã / Â of each token: `low_prob` 1 + α(1 − p), `dominate` αp + 1 − α, `ppl` 1 − α·s, with p = π_old ≤ 1.

    s, (B, 1) or of each token, is `normalized_in_group` of `log_perplexity`.
    """
    if options.reweight == "none":
        return torch.ones_like(old_logp)
    p = old_logp.clamp_max(0.0).exp()
    if options.reweight == "low_prob":
        weight = 1.0 + options.alpha * (1.0 - p)
    elif options.reweight == "dominate":
        weight = options.alpha * p + 1.0 - options.alpha
    else:
        assert s is not None
        weight = (1.0 - options.alpha * s).expand_as(old_logp)
    if options.reweight_sign == "both":
        return weight
    chosen = advantage > 0 if options.reweight_sign == "positive" else advantage < 0
    return torch.where(chosen, weight, 1.0)


def raw_log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, importance: str) -> Tensor:
    """log π − log π_old of each token (B, T), or of GSPO its mean over the response (B, 1), before it is clamped.

    Of GSPO-token it is that mean with the gradient of the token's own log π (B, T): mean + log π − sg(log π).
    """
    log_ratio = logp - old_logp
    if importance == "token":
        return log_ratio
    mean = _mean(log_ratio, mask)[:, None]
    return mean if importance == "sequence" else mean.detach() + (logp - logp.detach()).nan_to_num(0.0)


def ratio_of(raw: Tensor) -> Tensor:
    return raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def surrogate(ratio: Tensor, logp: Tensor, advantage: Tensor, options: PolicyOptions) -> Tensor:
    """The term of the ratio in the loss of a token, `advantage` being Ã.

    max(−Ã r, −Ã clip(r, 1 − low, 1 + high)), at most −Ã · dual_clip where Ã < 0. As TRL defines them, `cispo`
    is −Ã · min(r, high) · log π with no gradient of the ratio, `sapo` −Ã · 4/τ · sigmoid(τ(r − 1)), τ by the sign of Ã.
    """
    if options.loss_type == "cispo":
        return -advantage * ratio.detach().clamp_max(options.clip_high) * logp
    if options.loss_type == "sapo":
        temperature = sapo_temperature(advantage, options)
        return -advantage * torch.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature
    clipped = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if options.dual_clip == math.inf:
        return loss
    return torch.where(dual_clipped(ratio, advantage, options), -advantage * options.dual_clip, loss)


def surrogate_gradient(ratio: Tensor, advantage: Tensor, options: PolicyOptions) -> Tensor:
    """∂/∂ log r of `surrogate`; of `cispo` ∂/∂ log π."""
    if options.loss_type == "cispo":
        return -advantage * ratio.clamp_max(options.clip_high)
    if options.loss_type == "sapo":
        x = sapo_temperature(advantage, options) * (ratio - 1.0)
        return -advantage * 4.0 * torch.sigmoid(x) * torch.sigmoid(-x) * ratio
    low, high, dual = clipped_places(ratio, advantage, options)
    return (-advantage * ratio).masked_fill(low | high | dual, 0.0)


def sapo_temperature(advantage: Tensor, options: PolicyOptions) -> Tensor:
    positive = torch.full_like(advantage, options.sapo_temperature_pos)
    return torch.where(advantage > 0, positive, options.sapo_temperature_neg)


def dual_clipped(ratio: Tensor, advantage: Tensor, options: PolicyOptions) -> Tensor:
    return (advantage < 0) & (ratio > options.dual_clip)


def clipped_places(ratio: Tensor, advantage: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Where the lower, the upper and the dual bound take the ratio's gradient away; `sapo` has no bounds."""
    if options.loss_type == "sapo":
        nowhere = torch.zeros_like(advantage, dtype=torch.bool)
        return nowhere, nowhere, nowhere
    if options.loss_type == "cispo":
        nowhere = torch.zeros_like(advantage, dtype=torch.bool)
        return nowhere, (advantage > 0) & (ratio > options.clip_high), nowhere
    low = (advantage < 0) & (ratio < 1.0 - options.clip_low)
    high = (advantage > 0) & (ratio > 1.0 + options.clip_high)
    return low, high, dual_clipped(ratio, advantage, options)


def k3(x: Tensor) -> Tensor:
    """eˣ − x − 1 ≥ 0, for x up to 20."""
    x = x.clamp_max(LOG_RATIO_LIMIT)
    return torch.expm1(x) - x


def k3_gradient(x: Tensor) -> Tensor:
    return torch.expm1(x).masked_fill(x > LOG_RATIO_LIMIT, 0.0)


def sequence_scale(
    counts: Tensor, total: Tensor, num_sequences: int, max_length: int, instead: Tensor | None, loss_type: str
) -> Tensor:
    """1 / the denominator of each sequence's tokens (B,), float64; 0 where there is nothing to divide by.

    `counts` (B,) are their numbers of tokens, `total` () that of the whole batch of `num_sequences`. Where it is given,
    `instead` () stands in for whichever of the two the loss divides by.
    """
    divides_by = DENOMINATORS[loss_type]
    if divides_by == "tokens":
        return _inverse(total.double() if instead is None else given_number(instead)).expand_as(counts)
    sequences = torch.full_like(total, num_sequences, dtype=torch.float64) if instead is None else given_number(instead)
    if divides_by == "max_length":
        return _inverse(sequences * max_length).expand_as(counts)
    return _inverse(counts.double() * sequences)


def given_number(x: Tensor) -> Tensor:
    """In float64; NaN where it is negative or not finite, as no number of tokens or responses is."""
    x = x.double()
    return x.masked_fill(~(x.isfinite() & (x >= 0)), math.nan)


def token_loss(tokens: PolicyTokens, ratio: Tensor, advantage: Tensor, options: PolicyOptions) -> Tensor:
    """surrogate · token_weight + kl_beta · k3(ref_logp − logp) − entropy_coef · entropy; 0 where masked.

    An exact divergence `kl` takes the place of k3.
    """
    loss = surrogate(ratio, tokens.logp, advantage, options)
    if tokens.token_weight is not None:
        loss = weighted(loss, tokens.token_weight)
    divergence = divergence_of(tokens)
    if divergence is not None and options.kl_beta != 0.0:  # an infinite divergence may be looked at without it
        loss = loss + options.kl_beta * divergence
    if tokens.entropy is not None and options.entropy_coef != 0.0:
        loss = loss - options.entropy_coef * tokens.entropy
    return loss.masked_fill(~tokens.mask, 0.0)


def weighted(x: Tensor, token_weight: Tensor) -> Tensor:
    """x · token_weight; 0 where that is, whatever x."""
    return (x * token_weight).masked_fill(token_weight == 0, 0.0)


def divergence_of(tokens: PolicyTokens) -> Tensor | None:
    """Of each token from the policy to the reference model, if there is one."""
    return tokens.kl if tokens.ref_logp is None else k3(tokens.ref_logp - tokens.logp)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    offsets: Tensor | None = None,
    group: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    kl: Tensor | None = None,
    token_weight: Tensor | None = None,
    denominator: Tensor | None = None,
    options: PolicyOptions,
) -> PolicyLoss:
    """`dlogp_kernels.policy_loss` in plain PyTorch; `denominator` is num_tokens or num_sequences."""
    dtype = accumulation_dtype(logp, old_logp, advantage, ref_logp, entropy, kl, token_weight)
    given = PolicyTokens(logp, old_logp, advantage, mask, ref_logp, entropy, kl, token_weight)
    num_sequences = logp.shape[0] if offsets is None else offsets.numel() - 1
    tokens = as_padded(given, offsets, dtype, sequence_level=advantage.shape == (num_sequences,))
    s = None
    if options.reweight == "ppl":
        assert group is not None
        s = normalized_in_group(log_perplexity(tokens.old_logp, tokens.mask), group, tokens.mask.any(-1))[:, None]
    weight = reweighting(tokens.old_logp, tokens.advantage, s, options)
    advantage = weight * tokens.advantage
    raw = raw_log_ratio(tokens.logp, tokens.old_logp, tokens.mask, options.importance)
    ratio = ratio_of(raw).expand_as(tokens.logp)
    loss = token_loss(tokens, ratio, advantage, options)
    counts = tokens.mask.sum(-1)
    max_length = tokens.mask.shape[1] if options.max_length is None else options.max_length
    scale = sequence_scale(counts, counts.sum(), counts.shape[0], max_length, denominator, options.loss_type).to(dtype)
    total = (loss.sum(-1) * scale).sum()
    with torch.no_grad():
        sums = metric_sums(tokens, ratio, weight, advantage, options)
    return PolicyLoss(total, PolicyMetrics(*finished_metrics(sums, counts.sum()).to(dtype).unbind()))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    base_hidden: Tensor | None = None,
    base_weight: Tensor | None = None,
    heads: dict[str, Any],
    **rest: Any,
) -> PolicyLoss:
    """`dlogp_kernels.linear_policy_loss` in plain PyTorch; `heads` are the options of both models' last layers."""
    targets = target.masked_fill(~mask, -1)
    if base_hidden is None or base_weight is None:
        stats = reference.linear_logp(hidden, weight, targets, ignore_index=-1, **heads)
        kl = None
    else:
        pair = reference.linear_delta_logp(
            hidden, weight, base_hidden, base_weight, targets, ignore_index=-1, **heads
        )  # fmt: skip
        stats, kl = reference.LogpStats(pair.logp, pair.entropy, pair.lse), pair.kl
    return policy_loss(stats.logp, old_logp, advantage, mask, entropy=stats.entropy, kl=kl, **rest)


def grad_logp_unscaled(
    tokens: PolicyTokens, raw: Tensor, ratio: Tensor, advantage: Tensor, options: PolicyOptions
) -> Tensor:
    """The gradient of `policy_loss` by logp (B, T), not yet times `sequence_scale`; `advantage` is Ã.

    Through the ratio of a token, and of GSPO-token, dℓ/d log r where |log r| ≤ 20; the ratio of a response has that sum
    over its tokens divided by their number.
    """
    grad = surrogate_gradient(ratio, advantage, options)
    if tokens.token_weight is not None:
        grad = weighted(grad, tokens.token_weight)
    grad = grad.masked_fill(~tokens.mask, 0.0)
    if options.loss_type != "cispo":
        grad = grad.masked_fill(raw.abs() > LOG_RATIO_LIMIT, 0.0)
        if options.importance == "sequence":
            grad = _mean(grad, tokens.mask)[:, None].expand_as(grad)
    if tokens.ref_logp is not None and options.kl_beta != 0.0:
        grad = grad - options.kl_beta * k3_gradient(tokens.ref_logp - tokens.logp)
    return grad.masked_fill(~tokens.mask, 0.0)


def metric_sums(
    tokens: PolicyTokens, ratio: Tensor, weight: Tensor, advantage: Tensor, options: PolicyOptions
) -> Tensor:
    """The numerators of PolicyMetrics; the largest ratio as it is. `advantage` is Ã."""
    low, high, dual = clipped_places(ratio, advantage, options)
    x = (tokens.logp - tokens.old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    zero, divergence = torch.zeros_like(ratio), divergence_of(tokens)
    values = {
        "clip_low": low,
        "clip_high": high,
        "clip_dual": dual,
        "approx_kl": k3(x),
        "mean_ratio": ratio,
        "max_ratio": ratio,
        "mean_weight": weight,
        "ref_kl": zero if divergence is None else divergence,
        "entropy": zero if tokens.entropy is None else tokens.entropy,
    }
    masked = {name: x.double().masked_fill(~tokens.mask, 0.0) for name, x in values.items()}
    return torch.stack([_largest(masked[n]) if n == "max_ratio" else masked[n].sum() for n in PolicyMetrics._fields])


def merged(sums: Tensor, other: Tensor) -> Tensor:
    """`metric_sums` of two sets of tokens together."""
    largest = PolicyMetrics._fields.index("max_ratio")
    total = sums + other
    total[largest] = torch.maximum(sums[largest], other[largest])
    return total


def finished_metrics(sums: Tensor, count: Tensor) -> Tensor:
    """Means of the batch's tokens out of `metric_sums`; 0 where there are none."""
    largest = PolicyMetrics._fields.index("max_ratio")
    means = sums * _inverse(count.to(sums.dtype))
    means[largest] = sums[largest]
    return means


def as_padded(
    tokens: PolicyTokens, offsets: Tensor | None, dtype: torch.dtype, *, sequence_level: bool
) -> PolicyTokens:
    """(B, T) of `dtype`, 0 where masked, of packed tokens or padded ones; advantages (B,) are `sequence_level`."""
    mask = tokens.mask if offsets is None else padded(tokens.mask, offsets)
    advantage = tokens.advantage[:, None].expand_as(mask) if sequence_level else tokens.advantage

    def bring(x: Tensor) -> Tensor:
        x = x if offsets is None or x.dim() == 2 else padded(x, offsets)
        return x.to(dtype).masked_fill(~mask, 0.0)

    rest = (None if x is None else bring(x) for x in tokens[4:])
    return PolicyTokens(bring(tokens.logp), bring(tokens.old_logp), bring(advantage), mask, *rest)


def padded(x: Tensor, offsets: Tensor) -> Tensor:
    """Packed x (N,), sequence b in [offsets[b], offsets[b + 1]), as (B, longest), 0 past a sequence's end."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    place = torch.arange(longest, device=x.device)
    inside = place[None, :] < lengths[:, None]
    index = (offsets[:-1, None] + place).masked_fill(~inside, 0)
    if x.numel() == 0:
        return x.new_zeros(index.shape)
    return x[index].masked_fill(~inside, 0)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)


def _largest(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_zeros(())


def _inverse(x: Tensor) -> Tensor:
    """Of a number ≥ 0, or NaN; 0 of 0."""
    return torch.where(x == 0, 0.0, 1.0 / x)
