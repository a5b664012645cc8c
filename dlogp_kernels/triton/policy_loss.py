"""`policy_loss` on GPUs: one walk over the tokens, that also leaves the gradient; its last program adds up the parts.

A program takes one sequence, or where a sequence's tokens do not depend on one another every SPLITS-th block of it. The
number of programs a sequence is a function of the shapes, and so is the order of the sums. The definition is
reference/policy.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.policy import BY_TOKENS, PolicyOptions
from ..results import PolicyMetrics
from . import _policy
from ._device import on_device_of
from ._launch import call_of
from ._policy import kind_of, numbers_of
from ._sizes import ceil_div

_BLOCK = 1024
_WARPS = 8
#: Tokens of a block that one thread has.
_EACH = tl.constexpr(4)
#: Programs that padded sequences are split into together, unless that leaves one fewer than _LEAST_SPLITS: forward as
#: many as an H100 has registers for at the same time. Not measured.
_FWD_PROGRAMS, _BWD_PROGRAMS = 512, 2048
_LEAST_SPLITS = 2
#: Sequences that a program looks at together.
_TOGETHER = 128
_METRICS = len(PolicyMetrics._fields)
_LARGEST = tl.constexpr(PolicyMetrics._fields.index("max_ratio"))
#: A part: the numerators of the metrics, the loss, the number of tokens, and zeros.
_PART = tl.constexpr(16)
_LOSS, _COUNT = (tl.constexpr(_METRICS + i) for i in range(2))
#: Parts that the last program loads at a time, and how many of them it adds to one sum.
_PARTS = tl.constexpr(512)
_ROUNDS = tl.constexpr(8)
#: Kernels count columns in such units where they can: then they know them to be aligned, for any number of them.
_UNIT = 16


class Tokens(NamedTuple):
    """One number a token, that of sequence b and token t at b · stride_row + t · stride_column.

    Packed tokens have a stride_row of 0, and t counts through all sequences. Without a stride_column the number is one
    of the sequence.
    """

    data: Any
    stride_row: int
    stride_column: int | None


@triton.jit
def range_of(offsets_ptr, b, T):
    """Where the tokens of sequence b begin and end; T is the number of columns."""
    begin, end = b * 0, b * 0 + T
    if offsets_ptr is not None:
        begin = tl.maximum(tl.load(offsets_ptr + b), 0)
        end = tl.minimum(tl.load(offsets_ptr + b + 1), T)
    return begin, end


@triton.jit
def written_range_of(offsets_ptr, b, B, T, begin, end):
    """`range_of`, where the first and the last sequence also have the tokens that no sequence reaches."""
    if offsets_ptr is not None:
        begin = tl.where(b == 0, 0, begin)
        end = tl.where(b == B - 1, T, end)
    return begin, end


@triton.jit
def is_inside(offsets_ptr, t, begin, end):
    """Of `range_of`, for t in `written_range_of`."""
    inside = t < end
    if offsets_ptr is not None:
        inside &= t >= begin
    return inside


@triton.jit
def row_of(offsets_ptr, b, T):
    """Where row b of a contiguous tensor begins; packed tokens are one row."""
    row = b * 0
    if offsets_ptr is None:
        row = b * T
    return row


@triton.jit
def load_tokens(tokens, b, t, inside):
    """float32 of tokens whether they count or not, so that neighbours are loaded together; 0 outside."""
    row = tokens.data + b * tokens.stride_row
    if tokens.stride_column is None:
        values = tl.load(row)
    else:
        values = tl.load(row + t * tokens.stride_column, mask=inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def load_mask(tokens, b, t, inside):
    return inside & (tl.load(tokens.data + b * tokens.stride_row + t * tokens.stride_column, mask=inside, other=0) != 0)


@triton.jit(do_not_specialize=["B", "T"])
def _sequences_kernel(
    logp, old_logp, mask_tokens, offsets_ptr, out_ptr, finished_ptr, B, T, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """out (3, B) float32: number of tokens, Σ old_logp and Σ (logp − old_logp) of the tokens that count.

    finished (1 + B,) int32 becomes 0. A program takes a sequence. Sums in float32. Deterministic.
    """
    b, T = tl.program_id(0).to(tl.int64), T * UNIT
    begin, end = range_of(offsets_ptr, b, T)
    zero = tl.zeros([BLOCK], tl.float32)
    count, old_sum, ratio_sum = zero, zero, zero
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < end
        mask = load_mask(mask_tokens, b, t, inside)
        old = load_tokens(old_logp, b, t, inside)
        count += mask.to(tl.float32)
        old_sum += tl.where(mask, old, 0.0)
        ratio_sum += tl.where(mask, load_tokens(logp, b, t, inside) - old, 0.0)
    tl.store(out_ptr + b, tl.sum(count, 0))
    tl.store(out_ptr + B + b, tl.sum(old_sum, 0))
    tl.store(out_ptr + 2 * B + b, tl.sum(ratio_sum, 0))
    tl.store(finished_ptr + 1 + b, 0)
    if b == 0:
        tl.store(finished_ptr, 0)


@triton.jit
def perplexities(sequences_ptr, group_ptr, group, start, B, BLOCK: tl.constexpr):
    """ℓ of BLOCK sequences, and 1 for those of this group that have tokens, else 0, in float64."""
    others = start + tl.arange(0, BLOCK)
    count = tl.load(sequences_ptr + others, mask=others < B, other=0.0)
    old_sum = tl.load(sequences_ptr + B + others, mask=others < B, other=0.0)
    groups = tl.load(group_ptr + others, mask=others < B, other=0)
    together = (count > 0.0) & (groups == group)
    return -old_sum.to(tl.float64) / tl.maximum(count, 1.0).to(tl.float64), together.to(tl.float64)


@triton.jit
def score_of(sequences_ptr, group_ptr, b, B, BLOCK: tl.constexpr):
    """(ℓ − mean_g ℓ) / (std_g ℓ + 1e-6) of sequence b; 0 for one without tokens.

    float64: of perplexities that are equal, the rounding of float32 would be a tenth of the 1e-6.
    """
    group, count = tl.load(group_ptr + b), tl.load(sequences_ptr + b)
    own = -tl.load(sequences_ptr + B + b).to(tl.float64) / tl.maximum(count, 1.0).to(tl.float64)
    zero = tl.zeros([BLOCK], tl.float64)
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
    deviation = tl.sqrt(tl.sum(squares, 0) / number)
    score = (own - mean) / (deviation + _policy.GROUP_EPSILON)
    return tl.where(count > 0.0, score, 0.0).to(tl.float32)


@triton.jit
def inverse(x):
    """Of a number ≥ 0, or NaN; 0 of 0."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def given_number(pointer):
    """In float64; NaN where it is negative or not finite, as no number of tokens or responses is."""
    x = tl.load(pointer).to(tl.float64)
    return tl.where((x >= 0.0) & (x < float("inf")), x, float("nan"))


@triton.jit
def finish(
    parts_ptr, counts_ptr, denominator_ptr, loss_ptr, metrics_ptr, scale_ptr, B, splits, max_length,
    METRICS: tl.constexpr, DENOMINATOR: tl.constexpr,
):  # fmt: skip
    """loss = Σ_b scale[b] · loss of b, scale[b] = 1 / the denominator, metrics = sums / tokens; in float64.

    parts (B · splits, _PART) float32; counts (B,) int32, tokens of each sequence where that is the denominator. Other
    programs have written both: what is read of them comes from the L2 cache. denominator (), unless it is None, stands
    in for the number of all tokens, or for B.
    """
    num_parts = B.to(tl.int64) * splits
    column, lane = tl.arange(0, _PART), tl.arange(0, _PARTS).to(tl.int64)
    sums = tl.zeros([_PARTS // _ROUNDS, _PART], tl.float64)
    largest = tl.zeros([_PARTS // _ROUNDS, _PART], tl.float32)
    for start in range(0, num_parts, _PARTS):
        p = (start + lane)[:, None]
        parts = tl.load(parts_ptr + p * _PART + column, mask=p < num_parts, other=0.0, cache_modifier=".cg")
        rounds = tl.reshape(parts, [_ROUNDS, _PARTS // _ROUNDS, _PART])
        sums += tl.sum(rounds.to(tl.float64), 0)
        largest = tl.maximum(largest, tl.max(rounds, 0))
    sums, largest = tl.sum(sums, 0), tl.max(largest, 0)
    total = tl.sum(tl.where(column == _COUNT, sums, 0.0), 0)
    metrics = tl.where(column == _LARGEST, largest, sums / tl.where(total > 0.0, total, 1.0))
    tl.store(metrics_ptr + column, metrics.to(tl.float32), mask=column < METRICS)
    sequences = B.to(tl.float64)
    if denominator_ptr is not None:
        total = given_number(denominator_ptr)
        sequences = total
    if DENOMINATOR == "sequences":
        losses = tl.zeros([_PARTS], tl.float64)
        for start in range(0, num_parts, _PARTS):
            p = start + lane
            inside = p < num_parts
            count = tl.load(counts_ptr + p // splits, mask=inside, other=0, cache_modifier=".cg")
            scale = inverse(count.to(tl.float64) * sequences)
            loss = tl.load(parts_ptr + p * _PART + _LOSS, mask=inside, other=0.0, cache_modifier=".cg")
            losses += _policy.times(scale, loss.to(tl.float64))
            tl.store(scale_ptr + p // splits, scale.to(tl.float32), mask=inside & (p % splits == 0))
        loss = tl.sum(losses, 0)
    else:
        scale = inverse(sequences * max_length if DENOMINATOR == "max_length" else total)
        loss = _policy.times(scale, tl.sum(tl.where(column == _LOSS, sums, 0.0), 0))
        for start in range(0, B, _PARTS):
            b = start + lane
            tl.store(scale_ptr + b, scale.to(tl.float32), mask=b < B)
    tl.store(loss_ptr, loss.to(tl.float32))


@triton.jit
def by_threads(x, UNIT: tl.constexpr):
    """x, a value a token, as a row a thread: neighbours where loads are of several tokens, else far apart."""
    if UNIT == 1:
        rows = tl.trans(tl.reshape(x, [_EACH, x.shape[0] // _EACH]))
    else:
        rows = tl.reshape(x, [x.shape[0] // _EACH, _EACH])
    return rows


@triton.jit
def summed(x, mask, UNIT: tl.constexpr):
    """Of each thread's tokens that count: to sum these takes few registers and no exchange."""
    return tl.sum(by_threads(tl.where(mask, x, 0.0), UNIT), 1)


@triton.jit
def four(a, b, c, d):
    """Side by side, in two new last dimensions."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit(do_not_specialize=["B", "T", "max_length"])
def _policy_loss_fwd_kernel(
    logp_tokens, old_logp_tokens, advantages, mask_tokens, ref_logps, entropies, kls, token_weights, offsets_ptr,
    numbers, sequences_ptr, group_ptr, denominator_ptr, coefficient_ptr, parts_ptr, finished_ptr, loss_ptr, metrics_ptr,
    scale_ptr, B, T, max_length,
    SURROGATE: tl.constexpr, REWEIGHT: tl.constexpr, SIGN: tl.constexpr, IMPORTANCE: tl.constexpr,
    METRICS: tl.constexpr, DENOMINATOR: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """loss (), metrics (METRICS,) and scale (B,) of `finish`; ∂loss/∂logp of tokens, unscaled: unless it is None,
    coefficient, contiguous, 0 where masked. All float32.

    Tokens: of any floating dtype, computed with in float32. sequences (3, B): of _sequences_kernel, or None.
    parts (B · splits, _PART) float32 and finished (1 + B,) int32, which is 0, are workspace.
    Program (b, split) takes every splits-th block of sequence b, and the last one to end adds up the parts, in the same
    order whichever it is. A program sums in float32, the last one in float64. Deterministic.
    """
    b, split, splits, T = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1), T * UNIT
    begin, end = range_of(offsets_ptr, b, T)
    first, last = written_range_of(offsets_ptr, b, B, T, begin, end)
    row = row_of(offsets_ptr, b, T)
    OF_SEQUENCES: tl.constexpr = IMPORTANCE != "token"
    SUMS_SLOPES: tl.constexpr = IMPORTANCE == "sequence" and SURROGATE != "cispo"
    score, mean_ratio, length = 0.0, 0.0, 1.0
    if REWEIGHT == "ppl":
        score = score_of(sequences_ptr, group_ptr, b, B, TOGETHER)
    if OF_SEQUENCES:
        length = tl.maximum(tl.load(sequences_ptr + b), 1.0)
        mean_ratio = tl.load(sequences_ptr + 2 * B + b) / length
    zero = tl.zeros([BLOCK // _EACH], tl.float32)
    loss_sum, count, slope_sum, low_sum, high_sum, dual_sum = zero, zero, zero, zero, zero, zero
    kl_sum, ratio_sum, largest, weight_sum, ref_kl_sum, entropy_sum = zero, zero, zero, zero, zero, zero
    for start in range(first + split * BLOCK, last, splits * BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = is_inside(offsets_ptr, t, begin, end)
        mask = load_mask(mask_tokens, b, t, inside)
        logp, old_logp = load_tokens(logp_tokens, b, t, inside), load_tokens(old_logp_tokens, b, t, inside)
        advantage = load_tokens(advantages, b, t, inside)
        weight = _policy.weight_of(old_logp, advantage, score, numbers.alpha, REWEIGHT, SIGN)
        advantage *= weight
        log_ratio = logp - old_logp
        ratio = _policy.ratio_of(tl.zeros_like(logp) + mean_ratio if OF_SEQUENCES else log_ratio)
        loss, slope, low, high, dual = _policy.term_of(ratio, advantage, logp, numbers, SURROGATE)
        if SURROGATE != "cispo" and not OF_SEQUENCES:
            slope = _policy.within_limit(slope, log_ratio)
        if token_weights is not None:
            token_weight = load_tokens(token_weights, b, t, inside)
            loss = _policy.times(token_weight, loss)
            slope = _policy.times(token_weight, slope)
        coefficient = tl.zeros_like(logp)
        if SUMS_SLOPES:
            slope_sum += summed(slope, mask, UNIT)
        else:
            coefficient = slope
            if IMPORTANCE == "sequence_token" and SURROGATE != "cispo":
                coefficient = _policy.within_limit(slope, mean_ratio)
        if ref_logps is not None:
            k3, k3_slope = _policy.k3_of_reference(load_tokens(ref_logps, b, t, inside), logp)
            ref_kl_sum += summed(k3, mask, UNIT)
            loss += _policy.times(numbers.kl_beta, k3)
            if not SUMS_SLOPES:
                coefficient += _policy.times(numbers.kl_beta, k3_slope)
        if kls is not None:
            kl = load_tokens(kls, b, t, inside)
            ref_kl_sum += summed(kl, mask, UNIT)
            loss += _policy.times(numbers.kl_beta, kl)
        if entropies is not None:
            entropy = load_tokens(entropies, b, t, inside)
            entropy_sum += summed(entropy, mask, UNIT)
            loss -= _policy.times(numbers.entropy_coef, entropy)
        if coefficient_ptr is not None and not SUMS_SLOPES:
            tl.store(coefficient_ptr + row + t, tl.where(mask, coefficient, 0.0), mask=t < last)
        one = tl.full([BLOCK], 1.0, tl.float32)
        loss_sum += summed(loss, mask, UNIT)
        count += summed(one, mask, UNIT)
        low_sum += summed(one, mask & low, UNIT)
        high_sum += summed(one, mask & high, UNIT)
        dual_sum += summed(one, mask & dual, UNIT)
        kl_sum += summed(_policy.k3_of_log_ratio(log_ratio), mask, UNIT)
        ratio_sum += summed(ratio, mask, UNIT)
        largest = tl.maximum(largest, tl.max(by_threads(tl.where(mask, ratio, 0.0), UNIT), 1))
        weight_sum += summed(weight, mask, UNIT)
    # In the order of PolicyMetrics, then loss, count; every fourth one together. One reduction instead of many.
    sums = four(
        four(low_sum, ratio_sum, entropy_sum, zero), four(high_sum, zero, loss_sum, zero),
        four(dual_sum, weight_sum, count, zero), four(kl_sum, ref_kl_sum, zero, zero),
    )  # fmt: skip
    part = tl.sum(tl.reshape(sums, [BLOCK // _EACH, _PART]), 0)
    column = tl.arange(0, _PART)
    part = tl.where(column == _LARGEST, tl.max(largest, 0), part)
    tl.store(parts_ptr + (b * splits + split) * _PART + column, part)
    if SUMS_SLOPES and coefficient_ptr is not None:
        slope = _policy.within_limit(tl.sum(slope_sum, 0), mean_ratio) / length
        for start in range(first, last, BLOCK):
            t = start + tl.arange(0, BLOCK)
            inside = is_inside(offsets_ptr, t, begin, end)
            mask = load_mask(mask_tokens, b, t, inside)
            coefficient = tl.zeros([BLOCK], tl.float32) + slope
            if ref_logps is not None:
                ref_logp, logp = load_tokens(ref_logps, b, t, inside), load_tokens(logp_tokens, b, t, inside)
                _, k3_slope = _policy.k3_of_reference(ref_logp, logp)
                coefficient += _policy.times(numbers.kl_beta, k3_slope)
            tl.store(coefficient_ptr + row + t, tl.where(mask, coefficient, 0.0), mask=t < last)
    if DENOMINATOR == "sequences":
        # A sum of integers: in any order the same.
        tl.atomic_add(finished_ptr + 1 + b, tl.sum(count, 0).to(tl.int32), sem="relaxed")
    # All threads have written before one of them tells, and none reads before one was told.
    tl.debug_barrier()
    ended_before = tl.atomic_add(finished_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    if ended_before == tl.num_programs(0) * splits - 1:
        finish(
            parts_ptr, finished_ptr + 1, denominator_ptr, loss_ptr, metrics_ptr, scale_ptr, B, splits, max_length,
            METRICS, DENOMINATOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "T"])
def _policy_loss_bwd_kernel(
    grad_loss_ptr, coefficient_ptr, scale_ptr, mask_tokens, offsets_ptr, grad_logp_ptr, grad_entropy_ptr, grad_kl_ptr,
    B, T, entropy_coef, kl_beta, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_logp = coefficient · factor; of tokens that count grad_entropy = −entropy_coef · factor, grad_kl likewise.

    factor = scale[b] · grad_loss. All float32, coefficient and gradients contiguous, 0 where masked; a pointer that is
    None is not wanted. Program (b, split) takes every splits-th block of sequence b.
    """
    b, split, T = tl.program_id(0).to(tl.int64), tl.program_id(1), T * UNIT
    begin, end = range_of(offsets_ptr, b, T)
    first, last = written_range_of(offsets_ptr, b, B, T, begin, end)
    row = row_of(offsets_ptr, b, T)
    factor = tl.load(scale_ptr + b) * tl.load(grad_loss_ptr).to(tl.float32)
    for start in range(first + split * BLOCK, last, tl.num_programs(1) * BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside, written, place = is_inside(offsets_ptr, t, begin, end), t < last, row + t
        if grad_logp_ptr is not None:
            coefficient = tl.load(coefficient_ptr + place, mask=inside, other=0.0)
            tl.store(grad_logp_ptr + place, tl.where(inside, coefficient * factor, 0.0), mask=written)
        if grad_entropy_ptr is not None:
            counted = load_mask(mask_tokens, b, t, inside)
            tl.store(grad_entropy_ptr + place, tl.where(counted, -entropy_coef * factor, 0.0), mask=written)
        if grad_kl_ptr is not None:
            counted = load_mask(mask_tokens, b, t, inside)
            tl.store(grad_kl_ptr + place, tl.where(counted, kl_beta * factor, 0.0), mask=written)


def _tokens(x: Tensor, packed: bool) -> Tokens:
    return Tokens(x, 0, x.stride(0)) if packed else Tokens(x, *x.stride())


def _tokens_if_any(x: Tensor | None, packed: bool) -> Tokens | None:
    return None if x is None else _tokens(x, packed)


def _advantages(x: Tensor, sequences: int, packed: bool) -> Tokens:
    """Of sequences (B,), or of tokens."""
    return Tokens(x, x.stride(0), None) if x.shape == (sequences,) else _tokens(x, packed)


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
    denominator: Tensor | None,
    choices: list[str],
    numbers: list[float],
    max_length: int | None,
    with_gradient: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    options = PolicyOptions.of(choices, numbers, max_length)
    kind, device, columns, packed = kind_of(options), logp.device, logp.shape[-1], offsets is not None
    sequences = logp.shape[0] if offsets is None else offsets.shape[0] - 1

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    coefficient = new(*logp.shape) if with_gradient else new(0)
    loss, metrics, scale = new(), new(_METRICS), new(sequences)
    if sequences == 0:
        return loss.zero_(), metrics.zero_(), coefficient.zero_(), scale
    offsets = None if offsets is None else offsets.contiguous()
    given, old, counted = _tokens(logp, packed), _tokens(old_logp, packed), _tokens(mask, packed)
    unit = _unit_of(columns, packed)
    ratio_of_sequence = kind.importance != "token"
    splits = 1 if ratio_of_sequence else _splits(sequences, columns, packed, _FWD_PROGRAMS)
    by_sequence = ratio_of_sequence or kind.reweight == "ppl"
    # What _sequences_kernel writes needs no zeros.
    allocate, of_sequences = (torch.empty if by_sequence else torch.zeros), None
    finished = allocate(1 + sequences, dtype=torch.int32, device=device)
    group = None if group is None else group.contiguous()
    launch = call_of(
        "policy_loss_fwd", device, logp, old_logp, advantage, mask, offsets, group, ref_logp, entropy, kl, token_weight,
        denominator, *choices, max_length, with_gradient,
    ).launch  # fmt: skip
    with on_device_of(logp):
        if by_sequence:
            of_sequences = new(3, sequences)
            tokens = given, old, counted, offsets, of_sequences, finished, sequences, columns // unit
            constants: dict[str, Any] = {"UNIT": unit, "BLOCK": _BLOCK, "num_warps": _WARPS}
            launch(_sequences_kernel, (sequences,), tokens, constants)
        arguments = (
            given, old, _advantages(advantage, sequences, packed), counted, _tokens_if_any(ref_logp, packed),
            _tokens_if_any(entropy, packed), _tokens_if_any(kl, packed), _tokens_if_any(token_weight, packed), offsets,
            numbers_of(options), of_sequences, group, denominator,
            coefficient if with_gradient else None, new(sequences * splits, _PART.value), finished, loss, metrics,
            scale, sequences, columns // unit, columns if max_length is None else max_length,
        )  # fmt: skip
        constants = {
            "SURROGATE": kind.surrogate,
            "REWEIGHT": kind.reweight,
            "SIGN": kind.sign,
            "IMPORTANCE": kind.importance,
            "METRICS": _METRICS,
            "DENOMINATOR": _denominator(options),
            "UNIT": unit,
            "BLOCK": _BLOCK,
            "TOGETHER": _TOGETHER,
            "num_warps": _WARPS,
        }
        launch(_policy_loss_fwd_kernel, (sequences, splits), arguments, constants)
    return loss, metrics, coefficient, scale


def _splits(sequences: int, columns: int, packed: bool, programs: int) -> int:
    """Programs a sequence; `columns` is the most tokens that it can have. Packed ones differ in length: twice as many.

    A function of the shapes alone, as the order of the sums is.
    """
    most = max(_LEAST_SPLITS, (2 if packed else 1) * programs // sequences)
    return max(1, min(ceil_div(columns, _BLOCK), most))


def _unit_of(columns: int, packed: bool) -> int:
    """What kernels count columns in. Sequences that are packed begin anywhere."""
    return _UNIT if not packed and columns % _UNIT == 0 else 1


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
    gradients = tuple(
        torch.empty(mask.shape if wanted else 0, dtype=torch.float32, device=scale.device) for wanted in output_mask
    )
    if sequences == 0 or not any(output_mask):
        return tuple(gradient.zero_() for gradient in gradients)
    pointers = (gradient if wanted else None for gradient, wanted in zip(gradients, output_mask, strict=True))
    unit, splits = _unit_of(columns, packed), _splits(sequences, columns, packed, _BWD_PROGRAMS)
    offsets = None if offsets is None else offsets.contiguous()
    call = call_of("policy_loss_bwd", scale.device, grad_loss, coefficient, scale, mask, offsets, *output_mask)
    with on_device_of(scale):
        arguments = (
            grad_loss, coefficient, scale, _tokens(mask, packed), offsets, *pointers, sequences, columns // unit,
            entropy_coef, kl_beta,
        )  # fmt: skip
        constants = {"UNIT": unit, "BLOCK": _BLOCK, "num_warps": _WARPS}
        call.launch(_policy_loss_bwd_kernel, (sequences, splits), arguments, constants)
    return gradients
