"""Extrapolation within `model.generate` of transformers: as a decoding loop and as a logits processor."""

import copy

import hf_models
import pytest
import torch
from hf_models import one_thread  # noqa: F401
from hf_prompts import Recorder, padded, prompts
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dlogp_kernels import delta_logp, hf
from dlogp_kernels.reference import sampling as reference_sample

OPTIONS = {"gamma": 0.3, "criterion": "delta_logp", "threshold": -0.2, "seed": 11}


@pytest.fixture(scope="module")
def pair():
    return [
        hf_models.tiny_model("qwen3", seed=seed, hidden_size=size, pad_token_id=0, eos_token_id=9)
        for seed, size in ((0, 32), (1, 48))
    ]


@pytest.mark.parametrize("sampling", [{"do_sample": True, "top_k": 30, "top_p": 0.8, "temperature": 0.9}, {}])
def test_a_custom_loop_gives_what_generate_gives(pair, sampling):
    ids, mask = padded(prompts(4, 9, 6))
    stop = list(range(0, 160, 9))
    sequences = pair[0].generate(
        ids,
        attention_mask=mask,
        custom_generate=hf.custom_generate(pair[1], **OPTIONS),
        max_new_tokens=8,
        eos_token_id=stop,
        num_return_sequences=2 if sampling else 1,
        **sampling,
    )
    ours = {name: value for name, value in sampling.items() if name != "do_sample"} or {"temperature": 0.0}
    expected = hf.generate(
        *pair,
        ids,
        mask,
        max_new_tokens=8,
        stop_token_ids=stop,
        num_return_sequences=2 if sampling else 1,
        **ours,
        **OPTIONS,
    )
    assert torch.equal(sequences[:, : ids.shape[1]], ids.repeat_interleave(2 if sampling else 1, 0))
    assert torch.equal(sequences[:, ids.shape[1] :], expected.tokens)


def test_a_custom_loop_returns_more_on_request_and_takes_another_seed(pair):
    ids, mask = padded(prompts(4, 9))
    common = {"attention_mask": mask, "do_sample": True, "top_k": 0, "max_new_tokens": 8}
    steps: list[tuple[int, int, int]] = []
    loop = hf.custom_generate(pair[1], on_step=lambda *x: steps.append(x), **OPTIONS)
    output = pair[0].generate(ids, custom_generate=loop, return_dict_in_generate=True, seed=5, **common)
    expected = hf.generate(*pair, ids, mask, max_new_tokens=8, stop_token_ids=9, **{**OPTIONS, "seed": 5})
    assert isinstance(output, hf.ExtrapolationOutput)
    assert torch.equal(output.sequences[:, 9:], expected.tokens)
    for name in ("lengths", "finished", "draft_tokens", "selected", "delta_logp", "logp", "base_logp"):
        assert torch.equal(output[name], getattr(expected, name)), name
    assert steps[-1] == (int(expected.lengths.sum()), int(expected.selected.sum()), 2)
    other = pair[0].generate(ids, custom_generate=loop, **common)
    assert not torch.equal(other[:, 9:12], expected.tokens[:, :3])


def test_a_custom_loop_streams(pair):
    prompt = prompts(5)[0][None]
    streamer = Recorder()
    loop = hf.custom_generate(pair[1], streamer=streamer, **OPTIONS)
    sequences = pair[0].generate(prompt, custom_generate=loop, max_new_tokens=4)
    assert torch.equal(torch.cat([streamer.values[0][0], *streamer.values[1:]]), sequences[0])


class Forbid(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(0, scores.shape[1], 2), -torch.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams is 2"),
        ({"repetition_penalty": 1.5}, "logits_processor has RepetitionPenaltyLogitsProcessor"),
        ({"logits_processor": LogitsProcessorList([Forbid()])}, "logits_processor has Forbid"),
        ({"max_time": 1.0}, "stopping_criteria has MaxTimeCriteria"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "inputs_embeds"),
    ],
)
def test_a_custom_loop_refuses_what_it_does_not_do(pair, options, message):
    with pytest.raises(ValueError, match=message):
        pair[0].generate(
            prompts(5)[0][None],
            custom_generate=hf.custom_generate(pair[1], **OPTIONS),
            max_new_tokens=4,
            **options,
        )


class Record(LogitsProcessor):
    """Before and after the processor under test: what it is given and what it makes of it."""

    def __init__(self, processor: LogitsProcessor) -> None:
        self.processor = processor
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append((input_ids.clone(), scores.clone(), self.processor(input_ids, scores)))
        return self.calls[-1][2]


@torch.no_grad()
def without_cache(base_model, tokens: Tensor) -> Tensor:
    """Logits (B, V) after rows that begin with padding (0)."""
    rows = [row[int((row != 0).long().argmax()) :] for row in tokens]
    return torch.cat([base_model(input_ids=row[None]).logits[:, -1] for row in rows])


@pytest.mark.parametrize(
    ("criterion", "threshold", "draft"),
    [("all", None, "base"), ("kl", 0.47, "base"), ("entropy", 4.79, "rl"), ("rl_entropy", 4.89, "base")],
)
@pytest.mark.parametrize("mode", [{"do_sample": True}, {"num_beams": 3}])
def test_a_processor_gives_the_logits_of_the_definition(pair, criterion, threshold, draft, mode):
    ids, mask = padded(prompts(4, 9, 6))
    options = {"gamma": 0.4, "criterion": criterion, "threshold": threshold, "draft": draft}
    record = Record(hf.ExtrapolationLogitsProcessor(pair[1], **options))
    torch.manual_seed(0)
    pair[0].generate(ids, attention_mask=mask, logits_processor=[record], max_new_tokens=6, eos_token_id=3, **mode)
    assert len(record.calls) == 6
    both = 0
    for tokens, scores, actual in record.calls:
        base = without_cache(pair[1], tokens)
        # Beams come as log-probabilities, which are logits too.
        stats = delta_logp(scores, base, tokens[:, 0] * 0)
        values = {"kl": stats.kl, "entropy": stats.base_entropy, "rl_entropy": stats.entropy}
        selected = torch.ones(len(tokens), dtype=torch.bool) if criterion == "all" else values[criterion] > threshold
        both += bool(selected.any() and not selected.all())
        extrapolated = reference_sample.extrapolated_logits(scores, base, 0.4)
        expected = torch.where(selected[:, None], extrapolated, scores if draft == "rl" else base)
        assert (actual - expected).abs().max() < 1e-4
    assert both or criterion == "all"


def test_a_processor_runs_the_base_model_on_new_tokens_only(pair):
    ids, mask = padded(prompts(4, 9))
    processor = hf.ExtrapolationLogitsProcessor(pair[1], gamma=0.2)
    seen = []
    handle = pair[1].get_input_embeddings().register_forward_hook(lambda module, x, y: seen.append(x[0].shape[1]))
    for _ in range(2):
        pair[0].generate(ids, attention_mask=mask, logits_processor=[processor], max_new_tokens=4, eos_token_id=3)
    handle.remove()
    assert seen == [9, 1, 1, 1] * 2


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_a_processor_takes_the_frequencies_of_the_row_so_far(name):
    base_model = hf_models.tiny_model(name, seed=1)
    processor = hf.ExtrapolationLogitsProcessor(base_model, gamma=1.0, pad_token_id=0)
    rows = torch.stack(prompts(14, 14))
    rows[1, :5] = 0
    for end in range(6, 15):
        actual = processor(rows[:, :end], torch.zeros(2, hf_models.VOCABULARY))
        base = torch.cat([without_cache(hf_models.tiny_model(name, seed=1), row[None, :end]) for row in rows])
        expected = reference_sample.extrapolated_logits(torch.zeros_like(actual), base, 1.0)
        assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("token", [-1, 10**6])
def test_no_padding_comes_out_that_is_no_token(pair, token):
    ids, mask = padded(prompts(4, 9, 6))
    free = pair[0].generate(ids, attention_mask=mask, custom_generate=hf.custom_generate(pair[1], seed=0))
    config = copy.deepcopy(pair[0].generation_config)
    config.pad_token_id, config.eos_token_id = token, [int(free[0, 11]), -1, 10**6]
    config.max_new_tokens = 8
    actual = pair[0].generate(
        ids, attention_mask=mask, generation_config=config, custom_generate=hf.custom_generate(pair[1], seed=0)
    )
    assert actual.shape[1] > 12 and actual.min() >= 0 and actual.max() < hf_models.VOCABULARY


def test_greedy_generation_with_a_processor_is_greedy_extrapolation(pair):
    ids, mask = padded(prompts(4, 9, 6))
    processor = hf.ExtrapolationLogitsProcessor(pair[1], gamma=0.5)
    actual = pair[0].generate(ids, attention_mask=mask, logits_processor=[processor], max_new_tokens=8)
    expected = hf.generate(*pair, ids, mask, gamma=0.5, temperature=0.0, seed=0, max_new_tokens=8, stop_token_ids=9)
    assert torch.equal(actual[:, ids.shape[1] :], expected.tokens)


@pytest.mark.parametrize("draft", ["base", "rl"])
def test_a_token_that_is_ruled_out_stays_so(pair, draft):
    options = {"gamma": 0.4, "criterion": "kl", "threshold": 1e9, "draft": draft}
    prompt = prompts(5)[0][None]
    processors = [Forbid(), hf.ExtrapolationLogitsProcessor(pair[1], **options)]
    actual = pair[0].generate(prompt, logits_processor=processors, max_new_tokens=5, eos_token_id=3)
    assert (actual[:, 5:] % 2 == 1).all()


def test_a_processor_refuses_what_needs_a_draw(pair):
    with pytest.raises(ValueError, match="does not see which token is drawn"):
        hf.ExtrapolationLogitsProcessor(pair[1], criterion="delta_logp", threshold=-0.3)
    with pytest.raises(ValueError, match="threshold is None"):
        hf.ExtrapolationLogitsProcessor(pair[1], criterion="kl")
    with pytest.raises(ValueError, match="gamma is -1"):
        hf.ExtrapolationLogitsProcessor(pair[1], gamma=-1.0)
    other = hf.ExtrapolationLogitsProcessor(hf_models.tiny_model("qwen3", vocab_size=200))
    with pytest.raises(ValueError, match="one vocabulary"):
        other(prompts(5)[0][None], torch.zeros(1, 160))
