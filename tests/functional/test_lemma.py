"""Lemma 3.1 of arXiv 2603.22117: what `policy_loss` asks of the logits of a token."""

import pytest
import torch

from dlogp_kernels import logp, policy_loss

ALPHA, LOW, HIGH, DUAL = 0.3, 0.2, 0.28, 3.0
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def _weight(reweight: str, old_logp: torch.Tensor) -> torch.Tensor:
    p = old_logp.exp()
    if reweight == "ppl":
        perplexity = -old_logp.mean(1).view(2, 3)
        centred = perplexity - perplexity.mean(1, keepdim=True)
        s = centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)
        return (1 - ALPHA * s).reshape(-1, 1).expand_as(p)
    return {
        "none": torch.ones_like(p),
        "low_prob": 1 + ALPHA * (1 - p),
        "dominate": ALPHA * p + 1 - ALPHA,
    }[reweight]


@pytest.mark.parametrize("reweight", ["none", "low_prob", "dominate", "ppl"])
def test_l1_norm_of_the_gradient_of_a_token(reweight: str):
    logits = torch.randn(6, 8, 13, dtype=torch.float64).mul(2).requires_grad_()
    target = torch.randint(13, (6, 8))
    token_logp = logp(logits, target).logp
    p = token_logp.detach()
    # Ratios from 0.4 to 5 with advantages of both signs: all three bounds are in force somewhere.
    old_logp = (p - torch.linspace(-0.9, 1.6, 48, dtype=torch.float64)[torch.randperm(48)].view(6, 8)).clamp_max(0.0)
    advantage = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.7, -0.1], dtype=torch.float64)
    loss = policy_loss(
        token_logp,
        old_logp,
        advantage,
        torch.ones(6, 8, dtype=torch.bool),
        reweight=reweight,
        alpha=ALPHA,
        group=GROUP if reweight == "ppl" else None,
        clip_low=LOW,
        clip_high=HIGH,
        dual_clip=DUAL,
        num_tokens=1,
    ).loss
    (gradient,) = torch.autograd.grad(loss, logits)

    ratio, sign = (p - old_logp).exp(), advantage[:, None]
    clipped = ((sign > 0) & (ratio > 1 + HIGH)) | ((sign < 0) & ((ratio < 1 - LOW) | (ratio > DUAL)))
    w = (ratio * _weight(reweight, old_logp) * sign).masked_fill(clipped, 0.0)
    assert 5 < clipped.sum() < 43
    torch.testing.assert_close(gradient.abs().sum(-1), 2 * w.abs() * (1 - p.exp()), rtol=1e-10, atol=1e-14)
