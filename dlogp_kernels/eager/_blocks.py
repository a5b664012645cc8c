"""Blocks of rows and slabs of the vocabulary, in which plain PyTorch forms logits and their gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import statistics as reference
from ..reference.statistics import transform_gradient, transform_logits

# Temporaries of the size of a block of logits that are alive at once, per model, at most.
_TEMPORARIES = 8


SLAB = 4096


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (…, columns) by their flat index, without a copy of the others."""
    index: list[Tensor] = []
    for size in reversed(x.shape[1:-1]):  # not torch.unravel_index, which a CUDA graph can not capture
        index.insert(0, rows % size)
        rows = rows // size
    return x[rows, *index]


def row_blocks(
    target: Tensor, ignore_index: int, vocabulary: int, dtype: torch.dtype, models: int, workspace: int
) -> Iterator[Tensor]:
    row_bytes = vocabulary * dtype.itemsize * _TEMPORARIES * models
    return kept_blocks(target, ignore_index, max(1, workspace // row_bytes))


def kept_blocks(target: Tensor, ignore_index: int, size: int) -> Iterator[Tensor]:
    rows = reference.kept_rows(target, ignore_index)
    return iter(rows.split(size) if rows.numel() else ())


def slabs(vocabulary: int) -> Iterator[slice]:
    for begin in range(0, vocabulary, SLAB):
        yield slice(begin, min(begin + SLAB, vocabulary))


def slabbed_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`reference.linear_logits` without a converted copy of the whole weight."""
    raw = torch.empty((hidden.shape[0], weight.shape[0]), dtype=dtype, device=hidden.device)
    for slab in slabs(weight.shape[0]):
        slab_bias = None if bias is None else bias[slab]
        raw[:, slab] = reference.linear_logits(hidden, weight[slab], slab_bias, dtype)
    return raw


class Head:
    """One model's last layer: recomputes slabs of logits and accumulates the gradients that are wanted."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        wanted: list[bool],
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.options = (temperature, softcap, logit_scale)
        self.dtype = dtype
        self.inputs = (hidden, weight, bias)
        self.grads = [
            x.new_zeros(x.shape, dtype=dtype) if want and x is not None else None
            for x, want in zip(self.inputs, wanted, strict=True)
        ]

    def logits(self, rows: Tensor, slab: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[slab]
        return reference.linear_logits(rows_of(self.hidden, rows), self.weight[slab], bias, self.dtype)

    def transform(self, raw: Tensor) -> Tensor:
        return transform_logits(raw, *self.options)

    def accumulate(self, rows: Tensor, slab: slice, raw: Tensor, grad_z: Tensor) -> None:
        grad = transform_gradient(grad_z, raw, *self.options)
        grad_hidden, grad_weight, grad_bias = self.grads
        if grad_hidden is not None:
            grad_hidden.view(-1, grad_hidden.shape[-1])[rows] += grad @ self.weight[slab].to(self.dtype)
        if grad_weight is not None:
            grad_weight[slab] += grad.t() @ rows_of(self.hidden, rows).to(self.dtype)
        if grad_bias is not None:
            grad_bias[slab] += grad.sum(0)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtype of each input; empty where not wanted."""
        hidden, weight, bias = (
            self.hidden.new_zeros(0) if grad is None or x is None else grad.to(x.dtype)
            for x, grad in zip(self.inputs, self.grads, strict=True)
        )
        return hidden, weight, bias
