"""One run: the demo's base model trained with one method and seed, then graded on held-out problems."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from dlogp_kernels.demo import task
from dlogp_kernels.demo.generate import PAIR_DIRECTORY
from dlogp_kernels.demo.train_pair import answer_rewards
from dlogp_kernels.hf import generate
from dlogp_kernels.hf.tiny import PreTrainedModel, PreTrainedTokenizerFast, load_local
from dlogp_kernels.trl import ReweightedGRPOConfig, ReweightedGRPOTrainer

from . import lemma
from .options import METHODS

_CLIP_LOW, _CLIP_HIGH, _DUAL_CLIP = 0.2, 0.28, 10.0
#: All models are graded on the same problems with the same noise.
_EVALUATION_SEED = 4
_EVALUATION_ROWS = 256
#: The entries of TRL's log that a run keeps, by the names they get.
_CURVES = {
    "reward": "accuracy",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "clip_ratio/region_mean": "clipped",
    "reweight/mean_weight": "mean_weight",
    "delta_logp/below_-1": "delta_logp_below_-1",
}


@dataclass(frozen=True)
class Budget:
    """What every run has: as the demo's RL model was trained, with half the samples of a prompt and a dual clip.

    Args:
        rollouts: batches of `prompts_per_rollout` × `samples_per_prompt` responses; each is spent in `minibatches`
            optimiser steps. No prompt comes twice.
        num_problems, samples_per_problem: of the evaluation, at temperature 1.
        lemma_every: Lemma 3.1 is looked at in the last optimiser step of every so many rollouts.
    """

    rollouts: int
    prompts_per_rollout: int = 16
    samples_per_prompt: int = 8
    minibatches: int = 2
    learning_rate: float = 2e-4
    warmup_steps: int = 5
    num_problems: int = 1000
    samples_per_problem: int = 4
    lemma_every: int = 7


def settings(method: str, seed: int, budget: Budget) -> dict[str, Any]:
    """What a run is told apart by."""
    return {"method": method, "alpha": METHODS[method], "seed": seed, **dataclasses.asdict(budget)}


def train(method: str, seed: int, budget: Budget) -> dict[str, Any]:
    """Train and grade: settings, `curves` over rollouts, `lemma`, `evaluation`, `seconds`."""
    started = time.monotonic()
    model, tokenizer = load_local(PAIR_DIRECTORY / "base")
    problems = task.generate_problems(budget.rollouts * budget.prompts_per_rollout, seed, "reinforcement")

    def answer_reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return answer_rewards(prompts, tokenizer.batch_decode(completion_ids, skip_special_tokens=False))

    with tempfile.TemporaryDirectory() as scratch:
        trainer = _Trainer(
            model,
            reward_funcs=answer_reward,
            args=_config(method, seed, budget, scratch),
            train_dataset=Dataset.from_dict({"prompt": [problem.prompt for problem in problems]}),
            processing_class=tokenizer,
        )
        trainer.check_every = budget.lemma_every * budget.minibatches
        trainer.train()
    trained = time.monotonic()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        **settings(method, seed, budget),
        "curves": {
            "rollout": [entry["step"] // budget.minibatches for entry in logged],
            **{
                name: [round(entry[key], 6) for entry in logged]
                for key, name in _CURVES.items()
                if all(key in entry for entry in logged)
            },
        },
        "lemma": [{"step": step, **found._asdict()} for step, found in trainer.found.items()],
        "evaluation": evaluate(model, tokenizer, budget),
        "seconds": {"training": round(trained - started, 1), "all": round(time.monotonic() - started, 1)},
    }


def evaluate_base(budget: Budget) -> dict[str, Any]:
    """The evaluation of the model that every run starts from."""
    return evaluate(*load_local(PAIR_DIRECTORY / "base"), budget)


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, budget: Budget) -> dict[str, Any]:
    """avg@k and pass@k on held-out problems, k all samples of a problem; `correct` is a digit for each."""
    problems = task.generate_problems(budget.num_problems, _EVALUATION_SEED, "held_out")
    encoded = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt")
    samples = budget.samples_per_problem
    drawn = generate(
        model,
        model,
        encoded.input_ids,
        encoded.attention_mask,
        criterion="none",
        draft="rl",
        seed=_EVALUATION_SEED,
        max_new_tokens=task.MAX_RESPONSE_WORDS,
        num_return_sequences=samples,
        max_batch_size=_EVALUATION_ROWS,
    )
    texts = [
        str(tokenizer.decode(tokens[:length], skip_special_tokens=False))
        for tokens, length in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
    ]
    correct = [
        sum(task.is_correct(problem, text) for text in texts[row * samples : (row + 1) * samples])
        for row, problem in enumerate(problems)
    ]
    return {
        "avg": sum(correct) / len(texts),
        "pass": sum(count > 0 for count in correct) / len(problems),
        "mean_length": drawn.lengths.double().mean().item(),
        "jumps_per_response": sum(text.split().count(task.JUMP) for text in texts) / len(texts),
        "correct": "".join(map(str, correct)),
    }


class _Trainer(ReweightedGRPOTrainer):
    """Also looks at Lemma 3.1 in some steps, before they are done; `found` by step."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.check_every = 0
        self.found: dict[int, lemma.Lemma] = {}

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        step = self.state.global_step + 1
        if step % self.check_every == 0:
            self.found[step] = self._check_lemma(model, inputs)
        return super()._compute_loss(model, inputs)

    def _check_lemma(self, model: Any, inputs: dict[str, torch.Tensor]) -> lemma.Lemma:
        target, mask = inputs["completion_ids"], inputs["completion_mask"]
        with torch.no_grad():
            logits = model(
                torch.cat([inputs["prompt_ids"], target], 1), torch.cat([inputs["prompt_mask"], mask], 1)
            ).logits
        args = self.args
        assert args.epsilon_high is not None and args.dual_clip is not None
        return lemma.check(
            # Position t of the logits is about token t + 1.
            logits[:, -target.shape[1] - 1 : -1],
            target,
            inputs["old_per_token_logps"],
            inputs["advantages"],
            mask,
            # The trainer has it in the advantages already.
            reweight="none" if args.reweight == "ppl" else args.reweight,
            alpha=args.reweight_alpha,
            clip_low=args.epsilon,
            clip_high=args.epsilon_high,
            dual_clip=args.dual_clip,
        )


def _config(method: str, seed: int, budget: Budget, directory: str) -> ReweightedGRPOConfig:
    samples = budget.prompts_per_rollout * budget.samples_per_prompt
    return ReweightedGRPOConfig(
        output_dir=directory,
        seed=seed,
        # The same noise for all methods: their first rollouts are the same responses.
        rollout_seed=seed,
        reweight=method,
        reweight_alpha=METHODS[method],
        dual_clip=_DUAL_CLIP,
        epsilon=_CLIP_LOW,
        epsilon_high=_CLIP_HIGH,
        beta=0.0,
        loss_type="dapo",
        max_steps=budget.rollouts * budget.minibatches,
        per_device_train_batch_size=samples // budget.minibatches,
        generation_batch_size=samples,
        num_generations=budget.samples_per_prompt,
        max_completion_length=task.MAX_RESPONSE_WORDS,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=budget.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=budget.warmup_steps,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=budget.minibatches,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
    )
