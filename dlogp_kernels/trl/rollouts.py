"""A batch of responses as TRL makes it, its rows taken and joined across calls and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

#: Of the batch as a whole; every other tensor has a row for each response.
TOKENS_IN_BATCH = "num_items_in_batch"


#: What a tensor (B, L) is widened with, one of prompts on the left; None stands for the padding token.
_FILL = {
    "prompt_ids": None,
    "prompt_mask": 0,
    "completion_ids": None,
    "completion_mask": 0,
    "tool_mask": 1,
    "old_per_token_logps": 0,
    "ref_per_token_logps": 0,
    "sampling_per_token_logps": 0,
    "importance_sampling_ratio": 1,
}

Rollouts = dict[str, Tensor]


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


def gathered(rollouts: Rollouts, accelerator: Accelerator, pad_token_id: int) -> Rollouts:
    """The rows of all processes, in the order of the processes."""
    result = {}
    for name, value in rollouts.items():
        if name in _FILL:
            left, fill = _padding(name, pad_token_id)
            value = accelerator.pad_across_processes(value, dim=1, pad_index=fill, pad_first=left)
        if value.dim():
            result[name] = accelerator.gather(value)
    return result


def rows(rollouts: Rollouts, index: Tensor | slice) -> Rollouts:
    """Some rows, all columns."""
    return {name: value[index] if value.dim() else value for name, value in rollouts.items()}


def joined(batches: Sequence[Rollouts], pad_token_id: int) -> Rollouts:
    """The rows of several batches, which differ in width."""
    result = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if name in _FILL:
            left, fill = _padding(name, pad_token_id)
            missing = [max(value.shape[1] for value in values) - value.shape[1] for value in values]
            sides = [(n, 0) if left else (0, n) for n in missing]
            values = [torch.nn.functional.pad(x, side, value=fill) for x, side in zip(values, sides, strict=True)]
        result[name] = torch.cat(values)
    return result


def _padding(name: str, pad_token_id: int) -> tuple[bool, int]:
    """Whether a column is widened on the left, and with what."""
    fill = _FILL[name]
    return name.startswith("prompt"), pad_token_id if fill is None else fill


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
        taken = [self._at(place) for place in range(self.position, self.position + count)]
        self.position += count
        return taken

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self._size)
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            self._epoch = epoch
            self._order = torch.randperm(self._size, generator=generator).tolist()
        return self._order[offset]


def num_groups_to_draw(missing: int, group_size: int, processes: int) -> int:
    """The least number of groups, at least `missing`, whose rows all processes share evenly."""
    while missing * group_size % processes:
        missing += 1
    return missing


def repeated(examples: Sequence[dict[str, Any]], times: int) -> list[dict[str, Any]]:
    """Each example `times` times in a row, as copies of their own: TRL writes into them."""
    return [dict(example) for example in examples for _ in range(times)]
