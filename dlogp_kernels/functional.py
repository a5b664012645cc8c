"""The public functions: documented, validated, in any leading shape.

Shapes: leading dimensions (…) of tokens, V vocabulary, D hidden, K candidates. With z = softcap_c(logit_scale ·
(hidden · weightᵀ + bias)) / temperature and softcap_c(x) = c·tanh(x / c), every statistic is that of softmax(z) over
the whole vocabulary, accumulated in float32 (float64 for float64 inputs), never rounded to a narrower type before. The
tensor cores of a GPU, which multiply bfloat16 and float16 inputs, truncate these sums instead of rounding them: a logit
is then off by as much as from cuBLAS with float32 output (4e-5 in log p at D = 4096); float32 inputs and the CPU round.
"""

import torch
from torch import Tensor

from . import checks, ops, policy_checks
from .ops.library import without_gradient
from .reference.policy import TokenInputs
from .results import DeltaLogpStats, LogpStats, PolicyLoss, Sample, shaped, stats_of


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
    top: bool = False,
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
        top: also give the most likely token, the first of several, and its log p; of up to 2²⁴ tokens.

    Returns:
        LogpStats: `logp` (the shape of `target`), `entropy` and `lse` = log Σ exp z (…), in nats, float32 (float64 if
        any input is); with `top`, `top_token` (int64, −1 for an ignored row) and `top_logp` (…), else None.

    Gradients: of every output but those of `top` with respect to `hidden`, `weight` and `bias`, in the dtype of each;
    only those that are required are computed, from logits recomputed in blocks. Second derivatives raise RuntimeError.

    Memory over inputs and outputs is bounded (`backends.workspace_limit`), whatever the number of tokens and V. Results
    are the same bit for bit in every run; with the compiled kernels a row's do not depend on the other rows. Within
    `torch.autocast`, 32-bit inputs are converted to the autocast dtype, as in `torch.nn.functional.linear`.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option that does not fit, by name.
        IndexError: a target outside [0, V), by position (on CUDA the row's outputs are NaN instead, unless
            `DLOGP_CHECK=1` is set).

    Source: entropy and log-probability of "On the Direction of RLVR Updates for LLM Reasoning", arXiv 2603.22117.
    """
    head = checks.check_head(hidden, weight, bias)
    targets = checks.check_target(target, "hidden", hidden, ignore_index, weight.shape[0])
    transform = checks.check_transform(temperature, softcap, logit_scale)
    checks.check_top(top, weight.shape[0])
    outputs = torch.ops.dlogp.linear_logp_fwd(*head, transform, targets, ignore_index, top)
    return stats_of(LogpStats, outputs, hidden, target, top)


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
    top: bool = False,
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
        ignore_index, top: as in `linear_logp`.

    Returns:
        DeltaLogpStats: `delta_logp`, `logp`, `base_logp` (the shape of `target`); `entropy`, `base_entropy`,
        `kl` = KL(π ‖ π_base), `reverse_kl`, `lse`, `base_lse` (…); nats, float32 (float64 if any input is). Both KLs
        are ≥ 0; a token with p = 0 contributes 0, one with p > 0 and q = 0 makes KL +inf. With `top`: `top_token`,
        `top_logp`, `base_top_token`, `base_top_logp` (…), as in `linear_logp`.

    Gradients, memory, autocast, Raises: as in `linear_logp`, for both models' inputs.

    Source: arXiv 2603.22117, Eq. 1 and Sec. 2.
    """
    head = checks.check_head(hidden, weight, bias)
    base = checks.check_base_head(hidden, weight, base_hidden, base_weight, base_bias)
    targets = checks.check_target(target, "hidden", hidden, ignore_index, weight.shape[0])
    transforms = checks.check_transforms(temperature, softcap, base_softcap, logit_scale, base_logit_scale)
    checks.check_top(top, weight.shape[0])
    heads = *head, transforms[0], *base, transforms[1]
    outputs = torch.ops.dlogp.linear_delta_logp_fwd(*heads, targets, ignore_index, top)
    return stats_of(DeltaLogpStats, outputs, hidden, target, top)


def logp(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
) -> LogpStats:
    """`logits.log_softmax(-1).gather(-1, target)` and the entropy, each logit read once.

    Args:
        logits: (…, V), raw logits: scale, softcap and temperature are applied here. Any strides.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        temperature, softcap, logit_scale, ignore_index, top: as in `linear_logp`.

    Returns:
        LogpStats: as in `linear_logp`.

    Gradients: of every output with respect to `logits`. Second derivatives raise RuntimeError.

    Raises: as in `linear_logp`.
    """
    checks.check_logits("logits", logits)
    targets = checks.check_target(target, "logits", logits, ignore_index, logits.shape[-1])
    transform = checks.check_transform(temperature, softcap, logit_scale)
    checks.check_top(top, logits.shape[-1])
    outputs = torch.ops.dlogp.logp_fwd(checks.as_rows(logits), transform, targets, ignore_index, top)
    return stats_of(LogpStats, outputs, logits, target, top)


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
    top: bool = False,
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
    checks.check_pair_of_logits(logits, base_logits)
    targets = checks.check_target(target, "logits", logits, ignore_index, logits.shape[-1])
    transforms = checks.check_transforms(temperature, softcap, base_softcap, logit_scale, base_logit_scale)
    checks.check_top(top, logits.shape[-1])
    models = checks.as_rows(logits), transforms[0], checks.as_rows(base_logits), transforms[1]
    outputs = torch.ops.dlogp.delta_logp_fwd(*models, targets, ignore_index, top)
    return stats_of(DeltaLogpStats, outputs, logits, target, top)


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
    line, is `dlogp_kernels.reference.sampling.extrapolated_sample`.

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
    checks.check_pair_of_logits(logits, base_logits)
    options = checks.check_sampling(gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    noise = checks.check_noise("logits", logits, seed, row_id, step)
    rows, base_rows = checks.as_rows(logits), checks.as_rows(base_logits)
    drawn = without_gradient(torch.ops.dlogp.extrapolated_sample, rows, base_rows, *noise, *options)
    return Sample(*shaped(drawn, logits))


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
        top_k, top_p, min_p: as in `extrapolated_sample`. A filter needs whole rows of logits: with one of them on,
            those of as many rows as the workspace holds exist at a time, on a GPU in 16 bits those of 32.
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
    head = checks.check_head(hidden, weight, bias)
    base = checks.check_base_head(hidden, weight, base_hidden, base_weight, base_bias)
    transforms = checks.check_transforms(1.0, softcap, base_softcap, logit_scale, base_logit_scale)
    options = checks.check_sampling(gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    noise = checks.check_noise("hidden", hidden, seed, row_id, step)
    heads = *head, transforms[0], *base, transforms[1]
    drawn = without_gradient(torch.ops.dlogp.linear_extrapolated_sample, *heads, *noise, *options)
    return Sample(*shaped(drawn, hidden))


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
    is defined, line by line, in `dlogp_kernels.reference.policy`.

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
    options = policy_checks.check_options(
        loss_type=loss_type, reweight=reweight, reweight_sign=reweight_sign, importance=importance, alpha=alpha,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_beta=kl_beta, entropy_coef=entropy_coef,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, max_length=max_length,
    )  # fmt: skip
    tokens = TokenInputs(old_logp, advantage, mask, offsets, group, ref_logp, entropy, kl, token_weight)
    tokens = policy_checks.check_tokens(logp, options, tokens, num_tokens, num_sequences)
    return ops.policy_loss.loss_of(logp, tokens, options)


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
    gradients are enabled, kept in float32 until backward multiplies and rounds them to the dtype of each input (those
    of wider inputs on a CPU are not copied if the factor is 1). What is not required costs no product and no buffer.
    Second derivatives raise RuntimeError; the reference model, if it requires a gradient, ValueError. Loss and
    gradients are those of the composition up to float32 rounding (the gradients by the logits are rounded to the
    inputs' dtype before the products in both).

    Memory: besides inputs and outputs, what backward will need (V · D and N · D float32 numbers for weight and hidden)
    and a workspace (`backends.workspace_limit`) that holds all logits of some rows, at least 8.

    Raises: as `linear_logp` and `policy_loss`.

    Source: as `policy_loss`; forming gradients in the forward pass: Liger Kernel, arXiv 2410.10989.
    """
    head = checks.check_head(hidden, weight, bias)
    base = policy_checks.check_frozen_base(hidden, weight, base_hidden, base_weight, base_bias)
    transforms = checks.check_transforms(temperature, softcap, base_softcap, logit_scale, base_logit_scale)
    options = policy_checks.check_options(
        loss_type=loss_type, reweight=reweight, reweight_sign=reweight_sign, importance=importance, alpha=alpha,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_beta=kl_beta, entropy_coef=entropy_coef,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, max_length=max_length,
    )  # fmt: skip
    tokens = TokenInputs(old_logp, advantage, mask, offsets, group, ref_logp, None, None, token_weight)
    targets, tokens = policy_checks.check_target_and_tokens(
        target, hidden, head, base, options, tokens, num_tokens, num_sequences
    )
    return ops.linear_policy_loss.loss_of(head, base, transforms, targets, tokens, options)
