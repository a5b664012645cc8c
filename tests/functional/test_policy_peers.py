"""`policy_loss` is what TRL's trainer computes of the same tensors, and what verl's formulas say; in float64."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from policy_cases import make_inputs, upcast, without_extras

from dlogp_kernels import policy_loss

FP64 = torch.float64


class _Accelerator:
    """Of one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x


class _Trainer(SimpleNamespace):
    """As much of a GRPOTrainer as its loss looks at, with the given log-probabilities instead of a model's."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.logp, self.entropy, None


def _trl_loss(
    inputs, *, loss_type, importance="token", delta=None, beta=0.0, vllm=False, clip=(0.2, 0.28), tokens=None
):
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    args = SimpleNamespace(
        delta=delta, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )  # fmt: skip
    trainer = _Trainer(
        logp=inputs["logp"], entropy=torch.zeros_like(inputs["logp"]), args=args, accelerator=_Accelerator(),
        model=SimpleNamespace(training=True), aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level=importance, beta=beta, loss_type=loss_type,
        epsilon_low=clip[0], epsilon_high=clip[1], use_vllm=vllm, vllm_importance_sampling_correction=vllm,
        current_gradient_accumulation_steps=1, max_completion_length=50, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    b, t = inputs["logp"].shape
    ids = torch.zeros(b, t, dtype=torch.int64)
    batch = {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids,
        "completion_mask": inputs["mask"].to(torch.int64), "advantages": inputs["advantage"],
        "old_per_token_logps": inputs["old_logp"], "ref_per_token_logps": inputs.get("ref_logp"),
        "importance_sampling_ratio": inputs.get("token_weight"),
        "num_items_in_batch": inputs["mask"].sum() if tokens is None else torch.tensor(float(tokens)),
    }  # fmt: skip
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, batch), trainer._metrics["train"]


def _inputs():
    inputs = upcast(make_inputs())
    inputs["logp"].requires_grad_()
    return inputs


def _assert_same(ours, theirs, logp):
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], torch.autograd.grad(theirs, logp)[0])


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo"])
def test_the_loss_of_trl(loss_type, importance):
    inputs = _inputs()
    clip = (0.2, 1.5) if loss_type == "cispo" else (0.2, 0.28)
    expected, metrics = _trl_loss(inputs, loss_type=loss_type, importance=importance, clip=clip)
    ours = policy_loss(
        **without_extras(inputs), loss_type=loss_type, importance=importance, reweight="none", clip_high=clip[1],
        max_length=50,
    )  # fmt: skip
    _assert_same(ours.loss, expected, inputs["logp"])
    if importance == "token" and loss_type not in ("cispo", "sapo"):
        assert ours.metrics.clip_low.item() == pytest.approx(metrics["clip_ratio/low_mean"][0])
        assert ours.metrics.clip_high.item() == pytest.approx(metrics["clip_ratio/high_mean"][0])
        assert ours.metrics.clip_low > 0 and ours.metrics.clip_high > 0
    elif importance == "token" and loss_type == "cispo":
        assert ours.metrics.clip_high.item() == pytest.approx(metrics["cispo_clip_ratio"][0])


def test_the_loss_of_trl_with_all_its_terms():
    """delta is our dual clip, beta our kl_beta, the correction of vLLM's probabilities our token_weight."""
    inputs = _inputs()
    del inputs["entropy"]
    expected, metrics = _trl_loss(inputs, loss_type="dapo", delta=1.6, beta=0.3, vllm=True, tokens=300)
    ours = policy_loss(**inputs, reweight="none", dual_clip=1.6, kl_beta=0.3, num_tokens=300)
    _assert_same(ours.loss, expected, inputs["logp"])
    assert ours.metrics.ref_kl.item() == pytest.approx(metrics["kl"][0])


def _verl_mean(x, mask, mode):
    """agg_loss of verl/trainer/ppo/core_algos.py."""
    if mode == "token-mean":
        return (x * mask).sum() / mask.sum()
    per_sequence = (x * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        per_sequence = per_sequence / (mask.sum(-1) + 1e-8)
    return per_sequence.sum() / x.shape[0]


def _verl_loss(inputs, advantage, mode, *, low=0.2, high=0.28, dual_clip=10.0, beta=0.0, entropy_coef=0.0):
    """compute_policy_loss_vanilla of verl, with its KL term (low_var_kl) and entropy bonus."""
    mask = inputs["mask"].to(FP64)
    log_ratio = torch.clamp(inputs["logp"] - inputs["old_logp"], min=-20.0, max=20.0)
    ratio = torch.exp(log_ratio)
    loss1, loss2 = -advantage * ratio, -advantage * torch.clamp(ratio, 1 - low, 1 + high)
    clipped = torch.maximum(loss1, loss2)
    dual = torch.min(-advantage * dual_clip, clipped)
    losses = torch.where(advantage < 0, dual, clipped)
    if "token_weight" in inputs:
        losses = losses * inputs["token_weight"]
    loss = _verl_mean(losses, mask, mode)
    if entropy_coef:
        loss = loss - entropy_coef * _verl_mean(inputs["entropy"], mask, mode)
    if beta:
        kl = torch.clamp(inputs["ref_logp"] - inputs["logp"], min=-20, max=20)
        kld = torch.clamp(torch.exp(kl) - kl - 1, min=-10, max=10)
        loss = loss + beta * _verl_mean(kld, mask, mode)
    return loss


@pytest.mark.parametrize(
    ("loss_type", "mode"), [("dapo", "token-mean"), ("bnpo", "token-mean"), ("grpo", "seq-mean-token-mean")]
)
def test_the_loss_of_verl(loss_type, mode):
    inputs = _inputs()
    inputs["logp"].data[0, :4] += 3.0  # far enough for the dual clip
    inputs["advantage"][0] = -1.0
    inputs["mask"][0, :4] = True
    expected = _verl_loss(inputs, inputs["advantage"][:, None], mode, beta=0.01, entropy_coef=0.02)
    ours = policy_loss(**inputs, loss_type=loss_type, reweight="none", dual_clip=10.0, kl_beta=0.01, entropy_coef=0.02)
    _assert_same(ours.loss, expected, inputs["logp"])
    assert ours.metrics.clip_dual > 0


def test_the_paper_reweights_the_advantages_of_verl():
    """DAPO as its authors ran it, on advantages times 1 + α (1 − p_old)."""
    inputs = without_extras(_inputs())
    advantage = inputs["advantage"][:, None] * (1 + 0.2 * (1 - inputs["old_logp"].exp()))
    expected = _verl_loss(inputs, advantage, "token-mean")
    ours = policy_loss(**inputs, reweight="low_prob", alpha=0.2, dual_clip=10.0)
    _assert_same(ours.loss, expected, inputs["logp"])


def test_the_sequence_ratio_of_verl():
    """compute_policy_loss_gspo: log r_t = log π − sg(log π) + sg(mean log ratio)."""
    inputs = without_extras(_inputs())
    mask, logp = inputs["mask"].to(FP64), inputs["logp"]
    mean = ((logp - inputs["old_logp"]) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = torch.exp(logp - logp.detach() + mean.detach()[:, None])
    advantage = inputs["advantage"][:, None]
    losses = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - 3e-4, 1 + 4e-4))
    expected = _verl_mean(losses, mask, "seq-mean-token-mean")
    ours = policy_loss(
        **inputs, loss_type="grpo", importance="sequence", reweight="none", clip_low=3e-4, clip_high=4e-4
    )
    _assert_same(ours.loss, expected, inputs["logp"])
