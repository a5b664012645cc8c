"""Backward of `linear_logp` and `linear_delta_logp` on GPUs, for every backend of theirs.

A block of logits is computed again by the vendor's GEMM, in float32; one Triton kernel makes of it the gradient by
the raw logits, in the dtype that multiplies (or one kernel does both, hopper.py); two GEMMs add that to the gradients
by hidden and weight, in float32 and in a fixed order. With enough workspace one walk through the vocabulary serves
both; else the gradient by hidden is computed block of rows by block of rows, and the logits a second time.

Nothing is known of the rows that are ignored without waiting for the device, so they are multiplied, as zeros.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import Gradients, Head, PairGradients, PairSaved, Saved, Targets
from . import _rows
from ._device import on_device_of
from ._gemm import add_product, product
from ._rows import Matrix, Rows, matrix
from ._sizes import round_up
from .configs import backward_tile
from .delta_logp import contiguous_pair, pair_tile_gradient
from .linear_forward import with_contiguous_bias
from .logp import Tile, contiguous, tile_gradient, transform_of

#: Backward takes this many times the workspace at most: 512 MiB by default.
_SHARE = 2
#: Fewer tokens at a time, and the accumulators' way through memory outlasts the products.
_FEWEST_TOKENS = 1024
_MOST_ROWS = 8192
#: Rows of a block, and of its gradient, begin on 16 bytes.
_ALIGNED = 8
_LEAST_ROWS = 128
#: The largest upstream gradient, times the scale, in float16: far from its limit, 65504, and its smallest number.
_FLOAT16_LARGEST = 2.0**12

#: (first row, column, tiles, outs, shape, in place) → gradients by the tiles' raw logits, into each model's out.
_TileGradient = Callable[[int, int, list[Tile], list[Matrix | None], tuple[int, int], list[bool]], None]
#: (head, its gathered rows, first row, column, gradient): writes the gradient by a block's logits, products and all.
BlockGradient = Callable[[Head, Tensor, int, int, Tensor], None]


class Tiling(NamedTuple):
    """Rows and tokens at a time; `once`: all rows, and both gradients in one walk through the vocabulary."""

    rows: int
    tokens: int
    once: bool


class HeadGradients:
    """One model's head, the gradients wanted of it, and the buffers of a block of rows × tokens.

    A block is computed in tiles of float32 logits, (rows, tokens) of `tile`; with no rows there are none, and tokens
    are what blocks are made of.
    """

    def __init__(self, head: Head, output_mask: list[bool], tile: tuple[int, int] | None = None) -> None:
        self.head = with_contiguous_bias(head)
        hidden, weight, bias, transform = self.head
        self.wants_hidden, self.wants_weight = output_mask[:2]
        self.wants_bias = output_mask[2] and bias is not None
        self.grad_hidden = hidden.new_empty(hidden.shape if self.wants_hidden else 0)
        self.grad_weight = weight.new_empty(weight.shape if self.wants_weight else 0)
        self.grad_bias = (hidden if bias is None else bias).new_empty(weight.shape[0] if self.wants_bias else 0)
        self.transform = transform_of(transform, bias)
        self.tile_rows, self.tile_tokens = backward_tile(hidden.device) if tile is None else tile

    @property
    def wanted(self) -> bool:
        return self.wants_hidden or self.wants_weight or self.wants_bias

    def bytes_of(self, rows: int, tokens: int, totals_of_hidden: bool, totals_of_weight: bool) -> int:
        d, itemsize = self.head.hidden.shape[-1], self.head.dtype.itemsize
        size = rows * round_up(d, _ALIGNED) * itemsize + 4 * min(rows, self.tile_rows) * min(tokens, self.tile_tokens)
        size += rows * tokens * itemsize if self.wanted else 0
        size += 4 * rows * d if totals_of_hidden and self.wants_hidden else 0
        size += 4 * tokens * d if totals_of_weight and self.wants_weight else 0
        if self.head.weight.dtype != self.head.dtype:
            size += tokens * d * itemsize
        return size

    def allocate(self, tiling: Tiling) -> None:
        d = self.head.hidden.shape[-1]
        self._hidden = self._new(self.head.dtype, tiling.rows, round_up(d, _ALIGNED))[:, :d]
        self._tile = self._new(torch.float32, min(tiling.rows, self.tile_rows) * min(tiling.tokens, self.tile_tokens))
        size = tiling.rows * round_up(tiling.tokens, _ALIGNED)
        self._grad_logits = self._new(self.head.dtype, size) if self.wanted else None

    def _new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.head.hidden.device)

    def gather(self, rows: Rows, first: int) -> None:
        _rows.gather_rows(self.head.hidden, rows, first, self._hidden, zero_rest=True)

    def logits(self, row: int, num_rows: int, column: int, num_tokens: int) -> Tile:
        """Of rows of the gathered block."""
        raw = self._tile[: num_rows * num_tokens].view(num_rows, num_tokens)
        weight = self.head.weight[column : column + num_tokens]
        product(self._hidden[row : row + num_rows], weight.t(), out=raw)
        return Tile(matrix(raw), self.transform)

    def grad_logits(self, num_rows: int, num_tokens: int) -> Tensor:
        assert self._grad_logits is not None
        stride = round_up(num_tokens, _ALIGNED)
        return self._grad_logits[: num_rows * stride].view(num_rows, stride)[:, :num_tokens]

    def hidden_of(self, num_rows: int) -> Tensor:
        return self._hidden[:num_rows]

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.grad_hidden, self.grad_weight, self.grad_bias


class BackwardSchedule:
    """Walks through blocks of rows × tokens of the logits of one model or a pair."""

    def __init__(
        self,
        models: list[HeadGradients],
        target: Tensor,
        ignore_index: int,
        gradient: _TileGradient | None,
        inverse_scale: Tensor | None,
        workspace: int,
        block_gradient: BlockGradient | None = None,
    ) -> None:
        """With `gradient` a block is computed tile by tile, with `block_gradient` at once, without bias."""
        self.models, self.gradient, self.inverse_scale = models, gradient, inverse_scale
        self.block_gradient = block_gradient
        self.num_rows, self.vocabulary = target.shape[0], models[0].head.weight.shape[0]
        self.rows = _rows.rows_in_place(target, ignore_index)
        self.memory = _SHARE * workspace * 31 // 32  # the rest: small buffers, and what the allocator rounds up
        self.device = target.device

    def run(self) -> None:
        if self.num_rows == 0:
            for model in self.models:
                for gradient in model.gradients():
                    gradient.zero_()
            return
        wants_hidden = any(model.wants_hidden for model in self.models)
        wants_weight = any(model.wants_weight or model.wants_bias for model in self.models)
        if wants_weight:
            tiling = self._tiling(wants_hidden, True)
            self._by_tokens(tiling, wants_hidden and tiling.once)
            if not wants_hidden or tiling.once:
                return
        if wants_hidden:
            self._by_rows(self._tiling(True, False))

    def _tiling(self, hidden: bool, weight: bool) -> Tiling:
        """The largest blocks that fit: all rows at once if that leaves enough tokens, for one walk instead of two."""

        def size(rows: int, tokens: int, once: bool) -> int:
            return sum(model.bytes_of(rows, tokens, hidden and (once or not weight), weight) for model in self.models)

        def tokens_at(rows: int, once: bool) -> int:
            fixed, per_token = size(rows, 0, once), size(rows, 1, once) - size(rows, 0, once)
            tokens = (self.memory - fixed) // max(1, per_token)
            # Whole tiles: a narrow rest of one is a product at half the speed.
            whole = self.models[0].tile_tokens if tokens >= self.models[0].tile_tokens else 128
            return tokens // whole * whole

        enough = min(_FEWEST_TOKENS, self.vocabulary)
        if (tokens := tokens_at(self.num_rows, True)) >= enough:
            return Tiling(round_up(self.num_rows, 16), min(tokens, self.vocabulary), True)
        rows = round_up(min(_MOST_ROWS, self.num_rows), 16)
        while rows > _LEAST_ROWS and tokens_at(rows, False) < enough:
            rows //= 2
        rows = round_up(rows, 16)
        return Tiling(rows, max(128, min(tokens_at(rows, False), _FEWEST_TOKENS * 8, self.vocabulary)), False)

    def _by_tokens(self, tiling: Tiling, with_hidden: bool) -> None:
        """Gradients by weight and bias, a block of tokens after the other; by hidden too if all rows are at hand."""
        self._allocate(tiling)
        totals = [self._zeros(model.wants_hidden and with_hidden, tiling.rows, model) for model in self.models]
        weight_totals = [self._zeros(model.wants_weight, tiling.tokens, model) for model in self.models]
        bias_totals = [self._bias_total(model) for model in self.models]
        for column, num_tokens in _blocks(self.vocabulary, tiling.tokens):
            for first, num_rows in _blocks(self.num_rows, tiling.rows):
                if column == 0 or tiling.rows < self.num_rows:
                    self._gather(first)
                self._grad_logits(first, num_rows, column, num_tokens, bias_totals)
                for model, total, weight_total in zip(self.models, totals, weight_totals, strict=True):
                    if weight_total is not None:
                        self._add_weight(model, weight_total[:num_tokens], first, num_rows)
                    if total is not None:
                        weight = model.head.weight[column : column + num_tokens]
                        add_product(model.grad_logits(num_rows, num_tokens), weight, out=total[:num_rows])
            for model, weight_total in zip(self.models, weight_totals, strict=True):
                if weight_total is not None:
                    self._store(weight_total[:num_tokens], model.grad_weight[column : column + num_tokens])
        for model, total, bias_total in zip(self.models, totals, bias_totals, strict=True):
            if total is not None:
                self._store(total[: self.num_rows], model.grad_hidden.view(self.num_rows, -1))
            if bias_total is not None:
                model.grad_bias.copy_(bias_total)

    def _by_rows(self, tiling: Tiling) -> None:
        """Gradients by hidden, a block of rows after the other."""
        self._allocate(tiling)
        totals = [self._zeros(model.wants_hidden, tiling.rows, model) for model in self.models]
        for first, num_rows in _blocks(self.num_rows, tiling.rows):
            self._gather(first)
            for total in totals:
                if total is not None:
                    total.zero_()
            for column, num_tokens in _blocks(self.vocabulary, tiling.tokens):
                self._grad_logits(first, num_rows, column, num_tokens, [None for _ in self.models])
                for model, total in zip(self.models, totals, strict=True):
                    if total is not None:
                        weight = model.head.weight[column : column + num_tokens]
                        add_product(model.grad_logits(num_rows, num_tokens), weight, out=total[:num_rows])
            for model, total in zip(self.models, totals, strict=True):
                if total is not None:
                    grad_hidden = model.grad_hidden.view(self.num_rows, -1)
                    self._store(total[:num_rows], grad_hidden[first : first + num_rows])

    def _grad_logits(
        self, first: int, num_rows: int, column: int, num_tokens: int, bias_totals: list[Tensor | None]
    ) -> None:
        """Of a block, tile by tile. The sum for a bias is taken before they are rounded, from the tile itself."""
        if self.block_gradient is not None:
            for model in self.models:
                out = model.grad_logits(num_rows, num_tokens)
                self.block_gradient(model.head, model.hidden_of(num_rows), first, column, out)
            return
        assert self.gradient is not None
        outs = [model.grad_logits(num_rows, num_tokens) if model.wanted else None for model in self.models]
        in_place = [total is not None for total in bias_totals]
        for begin, width in _blocks(num_tokens, self.models[0].tile_tokens):
            for row, height in _blocks(num_rows, self.models[0].tile_rows):
                tiles = [model.logits(row, height, column + begin, width) for model in self.models]
                parts = [
                    None if out is None else matrix(out[row : row + height, begin : begin + width]) for out in outs
                ]
                self.gradient(first + row, column + begin, tiles, parts, (height, width), in_place)
                for tile, total in zip(tiles, bias_totals, strict=True):
                    if total is not None:
                        total[column + begin : column + begin + width] += tile.raw.data.sum(0)

    def _add_weight(self, model: HeadGradients, total: Tensor, first: int, num_rows: int) -> None:
        """Of one block of rows; the first one begins the total."""
        grad_logits = model.grad_logits(num_rows, total.shape[0])
        into = product if first == 0 else add_product
        into(grad_logits.t(), model.hidden_of(num_rows), out=total)

    def _store(self, total: Tensor, out: Tensor) -> None:
        """A float32 total to where it is wanted, in its dtype."""
        out.copy_(total if self.inverse_scale is None else total.mul_(self.inverse_scale))

    def _allocate(self, tiling: Tiling) -> None:
        for model in self.models:
            model.allocate(tiling)

    def _gather(self, first: int) -> None:
        for model in self.models:
            model.gather(self.rows, first)

    def _zeros(self, wanted: bool, size: int, model: HeadGradients) -> Tensor | None:
        hidden = model.head.hidden
        return torch.zeros((size, hidden.shape[-1]), dtype=torch.float32, device=hidden.device) if wanted else None

    def _bias_total(self, model: HeadGradients) -> Tensor | None:
        return torch.zeros(self.vocabulary, dtype=torch.float32, device=self.device) if model.wants_bias else None


def _blocks(total: int, size: int) -> list[tuple[int, int]]:
    """(begin, length) of blocks of `size` that make up `total`."""
    return [(begin, min(size, total - begin)) for begin in range(0, total, size)]


def scale_of(
    dtype: torch.dtype, target: Tensor, ignore_index: int, *grads: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """For float16, a power of two (1,) that the gradients by logits are multiplied with, and its inverse.

    p · g of an ordinary token is smaller than float16's smallest number. No other dtype needs it. What arrives for
    ignored rows does not count.
    """
    present = [grad for grad in grads if grad is not None]
    if dtype != torch.float16 or not present or target.numel() == 0:
        return None, None
    kept = target != ignore_index
    masks = {2: kept, 1: kept.any(-1)}
    largest = torch.stack([torch.where(masks[grad.dim()], grad.abs(), 0.0).amax() for grad in present]).amax()
    exponent = torch.floor(torch.log2(_FLOAT16_LARGEST / largest.clamp_min(1e-30))).clamp(-60.0, 60.0)
    scale = torch.exp2(exponent).reshape(1)
    return scale, 1.0 / scale


def linear_logp_bwd(
    grads: Gradients, head: Head, targets: Targets, saved: Saved, output_mask: list[bool], workspace: int
) -> tuple[Tensor, ...]:
    target, ignore_index = targets.target.contiguous(), targets.ignore_index
    model, grads = HeadGradients(head, output_mask), contiguous(grads)
    scale, inverse_scale = scale_of(head.dtype, target, ignore_index, *grads)

    def gradient(
        first: int,
        column: int,
        tiles: list[Tile],
        outs: list[Matrix | None],
        shape: tuple[int, int],
        in_place: list[bool],
    ) -> None:
        assert outs[0] is not None
        tile_gradient(tiles[0], outs[0], shape, target, saved, grads, ignore_index, scale, first, column, *in_place)

    if model.wanted:
        with on_device_of(target):
            BackwardSchedule([model], target, ignore_index, gradient, inverse_scale, workspace).run()
    return model.gradients()


def linear_delta_logp_bwd(
    grads: PairGradients,
    head: Head,
    base: Head,
    targets: Targets,
    saved: PairSaved,
    output_mask: list[bool],
    workspace: int,
    of_one: Callable[..., tuple[Tensor, ...]] = linear_logp_bwd,
) -> tuple[Tensor, ...]:
    """Without a divergence each model's gradients are its own affair: that of `of_one`."""
    if grads.kl is None and grads.reverse_kl is None:
        own = of_one(grads.model, head, targets, saved.model, output_mask[:3], workspace)
        # A copy of its own: an address that is aligned otherwise would be another kernel to compile.
        base_saved = saved.base._replace(extra=saved.base.extra.clone())
        return *own, *of_one(grads.base, base, targets, base_saved, output_mask[3:], workspace)
    target, ignore_index = targets.target.contiguous(), targets.ignore_index
    models, grads = [HeadGradients(head, output_mask[:3]), HeadGradients(base, output_mask[3:])], contiguous_pair(grads)
    every = (*grads.model, *grads.base, grads.kl, grads.reverse_kl)
    half = torch.float16 if torch.float16 in (head.dtype, base.dtype) else head.dtype
    scale, inverse_scale = scale_of(half, target, ignore_index, *every)

    def gradient(
        first: int,
        column: int,
        tiles: list[Tile],
        outs: list[Matrix | None],
        shape: tuple[int, int],
        in_place: list[bool],
    ) -> None:
        (tile, base_tile), (out, base_out) = tiles, outs
        pair_tile_gradient(
            tile, base_tile, out, base_out, shape, target, saved, grads, ignore_index, scale, first, column,
            (in_place[0], in_place[1]),
        )  # fmt: skip

    if any(output_mask):
        with on_device_of(target):
            BackwardSchedule(models, target, ignore_index, gradient, inverse_scale, workspace).run()
    return *models[0].gradients(), *models[1].gradients()
