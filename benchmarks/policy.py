"""What the benchmarks of the policy losses share: a batch of tokens, and the loss as TRL's trainer writes it.

`trl_loss` is GRPOTrainer._compute_loss, eager, line by line. It has no reweighting, which ours includes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Tokens (B, T) by the names of `policy_loss`'s arguments; advantage (B,)."""

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    mask: Tensor
    ref_logp: Tensor

    def double(self) -> "Batch":
        return Batch(*(x.detach().double() if x.is_floating_point() else x for x in self))


class Loss(NamedTuple):
    """What is computed; the same options by our names and by TRL's."""

    label: str
    loss_type: str = "dapo"
    importance: str = "token"
    kl_beta: float = 0.0


DAPO = Loss("DAPO")
#: Ratios at which the gradient of a clipped loss jumps.
_EDGES = (1 - 0.2, 1 + 0.28)
_ROUNDING = 1e-4


def build(sequences: int, tokens: int, device: torch.device) -> Batch:
    """Responses of T / 4 to T tokens, the same in every process. logp requires a gradient."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    old_logp = normal(sequences, tokens).abs_().neg_()
    logp = (old_logp + off_the_edges(0.2 * normal(sequences, tokens), _ROUNDING)).requires_grad_()
    lengths = torch.randint(tokens // 4, tokens + 1, (sequences, 1), generator=generator, device=device)
    mask = torch.arange(tokens, device=device) < lengths
    return Batch(logp, old_logp, normal(sequences), mask, logp.detach() + 0.2 * normal(sequences, tokens))


def off_the_edges(log_ratio: Tensor, margin: float) -> Tensor:
    """0 instead of log-ratios within `margin` of where clipping begins.

    There rounding decides between a token's gradient and none: what is right would now and then be refused for it.
    """
    near = torch.stack([(log_ratio - math.log(edge)).abs() < margin for edge in _EDGES]).any(0)
    return log_ratio.masked_fill(near, 0.0)


def trl_loss(batch: Batch, loss: Loss, with_metrics: bool = False) -> Tensor:
    """`with_metrics`: also the clip fractions that TRL logs."""
    logp, old_logp, advantage, mask, ref_logp = batch
    advantages, mask = advantage.unsqueeze(1), mask.to(torch.int64)
    log_ratio = logp - old_logp
    if loss.importance == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if loss.loss_type == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=0.28).detach() * advantages * logp
    elif loss.loss_type == "sapo":
        temperatures = torch.where(advantages > 0, 1.0, 1.05)
        per_token_loss = -torch.sigmoid(temperatures * (coef_1 - 1)) * 4 / temperatures * advantages
    else:
        coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if loss.kl_beta:
        per_token_loss = per_token_loss + loss.kl_beta * (torch.exp(ref_logp - logp) - (ref_logp - logp) - 1)
    if loss.loss_type in ("grpo", "sapo"):
        total = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    else:
        total = (per_token_loss * mask).sum() / mask.sum()
    if with_metrics:
        low, high = (coef_1 < 1 - 0.2) & (advantages < 0), (coef_1 > 1 + 0.28) & (advantages > 0)
        for clipped in (low, high, low | high):
            (clipped.float() * mask).sum() / mask.sum()
            (clipped.float() * mask).sum(-1) / mask.sum(-1)
    return total
