"""One run: the demo's base model trained with one method and seed, then graded on held-out problems."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

from ...hf import generate
from ...hf.tiny import PreTrainedModel, PreTrainedTokenizerFast, load_local
from ...trl import ReweightedGRPOTrainer, grpo_trainer
from .. import task
from ..generate import PAIR_DIRECTORY
from ..train_pair import answer_rewards
from . import lemma

#: By α. `none` is DAPO. The others share one α and none was tuned: `low_prob` weighs 1 to 1.2, `dominate` 0.8 to 1.
METHODS = {"none": 0.0, "low_prob": 0.2, "dominate": 0.2, "ppl": 0.2}
_DUAL_CLIP = 10.0
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

    with tempfile.TemporaryDirectory() as scratch:
        trainer = grpo_trainer(
            model,
            tokenizer,
            [problem.prompt for problem in problems],
            answer_rewards,
            output_dir=scratch,
            rollouts=budget.rollouts,
            prompts_per_rollout=budget.prompts_per_rollout,
            samples_per_prompt=budget.samples_per_prompt,
            minibatches=budget.minibatches,
            max_response_tokens=task.MAX_RESPONSE_WORDS,
            learning_rate=budget.learning_rate,
            warmup_steps=budget.warmup_steps,
            seed=seed,
            reweight=method,
            reweight_alpha=METHODS[method],
            # The same noise for all methods: their first rollouts are the same responses.
            rollout_seed=seed,
            dual_clip=_DUAL_CLIP,
        )
        lemmas = _check_lemma_while_training(trainer, every=budget.lemma_every * budget.minibatches)
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
        "lemma": [{"step": step, **found._asdict()} for step, found in lemmas.items()],
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


def _check_lemma_while_training(trainer: ReweightedGRPOTrainer, every: int) -> dict[int, lemma.Lemma]:
    """Lemma 3.1 by optimiser step, looked at before every so many steps; it fills while `trainer` trains."""
    found: dict[int, lemma.Lemma] = {}
    compute_loss = trainer._compute_loss

    def compute_and_check(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        step = trainer.state.global_step + 1
        if step % every == 0:
            found[step] = _check_lemma(trainer.args, model, inputs)
        return compute_loss(model, inputs)

    trainer._compute_loss = compute_and_check  # type: ignore[method-assign]
    return found


def _check_lemma(args: Any, model: Any, inputs: dict[str, torch.Tensor]) -> lemma.Lemma:
    target, mask = inputs["completion_ids"], inputs["completion_mask"]
    with torch.no_grad():
        logits = model(torch.cat([inputs["prompt_ids"], target], 1), torch.cat([inputs["prompt_mask"], mask], 1)).logits
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
