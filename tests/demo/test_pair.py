"""The demo pair: its task, its tokenizer, the trained models that come with the package, and their script."""

import inspect
import json
import random
import re
from collections import Counter

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlogp_kernels.demo import task
from dlogp_kernels.demo.generate import (
    PAIR_DIRECTORY,
    accuracy,
    generate_responses,
    response_rows,
    write_jsonl,
)
from dlogp_kernels.demo.train_pair import answer_rewards, response_delta_logp, train_pair
from dlogp_kernels.hf.tiny import load_local, save_local, tiny_qwen3, word_tokenizer
from dlogp_kernels.trl import grpo_trainer, sft_trainer

STEP = re.compile(r"(so|then|now|next) (?P<letter>[a-f]) (?P<expression>\d [-+*] \d) = (?P<result>\d) ")
JUMP = re.compile(r"jump (?P<letter>[a-f]) (?P<next_letter>[a-f]) = (?P<result>\d) ")
FAULTLESS = task.Demonstrator(slip_probability={"+": 0.0, "-": 0.0, "*": 0.0}, jump_accuracy=1.0)


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def pair():
    base, tokenizer = load_local(PAIR_DIRECTORY / "base")
    rl, _ = load_local(PAIR_DIRECTORY / "rl")
    return base, rl, tokenizer


@pytest.fixture(scope="module")
def metadata():
    return json.loads((PAIR_DIRECTORY / "metadata.json").read_text())


@pytest.fixture(scope="module")
def responses(pair):
    base, rl, tokenizer = pair
    problems = task.generate_problems(300, seed=12_345)
    return {
        "base": generate_responses(base, tokenizer, problems, seed=1),
        "rl": generate_responses(rl, tokenizer, problems, seed=1),
    }


def chained_value(prompt: str, letters: str, start: int) -> int:
    """The operations of these letters applied to `start`, in integers without any reduction."""
    operations = dict(re.findall(r"([a-f]) ([-+*] \d)", prompt))
    value = start
    for letter in letters:
        value = eval(f"({value}) {operations[letter]}")
    return value


def walk(prompt: str, response: str):
    """Yields (kind, letter's symbol, what is right, what is written) of each step, checking the grammar."""
    state = int(prompt.split()[1])
    position, letters = 0, list(task.LETTERS)
    while match := STEP.match(response, position) or JUMP.match(response, position):
        position, groups = match.end(), match.groupdict()
        consumed = groups["letter"] + groups.get("next_letter", "")
        assert list(consumed) == letters[: len(consumed)]
        letters = letters[len(consumed) :]
        symbol = re.search(rf"{consumed[0]} ([-+*]) ", prompt)[1]
        expected = chained_value(prompt, consumed, state) % 10
        if "expression" in groups:
            assert eval(groups["expression"]) % 10 == expected
            assert groups["expression"].startswith(str(state))
        yield "step" if "expression" in groups else "jump", symbol, expected, int(groups["result"])
        state = int(groups["result"])
    assert letters == []
    assert response[position:] == f"# {state} <eos>"


def test_answer_agrees_with_integer_arithmetic():
    for problem in task.generate_problems(500, seed=3):
        assert problem.answer == chained_value(problem.prompt, task.LETTERS, problem.start) % 10
        assert task.parse_prompt(problem.prompt) == problem
        assert len(problem.prompt.split()) == 3 + 3 * task.NUM_OPERATIONS


def test_problems_are_seeded_and_splits_are_disjoint():
    problems = task.generate_problems(200, seed=3)
    assert problems == task.generate_problems(200, seed=3)
    others = [task.generate_problems(200, seed=4), task.generate_problems(200, 3, "supervised")]
    assert all(set(problems).isdisjoint(other) for other in others)
    operations = Counter(operation for problem in problems for operation in problem.operations)
    assert set(operations) == {
        *(task.Operation(symbol, operand) for symbol in "+-" for operand in range(1, 10)),
        *(task.Operation("*", operand) for operand in (3, 7, 9)),
    }


@pytest.mark.parametrize("prompt", ["<bos> 4 a - 3", "<bos> 4 b - 3 <sep>", "4 a - 3 <sep>", "<bos> 4 a - <sep>"])
def test_a_malformed_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt"):
        task.parse_prompt(prompt)


def test_every_operation_is_a_bijection():
    for symbol, operands in task.OPERANDS.items():
        for operand in operands:
            assert len({task.Operation(symbol, operand)(state) for state in range(10)}) == 10


def test_faultless_demonstrations_are_correct():
    rng = random.Random(0)
    for problem in task.generate_problems(300, seed=5):
        response = FAULTLESS.respond(problem, rng)
        assert all(expected == written for _, _, expected, written in walk(problem.prompt, response))
        assert task.is_correct(problem, response)
        assert len(response.split()) <= task.MAX_RESPONSE_WORDS


def test_demonstrations_err_at_the_stated_rates():
    demonstrator, rng = task.Demonstrator(), random.Random(0)
    steps = [
        step
        for problem in task.generate_problems(3_000, seed=6)
        for step in walk(problem.prompt, demonstrator.respond(problem, rng))
    ]
    jumps = [expected == written for kind, _, expected, written in steps if kind == "jump"]
    assert_share(sum(jumps), len(jumps), demonstrator.jump_accuracy)
    for symbol, probability in demonstrator.slip_probability.items():
        errors = [
            (written - expected) % 10
            for kind, operation, expected, written in steps
            if kind == "step" and operation == symbol
        ]
        assert set(errors) == {0, 1, 9}
        assert_share(sum(error != 0 for error in errors), len(errors), probability)


def assert_share(count: int, total: int, probability: float) -> None:
    standard_error = (probability * (1 - probability) / total) ** 0.5
    assert count / total == pytest.approx(probability, abs=5 * standard_error)


def test_only_the_final_answer_decides():
    problem = task.generate_problems(1, seed=7)[0]
    right, wrong = problem.answer, (problem.answer + 1) % 10
    assert task.is_correct(problem, f"# {right} <eos>")
    assert task.is_correct(problem, f"so a 1 + 1 = 9 # {wrong} # {right} <eos>")
    for response in (
        "",
        f"# {wrong} <eos>",
        f"# {right}",
        f"{right} <eos>",
        f"# {right} <eos> so",
        "# <eos>",
    ):
        assert not task.is_correct(problem, response)
    assert answer_rewards([problem.prompt] * 2, [f"# {wrong} <eos>", f"# {right} <eos>"]) == [0.0, 1.0]


def test_tokenizer_survives_auto_tokenizer(tmp_path):
    tokenizer = word_tokenizer(task.WORDS)
    save_local(tiny_qwen3(len(tokenizer), num_layers=1), tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    rng = random.Random(0)
    problems = task.generate_problems(100, seed=8)
    texts = [f"{problem.prompt}{task.Demonstrator().respond(problem, rng)}" for problem in problems]
    texts += ["<sep>so<eos>", " 1  +\n1 ", "jump<pad><pad> = 3", ""]
    assert [loaded.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == tokenizer.padding_side == "left"
    for _ in range(100):
        ids = [rng.randrange(len(tokenizer)) for _ in range(50)]
        assert loaded.encode(loaded.decode(ids)) == ids


def test_tokenizer_counts_words_and_refuses_others():
    tokenizer = word_tokenizer(task.WORDS)
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id]
    assert special == [0, 1, 2, 3]
    assert tokenizer.encode("0 f <sep>") == [4, len(tokenizer) - 1, 3]
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("hello")
    with pytest.raises(ValueError, match="each word once"):
        word_tokenizer(["one", "one"])
    with pytest.raises(ValueError, match="white space"):
        word_tokenizer(["one two"])


def test_shipped_files_are_small_and_safe():
    files = [path for path in PAIR_DIRECTORY.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert {path.name for path in PAIR_DIRECTORY.iterdir()} == {"base", "rl", "metadata.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (PAIR_DIRECTORY / "base" / name).read_bytes() == (PAIR_DIRECTORY / "rl" / name).read_bytes()


@pytest.mark.parametrize("source", ["base", "rl"])
def test_shipped_models_load_through_auto_classes(source):
    directory = PAIR_DIRECTORY / source
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert model.config.model_type == "qwen3"
    assert model.config.use_cache
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 4 + len(task.WORDS)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_rl_is_clearly_better_than_base(responses, metadata):
    (base, base_error), (rl, rl_error) = (accuracy(responses[source]) for source in ("base", "rl"))
    assert rl - base > 5 * (base_error**2 + rl_error**2) ** 0.5
    for source, mean, error in (("base", base, base_error), ("rl", rl, rl_error)):
        stated = metadata[source]
        assert mean == pytest.approx(stated["accuracy"], abs=5 * (error + stated["standard_error"]))


def test_delta_logp_has_opposite_tails(pair, responses, metadata):
    base, rl, _ = pair
    lowered = {
        source: (response_delta_logp(rl, base, responses[source]) < -1).double().mean().item()
        for source in ("base", "rl")
    }
    assert lowered["base"] > 3 * lowered["rl"]
    for source, share in lowered.items():
        assert share == pytest.approx(metadata[source]["share_delta_logp_below_-1.0"], abs=0.01)
    above = "share_delta_logp_above_0.25"
    assert metadata["rl"][above] > metadata["base"][above]


def test_response_delta_logp_agrees_with_one_response_at_a_time(pair, responses):
    base, rl, _ = pair
    chosen = sorted(responses["base"], key=lambda response: len(response.token_ids))[::60]
    assert len({len(response.token_ids) for response in chosen}) > 2

    def logp(model, response):
        ids = torch.tensor([response.prompt_ids + response.token_ids])
        logp_all = model(ids).logits.double().log_softmax(-1)
        return logp_all[0, :-1].gather(1, ids[0, 1:, None])[len(response.prompt_ids) - 1 :, 0]

    with torch.inference_mode():
        expected = torch.cat([logp(rl, response) - logp(base, response) for response in chosen])
        found = response_delta_logp(rl, base, chosen, batch_size=3)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def test_metadata_is_consistent(metadata):
    demonstrator = task.Demonstrator()
    assert metadata["demonstrator"]["jump_probability"] == demonstrator.jump_probability
    assert metadata["demonstrator"]["jump_accuracy"] == demonstrator.jump_accuracy
    assert metadata["demonstrator"]["slip_probability"] == demonstrator.slip_probability
    defaults = {name: value.default for name, value in inspect.signature(train_pair).parameters.items()}
    assert metadata["seed"] == defaults["seed"]
    assert metadata["num_problems"] == defaults["num_held_out"] >= 1_000
    assert metadata["sft"]["steps"] == defaults["sft_steps"]
    assert metadata["grpo"]["rollouts"] == defaults["rollouts"]
    assert 0.15 < metadata["base"]["accuracy"] < 0.4
    for source in ("base", "rl"):
        mean = metadata[source]["accuracy"]
        expected = (mean * (1 - mean) / metadata["num_problems"]) ** 0.5
        assert metadata[source]["standard_error"] == pytest.approx(expected, abs=1e-4)
    assert {"torch", "transformers", "trl"} <= set(metadata["versions"])
    assert metadata["seconds"]["total"] < 20 * 60


def test_written_responses_encode_to_the_sampled_ids(pair, responses, tmp_path):
    _, _, tokenizer = pair
    path = tmp_path / "responses.jsonl"
    write_jsonl(path, [row for source in ("base", "rl") for row in response_rows(responses[source], source)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 600
    for row, response in zip(rows, responses["base"] + responses["rl"], strict=True):
        assert set(row) == {"id", "source", "prompt", "response", "correct"}
        assert tuple(tokenizer.encode(row["prompt"])) == response.prompt_ids
        assert tuple(tokenizer.encode(row["response"])) == response.token_ids
        assert tuple(tokenizer.encode(row["prompt"] + " " + row["response"])) == (
            response.prompt_ids + response.token_ids
        )
        assert row["correct"] == task.is_correct(response.problem, row["response"])
        ended = response.token_ids.count(tokenizer.eos_token_id) == 1
        assert ended or len(response.token_ids) == task.MAX_RESPONSE_WORDS


def test_generation_is_seeded_and_leaves_the_global_state(pair):
    base, _, tokenizer = pair
    problems = task.generate_problems(20, seed=9)
    state = torch.random.get_rng_state()
    first = generate_responses(base, tokenizer, problems, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate_responses(base, tokenizer, problems, seed=1) == first
    assert generate_responses(base, tokenizer, problems, seed=2) != first
    greedy = generate_responses(base, tokenizer, problems, seed=1, temperature=0.0)
    assert generate_responses(base, tokenizer, problems, seed=2, temperature=0.0, batch_size=7) == greedy


def test_generation_pads_prompts_of_different_lengths(pair):
    base, _, tokenizer = pair
    whole = task.generate_problems(1, seed=10)[0]
    short = task.Problem(whole.start, whole.operations[:4])
    together = generate_responses(base, tokenizer, [short, whole], seed=0, temperature=0.0)
    alone = [generate_responses(base, tokenizer, [problem], seed=0, temperature=0.0)[0] for problem in (short, whole)]
    assert together == alone


def test_supervised_loss_covers_the_response_alone(tmp_path):
    tokenizer = word_tokenizer(task.WORDS)
    problems, rng = task.generate_problems(8, seed=11), random.Random(0)
    demonstrations = [task.Demonstrator().respond(problem, rng) for problem in problems]
    trainer = sft_trainer(
        tiny_qwen3(len(tokenizer), num_layers=1, eos_token_id=tokenizer.eos_token_id),
        tokenizer,
        [problem.prompt for problem in problems],
        demonstrations,
        output_dir=tmp_path,
        steps=1,
        batch_size=8,
        learning_rate=1e-3,
        warmup_steps=1,
        min_learning_rate_ratio=0.1,
        seed=0,
        show_progress=False,
    )
    labels = {tuple(label for label in row["labels"] if label != -100) for row in trainer.train_dataset}
    assert labels == {tuple(tokenizer.encode(text)) for text in demonstrations}


def test_reinforcement_moves_the_weights_towards_reward(pair, tmp_path):
    model, tokenizer = load_local(PAIR_DIRECTORY / "base")
    problems = task.generate_problems(4, seed=0, split="reinforcement")
    seen = []

    def reward(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return answer_rewards(prompts, responses)

    grpo_trainer(
        model,
        tokenizer,
        [problem.prompt for problem in problems],
        reward,
        output_dir=tmp_path,
        rollouts=1,
        prompts_per_rollout=4,
        samples_per_prompt=8,
        minibatches=2,
        max_response_tokens=task.MAX_RESPONSE_WORDS,
        learning_rate=1e-4,
        warmup_steps=0,
        seed=0,
        show_progress=False,
    ).train()
    assert Counter(prompt for prompt, _ in seen) == {problem.prompt: 8 for problem in problems}
    assert any(response.endswith(" <eos>") for _, response in seen)
    before = dict(pair[0].named_parameters())
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    with pytest.raises(ValueError, match="divisor of 32"):
        grpo_trainer(
            model,
            tokenizer,
            [],
            reward,
            output_dir=tmp_path,
            rollouts=1,
            prompts_per_rollout=4,
            samples_per_prompt=8,
            minibatches=3,
            max_response_tokens=1,
            learning_rate=1e-4,
            warmup_steps=0,
            seed=0,
        )


def test_the_script_runs_in_miniature(tmp_path):
    result = train_pair(
        tmp_path,
        seed=1,
        num_demonstrations=32,
        sft_steps=2,
        sft_batch_size=8,
        rollouts=1,
        prompts_per_rollout=2,
        samples_per_prompt=4,
        num_held_out=8,
        show_progress=False,
    )
    assert json.loads((tmp_path / "metadata.json").read_text()) == result
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {path.relative_to(PAIR_DIRECTORY) for path in PAIR_DIRECTORY.rglob("*") if path.is_file()}
    for source in ("base", "rl"):
        AutoModelForCausalLM.from_pretrained(tmp_path / source, local_files_only=True, use_safetensors=True)
        AutoTokenizer.from_pretrained(tmp_path / source, local_files_only=True)
