"""Trains the demo pair: `python -m dlogp_kernels.demo.train_pair OUT_DIR`, about ten minutes on two cores.

The base model imitates a fallible demonstrator; the RL model starts from it and is rewarded for right
answers alone. It stops well before the reward levels off, as pairs that leave room for extrapolation do.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..hf import token_metrics
from ..hf.tiny import (
    PreTrainedModel,
    load_local,
    save_local,
    tiny_qwen3,
    word_tokenizer,
)
from ..trl import grpo_trainer, sft_trainer
from . import task
from .generate import Response, accuracy, generate_responses

LOWERED_BELOW = -1.0
RAISED_ABOVE = 0.25


def train_pair(
    out_dir: str | Path,
    seed: int = 0,
    *,
    num_demonstrations: int = 40_000,
    sft_steps: int = 800,
    sft_batch_size: int = 96,
    rollouts: int = 14,
    prompts_per_rollout: int = 16,
    samples_per_prompt: int = 16,
    num_held_out: int = 4_000,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train and evaluate a pair; write `base/`, `rl/` and `metadata.json` into `out_dir`.

    Args:
        seed: of the weights, the problems, the demonstrations and every draw.
        num_demonstrations: size of the supervised set.
        sft_steps, sft_batch_size: optimiser steps of the base model, and sequences in each.
        rollouts, prompts_per_rollout, samples_per_prompt: batches of responses that RL learns from, and
            their sizes; each is spent in two optimiser steps.
        num_held_out: problems of the evaluation, one response of either model to each.

    Returns:
        What `metadata.json` holds.
    """
    started = time.monotonic()
    directory = Path(out_dir)
    sft: dict[str, Any] = {
        "steps": sft_steps,
        "batch_size": sft_batch_size,
        "learning_rate": 3e-3,
        "warmup_steps": min(50, sft_steps),
        "min_learning_rate_ratio": 0.05,
    }
    grpo: dict[str, Any] = {
        "rollouts": rollouts,
        "prompts_per_rollout": prompts_per_rollout,
        "samples_per_prompt": samples_per_prompt,
        "minibatches": 2,
        "learning_rate": 2e-4,
        "warmup_steps": 5,
    }
    demonstrator = task.Demonstrator()

    with tempfile.TemporaryDirectory() as scratch:
        offline: dict[str, Any] = {"output_dir": scratch, "seed": seed, "show_progress": show_progress}
        _announce(f"supervised learning from {num_demonstrations} demonstrations", show_progress)
        tokenizer = word_tokenizer(task.WORDS)
        ends = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        model: PreTrainedModel = tiny_qwen3(len(tokenizer), seed=seed, **ends)
        problems = task.generate_problems(num_demonstrations, seed, "supervised")
        rng = random.Random(f"demonstrations {seed}")
        responses = [demonstrator.respond(problem, rng) for problem in problems]
        prompts = [problem.prompt for problem in problems]
        sft_trainer(model, tokenizer, prompts, responses, **offline, **sft).train()
        save_local(model, tokenizer, directory / "base")
        base_seconds = time.monotonic() - started

        _announce(f"reinforcement learning from {rollouts} rollouts", show_progress)
        model, _ = load_local(directory / "base")
        problems = task.generate_problems(rollouts * prompts_per_rollout, seed, "reinforcement")
        prompts, length = [problem.prompt for problem in problems], task.MAX_RESPONSE_WORDS
        grpo_trainer(model, tokenizer, prompts, answer_rewards, max_response_tokens=length, **offline, **grpo).train()
        save_local(model, tokenizer, directory / "rl")
    rl_seconds = time.monotonic() - started - base_seconds
    _announce(f"evaluation on {num_held_out} held-out problems", show_progress)
    evaluation = evaluate_pair(directory, num_held_out, seed)

    metadata = {
        "task": f"{task.NUM_OPERATIONS} operations modulo {task.MODULUS}",
        "seed": seed,
        **evaluation,
        "demonstrator": {
            "jump_probability": demonstrator.jump_probability,
            "jump_accuracy": demonstrator.jump_accuracy,
            "slip_probability": dict(demonstrator.slip_probability),
            "num_demonstrations": num_demonstrations,
        },
        "sft": sft,
        "grpo": {**grpo, "loss_type": "dapo"},
        "seconds": {
            "base": round(base_seconds),
            "rl": round(rl_seconds),
            "total": round(time.monotonic() - started),
        },
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl", "tokenizers")},
        },
    }
    (directory / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    _announce(_summary(metadata), show_progress)
    return metadata


def evaluate_pair(directory: str | Path, num_problems: int, seed: int) -> dict[str, Any]:
    """Accuracy of both models on held-out problems, and the tails of Δlog p over their own responses."""
    base, tokenizer = load_local(Path(directory) / "base")
    rl, _ = load_local(Path(directory) / "rl")
    problems = task.generate_problems(num_problems, seed, "held_out")
    result: dict[str, Any] = {"num_problems": num_problems, "temperature": 1.0}
    for source, model in (("base", base), ("rl", rl)):
        responses = generate_responses(model, tokenizer, problems, seed=seed)
        mean, standard_error = accuracy(responses)
        delta_logp = response_delta_logp(rl, base, responses)
        jumps = sum(response.text.split().count(task.JUMP) for response in responses)
        result[source] = {
            "accuracy": round(mean, 5),
            "standard_error": round(standard_error, 5),
            "num_tokens": delta_logp.numel(),
            "jumps_per_response": round(jumps / num_problems, 4),
            f"share_delta_logp_below_{LOWERED_BELOW}": _share(delta_logp < LOWERED_BELOW),
            f"share_delta_logp_above_{RAISED_ABOVE}": _share(delta_logp > RAISED_ABOVE),
        }
    return result


@torch.inference_mode()
def response_delta_logp(
    rl: PreTrainedModel, base: PreTrainedModel, responses: Sequence[Response], *, batch_size: int = 256
) -> Tensor:
    """Δlog p of every response token, in order, at temperature 1: (number of tokens,)."""
    values = []
    for start in range(0, len(responses), batch_size):
        batch = responses[start : start + batch_size]
        tokens = [torch.tensor(response.prompt_ids + response.token_ids) for response in batch]
        written = [
            torch.arange(len(row)) >= len(response.prompt_ids) for row, response in zip(tokens, batch, strict=True)
        ]
        # Padding is on the right, where a causal model's earlier positions cannot see it.
        input_ids, mask = pad_sequence(tokens, batch_first=True), pad_sequence(written, batch_first=True)
        values.append(token_metrics(rl, base, input_ids, loss_mask=mask).delta_logp[mask[:, 1:]])
    return torch.cat(values)


def answer_rewards(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for a response that ends with its problem's answer, else 0."""
    return [
        float(task.is_correct(task.parse_prompt(prompt), response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _share(condition: Tensor) -> float:
    return round(condition.double().mean().item(), 6)


def _summary(metadata: Mapping[str, Any]) -> str:
    parts = [
        f"{source} {metadata[source]['accuracy']:.3f} ± {metadata[source]['standard_error']:.3f}"
        for source in ("base", "rl")
    ]
    return f"accuracy: {', '.join(parts)}; {metadata['seconds']['total']} s"


def _announce(message: str, show_progress: bool) -> None:
    if show_progress:
        print(message, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo pair and write it to a directory.")
    parser.add_argument("out_dir", type=Path, help="receives base/, rl/ and metadata.json")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    train_pair(options.out_dir, options.seed)


if __name__ == "__main__":
    main()
