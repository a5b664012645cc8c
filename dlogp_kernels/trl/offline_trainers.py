"""Trainers of TRL, built from plain arguments, for the CPU and without any network access.

Both functions return a trainer: call `.train()` on it, and find the trained weights in the model that was passed in.
Neither writes checkpoints.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from .config import ReweightedGRPOConfig
from .trainer import ReweightedGRPOTrainer

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, responses) -> one reward for each; responses keep their special tokens."""


def sft_trainer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    output_dir: str | Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    min_learning_rate_ratio: float,
    seed: int,
    log_every: int = 50,
    show_progress: bool = True,
) -> SFTTrainer:
    """Supervised learning with the loss on response tokens alone; AdamW under a warm-up and a cosine.

    Args:
        batch_size: sequences per step.
        warmup_steps: steps of linear growth up to `learning_rate`.
        min_learning_rate_ratio: the learning rate at the last step, as a share of `learning_rate`.
    """
    config = SFTConfig(
        **_offline_arguments(output_dir, seed=seed, log_every=log_every, show_progress=show_progress),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": min_learning_rate_ratio},
        warmup_steps=warmup_steps,
        adam_beta2=0.98,
        max_length=None,
        completion_only_loss=True,
    )
    dataset = Dataset.from_dict({"prompt": list(prompts), "completion": list(responses)})
    return SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)


def grpo_trainer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Reward,
    *,
    output_dir: str | Path,
    rollouts: int,
    prompts_per_rollout: int,
    samples_per_prompt: int,
    minibatches: int,
    max_response_tokens: int,
    learning_rate: float,
    warmup_steps: int,
    seed: int,
    reweight: str = "none",
    reweight_alpha: float = 0.1,
    show_progress: bool = True,
    **options: Any,
) -> ReweightedGRPOTrainer:
    """Group-relative policy optimisation with DAPO's loss: token mean, clip .2/.28, no KL term.

    One rollout samples `prompts_per_rollout` × `samples_per_prompt` responses at temperature 1, and is then
    spent in `minibatches` optimiser steps of equal size. `options` are further ones of ReweightedGRPOConfig.
    """
    samples = prompts_per_rollout * samples_per_prompt
    if samples % minibatches:
        raise ValueError(f"minibatches: expected a divisor of {samples} samples, got {minibatches}")
    config = ReweightedGRPOConfig(
        **_offline_arguments(output_dir, seed=seed, log_every=minibatches, show_progress=show_progress),
        max_steps=rollouts * minibatches,
        per_device_train_batch_size=samples // minibatches,
        generation_batch_size=samples,
        num_generations=samples_per_prompt,
        max_completion_length=max_response_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=warmup_steps,
        adam_beta2=0.95,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        reweight=reweight,
        reweight_alpha=reweight_alpha,
        **options,
    )

    def answer_reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return list(reward(prompts, tokenizer.batch_decode(completion_ids, skip_special_tokens=False)))

    return ReweightedGRPOTrainer(
        model,
        reward_funcs=answer_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer,
    )


def _offline_arguments(output_dir: str | Path, *, seed: int, log_every: int, show_progress: bool) -> dict[str, Any]:
    """What both trainers share: float32 on the CPU, no reports, no checkpoints."""
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "logging_strategy": "steps" if show_progress else "no",
        "logging_steps": log_every,
        "disable_tqdm": not show_progress,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "report_to": [],
        "save_strategy": "no",
    }
