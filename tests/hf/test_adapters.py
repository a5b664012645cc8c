"""PEFT models: adapters are used where the model uses them, or refused; never ignored."""

import hf_models
import peft
import pytest
import torch
from hf_models import one_thread  # noqa: F401
from hf_prompts import tokens
from tolerances import HF_GRADIENT_ERROR, HF_STATISTIC_ERROR
from torch import Tensor

from dlogp_kernels import hf

#: How far a random adapter has to move log p at least, so that ignoring it would be seen.
MOVED = 0.05


def adapted(name: str = "qwen3", config_type: type = peft.LoraConfig, dtype: torch.dtype = torch.float32, **options):
    """A model with random adapters, and log p of the plain model."""
    model = hf_models.tiny_model(name, dtype=dtype)
    with torch.no_grad():
        before = plain_logp(model)
    model = peft.get_peft_model(model, config_type(task_type="CAUSAL_LM", **options))
    randomize(model)
    return model.eval(), before


def randomize(model: torch.nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def plain_logp(model: torch.nn.Module) -> Tensor:
    return model(input_ids=tokens(2, 11)).logits.double().log_softmax(-1)


def logp(model: torch.nn.Module) -> Tensor:
    inputs = hf.lm_head_inputs(model, tokens(2, 11))
    candidates = torch.arange(inputs.weight.shape[0]).expand(*tokens(2, 11).shape, -1)
    return inputs.logp(candidates).logp


def check(model: torch.nn.Module, before: Tensor) -> None:
    with torch.no_grad():
        expected = plain_logp(model)
        assert (expected - before).abs().max() > MOVED
        assert (logp(model) - expected).abs().max() < HF_STATISTIC_ERROR


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen3", {"target_modules": ["lm_head"]}),
        ("gemma2", {"target_modules": ["lm_head", "q_proj"]}),
        ("phi_bias", {"target_modules": ["lm_head"], "lora_bias": True}),
        ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("qwen3", {"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "r": 2}),
        ("qwen3", {"target_modules": ["q_proj"], "use_dora": True}),
    ],
)
def test_adapters_count(name, options):
    check(*adapted(name, **options))


def test_lora_on_a_narrow_last_layer_is_not_rounded_away():
    """W + B·A of a bfloat16 W is kept in float32, where rounding to bfloat16 would lose most of a small adapter."""
    model, _ = adapted(target_modules=["lm_head"], dtype=torch.bfloat16)
    layer = model.get_output_embeddings()
    layer.lora_B["default"].weight.data *= 1e-3
    with torch.no_grad():
        head = hf.lm_head(model)
        expected = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    assert head.weight.dtype == torch.float32
    assert (head.weight - expected).abs().max() < 1e-7
    assert (head.weight - layer.base_layer.weight.float()).abs().max() > 1e-5


def test_gradients_reach_the_adapters_of_the_last_layer_and_of_the_body():
    model, _ = adapted(target_modules=["lm_head", "q_proj"])
    target = tokens(2, 11)[..., None]
    plain_logp(model).gather(-1, target).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    logp(model).gather(-1, target).sum().backward()
    assert len(expected) == 6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            truth = expected[name]
            assert (parameter.grad - truth).abs().max() < HF_GRADIENT_ERROR * truth.abs().max(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_disabled_adapters_do_not_count(options):
    model, before = adapted(**{"target_modules": ["q_proj"], **options})
    with torch.no_grad(), model.disable_adapter():
        assert (logp(model) - before).abs().max() < HF_STATISTIC_ERROR
    check(model, before)


def test_merged_adapters_count_once():
    model, before = adapted(target_modules=["lm_head", "q_proj"])
    model.merge_adapter()
    check(model, before)
    model.unmerge_adapter()
    check(model, before)
    check(model.merge_and_unload(), before)


def test_the_active_adapter_counts():
    model, before = adapted(target_modules=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], r=3))
    model.set_adapter("other")
    randomize(model, seed=4)
    check(model, before)
    with torch.no_grad():
        other = logp(model)
        model.set_adapter("default")
        assert (logp(model) - other).abs().max() > MOVED
    check(model, before)
    model.base_model.set_adapter(["default", "other"])
    check(model, before)


def test_metrics_of_an_adapted_policy_against_its_own_base():
    model, before = adapted(target_modules=["lm_head", "q_proj"])
    target = tokens(2, 11)[:, 1:, None]
    with torch.no_grad():
        base_hidden = None
        with model.disable_adapter():
            base_hidden = hf.lm_head_inputs(model, tokens(2, 11)).hidden
            base_head = hf.lm_head(model)
        stats = hf.token_metrics(model, base_head, tokens(2, 11), base_hidden=base_hidden)
        expected = (plain_logp(model) - before)[:, :-1].gather(-1, target)[..., 0]
    assert (stats.delta_logp - expected).abs().max() < 2 * HF_STATISTIC_ERROR


@pytest.mark.parametrize(
    ("config_type", "options", "error", "message"),
    [
        (peft.LoraConfig, {"target_modules": ["lm_head"], "use_dora": True}, TypeError, "expected plain LoRA"),
        (peft.IA3Config, {"target_modules": ["lm_head"], "feedforward_modules": []}, TypeError, "an adapter of type"),
        (peft.PromptTuningConfig, {"num_virtual_tokens": 3}, ValueError, "virtual tokens"),
        (
            peft.LoraConfig,
            {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 6]}},
            TypeError,
            "an adapter of type",
        ),
    ],
)
def test_other_adapters_of_the_last_layer_are_refused(config_type, options, error, message):
    model, _ = adapted(config_type=config_type, **options)
    with pytest.raises(error, match=message):
        hf.lm_head_inputs(model, tokens(2, 11))


def test_dropout_on_the_last_layers_adapter_is_refused_in_training():
    model, before = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    check(model, before)
    with pytest.raises(ValueError, match="has dropout"):
        hf.lm_head_inputs(model.train(), tokens(2, 11))


class _Quantized(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def test_a_last_layer_that_computes_otherwise_is_refused():
    model = hf_models.tiny_model("qwen3")
    model.lm_head.__class__ = _Quantized
    with pytest.raises(TypeError, match=r"the last layer is .*_Quantized, expected torch\.nn\.Linear"):
        hf.lm_head(model)


def test_an_offloaded_last_layer_is_refused():
    model = hf_models.tiny_model("qwen3")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        hf.lm_head(model)
