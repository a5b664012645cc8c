"""The README's examples of training: run, and compared with what they stand for."""

import re
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
from hf_models import one_thread, tiny_model  # noqa: F401

_README = Path(__file__).parents[1] / "README.md"


def example(words):
    """The one Python block of the section on training that contains `words`."""
    section = _README.read_text(encoding="utf-8").split("\n## Training\n")[1].split("\n## ")[0]
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", section, re.S) if words in block]
    return block


def test_the_plain_loop():
    namespace: dict = {}
    exec(example("def train_step"), namespace)
    model, torch_model = tiny_model("qwen3"), tiny_model("qwen3")
    torch.manual_seed(0)
    input_ids = torch.randint(0, 160, (4, 12))
    response = torch.arange(12) >= torch.tensor([3, 4, 5, 6])[:, None]
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
    kept = response[:, 1:]

    def logp():
        return torch_model(input_ids).logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]

    old_logp = logp().detach() + 0.3 * torch.randn(kept.shape)
    ratio = (logp() - old_logp).exp()
    weighted = advantage[:, None] * (1 + 0.2 * (1 - old_logp.exp().clamp_max(1)))
    losses = torch.maximum(-weighted * ratio, -weighted * ratio.clamp(0.8, 1.28))
    expected = losses[kept].mean()
    expected.backward()
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (model, torch_model)]
    loss, metrics = namespace["train_step"](model, optimizers[0], input_ids, response, old_logp, advantage)
    optimizers[1].step()
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert 1.0 < float(metrics.mean_weight) < 1.2
    for (name, weight), other in zip(model.named_parameters(), torch_model.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-4), name


def test_the_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = example("ReweightedGRPOTrainer").replace(".train()", "")
    namespace: dict = {}
    exec(code.replace("ReweightedGRPOTrainer(str", "trainer = ReweightedGRPOTrainer(str"), namespace)
    trainer = namespace["trainer"]
    trainer.args.logging_steps = 1
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert 1.0 < first["reweight/mean_weight"] < 1.2 and first["dynamic_sampling/refills"] >= 0
    assert 0.0 < first["reward"] < 1.0 and first["delta_logp/mean"] == pytest.approx(0.0, abs=1e-6)
    assert second["delta_logp/max"] > 0.0


def registered(monkeypatch, name):
    """The function that the example registers with verl, of which only the decorator is here."""
    functions: dict = {}
    core_algos = types.ModuleType("verl.trainer.ppo.core_algos")
    core_algos.register_policy_loss = lambda key: lambda function: functions.setdefault(key, function)
    for module in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", core_algos)
    exec(example("register_policy_loss"), {})
    return functions[name]


@pytest.mark.parametrize(
    ("mode", "whole"),
    [
        ("token-mean", {}),
        ("token-mean", {"dp_size": 2, "batch_num_tokens": 97, "global_batch_size": 12}),
        ("seq-mean-token-mean", {}),
    ],
)
def test_the_hook_is_the_formula_of_verl(monkeypatch, mode, whole):
    """compute_policy_loss_vanilla and agg_loss of verl 0.7, written out, with the advantages reweighted."""
    function = registered(monkeypatch, "low_prob")
    config = types.SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info=whole
    )
    torch.manual_seed(0)
    old_log_prob = -3 * torch.rand(6, 9, dtype=torch.float64)
    log_prob = (old_log_prob + torch.randn(6, 9, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(6, 1, dtype=torch.float64).expand(6, 9)
    response_mask = (torch.rand(6, 9) > 0.3).long()
    weights = torch.rand(6, 9, dtype=torch.float64)

    reweighted = advantages * (1 + 0.2 * (1 - old_log_prob.exp()))
    ratio = torch.exp(torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0))
    pg_losses = torch.maximum(-reweighted * ratio, -reweighted * torch.clamp(ratio, 1 - 0.2, 1 + 0.28))
    lower = torch.min(-reweighted * 3.0, pg_losses)
    pg_losses = torch.where(reweighted < 0, lower, pg_losses) * weights
    if mode == "token-mean":
        tokens = whole.get("batch_num_tokens", response_mask.sum())
        expected = (pg_losses * response_mask).sum() / tokens * whole.get("dp_size", 1)
    else:
        expected = ((pg_losses * response_mask).sum(-1) / (response_mask.sum(-1) + 1e-8)).mean()
    (gradient,) = torch.autograd.grad(expected, log_prob)

    loss, metrics = function(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode=mode, config=config, rollout_is_weights=weights
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], gradient)
    assert metrics["actor/clip_dual"] > 0 and all(isinstance(value, float) for value in metrics.values())
