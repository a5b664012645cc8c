"""`policy_loss` and `linear_policy_loss`: shapes and what z is, as the package says."""

from typing import TYPE_CHECKING

from torch import Tensor

from .. import checks, ops, policy_checks
from ..reference.policy import TokenInputs
from ..results import PolicyLoss
from ..sharding import VocabShard
from . import sharded
from .dtensors import takes_dtensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


@takes_dtensors
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
    vocab_group: "ProcessGroup | VocabShard | None" = None,
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
        vocab_group: as `group` of `linear_logp` and `linear_delta_logp` (here `group` has the prompts). It is then the
            composition of both functions, whose backward computes the logits again: no rank knows a token's log p
            before all have seen their shards.

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
    tokens = TokenInputs(old_logp, advantage, mask, offsets, group, ref_logp, None, None, token_weight)
    of_logits = (temperature, softcap, base_softcap, logit_scale, base_logit_scale)
    given = dict(
        loss_type=loss_type, reweight=reweight, reweight_sign=reweight_sign, importance=importance, alpha=alpha,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_beta=kl_beta, entropy_coef=entropy_coef,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, max_length=max_length,
    )  # fmt: skip
    if vocab_group is not None:
        models = (hidden, weight, bias), (base_hidden, base_weight, base_bias)
        denominators = (num_tokens, num_sequences)
        return sharded.linear_policy_loss(vocab_group, *models, target, of_logits, given, tokens, denominators)
    head = checks.check_head(hidden, weight, bias)
    base = policy_checks.check_frozen_base(hidden, weight, base_hidden, base_weight, base_bias)
    transforms = checks.check_transforms(*of_logits)
    options = policy_checks.check_options(**given)
    targets, tokens = policy_checks.check_target_and_tokens(
        target, hidden, head, base, options, tokens, num_tokens, num_sequences, vocabulary=weight.shape[0]
    )
    return ops.linear_policy_loss.loss_of(head, base, transforms, targets, tokens, options)
