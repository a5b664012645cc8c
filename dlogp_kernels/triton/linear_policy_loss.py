"""`linear_policy_loss` on GPUs, of ratios of tokens: gradients are formed while a block's logits are in memory.

For a slice of rows, the vendor's GEMM writes all logits in float32; Triton kernels fold them into statistics, make of
these each row's loss and upstream gradients, and of those and the logits the gradient by the logits, in the dtype that
multiplies. Of a block of several slices, two more GEMMs add that to the gradients by hidden and weight, in float32: the
more rows at a time, the fewer times the gradient by the weight goes through memory. A slice's logits lie where the
gradients of the next ones will, so slices become smaller towards the end of a block:

    gradients of the slices before │ of this one │    free    │ logits of this one, float32 │

Where no gradient is wanted the statistics come from the fused forward kernels instead.

Nothing is known of the rows that are ignored without waiting for the device, so they are multiplied, as zeros.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Asked, Gradients, Head, OptionalHead, PairGradients, PairSaved, Saved, Targets
from ..reference import policy as reference_policy
from ..reference.rows import PolicyRows
from ..results import DeltaLogpStats, LogpStats, Outputs, PolicyMetrics
from . import _math, _policy, _rows
from ._device import on_device_of
from ._gemm import add_product, product
from ._policy import (
    COUNT,
    LOSS,
    MAX_RATIO,
    METRICS,
    NUM_SUMS,
    PolicyScalars,
    PolicyVariant,
    scalars_of,
    variant_of,
)
from ._rows import matrix
from ._sizes import ceil_div, round_up
from .delta_logp import (
    finish_delta_logp,
    fold_pair_tile,
    pair_tile_gradient,
)
from .linear_delta_logp import linear_delta_logp_fwd
from .linear_forward import with_contiguous_bias
from .linear_logp import linear_logp_fwd
from .logp import (
    EVERY_ROW,
    Tile,
    finish_logp,
    fold_tile,
    new_outputs,
    split_of,
    tile_gradient,
    transform_of,
)

_BLOCK = 128
_SCALED = 2048
#: A slice of logits and a block of gradients take this many times the workspace at most: 768 MiB by default.
_SHARE = 3
#: Of a block at most, and of a slice but for the last one at least, where the workspace allows: below 256 rows the
#: product takes as long as reading the weight does.
_BLOCK_ROWS = 2048
_SLICE_ROWS = 256
#: Of a slice, where the workspace does not.
_FEWEST_ROWS = 16
#: What rows begin at a multiple of, in elements, and logits, in bytes.
_ALIGNED, _ALIGNED_BYTES = 8, 512
#: In float16 the largest scale · |advantage|, times a power of two: leaves room for ratios up to 2 000.
_FLOAT16_LARGEST = 2.0**4


class PolicyInputs(NamedTuple):
    """PolicyRows as pointers, and the statistics of the rows; None for none."""

    old_logp: Any
    advantage: Any
    scale: Any
    score: Any
    ref_logp: Any
    token_weight: Any
    logp: Any
    entropy: Any
    kl: Any


class PolicyOutputs(NamedTuple):
    """Upstream gradients of the rows (N,), and sums (NUM_SUMS, N) of each row."""

    grad_logp: Any
    grad_entropy: Any
    grad_kl: Any
    sums: Any


@triton.jit
def load_known(pointer, n, mask):
    return tl.load(pointer + n, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["first", "end", "N", "ignore_index"])
def _policy_rows_kernel(
    known, out, target_ptr, scalars, first, end, N, ignore_index,
    SURROGATE: tl.constexpr, REWEIGHT: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, metrics and upstream gradients of the rows first … end, of the ratio of each token; 0 where ignored.

    known, out: (N,) float32, out.sums (NUM_SUMS, N), its loss times scale; target (N, 1) int64. A program takes BLOCK
    rows. float32.
    """
    n = (first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = n < end
    mask = inside & (tl.load(target_ptr + n, mask=inside, other=ignore_index) != ignore_index)
    zero = tl.zeros([BLOCK], tl.float32)
    logp, entropy = load_known(known.logp, n, mask), load_known(known.entropy, n, mask)
    old_logp, advantage = load_known(known.old_logp, n, mask), load_known(known.advantage, n, mask)
    scale, score = load_known(known.scale, n, mask), zero
    if REWEIGHT == "ppl":
        score = load_known(known.score, n, mask)
    weight = _policy.weight_of(old_logp, advantage, score, scalars.alpha, REWEIGHT, SIGN)
    advantage *= weight
    log_ratio = logp - old_logp
    ratio = _policy.ratio_of(log_ratio)
    loss, slope, low, high, dual = _policy.term_of(ratio, advantage, logp, scalars, SURROGATE)
    if SURROGATE != "cispo":
        slope = _policy.within_limit(slope, log_ratio)
    if known.token_weight is not None:
        token_weight = load_known(known.token_weight, n, mask)
        loss = _policy.times(token_weight, loss)
        slope = _policy.times(token_weight, slope)
    divergence = zero
    if known.ref_logp is not None:
        divergence, k3_slope = _policy.k3_of_reference(load_known(known.ref_logp, n, mask), logp)
        slope += _policy.times(scalars.kl_beta, k3_slope)
    if known.kl is not None:
        divergence = load_known(known.kl, n, mask)
        tl.store(out.grad_kl + n, scalars.kl_beta * scale, mask=inside)
    loss += _policy.times(scalars.kl_beta, divergence)
    loss -= _policy.times(scalars.entropy_coef, entropy)
    tl.store(out.grad_logp + n, tl.where(mask, slope * scale, 0.0), mask=inside)
    tl.store(out.grad_entropy + n, -scalars.entropy_coef * scale, mask=inside)
    one = mask.to(tl.float32)
    metrics = PolicyMetrics(
        clip_low=tl.where(low, one, 0.0),
        clip_high=tl.where(high, one, 0.0),
        clip_dual=tl.where(dual, one, 0.0),
        approx_kl=tl.where(mask, _policy.k3_of_log_ratio(log_ratio), 0.0),
        mean_ratio=tl.where(mask, ratio, 0.0),
        max_ratio=tl.where(mask, ratio, 0.0),
        mean_weight=tl.where(mask, weight, 0.0),
        ref_kl=tl.where(mask, divergence, 0.0),
        entropy=entropy,
    )
    sums = out.sums + n
    for i in tl.static_range(METRICS):
        tl.store(sums + i * N, metrics[i], mask=inside)
    tl.store(sums + LOSS * N, tl.where(mask & (scale != 0.0), loss * scale, 0.0), mask=inside)
    tl.store(sums + COUNT * N, one, mask=inside)


class _Policy:
    """Rows of a policy loss: what is known of them, what becomes of it."""

    def __init__(
        self, known: PolicyRows, target: Tensor, variant: PolicyVariant, scalars: PolicyScalars, pair: bool
    ) -> None:
        self.known, self.target, self.variant, self.scalars = known, target, variant, scalars
        self.num_rows = target.shape[0]
        grads = [self.new(self.num_rows) for _ in range(3 if pair else 2)]
        self.out = PolicyOutputs(
            grads[0], grads[1], grads[2] if pair else None, self.new(NUM_SUMS.value, self.num_rows)
        )

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.target.device)

    def rows(self, stats: LogpStats | DeltaLogpStats, first: int, end: int, ignore_index: int) -> None:
        """Of rows first … end, whose statistics are there."""
        kl = stats.kl if isinstance(stats, DeltaLogpStats) else None
        variant = self.variant
        _policy_rows_kernel[(ceil_div(end - first, _BLOCK),)](
            PolicyInputs(*self.known, stats.logp, stats.entropy, kl), self.out, self.target, self.scalars, first, end,
            self.num_rows, ignore_index, SURROGATE=variant.surrogate, REWEIGHT=variant.reweight, SIGN=variant.sign,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip

    def results(self) -> tuple[Tensor, Tensor]:
        """Loss and metrics."""
        if self.num_rows == 0:
            return self.new().zero_(), self.new(METRICS.value).zero_()
        sums = self.out.sums.double().sum(1)
        means = sums[: METRICS.value] / sums[COUNT.value].clamp_min(1.0)
        means[MAX_RATIO.value] = self.out.sums[MAX_RATIO.value].amax()
        return sums[LOSS.value].float(), means.float()


class Tiling(NamedTuple):
    """Rows of a block and of its slices, and bytes of the buffer that has gradients and logits."""

    block: int
    slices: list[int]
    bytes: int


class _Buffer:
    """A block's gradients by the logits, in the dtype that multiplies, from the front; at the end a slice's logits."""

    def __init__(self, models: list[Head], tiling: Tiling) -> None:
        self.models, self.vocabulary, self.dtype = len(models), models[0].weight.shape[0], models[0].dtype
        self.bytes = torch.empty(tiling.bytes, dtype=torch.uint8, device=models[0].hidden.device)

    def gradients(self, begin: int, num_rows: int) -> Tensor:
        columns = round_up(self.vocabulary, _ALIGNED)
        row_bytes = columns * self.dtype.itemsize
        taken = self.bytes[begin * row_bytes : (begin + num_rows) * row_bytes]
        return taken.view(self.dtype).view(num_rows, columns)[:, : self.vocabulary]

    def logits(self, num_rows: int) -> Tensor:
        """Of all models, float32."""
        columns = round_up(self.vocabulary, _ALIGNED)
        size = 4 * self.models * num_rows * columns
        begin = len(self.bytes) - round_up(size, _ALIGNED_BYTES)
        taken = self.bytes[begin : begin + size]
        return taken.view(torch.float32).view(self.models, num_rows, columns)[..., : self.vocabulary]


class _Block:
    """One model's hidden states of a block of rows, in a buffer that is used again."""

    def __init__(self, model: Head, num_rows: int) -> None:
        self.model, width = model, model.weight.shape[1]
        self.hidden = model.hidden.new_empty((num_rows, round_up(width, _ALIGNED)), dtype=model.dtype)[:, :width]
        self.transform = transform_of(model.transform, model.bias)

    def gather(self, rows: _rows.Rows, first: int) -> None:
        _rows.gather_rows(self.model.hidden, rows, first, self.hidden, zero_rest=True)

    def logits(self, begin: int, out: Tensor) -> Tile:
        """Of the slice that begins at this row of the block."""
        product(self.hidden[begin : begin + out.shape[0]], self.model.weight.t(), out=out)
        return Tile(matrix(out), self.transform)


class _Accumulators:
    """The gradients wanted of one model, float32."""

    def __init__(self, model: Head, wanted: list[bool], num_rows: int, scale: Tensor) -> None:
        self.model = model
        self.wants_hidden, self.wants_weight, self.wants_bias = (
            wanted[0],
            wanted[1],
            wanted[2] and model.bias is not None,
        )

        def new(shape: Any, wanted: bool, written: bool) -> Tensor:
            allocate = torch.empty if written else torch.zeros
            return allocate(shape if wanted else 0, dtype=torch.float32, device=model.hidden.device)

        # The first block of rows writes them.
        self.hidden = new(model.hidden.shape, self.wants_hidden, num_rows > 0)
        self.weight = new(model.weight.shape, self.wants_weight, num_rows > 0)
        self.bias = new(model.weight.shape[:1], self.wants_bias, False)
        self.scale = _float16_scale(scale) if model.dtype == torch.float16 else None

    def add_bias(self, gradient: Tensor) -> None:
        """By a slice's logits, in float32."""
        if self.wants_bias:
            self.bias += gradient.sum(0)

    def add(self, block: _Block, grad_logits: Tensor, first: int) -> None:
        """Of the block of rows from `first` on."""
        num_rows = grad_logits.shape[0]
        if self.wants_hidden:
            out = self.hidden.view(-1, self.hidden.shape[-1])[first : first + num_rows]
            product(grad_logits, self.model.weight, out=out)
        if self.wants_weight:
            into = product if first == 0 else add_product
            into(grad_logits.t(), block.hidden[:num_rows], out=self.weight)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.scale is not None:
            self.hidden /= self.scale
            self.weight /= self.scale
        return self.hidden, self.weight, self.bias


def _float16_scale(largest: Tensor) -> Tensor:
    """A power of two (1,) that gradients by logits are multiplied with, so that they are numbers of float16."""
    exponent = torch.floor(torch.log2(_FLOAT16_LARGEST / largest.clamp_min(1e-30))).clamp(-60.0, 60.0)
    return torch.exp2(exponent).reshape(1)


def linear_policy_loss_fwd(
    head: Head,
    base: OptionalHead,
    targets: Targets,
    rows: PolicyRows,
    str_options: list[str],
    float_options: list[float],
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    options = reference_policy.PolicyOptions.of(str_options, float_options, None)
    target, ignore_index = targets.target.contiguous(), targets.ignore_index
    models = [with_contiguous_bias(x) for x in (head, base.given()) if x is not None]
    known = PolicyRows._make(None if x is None else x.contiguous() for x in rows)
    policy = _Policy(known, target, variant_of(options), scalars_of(options), len(models) == 2)
    gradients: tuple[Tensor, ...]
    with on_device_of(head.hidden):
        if any(output_mask) and target.shape[0] > 0:
            gradients = _in_blocks(models, policy, output_mask, ignore_index, workspace)
        elif any(output_mask):
            gradients = _Accumulators(models[0], output_mask, 0, known.scale).gradients()
        else:
            gradients = tuple(head.hidden.new_empty(0, dtype=torch.float32) for _ in output_mask)
            if target.shape[0] > 0:
                stats = _statistics(models, target, ignore_index, workspace)
                policy.rows(stats, 0, target.shape[0], ignore_index)
        return *policy.results(), *gradients


def _statistics(models: list[Head], target: Tensor, ignore_index: int, workspace: int) -> LogpStats | DeltaLogpStats:
    targets, asked = Targets(target, ignore_index), Asked(top=False)
    if len(models) == 1:
        *stats, _ = linear_logp_fwd(models[0], targets, asked, workspace)
        return LogpStats(*stats)
    *stats, _ = linear_delta_logp_fwd(models[0], models[1], targets, asked, workspace)
    return DeltaLogpStats(*stats)


def _in_blocks(
    models: list[Head], policy: _Policy, output_mask: list[bool], ignore_index: int, workspace: int
) -> tuple[Tensor, ...]:
    target = policy.target
    tiling = _tiling(models, target.shape[0], workspace)
    rows = _rows.rows_in_place(target, ignore_index)
    blocks, buffer = [_Block(model, tiling.block) for model in models], _Buffer(models, tiling)
    largest = (policy.known.scale * policy.known.advantage.abs()).amax()
    accumulators = _Accumulators(models[0], output_mask, target.shape[0], largest)
    pair, vocabulary = len(models) == 2, models[0].weight.shape[0]
    out = new_outputs(DeltaLogpStats if pair else LogpStats, target, EVERY_ROW, top=False)
    size = (_math.PAIR_STATE_SIZE if pair else _math.STATE_SIZE).value
    splits = ceil_div(vocabulary, split_of(vocabulary))
    state, target_logits = (policy.new(numbers * max(tiling.slices)) for numbers in (size * splits, len(models)))
    for first in range(0, target.shape[0], tiling.block):
        num_rows, begin = min(tiling.block, target.shape[0] - first), 0
        for block in blocks:
            block.gather(rows, first)
        for most_rows in tiling.slices:
            row, count = first + begin, min(most_rows, num_rows - begin)
            if count == 0:
                break
            shape, raw = (count, vocabulary), buffer.logits(count)
            tiles = [block.logits(begin, logits) for block, logits in zip(blocks, raw, strict=True)]
            of_slice = (
                state[: size * splits * count].view(size, splits, count),
                target_logits[: len(models) * count].view(-1, count),
            )
            _fold(tiles, shape, target, ignore_index, *of_slice, out, row)
            policy.rows(out.stats, row, row + count, ignore_index)
            grad_logits = buffer.gradients(begin, count)
            _logits_gradient(tiles, shape, policy, out, accumulators, grad_logits, ignore_index, row)
            accumulators.add_bias(raw[0])
            begin += count
        accumulators.add(blocks[0], buffer.gradients(0, num_rows), first)
    return accumulators.gradients()


def _tiling(models: list[Head], num_rows: int, workspace: int) -> Tiling:
    """What fits: blocks of nearly equal numbers of rows, in slices as large as the gradients before leave room for."""
    memory = _SHARE * workspace * 127 // 128
    columns = round_up(models[0].weight.shape[0], _ALIGNED)
    logits_bytes, gradient_bytes = 4 * columns * len(models), columns * models[0].dtype.itemsize
    hidden_bytes = sum(model.hidden.shape[-1] * model.dtype.itemsize for model in models)

    def fitting(least: int) -> int:
        return (memory - least * logits_bytes) // (gradient_bytes + hidden_bytes) // least * least

    least = _SLICE_ROWS if fitting(_SLICE_ROWS) > 0 else _FEWEST_ROWS
    most = min(_BLOCK_ROWS, max(least, fitting(least)))
    block = min(round_up(ceil_div(num_rows, ceil_div(num_rows, most)), least), round_up(num_rows, _FEWEST_ROWS))
    left, begin, slices, size = memory - block * hidden_bytes, 0, [], 0
    while begin < block:
        rows = (left - begin * gradient_bytes) // (gradient_bytes + logits_bytes) // least * least
        slices.append(min(max(least, rows), block - begin))
        begin += slices[-1]
        size = max(size, begin * gradient_bytes + slices[-1] * logits_bytes)
    return Tiling(block, slices, round_up(size, _ALIGNED_BYTES) + _ALIGNED_BYTES)


def _fold(
    tiles: list[Tile],
    shape: tuple[int, int],
    target: Tensor,
    ignore_index: int,
    state: Tensor,
    target_logits: Tensor,
    out: Outputs,
    first: int,
) -> None:
    """Outputs of a slice."""
    if len(tiles) == 1:
        fold_tile(tiles[0], shape, target, EVERY_ROW, ignore_index, state, target_logits, first)
        finish_logp(
            state, target_logits, target, EVERY_ROW, out, shape[1], tiles[0].output_scale,
            ignore_index, first,
        )  # fmt: skip
        return
    tile, base_tile = tiles
    fold_pair_tile(tile, base_tile, shape, target, EVERY_ROW, ignore_index, state, target_logits, first)
    finish_delta_logp(
        state, target_logits, target, EVERY_ROW, out, shape[1], tile.output_scale,
        base_tile.output_scale, ignore_index, first,
    )  # fmt: skip


def _logits_gradient(
    tiles: list[Tile],
    shape: tuple[int, int],
    policy: _Policy,
    forward: Outputs,
    accumulators: _Accumulators,
    grad_logits: Tensor,
    ignore_index: int,
    first: int,
) -> None:
    """Into grad_logits; for a bias also over the logits themselves, in float32."""
    grads, (stats, extra) = Gradients(*policy.out[:2], None), forward
    out, scale, in_place = matrix(grad_logits), accumulators.scale, accumulators.wants_bias
    target = policy.target
    if len(tiles) == 1:
        saved = Saved(stats.entropy, extra)
        tile_gradient(tiles[0], out, shape, target, saved, grads, ignore_index, scale, first, in_place=in_place)
        return
    tile, base_tile = tiles
    pair_tile_gradient(
        tile, base_tile, out, None, shape, target,
        PairSaved(stats.entropy, stats.base_entropy, stats.kl, stats.reverse_kl, extra),
        PairGradients(grads, Gradients(None, None, None), policy.out.grad_kl, None), ignore_index, scale, first,
        in_place=(in_place, False),
    )  # fmt: skip


def linear_policy_loss_bwd(
    grad_loss: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    gradients, dtypes = (grad_hidden, grad_weight, grad_bias), (hidden_dtype, weight_dtype, bias_dtype)
    with on_device_of(grad_hidden):
        return tuple(
            _scaled(gradient, grad_loss, dtype) if wanted else gradient.new_empty(0, dtype=dtype)
            for gradient, dtype, wanted in zip(gradients, dtypes, output_mask, strict=True)
        )


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out = x · factor: x (size,) and factor (1,) float32, out of any floating dtype. A program takes BLOCK numbers."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size) * tl.load(factor_ptr).to(tl.float32)
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty), mask=i < size)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """As torch.mul with `out`, which takes three times as long where the dtypes differ."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() > 0:
        _scale_kernel[(ceil_div(out.numel(), _SCALED),)](x, factor, out, out.numel(), BLOCK=_SCALED, num_warps=4)
    return out
