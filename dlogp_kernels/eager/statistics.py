"""The statistics ops in plain PyTorch: the definition, in blocks of rows and slabs of the vocabulary.

Forward holds full rows of logits for as many rows as the workspace allows; backward recomputes logits slab by slab.
float32 accumulation (float64 for float64 inputs); deterministic as far as the device's matmul is.
"""

import torch
from torch import Tensor

from ..reference import statistics as reference
from ..reference.statistics import accumulation_dtype, transform_gradient, transform_logits
from ._blocks import Head, kept_blocks, row_blocks, rows_of, slabbed_logits, slabs

_BACKWARD_ROWS = 1024


def linear_logp_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, weight.shape[0], ignore_index)
    dtype = accumulation_dtype(hidden, weight, bias)
    logp, entropy, lse = _zeros_like_target(target, dtype, ("K", "", ""))
    for rows in row_blocks(target, ignore_index, weight.shape[0], dtype, 1, workspace):
        raw = slabbed_logits(rows_of(hidden, rows), weight, bias, dtype)
        z = transform_logits(raw, temperature, softcap, logit_scale)
        stats = reference.logp_of_rows(z, target[rows], ignore_index)
        logp[rows], entropy[rows], lse[rows] = stats
    return _poisoned((logp, entropy, lse), bad_rows)


def linear_delta_logp_fwd(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    base_bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, weight.shape[0], ignore_index)
    dtype = accumulation_dtype(hidden, weight, bias, base_hidden, base_weight, base_bias)
    outputs = _zeros_like_target(target, dtype, _PAIR_SHAPES)
    for rows in row_blocks(target, ignore_index, weight.shape[0], dtype, 2, workspace):
        raw = slabbed_logits(rows_of(hidden, rows), weight, bias, dtype)
        base_raw = slabbed_logits(rows_of(base_hidden, rows), base_weight, base_bias, dtype)
        z = transform_logits(raw, temperature, softcap, logit_scale)
        base_z = transform_logits(base_raw, temperature, base_softcap, base_logit_scale)
        stats = reference.delta_logp_of_rows(z, base_z, target[rows], ignore_index)
        for output, value in zip(outputs, stats, strict=True):
            output[rows] = value
    return _poisoned(outputs, bad_rows)


def logp_fwd(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, logits.shape[-1], ignore_index)
    dtype = accumulation_dtype(logits)
    outputs = _zeros_like_target(target, dtype, ("K", "", ""))
    for rows in row_blocks(target, ignore_index, logits.shape[-1], dtype, 1, workspace):
        z = transform_logits(rows_of(logits, rows).to(dtype), temperature, softcap, logit_scale)
        stats = reference.logp_of_rows(z, target[rows], ignore_index)
        for output, value in zip(outputs, stats, strict=True):
            output[rows] = value
    return _poisoned(outputs, bad_rows)


def delta_logp_fwd(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, logits.shape[-1], ignore_index)
    dtype = accumulation_dtype(logits, base_logits)
    outputs = _zeros_like_target(target, dtype, _PAIR_SHAPES)
    for rows in row_blocks(target, ignore_index, logits.shape[-1], dtype, 2, workspace):
        z = transform_logits(rows_of(logits, rows).to(dtype), temperature, softcap, logit_scale)
        base_z = transform_logits(rows_of(base_logits, rows).to(dtype), temperature, base_softcap, base_logit_scale)
        stats = reference.delta_logp_of_rows(z, base_z, target[rows], ignore_index)
        for output, value in zip(outputs, stats, strict=True):
            output[rows] = value
    return _poisoned(outputs, bad_rows)


def linear_logp_bwd(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    head = Head(hidden, weight, bias, temperature, softcap, logit_scale, output_mask, lse.dtype)
    for rows in kept_blocks(target, ignore_index, _BACKWARD_ROWS):
        row_stats = _ModelRows(rows, target, ignore_index, grad_logp, grad_entropy, grad_lse, entropy, lse)
        for slab in slabs(weight.shape[0]):
            raw = head.logits(rows, slab)
            logp_all = head.transform(raw) - row_stats.lse[:, None]
            head.accumulate(rows, slab, raw, row_stats.gradient(logp_all, slab))
    return head.gradients()


def linear_delta_logp_bwd(
    grad_logp: Tensor | None,
    grad_base_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_base_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_lse: Tensor | None,
    grad_base_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    base_bias: Tensor | None,
    entropy: Tensor,
    base_entropy: Tensor,
    kl: Tensor,
    reverse_kl: Tensor,
    lse: Tensor,
    base_lse: Tensor,
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    wanted = [output_mask[i] for i in (0, 1, 4)]
    base_wanted = [output_mask[i] for i in (2, 3, 5)]
    head = Head(hidden, weight, bias, temperature, softcap, logit_scale, wanted, lse.dtype)
    base_head = Head(
        base_hidden, base_weight, base_bias, temperature, base_softcap, base_logit_scale, base_wanted, lse.dtype
    )
    for rows in kept_blocks(target, ignore_index, _BACKWARD_ROWS):
        pair = _PairRows(
            _ModelRows(rows, target, ignore_index, grad_logp, grad_entropy, grad_lse, entropy, lse),
            _ModelRows(
                rows, target, ignore_index, grad_base_logp, grad_base_entropy, grad_base_lse, base_entropy, base_lse
            ),
            *(_rows_or_zero(x, rows, lse) for x in (kl, reverse_kl, grad_kl, grad_reverse_kl)),
        )
        for slab in slabs(weight.shape[0]):
            raw, base_raw = head.logits(rows, slab), base_head.logits(rows, slab)
            logp_all = head.transform(raw) - pair.model.lse[:, None]
            base_logp_all = base_head.transform(base_raw) - pair.base.lse[:, None]
            if any(wanted):
                head.accumulate(rows, slab, raw, pair.gradient(logp_all, base_logp_all, slab))
            if any(base_wanted):
                base_grad = pair.base_gradient(logp_all, base_logp_all, slab)
                base_head.accumulate(rows, slab, base_raw, base_grad)
    gradients, base_gradients = head.gradients(), base_head.gradients()
    return (*gradients[:2], *base_gradients[:2], gradients[2], base_gradients[2])


def logp_bwd(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> Tensor:
    grad_logits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in row_blocks(target, ignore_index, logits.shape[-1], lse.dtype, 1, workspace):
        row_stats = _ModelRows(rows, target, ignore_index, grad_logp, grad_entropy, grad_lse, entropy, lse)
        grad = _logp_gradient(row_stats, rows, logits, (temperature, softcap, logit_scale))
        grad_logits.view(-1, logits.shape[-1])[rows] = grad
    return grad_logits


def _logp_gradient(
    row_stats: "_ModelRows", rows: Tensor, logits: Tensor, options: tuple[float, float | None, float]
) -> Tensor:
    """Of a block of rows. What it needs besides is gone before the next block begins."""
    raw = rows_of(logits, rows).to(row_stats.lse.dtype)
    logp_all = transform_logits(raw, *options) - row_stats.lse[:, None]
    grad_z = row_stats.gradient(logp_all, slice(0, logits.shape[-1]))
    return transform_gradient(grad_z, raw, *options).to(logits.dtype)


def delta_logp_bwd(
    grad_logp: Tensor | None,
    grad_base_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_base_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_lse: Tensor | None,
    grad_base_lse: Tensor | None,
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    entropy: Tensor,
    base_entropy: Tensor,
    kl: Tensor,
    reverse_kl: Tensor,
    lse: Tensor,
    base_lse: Tensor,
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    vocabulary = logits.shape[-1]
    gradients = [
        torch.zeros(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in zip((logits, base_logits), output_mask, strict=True)
    ]
    for rows in row_blocks(target, ignore_index, vocabulary, lse.dtype, 2, workspace):
        pair = _PairRows(
            _ModelRows(rows, target, ignore_index, grad_logp, grad_entropy, grad_lse, entropy, lse),
            _ModelRows(
                rows, target, ignore_index, grad_base_logp, grad_base_entropy, grad_base_lse, base_entropy, base_lse
            ),
            *(_rows_or_zero(x, rows, lse) for x in (kl, reverse_kl, grad_kl, grad_reverse_kl)),
        )
        found = _delta_logp_gradients(
            pair,
            rows,
            logits,
            base_logits,
            (temperature, softcap, logit_scale),
            (temperature, base_softcap, base_logit_scale),
            output_mask,
        )
        for gradient, of_rows in zip(gradients, found, strict=True):
            if of_rows is not None:
                gradient.view(-1, vocabulary)[rows] = of_rows
    return tuple(gradients)


def _delta_logp_gradients(
    pair: "_PairRows",
    rows: Tensor,
    logits: Tensor,
    base_logits: Tensor,
    options: tuple[float, float | None, float],
    base_options: tuple[float, float | None, float],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of a block of rows, likewise."""
    dtype, vocabulary = pair.model.lse.dtype, slice(0, logits.shape[-1])
    raw, base_raw = rows_of(logits, rows).to(dtype), rows_of(base_logits, rows).to(dtype)
    logp_all = transform_logits(raw, *options) - pair.model.lse[:, None]
    base_logp_all = transform_logits(base_raw, *base_options) - pair.base.lse[:, None]
    grad = base_grad = None
    if wanted[0]:
        grad_z = pair.gradient(logp_all, base_logp_all, vocabulary)
        grad = transform_gradient(grad_z, raw, *options).to(logits.dtype)
    if wanted[1]:
        grad_z = pair.base_gradient(logp_all, base_logp_all, vocabulary)
        base_grad = transform_gradient(grad_z, base_raw, *base_options).to(base_logits.dtype)
    return grad, base_grad


def check_target(target: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """A target that can be looked up, and the rows (N,) whose outputs have to become NaN, or None.

    On the CPU, IndexError naming the first target that is neither in [0, V) nor ignored. Elsewhere that would mean to
    wait for the device; such a target becomes 0, and its row is poisoned.
    """
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if target.device.type != "cpu":
        return target.masked_fill(bad, 0), bad.any(-1)
    if bad.any():
        row, candidate = bad.nonzero()[0].tolist()
        raise IndexError(
            f"target[{row}, {candidate}] is {target[row, candidate].item()}, expected a token in [0, {vocabulary}) "
            f"or ignore_index ({ignore_index})"
        )
    return target, None


def _poisoned(outputs: tuple[Tensor, ...], bad_rows: Tensor | None) -> tuple[Tensor, ...]:
    if bad_rows is not None:
        for output in outputs:
            output.masked_fill_(bad_rows if output.dim() == 1 else bad_rows[:, None], torch.nan)
    return outputs


_PAIR_SHAPES = ("K", "K", "K", "", "", "", "", "", "")


def _zeros_like_target(target: Tensor, dtype: torch.dtype, shapes: tuple[str, ...]) -> tuple[Tensor, ...]:
    """One zero tensor an output, of the shape of target (N, K) where "K" stands, else (N,)."""
    return tuple(
        torch.zeros(target.shape if shape == "K" else target.shape[:1], dtype=dtype, device=target.device)
        for shape in shapes
    )


def _rows_or_zero(value: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(rows, dtype=like.dtype) if value is None else value[rows]


class _ModelRows:
    """What backward needs of one model at a block of rows."""

    def __init__(
        self,
        rows: Tensor,
        target: Tensor,
        ignore_index: int,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
        entropy: Tensor,
        lse: Tensor,
    ) -> None:
        self.target = target[rows]
        grad = torch.zeros_like(self.target, dtype=lse.dtype) if grad_logp is None else grad_logp[rows]
        self.grad_logp = grad.masked_fill(self.target == ignore_index, 0.0)
        self.grad_entropy = _rows_or_zero(grad_entropy, rows, lse)
        self.grad_lse = _rows_or_zero(grad_lse, rows, lse)
        self.entropy, self.lse = entropy[rows], lse[rows]

    def gradient(self, logp_all: Tensor, slab: slice, *pair: Tensor) -> Tensor:
        """∂/∂z in a slab of the vocabulary, the 1-hot term of `logp` included."""
        grad = reference.logits_gradient(
            logp_all, self.entropy, self.grad_logp.sum(-1), self.grad_entropy, self.grad_lse, *pair
        )
        inside = (self.target >= slab.start) & (self.target < slab.stop)
        column = (self.target - slab.start).masked_fill(~inside, 0)
        return grad.scatter_add(1, column, self.grad_logp.masked_fill(~inside, 0.0))


class _PairRows:
    """What backward needs of both models at a block of rows."""

    def __init__(
        self,
        model: _ModelRows,
        base: _ModelRows,
        kl: Tensor,
        reverse_kl: Tensor,
        grad_kl: Tensor,
        grad_reverse_kl: Tensor,
    ) -> None:
        self.model, self.base = model, base
        self.kl, self.reverse_kl = kl, reverse_kl
        self.grad_kl, self.grad_reverse_kl = grad_kl, grad_reverse_kl

    def gradient(self, logp_all: Tensor, base_logp_all: Tensor, slab: slice) -> Tensor:
        return self.model.gradient(logp_all, slab, base_logp_all, self.kl, self.grad_kl, self.grad_reverse_kl)

    def base_gradient(self, logp_all: Tensor, base_logp_all: Tensor, slab: slice) -> Tensor:
        return self.base.gradient(base_logp_all, slab, logp_all, self.reverse_kl, self.grad_reverse_kl, self.grad_kl)
