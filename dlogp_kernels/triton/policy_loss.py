"""`policy_loss` on GPUs: one walk over the tokens, that also leaves the gradient; a second kernel adds up its parts.

A program takes one sequence, or where a sequence's tokens do not depend on one another every SPLITS-th block of it. The
number of programs a sequence is a function of the shapes, and so is the order of the sums. The definition is
reference_policy.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference_policy import BY_TOKENS, PolicyOptions, options_of
from ..results import PolicyMetrics
from . import _policy
from ._device import on_device_of
from ._policy import kind_of, numbers_of
from ._sizes import ceil_div, next_power_of_2

_BLOCK = 1024
_MOST_SPLITS = 8
#: Sequences that a program looks at together.
_TOGETHER = 128
_METRICS = len(PolicyMetrics._fields)
_LARGEST = tl.constexpr(PolicyMetrics._fields.index("max_ratio"))
#: Besides the numerators of the metrics: the loss, the number of tokens, ∂/∂ log r of a sequence.
_SUMS = _METRICS + 3
_LOSS, _COUNT, _SLOPE = (tl.constexpr(_METRICS + i) for i in range(3))


class Tokens(NamedTuple):
    """One number a token, that of sequence b and token t at b · stride_row + t · stride_column; None for none.

    Packed tokens have a stride_row of 0, and t counts through all sequences.
    """

    data: Any
    stride_row: int
    stride_column: int


class Inputs(NamedTuple):
    """What is known of the tokens; offsets (B + 1,) int64 where they are packed, else None."""

    logp: Tokens
    old_logp: Tokens
    advantage: Tokens
    mask: Tokens
    ref_logp: Tokens
    entropy: Tokens
    kl: Tokens
    token_weight: Tokens
    offsets: Any


@triton.jit
def range_of(offsets, b, T):
    """Where the tokens of sequence b begin and end; T is the number of columns, which is not left."""
    begin, end = b * 0, b * 0 + T
    if offsets is not None:
        begin = tl.maximum(tl.load(offsets + b), 0)
        end = tl.minimum(tl.load(offsets + b + 1), T)
    return begin, end


@triton.jit
def load_tokens(tokens, b, t, mask):
    """float32; 0 where masked out, and where there is no such argument."""
    pointers = tokens.data + b * tokens.stride_row + t * tokens.stride_column
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_mask(tokens, b, t, end):
    inside = t < end
    return inside & (tl.load(tokens.data + b * tokens.stride_row + t * tokens.stride_column, mask=inside, other=0) != 0)


@triton.jit
def _sequences_kernel(inputs, out_ptr, B, T, BLOCK: tl.constexpr):
    """out (3, B) float32: number of tokens, Σ old_logp and Σ (logp − old_logp) of the tokens that count.

    A program takes a sequence. Sums in float32. Deterministic.
    """
    b = tl.program_id(0).to(tl.int64)
    begin, end = range_of(inputs.offsets, b, T)
    zero = tl.zeros([BLOCK], tl.float32)
    count, old_sum, ratio_sum = zero, zero, zero
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        mask = load_mask(inputs.mask, b, t, end)
        old_logp = load_tokens(inputs.old_logp, b, t, mask)
        count += mask.to(tl.float32)
        old_sum += old_logp
        ratio_sum += load_tokens(inputs.logp, b, t, mask) - old_logp
    tl.store(out_ptr + b, tl.sum(count, 0))
    tl.store(out_ptr + B + b, tl.sum(old_sum, 0))
    tl.store(out_ptr + 2 * B + b, tl.sum(ratio_sum, 0))


@triton.jit
def perplexities(sequences_ptr, group_ptr, group, start, B, BLOCK: tl.constexpr):
    """ℓ of BLOCK sequences, and 1 for those of this group that have tokens, else 0."""
    others = start + tl.arange(0, BLOCK)
    count = tl.load(sequences_ptr + others, mask=others < B, other=0.0)
    old_sum = tl.load(sequences_ptr + B + others, mask=others < B, other=0.0)
    groups = tl.load(group_ptr + others, mask=others < B, other=0)
    together = (count > 0.0) & (groups == group)
    return -old_sum / tl.maximum(count, 1.0), together.to(tl.float32)


@triton.jit
def score_of(sequences_ptr, group_ptr, b, B, BLOCK: tl.constexpr):
    """(ℓ − mean_g ℓ) / (std_g ℓ + 1e-6) of sequence b; 0 for one without tokens."""
    group, count = tl.load(group_ptr + b), tl.load(sequences_ptr + b)
    own = -tl.load(sequences_ptr + B + b) / tl.maximum(count, 1.0)
    zero = tl.zeros([BLOCK], tl.float32)
    size, total = zero, zero
    for start in range(0, B, BLOCK):
        perplexity, together = perplexities(sequences_ptr, group_ptr, group, start, B, BLOCK)
        size += together
        total += together * perplexity
    number = tl.maximum(tl.sum(size, 0), 1.0)
    mean = tl.sum(total, 0) / number
    squares = zero
    for start in range(0, B, BLOCK):
        perplexity, together = perplexities(sequences_ptr, group_ptr, group, start, B, BLOCK)
        squares += together * (perplexity - mean) * (perplexity - mean)
    deviation = tl.sqrt_rn(tl.sum(squares, 0) / number)
    return tl.where(count > 0.0, (own - mean) / (deviation + _policy.GROUP_EPSILON), 0.0)


@triton.jit
def _policy_loss_fwd_kernel(
    inputs, numbers, sequences_ptr, group_ptr, coefficient_ptr, sums_ptr, B, T, stride_coefficient,
    SURROGATE: tl.constexpr, REWEIGHT: tl.constexpr, SIGN: tl.constexpr, OF_SEQUENCES: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Loss, metrics and ∂loss/∂logp of tokens, all unscaled: sums (_SUMS, B · SPLITS) float32 and, unless it is None,
    coefficient at b · stride_coefficient + t, 0 where masked.

    inputs: of any floating dtype, computed with in float32. sequences (3, B): of _sequences_kernel, or None.
    A program takes every SPLITS-th block of one sequence. Sums in float32. Deterministic.
    """
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = range_of(inputs.offsets, b, T)
    score, mean_ratio, length = 0.0, 0.0, 1.0
    if REWEIGHT == "ppl":
        score = score_of(sequences_ptr, group_ptr, b, B, TOGETHER)
    if OF_SEQUENCES:
        length = tl.maximum(tl.load(sequences_ptr + b), 1.0)
        mean_ratio = tl.load(sequences_ptr + 2 * B + b) / length
    SUMS_SLOPES: tl.constexpr = OF_SEQUENCES and SURROGATE != "cispo"
    zero = tl.zeros([BLOCK], tl.float32)
    loss_sum, count, slope_sum, low_sum, high_sum, dual_sum = zero, zero, zero, zero, zero, zero
    kl_sum, ratio_sum, largest, weight_sum, ref_kl_sum, entropy_sum = zero, zero, zero, zero, zero, zero
    for start in range(begin + split * BLOCK, end, SPLITS * BLOCK):
        t = start + tl.arange(0, BLOCK)
        mask = load_mask(inputs.mask, b, t, end)
        logp, old_logp = load_tokens(inputs.logp, b, t, mask), load_tokens(inputs.old_logp, b, t, mask)
        advantage = load_tokens(inputs.advantage, b, t, mask)
        weight = _policy.weight_of(old_logp, advantage, score, numbers.alpha, REWEIGHT, SIGN)
        advantage *= weight
        log_ratio = logp - old_logp
        ratio = _policy.ratio_of(mean_ratio + zero if OF_SEQUENCES else log_ratio)
        loss, slope, low, high, dual = _policy.term_of(ratio, advantage, logp, numbers, SURROGATE)
        if SURROGATE != "cispo" and not OF_SEQUENCES:
            slope = _policy.within_limit(slope, log_ratio)
        if inputs.token_weight.data is not None:
            token_weight = load_tokens(inputs.token_weight, b, t, mask)
            loss *= token_weight
            slope *= token_weight
        coefficient = zero
        if SUMS_SLOPES:
            slope_sum += tl.where(mask, slope, 0.0)
        else:
            coefficient = slope
        if inputs.ref_logp.data is not None:
            k3, k3_slope = _policy.k3_of_reference(load_tokens(inputs.ref_logp, b, t, mask), logp)
            ref_kl_sum += tl.where(mask, k3, 0.0)
            # An infinite divergence may be looked at without it.
            loss += tl.where(numbers.kl_beta == 0.0, 0.0, numbers.kl_beta * k3)
            coefficient += numbers.kl_beta * k3_slope
        if inputs.kl.data is not None:
            kl = load_tokens(inputs.kl, b, t, mask)
            ref_kl_sum += kl
            loss += tl.where(numbers.kl_beta == 0.0, 0.0, numbers.kl_beta * kl)
        if inputs.entropy.data is not None:
            entropy = load_tokens(inputs.entropy, b, t, mask)
            entropy_sum += entropy
            loss -= tl.where(numbers.entropy_coef == 0.0, 0.0, numbers.entropy_coef * entropy)
        if coefficient_ptr is not None:
            pointers = coefficient_ptr + b * stride_coefficient + t
            tl.store(pointers, tl.where(mask, coefficient, 0.0), mask=t < end)
        loss_sum += tl.where(mask, loss, 0.0)
        count += mask.to(tl.float32)
        low_sum += (low & mask).to(tl.float32)
        high_sum += (high & mask).to(tl.float32)
        dual_sum += (dual & mask).to(tl.float32)
        kl_sum += tl.where(mask, _policy.k3_of_log_ratio(log_ratio), 0.0)
        ratio_sum += tl.where(mask, ratio, 0.0)
        largest = tl.maximum(largest, tl.where(mask, ratio, 0.0))
        weight_sum += tl.where(mask, weight, 0.0)
    part = b * SPLITS + split
    sums_ptr += part
    stride = B * SPLITS
    # In the order of PolicyMetrics; then loss, count, slope.
    tl.store(sums_ptr, tl.sum(low_sum, 0))
    tl.store(sums_ptr + stride, tl.sum(high_sum, 0))
    tl.store(sums_ptr + 2 * stride, tl.sum(dual_sum, 0))
    tl.store(sums_ptr + 3 * stride, tl.sum(kl_sum, 0))
    tl.store(sums_ptr + 4 * stride, tl.sum(ratio_sum, 0))
    tl.store(sums_ptr + 5 * stride, tl.max(largest, 0))
    tl.store(sums_ptr + 6 * stride, tl.sum(weight_sum, 0))
    tl.store(sums_ptr + 7 * stride, tl.sum(ref_kl_sum, 0))
    tl.store(sums_ptr + 8 * stride, tl.sum(entropy_sum, 0))
    tl.store(sums_ptr + _LOSS * stride, tl.sum(loss_sum, 0))
    tl.store(sums_ptr + _COUNT * stride, tl.sum(count, 0))
    if SUMS_SLOPES and coefficient_ptr is not None:
        slope = _policy.within_limit(tl.sum(slope_sum, 0), mean_ratio) / length
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            mask = load_mask(inputs.mask, b, t, end)
            coefficient = slope + zero
            if inputs.ref_logp.data is not None:
                ref_logp, logp = load_tokens(inputs.ref_logp, b, t, mask), load_tokens(inputs.logp, b, t, mask)
                _, k3_slope = _policy.k3_of_reference(ref_logp, logp)
                coefficient += numbers.kl_beta * k3_slope
            pointers = coefficient_ptr + b * stride_coefficient + t
            tl.store(pointers, tl.where(mask, coefficient, 0.0), mask=t < end)


@triton.jit
def parts_of(sums_ptr, quantity, b, B, SPLITS: tl.constexpr):
    """One sum of the parts of each sequence of the block b, (b, SPLITS) float64."""
    parts = b[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    values = tl.load(sums_ptr + quantity * (B * SPLITS) + parts, mask=(b < B)[:, None], other=0.0)
    return values.to(tl.float64)


@triton.jit
def sum_of_parts(sums_ptr, quantity, b, B, SPLITS: tl.constexpr):
    return tl.sum(parts_of(sums_ptr, quantity, b, B, SPLITS), 1)


@triton.jit
def _policy_loss_finish_kernel(
    sums_ptr, num_tokens_ptr, loss_ptr, metrics_ptr, scale_ptr, B, max_length,
    METRICS: tl.constexpr, DENOMINATOR: tl.constexpr, SPLITS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """loss () = Σ_b scale[b] · loss of b, scale (B,) = 1 / the denominator, metrics (METRICS,) = sums / tokens.

    All float32; sums (_SUMS, B · SPLITS). One program, that adds in float64. Deterministic.
    """
    together = tl.arange(0, TOGETHER).to(tl.int64)
    zero = tl.zeros([TOGETHER], tl.float64)
    counts = zero
    for start in range(0, B, TOGETHER):
        counts += sum_of_parts(sums_ptr, _COUNT, start + together, B, SPLITS)
    total = tl.sum(counts, 0)
    denominator = total
    if num_tokens_ptr is not None:
        denominator = tl.load(num_tokens_ptr).to(tl.float64)
    losses = zero
    for start in range(0, B, TOGETHER):
        b = start + together
        if DENOMINATOR == "sequences":
            divisor = sum_of_parts(sums_ptr, _COUNT, b, B, SPLITS) * B
        elif DENOMINATOR == "max_length":
            divisor = zero + B * max_length
        else:
            divisor = zero + denominator
        scale = tl.where(divisor > 0.0, 1.0 / tl.where(divisor > 0.0, divisor, 1.0), 0.0)
        tl.store(scale_ptr + b, scale.to(tl.float32), mask=b < B)
        losses += tl.where(scale > 0.0, scale * sum_of_parts(sums_ptr, _LOSS, b, B, SPLITS), 0.0)
    tl.store(loss_ptr, tl.sum(losses, 0).to(tl.float32))
    for quantity in range(METRICS):
        values, largest = zero, zero
        for start in range(0, B, TOGETHER):
            parts = parts_of(sums_ptr, quantity, start + together, B, SPLITS)
            values += tl.sum(parts, 1)
            largest = tl.maximum(largest, tl.max(parts, 1))
        mean = tl.sum(values, 0) / tl.where(total > 0.0, total, 1.0)
        metric = tl.where(quantity == _LARGEST, tl.max(largest, 0), mean)
        tl.store(metrics_ptr + quantity, metric.to(tl.float32))


@triton.jit
def _policy_loss_bwd_kernel(
    grad_loss_ptr, coefficient_ptr, scale_ptr, mask, offsets_ptr, grad_logp_ptr, grad_entropy_ptr, grad_kl_ptr,
    T, stride_row, entropy_coef, kl_beta, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_logp = coefficient · factor; of tokens that count grad_entropy = −entropy_coef · factor, grad_kl likewise.

    factor = scale[b] · grad_loss. All float32, coefficient and gradients with rows stride_row apart; a pointer
    that is None is not wanted.
    A program takes every SPLITS-th block of one sequence.
    """
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = range_of(offsets_ptr, b, T)
    factor = tl.load(scale_ptr + b) * tl.load(grad_loss_ptr).to(tl.float32)
    for start in range(begin + split * BLOCK, end, SPLITS * BLOCK):
        t = start + tl.arange(0, BLOCK)
        place = b * stride_row + t
        if grad_logp_ptr is not None:
            tl.store(grad_logp_ptr + place, tl.load(coefficient_ptr + place, mask=t < end) * factor, mask=t < end)
        if grad_entropy_ptr is not None:
            counted = load_mask(mask, b, t, end)
            tl.store(grad_entropy_ptr + place, tl.where(counted, -entropy_coef * factor, 0.0), mask=t < end)
        if grad_kl_ptr is not None:
            counted = load_mask(mask, b, t, end)
            tl.store(grad_kl_ptr + place, tl.where(counted, kl_beta * factor, 0.0), mask=t < end)


def _tokens(x: Tensor | None, packed: bool) -> Tokens:
    if x is None:
        return Tokens(None, 0, 0)
    return Tokens(x, 0 if packed else x.stride(0), x.stride(-1))


def _advantages(x: Tensor, sequences: int, packed: bool) -> Tokens:
    """Of sequences (B,), or of tokens."""
    return Tokens(x, x.stride(0), 0) if x.shape == (sequences,) else _tokens(x, packed)


def policy_loss_fwd(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    group: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    kl: Tensor | None,
    token_weight: Tensor | None,
    num_tokens: Tensor | None,
    choices: list[str],
    numbers: list[float],
    max_length: int | None,
    with_gradient: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    options = options_of(choices, numbers, max_length)
    packed = offsets is not None
    sequences = logp.shape[0] if offsets is None else offsets.shape[0] - 1
    inputs = Inputs(
        _tokens(logp, packed),
        _tokens(old_logp, packed),
        _advantages(advantage, sequences, packed),
        _tokens(mask, packed),
        _tokens(ref_logp, packed),
        _tokens(entropy, packed),
        _tokens(kl, packed),
        _tokens(token_weight, packed),
        None if offsets is None else offsets.contiguous(),
    )

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logp.device)

    # Zero where no sequence reaches.
    coefficient = (torch.zeros if packed else torch.empty)(
        logp.shape if with_gradient else 0, dtype=torch.float32, device=logp.device
    )
    loss, metrics, scale = new(), new(_METRICS), new(sequences)
    if sequences == 0:
        return loss.zero_(), metrics.zero_(), coefficient, scale
    kind, columns = kind_of(options), logp.shape[-1]
    splits = 1 if kind.of_sequences else _splits(columns)
    sums, in_common = new(_SUMS, sequences * splits), None
    with on_device_of(logp):
        if kind.of_sequences or kind.reweight == "ppl":
            in_common = new(3, sequences)
            _sequences_kernel[(sequences,)](inputs, in_common, sequences, columns, BLOCK=_BLOCK, num_warps=8)
        _policy_loss_fwd_kernel[(sequences, splits)](
            inputs, numbers_of(options), in_common, None if group is None else group.contiguous(),
            coefficient if with_gradient else None, sums, sequences, columns, 0 if packed else columns,
            SURROGATE=kind.surrogate, REWEIGHT=kind.reweight, SIGN=kind.sign, OF_SEQUENCES=kind.of_sequences,
            SPLITS=splits, BLOCK=_BLOCK, TOGETHER=_TOGETHER, num_warps=8,
        )  # fmt: skip
        _policy_loss_finish_kernel[(1,)](
            sums, num_tokens, loss, metrics, scale, sequences,
            columns if max_length is None else max_length,
            METRICS=_METRICS, DENOMINATOR=_denominator(options), SPLITS=splits, TOGETHER=_TOGETHER, num_warps=4,
        )  # fmt: skip
    return loss, metrics, coefficient, scale


def _splits(columns: int) -> int:
    """Programs a sequence, a power of two; `columns` is the most tokens that it can have."""
    return min(_MOST_SPLITS, next_power_of_2(ceil_div(max(1, columns), _BLOCK)))


def _denominator(options: PolicyOptions) -> str:
    if options.loss_type in BY_TOKENS:
        return "tokens"
    return "max_length" if options.loss_type == "dr_grpo" else "sequences"


def policy_loss_bwd(
    grad_loss: Tensor,
    coefficient: Tensor,
    scale: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    entropy_coef: float,
    kl_beta: float,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    packed, sequences, columns = offsets is not None, scale.shape[0], mask.shape[-1]
    gradients = [
        (torch.zeros if packed else torch.empty)(mask.shape if wanted else 0, dtype=torch.float32, device=scale.device)
        for wanted in output_mask
    ]
    if sequences == 0 or not any(output_mask):
        return tuple(gradients)
    pointers = [gradient if wanted else None for gradient, wanted in zip(gradients, output_mask, strict=True)]
    splits = _splits(columns)
    with on_device_of(scale):
        _policy_loss_bwd_kernel[(sequences, splits)](
            grad_loss, coefficient, scale, _tokens(mask, packed), None if offsets is None else offsets.contiguous(),
            *pointers, columns, 0 if packed else columns, entropy_coef, kl_beta, SPLITS=splits, BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return tuple(gradients)
