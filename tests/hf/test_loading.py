"""Loading from directories, and comparing tokenizers."""

import json
import re

import hf_models
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlogp_kernels import hf
from dlogp_kernels.hf.tiny import word_tokenizer


def bpe_tokenizer(pre_tokenizer=None, special=("<eos>", "<pad>"), text: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text or "the numbers 1234567890 123 45 67 890 and the words x = y + 2 "], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])


def with_digits_apart(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same vocabulary and merges, another way to split."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, state["pre_tokenizer"]],
    }
    other = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def saved(tmp_path):
    hf_models.tiny_model("qwen3").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_saved_model_comes_back_in_evaluation_mode(saved, dtype):
    model = hf.load_model(saved, dtype=dtype)
    expected = hf_models.tiny_model("qwen3", dtype=dtype).state_dict()
    assert not model.training and model.dtype == dtype
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("as_text", [True, False])
def test_a_directory_that_is_not_there_is_named(tmp_path, as_text):
    path = tmp_path / "nothing"
    for load in (hf.load_model, hf.load_tokenizer):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such directory"):
            load(str(path) if as_text else path)


def test_pickled_weights_are_not_opened(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"not to be opened")
    with pytest.raises(
        FileNotFoundError, match=r"expected .* weights in \*\.safetensors; it has pytorch_model\.bin, a"
    ):
        hf.load_model(saved)


def test_a_directory_without_weights_is_named(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{saved}: expected a directory with weights .* it has none"):
        hf.load_model(saved)


def test_a_directory_without_config_is_named(saved):
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{saved}: expected a directory with config\.json"):
        hf.load_model(saved)


def test_a_file_is_not_a_directory(saved):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: is a file, expected a directory"):
        hf.load_model(saved / "model.safetensors")


def test_truncated_weights_are_named(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{saved}: a safetensors file is truncated"):
        hf.load_model(saved)


def test_weights_that_are_missing_are_not_made_up(saved):
    config = json.loads((saved / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config["layer_types"] = ["full_attention"] * 3
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weights are missing .*model\.layers\.2"):
        hf.load_model(saved)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_an_adapter_is_put_into_its_model(tmp_path, target):
    plain = hf_models.tiny_model("qwen3")
    plain.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        hf.load_model(tmp_path / "base", dtype=torch.float32), peft.LoraConfig(target_modules=[target])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    loaded = hf.load_model(tmp_path / "adapter", dtype=torch.float32)
    input_ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = hf.token_metrics(model.eval(), plain, input_ids)
        actual = hf.token_metrics(loaded, plain, input_ids)
    assert expected.delta_logp.abs().max() > 0.01
    assert torch.equal(actual.delta_logp, expected.delta_logp)


def test_weights_of_other_shapes_are_an_error(saved):
    config = json.loads((saved / "config.json").read_text())
    config["vocab_size"] += 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"2 weights have other shapes .*lm_head\.weight: \(160, 32\) for \(161, 32\)"):
        hf.load_model(saved)


def add_weights(directory, tensors: dict[str, torch.Tensor]) -> None:
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


UNUSED = {
    "a scale of float8 weights": ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
    "a scale of int8 weights": ("model.layers.1.self_attn.q_proj.SCB", torch.ones(32)),
    "the head's bias": ("lm_head.bias", torch.ones(160)),
    "another layer": ("model.layers.2.mlp.up_proj.weight", torch.ones(48, 32)),
    "a norm": ("model.layers.1.post_feedforward_layernorm.weight", torch.ones(32)),
    "a head of another kind": ("score.weight", torch.ones(1, 32)),
}


@pytest.mark.parametrize("name", UNUSED)
def test_weights_that_the_model_does_not_take_are_not_left_out(saved, name):
    weight, tensor = UNUSED[name]
    add_weights(saved, {weight: tensor})
    with pytest.raises(
        ValueError, match=rf"1 weights of the files have no place \({re.escape(weight)}\), expected only"
    ):
        hf.load_model(saved)


def test_weights_of_a_shortened_config_are_named(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"11 weights of the files have no place \(model\.layers\.1\..*, …\)"):
        hf.load_model(saved)


def test_integers_without_their_scales_are_not_taken_for_weights(saved):
    add_weights(saved, {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"1 weights are integers .*\(model\.layers\.0\.mlp\.up_proj\.weight: I8\)"):
        hf.load_model(saved)


BENIGN = {
    "frequencies of old versions": ("qwen3", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    "a tied head": ("gpt2_tied", "lm_head.weight", None),
    "a mask of old versions": ("gpt2_tied", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4)),
    "a mask that the class declares": ("gpt2_tied", "transformer.h.0.attn.bias", torch.ones(1, 1, 64, 64)),
    "layers for more tokens, which the class declares": ("qwen3_5", "mtp.layers.0.mlp.up_proj.weight", torch.ones(2)),
}


@pytest.mark.parametrize("name", BENIGN)
def test_what_a_model_may_be_without_is_left_out(tmp_path, name):
    architecture, weight, tensor = BENIGN[name]
    model = hf_models.tiny_model(architecture)
    model.save_pretrained(tmp_path)
    add_weights(tmp_path, {weight: model.get_input_embeddings().weight.data.clone() if tensor is None else tensor})
    expected = model.state_dict()
    for key, value in hf.load_model(tmp_path).state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_weights_of_a_base_are_checked_below_an_adapter(tmp_path):
    plain = hf_models.tiny_model("qwen3")
    plain.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(hf.load_model(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    add_weights(tmp_path / "base", {"lm_head.bias": torch.ones(160)})
    with pytest.raises(ValueError, match=r"base: 1 weights of the files have no place \(lm_head\.bias\)"):
        hf.load_model(tmp_path / "adapter")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(saved, text):
    (saved / "model.safetensors").rename(saved / "model-00001-of-00001.safetensors")
    (saved / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: is not an index"):
        hf.load_model(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_keep_the_dtype_of_their_file(tmp_path, dtype):
    model = hf_models.tiny_model("qwen3", dtype=dtype)
    model.save_pretrained(tmp_path)
    # What config.json says may have been true of the model that this one was trained from.
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = hf.load_model(tmp_path)
    assert loaded.dtype == dtype
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_float16_is_computed_in_float32_on_a_cpu(tmp_path):
    model = hf_models.tiny_model("qwen3", dtype=torch.float16)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"weights are float16, .* computed in float32"):
        loaded = hf.load_model(tmp_path)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, model.state_dict()[name].float()), name
    assert hf.load_model(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_context_length():
    assert hf.context_length(hf_models.tiny_model("qwen3")) == 64
    assert hf.context_length(hf_models.tiny_model("gpt2_tied")) == 64
    assert hf.context_length(hf_models.tiny_model("qwen2_5_vl")) == 64
    assert hf.context_length(hf_models.tiny_model("mamba")) is None
    assert hf.context_length(hf_models.tiny_model("bloom")) is None


def test_a_saved_tokenizer_splits_as_before(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = hf.load_tokenizer(tmp_path)
    text = "Numbers 12345, x = y"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    hf.check_same_tokenizer(loaded, tokenizer)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_tokenizer_beside_a_model_splits_as_saved(tmp_path, name):
    """For the type qwen2 transformers picks a class that replaces the saved rules for splitting."""
    hf_models.tiny_model(name).save_pretrained(tmp_path)
    tokenizer = with_digits_apart(bpe_tokenizer())
    tokenizer.save_pretrained(tmp_path)
    text = "the numbers 1234567890 and 123"
    loaded = hf.load_tokenizer(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"] != bpe_tokenizer()(text)["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_a_directory_without_tokenizer_is_named(saved):
    with pytest.raises(FileNotFoundError, match=rf"{saved}: expected a directory with a tokenizer"):
        hf.load_tokenizer(saved)


def test_another_split_of_the_same_vocabulary_is_found():
    tokenizer = bpe_tokenizer()
    with pytest.raises(ValueError, match="splits a sample text into"):
        hf.check_same_tokenizer(tokenizer, with_digits_apart(tokenizer))


def test_the_first_token_that_differs_is_named():
    tokenizer, other = word_tokenizer(["one", "two", "three"]), word_tokenizer(["one", "zwei", "three", "four"])
    with pytest.raises(
        ValueError, match=r"7 tokens and base_tokenizer 8; 2 ids differ, the first is 5: 'two' against 'z"
    ):
        hf.check_same_tokenizer(tokenizer, other)


def test_special_tokens_are_compared_unless_they_may_differ():
    tokenizer, other = bpe_tokenizer(), bpe_tokenizer()
    other.eos_token = "<pad>"
    with pytest.raises(ValueError, match=r"tokenizer has 0 \('<eos>'\) as eos_token and base_tokenizer 1 \('<pad>'\)"):
        hf.check_same_tokenizer(tokenizer, other)
    hf.check_same_tokenizer(tokenizer, other, ignore=("eos_token",))
    with pytest.raises(ValueError, match="ignore has"):
        hf.check_same_tokenizer(tokenizer, other, ignore=("eos",))


def test_tokenizers_of_a_closed_vocabulary_can_be_compared():
    hf.check_same_tokenizer(word_tokenizer(["one", "two"]), word_tokenizer(["one", "two"]))
