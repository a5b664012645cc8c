"""Responses drawn by `dlogp_kernels.hf.generate`, the same ones on any number of processes; and a batch of them as TRL
makes it, its rows taken and joined across calls and processes."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.models import unwrap_model_for_generation

from ..hf import generate
from .sharing import Sharing

#: Of the batch as a whole; every other tensor has a row for each response.
TOKENS_IN_BATCH = "num_items_in_batch"

_NUM_ROW_IDS = 2**32

Rollouts = dict[str, Tensor]


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
    prompts = [torch.tensor(prompt, dtype=torch.int64, device=trainer.accelerator.device) for prompt in once]
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


def loss_mask(rollouts: Rollouts) -> Tensor:
    """(B, T): the tokens that were drawn from the policy and count."""
    mask = rollouts["completion_mask"]
    return mask * rollouts["tool_mask"] if "tool_mask" in rollouts else mask


def num_rows(rollouts: Rollouts) -> int:
    return len(rollouts["completion_ids"])


def model_inputs(rollouts: Rollouts) -> tuple[Tensor, Tensor, int]:
    """Token ids and attention mask of prompts and responses (B, P + T), and T."""
    input_ids = torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], 1)
    attention_mask = torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], 1)
    return input_ids, attention_mask, rollouts["completion_ids"].shape[1]


def gathered(rollouts: Rollouts, sharing: Sharing) -> Rollouts:
    """The rows of all processes, in the order of the processes."""

    def of_all(name: str, value: Tensor) -> Tensor:
        widened = sharing.accelerator.pad_across_processes(value, dim=1, pad_first=_is_widened_left(name))
        return sharing.once(sharing.accelerator.gather(widened))

    return {name: of_all(name, value) for name, value in rollouts.items() if value.dim()}


def rows(rollouts: Rollouts, index: Tensor | slice) -> Rollouts:
    """Some rows, all columns."""
    return {name: value[index] if value.dim() else value for name, value in rollouts.items()}


def joined(batches: Sequence[Rollouts]) -> Rollouts:
    """The rows of several batches, which differ in width: what is widened with 0 is masked there."""
    result = {}
    for name, value in batches[0].items():
        if value.dim() == 1:
            result[name] = torch.cat([batch[name] for batch in batches])
        else:
            side = "left" if _is_widened_left(name) else "right"
            everyone = [row for batch in batches for row in batch[name]]
            result[name] = pad_sequence(everyone, batch_first=True, padding_side=side)
    return result


def _is_widened_left(name: str) -> bool:
    return name.startswith("prompt")


def masked_out(rollouts: Rollouts) -> Rollouts:
    """The same rows with no token that counts and no advantage."""
    return {
        **rollouts,
        "completion_mask": torch.zeros_like(rollouts["completion_mask"]),
        "advantages": torch.zeros_like(rollouts["advantages"]),
    }


class PromptOrder:
    """Endless numbers of a data set's examples, each once before any comes again, shuffled by a seed alone.

    `position` says how many were taken, and can be set.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.position = 0
        self._size = size
        self._seed = seed

    def take(self, count: int) -> list[int]:
        """The next `count` numbers."""
        places = [divmod(place, self._size) for place in range(self.position, self.position + count)]
        self.position += count
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [int(orders[epoch][offset]) for epoch, offset in places]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self._size, generator=generator)


def num_groups_to_draw(missing: int, group_size: int, processes: int) -> int:
    """The least number of groups, at least `missing`, whose rows all processes share evenly."""
    while missing * group_size % processes:
        missing += 1
    return missing
