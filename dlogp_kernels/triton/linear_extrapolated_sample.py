"""`linear_extrapolated_sample` on GPUs: draws from both models' tiles of logits while they are in registers.

Whether a row is to be replaced is known only after its last tile, and so is the least finite z_B, which stands in for
−inf: both draws run along, and tokens with z_B = −inf, which the stand-in shifts all alike, have a winner of their own.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..inputs import Head, NoiseInputs, SampleOptions
from ..results import Sample
from . import _math
from ._device import on_device_of, precision, properties
from ._launch import call_of
from ._math import MASKED_LOGIT
from ._sample import (
    DRAFT,
    MOST_NOISE,
    NO_TOKEN,
    REPLACEMENT,
    Noise,
    gumbel,
    is_selected,
    new_sample,
    noise_bits,
    noise_of,
    random_bits,
    random_limit,
    row_noise,
)
from ._sizes import ceil_div, next_power_of_2
from .configs import sample_config
from .linear_forward import (
    Plan,
    bias_of,
    is_masked,
    operands_of,
    pair_of_logits_tiles,
    plan_of,
    share_weight,
    stages_of_one_weight,
    unit_of,
    with_contiguous_bias,
    with_softcap,
)
from .logp import EVERY_ROW

_FINISH_ROWS = 4
#: A possible token keeps a score that can win, however far its logit overflowed.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


class Pair(NamedTuple):
    """Both models' states without the cross terms of a PairState, for criteria that need none."""

    model: Any
    base: Any


class Seen(NamedTuple):
    """What is known of rows from the tiles so far: the models' states (of z itself), and the best score of each draw.

    `unlikely` is that of the tokens with z_B = −inf, without the stand-in for it, `least` the least finite z_B, and
    `bad` is 1 where a logit is NaN or +inf.
    """

    state: Any
    draft: Any
    replacement: Any
    unlikely: Any
    least: Any
    bad: Any


class Memory(NamedTuple):
    """What a split leaves of rows: _SEEN_SIZE numbers and _TOKENS tokens, each a tensor (splits, R), `stride` apart.

    The state, then three numbers of each draw (score, z, z_B; the latter two are those of its token), least, bad. A
    winner's token and logits are written whenever there is a better one, so that no register has to keep them.
    """

    state_ptr: Any
    token_ptr: Any
    stride: Any


_SEEN_SIZE = tl.constexpr(_math.PAIR_STATE_SIZE.value + 3 * 3 + 2)
_TOKENS = tl.constexpr(3)
_DRAFT_PLACE, _REPLACEMENT_PLACE, _UNLIKELY_PLACE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LEAST, _BAD = tl.constexpr(19), tl.constexpr(20)


@triton.jit
def nothing_seen(BLOCK_N: tl.constexpr, DIVERGENCE: tl.constexpr):
    zero = tl.zeros([BLOCK_N], tl.float32)
    none = zero - float("inf")
    if DIVERGENCE:
        state = _math.empty_pair_state(BLOCK_N)
    else:
        state = Pair(_math.empty_state(BLOCK_N), _math.empty_state(BLOCK_N))
    return Seen(state, none, none, none, zero + float("inf"), zero)


@triton.jit
def seen_unless(reset, seen, DIVERGENCE: tl.constexpr):
    """`seen`, or nothing where the scalar `reset` is true."""
    if DIVERGENCE:
        state = _math.pair_state_unless(reset, seen.state)
    else:
        state = Pair(_math.state_unless(reset, seen.state.model), _math.state_unless(reset, seen.state.base))
    return Seen(
        state,
        tl.where(reset, float("-inf"), seen.draft),
        tl.where(reset, float("-inf"), seen.replacement),
        tl.where(reset, float("-inf"), seen.unlikely),
        tl.where(reset, float("inf"), seen.least),
        tl.where(reset, 0.0, seen.bad),
    )


@triton.jit
def z_of(layout, x, tokens, V, MASKED: tl.constexpr):
    """Logits at temperature 1 of a tile of products; MASKED_LOGIT for −inf and outside the vocabulary."""
    if MASKED:
        x += bias_of(layout, tokens, V)[None, :]
    x = with_softcap(x, layout, tokens, V)
    return tl.where(x <= MASKED_LOGIT, MASKED_LOGIT, layout.output_scale * x)


@triton.jit
def scores(z, temperature, possible):
    """z / T of possible tokens, −inf of others."""
    return tl.where(possible, tl.maximum(z / temperature, _LOWEST), float("-inf"))


@triton.jit
def may_win(score, best, mask, GREEDY: tl.constexpr):
    """Whether some row of a tile has a token that, with the most noise, does not lose; a scalar."""
    most = tl.max(score, 1)
    return _math.any_row(mask & (most > float("-inf")) & (most + (0.0 if GREEDY else MOST_NOISE) >= best))


@triton.jit
def noise_of_tile(noise, row_id, step, column, STREAM: tl.constexpr, BLOCK_V: tl.constexpr):
    blocks = column // 4 + tl.arange(0, BLOCK_V // 4)
    return gumbel(noise_bits(noise, row_id[:, None], step[:, None], blocks[None, :], STREAM))


@triton.jit
def better(best, score, z, base_z, memory, mask, column, PLACE: tl.constexpr, BLOCK_V: tl.constexpr):
    """The best score with the tokens of a tile; where it is new, the first token that has it goes to memory."""
    tokens = column + tl.arange(0, BLOCK_V)[None, :]
    most = tl.max(score, 1)
    token = tl.min(tl.where(score == most[:, None], tokens, NO_TOKEN), 1)
    here, wins = tokens == token[:, None], most > best
    number_ptr = memory.state_ptr + (10 + 3 * PLACE) * memory.stride
    tl.store(memory.token_ptr + PLACE * memory.stride, token, mask=mask & wins)
    tl.store(number_ptr + memory.stride, tl.sum(tl.where(here, z, 0.0), 1), mask=mask & wins)
    tl.store(number_ptr + 2 * memory.stride, tl.sum(tl.where(here, base_z, 0.0), 1), mask=mask & wins)
    return tl.where(wins, most, best)


@triton.jit
def fold_state(state, z, base_z, DIVERGENCE: tl.constexpr):
    """The states with a tile; cross terms only where a criterion needs them."""
    if DIVERGENCE:
        return _math.with_unsupported(_math.fold_pair(state, z, base_z, 1.0, 1.0), z, base_z)
    else:
        return Pair(_math.fold(state.model, z, 1.0), _math.fold(state.base, base_z, 1.0))


@triton.jit
def look_at(
    seen, z, base_z, noise, memory, row_id, step, mask, column, gamma, temperature, DIVERGENCE: tl.constexpr,
    BASE_DRAFTS: tl.constexpr, GREEDY: tl.constexpr, REPLACES: tl.constexpr, EXTRAPOLATES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`seen` with a tile of both models' logits."""
    infinity = float("inf")
    wrong = (z != z) | (base_z != base_z) | (z == infinity) | (base_z == infinity)
    bad = tl.maximum(seen.bad, tl.max(wrong.to(tl.float32), 1))
    state = fold_state(seen.state, z, base_z, DIVERGENCE)
    possible, base_possible = z > MASKED_LOGIT, base_z > MASKED_LOGIT
    draft, replacement, unlikely, least = seen.draft, seen.replacement, seen.unlikely, seen.least
    score = scores(base_z, temperature, base_possible) if BASE_DRAFTS else scores(z, temperature, possible)
    if may_win(score, draft, mask, GREEDY):
        if not GREEDY:
            score += noise_of_tile(noise, row_id, step, column, DRAFT, BLOCK_V)
        draft = better(draft, score, z, base_z, memory, mask, column, _DRAFT_PLACE, BLOCK_V)
    if REPLACES:
        if EXTRAPOLATES:
            least = tl.minimum(least, tl.min(tl.where(base_possible, base_z, infinity), 1))
            score = scores((1.0 + gamma) * z, temperature, possible & (base_z <= MASKED_LOGIT))
            if may_win(score, unlikely, mask, GREEDY):
                if not GREEDY:
                    score += noise_of_tile(noise, row_id, step, column, REPLACEMENT, BLOCK_V)
                unlikely = better(unlikely, score, z, base_z, memory, mask, column, _UNLIKELY_PLACE, BLOCK_V)
            score = scores((1.0 + gamma) * z - gamma * base_z, temperature, possible & base_possible)
        else:
            score = scores(z, temperature, possible)
        if may_win(score, replacement, mask, GREEDY):
            if not GREEDY:
                score += noise_of_tile(noise, row_id, step, column, REPLACEMENT, BLOCK_V)
            replacement = better(replacement, score, z, base_z, memory, mask, column, _REPLACEMENT_PLACE, BLOCK_V)
    return Seen(state, draft, replacement, unlikely, least, bad)


@triton.jit
def store_seen(memory, seen, mask, DIVERGENCE: tl.constexpr):
    """All but the winners' tokens and logits."""
    pointer, stride = memory.state_ptr, memory.stride
    if DIVERGENCE:
        _math.store_pair_state(pointer, stride, seen.state, mask)
    else:
        zero = seen.bad * 0.0
        state = _math.PairState(seen.state.model, seen.state.base, zero, zero, zero, zero)
        _math.store_pair_state(pointer, stride, state, mask)
    tl.store(pointer + 10 * stride, seen.draft, mask=mask)
    tl.store(pointer + 13 * stride, seen.replacement, mask=mask)
    tl.store(pointer + 16 * stride, seen.unlikely, mask=mask)
    tl.store(pointer + _LEAST * stride, seen.least, mask=mask)
    tl.store(pointer + _BAD * stride, seen.bad, mask=mask)


@triton.jit
def load_winner(memory, mask, PLACE: tl.constexpr):
    """Best score of a draw, its token and logits, of what splits left, (splits, rows); NO_TOKEN if there is none."""
    number_ptr = memory.state_ptr + (10 + 3 * PLACE) * memory.stride
    score = tl.load(number_ptr, mask=mask, other=float("-inf"))
    mask = mask & (score > float("-inf"))
    tokens = tl.load(memory.token_ptr + PLACE * memory.stride, mask=mask, other=NO_TOKEN)
    best = tl.max(score, 0)
    token = tl.min(tl.where(score == best[None, :], tokens, NO_TOKEN), 0)
    here = mask & (tokens == token[None, :])
    z = tl.sum(tl.where(here, tl.load(number_ptr + memory.stride, mask=mask, other=0.0), 0.0), 0)
    base_z = tl.sum(tl.where(here, tl.load(number_ptr + 2 * memory.stride, mask=mask, other=0.0), 0.0), 0)
    return best, token, z, base_z


@triton.jit(do_not_specialize=["seed", "step", "first_block", "first", "num_rows", "R"])
def _linear_extrapolated_sample_kernel(
    hidden, weight, layout, base_hidden, base_weight, base_layout, seed: tl.int64, step: tl.int32,
    first_block: tl.int32, seed_ptr, step_ptr, row_id_ptr, state_ptr, token_ptr, first, num_rows, R, V, gamma,
    temperature, blocks_per_split, num_splits,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, ONE_WEIGHT: tl.constexpr,
    DIVERGENCE: tl.constexpr, BASE_DRAFTS: tl.constexpr, GREEDY: tl.constexpr, REPLACES: tl.constexpr,
    EXTRAPOLATES: tl.constexpr,
):  # fmt: skip
    """What is `Seen` of rows × splits of the vocabulary, and the winners, from both models' hidden · weightᵀ.

    Both models as in `Layer`, of num_rows rows, which are rows first … of the call; state (_SEEN_SIZE, num_splits, R)
    float32, token (_TOKENS, num_splits, R) int32, as in `Memory`. A program takes one tile of rows through one split,
    then its next unit. Accumulates in float32; deterministic, and a row's bits do not depend on others.
    """
    noise = Noise(seed, step, first_block, seed_ptr, step_ptr, row_id_ptr)
    row_tiles = tl.cdiv(num_rows, BLOCK_N)
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_units = tl.cdiv(tl.maximum(row_tiles * num_splits - program, 0), programs)
    seen = nothing_seen(BLOCK_N, DIVERGENCE)
    for step in range(0, num_units * blocks_per_split):
        block = step % blocks_per_split
        row_tile, split = unit_of(program + step // blocks_per_split * programs, row_tiles, num_splits, GROUP)
        column = (split * blocks_per_split + block) * BLOCK_V
        row = row_tile * BLOCK_N
        tokens = column + tl.arange(0, BLOCK_V)
        x, base_x = pair_of_logits_tiles(
            hidden, weight, layout, base_hidden, base_weight, base_layout, row, column, num_rows, V, BLOCK_N, BLOCK_V,
            BLOCK_D, DESCRIPTORS, PRECISION, ONE_WEIGHT,
        )  # fmt: skip
        z, base_z = z_of(layout, x, tokens, V, MASKED), z_of(base_layout, base_x, tokens, V, MASKED)
        i = row + tl.arange(0, BLOCK_N)
        mask = i < num_rows
        row_id, row_step = row_noise(noise, tl.where(mask, first + i, first), tl.zeros([BLOCK_N], tl.int32))
        memory = Memory(state_ptr + split * R + i, token_ptr + split * R + i, num_splits * R)
        seen = seen_unless(block == 0, seen, DIVERGENCE)
        seen = look_at(
            seen, z, base_z, noise, memory, row_id, row_step, mask, column, gamma, temperature, DIVERGENCE,
            BASE_DRAFTS, GREEDY, REPLACES, EXTRAPOLATES, BLOCK_V,
        )  # fmt: skip
        store_seen(memory, seen, mask & (block == blocks_per_split - 1), DIVERGENCE)


@triton.jit(do_not_specialize=["seed", "step", "first_block", "first", "num_rows", "R", "limit"])
def _finish_linear_sample_kernel(
    state_ptr, token_ptr, seed: tl.int64, step: tl.int32, first_block: tl.int32, seed_ptr, step_ptr, row_id_ptr, out,
    first, num_rows, R, gamma, temperature, threshold, limit: tl.int64, num_splits, CRITERION: tl.constexpr,
    REPLACES: tl.constexpr, EXTRAPOLATES: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sample `out` of rows first + i, i < num_rows, from what the splits saw of them.

    Shapes as in `_linear_extrapolated_sample_kernel`; a program finishes ROWS rows, merging in one fixed order.
    float32; deterministic.
    """
    noise = Noise(seed, step, first_block, seed_ptr, step_ptr, row_id_ptr)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < num_rows
    n = first + tl.where(inside, i, 0)
    splits = tl.arange(0, SPLITS)[:, None]
    place, mask = splits * R + i[None, :], (splits < num_splits) & inside[None, :]
    memory = Memory(state_ptr + place, token_ptr + place, num_splits * R)
    state = _math.merge_pair(_math.load_pair_state(memory.state_ptr, memory.stride, mask), 1.0, 1.0)
    bad = tl.max(tl.load(memory.state_ptr + _BAD * memory.stride, mask=mask, other=0.0), 0) > 0.0
    bad = bad | (state.model.m <= MASKED_LOGIT) | (state.base.m <= MASKED_LOGIT)
    row_id, step = row_noise(noise, n, tl.zeros([ROWS], tl.int32))
    _, draft_token, z, base_z = load_winner(memory, mask, _DRAFT_PLACE)
    token = draft_token
    delta_logp = _math.logp_of(z, state.model, 1.0) - _math.logp_of(base_z, state.base, 1.0)
    bits = random_bits(noise, row_id, step)
    selected = is_selected(state, delta_logp, threshold, bits, limit, CRITERION) & (bad == 0)
    if REPLACES:
        score, new_token, new_z, new_base_z = load_winner(memory, mask, _REPLACEMENT_PLACE)
        if EXTRAPOLATES:
            least = tl.min(tl.load(memory.state_ptr + _LEAST * memory.stride, mask=mask, other=float("inf")), 0)
            other_score, other_token, other_z, other_base_z = load_winner(memory, mask, _UNLIKELY_PLACE)
            other_score = tl.maximum(other_score - gamma * least / temperature, _LOWEST)
            tied_before = (other_score == score) & (other_token < new_token)
            wins = (other_score > score) | tied_before | (new_token == NO_TOKEN)
            wins = wins & (other_token < NO_TOKEN)
            new_token = tl.where(wins, other_token, new_token)
            new_z, new_base_z = tl.where(wins, other_z, new_z), tl.where(wins, other_base_z, new_base_z)
        token = tl.where(selected, new_token, token)
        z, base_z = tl.where(selected, new_z, z), tl.where(selected, new_base_z, base_z)
    nan = float("nan")
    tl.store(out.token + n, tl.where(bad, -1, token).to(tl.int64), mask=inside)
    tl.store(out.draft_token + n, tl.where(bad, -1, draft_token).to(tl.int64), mask=inside)
    tl.store(out.selected + n, selected, mask=inside)
    tl.store(out.delta_logp + n, tl.where(bad, nan, delta_logp), mask=inside)
    tl.store(out.logp + n, tl.where(bad, nan, _math.logp_of(z, state.model, 1.0)), mask=inside)
    tl.store(out.base_logp + n, tl.where(bad, nan, _math.logp_of(base_z, state.base, 1.0)), mask=inside)


def _plan(
    model: Head,
    base: Head,
    rows: int,
    workspace: int,
    criterion: str,
    base_drafts: bool,
    greedy: bool,
    replaces: bool,
    extrapolates: bool,
) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    """And what both kernels are compiled for."""
    plan = plan_of([model, base], rows, _SEEN_SIZE.value + _TOKENS.value, 0, sample_config, workspace)
    shared = {"REPLACES": replaces, "EXTRAPOLATES": extrapolates}
    constants = plan.constants(is_masked(model, plan) or is_masked(base, plan)) | shared
    constants |= {"ONE_WEIGHT": share_weight(model, base, plan), "BASE_DRAFTS": base_drafts, "GREEDY": greedy}
    constants |= {"DIVERGENCE": criterion in ("kl", "reverse_kl", "avg_kl")}
    if constants["ONE_WEIGHT"]:
        constants["num_stages"] = stages_of_one_weight(plan, model.dtype.itemsize)
    splits = next_power_of_2(plan.num_splits)
    return plan, constants, {"CRITERION": criterion, "SPLITS": splits, "ROWS": _FINISH_ROWS, **shared}


def linear_extrapolated_sample(
    head: Head,
    base_head: Head,
    given_noise: NoiseInputs,
    options: SampleOptions,
    workspace: int,
) -> Sample:
    """Without the filters, which eager/ serves."""
    gamma, criterion, threshold, draft, temperature, *_ = options
    hidden, n, v = head.hidden, head.hidden.shape[:-1].numel(), head.weight.shape[0]
    out = new_sample(n, hidden)
    if n == 0:
        return out
    model, base = (with_contiguous_bias(x._replace(hidden=x.hidden.reshape(n, -1))) for x in (head, base_head))
    noise = noise_of(given_noise)
    greedy, replaces = temperature == 0.0, criterion != "none"
    divisor, extrapolates = 1.0 if greedy else temperature, gamma > 0.0
    with on_device_of(hidden):
        choices = criterion, draft == "base", greedy, replaces, extrapolates
        call = call_of(
            "linear_extrapolated_sample", hidden.device, *model, *base, *noise[3:], workspace, *choices,
            precision(properties(hidden.device), model.dtype), model.weight.data_ptr() == base.weight.data_ptr(),
        )  # fmt: skip
        if call.plan is None:
            call.plan = _plan(model, base, n, workspace, *choices)
        plan, constants, finish_constants = call.plan
        shape = (plan.num_splits, plan.num_rows)
        state = hidden.new_empty((_SEEN_SIZE.value, *shape), dtype=torch.float32)
        token = hidden.new_empty((_TOKENS.value, *shape), dtype=torch.int32)
        for first in range(0, n, plan.num_rows):
            rows = slice(first, min(n, first + plan.num_rows))
            count = rows.stop - first
            part, base_part = (x._replace(hidden=x.hidden[rows]) for x in (model, base))
            arguments = (
                *operands_of(part, plan, EVERY_ROW, None, 0), *operands_of(base_part, plan, EVERY_ROW, None, 0), *noise,
                state, token, first, count, plan.num_rows, v, gamma, divisor, plan.blocks_per_split, plan.num_splits,
            )  # fmt: skip
            call.launch(_linear_extrapolated_sample_kernel, (plan.programs,), arguments, constants)
            splits = (
                state, token, *noise, out, first, count, plan.num_rows, gamma, divisor, threshold or 0.0,
                random_limit(threshold), plan.num_splits,
            )  # fmt: skip
            finish_grid = (ceil_div(count, _FINISH_ROWS),)
            call.launch(_finish_linear_sample_kernel, finish_grid, splits, finish_constants)
    return out
