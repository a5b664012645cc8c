"""`hf.token_logp` and `LmHeadInputs.logp` against the models' own logits, whatever those go through; gradients too."""

import pytest
import torch
from cases import asked_for
from hf_models import VOCABULARY, one_thread, tiny_model  # noqa: F401

from dlogp_kernels import hf

#: Models whose logits are scaled, capped, or made with a bias.
HEADS = ("qwen3", "granite", "cohere", "gemma2", "gpt2_tied", "gptj_bias", "hyperclovax")
TEMPERATURE = 0.7


def batch():
    """Three rows, padded on the left as prompts are, and on the right as responses are; and where the responses are."""
    input_ids = torch.randint(3, VOCABULARY - 2, (3, 12))
    attention_mask, response_mask = torch.ones_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (begin, response, end) in enumerate([(0, 4, 12), (3, 6, 12), (2, 5, 9)]):
        attention_mask[row, :begin] = attention_mask[row, end:] = 0
        response_mask[row, response:end] = True
    return input_ids, attention_mask, response_mask


def eager(model, input_ids, attention_mask, temperature=1.0):
    """log p and entropy (B, T − 1) of each row alone, from its logits in float64."""
    logp, entropy = torch.zeros(2, *input_ids[:, 1:].shape, dtype=torch.float64)
    for row, kept in enumerate(attention_mask.bool()):
        places, ids = kept.nonzero()[1:, 0] - 1, input_ids[row][kept]
        every = (model(ids[None]).logits[0, :-1].double() / temperature).log_softmax(-1)
        logp = logp.index_put((torch.tensor(row), places), every.gather(-1, ids[1:, None])[:, 0])
        entropy = entropy.index_put((torch.tensor(row), places), -(every.exp() * every).sum(-1))
    return logp, entropy


@pytest.mark.parametrize("name", HEADS)
def test_it_is_the_eager_path_with_its_gradients(name):
    input_ids, attention_mask, response_mask = batch()
    model, eager_model = tiny_model(name), tiny_model(name)
    stats = hf.token_logp(model, input_ids, attention_mask, response_mask, temperature=TEMPERATURE)
    expected = eager(eager_model, input_ids, attention_mask, TEMPERATURE)
    kept = response_mask[:, 1:]
    for actual, value in zip(stats, expected, strict=False):
        assert actual.shape == kept.shape and not actual[~kept].any()
        assert torch.allclose(actual[kept].double(), value[kept], atol=1e-4)
    upstream = torch.randn(kept.shape)
    (upstream * (stats.logp + 0.3 * stats.entropy)).sum().backward()
    (upstream * kept * (expected[0] + 0.3 * expected[1])).sum().backward()
    for (parameter_name, weight), other in zip(model.named_parameters(), eager_model.parameters(), strict=True):
        error = (weight.grad - other.grad).norm() / other.grad.norm().clamp_min(1e-3)
        assert error < 1e-4, parameter_name


@pytest.mark.parametrize("name", ["granite", "gemma2", "gptj_bias"])
def test_hidden_states_and_last_layer_know_their_log_probabilities(name):
    model, input_ids = tiny_model(name), batch()[0]
    target = input_ids[:, 1:].where(torch.rand(3, 11) > 0.3, -1)
    with torch.no_grad():
        inputs = hf.lm_head_inputs(model, input_ids[:, :-1])
        stats = inputs.logp(target, temperature=TEMPERATURE, ignore_index=-1)
        every = inputs.logp(torch.arange(VOCABULARY).expand(3, 11, -1), temperature=TEMPERATURE).logp
        expected = (model(input_ids[:, :-1]).logits.double() / TEMPERATURE).log_softmax(-1)
    assert torch.allclose(every.double(), expected, atol=1e-4)
    assert torch.equal(stats.logp == 0.0, target == -1)
    taken = expected.gather(-1, target.clamp_min(0)[..., None])[..., 0]
    assert torch.allclose(stats.logp[target >= 0].double(), taken[target >= 0], atol=1e-4)


def test_a_mask_of_either_shape_and_none():
    model, (input_ids, attention_mask, response_mask) = tiny_model("granite"), batch()
    with torch.no_grad():
        of_tokens = hf.token_logp(model, input_ids, attention_mask, response_mask)
        of_predictions = hf.token_logp(model, input_ids, attention_mask, response_mask[:, 1:].long())
        everything = hf.token_logp(model, input_ids, attention_mask).logp
        chunked = hf.token_logp(model, input_ids, attention_mask, response_mask, prefill_chunk=4)
        expected = eager(model, input_ids, attention_mask)[0]
    assert all(map(torch.equal, asked_for(of_tokens), asked_for(of_predictions)))
    assert torch.allclose(everything.double(), expected, atol=1e-4) and (everything != 0).sum() == 11 + 8 + 6
    assert torch.allclose(chunked.logp, of_tokens.logp, atol=1e-4)


def test_packed_documents():
    model = tiny_model("granite")
    input_ids, positions = torch.randint(3, 150, (1, 11)), torch.cat([torch.arange(6), torch.arange(5)])[None]
    with torch.no_grad():
        packed = hf.token_logp(model, input_ids, position_ids=positions).logp[0]
        alone = [hf.token_logp(model, ids).logp[0] for ids in (input_ids[:, :6], input_ids[:, 6:])]
    assert torch.allclose(packed, torch.cat([alone[0], torch.zeros(1), alone[1]]), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"response_mask": torch.ones(3, 9)}, ValueError, r"response_mask has shape \(3, 9\), expected \(3, 12\) or"),
        ({"response_mask": torch.full((3, 12), 0.5)}, ValueError, "response_mask holds values other than 0 and 1"),
        ({"response_mask": [1, 0]}, TypeError, "response_mask is list, expected a tensor"),
        ({"attention_mask": torch.ones(3, 11)}, ValueError, "attention_mask has shape"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"prefill_chunk": 4}, RuntimeError, "prefill_chunk bounds the memory of inference"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        hf.token_logp(tiny_model("qwen3"), batch()[0], **arguments)
