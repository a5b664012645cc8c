"""A draw from a whole vocabulary by the draws from its shards: the shard's winner with the largest score wins.

The noise of a token is that of its place in the whole vocabulary, so the best of all tokens is the best of its shard.
As in shards.py, R shards in their order are the first dimension, and everything is in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import SampleOptions
from ..results import DeltaLogpStats, Sample
from .sampling import DRAFT, REPLACEMENT, gumbel, noise_bits, selected_rows
from .shards import Whole, divergence_of, entropy_of, whole_of


class ShardSamples(NamedTuple):
    """What each of R shards drew for N rows, as if it were the vocabulary; no logit of its is −∞.

    token (R, 2, N): of the draft and of its replacement, places in the whole vocabulary. z (R, 2, 2, N): of both
    models, at both tokens. logp (R, 2, N): of both models, on the shard, of the replacement; NaN where nothing could be
    drawn. statistics (R, 4, N): both entropies, kl and reverse_kl, or (R, 0, N) where the criterion needs none.
    """

    token: Tensor
    z: Tensor
    logp: Tensor
    statistics: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> "ShardSamples":
        """From (R, numbers, N), all of a shard one after the other."""
        return cls(numbers[:, :2], numbers[:, 2:6].unflatten(1, (2, 2)), numbers[:, 6:8], numbers[:, 8:])


class Counters(NamedTuple):
    """What the noise of rows depends on: row_id and step (N,), seed (1,)."""

    row_id: Tensor
    seed: Tensor
    step: Tensor


def sample_of(shards: ShardSamples, counters: Counters, options: SampleOptions, dtype: torch.dtype) -> Sample:
    """Over all shards, in `dtype`; what the criterion compares is rounded before, as in the op over one shard."""
    # From some shard nothing could be drawn, or a token whose logits are not finite, which its score would not survive.
    bad = ~(shards.logp.isfinite().all(1) & shards.z.isfinite().all(1).all(1)).all(0)
    winner = _scores(shards, counters, options).argmax(0, keepdim=True)  # the first shard, if there are several
    draft_token, replacement = shards.token.gather(0, winner)[0].long()
    lse = shards.z[:, :, 1] - shards.logp
    whole = whole_of(lse, torch.zeros_like(lse))  # of both models
    z = shards.z.gather(0, winner[:, None].expand(-1, 2, -1, -1))[0]
    logp = (z - whole.largest[:, None] - whole.rest.log1p()[:, None]).clamp_max(0.0)  # above 0 by rounding alone
    stats = _statistics(shards.statistics, whole, logp[:, 0], dtype) if shards.statistics.shape[1] else None
    delta_logp = (logp[0, 0] - logp[1, 0]).to(dtype)
    selected = selected_rows(stats, delta_logp, options.criterion, options.threshold, *counters) & ~bad
    token = torch.where(selected, replacement, draft_token)
    logp_of_token, base_logp_of_token = torch.where(selected, logp[:, 1], logp[:, 0]).to(dtype)
    return Sample(
        token.masked_fill(bad, -1),
        draft_token.masked_fill(bad, -1),
        selected,
        *(x.masked_fill(bad, torch.nan) for x in (delta_logp, logp_of_token, base_logp_of_token)),
    )


def _scores(shards: ShardSamples, counters: Counters, options: SampleOptions) -> Tensor:
    """Of both draws, (R, 2, N): z / T + Gumbel noise, or z alone if T = 0."""
    z, base_z = shards.z.unbind(1)
    replacing = (1.0 + options.gamma) * z[:, 1] - options.gamma * base_z[:, 1]
    scores = torch.stack(((base_z if options.draft == "base" else z)[:, 0], replacing), 1)
    return scores if options.temperature == 0.0 else scores / options.temperature + _noise(shards.token, counters)


def _noise(token: Tensor, counters: Counters) -> Tensor:
    """Of drafts and replacements (R, 2, N), all at once."""
    rows = token.shape[2]
    row_id, step = (x.repeat(2) for x in (counters.row_id, counters.step))
    stream = torch.arange(2 * rows, device=token.device).ge(rows) * (REPLACEMENT - DRAFT) + DRAFT
    bits = noise_bits(token.flatten(1).t().long(), row_id, counters.seed, step, stream)
    return gumbel(bits.t(), torch.float64).view_as(token)


def _statistics(of_shards: Tensor, both: Whole, logp: Tensor, dtype: torch.dtype) -> DeltaLogpStats:
    """From (R, 4, N), with log p (2, N) of the drafts, rounded to `dtype`."""
    entropy, base_entropy, kl, reverse_kl = of_shards.unbind(1)
    whole, base_whole = (Whole(both.log_share[:, i], both.largest[i], both.rest[i]) for i in range(2))
    return DeltaLogpStats(
        delta_logp=(logp[0] - logp[1]).to(dtype),
        logp=logp[0].to(dtype),
        base_logp=logp[1].to(dtype),
        entropy=entropy_of(entropy, whole).to(dtype),
        base_entropy=entropy_of(base_entropy, base_whole).to(dtype),
        kl=divergence_of(kl, whole, base_whole).to(dtype),
        reverse_kl=divergence_of(reverse_kl, base_whole, whole).to(dtype),
        lse=whole.lse.to(dtype),
        base_lse=base_whole.lse.to(dtype),
    )
