"""From samples to their statistics: tensors of a batch, and back to one row of numbers a response."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..hf import lm_head, lm_head_inputs, token_metrics
from ..hf.memory import plan_memory
from .inputs.records import Example
from .progress import OnLayer, layers_told


class Computation(NamedTuple):
    """What a computation depends on beside models and samples; `on_layer` hears how far it is with a batch."""

    device: torch.device
    temperature: float
    memory_limit: int | None
    on_layer: OnLayer


class _Batch(NamedTuple):
    """Samples padded on the right; all (B, T). `is_response` marks the tokens to measure."""

    input_ids: Tensor
    attention_mask: Tensor
    is_response: Tensor


def measure(
    samples: Sequence[Example], model: Any, base: Any, how: Computation, base_hidden: Sequence[Tensor] | None = None
) -> dict[str, np.ndarray]:
    """The statistics by name, arrays with one value a token of the responses, which follow each other; see `parted`.

    With `base_hidden`, from `response_hidden` for the same samples, `base` is the `LmHead` of the base model.
    """
    batch = _pad(samples, how.device)
    padded_hidden = None if base_hidden is None else _pad_hidden(samples, base_hidden, batch)
    with torch.inference_mode(), layers_told((model, base), how.on_layer):
        stats = token_metrics(
            model,
            base,
            batch.input_ids,
            batch.attention_mask,
            loss_mask=batch.is_response,
            temperature=how.temperature,
            memory_limit=how.memory_limit,
            base_hidden=padded_hidden,
            top=True,
        )
    columns = {name: field.cpu().numpy() for name, field in stats._asdict().items()}
    places = [(row, _predicting(sample)) for row, sample in enumerate(samples)]
    return {name: np.concatenate([column[place] for place in places]) for name, column in columns.items()}


def parted(samples: Sequence[Example], columns: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """What `measure` gives for the samples, of each response by itself."""
    ends = accumulate(len(sample.response_ids) for sample in samples)
    places = [slice(end - len(sample.response_ids), end) for sample, end in zip(samples, ends, strict=True)]
    return [{name: column[place] for name, column in columns.items()} for place in places]


def response_hidden(samples: Sequence[Example], base: Any, how: Computation) -> list[Tensor]:
    """The base model's hidden states (R, D) where it predicts the R tokens of each response; on the CPU."""
    batch = _pad(samples, how.device)
    num_rows, prefill_chunk = len(samples), None
    if how.memory_limit is not None:
        num_rows, prefill_chunk = _fit(samples, base, batch, how.memory_limit)
    hidden: list[Tensor] = []
    with torch.inference_mode(), layers_told((base,), how.on_layer):
        for begin in range(0, len(samples), num_rows):
            rows = slice(begin, begin + num_rows)
            states = lm_head_inputs(
                base, batch.input_ids[rows], batch.attention_mask[rows], prefill_chunk=prefill_chunk
            ).hidden
            hidden += [
                states[row, _predicting(sample)].cpu() for row, sample in enumerate(samples[begin : begin + num_rows])
            ]
    return hidden


def _fit(samples: Sequence[Example], base: Any, batch: _Batch, memory_limit: int) -> tuple[int, int | None]:
    """How many rows at once, and how many tokens of each, keep the base model alone within the limit."""
    longest = batch.input_ids.shape[1]
    head = lm_head(base)
    token_bytes = head.weight.shape[1] * head.weight.element_size()
    plan = plan_memory(memory_limit, [base], (head, head), longest, batch.input_ids.numel(), gathered=token_bytes)
    return max(1, plan.max_tokens // longest), plan.prefill_chunk


def _predicting(sample: Example) -> slice:
    """The positions that predict the tokens of the response: each the one before its token."""
    begin = len(sample.prompt_ids) - 1
    return slice(begin, begin + len(sample.response_ids))


def _pad(samples: Sequence[Example], device: torch.device) -> _Batch:
    ids = [torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long() for sample in samples]
    input_ids = pad_sequence(ids, batch_first=True)
    position = torch.arange(input_ids.shape[1])
    begin = torch.tensor([[len(sample.prompt_ids)] for sample in samples])
    attention_mask = position < torch.tensor([[len(row)] for row in ids])
    return _Batch(input_ids.to(device), attention_mask.to(device), (attention_mask & (position >= begin)).to(device))


def _pad_hidden(samples: Sequence[Example], hidden: Sequence[Tensor], batch: _Batch) -> Tensor:
    """(B, T, D): each sample's hidden states where they predict its response, 0 where they are not looked at."""
    padded = hidden[0].new_zeros(*batch.input_ids.shape, hidden[0].shape[-1])
    for row, (sample, states) in enumerate(zip(samples, hidden, strict=True)):
        padded[row, _predicting(sample)] = states
    return padded.to(batch.input_ids.device)
