"""token_metrics against the log_softmax of two models' logits: values, masks, gradients, vocabularies, memory."""

import subprocess
import sys
from typing import Any

import hf_models
import pytest
import torch
from cases import asked_for
from hf_models import one_thread  # noqa: F401
from hf_prompts import tokens
from tolerances import HF_GRADIENT_ERROR, HF_STATISTIC_ERROR
from torch import Tensor

from dlogp_kernels import DeltaLogpStats, hf
from dlogp_kernels.hf.memory import as_bytes


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_rows_have_the_frequencies_of_their_own_length(name):
    """These change at 8 tokens; rows and packed documents stand on both sides."""
    models = [hf_models.tiny_model(name, seed=seed) for seed in (0, 1)]
    input_ids, mask = tokens(5, 40), torch.ones(5, 40, dtype=torch.bool)
    lengths = [40, 8, 9, 21, 5]
    for row, length in enumerate(lengths):
        mask[row, length:] = False
    packed = torch.cat([input_ids[row, :length] for row, length in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        expected = []
        for row, length in enumerate(lengths):
            fresh = [hf_models.tiny_model(name, seed=seed) for seed in (0, 1)]
            expected.append(plain_statistics(*fresh, input_ids[row : row + 1, :length]))
        for options in ({}, {"prefill_chunk": 3}, {"memory_limit": "52MiB"}):
            rows = token_metrics(*models, input_ids, mask, **options)
            documents = token_metrics(*models, packed, position_ids=positions, **options)
            begin = 0
            for row, length in enumerate(lengths):
                for field in expected[row]._fields:
                    for actual in (getattr(rows, field)[row], getattr(documents, field)[0, begin:]):
                        error = (actual[: length - 1] - getattr(expected[row], field)[0]).abs().max()
                        assert error < HF_STATISTIC_ERROR, (options, field, length)
                begin += length


def token_metrics(*args: Any, **options: Any) -> Any:
    """What was asked for, as a NamedTuple of it alone."""
    return asked_for(hf.token_metrics(*args, **options))


def plain_statistics(model, base_model, input_ids: Tensor, temperature: float = 1.0) -> Any:
    """Every field (B, T − 1) from the two logit tensors, in float64, but those of `top`."""
    z = model(input_ids).logits[:, :-1].double() / temperature
    base_z = base_model(input_ids).logits[:, :-1].double() / temperature
    log_p, log_q = z.log_softmax(-1), base_z.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    target = input_ids[:, 1:, None]
    logp, base_logp = log_p.gather(-1, target)[..., 0], log_q.gather(-1, target)[..., 0]
    stats = DeltaLogpStats(
        delta_logp=logp - base_logp,
        logp=logp,
        base_logp=base_logp,
        entropy=-(p * log_p).sum(-1),
        base_entropy=-(q * log_q).sum(-1),
        kl=(p * (log_p - log_q)).sum(-1),
        reverse_kl=(q * (log_q - log_p)).sum(-1),
        lse=z.logsumexp(-1),
        base_lse=base_z.logsumexp(-1),
    )
    return asked_for(stats)


def assert_close(actual: Any, expected: Any) -> None:
    for name, value, truth in zip(actual._fields, actual, expected, strict=True):
        assert value.shape == truth.shape, name
        assert (value - truth).abs().max() < HF_STATISTIC_ERROR, name


@pytest.fixture(scope="module")
def pair():
    return hf_models.tiny_model("qwen3"), hf_models.tiny_model("qwen3", seed=1, hidden_size=48)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_statistic_is_that_of_the_logits(pair, temperature):
    input_ids = tokens(3, 17)
    with torch.no_grad():
        actual = token_metrics(*pair, input_ids, temperature=temperature)
        assert_close(actual, plain_statistics(*pair, input_ids, temperature))


def test_the_most_likely_tokens_are_those_of_the_logits(pair):
    """−1 where a token is left out, with a log p of 0."""
    input_ids = tokens(3, 17)
    loss_mask = torch.ones_like(input_ids)
    loss_mask[1, 9:] = 0
    with torch.no_grad():
        stats = token_metrics(*pair, input_ids, loss_mask=loss_mask, top=True)
        for prefix, model in (("", pair[0]), ("base_", pair[1])):
            largest = model(input_ids).logits[:, :-1].double().log_softmax(-1).max(-1)
            kept = loss_mask[:, 1:] == 1
            assert torch.equal(getattr(stats, f"{prefix}top_token"), largest.indices.where(kept, -1))
            error = getattr(stats, f"{prefix}top_logp") - largest.values.where(kept, 0.0)
            assert error.abs().max() < HF_STATISTIC_ERROR


@pytest.mark.parametrize(
    ("name", "base_name"),
    [("gemma2", "qwen3"), ("cohere", "granite"), ("phi_bias", "gpt2_tied"), ("opt_project_out", "falcon_alibi")],
)
def test_the_two_models_may_differ_in_kind(name, base_name):
    model, base_model = hf_models.tiny_model(name), hf_models.tiny_model(base_name, seed=1)
    input_ids = tokens(2, 11)
    with torch.no_grad():
        assert_close(token_metrics(model, base_model, input_ids), plain_statistics(model, base_model, input_ids))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 4}, {"memory_limit": "64MiB"}])
def test_padding_on_both_sides_gives_the_numbers_of_each_sequence_alone(pair, options):
    left, whole, right = tokens(1, 7, seed=1), tokens(1, 12, seed=2), tokens(1, 5, seed=3)
    padding = torch.full((1, 12), -100)
    input_ids = torch.cat([torch.cat([padding[:, :5], left], 1), whole, torch.cat([right, padding[:, :7]], 1), padding])
    mask = (input_ids >= 0).long()
    with torch.no_grad():
        actual = token_metrics(*pair, input_ids, mask, **options)
        for row, begin, alone in [(0, 5, left), (1, 0, whole), (2, 0, right)]:
            end = begin + alone.shape[1] - 1
            expected = plain_statistics(*pair, alone)
            assert_close(type(actual)(*(x[row : row + 1, begin:end] for x in actual)), expected)
            outside = torch.ones(11, dtype=torch.bool)
            outside[begin:end] = False
            assert all((x[row, outside] == 0).all() for x in actual)
        assert all((x[3] == 0).all() for x in actual)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_packed_documents_do_not_see_each_other(attention, with_mask):
    model, base_model = (hf_models.tiny_model("qwen3", seed=seed, attn_implementation=attention) for seed in (0, 1))
    documents = [tokens(1, length, seed=length) for length in (4, 1, 9, 2)]
    input_ids = torch.cat(documents, 1)
    position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    mask = torch.ones_like(input_ids) if with_mask else None
    with torch.no_grad():
        actual = token_metrics(model, base_model, input_ids, mask, position_ids=position_ids)
        begin = 0
        for document in documents:
            end = begin + document.shape[1]
            expected = plain_statistics(model, base_model, document)
            if document.shape[1] > 1:
                assert_close(type(actual)(*(x[:, begin : end - 1] for x in actual)), expected)
            # The next document's first token is not predicted from this one.
            assert all((x[:, end - 1 : end] == 0).all() for x in actual)
            begin = end


def test_a_hole_in_the_mask_is_as_if_its_tokens_were_not_there(pair):
    input_ids = tokens(1, 10)
    mask = torch.ones_like(input_ids)
    mask[0, 3:5] = 0
    kept = input_ids[:, mask[0] == 1]
    with torch.no_grad():
        actual = token_metrics(*pair, input_ids, mask)
        expected = plain_statistics(*pair, kept)
    assert (actual.delta_logp[0, :2] - expected.delta_logp[0, :2]).abs().max() < HF_STATISTIC_ERROR
    assert (actual.delta_logp[0, 5:] - expected.delta_logp[0, 3:]).abs().max() < HF_STATISTIC_ERROR
    assert (actual.delta_logp[0, 2:5] == 0).all()


def test_loss_mask_in_either_shape_leaves_out_tokens(pair):
    input_ids = tokens(2, 9)
    loss_mask = torch.zeros_like(input_ids)
    loss_mask[0, 4:7] = 1
    loss_mask[1, 1] = 1
    with torch.no_grad():
        full = token_metrics(*pair, input_ids, loss_mask=loss_mask)
        shifted = token_metrics(*pair, input_ids, loss_mask=loss_mask[:, 1:].bool())
        expected = plain_statistics(*pair, input_ids)
    for actual in (full, shifted):
        for value, truth in zip(actual, expected, strict=True):
            assert (value - truth * loss_mask[:, 1:]).abs().max() < HF_STATISTIC_ERROR


def test_the_ops_see_only_tokens_that_count(pair, monkeypatch):
    """NaN in the hidden states of a token that is left out stays there."""
    input_ids = tokens(1, 9)
    loss_mask = torch.zeros_like(input_ids)
    loss_mask[0, 5:] = 1
    with torch.no_grad():
        base_hidden = hf.lm_head_inputs(pair[1], input_ids).hidden
        base_hidden[0, :4] = torch.nan
        base_hidden[0, -1] = torch.nan
        actual = token_metrics(pair[0], pair[1], input_ids, loss_mask=loss_mask, base_hidden=base_hidden)
        expected = plain_statistics(*pair, input_ids)
    for value, truth in zip(actual, expected, strict=True):
        assert (value - truth * loss_mask[:, 1:]).abs().max() < HF_STATISTIC_ERROR


@pytest.mark.parametrize("how", ["whole", "left", "packed"])
def test_gradients_are_those_of_the_plain_logits_path(how):
    """Of a policy-gradient-like loss with a normaliser, an entropy bonus and a KL term, at every parameter."""
    model, base_model = hf_models.tiny_model("qwen3"), hf_models.tiny_model("qwen3", seed=1)
    input_ids = tokens(2, 12)
    advantage = torch.linspace(-1, 1, 22, dtype=torch.float64).view(2, 11)
    mask = position_ids = None
    spans = [(0, 0, 12), (1, 0, 12)]
    if how == "left":
        mask = torch.ones_like(input_ids)
        mask[1, :4] = 0
        spans = [(0, 0, 12), (1, 4, 12)]
    elif how == "packed":
        position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)
        spans = [(0, 0, 5), (0, 5, 12), (1, 0, 5), (1, 5, 12)]

    def loss_of(stats: DeltaLogpStats, weights: Tensor) -> Tensor:
        ratio = stats.delta_logp.double().exp()
        return -(ratio * weights - 0.1 * stats.kl + 0.01 * stats.entropy)

    gradients = []
    for plain in (False, True):
        model.zero_grad()
        if plain:
            terms = [
                loss_of(
                    plain_statistics(model, base_model, input_ids[row : row + 1, begin:end]),
                    advantage[row, begin : end - 1],
                ).sum()
                for row, begin, end in spans
            ]
            loss = sum(terms) / 20
        else:
            stats = token_metrics(model, base_model, input_ids, mask, position_ids=position_ids)
            measured = stats.lse != 0
            assert measured.sum() == sum(end - begin - 1 for _, begin, end in spans)
            loss = (loss_of(stats, advantage) * measured).sum() / 20
        loss.backward()
        gradients.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (loss, actual), (expected_loss, expected) = gradients
    assert abs(loss - expected_loss) < HF_STATISTIC_ERROR
    for name, truth in expected.items():
        assert truth.abs().max() > 0, name
        assert (actual[name] - truth).abs().max() < HF_GRADIENT_ERROR * truth.abs().max(), name


def test_gradient_reaches_a_tied_tensor_from_both_uses():
    model = hf_models.tiny_model("gpt2_tied")
    base_model = hf_models.tiny_model("gpt2_tied", seed=1).requires_grad_(False)
    input_ids = tokens(1, 10)
    assert model.lm_head.weight is model.transformer.wte.weight
    plain_statistics(model, base_model, input_ids).delta_logp.sum().backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    token_metrics(model, base_model, input_ids).delta_logp.sum().backward()
    actual = model.lm_head.weight.grad
    # Embedding rows of tokens that are read get more than those that are only predicted.
    unread = torch.ones(hf_models.VOCABULARY, dtype=torch.bool)
    unread[input_ids[0, :-1]] = False
    assert expected[unread].abs().max() > 0 and expected[~unread].abs().max() > 0
    assert (actual - expected).abs().max() < HF_GRADIENT_ERROR * expected.abs().max()


def test_gradients_within_autocast(pair):
    """Hidden states and last layer in bfloat16, statistics in float32, gradients in the parameters' float32."""
    model, base_model = (hf_models.tiny_model("qwen3", seed=seed) for seed in (0, 1))
    input_ids = tokens(1, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = token_metrics(model, base_model, input_ids)
    stats.logp.sum().backward()
    assert stats.logp.dtype == torch.float32
    with torch.no_grad():
        expected = plain_statistics(model, base_model, input_ids)
    assert 0 < (stats.logp - expected.logp).abs().max() < 0.3
    assert model.lm_head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("larger", ["model", "base_model"])
def test_rows_of_padding_in_one_vocabulary_are_left_out(larger):
    sizes = (hf_models.VOCABULARY + 24, hf_models.VOCABULARY)
    sizes = sizes if larger == "model" else sizes[::-1]
    model, base_model = (
        hf_models.tiny_model("phi_bias", seed=seed, vocab_size=size) for seed, size in enumerate(sizes)
    )
    input_ids = tokens(2, 9)
    with torch.no_grad():
        actual = token_metrics(model, base_model, input_ids)
        common = [
            type("Cut", (), {"logits": m(input_ids).logits[..., : hf_models.VOCABULARY]}) for m in (model, base_model)
        ]
        expected = plain_statistics(lambda _: common[0], lambda _: common[1], input_ids)
        assert_close(actual, expected)
        beyond = input_ids.clone()
        beyond[1, 3] = hf_models.VOCABULARY + 1
        with pytest.raises(IndexError, match=r"input_ids\[1, 3\] is 161, expected a token in \[0, 160\)"):
            token_metrics(model, base_model, beyond)


def test_other_vocabularies_are_an_error(pair):
    other = hf_models.tiny_model("qwen3", vocab_size=hf_models.VOCABULARY + 1024)
    with pytest.raises(ValueError, match=r"base_model has a vocabulary of 1184 rows and model one of 160"):
        token_metrics(pair[0], other, tokens(1, 5))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 5}, {"memory_limit": 64 * 2**20}])
def test_stored_base_hidden_states_stand_for_the_base_model(pair, options):
    input_ids = tokens(2, 11)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    with torch.no_grad():
        base_hidden = hf.lm_head_inputs(pair[1], input_ids, mask).hidden
        expected = token_metrics(*pair, input_ids, mask)
        for base in (hf.lm_head(pair[1]), pair[1]):
            actual = token_metrics(pair[0], base, input_ids, mask, base_hidden=base_hidden, **options)
            assert_close(actual, expected)


def test_memory_limit_runs_long_sequences_in_chunks_with_the_same_numbers(pair):
    input_ids = torch.cat([tokens(1, 60, seed=seed) for seed in range(6)])
    mask = torch.ones_like(input_ids)
    mask[:, :2] = 0
    with torch.no_grad():
        expected = token_metrics(*pair, input_ids, mask)
        with pytest.raises(ValueError, match=r"expected at least \d+ \(\d+ MiB\) for a sequence of 58 tokens") as error:
            token_metrics(*pair, input_ids, mask, memory_limit=2**20)
        least = int(str(error.value).split("at least ")[1].split()[0])
        assert_close(token_metrics(*pair, input_ids, mask, memory_limit=least), expected)
        with pytest.raises(ValueError, match="expected at least"):
            token_metrics(*pair, input_ids, mask, memory_limit=least - 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(123, 123), ("4GiB", 4 * 2**30), ("1.5 GB", 1_500_000_000), ("512 mib", 512 * 2**20), ("77", 77)],
)
def test_memory_limit_is_read_from_text(text, expected):
    assert as_bytes(text) == expected


@pytest.mark.parametrize("value", ["4 apples", "GiB", "-1GiB", 0, "0"])
def test_a_wrong_memory_limit_is_an_error(value):
    with pytest.raises(ValueError, match="memory_limit"):
        as_bytes(value)


_MEASURE = """
import ctypes, os, sys, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from dlogp_kernels import hf

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

# A process of its own for each case: forks of one that has imported torch and computed nothing.
for case in sys.argv[1:]:
    child = os.fork()
    if not child:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
else:
    sys.exit()
vocabulary, width, inner, length, limit = map(int, case.split(","))
config = Qwen3Config(
    vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=length,
)
models = [Qwen3ForCausalLM(config).eval() for _ in range(2)]
input_ids = torch.randint(0, vocabulary, (1, length))
with torch.no_grad():
    hf.token_metrics(*models, input_ids[:, :16], memory_limit=limit)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    stats = hf.token_metrics(*models, input_ids, memory_limit=limit)
assert stats.kl.isfinite().all() and (stats.logp < 0).all()
print(status("VmHWM") - before)
"""


#: Vocabulary, width, width of the feed-forward part, tokens, limit.
_CASES = [
    # Two tensors of float32 logits would be 600 MiB.
    (151936, 64, 128, 512, 100 * 2**20),
    # The backbone's activations would be 100 MiB in one go.
    (1000, 128, 8192, 1024, 75 * 2**20),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_limit_is_kept(record_property):
    cases = [",".join(map(str, case)) for case in _CASES]
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *cases], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    peaks = list(map(int, run.stdout.split()))
    record_property("peaks", peaks)
    for peak, (*_, limit) in zip(peaks, _CASES, strict=True):
        print(f"peak {peak / 2**20:.0f} MiB of {limit / 2**20:.0f}")
        assert 2**20 < peak < limit


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, ValueError, r"input_ids has shape \(5,\), expected \(B, T\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ValueError, r"input_ids has shape \(1, 0\)"),
        ({"input_ids": torch.zeros(1, 5)}, TypeError, "input_ids has dtype torch.float32"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids is list, expected a tensor"),
        ({"input_ids": torch.full((1, 5), 160)}, IndexError, r"input_ids\[0, 0\] is 160"),
        ({"attention_mask": torch.ones(1, 4)}, ValueError, r"attention_mask has shape \(1, 4\), expected \(1, 5\)"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2, 2]])}, ValueError, "attention_mask holds values other than"),
        ({"position_ids": torch.zeros(3, 1, 5, dtype=torch.long)}, ValueError, "position_ids has shape"),
        ({"position_ids": torch.zeros(2, 5, dtype=torch.long)}, ValueError, "position_ids has 2 rows, expected 1"),
        ({"position_ids": torch.tensor([[0, 1, 3, 4, 5]])}, ValueError, r"position_ids\[0, 2\] is 3"),
        ({"position_ids": torch.tensor([[1, 2, 3, 4, 5]])}, ValueError, r"position_ids\[0, 0\] is 1"),
        ({"loss_mask": torch.ones(1, 3)}, ValueError, r"loss_mask has shape \(1, 3\), expected \(1, 5\) or \(1, 4\)"),
        ({"loss_mask": torch.full((1, 5), 0.5)}, ValueError, "loss_mask holds values other than 0 and 1"),
        ({"temperature": 0.0}, ValueError, "temperature is 0"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk is 0, expected a number of tokens ≥ 1"),
        ({"prefill_chunk": 2, "memory_limit": "1GiB"}, ValueError, "prefill_chunk is given together with memory_limit"),
        ({"base_hidden": torch.zeros(1, 4, 32)}, ValueError, r"base_hidden has shape \(1, 4, 32\)"),
        ({"base_hidden": torch.zeros(1, 5, 7)}, ValueError, "base_weight has shape"),
        (
            {"base_model": hf.LmHead(torch.zeros(160, 32))},
            ValueError,
            "base_model is an LmHead and base_hidden is None",
        ),
    ],
)
def test_wrong_arguments_are_named(pair, arguments, error, message):
    arguments = {"base_model": pair[1], "input_ids": tokens(1, 5), **arguments}
    with torch.no_grad(), pytest.raises(error, match=message):
        token_metrics(pair[0], **arguments)


@pytest.mark.parametrize("options", [{"prefill_chunk": 2}, {"memory_limit": "1GiB"}])
def test_bounded_memory_while_a_gradient_is_needed_is_an_error(pair, options):
    with pytest.raises(RuntimeError, match=r"within torch\.no_grad\(\)"):
        token_metrics(*pair, tokens(1, 5), **options)
