"""ReweightedGRPOTrainer against formulas written out here: loss, gradients, what it logs, DAPO's sampling, errors."""

import warnings

import pytest

pytest.importorskip("trl")

import torch
import trl_runs
from hf_models import one_thread, tiny_model  # noqa: F401
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from dlogp_kernels.hf.tiny import load_local
from dlogp_kernels.trl import ReweightedGRPOConfig, complete_checkpoints
from dlogp_kernels.trl.rewards import checked, informative_groups, overlong_penalty
from dlogp_kernels.trl.rollouts import PromptOrder

ALPHA = 0.3


def rolled_out(tmp_path, **options):
    """A trainer with a batch of responses, drawn but not yet learned from, after two steps of training."""
    trainer = trl_runs.trainer(tmp_path, max_steps=2, **options)
    trainer.train()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    examples = [trainer.train_dataset[number] for number in (1, 4) for _ in range(4)]
    return trainer, trainer._generate_and_score_completions([dict(example) for example in examples])


def exact_logps(model, rollouts, temperature):
    """log p (B, T) in float64 from the logits of each row alone, without padding, and the mask."""
    mask = rollouts["completion_mask"].bool()
    rows = []
    for row in range(len(mask)):
        prompt = rollouts["prompt_ids"][row][rollouts["prompt_mask"][row].bool()]
        response = rollouts["completion_ids"][row][mask[row]]
        logits = model(torch.cat([prompt, response])[None]).logits[0].double() / temperature
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, response[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(logp, (0, mask.shape[1] - len(response))))
    return torch.stack(rows), mask


def expected_weight(reweight, p, mask):
    if reweight == "low_prob":
        return 1 + ALPHA * (1 - p)
    if reweight == "dominate":
        return ALPHA * p + 1 - ALPHA
    perplexity = -(p.log() * mask).sum(1) / mask.sum(1)
    groups = perplexity.view(-1, 4)
    s = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-6)
    return (1 - ALPHA * s).view(-1, 1).expand_as(p)


@pytest.mark.parametrize("reweight", ["low_prob", "dominate", "ppl"])
@pytest.mark.parametrize("sign", ["both", "positive"])
def test_loss_and_gradients_are_the_formula(tmp_path, reweight, sign):
    trainer, rollouts = rolled_out(
        tmp_path, reweight=reweight, reweight_alpha=ALPHA, reweight_sign=sign, dual_clip=1.5, temperature=0.8,
        epsilon_high=0.28, steps_per_generation=1, generation_batch_size=None, per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    model = trainer.model
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied: its gradient has two parts
    with torch.no_grad():
        old_logp, mask = exact_logps(model, rollouts, 0.8)
        # A policy that has moved on, so that ratios are clipped.
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rollouts["old_per_token_logps"] = old_logp.float()
    model.zero_grad()
    loss = trainer._compute_loss(model, rollouts)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    rewards = trainer._rewards[:, 0].double().view(2, 4)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    # What is a rounding in float64 is 0 in float32, or a rounding of the other sign.
    advantage = advantage.view(8, 1).masked_fill(advantage.view(8, 1).abs() < 1e-6, 0.0)
    weight = expected_weight(reweight, old_logp.exp(), mask)
    if sign == "positive":
        weight = torch.where(advantage > 0, weight, 1.0)
    model.zero_grad()
    ratio = (exact_logps(model, rollouts, 0.8)[0] - old_logp).exp()
    advantage = weight * advantage
    losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
    losses = torch.where(advantage < 0, torch.minimum(losses, -advantage * 1.5), losses)
    expected = (losses * mask).sum() / mask.sum()
    expected.backward()
    assert ((ratio < 0.8) & (advantage < 0) & mask).any() and ((ratio > 1.5) & (advantage < 0) & mask).any()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3), name
    logged = trainer._metrics["train"]
    shares = {"low_mean": (ratio < 0.8) & (advantage < 0), "high_mean": (ratio > 1.28) & (advantage > 0),
              "dual_mean": (ratio > 1.5) & (advantage < 0)}  # fmt: skip
    for name, clipped in shares.items():
        share = (clipped & mask).sum() / mask.sum()
        assert logged[f"clip_ratio/{name}"][-1] == pytest.approx(float(share), abs=1e-6), name
    mean_weight = (weight.expand_as(ratio) * mask).sum() / mask.sum()
    assert logged["reweight/mean_weight"][-1] == pytest.approx(float(mean_weight), abs=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
def test_delta_logp_is_to_the_start_of_training(tmp_path, adapters):
    peft = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_alpha=16) if adapters else None
    trainer, rollouts = rolled_out(
        tmp_path, peft=peft, learning_rate=3e-2, temperature=1.0, generation_batch_size=8, delta_logp_responses=5
    )
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    rollouts["start_per_token_logps"] = trainer._start_logps(rollouts, trainer._start)
    assert all(torch.equal(weights[name], parameter) for name, parameter in trainer.model.named_parameters())
    measured = ~rollouts["start_per_token_logps"].isnan().any(1)
    assert measured.tolist() == [True, False, True, False, True, True, False, True]
    with torch.no_grad():
        trainer._compute_loss(trainer.model, rollouts)
        start, mask = exact_logps(trl_runs.policy(), rollouts, 1.0)
        delta = (exact_logps(trainer.model, rollouts, 1.0)[0] - start)[measured][mask[measured]]
    expected = {
        "mean": delta.mean(), "min": delta.min(), "max": delta.max(),
        "below_-1": (delta < -1).double().mean(), "above_0.25": (delta > 0.25).double().mean(),
    }  # fmt: skip
    assert delta.abs().max() > 0.1
    for name, value in expected.items():
        assert trainer._metrics["train"][f"delta_logp/{name}"][-1] == pytest.approx(float(value), abs=1e-4), name


def test_delta_logp_begins_at_zero_and_can_be_left_out(tmp_path):
    trainer = trl_runs.trainer(tmp_path / "with", max_steps=3)
    trainer.train()
    first, *rest = trl_runs.logs(trainer)
    assert abs(first["delta_logp/mean"]) < 1e-6 and all(abs(entry["delta_logp/mean"]) > 1e-4 for entry in rest)
    without = trl_runs.trainer(tmp_path / "without", max_steps=3, delta_logp_responses=0)
    without.train()
    assert trl_runs.losses(without) == trl_runs.losses(trainer)
    assert not any("delta_logp/mean" in entry for entry in trl_runs.logs(without))


def test_a_gpt2_sees_left_padding_as_nothing(tmp_path):
    """Absolute positions: TRL counts the padding of a prompt, which generation does not."""
    trainer = trl_runs.trainer(tmp_path, tiny_model("gpt2_tied", seed=2, eos_token_id=2, bos_token_id=1), max_steps=1)
    trainer.model.train()
    examples = [trainer.train_dataset[number] for number in (1, 4) for _ in range(4)]
    rollouts = trainer._generate_and_score_completions(examples)
    assert not rollouts["prompt_mask"].all()
    trainer.model.eval()
    with torch.no_grad():
        expected, mask = exact_logps(trainer.model, rollouts, 1.0)
    logps = trainer._logps_without_gradient(rollouts)
    assert torch.allclose(logps[mask], expected[mask].float(), atol=1e-4)


@pytest.mark.parametrize(
    ("policy_dtype", "reference_dtype", "options"),
    [
        (torch.float32, torch.float32, {}),
        (torch.float32, torch.float32, {"cast_lm_head_to_fp32": True}),
        (torch.bfloat16, torch.bfloat16, {}),
        (torch.float32, torch.bfloat16, {"model_init_kwargs": {"dtype": "bfloat16"}}),
        (torch.float32, None, {"peft": LoraConfig(r=4, target_modules=["q_proj", "up_proj"])}),
    ],
    ids=["float32", "float32_head", "bfloat16", "two_dtypes", "adapters"],
)
def test_a_reference_model_in_mixed_precision(tmp_path, policy_dtype, reference_dtype, options):
    """accelerate prepares the reference: its forward then runs under autocast and returns float32."""
    model = AutoModelForCausalLM.from_pretrained(trl_runs.saved_policy(tmp_path / "model"), dtype=policy_dtype)
    trainer = trl_runs.trainer(tmp_path / "run", model, beta=0.1, bf16=True, **options)
    trainer.train()
    first, *rest = trl_runs.logs(trainer)
    if reference_dtype is not None:
        assert trainer.ref_model.model.layers[0].mlp.up_proj.weight.dtype == reference_dtype
    assert abs(first["delta_logp/mean"]) < 1e-2 and first["kl"] < 1e-2
    assert all(entry["entropy"] > 1.0 for entry in (first, *rest)) and rest[-1]["kl"] > first["kl"]


# DAPO's sampling


def some_prompts_alike(prompts, completion_ids, **_):
    """Responses to half of the prompts are all right, or all wrong."""
    rewards = trl_runs.even_words(prompts, completion_ids)
    numbers = [int(prompt.split()[1][1:]) for prompt in prompts]
    return [float(n % 4 == 0) if n % 2 == 0 else reward for n, reward in zip(numbers, rewards, strict=True)]


@pytest.mark.parametrize("reweight", ["low_prob", "ppl"])
def test_dynamic_sampling_drops_and_refills(tmp_path, reweight):
    seen = []

    def reward(prompts, completion_ids, **columns):
        seen.append([prompt for prompt in prompts[::4]])
        return some_prompts_alike(prompts, completion_ids)

    trainer = trl_runs.trainer(
        tmp_path, reward=reward, reweight=reweight, dynamic_sampling=True, max_steps=6, overlong_buffer=4
    )
    taught = []
    refilled = trainer._refilled
    trainer._refilled = lambda *arguments: taught.append(refilled(*arguments)) or taught[-1]
    trainer.train()
    assert len(taught) == 3 and any(len(prompts) == 1 for prompts in seen)
    for rollouts in taught:
        prompts = trainer.processing_class.batch_decode(rollouts["prompt_ids"], skip_special_tokens=True)
        assert len(prompts) == 8 and prompts[0] == prompts[3] and prompts[4] == prompts[7]
        assert all(int(prompt.split()[0][1:]) % 2 == 1 for prompt in prompts)
        assert rollouts["completion_mask"].any(1).all()
        assert int(rollouts["num_items_in_batch"]) == int(rollouts["completion_mask"].sum())
    entry = trl_runs.logs(trainer)
    dropped = [e["dynamic_sampling/dropped"] for e in entry if "dynamic_sampling/dropped" in e]
    drawn = sum(map(len, seen))
    assert dropped and 0 < max(dropped) < 1
    assert drawn > 6 and sum(e.get("dynamic_sampling/refills", 0) for e in entry) == len(seen) - 3


def test_groups_that_can_not_be_found_do_not_count(tmp_path):
    def reward(prompts, completion_ids, **_):
        rewards = trl_runs.even_words(prompts, completion_ids)
        return [r if prompt == prompts[0] and len(prompts) == 8 else 1.0 for prompt, r in zip(prompts, rewards)]  # noqa: B905

    trainer = trl_runs.trainer(tmp_path, reward=reward, dynamic_sampling=True, max_refills=2, max_steps=2)
    with pytest.warns(UserWarning, match="found 1 of 2 groups whose rewards differ after 2 refills"):
        trainer.train()
    masked = [int(rows["completion_mask"].any(1).sum()) for rows in trainer._buffered_inputs]
    assert sum(masked) == 4
    assert all(entry["grad_norm"] >= 0 for entry in trl_runs.logs(trainer))


def test_no_group_at_all_leaves_the_weights(tmp_path):
    trainer = trl_runs.trainer(
        tmp_path, reward=lambda prompts, **_: [1.0] * len(prompts), dynamic_sampling=True, max_refills=1, max_steps=2
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.warns(UserWarning, match="found 0 of 2 groups"):
        trainer.train()
    assert trl_runs.losses(trainer) == [0.0, 0.0]
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


def test_informative_groups():
    nan = float("nan")
    rewards = torch.tensor(
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [nan, nan], [2.0, nan], [nan, nan], [nan, nan]]
    )
    assert informative_groups(rewards, torch.tensor([1.0, 1.0]), 2).tolist() == [False, True, False, False]
    assert informative_groups(rewards, torch.tensor([1.0, 0.5]), 4).tolist() == [True, False]


def test_overlong_penalty_is_that_of_dapo(tmp_path):
    penalty = overlong_penalty(10, 4, 0.5)
    assert penalty(completion_ids=[[0] * n for n in range(1, 11)]) == [0] * 6 + [-0.125, -0.25, -0.375, -0.5]
    lengths = []

    def reward(completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [None if len(ids) < 8 else 1.0 for ids in completion_ids]

    trainer = trl_runs.trainer(
        tmp_path, reward=reward, overlong_buffer=8, overlong_penalty=2.0, reward_weights=[3.0], max_steps=2
    )
    trainer.train()
    # Responses without a score have no penalty either.
    scored = [length for length in lengths if length == 8]
    assert len(scored) < len(lengths)
    assert trl_runs.logs(trainer)[0]["rewards/overlong_penalty/mean"] == pytest.approx(-2.0)
    assert trl_runs.logs(trainer)[0]["reward"] == pytest.approx(3.0 - 2.0)


def test_an_order_of_prompts_takes_each_once_and_goes_on_where_it_was():
    order, other = PromptOrder(5, seed=1), PromptOrder(5, seed=1)
    taken = order.take(12)
    assert sorted(taken[:5]) == sorted(taken[5:10]) == [0, 1, 2, 3, 4] and taken[:5] != taken[5:10]
    other.position = 7
    assert other.take(5) == taken[7:]
    assert PromptOrder(5, seed=2).take(10) != taken[:10]


def test_rollout_seed_gives_the_same_responses_in_any_batch(tmp_path):
    runs = []
    for name, batches in (("one", {}), ("two", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})):
        whole = {"per_device_train_batch_size": 8} | batches
        trainer = trl_runs.trainer(tmp_path / name, rollout_seed=7, max_steps=4, reweight="dominate", **whole)
        trainer.train()
        runs.append(trainer)
    assert trl_runs.losses(runs[0]) == pytest.approx(trl_runs.losses(runs[1]), abs=1e-5)
    other = trl_runs.trainer(tmp_path / "other", rollout_seed=8, max_steps=1, per_device_train_batch_size=8)
    other.train()
    assert trl_runs.losses(other)[0] != trl_runs.losses(runs[0])[0]


# Checkpoints


@pytest.mark.parametrize(
    "options",
    [{}, {"dynamic_sampling": True, "rollout_seed": 1, "num_iterations": 2, "beta": 0.1}],
    ids=["trl", "dapo"],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, options):
    directory = trl_runs.saved_policy(tmp_path / "model")

    def new(name):
        # Twice through the data set; a batch of responses lasts two or four steps, a checkpoint comes every third.
        return trl_runs.trainer(
            tmp_path / name, directory, some_prompts_alike, max_steps=14, save_strategy="steps", save_steps=3, **options
        )

    whole = new("whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.train()
        for stop, start in ((5, None), (10, 3)):
            killed = new("killed")
            killed.add_callback(trl_runs.StopAt(stop))
            with pytest.raises(KeyboardInterrupt):
                killed.train(resume_from_checkpoint=None if start is None else True)
        resumed = new("killed")
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 14
    assert trl_runs.losses(resumed) == trl_runs.losses(whole)
    for (name, weight), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other), name
    # Δlog p is to the start of the training, not of the process.
    last, expected = trl_runs.logs(resumed)[-1], trl_runs.logs(whole)[-1]
    assert last["delta_logp/mean"] == pytest.approx(expected["delta_logp/mean"], abs=1e-6) != 0.0


# Errors


def raising(prompts, **_):
    raise KeyError("no such answer")


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (raising, RuntimeError, "the reward function raising raised KeyError: 'no such answer'"),
        (lambda **_: None, TypeError, "the reward function <lambda> returned None, expected a list of 8 rewards"),
        (lambda **_: 1.0, TypeError, "returned 1.0, expected a list of 8"),
        (lambda prompts, **_: [1.0] * 7, ValueError, "returned 7 rewards, expected 8"),
        (lambda prompts, **_: [1.0] * 7 + ["yes"], ValueError, "returned 'yes' for response 7, expected a finite"),
        (lambda prompts, **_: [float("nan")] * 8, ValueError, "returned nan for response 0"),
    ],
)
def test_a_reward_function_that_fails_is_named(reward, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        checked(reward)(prompts=["p"] * 8, completions=["c"] * 8)


def test_a_trainer_names_the_reward_function_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match="the reward function raising raised KeyError: 'no such answer'"):
        trl_runs.trainer(tmp_path, reward=raising).train()
    with pytest.raises(ValueError, match="returned 7 rewards, expected 8"):
        trl_runs.trainer(tmp_path, reward=[trl_runs.even_words, lambda prompts, **_: [1.0] * 7]).train()


def test_kinds_of_reward_functions(tmp_path):
    numpy = pytest.importorskip("numpy")

    class Callable:
        def __call__(self, prompts, **_):
            return numpy.arange(len(prompts)) % 2

    async def slowly(prompts, **_):
        return [None if n == 3 else torch.tensor(0.5) for n in range(len(prompts))]

    trainer = trl_runs.trainer(tmp_path, reward=[Callable(), slowly, trl_runs.even_words], max_steps=2)
    trainer.train()
    first = trl_runs.logs(trainer)[0]
    assert first["rewards/Callable/mean"] == first["rewards/slowly/mean"] == 0.5
    assert checked(trl_runs.even_words).__name__ == "even_words"


def test_responses_without_a_reward_teach_nothing(tmp_path):
    trainer = trl_runs.trainer(tmp_path, reward=lambda prompts, **_: [None] * len(prompts), max_steps=2)
    trainer.train()
    assert trl_runs.losses(trainer) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reweight": "high_prob"}, "reweight is 'high_prob', expected one of low_prob"),
        ({"reweight_sign": "minus"}, "reweight_sign is 'minus', expected one of both"),
        ({"reweight_alpha": -0.1}, "reweight_alpha is -0.1, expected a finite number ≥ 0"),
        ({"loss_type": "vespo"}, "loss_type is 'vespo', expected one of dapo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word', expected one of token, sequence"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0, expected a number > 1"),
        ({"dual_clip": 3.0, "delta": 2.0}, "dual_clip and delta are both given"),
        ({"delta": 1.1}, "delta is 1.1, expected at least 1"),
        ({"overlong_buffer": 9}, "overlong_buffer is 9, expected 0 to max_completion_length"),
        ({"max_refills": -1}, "max_refills is -1, expected a number ≥ 0"),
        ({"use_adaptive_entropy": True, "entropy_coef": 0.1}, "use_adaptive_entropy is True, expected False"),
        ({"rollout_seed": -1}, "rollout_seed is -1, expected an integer"),
        ({"rollout_seed": 1, "repetition_penalty": 1.1}, "rollout_seed is given together with repetition_penalty"),
    ],
)
def test_options_that_can_not_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ReweightedGRPOConfig(**trl_runs.options(tmp_path, **options))


def test_what_is_not_supported_says_so(tmp_path):
    from trl import GRPOConfig

    from dlogp_kernels.trl import ReweightedGRPOTrainer

    with pytest.raises(TypeError, match="args is GRPOConfig, expected a ReweightedGRPOConfig"):
        ReweightedGRPOTrainer(trl_runs.policy(), trl_runs.even_words, GRPOConfig(**trl_runs.options(tmp_path)))
    # Its last layer can not be both trained by an adapter and read as one weight.
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trl_runs.trainer(tmp_path, trl_runs.policy(tie_word_embeddings=False), peft=lora)
    experts = tiny_model("qwen3_moe", eos_token_id=2, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0\.1, expected 0"):
        trl_runs.trainer(tmp_path, experts)
    trl_runs.trainer(tmp_path, experts, router_aux_loss_coef=0.0, max_steps=1).train()


def test_checkpoints_that_were_not_written_to_their_end_do_not_count(tmp_path):
    trainer = trl_runs.trainer(tmp_path, trl_runs.policy(), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    whole = {step: tmp_path / f"checkpoint-{step}" for step in (1, 2)}
    assert complete_checkpoints(tmp_path) == whole
    (whole.pop(2) / "rollouts_0.pt").unlink()  # the file that is written last
    assert complete_checkpoints(str(tmp_path)) == whole


def test_the_trained_model_is_saved_as_it_was_loaded(tmp_path):
    trainer = trl_runs.trainer(tmp_path / "run", trl_runs.saved_policy(tmp_path / "model"), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    model, tokenizer = load_local(tmp_path / "trained")
    ids = torch.tensor([tokenizer.encode(trl_runs.PROMPTS[0])])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trainer.model(ids).logits)
        assert model(ids).logits.shape == (1, ids.shape[1], 32)
