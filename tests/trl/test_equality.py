"""ReweightedGRPOTrainer with reweight="none" beside TRL's own trainer: the same seed, the same losses."""

import pytest

pytest.importorskip("trl")

import torch
import trl_runs
from hf_models import one_thread  # noqa: F401
from peft import LoraConfig

#: More than go once through the data set; of losses that differ from the first in their formula alone, once.
STEPS, ONCE = 20, 12
#: Losses are logged with the rounding of TRL's log, 4 to 5 digits.
TOLERANCE = 1e-4
TIMES = {"step_time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def both(tmp_path, *, peft=None, model=trl_runs.policy, steps=STEPS, **options):
    """The two trainers after training."""
    trainers = []
    for name, own in (("own", {"reweight": "none"}), ("trl", {})):
        trainer = trl_runs.trainer(
            tmp_path / name, model(), trl=name == "trl", peft=peft, max_steps=steps, **options, **own
        )
        trainer.train()
        trainers.append(trainer)
    return trainers


def assert_same(own, trl):
    actual, expected = trl_runs.losses(own), trl_runs.losses(trl)
    assert len(actual) == len(expected) == own.args.max_steps
    assert actual == pytest.approx(expected, abs=TOLERANCE)
    assert len(set(expected)) > len(expected) / 2  # there was something to learn
    assert set().union(*trl_runs.logs(own)) >= set().union(*trl_runs.logs(trl))
    for one, other in zip(trl_runs.logs(own), trl_runs.logs(trl), strict=True):
        for name in other.keys() - TIMES:
            # Where no token counts TRL logs a mean of 0, and None for an extreme.
            assert one.get(name, 0.0) == pytest.approx(other[name] or 0.0, abs=1e-3, rel=1e-3), name
    for (name, weight), (_, other) in zip(own.model.named_parameters(), trl.model.named_parameters(), strict=True):
        assert torch.allclose(weight, other, atol=2e-3), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon_high": 0.28, "num_iterations": 2, "delta": 1.3, "temperature": 0.7},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "dr_grpo", "entropy_coef": 0.02, "top_entropy_quantile": 0.5},
        {"loss_type": "bnpo", "mask_truncated_completions": True, "scale_rewards": "batch"},
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"loss_type": "cispo", "epsilon_high": 1.01, "importance_sampling_level": "sequence"},
        {"loss_type": "sapo", "sapo_temperature_neg": 1.2, "off_policy_mask_threshold": 0.01},
    ],
    ids=lambda options: "_".join(
        [
            options.get("loss_type", "dapo"),
            *(name for name in ("delta", "importance_sampling_level") if name in options),
        ]
    ),
)
def test_losses_are_those_of_trl(tmp_path, options):
    assert_same(*both(tmp_path, steps=ONCE if options else STEPS, **options))


def test_a_ratio_of_sequences_with_gradients_of_tokens(tmp_path):
    """Without weights of tokens GSPO-token is GSPO, which TRL has."""
    trained = []
    for level, own in (("sequence_token", {"reweight": "none"}), ("sequence", {"trl": True})):
        trainer = trl_runs.trainer(
            tmp_path / level, loss_type="grpo", importance_sampling_level=level, max_steps=ONCE, **own
        )
        trainer.train()
        trained.append(trainer)
    assert_same(*trained)


@pytest.mark.parametrize("corrected", [True, False])
def test_with_a_reference_model(tmp_path, corrected):
    directory = trl_runs.saved_policy(tmp_path / "model")
    own, trl = both(tmp_path, model=lambda: directory, beta=0.1, use_bias_correction_kl=corrected)
    assert_same(own, trl)
    assert trl_runs.logs(own)[-1]["kl"] > 1e-4


def test_accumulated_and_checkpointed_gradients(tmp_path):
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "gradient_checkpointing": True}
    own, trl = both(tmp_path, steps=8, **options)
    assert_same(own, trl)
    # The same batches in one go.
    whole = trl_runs.trainer(
        tmp_path / "whole", reweight="none", max_steps=8, per_device_train_batch_size=8, gradient_accumulation_steps=1
    )
    whole.train()
    assert trl_runs.losses(own) == pytest.approx(trl_runs.losses(whole), abs=TOLERANCE)


def test_adapters(tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.0)
    own, trl = both(tmp_path, peft=config, beta=0.05, gradient_checkpointing=True, learning_rate=1e-2)
    assert_same(own, trl)
    before = dict(trl_runs.policy().named_parameters())
    for name, weight in own.model.get_base_model().named_parameters():
        name = name.replace(".base_layer", "")
        assert "lora_" in name or torch.equal(weight, before[name]), name
    assert trl_runs.logs(own)[-1]["delta_logp/mean"] != 0.0


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo"])
def test_an_evaluation_logs_what_that_of_trl_does(tmp_path, loss_type):
    directory, logged = trl_runs.saved_policy(tmp_path / "model"), []
    for trainer in both(tmp_path, steps=2, loss_type=loss_type, beta=0.1, model=lambda: directory):
        torch.manual_seed(0)
        logged.append(trainer.evaluate(trainer.train_dataset.select(range(4))))
    own, trl = logged
    assert own.keys() >= trl.keys() and trl["eval_kl"] > 0.0
    for name in trl.keys() - TIMES:
        assert own[name] == pytest.approx(trl[name], abs=1e-3, rel=1e-3), name


def test_mixed_precision(tmp_path):
    own, trl = both(tmp_path, steps=4, bf16=True, max_completion_length=4)
    # TRL rounds nothing narrower than float32 here either, but in another place.
    assert trl_runs.losses(own) == pytest.approx(trl_runs.losses(trl), abs=5e-2)
