"""Hidden states of a model's backbone for batches with padding on either side and for packed rows.

Every row is cut into documents: its tokens that are not masked, parted where positions restart. Documents are run from
position 0 on, padded on the right, where a causal model does not look; so each gives the numbers it gives alone, in
every architecture and with every attention implementation, and masked tokens cost nothing but that padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .cache_names import cache_name
from .heads import backbone_of
from .lengths import Side, reset_frequencies, rope_side

_ONE_GO = (
    "whose rotary frequencies follow from the length of a sequence: in chunks they can not be those of one go. "
    "Expected prefill_chunk=None, or a memory_limit within which the sequence is run in one go"
)


class Batch(NamedTuple):
    """Tokens (B, T) and to which document each belongs: 0, 1, … row by row; −1 where masked.

    whole: every row is one document, without padding.
    """

    input_ids: Tensor
    document: Tensor
    whole: bool


class Group(NamedTuple):
    """Some documents of a batch, padded on the right.

    place is (n, L), int64: where in the batch, flattened, each token stands; −1 where padded. whole: the group is the
    batch itself, row by row.
    """

    input_ids: Tensor
    place: Tensor
    whole: bool


def as_batch(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Batch:
    """Check the arguments and part the rows into documents; ValueError or TypeError by name."""
    _check_integers("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (B, T), B and T ≥ 1")
    if attention_mask is None and position_ids is None:
        document = torch.arange(input_ids.shape[0], device=input_ids.device)[:, None].expand_as(input_ids)
        return Batch(input_ids, document, whole=True)
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        kept = as_mask("attention_mask", attention_mask, [tuple(input_ids.shape)]).to(input_ids.device)
    starts = _first_kept(kept)
    if position_ids is not None:
        starts = _restarts(position_ids, input_ids, kept)
    document = starts.flatten().cumsum(0).view_as(starts) - 1
    whole = bool(kept.all()) and int(starts.sum()) == input_ids.shape[0]
    return Batch(input_ids, document.masked_fill(~kept, -1), whole)


def as_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    """`mask` as bool; ValueError unless it has one of `shapes` and holds only 0 and 1."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is {type(mask).__name__}, expected a tensor")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {' or '.join(map(str, shapes))}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{name} holds values other than 0 and 1, expected a mask")
    return mask.bool()


def predicted(batch: Batch) -> Tensor:
    """(B, T − 1), bool: whether token t + 1 is predicted by the token before it, t, of the same document."""
    document = batch.document
    return (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)


def first_document(batch: Batch) -> Tensor:
    """The tokens of the first document; empty where all is masked."""
    return batch.input_ids.flatten()[batch.document.flatten() == 0]


def longest_document(batch: Batch) -> int:
    """Tokens of the longest document; 0 where all is masked."""
    kept = batch.document[batch.document >= 0]
    return int(torch.bincount(kept).max()) if kept.numel() else 0


def groups(batch: Batch, max_tokens: int, side: Side) -> Iterator[Group]:
    """The documents, longest first, in groups that hold at most `max_tokens` with their padding, or one document.

    Documents share a group only where `side` of their lengths is the same.
    """
    if batch.whole and batch.input_ids.numel() <= max_tokens:
        everywhere = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device)
        yield Group(batch.input_ids, everywhere.view_as(batch.input_ids), whole=True)
        return
    documents = batch.document.flatten()
    place = (documents >= 0).nonzero().squeeze(-1)
    lengths = torch.bincount(documents[place])
    begins = lengths.cumsum(0) - lengths
    order = lengths.argsort(descending=True, stable=True).tolist()
    length_of = lengths.tolist()
    while order:
        longest = length_of[order[0]]
        count = max(1, max_tokens // longest)
        alike = [side(length_of[document]) == side(longest) for document in order[:count]]
        count = alike.index(False) if False in alike else count
        members, order = order[:count], order[count:]
        yield _padded(batch, place, begins[members], lengths[members], longest)


def run_backbone(model: PreTrainedModel, input_ids: Tensor, prefill_chunk: int | None = None) -> Tensor:
    """Hidden states (B, T, D) of tokens (B, T) without padding on the left, `prefill_chunk` tokens at a time."""
    length = input_ids.shape[1]
    if prefill_chunk is not None and prefill_chunk < length:
        return run_backbone_in_chunks(model, input_ids, [*range(prefill_chunk, length, prefill_chunk), length])
    backbone = backbone_of(model)
    reset_frequencies(model)
    options = {"use_cache": False} if _accepts(inspect.signature(backbone.forward).parameters, "use_cache") else {}
    return _last_hidden(backbone(input_ids=input_ids, **options))


def run_backbone_in_chunks(model: PreTrainedModel, input_ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Hidden states (B, T, D) of tokens (B, T), through the cache from each of `ends` to the next; the last is T."""
    backbone = backbone_of(model)
    accepted = inspect.signature(backbone.forward).parameters
    name, side, length = cache_name(accepted), rope_side(model), input_ids.shape[1]
    reset_frequencies(model)
    cache: Any = None
    whole = torch.empty(0)
    for begin, end in pairwise([0, *ends]):
        # A token at the last position, which none of the others sees, shows the backbone how long the sequence is.
        guide = side(end) != side(length)
        output = backbone(use_cache=True, **{name: cache}, **_chunk(model, accepted, input_ids, begin, end, guide))
        cache = getattr(output, name, None)
        if cache is None:
            raise ValueError(
                f"model is {type(model).__name__}, whose body gives no key-value cache, expected one that does: "
                "prefill_chunk and generate need it"
            )
        if guide:
            _drop_last(cache, model)
        chunk = _last_hidden(output)
        if begin == 0:
            whole = chunk.new_empty(*input_ids.shape, chunk.shape[-1])
        whole[:, begin:end] = chunk[:, : end - begin]
    return whole


def _chunk(
    model: PreTrainedModel, accepted: Any, input_ids: Tensor, begin: int, end: int, guide: bool
) -> dict[str, Tensor]:
    """Tokens `begin` to `end`, with their positions for the backbones that name them: the others count the
    cache's tokens themselves. With a guide, the last token of all follows."""
    options = {"input_ids": input_ids[:, begin:end]}
    if "position_ids" in accepted:
        options["position_ids"] = torch.arange(begin, end, device=input_ids.device)[None]
    if guide:
        if "position_ids" not in accepted or "attention_mask" not in accepted:
            raise ValueError(f"model is {type(model).__name__}, {_ONE_GO}")
        last = torch.full_like(options["position_ids"][:, :1], input_ids.shape[1] - 1)
        options["input_ids"] = torch.cat([options["input_ids"], input_ids[:, -1:]], 1)
        options["position_ids"] = torch.cat([options["position_ids"], last], 1)
        # Without it, positions that leap would be taken for the next document of a packed row.
        options["attention_mask"] = input_ids.new_ones(input_ids.shape[0], end + 1)
    return options


def _drop_last(cache: Any, model: PreTrainedModel) -> None:
    try:
        cache.crop(-1)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"model is {type(model).__name__}, {_ONE_GO}; its cache lets go of no token") from error


def check_tokens(batch: Batch, model: PreTrainedModel) -> None:
    """IndexError naming the first token beyond the model's embeddings, on the CPU; CUDA's own check is kept else."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is None or batch.input_ids.device.type != "cpu":
        return
    beyond = ((batch.input_ids < 0) | (batch.input_ids >= rows)) & (batch.document >= 0)
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        raise IndexError(
            f"input_ids[{row}, {column}] is {int(batch.input_ids[row, column])}, expected a token in [0, {rows}), the "
            f"embeddings of {type(model).__name__}"
        )


def check_prefill_chunk(prefill_chunk: int | None, model: nn.Module) -> None:
    """ValueError for a chunk < 1, RuntimeError where a gradient would be needed through the cache."""
    if prefill_chunk is None:
        return
    if isinstance(prefill_chunk, bool) or not isinstance(prefill_chunk, int) or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk!r}, expected a number of tokens ≥ 1 or None")
    if needs_gradient(model):
        raise RuntimeError(
            "prefill_chunk bounds the memory of inference; expected a call within torch.no_grad() or "
            "torch.inference_mode(), or prefill_chunk=None for gradients"
        )


def needs_gradient(model: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())


def scatter(rows: Tensor, group: Group, into: Tensor) -> None:
    """Write rows (n, L, …) of the group's documents to their places in `into` (B·T, …); differentiable."""
    kept = group.place >= 0
    into[group.place[kept]] = rows[kept]


def gather(values: Tensor, group: Group) -> Tensor:
    """Rows (n, L, …) of `values` (B·T, …) at the group's places; 0 where padded."""
    if group.whole:
        return values.view(*group.place.shape, *values.shape[1:])
    rows = values[group.place.clamp_min(0)]
    kept = (group.place >= 0).view(*group.place.shape, *(1 for _ in values.shape[1:]))
    return torch.where(kept, rows, torch.zeros_like(rows))


def _check_integers(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}, expected an integer dtype")


def _first_kept(kept: Tensor) -> Tensor:
    """Where each row's first kept token stands."""
    return kept & (kept.cumsum(1) == 1)


def _restarts(position_ids: Tensor, input_ids: Tensor, kept: Tensor) -> Tensor:
    """Where documents begin: kept tokens at position 0. Within a document positions count 0, 1, 2, …"""
    _check_integers("position_ids", position_ids)
    if position_ids.dim() != 2 or position_ids.shape[1] != input_ids.shape[1]:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, expected {tuple(input_ids.shape)} or "
            f"(1, {input_ids.shape[1]})"
        )
    if position_ids.shape[0] not in (1, input_ids.shape[0]):
        raise ValueError(f"position_ids has {position_ids.shape[0]} rows, expected {input_ids.shape[0]} or 1")
    position_ids = position_ids.to(input_ids.device).expand_as(input_ids)
    starts = kept & (position_ids == 0)
    count = kept.cumsum(1) - 1
    first = torch.where(starts, count, 0).cummax(1).values
    wrong = kept & (position_ids != count - first)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {column}] is {int(position_ids[row, column])}, expected positions that count "
            "0, 1, 2, … over the tokens of each document that are not masked"
        )
    return starts


def _padded(batch: Batch, place: Tensor, begins: Tensor, lengths: Tensor, longest: int) -> Group:
    """`place` lists the batch's kept tokens; the group's documents begin there at `begins`."""
    offset = torch.arange(longest, device=place.device)
    inside = offset < lengths[:, None]
    where = (begins[:, None] + offset).masked_fill(~inside, 0)
    # Any token will do as padding: what stands on the right is not looked at.
    tokens = batch.input_ids.flatten()[place[where]]
    return Group(tokens, place[where].masked_fill(~inside, -1), whole=False)


def _accepts(parameters: Any, name: str) -> bool:
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _last_hidden(output: Any) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
