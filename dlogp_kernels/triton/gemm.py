"""The backend "gemm": float32 tiles of logits by the vendor's GEMM, folded by a Triton kernel while in the L2 cache.

A contender of the fused kernels: the product runs at the vendor's speed, its result makes a trip through the cache.
Ignored rows are left out of what is folded, but the products run over all blocks of rows: how many rows are kept is
known to the device alone. Every product has the same shape, so a row's result does not depend on the other rows.
"""

import torch
from torch import Tensor

from ..inputs import Asked, Head, Targets
from ..results import DeltaLogpStats, LogpStats
from . import _rows
from ._device import on_device_of
from ._gemm import product
from ._rows import Rows, matrix
from ._sizes import ceil_div
from .configs import gemm_tile
from .delta_logp import finish_delta_logp, fold_pair_tile, pair_state_size
from .linear_forward import with_contiguous_bias
from .logp import Tile, finish_logp, fold_tile, new_outputs, state_size, transform_of


def linear_logp_fwd(head: Head, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    target, ignore_index = targets.target.contiguous(), targets.ignore_index
    vocabulary, (num_rows, num_tokens) = head.weight.shape[0], gemm_tile(head.hidden.device)
    with on_device_of(target):
        rows = _rows.kept_rows(target, ignore_index)
        out = new_outputs(LogpStats, target, rows, asked.top)
        tiles = _Tiles(with_contiguous_bias(head), rows)
        state, target_logits = _states(target, vocabulary, state_size(asked.top), 1)
        for first in range(0, target.shape[0], num_rows):
            tiles.gather(first)
            for split, column in enumerate(range(0, vocabulary, num_tokens)):
                tile, shape = tiles.logits(column)
                fold_tile(tile, shape, target, rows, ignore_index, state, target_logits, first, column, split)
            finish_logp(state, target_logits, target, rows, out, vocabulary, tile.output_scale, ignore_index, first)
    return out.flat()


def linear_delta_logp_fwd(head: Head, base: Head, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    target, ignore_index = targets.target.contiguous(), targets.ignore_index
    vocabulary, (num_rows, num_tokens) = head.weight.shape[0], gemm_tile(head.hidden.device)
    with on_device_of(target):
        rows = _rows.kept_rows(target, ignore_index)
        out = new_outputs(DeltaLogpStats, target, rows, asked.top)
        tiles, base_tiles = _Tiles(with_contiguous_bias(head), rows), _Tiles(with_contiguous_bias(base), rows)
        state, target_logits = _states(target, vocabulary, pair_state_size(asked.top), 2)
        for first in range(0, target.shape[0], num_rows):
            tiles.gather(first)
            base_tiles.gather(first)
            for split, column in enumerate(range(0, vocabulary, num_tokens)):
                (tile, shape), (base_tile, _) = tiles.logits(column), base_tiles.logits(column)
                fold_pair_tile(
                    tile, base_tile, shape, target, rows, ignore_index, state, target_logits, first, column, split
                )  # fmt: skip
            finish_delta_logp(
                state, target_logits, target, rows, out, vocabulary, tile.output_scale,
                base_tile.output_scale, ignore_index, first,
            )  # fmt: skip
    return out.flat()


class _Tiles:
    """One model's rows, gathered, and tiles of its logits, in buffers that every tile uses again."""

    def __init__(self, head: Head, rows: Rows) -> None:
        self.head, self.rows = head, rows
        device = head.hidden.device
        self.num_rows, self.num_tokens = gemm_tile(device)
        self.hidden = torch.empty((self.num_rows, head.hidden.shape[-1]), dtype=head.dtype, device=device)
        self.buffer = torch.empty(self.num_rows * self.num_tokens, dtype=torch.float32, device=device)
        self.transform = transform_of(head.transform, head.bias)

    def gather(self, first: int) -> None:
        _rows.gather_rows(self.head.hidden, self.rows, first, self.hidden, zero_rest=True)

    def logits(self, column: int) -> tuple[Tile, tuple[int, int]]:
        """Of the gathered rows and the tokens from `column` on, and the tile's shape."""
        weight = self.head.weight[column : column + self.num_tokens]
        shape = (self.num_rows, weight.shape[0])
        raw = self.buffer[: shape[0] * shape[1]].view(shape)
        product(self.hidden, weight.t(), out=raw)
        return Tile(matrix(raw), self.transform), shape


def _states(target: Tensor, vocabulary: int, size: int, models: int) -> tuple[Tensor, Tensor]:
    """state (size, splits, R) and target_logits (models · K, R) of one block of rows, a split for every tile."""
    num_rows, num_tokens = gemm_tile(target.device)
    shape = (size, ceil_div(vocabulary, num_tokens), num_rows)
    state = torch.empty(shape, dtype=torch.float32, device=target.device)
    target_logits = torch.empty((models * target.shape[1], num_rows), dtype=torch.float32, device=target.device)
    return state, target_logits
