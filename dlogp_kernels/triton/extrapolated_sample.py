"""`extrapolated_sample` on GPUs: draft, criterion and replacement of a row by one program, without sorting.

The definition is reference/sampling.py; the noise is the same bit for bit. What a filter drops is found by narrowing an
interval of float32 numbers: a walk over the row weighs what lies above seven numbers in it, and an eighth is left.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import NoiseInputs, SampleOptions
from ..results import Sample
from . import _math
from ._device import on_device_of
from ._launch import call_of
from ._rows import Matrix, matrix, row_offset
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
from ._sizes import next_power_of_2
from .logp import possible

_BLOCK = 1024
#: Numbers that a walk weighs; a power of 2.
_MARKS = tl.constexpr(8)


class Pair(NamedTuple):
    """Both models' logits, and how a draw looks at them: see `load_scores`."""

    logits: Matrix
    base_logits: Matrix
    gamma: float
    temperature: float


@triton.jit
def load_logits(matrix, row, tokens, V):
    """float32; −inf outside the vocabulary."""
    pointers = matrix.data + row_offset(matrix, row) + tokens.to(tl.int64) * matrix.stride_column
    return tl.load(pointers, mask=tokens < V, other=float("-inf")).to(tl.float32)


@triton.jit
def load_scores(pair, row, tokens, V, least_base, STREAM: tl.constexpr, BASE_DRAFTS: tl.constexpr):
    """z / T of the model that drafts, or of the extrapolation; `least_base` stands in for −inf in the base alone."""
    if STREAM == REPLACEMENT:
        rl, base = load_logits(pair.logits, row, tokens, V), load_logits(pair.base_logits, row, tokens, V)
        base = tl.where(base == float("-inf"), least_base, base)
        z = tl.where(rl == float("-inf"), rl, (1.0 + pair.gamma) * rl - pair.gamma * base)
    elif BASE_DRAFTS:
        z = load_logits(pair.base_logits, row, tokens, V)
    else:
        z = load_logits(pair.logits, row, tokens, V)
    return z / pair.temperature


@triton.jit
def key_of(x):
    """An int32 in the order of the float32 numbers; the same for both zeros."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def weight_above(
    pair, row, V, least_base, largest, low, high, MASS: tl.constexpr, STREAM: tl.constexpr,
    BASE_DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """_MARKS keys from `low` on, and in float64 the weight above each: of a token e^{x − largest} with MASS, else 1."""
    marks = low + ((high - low) * tl.arange(0, _MARKS).to(tl.int64)) // _MARKS
    weight = tl.zeros([_MARKS], tl.float64)
    for begin in range(0, V, BLOCK):
        x = load_scores(pair, row, begin + tl.arange(0, BLOCK), V, least_base, STREAM, BASE_DRAFTS)
        each = _math.exp(x - largest) if MASS else tl.where(x > float("-inf"), 1.0, 0.0)
        above = tl.where(key_of(x).to(tl.int64)[None, :] > marks[:, None], each[None, :], 0.0)
        weight += tl.sum(above, 1).to(tl.float64)
    return marks, weight


@triton.jit
def narrowed(marks, weight, enough, low, high):
    """The part of (low, high] between two marks where the weight above ceases to be enough."""
    is_enough = weight >= enough
    return tl.max(tl.where(is_enough, marks, low), 0), tl.min(tl.where(is_enough, high, marks), 0)


@triton.jit
def cut_at(
    pair, row, V, least_base, largest, low, number, share, MASS: tl.constexpr, STREAM: tl.constexpr,
    BASE_DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A key ≥ `low`: tokens above it are kept, those above which lies less than enough.

    Enough is `share` of the mass above `low` with MASS, else `number` of tokens. `low`, if there is less in all.
    """
    high = key_of(largest).to(tl.int64)
    marks, weight = weight_above(pair, row, V, least_base, largest, low, high, MASS, STREAM, BASE_DRAFTS, BLOCK)
    total = tl.max(weight, 0)
    enough = total * share if MASS else number.to(tl.float64)
    if total >= enough:
        low, high = narrowed(marks, weight, enough, low, high)
        while high - low > 1:
            marks, weight = weight_above(pair, row, V, least_base, largest, low, high, MASS, STREAM, BASE_DRAFTS, BLOCK)
            low, high = narrowed(marks, weight, enough, low, high)
    return low


@triton.jit
def draw(
    pair, noise, row, V, least_base, row_id, step, top_k, top_p, min_p, STREAM: tl.constexpr,
    BASE_DRAFTS: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token with the largest score z / T + noise among those kept, the first one if there are several."""
    largest = tl.full([], float("-inf"), tl.float32)
    for begin in range(0, V, BLOCK):
        x = load_scores(pair, row, begin + tl.arange(0, BLOCK), V, least_base, STREAM, BASE_DRAFTS)
        largest = tl.maximum(largest, tl.max(x, 0))
    cut = key_of(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
    if TOP_K:
        cut = cut_at(
            pair, row, V, least_base, largest, cut, top_k, top_p, False, STREAM, BASE_DRAFTS, BLOCK
        )  # fmt: skip
    if TOP_P:
        cut = cut_at(
            pair, row, V, least_base, largest, cut, top_k, top_p, True, STREAM, BASE_DRAFTS, BLOCK
        )  # fmt: skip
    best = tl.full([], float("-inf"), tl.float32)
    token = NO_TOKEN + tl.zeros([], tl.int32)
    for begin in range(0, V, BLOCK):
        tokens = begin + tl.arange(0, BLOCK)
        x = load_scores(pair, row, tokens, V, least_base, STREAM, BASE_DRAFTS)
        # ∞ − ∞ has no exponential: where z / T overflowed, its largest stay.
        kept = (key_of(x).to(tl.int64) > cut) & ((_math.exp(x - largest) >= min_p) | (x == largest))
        score = tl.where(kept, x, float("-inf"))
        if GREEDY:
            score = x
        # A block whose best token would lose with the most noise needs none.
        if (tl.max(score, 0) > float("-inf")) & (tl.max(score, 0) + (0.0 if GREEDY else MOST_NOISE) >= best):
            if not GREEDY:
                blocks = begin // 4 + tl.arange(0, BLOCK // 4)
                score = score + gumbel(noise_bits(noise, row_id, step, blocks, STREAM))
            best_here = tl.max(score, 0)
            first = tl.min(tl.where(score == best_here, tokens, NO_TOKEN), 0)
            token = tl.where(best_here > best, first, token)
            best = tl.maximum(best, best_here)
    # Scores that all overflowed to −∞ or NaN mean nothing, but a token has to be one.
    return tl.where(token == NO_TOKEN, 0, token)


@triton.jit
def pair_statistics(pair, row, V, BLOCK: tl.constexpr):
    """The row's pair state at temperature 1, the least finite base logit, and whether nothing can be drawn from it."""
    state = _math.empty_pair_state(1)
    least_base = tl.full([], float("inf"), tl.float32)
    bad = tl.zeros([], tl.int32)
    finite, base_finite = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(0, V, BLOCK):
        tokens = begin + tl.arange(0, BLOCK)
        z, base_z = load_logits(pair.logits, row, tokens, V), load_logits(pair.base_logits, row, tokens, V)
        wrong = (z != z) | (base_z != base_z) | (z == float("inf")) | (base_z == float("inf"))
        bad = tl.maximum(bad, tl.max(wrong.to(tl.int32), 0))
        finite = tl.maximum(finite, tl.max((z > float("-inf")).to(tl.int32), 0))
        base_finite = tl.maximum(base_finite, tl.max((base_z > float("-inf")).to(tl.int32), 0))
        least_base = tl.minimum(least_base, tl.min(tl.where(base_z > float("-inf"), base_z, float("inf")), 0))
        x, base_x = possible(z), possible(base_z)
        state = _math.fold_pair(state, x[None, :], base_x[None, :], 1.0, 1.0)
        state = _math.with_unsupported(state, x[None, :], base_x[None, :])
    return state, least_base, (bad > 0) | (finite == 0) | (base_finite == 0)


@triton.jit
def logp_of_token(matrix, state, row, token, V):
    """log p of a token, (1,); −inf where its logit is."""
    return load_logits(matrix, row, token + tl.arange(0, 1), V) - state.m - _math.log1p(state.rest)


@triton.jit(do_not_specialize=["seed", "step", "first_block", "top_k", "limit"])
def _extrapolated_sample_kernel(
    logits, base_logits, gamma, temperature, seed: tl.int64, step: tl.int32, first_block: tl.int32, seed_ptr, step_ptr,
    row_id_ptr, out, V, threshold, limit: tl.int64, top_k: tl.int64, top_p, min_p, CRITERION: tl.constexpr,
    BASE_DRAFTS: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program samples one row: logits, base_logits (N, V) of any floating dtype → Sample `out`, (N,) each.

    float32, masses summed in float64; deterministic. A row's draw depends on (seed, row_id, step, logits) alone.
    """
    pair = Pair(logits, base_logits, gamma, temperature)
    noise = Noise(seed, step, first_block, seed_ptr, step_ptr, row_id_ptr)
    row = tl.program_id(0)
    one = tl.arange(0, 1)
    row_id, step = row_noise(noise, row, tl.zeros([], tl.int32))
    state, least_base, bad = pair_statistics(pair, row, V, BLOCK)
    token = tl.full([], -1, tl.int32)
    draft_token = token
    nan = tl.full([1], float("nan"), tl.float32)
    delta_logp, logp, base_logp = nan, nan, nan
    selected = one < 0
    if not bad:
        draft_token = draw(
            pair, noise, row, V, least_base, row_id, step, top_k, top_p, min_p, DRAFT, BASE_DRAFTS, GREEDY, TOP_K,
            TOP_P, BLOCK,
        )  # fmt: skip
        logp = logp_of_token(pair.logits, state.model, row, draft_token, V)
        base_logp = logp_of_token(pair.base_logits, state.base, row, draft_token, V)
        delta_logp = logp - base_logp
        bits = tl.zeros([1], tl.int64)
        if CRITERION == "random":
            bits = random_bits(noise, row_id + one, step + one)
        selected = is_selected(state, delta_logp, threshold, bits, limit, CRITERION)
        token = draft_token
        if tl.max(selected.to(tl.int32), 0) > 0:
            token = draw(
                pair, noise, row, V, least_base, row_id, step, top_k, top_p, min_p, REPLACEMENT, BASE_DRAFTS, GREEDY,
                TOP_K, TOP_P, BLOCK,
            )  # fmt: skip
            logp = logp_of_token(pair.logits, state.model, row, token, V)
            base_logp = logp_of_token(pair.base_logits, state.base, row, token, V)
    tl.store(out.token + row, token.to(tl.int64))
    tl.store(out.draft_token + row, draft_token.to(tl.int64))
    tl.store(out.selected + row + one, selected)
    tl.store(out.delta_logp + row + one, delta_logp)
    tl.store(out.logp + row + one, logp)
    tl.store(out.base_logp + row + one, base_logp)


def extrapolated_sample(
    logits: Tensor,
    base_logits: Tensor,
    given_noise: NoiseInputs,
    options: SampleOptions,
    workspace: int,
) -> Sample:
    gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p = options
    n, v = logits.shape[:-1].numel(), logits.shape[-1]
    out = new_sample(n, logits)
    if n == 0:
        return out
    greedy = temperature == 0.0
    choices = criterion, draft == "base", greedy, 0 < top_k < v and not greedy, top_p < 1.0 and not greedy
    with on_device_of(logits):
        noise = noise_of(given_noise)
        call = call_of("extrapolated_sample", logits.device, logits, base_logits, *noise[3:], *choices)
        arguments = (
            matrix(logits), matrix(base_logits), gamma, 1.0 if greedy else temperature, *noise, out, v,
            threshold or 0.0, random_limit(threshold), top_k, top_p, min_p,
        )  # fmt: skip
        if call.plan is None:
            names = ("CRITERION", "BASE_DRAFTS", "GREEDY", "TOP_K", "TOP_P")
            block = min(_BLOCK, max(128, next_power_of_2(v)))
            call.plan = dict(zip(names, choices, strict=True)) | {"BLOCK": block, "num_warps": 8}
        call.launch(_extrapolated_sample_kernel, (n,), arguments, call.plan)
    return out
