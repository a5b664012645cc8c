"""The statistics ops in plain PyTorch: the definition, in blocks of rows and tiles of the vocabulary.

Forward holds full rows of logits, for as many rows as the workspace allows; backward recomputes logits tile by tile.
float32 accumulation (float64 for float64 inputs); deterministic as far as the device's matmul is.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import all_inside, check_target_range
from ..inputs import Asked, Gradients, Head, Logits, PairGradients, PairSaved, Saved, Targets
from ..reference import statistics as reference
from ..reference.statistics import accumulation_dtype, transform_gradient, transform_logits
from ..results import DeltaLogpStats, LogpStats, Outputs, allocated
from ._blocks import (
    BackwardBlocks,
    HeadGradients,
    backward_blocks,
    forward_blocks,
    kept_blocks,
    row_blocks,
    rows_of,
    tile_of,
    tiled_logits,
    tiles,
    zero_gradients,
)

#: reference.logp_stats or reference.delta_logp_stats.
_Definition = Callable[..., LogpStats | DeltaLogpStats]


class _Rows(Protocol):
    """What backward needs of one model or of a pair at a block of rows."""

    def gradients(self, z: Iterator[Tensor], tile: slice, wanted: Sequence[bool]) -> list[Tensor | None]:
        """∂/∂z of each model in a tile of the vocabulary, given every model's z there; None where not wanted."""


_OfRows = Callable[[Tensor], _Rows]
#: Of each model, by hidden, weight and bias, where wanted.
_Gradients = Sequence[Sequence[Tensor | None]]


def linear_logp_fwd(head: Head, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    return _forward_of_heads(LogpStats, reference.logp_stats, [head], targets, asked, workspace)


def linear_delta_logp_fwd(
    head: Head, base_head: Head, targets: Targets, asked: Asked, workspace: int
) -> tuple[Tensor, ...]:
    return _forward_of_heads(DeltaLogpStats, reference.delta_logp_stats, [head, base_head], targets, asked, workspace)


def logp_fwd(logits: Logits, targets: Targets, asked: Asked, workspace: int) -> tuple[Tensor, ...]:
    return _forward_of_logits(LogpStats, reference.logp_stats, [logits], targets, asked, workspace)


def delta_logp_fwd(
    logits: Logits, base_logits: Logits, targets: Targets, asked: Asked, workspace: int
) -> tuple[Tensor, ...]:
    return _forward_of_logits(
        DeltaLogpStats, reference.delta_logp_stats, [logits, base_logits], targets, asked, workspace
    )


def linear_logp_bwd(
    grads: Gradients, head: Head, targets: Targets, saved: Saved, output_mask: list[bool], workspace: int
) -> tuple[Tensor, ...]:
    return _backward_of_heads(
        lambda rows: _ModelRows(rows, targets, grads, saved),
        [head],
        [output_mask],
        targets,
        saved.entropy.dtype,
        workspace,
    )


def linear_delta_logp_bwd(
    grads: PairGradients,
    head: Head,
    base_head: Head,
    targets: Targets,
    saved: PairSaved,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    masks = [output_mask[:3], output_mask[3:]]
    return _backward_of_heads(
        lambda rows: _PairRows(rows, targets, grads, saved),
        [head, base_head],
        masks,
        targets,
        saved.kl.dtype,
        workspace,
    )


def logp_bwd(
    grads: Gradients, logits: Logits, targets: Targets, saved: Saved, output_mask: list[bool], workspace: int
) -> tuple[Tensor, ...]:
    return _backward_of_logits(
        lambda rows: _ModelRows(rows, targets, grads, saved),
        [logits],
        output_mask,
        targets,
        saved.entropy.dtype,
        workspace,
    )


def delta_logp_bwd(
    grads: PairGradients,
    logits: Logits,
    base_logits: Logits,
    targets: Targets,
    saved: PairSaved,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    return _backward_of_logits(
        lambda rows: _PairRows(rows, targets, grads, saved),
        [logits, base_logits],
        output_mask,
        targets,
        saved.kl.dtype,
        workspace,
    )


def _forward_of_heads(
    kind: Any, definition: _Definition, heads: Sequence[Head], targets: Targets, asked: Asked, workspace: int
) -> tuple[Tensor, ...]:
    """A `kind` of statistics, by their definition for the log-softmax of one or two models."""
    dtype, vocabulary = accumulation_dtype(*(x for head in heads for x in head[:3])), heads[0].weight.shape[0]
    targets, bad_rows = check_targets(targets, vocabulary)
    out = allocated(kind, targets.target, targets.target.new_zeros, dtype, asked.top)
    blocks = forward_blocks(heads, dtype, workspace)
    for rows in kept_blocks(targets, blocks.rows):
        raw = [tiled_logits(head, rows, dtype, blocks.tile) for head in heads]
        for some, *values in zip(*(x.split(blocks.rows_of_statistics) for x in (rows, *raw)), strict=True):
            _write(out, definition, values, heads, targets, asked, some)
        del raw, values  # before there are the next ones
    return _without(bad_rows, out)


def _forward_of_logits(
    kind: Any, definition: _Definition, models: Sequence[Logits], targets: Targets, asked: Asked, workspace: int
) -> tuple[Tensor, ...]:
    dtype, vocabulary = accumulation_dtype(*(model.logits for model in models)), models[0].logits.shape[-1]
    targets, bad_rows = check_targets(targets, vocabulary)
    out = allocated(kind, targets.target, targets.target.new_zeros, dtype, asked.top)
    for rows in row_blocks(targets, vocabulary, dtype, len(models), workspace):
        _write(out, definition, [rows_of(x.logits, rows).to(dtype) for x in models], models, targets, asked, rows)
    return _without(bad_rows, out)


def _without(bad_rows: Tensor | None, out: Outputs) -> tuple[Tensor, ...]:
    """In the order of the schema, NaN and no token in these rows (N,)."""
    outputs = out.flat()
    if bad_rows is not None:
        for value in outputs[:-1]:
            value.masked_fill_(bad_rows if value.dim() == 1 else bad_rows[:, None], torch.nan)
        out.extra.masked_fill_(bad_rows, torch.nan)
        out.extra[len(out.stats._field_defaults) :: 2].masked_fill_(bad_rows, -1.0)
    return outputs


def _write(
    out: Outputs,
    definition: _Definition,
    raw: Sequence[Tensor],
    models: Sequence[Head | Logits],
    targets: Targets,
    asked: Asked,
    rows: Tensor,
) -> None:
    """Statistics of a block of rows. What they need besides is gone before the next block begins."""
    of_models = [
        reference.log_softmax(transform_logits(x, *model.transform)) for x, model in zip(raw, models, strict=True)
    ]
    stats = definition(*of_models, targets.target[rows], targets.ignore_index, *asked)
    *fields, extra = out.flat()
    values = [value for value in stats if value is not None]
    normalizers = [x[:, 0] for model in of_models for x in (model.largest, model.rest)]
    for field, value in zip(fields, values, strict=False):
        field[rows] = value
    extra[:, rows] = torch.stack([x.to(extra.dtype) for x in (*normalizers, *values[len(fields) :])])


def _backward_of_heads(
    of_rows: _OfRows,
    heads: Sequence[Head],
    masks: Sequence[list[bool]],
    targets: Targets,
    dtype: torch.dtype,
    workspace: int,
) -> tuple[Tensor, ...]:
    """Gradients by every head's hidden, weight and bias, empty where not wanted.

    A walk through the tiles of the vocabulary, each with all rows, completes the gradients by a tile of the weight. The
    sums for hidden wait beside it where they fit; else they take a walk of their own, block of rows by block.
    """
    found = [zero_gradients(head, mask) for head, mask in zip(heads, masks, strict=True)]
    blocks = backward_blocks(heads, targets.target.shape[0], dtype, workspace)
    if blocks.once:
        totals = [None if by_hidden is None else by_hidden.to(dtype) for by_hidden, *_ in found]
        _walk_tiles(found, totals, of_rows, heads, targets, blocks, dtype)
        for total, (by_hidden, *_) in zip(totals, found, strict=True):
            _put(by_hidden, total)
    else:
        if any(any(mask[1:]) for mask in masks):
            _walk_tiles(found, [None for _ in heads], of_rows, heads, targets, blocks, dtype)
        if any(mask[0] for mask in masks):
            _walk_rows(found, of_rows, heads, targets, blocks, dtype)
    return tuple(
        head.hidden.new_zeros(0, dtype=(head.hidden if x is None else x).dtype) if grad is None else grad
        for head, grads in zip(heads, found, strict=True)
        for x, grad in zip(head[:3], grads, strict=True)
    )


def _walk_tiles(
    found: _Gradients,
    totals: Sequence[Tensor | None],
    of_rows: _OfRows,
    heads: Sequence[Head],
    targets: Targets,
    blocks: BackwardBlocks,
    dtype: torch.dtype,
) -> None:
    """Gradients by weight and bias; those by hidden are added to the totals, if there are any."""
    for tile in tiles(heads[0].weight.shape[0], blocks.tile):
        parts = []
        for head, total, (_, *grads) in zip(heads, totals, found, strict=True):
            # In the gradient itself where it has the dtype of the sums; it is zero so far.
            sums = (None if grad is None else grad[tile].to(dtype) for grad in grads)
            parts.append(HeadGradients(tile_of(head, tile, dtype), [total, *sums], dtype))
        for rows in kept_blocks(targets, blocks.rows):
            _accumulate(parts, of_rows(rows), rows, tile)
        for complete, (_, *grads) in zip(parts, found, strict=True):
            for grad, of_tile in zip(grads, complete.grads[1:], strict=True):
                _put(None if grad is None else grad[tile], of_tile)


def _put(gradient: Tensor | None, sums: Tensor | None) -> None:
    """Sums, if there are any, where they are not yet: they may have been formed in the gradient itself."""
    if gradient is not None and sums is not None and sums.data_ptr() != gradient.data_ptr():
        gradient.copy_(sums)


def _walk_rows(
    found: _Gradients,
    of_rows: _OfRows,
    heads: Sequence[Head],
    targets: Targets,
    blocks: BackwardBlocks,
    dtype: torch.dtype,
) -> None:
    """Gradients by hidden."""
    for rows in kept_blocks(targets, blocks.rows):
        gathered = [head._replace(hidden=rows_of(head.hidden, rows).to(dtype)) for head in heads]
        sums = [
            zero_gradients(head, [by_hidden is not None, False, False])
            for head, (by_hidden, *_) in zip(gathered, found, strict=True)
        ]
        row_stats, places = of_rows(rows), torch.arange(rows.shape[0], device=rows.device)
        for tile in tiles(heads[0].weight.shape[0], blocks.tile):
            of_tile = zip(gathered, sums, strict=True)
            parts = [HeadGradients(tile_of(head, tile, dtype), grads, dtype) for head, grads in of_tile]
            _accumulate(parts, row_stats, places, tile)
        for (total, *_), (by_hidden, *_) in zip(sums, found, strict=True):
            if total is not None and by_hidden is not None:
                by_hidden.view(-1, total.shape[-1])[rows] = total.to(by_hidden.dtype)


def _accumulate(parts: Sequence[HeadGradients], row_stats: _Rows, rows: Tensor, tile: slice) -> None:
    """Add what a block of rows gives to the gradients of the heads, whose weights are the tile's."""
    raw = [part.logits(rows) for part in parts]
    z = (part.transform(x) for part, x in zip(parts, raw, strict=True))
    wanted = [any(grad is not None for grad in part.grads) for part in parts]
    for part, x, grad_z in zip(parts, raw, row_stats.gradients(z, tile, wanted), strict=True):
        if grad_z is not None:
            part.accumulate(rows, slice(0, x.shape[1]), x, grad_z)


def _backward_of_logits(
    of_rows: _OfRows,
    models: Sequence[Logits],
    output_mask: list[bool],
    targets: Targets,
    dtype: torch.dtype,
    workspace: int,
) -> tuple[Tensor, ...]:
    found = tuple(
        x.logits.new_zeros(x.logits.shape if want else 0) for x, want in zip(models, output_mask, strict=True)
    )
    if any(output_mask):
        for rows in row_blocks(targets, models[0].logits.shape[-1], dtype, len(models), workspace):
            _write_gradients(found, of_rows(rows), models, output_mask, rows, dtype)
    return found


def _write_gradients(
    found: Sequence[Tensor],
    row_stats: _Rows,
    models: Sequence[Logits],
    output_mask: list[bool],
    rows: Tensor,
    dtype: torch.dtype,
) -> None:
    """Of a block of rows. What they need besides is gone before the next block begins."""
    raw = [rows_of(model.logits, rows).to(dtype) for model in models]
    z = (transform_logits(x, *model.transform) for x, model in zip(raw, models, strict=True))
    vocabulary = slice(0, raw[0].shape[1])
    for grad, model, x, grad_z in zip(found, models, raw, row_stats.gradients(z, vocabulary, output_mask), strict=True):
        if grad_z is not None:
            grad.view(-1, x.shape[1])[rows] = transform_gradient(grad_z, x, *model.transform).to(grad.dtype)


def check_targets(targets: Targets, vocabulary: int) -> tuple[Targets, Tensor | None]:
    """Targets that can be looked up, and the rows (N,) whose outputs have to become NaN, or None.

    On the CPU, IndexError naming the first target that is neither in [0, V) nor ignored. Elsewhere that would mean to
    wait for the device; such a target becomes 0, and its row NaN.
    """
    target, ignore_index = targets
    if target.device.type == "cpu":
        if not all_inside(target, vocabulary):
            check_target_range(target, target != ignore_index, vocabulary, f"or ignore_index ({ignore_index})")
        return targets, None
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    return targets._replace(target=target.masked_fill(bad, 0)), bad.any(-1)


def _rows_or_zero(value: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(rows, dtype=like.dtype) if value is None else value[rows]


class _ModelRows:
    """What backward needs of one model at a block of rows."""

    def __init__(self, rows: Tensor, targets: Targets, grads: Gradients, saved: Saved) -> None:
        self.target = targets.target[rows]
        grad = torch.zeros_like(self.target, dtype=saved.entropy.dtype) if grads.logp is None else grads.logp[rows]
        self.grad_logp = grad.masked_fill(self.target == targets.ignore_index, 0.0)
        self.grad_entropy = _rows_or_zero(grads.entropy, rows, saved.entropy)
        self.grad_lse = _rows_or_zero(grads.lse, rows, saved.entropy)
        self.entropy, (self.largest, rest) = saved.entropy[rows], saved.extra[:2, rows, None]
        self.log_sum = rest.log1p()

    def logp_all(self, z: Tensor) -> Tensor:
        return (z - self.largest).sub_(self.log_sum)

    def gradients(self, z: Iterator[Tensor], tile: slice, wanted: Sequence[bool]) -> list[Tensor | None]:
        """By the transformed logits of a tile, which are not kept."""
        return [self.gradient(self.logp_all(next(z)), tile) if wanted[0] else None]

    def gradient(self, logp_all: Tensor, tile: slice, *pair: Tensor) -> Tensor:
        """∂/∂z in a tile of the vocabulary, the 1-hot term of `logp` included."""
        grad = reference.logits_gradient(
            logp_all, self.entropy, self.grad_logp.sum(-1), self.grad_entropy, self.grad_lse, *pair
        )
        inside = (self.target >= tile.start) & (self.target < tile.stop)
        column = (self.target - tile.start).masked_fill(~inside, 0)
        return grad.scatter_add(1, column, self.grad_logp.masked_fill(~inside, 0.0))


class _PairRows:
    """What backward needs of both models at a block of rows."""

    def __init__(self, rows: Tensor, targets: Targets, grads: PairGradients, saved: PairSaved) -> None:
        self.model = _ModelRows(rows, targets, grads.model, saved.model)
        self.base = _ModelRows(rows, targets, grads.base, saved.base)
        self.kl, self.reverse_kl = saved.kl[rows], saved.reverse_kl[rows]
        self.grad_kl = _rows_or_zero(grads.kl, rows, saved.kl)
        self.grad_reverse_kl = _rows_or_zero(grads.reverse_kl, rows, saved.kl)

    def gradients(self, z: Iterator[Tensor], tile: slice, wanted: Sequence[bool]) -> list[Tensor | None]:
        """By both models' transformed logits of a tile, which are not kept."""
        logp_all = self.model.logp_all(next(z))
        base_logp_all = self.base.logp_all(next(z))
        pair = base_logp_all, self.kl, self.grad_kl, self.grad_reverse_kl
        base_pair = logp_all, self.reverse_kl, self.grad_reverse_kl, self.grad_kl
        return [
            self.model.gradient(logp_all, tile, *pair) if wanted[0] else None,
            self.base.gradient(base_logp_all, tile, *base_pair) if wanted[1] else None,
        ]
