"""The definition of the policy loss on cases worked out by hand."""

import math

import pytest
import torch
from policy_cases import DIFFERENTIABLE, make_inputs, upcast

from dlogp_kernels.reference import policy as reference_policy
from dlogp_kernels.reference.policy import PolicyOptions

FP64 = torch.float64


def _tokens(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=FP64)


def _loss(ratios, advantage, **options):
    """Of one response whose tokens have these ratios and old probabilities ½."""
    old_logp = torch.full((1, len(ratios)), math.log(0.5), dtype=FP64)
    logp = (old_logp + _tokens(*ratios).log()).requires_grad_()
    advantage = torch.tensor([float(advantage)], dtype=FP64)
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    result = reference_policy.policy_loss(logp, old_logp, advantage, mask, options=PolicyOptions(**options))
    return result, torch.autograd.grad(result.loss, logp)[0]


def test_clipped_by_hand():
    """r = .5, 1, 2 clipped to [.8, 1.28]: a positive advantage keeps .5, 1, 1.28, a negative one .8, 1, 2."""
    result, grad = _loss([0.5, 1.0, 2.0], 3.0, reweight="none")
    assert result.loss.item() == pytest.approx(-3.0 * (0.5 + 1.0 + 1.28) / 3)
    torch.testing.assert_close(grad, _tokens(-0.5, -1.0, 0.0))
    assert result.metrics.clip_high.item() == pytest.approx(1 / 3) and result.metrics.clip_low == 0
    result, grad = _loss([0.5, 1.0, 2.0], -3.0, reweight="none")
    assert result.loss.item() == pytest.approx(3.0 * (0.8 + 1.0 + 2.0) / 3)
    torch.testing.assert_close(grad, _tokens(0.0, 1.0, 2.0))
    assert result.metrics.clip_low.item() == pytest.approx(1 / 3) and result.metrics.clip_high == 0
    assert result.metrics.mean_ratio.item() == pytest.approx(3.5 / 3) and result.metrics.max_ratio == 2.0
    approx = sum(r - 1 - math.log(r) for r in (0.5, 1.0, 2.0)) / 3
    assert result.metrics.approx_kl.item() == pytest.approx(approx)


def test_dual_clip_by_hand():
    result, grad = _loss([5.0, 12.0], -1.0, reweight="none", dual_clip=10.0)
    assert result.loss.item() == pytest.approx((5.0 + 10.0) / 2) and result.metrics.clip_dual == 0.5
    torch.testing.assert_close(grad, _tokens(2.5, 0.0))
    result, _ = _loss([5.0, 12.0], 1.0, reweight="none", dual_clip=10.0)
    assert result.loss.item() == pytest.approx(-1.28) and result.metrics.clip_dual == 0


@pytest.mark.parametrize(
    ("reweight", "alpha", "weight"),
    [("none", 0.2, 1.0), ("low_prob", 0.2, 1.1), ("dominate", 0.2, 0.9), ("dominate", 1.0, 0.5)],
)
def test_reweighting_by_hand(reweight, alpha, weight):
    """With p_old = ½: 1 + α/2, α/2 + 1 − α."""
    result, grad = _loss([1.0], 2.0, reweight=reweight, alpha=alpha)
    assert result.loss.item() == pytest.approx(-2.0 * weight)
    assert grad.item() == pytest.approx(-2.0 * weight)
    assert result.metrics.mean_weight.item() == pytest.approx(weight)
    for sign, expected in (("positive", weight), ("negative", 1.0)):
        result, _ = _loss([1.0], 2.0, reweight=reweight, alpha=alpha, reweight_sign=sign)
        assert result.loss.item() == pytest.approx(-2.0 * expected)
        result, _ = _loss([1.0], -2.0, reweight=reweight, alpha=alpha, reweight_sign=sign)
        assert result.loss.item() == pytest.approx(2.0 * (weight + 1.0 - expected))


def test_lemma_3_1():
    """‖∂/∂z‖₁ = 2 |w| (1 − π(y)) of a token's loss by the logits, w = r Ã."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=FP64, requires_grad=True)
    logp = logits.log_softmax(-1)[1].reshape(1, 1)
    ones = torch.ones(1, 1, dtype=torch.bool)
    advantage = torch.tensor([1.5], dtype=FP64)
    loss = reference_policy.policy_loss(logp, logp.detach(), advantage, ones, options=PolicyOptions(alpha=0.2)).loss
    p = logp.exp().item()
    norm = torch.autograd.grad(loss, logits)[0].abs().sum().item()
    assert norm == pytest.approx(2 * 1.5 * (1 + 0.2 * (1 - p)) * (1 - p))


def test_perplexity_by_hand():
    """ℓ = 1, 3 in a group of two: mean 2, deviation 1, s = ∓1; a group of one and an empty response: 0."""
    old_logp = torch.tensor([[-0.5, -1.5], [-3.0, -9.0], [-7.0, -7.0], [-1.0, -1.0]], dtype=FP64)
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    perplexity = reference_policy.log_perplexity(old_logp, mask)
    torch.testing.assert_close(perplexity[:3], torch.tensor([1.0, 3.0, 7.0], dtype=FP64))
    s = reference_policy.normalized_in_group(perplexity, torch.tensor([4, 4, 9, 4]), mask.any(-1))
    torch.testing.assert_close(s, torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=FP64) / (1 + 1e-6))
    weight = reference_policy.reweighting(old_logp, old_logp, s[:, None], PolicyOptions(reweight="ppl", alpha=0.5))
    torch.testing.assert_close(weight[:, 0], 1 - 0.5 * s)


def test_sequence_ratio_by_hand():
    """√(¼ · 4) = 1: nothing is clipped, and each token gets half of the gradient of r."""
    result, grad = _loss([0.25, 4.0], 1.0, reweight="none", importance="sequence")
    assert result.loss.item() == pytest.approx(-1.0) and result.metrics.clip_high == 0
    torch.testing.assert_close(grad, _tokens(-0.5, -0.5))
    result, grad = _loss([1.0, 4.0], 1.0, reweight="none", importance="sequence")
    assert result.loss.item() == pytest.approx(-1.28) and (grad == 0).all()


def test_cispo_and_sapo_by_hand():
    result, grad = _loss([8.0], 2.0, reweight="none", loss_type="cispo", clip_high=5.0)
    assert result.loss.item() == pytest.approx(-2.0 * 5.0 * math.log(4.0))
    assert grad.item() == pytest.approx(-10.0) and result.metrics.clip_high == 1
    for advantage, temperature in ((2.0, 1.0), (-2.0, 1.05)):
        result, grad = _loss([3.0], advantage, reweight="none", loss_type="sapo")
        sigmoid = 1 / (1 + math.exp(-temperature * 2.0))
        assert result.loss.item() == pytest.approx(-advantage * 4 / temperature * sigmoid)
        assert grad.item() == pytest.approx(-advantage * 4 * sigmoid * (1 - sigmoid) * 3.0)


def test_denominators_by_hand():
    """Two responses of 1 and 3 tokens with losses −1 and −2 a token."""
    zeros = torch.zeros(2, 3, dtype=FP64)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantage = torch.tensor([1.0, 2.0], dtype=FP64)
    expected = {"dapo": -7 / 4, "bnpo": -7 / 4, "cispo": 0.0, "grpo": -3 / 2, "sapo": -3.0, "dr_grpo": -7 / 20}
    for loss_type, value in expected.items():
        options = PolicyOptions(loss_type=loss_type, reweight="none", max_length=10, sapo_temperature_pos=1.0)
        result = reference_policy.policy_loss(zeros, zeros, advantage, mask, options=options)
        assert result.loss.item() == pytest.approx(value), loss_type
    options, eight = PolicyOptions(reweight="none"), torch.tensor(8.0)
    result = reference_policy.policy_loss(zeros, zeros, advantage, mask, options=options, denominator=eight)
    assert result.loss.item() == pytest.approx(-7 / 8)
    for loss_type, value in {"grpo": -3 / 8, "sapo": -6 / 8, "dr_grpo": -7 / 80}.items():
        options = PolicyOptions(loss_type=loss_type, reweight="none", max_length=10, sapo_temperature_pos=1.0)
        result = reference_policy.policy_loss(zeros, zeros, advantage, mask, options=options, denominator=eight)
        assert result.loss.item() == pytest.approx(value), loss_type
    result = reference_policy.policy_loss(zeros, zeros, advantage, mask, options=PolicyOptions("dr_grpo", "none"))
    assert result.loss.item() == pytest.approx(-7 / 6)


def test_other_terms_by_hand():
    zero, one = torch.zeros(1, 1, dtype=FP64), torch.ones(1, 1, dtype=torch.bool)
    given = {"ref_logp": zero + math.log(2.0), "entropy": zero + 5.0, "token_weight": zero + 3.0}
    options = PolicyOptions(reweight="none", kl_beta=0.1, entropy_coef=0.01)
    result = reference_policy.policy_loss(zero, zero, zero[0] + 1.0, one, options=options, **given)
    assert result.loss.item() == pytest.approx(-3.0 + 0.1 * (2 - math.log(2.0) - 1) - 0.05)
    assert result.metrics.ref_kl.item() == pytest.approx(1 - math.log(2.0)) and result.metrics.entropy == 5.0
    given["kl"] = zero + 7.0
    del given["ref_logp"]
    result = reference_policy.policy_loss(zero, zero, zero[0] + 1.0, one, options=options, **given)
    assert result.loss.item() == pytest.approx(-3.0 + 0.7 - 0.05) and result.metrics.ref_kl == 7.0


def test_k3_has_no_overflow_and_is_exact_below():
    x = torch.tensor([-800.0, 0.0, 19.0, 25.0, 800.0, math.inf], dtype=FP64, requires_grad=True)
    y = reference_policy.k3(x)
    limit = math.exp(20.0) - 21.0
    torch.testing.assert_close(y.detach(), torch.tensor([799.0, 0.0, math.exp(19.0) - 20, *[limit] * 3], dtype=FP64))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], reference_policy.k3_gradient(x.detach()))


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
@pytest.mark.parametrize("loss_type", reference_policy.LOSS_TYPES)
def test_the_coefficient_is_the_gradient(loss_type, importance):
    """What every backward kernel implements, against autograd of the loss."""
    inputs = upcast(make_inputs())
    options = PolicyOptions(loss_type, alpha=0.3, dual_clip=1.4, importance=importance, kl_beta=0.2)
    leaves = {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE if name in inputs}
    loss = reference_policy.policy_loss(**(inputs | leaves), options=options).loss
    expected = torch.autograd.grad(loss, inputs["logp"])[0]
    names = ("logp", "old_logp", "advantage", "mask", "ref_logp", "entropy", "kl", "token_weight")
    given = reference_policy.PolicyTokens(*(inputs[name].detach() if name in inputs else None for name in names))
    tokens = reference_policy.as_padded(given, None, FP64, sequence_level=True)
    advantage = reference_policy.reweighting(tokens.old_logp, tokens.advantage, None, options) * tokens.advantage
    raw = reference_policy.raw_log_ratio(tokens.logp, tokens.old_logp, tokens.mask, importance)
    ratio = reference_policy.ratio_of(raw).expand_as(tokens.logp)
    actual = reference_policy.grad_logp_unscaled(tokens, raw, ratio, advantage, options)
    counts = tokens.mask.sum(-1)
    scale = reference_policy.sequence_scale(counts, counts.sum(), 5, 37, None, loss_type)
    torch.testing.assert_close(actual * scale[:, None], expected)


def test_padded():
    packed, offsets = torch.arange(1, 7), torch.tensor([0, 2, 2, 6])
    assert reference_policy.padded(packed, offsets).tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [3, 4, 5, 6]]
    assert reference_policy.padded(packed[:0], torch.tensor([0, 0])).shape == (1, 0)
