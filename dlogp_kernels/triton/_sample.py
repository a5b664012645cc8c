"""What both sampling kernels share: the noise of a token, the criteria. The definition is reference/sampling.py."""

import functools
import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import NoiseInputs
from ..reference import sampling as reference_sampling
from ..results import Sample
from . import _math

DRAFT = tl.constexpr(reference_sampling.DRAFT)
REPLACEMENT = tl.constexpr(reference_sampling.REPLACEMENT)
_RANDOM = tl.constexpr(reference_sampling.RANDOM)
#: −log of the smallest −log(1 − u), that of u = 2⁻³³; rounded up.
MOST_NOISE = tl.constexpr(22.875)
NO_TOKEN = tl.constexpr(2**31 - 1)


class Noise(NamedTuple):
    """Where the noise of a row comes from: numbers, or int64 tensors on the device that count instead.

    Beside `step_ptr` the number `step` says how far apart the steps of rows are: 0 where they share one. `first_block`
    is the block of four tokens with which the vocabulary begins.
    """

    seed: int
    step: int
    first_block: int
    seed_ptr: Any
    step_ptr: Any
    row_id_ptr: Any


@triton.jit
def noise_bits(noise, row_id, step, blocks, STREAM: tl.constexpr):
    """32 bits of each token of `blocks` of four, in order: counter (block, row_id, step, stream)."""
    zero = tl.zeros_like(blocks)
    seed = noise.seed
    if noise.seed_ptr is not None:
        seed = tl.load(noise.seed_ptr)
    if STREAM != _RANDOM:  # whose block is 0, whatever part of a vocabulary this is
        blocks += noise.first_block
    b0, b1, b2, b3 = tl.philox(seed, blocks, zero + row_id, zero + step, zero + STREAM)
    return tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))


@triton.jit
def row_noise(noise, row, zero):
    """row_id and step of a row, or of as many as there are in `zero`, int32."""
    row_id, step = row + zero, zero + noise.step
    if noise.row_id_ptr is not None:
        row_id = tl.load(noise.row_id_ptr + row)
    if noise.step_ptr is not None:
        step = tl.load(noise.step_ptr + row * noise.step)
    return row_id.to(tl.int32), step.to(tl.int32)


@triton.jit
def log_of_rest(u):
    """log(1 − u) for 0 < u ≤ ½, with what 1 − u loses to rounding."""
    rest = 1.0 - u
    return _math.log(rest) + ((1.0 - rest) - u) / rest


@triton.jit
def gumbel(bits):
    """−log(−log(1 − u)), u = (bits + ½)·2⁻³², from the smaller one of u and 1 − u."""
    low = bits < 0x80000000
    smaller = (tl.where(low, bits, 0xFFFFFFFF - bits).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return -_math.log(-tl.where(low, log_of_rest(smaller), _math.log(smaller)))


@triton.jit
def random_bits(noise, row_id, step):
    """The bits of token 0 for the criterion `random`, int64 (rows,)."""
    words = noise_bits(noise, row_id[:, None], step[:, None], tl.zeros([1, 1], tl.int32) + row_id[:, None] * 0, _RANDOM)
    first = tl.arange(0, 4)[None, :] == 0
    return tl.min(tl.where(first, words.to(tl.int64), 2**32), 1)


@triton.jit
def is_selected(state, delta_logp, threshold, bits, limit, CRITERION: tl.constexpr):
    """Whether the drafts of rows are to be replaced; by chance where the random bits are below the limit."""
    if CRITERION == "all":
        selected = delta_logp == delta_logp
        selected = selected | (delta_logp != delta_logp)
    elif CRITERION == "none":
        selected = delta_logp != delta_logp
        selected = selected & (delta_logp == delta_logp)
    elif CRITERION == "delta_logp":
        selected = delta_logp < threshold
    elif CRITERION == "random":
        selected = bits < limit
    elif CRITERION == "entropy":
        selected = _math.entropy_of(state.base, 1.0) > threshold
    elif CRITERION == "rl_entropy":
        selected = _math.entropy_of(state.model, 1.0) > threshold
    else:
        kl = _math.divergence_of(state.model, state.base, state.cross, state.unsupported)
        reverse_kl = _math.divergence_of(state.base, state.model, state.base_cross, state.base_unsupported)
        if CRITERION == "kl":
            selected = kl > threshold
        elif CRITERION == "reverse_kl":
            selected = reverse_kl > threshold
        else:
            selected = 0.5 * (kl + reverse_kl) > threshold
    return selected


@functools.cache
def random_limit(threshold: float | None) -> int:
    """Of the random bits of the criterion `random`: (bits + ½)·2⁻³² < threshold for those below it, exactly."""
    return math.ceil(Fraction(min(max(threshold or 0.0, 0.0), 2.0)) * 2**32 - Fraction(1, 2))


def noise_of(given: NoiseInputs) -> Noise:
    row_id, seed, step, seed_tensor, step_tensor, first_token = given
    if first_token % 4:
        raise ValueError(f"first_token is {first_token}, expected a multiple of 4")
    if step_tensor is not None:
        step = int(step_tensor.numel() > 1)
    elif step >= 2**31:  # the same 32 bits; Triton would pass 64
        step -= 2**32
    return Noise(seed, step, first_token // 4, seed_tensor, step_tensor, row_id)


def new_sample(rows: int, like: Tensor) -> Sample:
    """On the device of `like`."""
    dtypes = (torch.int64, torch.int64, torch.bool, torch.float32, torch.float32, torch.float32)
    return Sample(*[like.new_empty(rows, dtype=dtype) for dtype in dtypes])
