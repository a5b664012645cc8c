"""Statistics over a whole vocabulary from those over its shards, which the ranks of a group hold: each formula once.

Of R shards in their order, in the first dimension: z is that of all tokens, r the shard, and share_r the part of the
probability that lies on it, Σ_{v in r} e^{z_v} / Σ_v e^{z_v}. log p_v = log p_v|r + log share_r. Sums go through the
shards one by one, so that their order does not depend on how many rows there are. Everything is in float64.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class ModelShards(NamedTuple):
    """Of one model, what an op finds on each shard as if it were the vocabulary: log p (R, N, K), all else (R, N).

    largest and rest are its normalizer, see inputs.Saved; largest is −∞ on a shard without a possible token, whose
    other numbers are not looked at. The most likely token of the shard and its log p if they are asked for.
    """

    logp: Tensor
    entropy: Tensor
    largest: Tensor
    rest: Tensor
    top_token: Tensor | None = None
    top_logp: Tensor | None = None


class Whole(NamedTuple):
    """Of one model over all shards: log share (R, N) and the normalizer (N,)."""

    log_share: Tensor
    largest: Tensor
    rest: Tensor

    @property
    def lse(self) -> Tensor:
        return self.largest + self.rest.log1p()


def whole_of(largest: Tensor, rest: Tensor) -> Whole:
    """From the shards' normalizers, (R, N) each; `rest` is what all but the first largest token add."""
    first = largest.argmax(0, keepdim=True)
    largest_of_all = largest.gather(0, first)
    shift = largest_of_all.masked_fill(largest_of_all.isinf(), 0.0)  # ∞ − ∞ would be NaN
    log_mass = (largest - shift + rest.log1p()).masked_fill(largest == -torch.inf, -torch.inf)
    of_first = log_mass.gather(0, first).expm1()
    others = _sum(log_mass.scatter(0, first, -torch.inf).exp())
    rest_of_all = others + of_first[0]
    return Whole(log_mass - rest_of_all.log1p(), largest_of_all[0], rest_of_all)


def logp_at(model: ModelShards, whole: Whole, owner: Tensor) -> Tensor:
    """(N, K), each on the shard `owner` (N, K)."""
    log_share = whole.log_share[:, :, None].expand_as(model.logp).gather(0, owner[None])[0]
    logp = model.logp.gather(0, owner[None])[0] + log_share
    return logp.masked_fill(log_share == -torch.inf, -torch.inf)


def delta_logp_at(delta_logp: Tensor, logp: Tensor, base_logp: Tensor, wholes: list[Whole], owner: Tensor) -> Tensor:
    """(N, K), from that on each shard (R, N, K), which has lost less to rounding than log p of both models.

    Those of the whole, `logp` and `base_logp` (N, K), are looked at where one of them is −∞.
    """
    on_shard, log_share, base_log_share = (
        x.expand_as(delta_logp).gather(0, owner[None])[0]
        for x in (delta_logp, *(whole.log_share[:, :, None] for whole in wholes))
    )
    difference = logp - base_logp
    return torch.where(difference.isfinite(), on_shard + (log_share - base_log_share), difference)


def entropy_of(entropy: Tensor, whole: Whole) -> Tensor:
    """Σ_r share_r · (H_r − log share_r), from H_r on each shard (R, N)."""
    share = whole.log_share.exp()
    return _sum((share * (entropy - whole.log_share)).masked_fill(share == 0.0, 0.0))


def divergence_of(kl: Tensor, whole: Whole, other: Whole) -> Tensor:
    """Σ_r share_r · KL_r + KL(share ‖ share of the other model), from KL_r on each shard (R, N).

    The second is summed as Σ_r (s x − s + t) with x = log(s / t) of both shares, of which no term is below 0.
    """
    share, other_share = whole.log_share.exp(), other.log_share.exp()
    of_shares = (share * (whole.log_share - other.log_share)).masked_fill(share == 0.0, 0.0) - share + other_share
    possible, impossible = whole.log_share > -torch.inf, other.log_share == -torch.inf
    total = _sum(of_shares + (share * kl).masked_fill(share == 0.0, 0.0)).clamp_min(0.0)  # but for rounding
    infinite = (possible & (impossible | (kl == torch.inf))).any(0)
    return total.masked_fill(infinite & ~whole.rest.isnan() & ~other.rest.isnan(), torch.inf)


def top_of(model: ModelShards, whole: Whole) -> tuple[Tensor, Tensor]:
    """The first token with the largest z, −1 where there are no numbers, and its log p (N,)."""
    assert model.top_token is not None and model.top_logp is not None
    first = model.largest.argmax(0, keepdim=True)
    logp = (model.top_logp.gather(0, first) + whole.log_share.gather(0, first))[0]
    return model.top_token.gather(0, first)[0].masked_fill(logp.isnan(), -1.0), logp


def _sum(x: Tensor) -> Tensor:
    return functools.reduce(torch.add, x.unbind(0))
