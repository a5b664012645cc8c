"""Blocks of rows and tiles of the vocabulary, in which plain PyTorch forms logits and their gradients."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import Head, Targets
from ..reference import statistics as reference
from ..reference.statistics import transform_gradient, transform_logits

# Temporaries of the size of a block of logits that are alive at once, per model, at most.
_TEMPORARIES = 8
#: Tokens and rows at a time where memory allows more: enough for a product to run at its full speed.
_TILE = 4096
_ROWS = 1024
#: The fewest of each, however small the workspace.
_FEWEST = 16


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (…, columns) by their flat index, without a copy of the others."""
    index: list[Tensor] = []
    for size in reversed(x.shape[1:-1]):  # not torch.unravel_index, which a CUDA graph can not capture
        index.insert(0, rows % size)
        rows = rows // size
    return x[rows, *index]


def row_blocks(targets: Targets, vocabulary: int, dtype: torch.dtype, models: int, workspace: int) -> Iterator[Tensor]:
    row_bytes = vocabulary * dtype.itemsize * _TEMPORARIES * models
    return kept_blocks(targets, max(1, workspace // row_bytes))


def kept_blocks(targets: Targets, size: int) -> Iterator[Tensor]:
    rows = reference.kept_rows(*targets)
    return iter(rows.split(size) if rows.numel() else ())


def tiles(vocabulary: int, size: int = _TILE) -> Iterator[slice]:
    for begin in range(0, vocabulary, size):
        yield slice(begin, min(begin + size, vocabulary))


def tile_of(head: Head, tile: slice, dtype: torch.dtype) -> Head:
    """The head of these tokens alone, converted."""
    bias = None if head.bias is None else head.bias[tile].to(dtype)
    return head._replace(weight=head.weight[tile].to(dtype), bias=bias)


def tiled_logits(head: Head, rows: Tensor, dtype: torch.dtype, tile: int = _TILE) -> Tensor:
    """`reference.linear_logits` of some rows, without a converted copy of the whole weight."""
    hidden = rows_of(head.hidden, rows).to(dtype)
    raw = hidden.new_empty(rows.shape[0], head.weight.shape[0])
    for columns in tiles(head.weight.shape[0], tile):
        part = tile_of(head, columns, dtype)
        raw[:, columns] = reference.linear_logits(hidden, part.weight, part.bias, dtype)
    return raw


class ForwardBlocks(NamedTuple):
    """Rows whose logits are formed at once, those of them whose statistics are computed at once, and tokens of a tile.

    One product of many rows with the weight is far cheaper than several of a few; the statistics of a row take most of
    the memory, and gain nothing from company.
    """

    rows: int
    rows_of_statistics: int
    tile: int


def forward_blocks(heads: Sequence[Head], dtype: torch.dtype, workspace: int) -> ForwardBlocks:
    """That fit: a tile of the weight in a quarter of the workspace, statistics in another, logits in the rest."""
    width = max(head.hidden.shape[-1] for head in heads)
    logits_bytes = max(1, heads[0].weight.shape[0]) * dtype.itemsize * len(heads)
    of_statistics = max(1, workspace // 4 // (logits_bytes * _TEMPORARIES))
    rows = workspace // 2 // (logits_bytes + width * dtype.itemsize)
    tile = _within(workspace // 4 // (2 * width * dtype.itemsize), _TILE)
    return ForwardBlocks(min(max(of_statistics, rows), _ROWS), of_statistics, tile)


class BackwardBlocks(NamedTuple):
    """Rows and tokens at a time; `once`: sums for all hidden states fit beside, and one walk makes all gradients."""

    rows: int
    tile: int
    once: bool


def backward_blocks(heads: Sequence[Head], num_rows: int, dtype: torch.dtype, workspace: int) -> BackwardBlocks:
    """That fit, by the shapes alone: what is asked for must not change the order of a sum."""
    width_bytes = sum(head.hidden.shape[-1] for head in heads) * dtype.itemsize
    once = num_rows * width_bytes <= workspace // 4
    tile = _within(workspace // 4 // (2 * width_bytes), _TILE)  # of the weight, and of its gradient
    row_bytes = 2 * width_bytes + tile * dtype.itemsize * _TEMPORARIES * len(heads)
    return BackwardBlocks(_within(workspace // 2 // row_bytes, _ROWS), tile, once)


def _within(fitting: int, most: int) -> int:
    return max(_FEWEST, min(fitting // _FEWEST * _FEWEST, most))


def zero_gradients(head: Head, output_mask: Sequence[bool], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """By hidden, weight and bias, of their dtypes or the given one; None where not wanted."""
    return [
        x.new_zeros(x.shape, dtype=dtype) if want and x is not None else None
        for x, want in zip(head[:3], output_mask, strict=True)
    ]


class HeadGradients:
    """One model's head: recomputes logits, and adds to the gradients by hidden, weight and bias that are not None."""

    def __init__(self, head: Head, grads: list[Tensor | None], dtype: torch.dtype) -> None:
        self.head, self.grads, self.dtype = head, grads, dtype

    def logits(self, rows: Tensor) -> Tensor:
        hidden, weight, bias, _ = self.head
        return reference.linear_logits(rows_of(hidden, rows), weight, bias, self.dtype)

    def transform(self, raw: Tensor) -> Tensor:
        return transform_logits(raw, *self.head.transform)

    def accumulate(self, rows: Tensor, tile: slice, raw: Tensor, grad_z: Tensor) -> None:
        grad = transform_gradient(grad_z, raw, *self.head.transform)
        grad_hidden, grad_weight, grad_bias = self.grads
        if grad_hidden is not None:
            of_rows = grad_hidden.view(-1, grad_hidden.shape[-1])
            of_rows.index_add_(0, rows, grad @ self.head.weight[tile].to(self.dtype))
        if grad_weight is not None:
            grad_weight[tile].add_(grad.t() @ rows_of(self.head.hidden, rows).to(self.dtype))
        if grad_bias is not None:
            grad_bias[tile].add_(grad.sum(0))
