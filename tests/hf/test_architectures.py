"""Hidden states and last layer of many architectures against the models' own logits."""

import hf_models
import pytest
import torch
from hf_models import one_thread  # noqa: F401
from hf_prompts import tokens
from tolerances import HF_HIDDEN_ERROR, HF_STATISTIC_ERROR
from torch import Tensor

from dlogp_kernels import hf


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=hf_models.CAUSAL)
def model(request):
    return hf_models.tiny_model(request.param)


def test_log_probabilities_are_those_of_the_models_logits(model, record_property):
    input_ids = tokens(2, 13)
    with torch.no_grad():
        expected = model(input_ids).logits.double().log_softmax(-1)
        candidates = torch.arange(hf_models.VOCABULARY).expand(2, 13, -1)
        actual = hf.lm_head_inputs(model, input_ids).logp(candidates).logp
    # Wide enough that a forgotten scale, softcap or bias would show.
    assert expected.std() > 0.05
    error = float((actual - expected).abs().max())
    record_property("error", error)
    assert error < HF_STATISTIC_ERROR


def test_padding_and_packing_give_the_numbers_of_a_sequence_alone(model):
    one, other = tokens(1, 9, seed=1), tokens(1, 5, seed=2)
    with torch.no_grad():
        alone = [hf.lm_head_inputs(model, ids).hidden[0] for ids in (one, other)]
        padding = torch.zeros(1, 4, dtype=torch.long)
        left = torch.cat([one, torch.cat([padding, other], 1)])
        right = torch.cat([one, torch.cat([other, padding], 1)])
        mask = torch.ones_like(left)
        mask[1, :4] = 0
        left_padded = hf.lm_head_inputs(model, left, mask).hidden
        right_padded = hf.lm_head_inputs(model, right, mask.flip(1)).hidden
        positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
        packed = hf.lm_head_inputs(model, torch.cat([one, other], 1), position_ids=positions).hidden[0]
        swapped = torch.cat([torch.arange(5), torch.arange(9)])[None]
        packed_swapped = hf.lm_head_inputs(model, torch.cat([other, one], 1), position_ids=swapped).hidden[0]
    for first, second in [
        (left_padded[0], left_padded[1, 4:]),
        (right_padded[0], right_padded[1, :5]),
        (packed[:9], packed[9:]),
        (packed_swapped[5:], packed_swapped[:5]),
    ]:
        assert relative_error(first, alone[0]) < HF_HIDDEN_ERROR
        assert relative_error(second, alone[1]) < HF_HIDDEN_ERROR
    assert (left_padded[1, :4] == 0).all() and (right_padded[1, 5:] == 0).all()


def test_chunks_through_the_cache_give_the_numbers_of_one_go(model, request):
    input_ids = tokens(2, 13)
    with torch.no_grad():
        if request.node.callspec.params["model"] in hf_models.WITHOUT_CHUNKS:
            with pytest.raises(ValueError, match=r"prefill_chunk"):
                hf.lm_head_inputs(model, input_ids, prefill_chunk=5)
            return
        expected = hf.lm_head_inputs(model, input_ids).hidden
        for chunk in (5, 12):
            chunked = hf.lm_head_inputs(model, input_ids, prefill_chunk=chunk).hidden
            assert relative_error(chunked, expected) < HF_HIDDEN_ERROR, chunk


def test_a_cache_that_loses_little_is_noticed():
    """Jamba's state is lost between chunks; here it is a ten-thousandth of what goes through."""
    model = hf_models.tiny_model("jamba")
    for name, parameter in model.named_parameters():
        if "mamba.out_proj" in name:
            parameter.data *= 1e-4
    with pytest.raises(ValueError, match=r"in chunks its hidden states differ by .*, expected rounding only"):
        hf.lm_head_inputs(model.requires_grad_(False), tokens(1, 13), prefill_chunk=5)


def test_a_cache_is_looked_at_beyond_the_lengths_where_it_switches():
    model = hf_models.tiny_model("moshi").requires_grad_(False)
    input_ids = tokens(1, 60)
    expected = hf.lm_head_inputs(model, input_ids[:, :24]).hidden
    chunked = hf.lm_head_inputs(model, input_ids[:, :24], prefill_chunk=5).hidden
    assert relative_error(chunked, expected) < HF_HIDDEN_ERROR
    with pytest.raises(ValueError, match=r"in chunks its hidden states differ by .* at 40 tokens"):
        hf.lm_head_inputs(model, input_ids, prefill_chunk=5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3_moe", torch.bfloat16),
        ("qwen3_moe", torch.float16),
        ("mixtral", torch.bfloat16),
        ("mixtral", torch.float16),
        ("gemma3", torch.bfloat16),
        ("bamba", torch.bfloat16),
        ("bamba", torch.float64),
        ("qwen3_5", torch.float64),
    ],
)
def test_rounding_alone_is_not_taken_for_a_cache_that_loses_something(name, dtype):
    model = hf_models.tiny_model(name, dtype=dtype).requires_grad_(False)
    hf.lm_head_inputs(model, tokens(2, 40), prefill_chunk=7)


def test_frequencies_do_not_follow_from_the_calls_before():
    """Dynamic NTK scaling keeps the frequencies of the longest call."""
    model = hf_models.tiny_model("llama_dynamic").requires_grad_(False)
    fresh = hf.lm_head_inputs(model, tokens(1, 11)).hidden
    hf.lm_head_inputs(model, tokens(1, 40))
    assert relative_error(hf.lm_head_inputs(model, tokens(1, 11)).hidden, fresh) < HF_HIDDEN_ERROR
    assert relative_error(hf.lm_head_inputs(model, tokens(1, 8)).hidden, fresh[:, :8]) > 1e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "nothing else between the two"),
        ("roberta_masked", "causal language model"),
        ("t5", "encoder-decoder"),
    ],
)
def test_other_models_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        hf.lm_head_inputs(hf_models.tiny_model(name), tokens(1, 8))


def test_a_body_alone_is_refused():
    with pytest.raises(TypeError, match="has no last layer"):
        hf.lm_head_inputs(hf_models.tiny_model("qwen3").model, tokens(1, 8))


def test_anything_but_a_model_of_transformers_is_refused():
    with pytest.raises(TypeError, match=r"model is Linear, expected a causal language model"):
        hf.lm_head_inputs(torch.nn.Linear(2, 2), tokens(1, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass_the_check_of_the_model(dtype):
    model = hf_models.tiny_model("gemma2", dtype=dtype)
    input_ids = tokens(1, 10)
    with torch.no_grad():
        inputs = hf.lm_head_inputs(model, input_ids)
        # The truth is that of the hidden states as they are, in float64: the model's own logits are rounded.
        raw = inputs.hidden.double() @ inputs.weight.double().T
        expected = (3.0 * torch.tanh(raw / 3.0)).log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
        actual = inputs.logp(input_ids).logp
    assert inputs.hidden.dtype == dtype
    assert (actual - expected).abs().max() < HF_STATISTIC_ERROR


def test_changed_logits_are_noticed():
    """A model whose logits are not those of its backbone and last layer, in a way that no config tells."""
    model = hf_models.tiny_model("qwen3")
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output * 1.01)
    with pytest.raises(ValueError, match="the log-probabilities of its logits differ"):
        hf.lm_head_inputs(model, tokens(1, 8))


def prepared(model, dtype):
    """As accelerate prepares a model for mixed precision: its forward under autocast, the logits in float32."""
    forward = model.forward

    def forward_in(*args, **options):
        with torch.autocast("cpu", dtype):
            output = forward(*args, **options)
        output.logits = output.logits.float()
        return output

    model.forward = forward_in
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite", "qwen3_moe"])
def test_a_model_prepared_for_mixed_precision_passes_the_check(name, dtype):
    model, input_ids = hf_models.tiny_model(name), tokens(1, 10)
    with torch.no_grad():
        expected = hf.lm_head_inputs(model, input_ids)
        actual = hf.lm_head_inputs(prepared(hf_models.tiny_model(name), dtype), input_ids)
    assert torch.equal(actual.hidden, expected.hidden)  # the wrapper stays outside


def test_autocast_around_the_check_is_its_precision():
    model, input_ids = hf_models.tiny_model("mamba"), tokens(1, 10)  # whose logits are float32 even then
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids).logits.dtype == torch.float32
        assert hf.lm_head_inputs(model, input_ids).hidden.isfinite().all()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.05), (torch.float16, 1.01)])
def test_changed_logits_are_noticed_in_mixed_precision(dtype, scale):
    model = prepared(hf_models.tiny_model("qwen3"), dtype)
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output * scale)
    with pytest.raises(ValueError, match="the log-probabilities of its logits differ"):
        hf.lm_head_inputs(model, tokens(1, 8))


def test_a_changed_config_is_verified_again():
    model = hf_models.tiny_model("granite")
    hf.lm_head_inputs(model, tokens(1, 8))
    model.config.logits_scaling = 8.0
    inputs = hf.lm_head_inputs(model, tokens(1, 8))
    assert inputs.logit_scale == 1 / 8
    with torch.no_grad():
        expected = model(tokens(1, 8)).logits.double().log_softmax(-1)[..., 7]
    assert (inputs.logp(torch.full((1, 8), 7)).logp - expected).abs().max() < HF_STATISTIC_ERROR


def test_the_check_leaves_each_modules_mode_as_it_was():
    model = hf_models.tiny_model("qwen3").train()
    model.model.norm.eval()
    hf.lm_head_inputs(model, tokens(1, 8))
    assert model.training and model.lm_head.training and not model.model.norm.training
