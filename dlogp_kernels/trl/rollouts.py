"""A batch of responses as TRL makes it, its rows taken and joined across calls and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

#: Of the batch as a whole; every other tensor has a row for each response.
TOKENS_IN_BATCH = "num_items_in_batch"


class _Column(NamedTuple):
    """How a tensor (B, L) is widened: on which side, and with what."""

    left: bool
    fill: float | None


# None stands for the padding token.
_COLUMNS = {
    "prompt_ids": _Column(True, None),
    "prompt_mask": _Column(True, 0),
    "completion_ids": _Column(False, None),
    "completion_mask": _Column(False, 0),
    "tool_mask": _Column(False, 1),
    "old_per_token_logps": _Column(False, 0),
    "ref_per_token_logps": _Column(False, 0),
    "sampling_per_token_logps": _Column(False, 0),
    "importance_sampling_ratio": _Column(False, 1),
}

Rollouts = dict[str, Tensor]


def loss_mask(rollouts: Rollouts) -> Tensor:
    """(B, T): the tokens that were drawn from the policy and count."""
    mask = rollouts["completion_mask"]
    return mask * rollouts["tool_mask"] if "tool_mask" in rollouts else mask


def gathered(rollouts: Rollouts, accelerator: Accelerator, pad_token_id: int) -> Rollouts:
    """The rows of all processes, in the order of the processes."""
    if accelerator.num_processes == 1:
        return {name: value for name, value in rollouts.items() if value.dim()}
    result = {}
    for name, value in rollouts.items():
        if value.dim() == 0:
            continue
        if name in _COLUMNS:
            left, fill = _COLUMNS[name]
            value = accelerator.pad_across_processes(
                value, dim=1, pad_index=pad_token_id if fill is None else fill, pad_first=left
            )
        result[name] = accelerator.gather(value)
    return result


def rows(rollouts: Rollouts, index: Tensor | slice) -> Rollouts:
    """Some rows, all columns."""
    return {name: value[index] if value.dim() else value for name, value in rollouts.items()}


def joined(batches: Sequence[Rollouts], pad_token_id: int) -> Rollouts:
    """The rows of several batches, which differ in width."""
    return {
        name: torch.cat(_of_one_width(name, [batch[name] for batch in batches], pad_token_id)) for name in batches[0]
    }


def _of_one_width(name: str, values: list[Tensor], pad_token_id: int) -> list[Tensor]:
    if name not in _COLUMNS:
        return values
    left, fill = _COLUMNS[name]
    width = max(value.shape[1] for value in values)
    return [_widened(value, width, left, pad_token_id if fill is None else fill) for value in values]


def _widened(value: Tensor, width: int, left: bool, fill: float) -> Tensor:
    missing = width - value.shape[1]
    return torch.nn.functional.pad(value, (missing, 0) if left else (0, missing), value=fill)


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
