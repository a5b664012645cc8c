"""Lemma 3.1 of arXiv 2603.22117, looked at while a model trains.

The l1 norm of the gradient of a token's loss with respect to its logits is 2 |w| (1 − π(y)), with w = r Ã where the
ratio r is not clipped, and 0 where it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional import logp, policy_loss
from ...reference.policy import PolicyOptions, clipped_places, reweighting

_IGNORED = -100


class Lemma(NamedTuple):
    """How far measured norms are from 2 |w| (1 − π): the largest relative deviation of `num_tokens` tokens with w ≠ 0.

    `largest_clipped` is the largest norm of the `num_clipped` tokens whose gradient the clipping took away.
    """

    largest_deviation: float
    num_tokens: int
    largest_clipped: float
    num_clipped: int


def check(
    logits: Tensor,
    target: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    **options: Any,
) -> Lemma:
    """Both sides of the lemma in float64.

    Args:
        logits: (B, T, V), under which the tokens `target` (B, T) are scored.
        old_logp, mask: (B, T); advantage: (B,).
        options: of `policy_loss`, of DAPO's loss; a reweighting of whole groups, `ppl`, is in `advantage` already.
    """
    leaf = logits.detach().double().requires_grad_()
    mask = mask.bool()
    token_logp = logp(leaf, target.masked_fill(~mask, _IGNORED), ignore_index=_IGNORED).logp
    old_logp, advantage = old_logp.double(), advantage.double()
    # The sum of the tokens' losses: each has its own gradient.
    loss = policy_loss(token_logp, old_logp, advantage, mask, **options, num_tokens=1).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    measured = gradient.abs().sum(-1)[mask]

    token_logp, old_logp = token_logp.detach()[mask], old_logp[mask]
    advantage = advantage[:, None].expand_as(mask)[mask]
    ratio, chosen = (token_logp - old_logp).exp(), PolicyOptions(**options)
    low, high, dual = clipped_places(ratio, advantage, chosen)
    clipped = low | high | dual
    w = ratio * reweighting(old_logp, advantage, None, chosen) * advantage
    expected = 2 * w.abs() * -torch.expm1(token_logp)
    counted = ~clipped & (expected > 0)
    deviation = (measured - expected)[counted].abs() / expected[counted]
    return Lemma(_largest(deviation), int(counted.sum()), _largest(measured[clipped]), int(clipped.sum()))


def _largest(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0
