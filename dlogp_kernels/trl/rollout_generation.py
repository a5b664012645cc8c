"""Responses drawn by `dlogp_kernels.hf.generate`: the same ones on any number of processes."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.models import unwrap_model_for_generation

from ..hf import generate

_NUM_ROW_IDS = 2**32


def draw_responses(trainer: Any, prompt_ids: Sequence[Sequence[int]], samples: int, first: int) -> list[list[int]]:
    """The token ids of a response to each prompt, with its end-of-sequence token.

    Args:
        trainer: a `ReweightedGRPOTrainer`, whose model draws.
        prompt_ids: of the rows of this process; a prompt stands there once for each of its `samples` responses.
        first: the number of the first row among all rows of all processes since the training began.
    """
    args, once = trainer.args, prompt_ids
    # Where this process has whole groups a prompt is run once for all its samples.
    groups = [prompt_ids[begin : begin + samples] for begin in range(0, len(prompt_ids), samples)]
    if all(len(group) == samples and all(prompt == group[0] for prompt in group) for group in groups):
        once = [group[0] for group in groups]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    prompts = [torch.tensor(prompt, device=trainer.accelerator.device) for prompt in once]
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as model,
        trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
    ):
        drawn = generate(
            model,
            model,
            pad(prompts),
            pad([torch.ones_like(prompt) for prompt in prompts]),
            criterion="none",
            draft="rl",
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p or 0.0,
            seed=args.rollout_seed,
            max_new_tokens=args.max_completion_length,
            stop_token_ids=trainer.eos_token_ids,
            num_return_sequences=len(prompt_ids) // len(once),
            row_id=[(first + row) % _NUM_ROW_IDS for row in range(len(prompt_ids))],
        )
    rows = zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)
    return [tokens[:length] for tokens, length in rows]
