"""hf.generate against a loop without caches; padding, batches, samples of a prompt, ends, kinds of models, errors."""

import warnings

import hf_models
import pytest
import torch
from hf_models import one_thread  # noqa: F401
from hf_prompts import Recorder, padded, prompts
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dlogp_kernels import hf
from dlogp_kernels.reference import sampling as reference_sample
from dlogp_kernels.results import Sample

SAMPLING = {"gamma": 0.3, "criterion": "delta_logp", "threshold": -0.2, "top_p": 0.9, "seed": 11}


@torch.no_grad()
def slowly(model, base_model, prompt: Tensor, row_id: int, stop: tuple[int, ...], max_new_tokens: int, **options):
    """A row, by whole forwards and the op's definition at every step."""
    defaults = {"gamma": 0.0, "criterion": "all", "threshold": None, "draft": "base", "temperature": 1.0}
    options = {**defaults, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    seed = torch.tensor([options.pop("seed")])
    drawn: list[Sample] = []
    tokens = prompt
    while len(drawn) < max_new_tokens:
        z, base_z = (x(input_ids=tokens[None]).logits[:, -1].float() for x in (model, base_model))
        step = torch.tensor([len(drawn)])
        drawn.append(reference_sample.extrapolated_sample(z, base_z, torch.tensor([row_id]), seed, step, **options))
        tokens = torch.cat([tokens, drawn[-1].token])
        if int(drawn[-1].token) in stop:
            break
    return Sample(*(torch.cat(values) for values in zip(*drawn, strict=True)))


def assert_row(actual: hf.Generation, row: int, expected: Sample) -> None:
    length = len(expected.token)
    assert int(actual.lengths[row]) == length
    assert torch.equal(actual.tokens[row, :length], expected.token)
    assert torch.equal(actual.draft_tokens[row, :length], expected.draft_token)
    assert torch.equal(actual.selected[row, :length], expected.selected)
    for name in ("delta_logp", "logp", "base_logp"):
        error = (getattr(actual, name)[row, :length] - getattr(expected, name)).abs().max()
        assert error < 1e-3, name
        assert (getattr(actual, name)[row, length:] == 0).all(), name
    assert not actual.selected[row, length:].any()


def assert_same(one: hf.Generation, other: hf.Generation) -> None:
    for name in ("tokens", "lengths", "finished", "draft_tokens", "selected"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture(scope="module")
def pair():
    return hf_models.tiny_model("qwen3"), hf_models.tiny_model("qwen3", seed=1, hidden_size=48)


@pytest.mark.parametrize(
    "options",
    [
        SAMPLING,
        {**SAMPLING, "draft": "rl", "temperature": 0.7, "top_k": 20},
        {**SAMPLING, "criterion": "kl", "threshold": 0.5, "min_p": 0.05},
        {"criterion": "random", "threshold": 0.4, "seed": 2**64 - 1},
        {"temperature": 0.0, "seed": 0},
    ],
)
def test_every_token_is_that_of_a_loop_without_caches(pair, options):
    rows = prompts(7, 2, 11)
    stop = tuple(range(0, hf_models.VOCABULARY, 16))
    actual = hf.generate(*pair, *padded(rows), max_new_tokens=12, stop_token_ids=stop, max_batch_size=2, **options)
    options = {**options, "seed": options["seed"] - 2**64 if options["seed"] >= 2**63 else options["seed"]}
    for row, prompt in enumerate(rows):
        expected = slowly(*pair, prompt, row, stop, 12, **options)
        assert_row(actual, row, expected)
        assert bool(actual.finished[row]) == (int(expected.token[-1]) in stop)


def test_a_row_does_not_depend_on_its_batch(pair):
    """Rows end at different steps, and others enter in mid-sequence."""
    inputs = padded(prompts(3, 9, 1, 6, 4, seed=1))
    options = {**SAMPLING, "stop_token_ids": range(0, 160, 9), "max_new_tokens": 10, "num_return_sequences": 2}
    together = hf.generate(*pair, *inputs, **options)
    assert together.lengths.min() < together.lengths.max()
    for max_batch_size in (1, 3, 100):
        assert_same(hf.generate(*pair, *inputs, **options, max_batch_size=max_batch_size), together)


def test_places_of_rows_that_are_done_are_filled_in_mid_sequence(pair, monkeypatch):
    steps: list[list[int]] = []
    draw = hf.generation.extrapolated_sample

    def recorded(logits, base_logits, **options):
        if "step" in options:  # not the call that checks the options
            steps.append(torch.as_tensor(options["step"]).expand(len(logits)).tolist())
        return draw(logits, base_logits, **options)

    monkeypatch.setattr(hf.generation, "extrapolated_sample", recorded)
    inputs = padded(prompts(3, 9, 1, 6, 4, seed=1))
    options = {**SAMPLING, "stop_token_ids": range(0, 160, 9), "max_new_tokens": 10, "num_return_sequences": 4}
    actual = hf.generate(*pair, *inputs, **options, max_batch_size=4)
    assert sum(map(len, steps)) == int(actual.lengths.sum()), "each token is drawn once"
    assert max(map(len, steps)) == 4
    begun = [sum(row.count(0) for row in steps[: number + 1]) for number in range(len(steps))]
    # No place stays free while a row waits, and rows are at different tokens.
    assert all(len(rows) == 4 for rows, number in zip(steps, begun, strict=True) if number < 20)
    assert sum(len(set(rows)) > 1 for rows in steps) > len(steps) / 2


def test_a_row_alone_is_that_of_the_batch_with_its_row_id(pair):
    rows = prompts(3, 9, 5)
    together = hf.generate(*pair, *padded(rows), max_new_tokens=8, **SAMPLING)
    for row, prompt in enumerate(rows):
        alone = hf.generate(*pair, prompt[None], max_new_tokens=8, row_id=torch.tensor([row]), **SAMPLING)
        assert_same(alone, hf.Generation(*(x[row : row + 1] for x in together)))
    longer = hf.generate(*pair, *padded(rows), max_new_tokens=11, **SAMPLING)
    assert torch.equal(longer.tokens[:, :8], together.tokens)


def test_masked_tokens_are_not_there_wherever_they_stand(pair):
    rows = prompts(3, 9, 5)
    left = hf.generate(*pair, *padded(rows), max_new_tokens=6, **SAMPLING)
    assert_same(hf.generate(*pair, *padded(rows, "right"), max_new_tokens=6, **SAMPLING), left)
    ids, mask = padded([rows[1]])
    ids, mask = torch.cat([ids[:, :4], ids], 1), torch.cat([mask[:, :4], mask], 1).bool()
    mask[:, 2:6] = False
    holes = hf.generate(*pair, ids, mask, max_new_tokens=6, row_id=[1], **SAMPLING)
    assert_same(holes, hf.Generation(*(x[1:2] for x in left)))


@pytest.mark.parametrize("max_batch_size", [None, 2, 3])
def test_a_prompt_is_run_once_for_all_its_samples(pair, max_batch_size, monkeypatch):
    rows = prompts(4, 7, 5)
    prefilled = []
    prefill = hf.cached.CachedModel.prefill
    monkeypatch.setattr(hf.cached.CachedModel, "prefill", lambda self, x: prefilled.extend(x) or prefill(self, x))
    options = {**SAMPLING, "stop_token_ids": range(0, 160, 9), "max_new_tokens": 6, "max_batch_size": max_batch_size}
    actual = hf.generate(*pair, *padded(rows), num_return_sequences=4, **options)
    assert sorted(map(len, prefilled)) == [4, 4, 5, 5, 7, 7]
    assert len({tuple(row) for row in actual.tokens[:4].tolist()}) > 1
    repeated = padded([row for row in rows for _ in range(4)])
    assert_same(actual, hf.generate(*pair, *repeated, **options))


@pytest.mark.parametrize(
    ("name", "base_name"),
    [
        ("mistral_sliding", "gemma3"),
        ("gemma2", "gpt2_tied"),
        ("qwen3_5", "bloom"),
        ("falcon_h1", "mamba"),
        ("llama4", "jamba"),
        ("qwen2_5_vl", "mpt"),
        ("bart", "minimax"),
    ],
)
def test_kinds_of_models_and_of_their_caches(name, base_name):
    models = hf_models.tiny_model(name), hf_models.tiny_model(base_name, seed=1)
    rows = prompts(9, 3, 6)
    stop = tuple(range(0, 160, 9))
    options = {**SAMPLING, "gamma": 0.1}
    actual = hf.generate(*models, *padded(rows), max_new_tokens=7, max_batch_size=2, stop_token_ids=stop, **options)
    for row, prompt in enumerate(rows):
        assert_row(actual, row, slowly(*models, prompt, row, stop, 7, **options))


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("bamba", (6, 6, 6)), ("bamba", (6, 2, 9)), ("minimax", (6, 6, 6)), ("bart", (6, 6, 6))],
)
def test_models_that_do_not_count_what_is_in_their_cache(name, lengths):
    """Rows of other lengths of the last two are in the test of kinds."""
    models = [hf_models.tiny_model(name, seed=seed) for seed in (0, 1)]
    rows = prompts(*lengths)
    stop = tuple(range(0, 160, 25))
    actual = hf.generate(*models, *padded(rows), max_new_tokens=6, stop_token_ids=stop, **SAMPLING)
    for row, prompt in enumerate(rows):
        assert_row(actual, row, slowly(*models, prompt, row, stop, 6, **SAMPLING))


def test_a_state_beside_the_layers_of_a_cache_comes_and_goes_with_its_row():
    models = [hf_models.tiny_model("minimax", seed=seed) for seed in (0, 1)]
    rows = prompts(4, 7, 2)
    stop = tuple(range(0, 160, 9))
    actual = hf.generate(
        *models,
        *padded(rows),
        max_new_tokens=6,
        stop_token_ids=stop,
        num_return_sequences=2,
        max_batch_size=3,
        **SAMPLING,
    )
    assert actual.lengths.min() < actual.lengths.max()
    for row in range(6):
        assert_row(actual, row, slowly(*models, rows[row // 2], row, stop, 6, **SAMPLING))


def test_rows_that_grow_beyond_a_change_of_frequencies():
    """Tokens are drawn as from whole forwards of the row so far; their log p is that of the row as it ends."""
    models = [hf_models.tiny_model(name, seed=1) for name in ("phi3_longrope", "qwen3")]
    rows = prompts(3, 9, 7, 8, 1)
    stop = tuple(range(0, 160, 25))
    for pair in (models, models[::-1], models[:1] * 2):
        together, by_two = (
            hf.generate(*pair, *padded(rows), max_new_tokens=9, stop_token_ids=stop, max_batch_size=size, **SAMPLING)
            for size in (None, 2)
        )
        remeasured = 0
        for row, prompt in enumerate(rows):
            expected = slowly(*pair, prompt, row, stop, 9, **SAMPLING)
            whole = torch.cat([prompt, expected.token])[None]
            with torch.no_grad():
                logp, base_logp = (
                    x(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1].gather(-1, expected.token[:, None])[:, 0]
                    for x in pair
                )
            remeasured = max(remeasured, float((expected.logp - logp).abs().max()))
            remeasured = max(remeasured, float((expected.base_logp - base_logp).abs().max()))
            for actual in (together, by_two):
                assert_row(actual, row, expected._replace(logp=logp, base_logp=base_logp))
        assert remeasured > 1e-3


def test_a_model_whose_cache_gives_other_numbers_is_refused():
    model = hf_models.tiny_model("moshi")
    hf.generate(model, model, prompts(6)[0][None], max_new_tokens=18, seed=0)
    with pytest.raises(ValueError, match=r"fed one by one to its cache .* at 30 tokens, .* it can not generate"):
        hf.generate(model, model, prompts(6)[0][None], max_new_tokens=24, seed=0)


@pytest.mark.parametrize(("token", "expected"), [(-1, {0}), (None, {0}), (10**6, {0}), (7, {7})])
def test_rows_that_end_are_padded_with_a_token(token, expected):
    models = [hf_models.tiny_model("qwen3", seed=seed) for seed in (0, 1)]
    for model in models:
        for config in (model.config, model.generation_config):
            config.pad_token_id, config.eos_token_id = token, [-1, 10**6]
    inputs = padded(prompts(5, 3, 8, 2))
    free = hf.generate(*models, *inputs, max_new_tokens=8, **SAMPLING)
    assert free.lengths.tolist() == [8] * 4
    models[0].generation_config.eos_token_id = [int(free.tokens[0, 2]), -1]
    actual = hf.generate(*models, *inputs, max_new_tokens=8, **SAMPLING)
    beyond = torch.arange(8) >= actual.lengths[:, None]
    found = set(actual.tokens[beyond].tolist()) | set(actual.draft_tokens[beyond].tolist())
    assert beyond.any() and found == (expected if expected == {7} else {int(free.tokens[0, 2])})


def test_bfloat16(pair):
    models = [hf_models.tiny_model("qwen3", seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]
    actual = hf.generate(*models, *padded(prompts(3, 8)), max_new_tokens=6, stop_token_ids=(), **SAMPLING)
    assert actual.lengths.tolist() == [6, 6] and not actual.finished.any()
    assert actual.logp.dtype == torch.float32 and (actual.logp < 0).all()
    # Of the very tokens, as token_metrics sees them, within the rounding of bfloat16 logits.
    row = torch.cat([prompts(3, 8)[1], actual.tokens[1]])[None]
    with torch.no_grad():
        stats = hf.token_metrics(*models, row)
    assert (stats.logp[0, 7:] - actual.logp[1]).abs().max() < 0.1


def test_compiled_models():
    pair = [hf_models.tiny_model("qwen3", seed=seed, num_hidden_layers=1) for seed in (0, 1)]
    inputs = padded(prompts(3, 8, 5))
    options = {**SAMPLING, "max_new_tokens": 5, "num_return_sequences": 2, "stop_token_ids": range(0, 160, 9)}
    expected = hf.generate(*pair, *inputs, **options)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = [torch.compile(pair[0], backend=counter, dynamic=True), pair[1]]
    assert_same(hf.generate(*compiled, *inputs, max_batch_size=4, **options), expected)
    assert counter.frame_count > 0, "what was compiled was not run"


def test_an_adapter_on_the_base_model(pair):
    peft = pytest.importorskip("peft")
    base_model = hf_models.tiny_model("qwen3")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(hf_models.tiny_model("qwen3"), config)
    rows = prompts(4, 7)
    actual = hf.generate(model, base_model, *padded(rows), max_new_tokens=6, stop_token_ids=(), **SAMPLING)
    model.eval()
    for row, prompt in enumerate(rows):
        assert_row(actual, row, slowly(model, base_model, prompt, row, (), 6, **SAMPLING))
    assert actual.delta_logp.abs().max() > 0.01


def test_a_warning_about_the_threshold_is_shown_once(pair):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        hf.generate(*pair, *padded(prompts(4)), max_new_tokens=4, criterion="delta_logp", threshold=0.5, seed=0)
    assert len([entry for entry in shown if "threshold is 0.5" in str(entry.message)]) == 1


def test_the_draft_alone_is_ordinary_sampling_of_the_rl_model(pair):
    """γ = 0 and no replacement: the draws of the draft stream from π_R, whatever the base model."""
    rows = prompts(4, 6)
    actual = hf.generate(
        *pair, *padded(rows), criterion="none", draft="rl", seed=3, max_new_tokens=6, stop_token_ids=()
    )
    seed, one = torch.tensor([3]), torch.ones(1, dtype=torch.int64)
    for row, prompt in enumerate(rows):
        tokens = prompt
        for step in range(6):
            with torch.no_grad():
                z = pair[0](input_ids=tokens[None]).logits[:, -1]
            token = reference_sample.draw(z, row * one, seed, step * one, reference_sample.DRAFT, 1.0, 0, 1.0, 0.0)
            assert int(actual.tokens[row, step]) == int(token)
            tokens = torch.cat([tokens, token])
    assert torch.equal(actual.tokens, actual.draft_tokens) and not actual.selected.any()


def test_greedy_is_greedy_generation_of_the_rl_model(pair):
    ids, mask = padded(prompts(4, 9, 6))
    stop = list(range(5, 160, 12))
    actual = hf.generate(*pair, ids, mask, temperature=0.0, seed=0, max_new_tokens=10, stop_token_ids=stop)
    expected = pair[0].generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=10, eos_token_id=stop, pad_token_id=0
    )[:, ids.shape[1] :]
    assert actual.tokens.shape == expected.shape
    inside = torch.arange(expected.shape[1]) < actual.lengths[:, None]
    assert torch.equal(actual.tokens.masked_fill(~inside, 0), expected)


def test_the_models_own_ends_stop_a_row_and_padding_follows(pair):
    models = [hf_models.tiny_model("qwen3", seed=seed, pad_token_id=7) for seed in (0, 1)]
    inputs = padded(prompts(5, 3, 8, 2))
    free = hf.generate(*models, *inputs, max_new_tokens=8, stop_token_ids=(), **SAMPLING)
    ends = [int(free.tokens[0, 2]), int(free.tokens[1, 4])]
    models[0].generation_config.eos_token_id = ends[:1]
    models[1].config.eos_token_id, models[1].generation_config.eos_token_id = ends[1], None
    actual = hf.generate(*models, *inputs, max_new_tokens=8, **SAMPLING)
    for row in range(4):
        at = [place for place, token in enumerate(free.tokens[row].tolist()) if token in ends]
        length = at[0] + 1 if at else 8
        assert int(actual.lengths[row]) == length and bool(actual.finished[row]) == bool(at)
        assert torch.equal(actual.tokens[row, :length], free.tokens[row, :length])
        assert (actual.tokens[row, length:] == 7).all() and (actual.draft_tokens[row, length:] == 7).all()


def test_padding_rows_of_a_vocabulary_are_never_drawn(pair):
    wide = hf_models.tiny_model("qwen3", vocab_size=hf_models.VOCABULARY + 24)
    for models in ((wide, pair[1]), (pair[0], wide)):
        actual = hf.generate(*models, *padded(prompts(4, 5)), max_new_tokens=20, temperature=5.0, seed=0)
        assert actual.tokens.max() < hf_models.VOCABULARY
    with pytest.raises(ValueError, match="vocabulary of 160 rows and model one of 2000"):
        hf.generate(
            hf_models.tiny_model("qwen3", vocab_size=2000), pair[1], prompts(4)[0][None], max_new_tokens=2, seed=0
        )
    with pytest.raises(IndexError, match=r"input_ids\[0, 1\] is 170"):
        hf.generate(wide, pair[1], torch.tensor([[5, 170]]), max_new_tokens=2, seed=0)


def test_training_mode_is_left_as_it_was_and_has_no_effect(pair):
    models = [hf_models.tiny_model("gpt2_tied", seed=seed, attn_pdrop=0.5, embd_pdrop=0.5) for seed in (0, 1)]
    inputs = padded(prompts(4, 6))
    expected = hf.generate(*models, *inputs, max_new_tokens=5, **SAMPLING)
    models[0].train()
    assert_same(hf.generate(*models, *inputs, max_new_tokens=5, **SAMPLING), expected)
    assert models[0].training and not models[1].training


def test_streamer_and_progress(pair):
    prompt = prompts(5)[0][None]
    streamer, steps = Recorder(), []
    actual = hf.generate(
        *pair, prompt, max_new_tokens=6, streamer=streamer, on_step=lambda *x: steps.append(x), **SAMPLING
    )
    assert streamer.ended == 1 and torch.equal(streamer.values[0], prompt)
    assert torch.equal(torch.cat(streamer.values[1:]), actual.tokens[0])
    selected = actual.selected[0].cumsum(0).tolist()
    assert steps == [(n + 1, selected[n], int(n == len(selected) - 1)) for n in range(len(selected))]
    with pytest.raises(ValueError, match="streamer is given with 2 rows"):
        hf.generate(*pair, prompt, max_new_tokens=6, num_return_sequences=2, streamer=Recorder(), **SAMPLING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_return_sequences": -1}, "num_return_sequences is -1"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"gamma": -0.1}, "gamma is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"criterion": "kl"}, "threshold is None"),
        ({"row_id": [1]}, "row_id has 1 numbers, expected 2"),
        ({"row_id": [1, 2**32]}, "row_id has 4294967296"),
        ({"stop_token_ids": [160]}, "stop_token_ids has 160"),
        ({"max_new_tokens": 62}, r"prompt 1 has 3 tokens, 65 .* expected at most 64, the context of model"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "prompt 1 has no tokens"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pair, options, message):
    arguments = {"max_new_tokens": 4, "seed": 0, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]), **options}
    calls = []
    handle = pair[0].register_forward_hook(lambda *x: calls.append(x))
    with pytest.raises(ValueError, match=message):
        hf.generate(*pair, torch.tensor([[3, 4, 5], [6, 7, 8]]), **arguments)
    handle.remove()
    assert not calls


def test_models_that_can_not_do_it_are_refused(pair):
    prompt = prompts(4)[0][None]
    with pytest.raises(TypeError, match="model is Linear"):
        hf.generate(torch.nn.Linear(2, 2), pair[1], prompt, max_new_tokens=2, seed=0)
    with pytest.raises(ValueError, match="encoder-decoder"):
        hf.generate(pair[0], hf_models.tiny_model("t5"), prompt, max_new_tokens=2, seed=0)
    with pytest.raises(ValueError, match="no key-value cache"):
        hf.generate(pair[0], hf_models.tiny_model("roberta_masked"), prompt, max_new_tokens=2, seed=0)
    with pytest.raises(IndexError, match=r"input_ids\[0, 1\] is 160"):
        hf.generate(*pair, torch.tensor([[5, 160]]), max_new_tokens=2, seed=0)


@pytest.mark.parametrize("which", [0, 1])
def test_logits_from_which_nothing_can_be_drawn(pair, which):
    models = [hf_models.tiny_model("qwen3", seed=seed) for seed in (0, 1)]
    free = hf.generate(*models, *padded(prompts(4, 6)), max_new_tokens=5, stop_token_ids=(), **SAMPLING)
    # From the token on that row 1 draws third, its hidden states are NaN.
    token = int(free.tokens[1, 2])
    assert token not in free.tokens[0, :2] and token not in free.tokens[1, :2]
    untied = models[which].get_input_embeddings()
    untied.weight = torch.nn.Parameter(untied.weight.clone())
    untied.weight.data[token] = torch.nan
    name = ("model", "base_model")[which]
    with pytest.raises(RuntimeError, match=f"row 1, step 3: {name} gives logits with NaN"):
        hf.generate(*models, *padded(prompts(4, 6)), max_new_tokens=5, stop_token_ids=(), **SAMPLING)


def test_the_demo_pair_solves_its_task():
    from dlogp_kernels.demo import task
    from dlogp_kernels.demo.generate import PAIR_DIRECTORY

    tokenizer = hf.load_tokenizer(PAIR_DIRECTORY / "rl")
    models = [hf.load_model(PAIR_DIRECTORY / name, dtype=torch.float32) for name in ("rl", "base")]
    problems = task.generate_problems(24, seed=9)
    encoded = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt")
    right = {}
    for criterion in ("none", "all"):
        result = hf.generate(*models, **encoded_inputs(encoded), criterion=criterion, seed=1, max_new_tokens=45)
        texts = [tokenizer.decode(row[:n]) for row, n in zip(result.tokens, result.lengths, strict=True)]
        right[criterion] = sum(map(task.is_correct, problems, texts))
        assert result.finished.float().mean() > 0.9
    assert right["all"] > right["none"]


def encoded_inputs(encoded) -> dict[str, Tensor]:
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
