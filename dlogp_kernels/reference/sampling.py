"""The definition of `extrapolated_sample` in plain PyTorch, step by step, float64-capable.

Everything is of rows (B, V). Noise comes from a counter, so a draw depends on (seed, row_id, step, logits) alone; every
backend computes the same bits of it.
"""

import torch
from torch import Tensor

from ..results import Sample
from . import statistics as reference

#: Streams of noise.
DRAFT, REPLACEMENT, RANDOM = 0, 1, 2
CRITERIA = ("delta_logp", "kl", "reverse_kl", "avg_kl", "entropy", "rl_entropy", "random", "all", "none")
#: Those that compare with a threshold.
WITH_THRESHOLD = CRITERIA[:7]
#: Those that compare a statistic of the whole row.
WITH_STATISTICS = ("kl", "reverse_kl", "avg_kl", "entropy", "rl_entropy")

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four 32-bit counters and a 64-bit key: four 32-bit words, all in int64 tensors."""
    c0, c1, c2, c3 = counter
    keys = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], product1 & _MASK, high0 ^ c3 ^ keys[1], product0 & _MASK
        keys = [(key + step) & _MASK for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return c0, c1, c2, c3


def noise_bits(tokens: Tensor, row_id: Tensor, seed: Tensor, step: Tensor, stream: int | Tensor) -> Tensor:
    """32 random bits of each row and token, (n,) or (B, n): counter (v // 4, row_id, step, stream), word v % 4; (B, n).

    row_id (B,), seed (1,), step (1,) or (B,), all int64; of counters the lower 32 bits count. The stream may be one of
    each row, too.
    """
    block = (tokens // 4 & _MASK).expand(row_id.shape[0], -1)
    counters = row_id & _MASK, step.expand_as(row_id) & _MASK, torch.zeros_like(row_id) + stream
    row, steps, streams = (x[:, None].expand_as(block) for x in counters)
    words = torch.stack(philox((block, row, steps, streams), seed), dim=-1)
    lane = (tokens % 4).expand_as(block)
    return words.gather(-1, lane[..., None]).squeeze(-1)


def gumbel(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """−log(−log(1 − u)) with u = (bits + ½)·2⁻³²: its tail reaches probabilities of 2⁻³².

    Both u and 1 − u are exact up to the rounding of `dtype`, so the smaller of them is the one to look at.
    """
    u = (bits.to(torch.float64) + 0.5) * 2.0**-32
    rest = ((_MASK - bits).to(torch.float64) + 0.5) * 2.0**-32
    exponential = torch.where(u < 0.5, -torch.log1p(-u.to(dtype)), -torch.log(rest.to(dtype)))
    return -torch.log(exponential)


def kept_tokens(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens survive top-k, then top-p of what is left, then min-p, of logits / T; (B, V) bool.

    As the warpers of `transformers`: a token falls to top-k below the k-th largest, to top-p if the tokens with larger
    logits have a mass of top_p or more, to min-p below min_p times the largest probability. Equal logits fall together.
    """
    kept = scaled > -torch.inf
    if 0 < top_k < scaled.shape[-1]:
        kept &= scaled >= scaled.topk(top_k, dim=-1).values[..., -1:]
    if top_p < 1.0:
        p = scaled.masked_fill(~kept, -torch.inf).to(torch.float64).softmax(-1)
        ordered, order = p.sort(dim=-1, descending=True)
        above = ordered.cumsum(-1) - ordered
        # Of equal ones, the first in order has the smallest mass above.
        first = torch.searchsorted(-ordered, -ordered)
        kept &= torch.empty_like(kept).scatter_(-1, order, above.gather(-1, first) < top_p)
    if min_p > 0.0:
        kept &= (scaled - scaled.amax(-1, keepdim=True)).exp() >= min_p
    return kept


def draw(
    logits: Tensor,
    row_id: Tensor,
    seed: Tensor,
    step: Tensor,
    stream: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    first_token: int = 0,
) -> Tensor:
    """A token of each row by the largest score z/T + Gumbel noise among those kept; the first maximum if T = 0.

    first_token: the place of the first one in the vocabulary by which noise is counted.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits / temperature
    kept = kept_tokens(scaled, top_k, top_p, min_p)
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    noise = gumbel(noise_bits(first_token + tokens, row_id, seed, step, stream), scaled.dtype)
    return (scaled + noise).masked_fill(~kept, -torch.inf).argmax(-1)


def extrapolated_logits(logits: Tensor, base_logits: Tensor, gamma: float) -> Tensor:
    """(1 + γ) z_R − γ z_B; −inf where z_R is, and the row's least finite z_B stands in for −inf in z_B."""
    finite = base_logits > -torch.inf
    least = base_logits.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
    extrapolated = (1.0 + gamma) * logits - gamma * torch.where(finite, base_logits, least)
    return extrapolated.masked_fill(logits == -torch.inf, -torch.inf)


def selected_rows(
    stats: reference.DeltaLogpStats | None,
    delta_logp: Tensor,
    criterion: str,
    threshold: float | None,
    row_id: Tensor,
    seed: Tensor,
    step: Tensor,
) -> Tensor:
    """The criterion of Algorithm 1 (arXiv 2603.22117), (B,) bool; inequalities are strict.

    stats may be None but for those of WITH_STATISTICS.
    """
    if criterion in ("all", "none"):
        return torch.full_like(row_id, criterion == "all", dtype=torch.bool)
    assert threshold is not None
    if criterion == "delta_logp":
        return delta_logp < threshold
    if criterion == "random":
        bits = noise_bits(torch.zeros_like(row_id[:1]), row_id, seed, step, RANDOM)[:, 0]
        return (bits.to(torch.float64) + 0.5) * 2.0**-32 < threshold
    assert stats is not None
    values = {
        "kl": stats.kl,
        "reverse_kl": stats.reverse_kl,
        "avg_kl": (stats.kl + stats.reverse_kl) / 2,
        "entropy": stats.base_entropy,
        "rl_entropy": stats.entropy,
    }
    return values[criterion] > threshold


def extrapolated_sample(
    logits: Tensor,
    base_logits: Tensor,
    row_id: Tensor,
    seed: Tensor,
    step: Tensor,
    gamma: float,
    criterion: str,
    threshold: float | None,
    draft: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    first_token: int = 0,
) -> Sample:
    """Of logits (B, V) in float32 or float64; int64 row_id (B,), seed (1,), step (1,) or (B,)."""
    bad = _is_bad(logits) | _is_bad(base_logits)
    z, base_z = (x.masked_fill(bad[:, None], 0.0) for x in (logits, base_logits))
    filters = (temperature, top_k, top_p, min_p, first_token)
    drafted = draw(base_z if draft == "base" else z, row_id, seed, step, DRAFT, *filters)
    stats = reference.delta_logp_of_rows(z, base_z, drafted[:, None], -1)
    delta_logp = stats.delta_logp[:, 0]
    selected = selected_rows(stats, delta_logp, criterion, threshold, row_id, seed, step)
    replacement = draw(extrapolated_logits(z, base_z, gamma), row_id, seed, step, REPLACEMENT, *filters)
    token = torch.where(selected, replacement, drafted)
    logp, base_logp = ((x.gather(-1, token[:, None])[:, 0] - x.logsumexp(-1)) for x in (z, base_z))
    nan = torch.nan
    return Sample(
        token.masked_fill(bad, -1),
        drafted.masked_fill(bad, -1),
        selected & ~bad,
        delta_logp.masked_fill(bad, nan),
        logp.masked_fill(bad, nan),
        base_logp.masked_fill(bad, nan),
    )


def _is_bad(logits: Tensor) -> Tensor:
    """Rows from which nothing can be drawn: one with NaN or +inf, or without a finite logit."""
    return logits.isnan().any(-1) | (logits == torch.inf).any(-1) | (logits == -torch.inf).all(-1)
