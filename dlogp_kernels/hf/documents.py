"""Batches with padding on either side and packed rows, as documents that are run from position 0 on.

Every row is cut into documents: its tokens that are not masked, parted where positions restart. They are padded on the
right, where a causal model does not look; so each gives the numbers it gives alone, in every architecture and with
every attention implementation, and masked tokens cost nothing but that padding.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..checks import INTEGER, check_tensor
from .lengths import Side

#: Vocabularies that differ by fewer rows than this differ by padding (rows are padded to a multiple of up to 1024).
_MAX_PADDING_ROWS = 1024


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
    check_tensor("input_ids", input_ids, INTEGER, "an integer dtype")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (B, T), B and T ≥ 1")
    if attention_mask is None and position_ids is None:
        document = torch.arange(input_ids.shape[0], device=input_ids.device)[:, None].expand_as(input_ids)
        return Batch(input_ids, document, whole=True)
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        kept = as_mask("attention_mask", attention_mask, [tuple(input_ids.shape)]).to(input_ids.device)
    # Where documents begin: at each row's first kept token, or where positions say so.
    starts = kept & (kept.cumsum(1) == 1) if position_ids is None else _restarts(position_ids, input_ids, kept)
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
    waiting = sorted(place.split(torch.bincount(documents[place]).tolist()), key=len, reverse=True)
    while waiting:
        longest = len(waiting[0])
        count = max(1, max_tokens // longest)
        alike = [side(len(document)) == side(longest) for document in waiting[:count]]
        count = alike.index(False) if False in alike else count
        places = pad_sequence(waiting[:count], batch_first=True, padding_value=-1)
        # Any token will do as padding: what stands on the right is not looked at.
        yield Group(batch.input_ids.flatten()[torch.where(places < 0, place[0], places)], places, whole=False)
        waiting = waiting[count:]


def check_vocabulary(batch: Batch, rows: int, of: str) -> None:
    """IndexError naming the first token outside [0, `rows`), the rows `of` a vocabulary or of embeddings."""
    beyond = ((batch.input_ids < 0) | (batch.input_ids >= rows)) & (batch.document >= 0)
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        raise IndexError(
            f"input_ids[{row}, {column}] is {int(batch.input_ids[row, column])}, expected a token in [0, {rows}), {of}"
        )


def common_vocabulary(rows: int, base_rows: int, batch: Batch) -> int:
    """Rows of the vocabulary that both models have; an error where they differ by more than padding, or the batch has
    tokens beyond them."""
    if abs(rows - base_rows) >= _MAX_PADDING_ROWS:
        raise ValueError(
            f"base_model has a vocabulary of {base_rows} rows and model one of {rows}: expected the same, or a "
            f"difference of less than {_MAX_PADDING_ROWS} rows of padding"
        )
    common = min(rows, base_rows)
    if rows != base_rows:
        check_vocabulary(batch, common, "the vocabulary that both models have")
    return common


def scatter(rows: Tensor, group: Group, into: Tensor) -> None:
    """Write rows (n, L, …) of the group's documents to their places in `into` (B·T, …); differentiable."""
    kept = group.place >= 0
    into[group.place[kept]] = rows[kept]


def gather(values: Tensor, group: Group) -> Tensor:
    """Rows (n, L, …) of `values` (B·T, …) at the group's places; any of them where padded."""
    return values.unflatten(0, group.place.shape) if group.whole else values[group.place.clamp_min(0)]


def _restarts(position_ids: Tensor, input_ids: Tensor, kept: Tensor) -> Tensor:
    """Where documents begin: kept tokens at position 0. Within a document positions count 0, 1, 2, …"""
    check_tensor("position_ids", position_ids, INTEGER, "an integer dtype")
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
