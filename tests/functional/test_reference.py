"""The definition itself, against other definitions: torch.distributions, cross_entropy, kl_div, tiny values by hand."""

import math

import pytest
import torch
from cases import ALL_OPTIONS, OPS, asked_for, make_inputs, options_for
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from dlogp_kernels.reference import statistics as reference

pytestmark = pytest.mark.cpu_only

FP64 = torch.float64
LOG2, LOG3 = math.log(2), math.log(3)


def _log_probabilities(inputs: dict, prefix: str = "", temperature=1.0, softcap=None, logit_scale=1.0) -> torch.Tensor:
    """By the formula of the documentation, with PyTorch's own linear layer and log_softmax."""
    z = inputs.get(f"{prefix}logits")
    if z is None:
        z = F.linear(inputs[f"{prefix}hidden"], inputs[f"{prefix}weight"], inputs[f"{prefix}bias"])
    z = z * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    return (z / temperature).log_softmax(-1)


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["defaults", "all"])
@pytest.mark.parametrize("op", ["linear_logp", "logp"])
def test_one_model_against_distributions_and_cross_entropy(op, options):
    inputs = make_inputs(op, (2, 9), dtype=FP64)
    inputs["target"][0, 3] = -100
    kept = inputs["target"] != -100
    options = options_for(op, options)
    stats = getattr(reference, op)(**inputs, **options)
    log_p = _log_probabilities(inputs, **options)
    distribution = Categorical(logits=log_p)
    loss = F.cross_entropy(log_p.flatten(0, 1), inputs["target"].flatten(), reduction="none").view(2, 9)
    torch.testing.assert_close(stats.logp, -loss)
    torch.testing.assert_close(stats.entropy, distribution.entropy() * kept)
    if not options:
        raw = inputs.get("logits")
        raw = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"]) if raw is None else raw
        torch.testing.assert_close(stats.lse, raw.exp().sum(-1).log() * kept)


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["defaults", "all"])
@pytest.mark.parametrize("op", ["linear_delta_logp", "delta_logp"])
def test_pair_against_kl_divergence(op, options):
    inputs = make_inputs(op, (2, 9), k=4, dtype=FP64)
    stats = getattr(reference, op)(**inputs, **options)
    base_options = {name.removeprefix("base_"): x for name, x in options.items() if name.startswith("base_")}
    own_options = {name: x for name, x in options.items() if not name.startswith("base_")}
    log_p = _log_probabilities(inputs, **own_options)
    log_q = _log_probabilities(inputs, "base_", **own_options | base_options)
    p, q = Categorical(logits=log_p), Categorical(logits=log_q)
    torch.testing.assert_close(stats.kl, kl_divergence(p, q))
    torch.testing.assert_close(stats.reverse_kl, kl_divergence(q, p))
    torch.testing.assert_close(stats.kl, F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
    torch.testing.assert_close(stats.entropy, p.entropy())
    torch.testing.assert_close(stats.base_entropy, q.entropy())
    torch.testing.assert_close(stats.logp, log_p.gather(-1, inputs["target"]))
    torch.testing.assert_close(stats.base_logp, log_q.gather(-1, inputs["target"]))
    torch.testing.assert_close(stats.delta_logp, (log_p - log_q).gather(-1, inputs["target"]))


def test_values_by_hand():
    """p = (1/2, 1/4, 1/4, 0) and q = (1/4, 1/2, 1/8, 1/8)."""
    p, q = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=FP64), torch.tensor([[0.25, 0.5, 0.125, 0.125]], dtype=FP64)
    stats = reference.delta_logp(p.log() + 5, q.log() - 3, torch.tensor([[0, 1, 2, 3, -100]]))
    torch.testing.assert_close(stats.delta_logp, torch.tensor([[LOG2, -LOG2, LOG2, -torch.inf, 0]], dtype=FP64))
    torch.testing.assert_close(stats.entropy, torch.tensor([1.5 * LOG2], dtype=FP64))
    torch.testing.assert_close(stats.base_entropy, torch.tensor([1.75 * LOG2], dtype=FP64))
    torch.testing.assert_close(stats.kl, torch.tensor([0.5 * LOG2], dtype=FP64))
    assert stats.reverse_kl.item() == torch.inf
    torch.testing.assert_close(stats.lse, torch.tensor([5.0], dtype=FP64))
    torch.testing.assert_close(stats.base_lse, torch.tensor([-3.0], dtype=FP64))


def test_options_by_hand():
    """z = 4·tanh(1.5·x / 4) / 2 of x = ±(8/3)·atanh(log 3 / 4) is ±log 3 / 2: probabilities 3/4 and 1/4."""
    x = 8 / 3 * math.atanh(LOG3 / 4)
    logits = torch.tensor([[x, -x]], dtype=FP64)
    stats = reference.logp(logits, torch.tensor([[0, 1]]), temperature=2.0, softcap=4.0, logit_scale=1.5)
    torch.testing.assert_close(stats.logp, torch.tensor([[math.log(3 / 4), math.log(1 / 4)]], dtype=FP64))


def test_linear_by_hand():
    """hidden (1, 2), weight rows (0, log 3 / 2) and (0, 0), bias (0, log 3): logits (log 3, log 3)."""
    weight = torch.tensor([[0.0, LOG3 / 2], [0.0, 0.0]], dtype=FP64)
    bias = torch.tensor([0.0, LOG3], dtype=FP64)
    stats = reference.linear_logp(torch.tensor([[1.0, 2.0]], dtype=FP64), weight, torch.tensor([1]), bias=bias)
    torch.testing.assert_close(stats.logp.item(), -LOG2)
    torch.testing.assert_close(stats.entropy.item(), LOG2)
    torch.testing.assert_close(stats.lse.item(), LOG2 + LOG3)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    inputs = make_inputs(op, 3, v=7, d=2, k=2, dtype=FP64)
    names = [name for name in inputs if name != "target"]
    options = options_for(op, ALL_OPTIONS)

    def run(*tensors):
        return tuple(asked_for(getattr(reference, op)(**inputs | dict(zip(names, tensors, strict=True)), **options)))

    assert torch.autograd.gradcheck(run, [inputs[name].requires_grad_() for name in names])


def _terms(stats) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(x.shape, generator=generator, dtype=FP64) for x in stats)


def test_logits_gradient_of_one_model_is_autograds():
    z = torch.randn(5, 11, dtype=FP64, requires_grad=True)
    target = torch.randint(11, (5, 2))
    stats = asked_for(reference.logp_of_rows(z, target, -100))
    grad_logp, grad_entropy, grad_lse = grads = _terms(stats)
    (expected,) = torch.autograd.grad(stats, z, grads)
    logp_all = z.detach().log_softmax(-1)
    value = reference.logits_gradient(logp_all, stats.entropy, grad_logp.sum(-1), grad_entropy, grad_lse)
    torch.testing.assert_close(value.scatter_add(1, target, grad_logp).detach(), expected)


def test_logits_gradient_of_a_pair_is_autograds():
    z, base_z = (torch.randn(5, 11, dtype=FP64, requires_grad=True) for _ in range(2))
    stats = asked_for(reference.delta_logp_of_rows(z, base_z, torch.zeros(5, 1, dtype=torch.int64), -100))
    _, _, _, entropy, base_entropy, kl, reverse_kl, lse, base_lse = _terms(stats)
    outputs = [stats.entropy, stats.base_entropy, stats.kl, stats.reverse_kl, stats.lse, stats.base_lse]
    expected = torch.autograd.grad(outputs, [z, base_z], [entropy, base_entropy, kl, reverse_kl, lse, base_lse])
    log_p, log_q, zero = z.detach().log_softmax(-1), base_z.detach().log_softmax(-1), torch.zeros(5, dtype=FP64)
    own = (log_p, stats.entropy, zero, entropy, lse, log_q, stats.kl, kl, reverse_kl)
    base = (log_q, stats.base_entropy, zero, base_entropy, base_lse, log_p, stats.reverse_kl, reverse_kl, kl)
    torch.testing.assert_close(reference.logits_gradient(*own).detach(), expected[0])
    torch.testing.assert_close(reference.logits_gradient(*base).detach(), expected[1])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_transform_gradient_is_autograds(softcap):
    raw = torch.randn(4, 6, dtype=FP64, requires_grad=True)
    grad = torch.randn(4, 6, dtype=FP64)
    (expected,) = torch.autograd.grad(reference.transform_logits(raw, 0.7, softcap, 1.3), raw, grad)
    torch.testing.assert_close(reference.transform_gradient(grad, raw.detach(), 0.7, softcap, 1.3), expected)
