"""`policy_loss` on GPUs: one walk over the tokens, that also leaves the gradient; its last program adds up the parts.

A program takes one sequence, or where a sequence's tokens do not depend on one another every SPLITS-th block of it. The
number of programs a sequence is a function of the shapes, and so is the order of the sums. The definition is
reference/policy.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.policy import PolicyOptions, TokenInputs
from ..results import PolicyMetrics
from . import _policy
from ._device import on_device_of
from ._launch import call_of
from ._policy import COUNT, LOSS, MAX_RATIO, METRICS, scalars_of, variant_of
from ._policy_sequences import (
    BLOCK,
    TOGETHER,
    WARPS,
    advantages_of,
    is_inside,
    load_mask,
    load_tokens,
    range_of,
    row_of,
    score_of,
    sequence_sums,
    tokens_if_any,
    tokens_of,
    unit_of,
    written_range_of,
)
from ._sizes import ceil_div

#: Tokens of a block that one thread has.
_EACH = tl.constexpr(4)
#: Programs that padded sequences are split into together, unless that leaves one fewer than _LEAST_SPLITS: forward as
#: many as an H100 has registers for at the same time. Not measured.
_FWD_PROGRAMS, _BWD_PROGRAMS = 512, 2048
_LEAST_SPLITS = 2
#: A part: what _policy.NUM_SUMS counts, and zeros.
_PART = tl.constexpr(16)
#: Parts that the last program loads at a time, and how many of them it adds to one sum.
_PARTS = tl.constexpr(512)
_ROUNDS = tl.constexpr(8)


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
    DENOMINATOR: tl.constexpr,
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
    total = tl.sum(tl.where(column == COUNT, sums, 0.0), 0)
    metrics = tl.where(column == MAX_RATIO, largest, sums / tl.where(total > 0.0, total, 1.0))
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
            loss = tl.load(parts_ptr + p * _PART + LOSS, mask=inside, other=0.0, cache_modifier=".cg")
            losses += _policy.times(scale, loss.to(tl.float64))
            tl.store(scale_ptr + p // splits, scale.to(tl.float32), mask=inside & (p % splits == 0))
        loss = tl.sum(losses, 0)
    else:
        scale = inverse(sequences * max_length if DENOMINATOR == "max_length" else total)
        loss = _policy.times(scale, tl.sum(tl.where(column == LOSS, sums, 0.0), 0))
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


@triton.jit
def place_of(metrics, loss, count, zero, PLACE: tl.constexpr):
    """What lies at a place of a part."""
    value = zero
    if PLACE < METRICS:
        value = metrics[PLACE]
    elif PLACE == LOSS:
        value = loss
    elif PLACE == COUNT:
        value = count
    return value


@triton.jit
def every_fourth(metrics, loss, count, zero, FIRST: tl.constexpr):
    return four(
        place_of(metrics, loss, count, zero, FIRST),
        place_of(metrics, loss, count, zero, FIRST + 4),
        place_of(metrics, loss, count, zero, FIRST + 8),
        place_of(metrics, loss, count, zero, FIRST + 12),
    )


@triton.jit
def side_by_side(metrics, loss, count, zero):
    """A part of each thread, in new last dimensions."""
    return four(
        every_fourth(metrics, loss, count, zero, 0),
        every_fourth(metrics, loss, count, zero, 1),
        every_fourth(metrics, loss, count, zero, 2),
        every_fourth(metrics, loss, count, zero, 3),
    )


@triton.jit(do_not_specialize=["B", "T", "max_length"])
def _policy_loss_fwd_kernel(
    logp_tokens, old_logp_tokens, advantages, mask_tokens, ref_logps, entropies, kls, token_weights, offsets_ptr,
    scalars, sequences_ptr, group_ptr, denominator_ptr, gradient_ptr, parts_ptr, finished_ptr, loss_ptr, metrics_ptr,
    scale_ptr, B, T, max_length,
    SURROGATE: tl.constexpr, REWEIGHT: tl.constexpr, SIGN: tl.constexpr, IMPORTANCE: tl.constexpr,
    DENOMINATOR: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """loss (), metrics (METRICS,) and scale (B,) of `finish`; ∂loss/∂logp of tokens, unscaled: unless it is None,
    gradient, contiguous, 0 where masked. All float32.

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
        weight = _policy.weight_of(old_logp, advantage, score, scalars.alpha, REWEIGHT, SIGN)
        advantage *= weight
        log_ratio = logp - old_logp
        ratio = _policy.ratio_of(tl.zeros_like(logp) + mean_ratio if OF_SEQUENCES else log_ratio)
        loss, slope, low, high, dual = _policy.term_of(ratio, advantage, logp, scalars, SURROGATE)
        if SURROGATE != "cispo" and not OF_SEQUENCES:
            slope = _policy.within_limit(slope, log_ratio)
        if token_weights is not None:
            token_weight = load_tokens(token_weights, b, t, inside)
            loss = _policy.times(token_weight, loss)
            slope = _policy.times(token_weight, slope)
        gradient = tl.zeros_like(logp)
        if SUMS_SLOPES:
            slope_sum += summed(slope, mask, UNIT)
        else:
            gradient = slope
            if IMPORTANCE == "sequence_token" and SURROGATE != "cispo":
                gradient = _policy.within_limit(slope, mean_ratio)
        if ref_logps is not None:
            k3, k3_slope = _policy.k3_of_reference(load_tokens(ref_logps, b, t, inside), logp)
            ref_kl_sum += summed(k3, mask, UNIT)
            loss += _policy.times(scalars.kl_beta, k3)
            if not SUMS_SLOPES:
                gradient += _policy.times(scalars.kl_beta, k3_slope)
        if kls is not None:
            kl = load_tokens(kls, b, t, inside)
            ref_kl_sum += summed(kl, mask, UNIT)
            loss += _policy.times(scalars.kl_beta, kl)
        if entropies is not None:
            entropy = load_tokens(entropies, b, t, inside)
            entropy_sum += summed(entropy, mask, UNIT)
            loss -= _policy.times(scalars.entropy_coef, entropy)
        if gradient_ptr is not None and not SUMS_SLOPES:
            tl.store(gradient_ptr + row + t, tl.where(mask, gradient, 0.0), mask=t < last)
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
    metrics = PolicyMetrics(
        clip_low=low_sum, clip_high=high_sum, clip_dual=dual_sum, approx_kl=kl_sum, mean_ratio=ratio_sum,
        max_ratio=zero, mean_weight=weight_sum, ref_kl=ref_kl_sum, entropy=entropy_sum,
    )  # fmt: skip
    # One reduction instead of many.
    part = tl.sum(tl.reshape(side_by_side(metrics, loss_sum, count, zero), [BLOCK // _EACH, _PART]), 0)
    column = tl.arange(0, _PART)
    part = tl.where(column == MAX_RATIO, tl.max(largest, 0), part)
    tl.store(parts_ptr + (b * splits + split) * _PART + column, part)
    if SUMS_SLOPES and gradient_ptr is not None:
        slope = _policy.within_limit(tl.sum(slope_sum, 0), mean_ratio) / length
        for start in range(first, last, BLOCK):
            t = start + tl.arange(0, BLOCK)
            inside = is_inside(offsets_ptr, t, begin, end)
            mask = load_mask(mask_tokens, b, t, inside)
            gradient = tl.zeros([BLOCK], tl.float32) + slope
            if ref_logps is not None:
                ref_logp, logp = load_tokens(ref_logps, b, t, inside), load_tokens(logp_tokens, b, t, inside)
                _, k3_slope = _policy.k3_of_reference(ref_logp, logp)
                gradient += _policy.times(scalars.kl_beta, k3_slope)
            tl.store(gradient_ptr + row + t, tl.where(mask, gradient, 0.0), mask=t < last)
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
            DENOMINATOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "T"])
def _policy_loss_bwd_kernel(
    grad_loss_ptr, unscaled_ptr, scale_ptr, mask_tokens, offsets_ptr, grad_logp_ptr, grad_entropy_ptr, grad_kl_ptr,
    B, T, entropy_coef, kl_beta, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_logp = unscaled · factor; of tokens that count grad_entropy = −entropy_coef · factor, grad_kl likewise.

    factor = scale[b] · grad_loss. All float32, unscaled and gradients contiguous, 0 where masked; a pointer that is
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
            unscaled = tl.load(unscaled_ptr + place, mask=inside, other=0.0)
            tl.store(grad_logp_ptr + place, tl.where(inside, unscaled * factor, 0.0), mask=written)
        if grad_entropy_ptr is not None:
            counted = load_mask(mask_tokens, b, t, inside)
            tl.store(grad_entropy_ptr + place, tl.where(counted, -entropy_coef * factor, 0.0), mask=written)
        if grad_kl_ptr is not None:
            counted = load_mask(mask_tokens, b, t, inside)
            tl.store(grad_kl_ptr + place, tl.where(counted, kl_beta * factor, 0.0), mask=written)


def policy_loss_fwd(
    logp: Tensor,
    tokens: TokenInputs,
    str_options: list[str],
    float_options: list[float],
    max_length: int | None,
    with_gradient: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    old_logp, advantage, mask, offsets, group, ref_logp, entropy, kl, token_weight, denominator = tokens
    options = PolicyOptions.of(str_options, float_options, max_length)
    variant, device, columns, packed = variant_of(options), logp.device, logp.shape[-1], offsets is not None
    sequences = logp.shape[0] if offsets is None else offsets.shape[0] - 1

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    grad_logp_unscaled = new(*logp.shape) if with_gradient else new(0)
    loss, metrics, scale = new(), new(METRICS.value), new(sequences)
    if sequences == 0:
        return loss.zero_(), metrics.zero_(), grad_logp_unscaled.zero_(), scale
    offsets = None if offsets is None else offsets.contiguous()
    given, old, counted = tokens_of(logp, packed), tokens_of(old_logp, packed), tokens_of(mask, packed)
    unit = unit_of(columns, packed)
    ratio_of_sequence = variant.importance != "token"
    splits = 1 if ratio_of_sequence else _splits(sequences, columns, packed, _FWD_PROGRAMS)
    by_sequence = ratio_of_sequence or variant.reweight == "ppl"
    # What _sequences_kernel writes needs no zeros.
    allocate, sums = (torch.empty if by_sequence else torch.zeros), None
    finished = allocate(1 + sequences, dtype=torch.int32, device=device)
    group = None if group is None else group.contiguous()
    launch = call_of(
        "policy_loss_fwd", device, logp, old_logp, advantage, mask, offsets, group, *tokens[5:], *str_options,
        max_length, with_gradient,
    ).launch  # fmt: skip
    with on_device_of(logp):
        if by_sequence:
            sums = sequence_sums(launch, given, old, counted, offsets, finished, columns, unit)
        arguments = (
            given, old, advantages_of(advantage, sequences, packed), counted, tokens_if_any(ref_logp, packed),
            tokens_if_any(entropy, packed), tokens_if_any(kl, packed), tokens_if_any(token_weight, packed), offsets,
            scalars_of(options), sums, group, denominator, grad_logp_unscaled if with_gradient else None,
            new(sequences * splits, _PART.value), finished, loss, metrics, scale, sequences, columns // unit,
            columns if max_length is None else max_length,
        )  # fmt: skip
        constants = {
            "SURROGATE": variant.surrogate,
            "REWEIGHT": variant.reweight,
            "SIGN": variant.sign,
            "IMPORTANCE": variant.importance,
            "DENOMINATOR": options.denominator,
            "UNIT": unit,
            "BLOCK": BLOCK,
            "TOGETHER": TOGETHER,
            "num_warps": WARPS,
        }
        launch(_policy_loss_fwd_kernel, (sequences, splits), arguments, constants)
    return loss, metrics, grad_logp_unscaled, scale


def _splits(sequences: int, columns: int, packed: bool, programs: int) -> int:
    """Programs a sequence; `columns` is the most tokens that it can have. Packed ones differ in length: twice as many.

    A function of the shapes alone, as the order of the sums is.
    """
    most = max(_LEAST_SPLITS, (2 if packed else 1) * programs // sequences)
    return max(1, min(ceil_div(columns, BLOCK), most))


def policy_loss_bwd(
    grad_loss: Tensor,
    grad_logp_unscaled: Tensor,
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
    unit, splits = unit_of(columns, packed), _splits(sequences, columns, packed, _BWD_PROGRAMS)
    offsets = None if offsets is None else offsets.contiguous()
    call = call_of("policy_loss_bwd", scale.device, grad_loss, grad_logp_unscaled, scale, mask, offsets, *output_mask)
    with on_device_of(scale):
        arguments = (
            grad_loss, grad_logp_unscaled, scale, tokens_of(mask, packed), offsets, *pointers, sequences,
            columns // unit, entropy_coef, kl_beta,
        )  # fmt: skip
        constants = {"UNIT": unit, "BLOCK": BLOCK, "num_warps": WARPS}
        call.launch(_policy_loss_bwd_kernel, (sequences, splits), arguments, constants)
    return gradients
