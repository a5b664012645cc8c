"""What a GRPO trainer computes of responses beside `policy_loss`: from log-probabilities (B, T) and a mask."""

from torch import Tensor

from .policy import (
    PolicyOptions,
    clipped_places,
    k3,
    log_perplexity,
    normalized_in_group,
    ratio_of,
    raw_log_ratio,
    reweighting,
)

__all__ = ["clipped", "divergence", "log_perplexity", "masked_mean", "overlong_penalty", "perplexity_weight"]


def perplexity_weight(
    perplexity: Tensor, advantage: Tensor, counts: Tensor, group: Tensor, alpha: float, sign: str
) -> Tensor:
    """Ã / Â of each response (B,) under `ppl`, from its `log_perplexity`; those without tokens (counts) do not count.

    A batch that holds whole groups can so be reweighted before it is parted.
    """
    s = normalized_in_group(perplexity, group, counts > 0)
    options = PolicyOptions(reweight="ppl", alpha=alpha, reweight_sign=sign)
    # Of a token's log-probability `ppl` takes the shape alone.
    return reweighting(perplexity[:, None], advantage[:, None], s[:, None], options).squeeze(1)


def divergence(logp: Tensor, ref_logp: Tensor, old_logp: Tensor, mask: Tensor, importance: str) -> Tensor:
    """k3 of each token to the reference model times the importance ratio, an unbiased estimate off the policy."""
    return k3(ref_logp - logp) * ratio_of(raw_log_ratio(logp, old_logp, mask, importance))


def clipped(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, options: PolicyOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the lower, the upper and the dual bound take the gradient of a token's ratio (B, T), or of a response's
    (B, 1), away; advantages are (B,)."""
    level = "token" if options.importance == "token" else "sequence"
    ratio = ratio_of(raw_log_ratio(logp, old_logp, mask, level))
    return clipped_places(ratio, advantage[:, None].expand_as(ratio), options)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over all tokens of a batch; 0 where there are none."""
    return (x * mask).sum() / mask.sum().clamp_min(1)


def overlong_penalty(tokens: int, max_tokens: int, buffer: int, penalty: float) -> float:
    """0 up to `max_tokens` − `buffer` tokens, then up in a line to `penalty` at `max_tokens`.

    Source: DAPO, arXiv 2503.14476, Eq. 13.
    """
    return penalty * min(max(tokens - (max_tokens - buffer), 0), buffer) / buffer
