"""The public functions: documented, validated, in any leading shape.

Shapes: leading dimensions (…) of tokens, V vocabulary, D hidden, K candidates. With z = softcap_c(logit_scale ·
(hidden · weightᵀ + bias)) / temperature and softcap_c(x) = c·tanh(x / c), every statistic is that of softmax(z) over
the whole vocabulary, accumulated in float32 (float64 for float64 inputs), never rounded to a narrower type before. The
tensor cores of a GPU, which multiply bfloat16 and float16 inputs, truncate these sums instead of rounding them: a logit
is then off by as much as from cuBLAS with float32 output (4e-5 in log p at D = 4096); float32 inputs and the CPU round.
"""

import contextlib
import math
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_drawing_temperature,
    check_factor,
    check_integer,
    check_no_tangent,
    check_number,
    check_quotient,
    check_real,
    check_scale,
    check_storage,
)
from .inputs import flat_transform
from .reference import policy as reference_policy
from .reference import rows as policy_rows
from .reference import sampling as reference_sample
from .reference import statistics as reference
from .results import DeltaLogpStats, LogpStats, PolicyLoss, PolicyMetrics, Sample

_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_CHECK = os.environ.get("DLOGP_CHECK") == "1"


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> LogpStats:
    """`z.log_softmax(-1).gather(-1, target)` with z = `hidden @ weight.T + bias`, and the entropy, without the logits.

    Args:
        hidden: (…, D), hidden states before the last layer. bfloat16, float16, float32 or float64.
        weight: (V, D), the last layer. Its dtype may differ from that of `hidden`; the wider one computes.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        bias: (V,), optional.
        temperature: > 0; logits are divided by it, after the softcap.
        softcap: > 0 or None; z = softcap · tanh(z / softcap) (Gemma).
        logit_scale: > 0; logits are multiplied by it, before the softcap (Cohere, Granite).
        ignore_index: where the target is this, outputs are 0, without gradient, and a row whose targets are all
            ignored is not read and costs nothing.

    Returns:
        LogpStats: `logp` (the shape of `target`), `entropy` and `lse` = log Σ exp z (…), in nats, float32 (float64 if
        any input is).

    Gradients: of every output with respect to `hidden`, `weight` and `bias`, in the dtype of each; only those that are
    required are computed, from logits recomputed in blocks. Second derivatives raise RuntimeError.

    Memory over inputs and outputs is bounded (`backends.workspace_limit`), whatever the number of tokens and V. Results
    are the same bit for bit in every run; with the compiled kernels a row's do not depend on the other rows. Within
    `torch.autocast`, 32-bit inputs are converted to the autocast dtype, as in `torch.nn.functional.linear`.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option that does not fit, by name.
        IndexError: a target outside [0, V), by position (on CUDA the row's outputs are NaN instead, unless
            `DLOGP_CHECK=1` is set).

    Source: entropy and log-probability of "On the Direction of RLVR Updates for LLM Reasoning", arXiv 2603.22117.
    """
    _check_head("", hidden, weight, bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_target(target, "hidden", hidden, ignore_index, weight.shape[0])
    _check_transform(temperature, softcap, logit_scale)
    head = _rows(hidden), weight, bias, flat_transform(temperature, softcap, logit_scale)
    stats = torch.ops.dlogp.linear_logp_fwd(*head, _candidates(target, hidden), ignore_index)
    return LogpStats(*_shaped(stats, target, hidden))


def linear_delta_logp(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    base_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    base_softcap: float | None = None,
    logit_scale: float = 1.0,
    base_logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> DeltaLogpStats:
    """Δlog p = log π(target) − log π_base(target) of two models in one pass without logits; entropies and KLs too.

    Equivalent to `linear_logp` of each model, a subtraction, and with p = softmax(z), q = softmax(z_base):
    `kl = (p * (p.log() - q.log())).sum(-1)` and `reverse_kl = (q * (q.log() - p.log())).sum(-1)`.

    Args:
        hidden, base_hidden: (…, D) and (…, D_base); the same leading shape.
        weight, base_weight: (V, D) and (V, D_base); one vocabulary.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        bias, base_bias: (V,), optional.
        temperature: > 0, for both models.
        softcap, base_softcap, logit_scale, base_logit_scale: of each model, as in `linear_logp`.
        ignore_index: as in `linear_logp`.

    Returns:
        DeltaLogpStats: `delta_logp`, `logp`, `base_logp` (the shape of `target`); `entropy`, `base_entropy`,
        `kl` = KL(π ‖ π_base), `reverse_kl`, `lse`, `base_lse` (…); nats, float32 (float64 if any input is). Both KLs
        are ≥ 0; a token with p = 0 contributes 0, one with p > 0 and q = 0 makes KL +inf.

    Gradients, memory, autocast, Raises: as in `linear_logp`, for both models' inputs.

    Source: arXiv 2603.22117, Eq. 1 and Sec. 2.
    """
    _check_pair_of_heads(hidden, weight, bias, base_hidden, base_weight, base_bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    base_hidden, base_weight, base_bias = _autocast(base_hidden, base_weight, base_bias)
    _check_target(target, "hidden", hidden, ignore_index, weight.shape[0])
    _check_transform(temperature, softcap, logit_scale)
    _check_transform(temperature, base_softcap, base_logit_scale, "base_")
    head = _rows(hidden), weight, bias, flat_transform(temperature, softcap, logit_scale)
    base_head = _rows(base_hidden), base_weight, base_bias, flat_transform(temperature, base_softcap, base_logit_scale)
    stats = torch.ops.dlogp.linear_delta_logp_fwd(*head, *base_head, _candidates(target, hidden), ignore_index)
    return DeltaLogpStats(*_shaped(stats, target, hidden))


def logp(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> LogpStats:
    """`logits.log_softmax(-1).gather(-1, target)` and the entropy, each logit read once.

    Args:
        logits: (…, V), raw logits: scale, softcap and temperature are applied here. Any strides.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        temperature, softcap, logit_scale, ignore_index: as in `linear_logp`.

    Returns:
        LogpStats: as in `linear_logp`.

    Gradients: of every output with respect to `logits`. Second derivatives raise RuntimeError.

    Raises: as in `linear_logp`.
    """
    _check_logits("logits", logits)
    _check_target(target, "logits", logits, ignore_index, logits.shape[-1])
    _check_transform(temperature, softcap, logit_scale)
    model = _rows(logits), flat_transform(temperature, softcap, logit_scale)
    stats = torch.ops.dlogp.logp_fwd(*model, _candidates(target, logits), ignore_index)
    return LogpStats(*_shaped(stats, target, logits))


def delta_logp(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    base_softcap: float | None = None,
    logit_scale: float = 1.0,
    base_logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> DeltaLogpStats:
    """Δlog p, both entropies and both KLs of two tensors of logits, each logit read once.

    Args:
        logits, base_logits: (…, V) of the model and of the base; the same shape, any strides.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        temperature and the other options: as in `linear_delta_logp`.

    Returns:
        DeltaLogpStats: as in `linear_delta_logp`.

    Gradients: of every output with respect to both logits. Second derivatives raise RuntimeError.

    Raises: as in `linear_logp`.

    Source: arXiv 2603.22117, Eq. 1 and Sec. 2.
    """
    _check_logits("logits", logits)
    _check_logits("base_logits", base_logits)
    if base_logits.shape != logits.shape:
        raise ValueError(
            f"base_logits has shape {tuple(base_logits.shape)}, expected that of logits, {tuple(logits.shape)}"
        )
    _check_same_device("base_logits", base_logits, "logits", logits)
    _check_target(target, "logits", logits, ignore_index, logits.shape[-1])
    _check_transform(temperature, softcap, logit_scale)
    _check_transform(temperature, base_softcap, base_logit_scale, "base_")
    model = _rows(logits), flat_transform(temperature, softcap, logit_scale)
    base = _rows(base_logits), flat_transform(temperature, base_softcap, base_logit_scale)
    stats = torch.ops.dlogp.delta_logp_fwd(*model, *base, _candidates(target, logits), ignore_index)
    return DeltaLogpStats(*_shaped(stats, target, logits))


def extrapolated_sample(
    logits: Tensor,
    base_logits: Tensor,
    *,
    gamma: float = 0.0,
    criterion: str = "all",
    threshold: float | None = None,
    draft: str = "base",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    step: int | Tensor = 0,
) -> Sample:
    """Selective token replacement with extrapolation (Algorithm 1 and Fig. 4 of the paper), a token a row, in one op.

    Draws a draft token from one model; where the criterion holds, replaces it by a draw from
    softmax(((1 + γ) z_R − γ z_B) / T), which is the RL model where γ = 0. The equivalent in plain PyTorch, line by
    line, is `dlogp_kernels.reference_sample.extrapolated_sample`.

    Args:
        logits, base_logits: (…, V), of the RL model and of its base at the same positions; the same shape, any strides.
        gamma: ≥ 0, how far to go beyond the RL model.
        criterion: when to replace: `delta_logp` (Δlog p of the draft token < threshold), `kl`, `reverse_kl`, `avg_kl`,
            `entropy` (of the base), `rl_entropy` (> threshold), `random` (with probability threshold), `all`, `none`.
            At temperature 1 over the whole vocabulary; inequalities are strict.
        threshold: τ of the criterion, of `random` in [0, 1]; None for `all` and `none`.
        draft: who draws the draft token, "base" or "rl".
        temperature: ≥ 0; 0 takes the largest logit, the first one if there are several.
        top_k, top_p, min_p: filters of both draws, in this order, as `transformers` defines them, on logits / T. 0, 1
            and 0 switch them off. Tokens of equal logits are kept or dropped together.
        seed: 64 bits. The noise of a token is a function of (seed, row_id, step, token) alone, the same on every
            device, and not of the batch around the row.
        row_id: (…) int64 in [0, 2³²), the identity of each row's noise; 0, 1, … in order by default.
        step: in [0, 2³²): the position of the token in its sequence, for example. For all rows, or as a tensor (…).
            Tensors with other numbers are refused on the CPU; on a GPU the lower 32 bits count.
            seed and step may be int64 tensors of one element on the device of the logits: a captured CUDA graph then
            draws anew at every replay.

    Returns:
        Sample, each field (…). A row with NaN or +inf, or without a finite logit, gives token −1 and NaN.

    A token with z_R = −inf is never a replacement. Where z_B alone is −inf, the row's least finite z_B stands in.

    Gradients: none.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option that does not fit, by name. UserWarning: a threshold of
            `delta_logp` that is not below 0 replaces nearly every token.

    Source: arXiv 2603.22117, Algorithm 1, Sec. 4 (extrapolation).
    """
    _check_logits("logits", logits)
    _check_logits("base_logits", base_logits)
    if base_logits.shape != logits.shape:
        raise ValueError(
            f"base_logits has shape {tuple(base_logits.shape)}, expected that of logits, {tuple(logits.shape)}"
        )
    _check_same_device("base_logits", base_logits, "logits", logits)
    _check_sampling(gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    noise = _noise("logits", logits, seed, row_id, step)
    with _no_grad():
        drawn = torch.ops.dlogp.extrapolated_sample(
            _rows(logits),
            _rows(base_logits),
            *noise,
            float(gamma),
            criterion,
            _optional_float(threshold),
            draft,
            float(temperature),
            top_k,
            float(top_p),
            float(min_p),
        )
    return Sample(*[_viewed(value, logits.shape[:-1]) for value in drawn])


def linear_extrapolated_sample(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    *,
    bias: Tensor | None = None,
    base_bias: Tensor | None = None,
    softcap: float | None = None,
    base_softcap: float | None = None,
    logit_scale: float = 1.0,
    base_logit_scale: float = 1.0,
    gamma: float = 0.0,
    criterion: str = "all",
    threshold: float | None = None,
    draft: str = "base",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    step: int | Tensor = 0,
) -> Sample:
    """`extrapolated_sample` straight from hidden states, each weight read once, without the logits.

    Equivalent to `extrapolated_sample(z, base_z, …)` with z = softcap_c(logit_scale · (hidden @ weight.T + bias)) in
    float32 (float64 for float64 inputs) and the same of the base: the same noise, and the same tokens but for ties
    within rounding. In one pass over the vocabulary the statistics of each row are folded while the draft and what may
    replace it are drawn; of a tile of logits only the winners stay.

    Args:
        hidden, base_hidden: (…, D) and (…, D_base), of the RL model and of its base at the same positions.
        weight, base_weight: (V, D) and (V, D_base); one vocabulary.
        bias, base_bias: (V,), optional; −inf masks a token.
        softcap, base_softcap, logit_scale, base_logit_scale: of each model, as in `linear_logp`.
        gamma, criterion, threshold, draft: as in `extrapolated_sample`.
        temperature: ≥ 0, of both draws, as in `extrapolated_sample`; the criterion and the outputs are at 1.
        top_k, top_p, min_p: as in `extrapolated_sample`. A filter needs a whole row of logits: with one of them on, the
            logits of as many rows as the workspace holds (`backends.workspace_limit`) exist at a time.
        seed, row_id, step: as in `extrapolated_sample`.

    Returns:
        Sample, each field (…), as from `extrapolated_sample`.

    Gradients: none. Memory over inputs and outputs is bounded (`backends.workspace_limit`), whatever the number of rows
    and V. With the compiled kernels a row's result does not depend on the other rows. Within `torch.autocast`, 32-bit
    inputs are converted to the autocast dtype, as in `torch.nn.functional.linear`.

    Raises:
        ValueError, TypeError, UserWarning: as `extrapolated_sample` and `linear_delta_logp`.

    Source: arXiv 2603.22117, Algorithm 1, Sec. 4 (extrapolation).
    """
    _check_pair_of_heads(hidden, weight, bias, base_hidden, base_weight, base_bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    base_hidden, base_weight, base_bias = _autocast(base_hidden, base_weight, base_bias)
    _check_transform(1.0, softcap, logit_scale)
    _check_transform(1.0, base_softcap, base_logit_scale, "base_")
    _check_sampling(gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    noise = _noise("hidden", hidden, seed, row_id, step)
    with _no_grad():
        drawn = torch.ops.dlogp.linear_extrapolated_sample(
            _rows(hidden),
            weight,
            _rows(base_hidden),
            base_weight,
            bias,
            base_bias,
            _optional_float(softcap),
            _optional_float(base_softcap),
            float(logit_scale),
            float(base_logit_scale),
            *noise,
            float(gamma),
            criterion,
            _optional_float(threshold),
            draft,
            float(temperature),
            top_k,
            float(top_p),
            float(min_p),
        )
    return Sample(*[_viewed(value, hidden.shape[:-1]) for value in drawn])


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    reweight: str = "low_prob",
    alpha: float = 0.1,
    reweight_sign: str = "both",
    group: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    importance: str = "token",
    ref_logp: Tensor | None = None,
    kl_beta: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    token_weight: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    max_length: int | None = None,
    offsets: Tensor | None = None,
    kl: Tensor | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> PolicyLoss:
    """A clipped policy-gradient loss (DAPO, GRPO, GSPO, CISPO, SAPO, …) with reweighted advantages, in one pass.

    With r = exp(clamp(logp − old_logp, ±20)), Ã = weight · advantage and the defaults, it is
    `(torch.maximum(-Ã * r, -Ã * r.clamp(1 - clip_low, 1 + clip_high)) * mask).sum() / mask.sum()`; every other option
    is defined, line by line, in `dlogp_kernels.reference_policy`.

    Args:
        logp: (B, T) log-probabilities of the tokens under the policy, padded; or (N,), packed, with `offsets`.
        old_logp: the shape of logp; of the policy that generated the tokens, or from which the step started.
        advantage: (B,) of each response, or the shape of logp. With `offsets`, (B,) is read as of each response.
        mask: the shape of logp, bool or 0/1: which tokens count. Nothing is read where it is 0: NaN there stays there.
            Anything else than 0 and 1 is refused on the CPU; on a GPU, where that would wait for it, it counts as 1.
        loss_type: how token losses become one. `dapo`: their mean over all tokens; `bnpo`: the same; `grpo`: the mean
            over responses of each one's mean, an empty response counting as 0; `dr_grpo`: their sum ÷ (B ·
            max_length). `cispo`: −Ã · min(r, clip_high) · logp, r without gradient, as a mean over all tokens; here
            clip_high bounds r itself (5 is usual). `sapo`: −Ã · 4/τ · sigmoid(τ (r − 1)), aggregated as `grpo`.
        reweight: Ã / advantage, with p = exp(old_logp), at most 1. `low_prob`: 1 + alpha (1 − p); `dominate`:
            alpha · p + 1 − alpha; `ppl`: 1 − alpha · s, s the response's log-perplexity under the old policy,
            standardised over its group; `none`: 1.
        alpha: ≥ 0; of `dominate`, ≤ 1.
        reweight_sign: where to reweight: "both", or only where the advantage is "positive" or "negative".
        group: (B,) integers, the prompt of each response, for `ppl`; responses without tokens do not count.
        clip_low, clip_high: ≥ 0; r is clipped to [1 − clip_low, 1 + clip_high].
        dual_clip: > 1 or None; where Ã < 0 the loss is at most −Ã · dual_clip.
        importance: "token", or "sequence": one ratio for a response, of the mean of its log-ratios (GSPO). Its gradient
            goes through that mean, so that every token of a response gets the same and a reweighting of tokens makes no
            difference between them. "sequence_token": the same ratio with the gradient of each token's own log p
            (GSPO-token), which keeps it.
        ref_logp: the shape of logp, of a reference model; kl_beta · (eˣ − x − 1) with x = min(ref_logp − logp, 20) is
            added to a token's loss.
        kl_beta: ≥ 0.
        entropy: the shape of logp; − entropy_coef · entropy is added.
        entropy_coef: any finite number.
        token_weight: the shape of logp, multiplies the term of the ratio, not those of KL and entropy (the importance
            correction of a rollout engine).
        num_tokens: a number or a tensor of one element: the denominator of `dapo`, `bnpo` and `cispo`, instead of the
            mask's sum. With gradient accumulation over K batches or data parallelism over K processes whose gradients
            are averaged: the tokens of all K together ÷ K; where gradients are added up, the tokens of all. 0 makes the
            loss 0. What is negative or not finite is refused; of a tensor on a GPU it makes the loss NaN.
        num_sequences: likewise, of `grpo`, `sapo` and `dr_grpo`: the number of responses to divide by, instead of B.
        max_length: ≥ 1, of `dr_grpo`; T by default.
        offsets: (B + 1,) integers from 0 to N: response b is logp[offsets[b] : offsets[b + 1]].
        kl: the shape of logp, an exact divergence to a reference model (of `linear_delta_logp`, for example) that
            kl_beta then multiplies; instead of ref_logp.
        sapo_temperature_pos, sapo_temperature_neg: > 0, τ where Ã > 0 and where it is not.

    Returns:
        PolicyLoss: `loss`, a scalar, float32 (float64 if any input is), and `metrics` without gradients. A batch
        without tokens has loss 0 and gradients that are 0, not None.

    Gradients: with respect to `logp`, `entropy` and `kl`, already formed by the forward pass; backward multiplies. The
    other inputs are constants of the loss: one that requires a gradient is refused. Second derivatives raise
    RuntimeError. Results are the same bit for bit in every run.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option that does not fit, by name.

    Source: arXiv 2603.22117, Sec. 5 and Lemma 3.1 (`low_prob`); DAPO, arXiv 2503.14476; GRPO, 2402.03300; Dr. GRPO,
    2503.20783; GSPO, 2507.18071; CISPO, 2506.13585; SAPO, 2511.20347; `dominate`, 2505.12929; dual clip, 1912.09729.
    """
    _check_floating("logp", logp)
    options = _policy_options(
        loss_type, reweight, alpha, reweight_sign, clip_low, clip_high, dual_clip, importance, kl_beta, entropy_coef,
        sapo_temperature_pos, sapo_temperature_neg, max_length,
    )  # fmt: skip
    like = _Like("logp", logp)
    _check_sequences(like, offsets)
    for name, x in (("entropy", entropy), ("kl", kl)):
        if x is not None:
            _check_tokens(name, x, like)
    _check_divergence(options, "kl", ref_logp, kl)
    if options.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy is None, expected a tensor: entropy_coef is {options.entropy_coef}")
    given = _policy_inputs(like, options, old_logp, advantage, mask, offsets, group, ref_logp, token_weight)
    dtype = reference.accumulation_dtype(logp, old_logp, advantage, ref_logp, entropy, kl, token_weight)
    loss, metrics, _, _ = torch.ops.dlogp.policy_loss_fwd(
        logp,
        old_logp,
        advantage,
        given.mask,
        given.offsets,
        given.group,
        ref_logp,
        entropy,
        kl,
        token_weight,
        _denominator(num_tokens, num_sequences, loss_type, like, dtype),
        *options.arguments(),
        torch.is_grad_enabled() and logp.requires_grad,
    )
    return PolicyLoss(loss, PolicyMetrics(*metrics.unbind()))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    base_hidden: Tensor | None = None,
    base_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    base_softcap: float | None = None,
    base_logit_scale: float = 1.0,
    loss_type: str = "dapo",
    reweight: str = "low_prob",
    alpha: float = 0.1,
    reweight_sign: str = "both",
    group: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    importance: str = "token",
    ref_logp: Tensor | None = None,
    kl_beta: float = 0.0,
    entropy_coef: float = 0.0,
    token_weight: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    max_length: int | None = None,
    offsets: Tensor | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> PolicyLoss:
    """`policy_loss` of `linear_logp(hidden, weight, target)`, its gradients formed while the logits are at hand.

    With ratios of tokens that takes the three products of N · V · D that loss and gradients need, 6 N V D operations,
    and no more; logits are computed once. A ratio of a response (`importance="sequence"` or
    `"sequence_token"`) is not known before all of its tokens are: then it is the composition of both functions, whose
    backward computes the logits again.

    Args:
        hidden: (B, T, D), or (N, D) with `offsets`; hidden states that predict the tokens.
        weight, bias, temperature, softcap, logit_scale: as in `linear_logp`.
        target: (B, T) or (N,), token ids in [0, V); not read where the mask is 0.
        old_logp, advantage, mask: as in `policy_loss`; the shape of target. Tokens that do not count cost nothing.
        base_hidden, base_weight, base_bias, base_softcap, base_logit_scale: a frozen reference model, as in
            `linear_delta_logp`. kl_beta then multiplies KL(π ‖ π_base) over the whole vocabulary.
        ref_logp: instead of those, for the estimate k3, as in `policy_loss`.
        entropy_coef: − entropy_coef · entropy is added; the entropy is that of the whole vocabulary.
        loss_type and the other options: as in `policy_loss`.

    Returns:
        PolicyLoss: as of `policy_loss`; float32 (float64 if hidden states, weights or biases are).

    Gradients: with respect to `hidden`, `weight` and `bias`, formed by the forward pass where they are required and
    gradients are enabled, kept in float32 until backward multiplies and rounds them to the dtype of each input. What is
    not required costs no product and no buffer. Second derivatives raise RuntimeError; the reference model, if it
    requires a gradient, ValueError. Loss and gradients are those of the composition up to float32 rounding (the
    gradients by the logits are rounded to the inputs' dtype before the products in both).

    Memory: besides inputs and outputs, what backward will need (V · D and N · D float32 numbers for weight and hidden)
    and a workspace (`backends.workspace_limit`) that holds all logits of some rows, at least 8.

    Raises: as `linear_logp` and `policy_loss`.

    Source: as `policy_loss`; forming gradients in the forward pass: Liger Kernel, arXiv 2410.10989.
    """
    _check_head("", hidden, weight, bias)
    _check_frozen_base(hidden, weight, base_hidden, base_weight, base_bias)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    if base_hidden is not None and base_weight is not None:
        base_hidden, base_weight, base_bias = _autocast(base_hidden, base_weight, base_bias)
    heads = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    base_heads = {"base_softcap": base_softcap, "base_logit_scale": base_logit_scale}
    _check_transform(temperature, softcap, logit_scale)
    _check_transform(temperature, base_softcap, base_logit_scale, "base_")
    options = _policy_options(
        loss_type, reweight, alpha, reweight_sign, clip_low, clip_high, dual_clip, importance, kl_beta, entropy_coef,
        sapo_temperature_pos, sapo_temperature_neg, max_length,
    )  # fmt: skip
    _check_tensor("target", target, _INTEGER, "an integer dtype")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {tuple(hidden.shape[:-1])} for hidden of shape "
            f"{tuple(hidden.shape)}"
        )
    _check_same_device("target", target, "hidden", hidden)
    like = _Like("target", target)
    _check_sequences(like, offsets)
    _check_divergence(options, "base_hidden", ref_logp, base_hidden)
    given = _policy_inputs(like, options, old_logp, advantage, mask, offsets, group, ref_logp, token_weight)
    targets = target.to(torch.int64).masked_fill(~given.mask, policy_rows.MASKED)
    if _has_values(target):
        where = "where the mask is 1: there is no ignore_index here"
        _check_target_range(target, given.mask, weight.shape[0], where)
    dtype = reference.accumulation_dtype(hidden, weight, bias, base_hidden, base_weight, base_bias)
    if importance != "token":
        return _composed_policy_loss(
            hidden, weight, targets, old_logp, advantage, given.mask, bias, base_hidden, base_weight, base_bias,
            heads, base_heads, options, group=group, ref_logp=ref_logp, token_weight=token_weight,
            num_tokens=num_tokens, num_sequences=num_sequences, offsets=offsets,
        )  # fmt: skip
    rows = policy_rows.policy_rows(
        old_logp, advantage, given.mask, given.offsets, given.group, ref_logp, token_weight,
        _denominator(num_tokens, num_sequences, loss_type, like, dtype), options, dtype,
    )  # fmt: skip
    choices, numbers, _ = options.arguments()
    loss, metrics, *_ = torch.ops.dlogp.linear_policy_loss_fwd(
        _rows(hidden),
        weight,
        targets.reshape(-1, 1),
        bias,
        None if base_hidden is None else _rows(base_hidden),
        base_weight,
        base_bias,
        *rows,
        choices,
        numbers,
        float(temperature),
        _optional_float(softcap),
        _optional_float(base_softcap),
        float(logit_scale),
        float(base_logit_scale),
        policy_rows.MASKED,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)],
    )
    return PolicyLoss(loss, PolicyMetrics(*metrics.unbind()))


def _rows(x: Tensor) -> Tensor:
    """At least one leading dimension; no copy."""
    return x if x.dim() > 1 else x[None]


def _candidates(target: Tensor, rows: Tensor) -> Tensor:
    """target (…) or (…, K) as (N, K) int64, for `rows` (…, D or V)."""
    candidates = 1 if target.dim() < rows.dim() else target.shape[-1]
    return target.reshape(-1, candidates).to(torch.int64)


def _shaped(stats: tuple[Tensor, ...], target: Tensor, rows: Tensor) -> list[Tensor]:
    return [_viewed(value, target.shape if value.dim() == 2 else rows.shape[:-1]) for value in stats]


def _viewed(x: Tensor, shape: torch.Size) -> Tensor:
    return x if x.shape == shape else x.view(shape)


def _no_grad() -> contextlib.AbstractContextManager[object]:
    """Where there is no gradient to begin with, entering costs more than the checks of a call."""
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


def _optional_float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `torch.autocast` does to the inputs of a linear layer."""
    # Asked of other devices it may raise, and torch.compile of 2.11 can not trace the question whether it would.
    if hidden.device.type not in ("cpu", "cuda"):
        return hidden, weight, bias
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype == torch.float32 else x

    return convert(hidden), convert(weight), None if bias is None else convert(bias)


def _check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], kind: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected a tensor")
    if type(x) is not Tensor and hasattr(x, "full_tensor"):
        raise TypeError(f"{name} is a sharded DTensor, expected a whole tensor: pass {name}.full_tensor()")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {kind}")
    check_storage(name, x)


def _check_floating(name: str, x: Any) -> None:
    _check_tensor(name, x, _FLOATING, "bfloat16, float16, float32 or float64")
    check_no_tangent(name, x)


def _check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden (…, D), weight (V, D) and bias (V,) of one model fit together."""
    hidden_name, weight_name, bias_name = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    _check_floating(hidden_name, hidden)
    _check_floating(weight_name, weight)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"{hidden_name} has shape {tuple(hidden.shape)}, expected (…, D) with D ≥ 1")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has shape {tuple(weight.shape)}, expected (V, {hidden.shape[-1]}) for {hidden_name} of "
            f"shape {tuple(hidden.shape)} (a weight sharded by ZeRO-3 or FSDP has to be gathered first)"
        )
    _check_same_device(weight_name, weight, hidden_name, hidden)
    if bias is None:
        return
    _check_floating(bias_name, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{bias_name} has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    _check_same_device(bias_name, bias, hidden_name, hidden)


def _check_pair_of_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    base_hidden: Tensor,
    base_weight: Tensor,
    base_bias: Tensor | None,
) -> None:
    _check_head("", hidden, weight, bias)
    _check_head("base_", base_hidden, base_weight, base_bias)
    _check_same_leading("base_hidden", base_hidden, "hidden", hidden)
    _check_same_device("base_hidden", base_hidden, "hidden", hidden)
    if base_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"base_weight has {base_weight.shape[0]} rows, expected the vocabulary of weight ({weight.shape[0]} rows)"
        )


def _check_logits(name: str, logits: Tensor) -> None:
    _check_floating(name, logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}, expected (…, V) with V ≥ 1")


def _check_same_leading(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[:-1] != other.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected the leading dimensions of {other_name}, {tuple(other.shape)}"
        )


def _check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, expected {other.device}, the device of {other_name}")


def _check_target(target: Tensor, rows_name: str, rows: Tensor, ignore_index: int, vocabulary: int) -> None:
    _check_tensor("target", target, _INTEGER, "an integer dtype")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {ignore_index!r}, expected an integer")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}, expected an integer of 64 bits")
    leading = rows.shape[:-1]
    with_candidates = target.dim() == rows.dim() and target.shape[:-1] == leading and target.shape[-1] > 0
    if target.shape != leading and not with_candidates:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {tuple(leading)} or {(*leading, 'K')} for {rows_name} "
            f"of shape {tuple(rows.shape)}"
        )
    _check_same_device("target", target, rows_name, rows)
    if _has_values(target):
        _check_target_range(target, target != ignore_index, vocabulary, f"or ignore_index ({ignore_index})")


def _has_values(x: Tensor) -> bool:
    """Whether x can be looked at: on CUDA that would wait; compiled and fake tensors have no values."""
    has_values = type(x) is Tensor and not torch.compiler.is_compiling()
    return has_values and (x.device.type == "cpu" or (_CHECK and x.device.type == "cuda"))


def _check_target_range(target: Tensor, counted: Tensor, vocabulary: int, otherwise: str) -> None:
    """IndexError for one that counts outside of the vocabulary; `otherwise` says what else may stand in its place."""
    target = target.to(torch.int64)  # of fewer bits it may not hold the size of the vocabulary
    outside = ((target < 0) | (target >= vocabulary)) & counted
    if outside.any():
        position = tuple(outside.nonzero()[0].tolist())
        index = ", ".join(map(str, position))
        raise IndexError(
            f"target[{index}] is {int(target[position])}, expected a token in [0, {vocabulary}) {otherwise}"
        )


def _check_transform(temperature: float, softcap: float | None, logit_scale: float, prefix: str = "") -> None:
    """Of one model's logits; `prefix` is that of the names of its own options."""
    check_scale("temperature", temperature)
    check_scale(f"{prefix}logit_scale", logit_scale)
    if softcap is None:
        check_quotient(f"{prefix}logit_scale", logit_scale, "temperature", temperature)
        return
    check_scale(f"{prefix}softcap", softcap)
    check_quotient(f"{prefix}logit_scale", logit_scale, f"{prefix}softcap", softcap)
    check_quotient(f"{prefix}softcap", softcap, "temperature", temperature)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _check_sampling(
    gamma: float,
    criterion: str,
    threshold: float | None,
    draft: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    _check_criterion(criterion, threshold)
    _check_choice("draft", draft, ("base", "rl"))
    check_factor("gamma", gamma)
    check_drawing_temperature("temperature", temperature)
    if temperature != 0:
        check_quotient("gamma", gamma, "temperature", temperature)
    check_number("top_p", top_p, 0.0, 1.0, low_included=False)
    check_number("min_p", min_p, 0.0, 1.0)
    check_integer("top_k", top_k, 0, 2**63)


def _check_criterion(criterion: str, threshold: float | None) -> None:
    _check_choice("criterion", criterion, reference_sample.CRITERIA)
    if criterion not in reference_sample.WITH_THRESHOLD:
        if threshold is not None:
            raise ValueError(f"threshold is {threshold}, expected None: the criterion {criterion!r} has none")
        return
    if threshold is None:
        raise ValueError(f"threshold is None, expected a number: the criterion {criterion!r} compares with it")
    check_real("threshold", threshold)
    if math.isnan(threshold):
        raise ValueError("threshold is nan, expected a number")
    if criterion == "random":
        check_number("threshold", threshold, 0.0, 1.0)
    if criterion == "delta_logp" and threshold >= 0:
        warnings.warn(
            f"threshold is {threshold}: one that is not below 0 replaces nearly every token (criterion 'delta_logp')",
            stacklevel=4,
        )


def _noise(
    rows_name: str, rows: Tensor, seed: int | Tensor, row_id: Tensor | None, step: int | Tensor
) -> tuple[Tensor | None, int, int, Tensor | None, Tensor | None]:
    """What the noise depends on, as an op takes it: row_id, both numbers, both tensors."""
    flat_row_id = None if row_id is None else _per_row("row_id", row_id, rows_name, rows)
    seed_number, seed_tensor = _counter("seed", seed, 2**64, rows_name, rows)
    if isinstance(step, Tensor) and step.numel() != 1:
        return flat_row_id, seed_number, 0, seed_tensor, _per_row("step", step, rows_name, rows)
    step_number, step_tensor = _counter("step", step, 2**32, rows_name, rows)
    return flat_row_id, seed_number, step_number, seed_tensor, step_tensor


def _per_row(name: str, value: Tensor, rows_name: str, rows: Tensor) -> Tensor:
    """An integer tensor (…) as (N,) int64."""
    _check_tensor(name, value, _INTEGER, "an integer dtype")
    if value.shape != rows.shape[:-1]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(rows.shape[:-1])}")
    _check_same_device(name, value, rows_name, rows)
    numbers = value.reshape(-1).to(torch.int64)
    if _has_values(value):
        _check_counters(name, numbers)
    return numbers


def _check_counters(name: str, numbers: Tensor) -> None:
    """Of 32 bits, as the noise counts rows and steps."""
    outside = (numbers < 0) | (numbers >= 2**32)
    if outside.any():
        raise ValueError(f"{name} has {numbers[outside][0].item()}, expected integers in [0, 2**32)")


def _counter(name: str, value: int | Tensor, end: int, rows_name: str, rows: Tensor) -> tuple[int, Tensor | None]:
    """A number as signed 64 bits, and None; or 0 and the tensor (1,) that holds it."""
    if not isinstance(value, Tensor):
        check_integer(name, value, 0, end)
        return value - 2**64 if value >= 2**63 else value, None
    if value.dtype != torch.int64 or value.numel() != 1:
        raise ValueError(
            f"{name} has dtype {value.dtype} and shape {tuple(value.shape)}, expected an int64 tensor of one element"
        )
    _check_same_device(name, value, rows_name, rows)
    check_storage(name, value)
    if end == 2**32 and _has_values(value):
        _check_counters(name, value.reshape(1))
    return 0, value.reshape(1)


class _Like(NamedTuple):
    """The tensor whose shape and device tokens have, and its name."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


class _PolicyInputs(NamedTuple):
    """mask bool; offsets and group int64."""

    mask: Tensor
    offsets: Tensor | None
    group: Tensor | None


def _policy_inputs(
    like: _Like,
    options: reference_policy.PolicyOptions,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    group: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor | None,
) -> _PolicyInputs:
    """What both policy losses check, and bring into the form that their ops take."""
    sequences = like.shape[0] if offsets is None else offsets.shape[0] - 1
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("token_weight", token_weight)):
        if x is not None or name == "old_logp":
            _check_tokens(name, x, like)
            _check_constant(name, x)
    _check_advantage(advantage, like, sequences)
    if options.reweight == "ppl" and group is None:
        raise ValueError("group is None, expected the prompts' ids: reweight 'ppl' standardises over a group")
    if options.loss_type == "dr_grpo" and offsets is not None and options.max_length is None:
        raise ValueError(
            "max_length is None, expected a number: loss_type 'dr_grpo' divides by it, and offsets are given"
        )
    return _PolicyInputs(
        _mask_of(mask, like),
        None if offsets is None else offsets.to(torch.int64),
        None if group is None else _group_of(group, sequences, like),
    )


def _check_tokens(name: str, x: Any, like: _Like) -> None:
    """Floating, one number a token."""
    _check_floating(name, x)
    if x.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected that of {like.name}, {tuple(like.shape)}")
    _check_same_device(name, x, like.name, like.tensor)


def _check_constant(name: str, x: Any) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, expected a constant of the loss: pass {name}.detach()")


def _check_sequences(like: _Like, offsets: Tensor | None) -> None:
    """Tokens (B, T), or (N,) with offsets (B + 1,)."""
    shape = tuple(like.shape)
    if offsets is None:
        if len(shape) != 2:
            raise ValueError(f"{like.name} has shape {shape}, expected (B, T), or (N,) with offsets")
        return
    if len(shape) != 1:
        raise ValueError(f"{like.name} has shape {shape}, expected (N,) with offsets")
    _check_tensor("offsets", offsets, _INTEGER, "an integer dtype")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets has shape {tuple(offsets.shape)}, expected (B + 1,)")
    _check_same_device("offsets", offsets, like.name, like.tensor)
    if _has_values(offsets):
        ends = offsets[0].item(), offsets[-1].item()
        if ends != (0, shape[0]) or bool((offsets.to(torch.int64).diff() < 0).any()):
            raise ValueError(
                f"offsets go from {ends[0]} to {ends[1]}, expected numbers from 0 to {shape[0]}, the tokens of "
                f"{like.name}, that do not decrease"
            )


def _check_advantage(advantage: Tensor, like: _Like, sequences: int) -> None:
    _check_floating("advantage", advantage)
    if advantage.shape != (sequences,) and advantage.shape != like.shape:
        raise ValueError(
            f"advantage has shape {tuple(advantage.shape)}, expected ({sequences},) or that of {like.name}, "
            f"{tuple(like.shape)}"
        )
    _check_same_device("advantage", advantage, like.name, like.tensor)
    _check_constant("advantage", advantage)


def _mask_of(mask: Tensor, like: _Like) -> Tensor:
    """As bool."""
    _check_tensor("mask", mask, (torch.bool, *_INTEGER, *_FLOATING), "bool or 0/1")
    if mask.shape != like.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected that of {like.name}, {tuple(like.shape)}")
    _check_same_device("mask", mask, like.name, like.tensor)
    if mask.dtype == torch.bool:
        return mask
    counted = mask != 0
    if _has_values(mask):
        wrong = counted & (mask != 1)
        if wrong.any():
            position = tuple(wrong.nonzero()[0].tolist())
            index = ", ".join(map(str, position))
            raise ValueError(f"mask[{index}] is {mask[position].item():g}, expected 0 or 1")
    return counted


def _group_of(group: Tensor, sequences: int, like: _Like) -> Tensor:
    _check_tensor("group", group, _INTEGER, "an integer dtype")
    if group.shape != (sequences,):
        raise ValueError(f"group has shape {tuple(group.shape)}, expected ({sequences},), an id a response")
    _check_same_device("group", group, like.name, like.tensor)
    return group.to(torch.int64)


def _check_divergence(
    options: reference_policy.PolicyOptions, exact_name: str, ref_logp: Tensor | None, exact: Tensor | None
) -> None:
    """At most one divergence to one reference model, and one where it counts."""
    if options.kl_beta != 0 and ref_logp is None and exact is None:
        raise ValueError(f"ref_logp is None, expected a tensor: kl_beta is {options.kl_beta}")
    if ref_logp is not None and exact is not None:
        raise ValueError(f"{exact_name} is given, expected None beside ref_logp: one divergence to one reference model")


def _denominator(
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    loss_type: str,
    like: _Like,
    dtype: torch.dtype,
) -> Tensor | None:
    """Whichever of the two numbers the loss divides by, as a tensor () of `dtype`."""
    given, unused = ("num_tokens", num_tokens), ("num_sequences", num_sequences)
    if loss_type not in reference_policy.BY_TOKENS:
        given, unused = unused, given
    if unused[1] is not None:
        raise ValueError(f"{unused[0]} is given, expected None: loss_type {loss_type!r} does not divide by it")
    return _one_number(*given, like, dtype)


def _one_number(name: str, value: float | Tensor | None, like: _Like, dtype: torch.dtype) -> Tensor | None:
    """As a tensor () of `dtype`."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in (*_INTEGER, *_FLOATING):
            raise ValueError(f"{name} has dtype {value.dtype} and shape {tuple(value.shape)}, expected one number")
        _check_same_device(name, value, like.name, like.tensor)
        _check_constant(name, value)
        check_storage(name, value)
        if _has_values(value):
            _check_denominator(name, value.item())
        return value.reshape(()).to(dtype)
    _check_denominator(name, value)
    return torch.full((), float(value), dtype=dtype, device=like.tensor.device)


def _check_denominator(name: str, value: float) -> None:
    """0 where there is nothing to divide."""
    check_number(name, value, 0.0, math.inf)
    if value != 0:
        check_scale(name, value)


def _check_frozen_base(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
) -> None:
    """A reference model is given whole, fits, and requires no gradient."""
    given = {"base_hidden": base_hidden, "base_weight": base_weight}
    missing = [name for name, x in given.items() if x is None]
    if len(missing) == 2 and base_bias is None:
        return
    if missing:
        raise ValueError(f"{missing[0]} is None, expected a tensor: the reference model has hidden states and a weight")
    assert base_hidden is not None and base_weight is not None
    _check_head("base_", base_hidden, base_weight, base_bias)
    _check_same_leading("base_hidden", base_hidden, "hidden", hidden)
    _check_same_device("base_hidden", base_hidden, "hidden", hidden)
    if base_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"base_weight has {base_weight.shape[0]} rows, expected the vocabulary of weight ({weight.shape[0]} rows)"
        )
    for name, x in (given | {"base_bias": base_bias}).items():
        if x is not None:
            _check_constant(name, x)


def _composed_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    base_hidden: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    heads: dict[str, Any],
    base_heads: dict[str, Any],
    options: reference_policy.PolicyOptions,
    **rest: Any,
) -> PolicyLoss:
    """`linear_logp`, or `linear_delta_logp` with a reference model, then `policy_loss`."""
    common: dict[str, Any] = {"bias": bias, "ignore_index": policy_rows.MASKED, **heads}
    kl = None
    if base_hidden is None or base_weight is None:
        logp, entropy, _ = linear_logp(hidden, weight, target, **common)
    else:
        pair = linear_delta_logp(
            hidden, weight, base_hidden, base_weight, target, base_bias=base_bias, **base_heads, **common
        )
        logp, entropy, kl = pair.logp, pair.entropy, pair.kl
        kl = kl if options.kl_beta != 0 else kl.detach()
    entropy = entropy if options.entropy_coef != 0 else entropy.detach()
    values = options._asdict()
    values["dual_clip"] = None if options.dual_clip == math.inf else options.dual_clip
    return policy_loss(logp, old_logp, advantage, mask, entropy=entropy, kl=kl, **values, **rest)


def _policy_options(
    loss_type: str,
    reweight: str,
    alpha: float,
    reweight_sign: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    importance: str,
    kl_beta: float,
    entropy_coef: float,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    max_length: int | None,
) -> reference_policy.PolicyOptions:
    _check_choice("loss_type", loss_type, reference_policy.LOSS_TYPES)
    _check_choice("reweight", reweight, reference_policy.REWEIGHTS)
    _check_choice("reweight_sign", reweight_sign, reference_policy.REWEIGHT_SIGNS)
    _check_choice("importance", importance, reference_policy.IMPORTANCES)
    if reweight == "dominate":
        check_number("alpha", alpha, 0.0, 1.0)
    check_factor("alpha", alpha)
    check_number("clip_low", clip_low, 0.0, math.inf)
    check_number("clip_high", clip_high, 0.0, math.inf)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, 1.0, math.inf, low_included=False)
    check_factor("kl_beta", kl_beta)
    check_factor("entropy_coef", entropy_coef, -math.inf)
    check_scale("sapo_temperature_pos", sapo_temperature_pos)
    check_scale("sapo_temperature_neg", sapo_temperature_neg)
    if max_length is not None:
        check_integer("max_length", max_length, 1, 2**63)
    return reference_policy.PolicyOptions(
        loss_type,
        reweight,
        reweight_sign,
        importance,
        float(alpha),
        float(clip_low),
        float(clip_high),
        math.inf if dual_clip is None else float(dual_clip),
        float(kl_beta),
        float(entropy_coef),
        float(sapo_temperature_pos),
        float(sapo_temperature_neg),
        max_length,
    )
