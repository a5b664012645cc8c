"""The policy losses in plain PyTorch: the definition, in blocks of sequences or rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..inputs import Head, OptionalHead, Targets
from ..reference import policy as reference_policy
from ..reference import statistics as reference
from ..reference.policy import PolicyTokens, TokenInputs
from ..reference.rows import PolicyRows
from ..reference.statistics import accumulation_dtype
from ..results import PolicyMetrics
from ._blocks import HeadGradients, forward_blocks, row_blocks, tiled_logits, tiles, zero_gradients
from .statistics import check_targets

#: Of 8 bytes, a token of the policy loss.
_POLICY_TEMPORARIES = 24
#: An ignore_index that none of the targets left has.
_NO_TARGET = -1


def policy_loss_fwd(
    logp: Tensor,
    given: TokenInputs,
    str_options: list[str],
    float_options: list[float],
    max_length: int | None,
    with_gradient: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    options = reference_policy.PolicyOptions.of(str_options, float_options, max_length)
    sequences = _Sequences(PolicyTokens.of(logp, given), given.offsets, workspace)
    counts, s = sequences.counts(), None
    if options.reweight == "ppl":
        assert given.group is not None
        perplexity = [reference_policy.log_perplexity(x.old_logp, x.mask) for _, x in sequences.blocks()]
        joined = torch.cat([logp.new_zeros(0, dtype=sequences.dtype), *perplexity])
        s = reference_policy.normalized_in_group(joined, given.group, counts > 0)
    longest = logp.shape[-1] if max_length is None else max_length
    scale = reference_policy.sequence_scale(
        counts, counts.sum(), counts.shape[0], longest, given.denominator, options.loss_type
    )
    grad_logp_unscaled = torch.zeros_like(logp, dtype=sequences.dtype) if with_gradient else logp.new_empty(0)
    loss = torch.zeros((), dtype=torch.float64, device=logp.device)
    sums = torch.zeros(len(PolicyMetrics._fields), dtype=torch.float64, device=logp.device)
    for block, tokens in sequences.blocks():
        weight = reference_policy.reweighting(
            tokens.old_logp, tokens.advantage, None if s is None else s[block, None], options
        )
        reweighted = weight * tokens.advantage
        raw = reference_policy.raw_log_ratio(tokens.logp, tokens.old_logp, tokens.mask, options.importance)
        ratio = reference_policy.ratio_of(raw).expand_as(tokens.logp)
        of_tokens = reference_policy.token_loss(tokens, ratio, reweighted, options)
        loss += (of_tokens.sum(-1, dtype=torch.float64) * scale[block]).sum()
        sums = reference_policy.merged(sums, reference_policy.metric_sums(tokens, ratio, weight, reweighted, options))
        if with_gradient:
            grad = reference_policy.grad_logp_unscaled(tokens, raw, ratio, reweighted, options)
            sequences.write(grad_logp_unscaled, block, grad)
    metrics = reference_policy.finished_metrics(sums, counts.sum())
    return (
        loss.to(sequences.dtype),
        metrics.to(sequences.dtype),
        grad_logp_unscaled,
        scale.to(sequences.dtype, copy=True),
    )


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
    scale = scale * grad_loss
    of_tokens = scale[:, None] if offsets is None else scale.repeat_interleave(offsets.diff(), output_size=mask.numel())
    wants_logp, *wants_constant = output_mask
    grad_logp = grad_logp_unscaled * of_tokens if wants_logp else scale.new_empty(0)
    constants = (
        (factor * of_tokens).masked_fill(~mask, 0.0) if wanted else scale.new_empty(0)
        for factor, wanted in zip((-entropy_coef, kl_beta), wants_constant, strict=True)
    )
    return grad_logp, *constants


def linear_policy_loss_fwd(
    policy_head: Head,
    base_head: OptionalHead,
    given_targets: Targets,
    known: PolicyRows,
    str_options: list[str],
    float_options: list[float],
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    vocabulary, device = policy_head.weight.shape[0], policy_head.hidden.device
    targets, bad_rows = check_targets(given_targets, vocabulary)
    options, dtype = reference_policy.PolicyOptions.of(str_options, float_options, None), known.scale.dtype
    head = HeadGradients(policy_head, zero_gradients(policy_head, output_mask, dtype), dtype)
    heads = [x for x in (policy_head, base_head.given()) if x is not None]
    base = HeadGradients(heads[1], [None] * 3, dtype) if len(heads) == 2 else None
    # Tiles take a quarter of the workspace, blocks of rows with their logits the rest.
    tile = forward_blocks(heads, dtype, workspace).tile
    loss = torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.zeros(len(PolicyMetrics._fields), dtype=torch.float64, device=device)
    count = 0
    for rows in row_blocks(targets, vocabulary, dtype, len(heads), workspace * 3 // 4):
        block = _PolicyBlock(head, base, rows, targets.target[rows], known, options, tile)
        loss, sums = loss + block.loss, reference_policy.merged(sums, block.sums)
        count += rows.numel()
        if any(output_mask):
            block.accumulate()
        del block  # before there is the next one
    if bad_rows is not None:
        loss = loss.masked_fill(bad_rows.any(), torch.nan)
    metrics = reference_policy.finished_metrics(sums, torch.tensor(count, device=device))
    gradients = (known.scale.new_zeros(0) if grad is None else grad for grad in head.grads)
    return loss.to(dtype), metrics.to(dtype), *gradients


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
    scaled = []
    for gradient, dtype, wanted in zip(gradients, dtypes, output_mask, strict=True):
        out = gradient.new_empty(gradient.shape if wanted else (0,), dtype=dtype)
        if wanted:
            for part, out_part in zip(gradient.view(-1).split(2**20), out.view(-1).split(2**20), strict=True):
                out_part.copy_(part * grad_loss)
        scaled.append(out)
    return tuple(scaled)


class _Sequences:
    """The sequences of a policy loss, brought into the form of its definition a block of them at a time."""

    def __init__(self, tokens: PolicyTokens, offsets: Tensor | None, workspace: int) -> None:
        self.tokens, self.offsets = tokens, offsets
        self.dtype = accumulation_dtype(*tokens)
        self.number = tokens.logp.shape[0] if offsets is None else offsets.shape[0] - 1
        longest = tokens.logp.shape[-1] if offsets is None else int(offsets.diff().max()) if self.number else 0
        self.size = max(1, workspace // (max(1, longest) * 8 * _POLICY_TEMPORARIES))
        self.sequence_level = tokens.advantage.shape == (self.number,)

    def counts(self) -> Tensor:
        """Tokens of each sequence (B,)."""
        mask = self.tokens.mask
        if self.offsets is None:
            return mask.sum(-1)
        sums = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        return sums[self.offsets].diff()

    def blocks(self) -> Iterator[tuple[slice, PolicyTokens]]:
        for begin in range(0, self.number, self.size):
            block = slice(begin, min(begin + self.size, self.number))
            yield block, self._block(block)

    def _block(self, block: slice) -> PolicyTokens:
        tokens, offsets = self.tokens, self.offsets
        if offsets is None:
            some = {name: x[block] for name, x in tokens._asdict().items() if x is not None}
            tokens = tokens._replace(**some)
        else:
            offsets = offsets[block.start : block.stop + 1]
            if self.sequence_level:
                tokens = tokens._replace(advantage=tokens.advantage[block])
        return reference_policy.as_padded(tokens, offsets, self.dtype, sequence_level=self.sequence_level)

    def write(self, out: Tensor, block: slice, values: Tensor) -> None:
        """Of a block (b, t) to their places in `out`, which has the shape of logp."""
        if self.offsets is None:
            out[block] = values
            return
        offsets = self.offsets[block.start : block.stop + 1]
        inside = torch.arange(values.shape[1], device=out.device) < offsets.diff()[:, None]
        out[offsets[0] : offsets[-1]] = values[inside]


class _PolicyBlock:
    """A block of rows of a policy loss with its logits in full: the loss, sums for the metrics, and the gradient."""

    def __init__(
        self,
        head: HeadGradients,
        base: HeadGradients | None,
        rows: Tensor,
        target: Tensor,
        known: PolicyRows,
        options: reference_policy.PolicyOptions,
        tile: int,
    ) -> None:
        self.head, self.rows, self.target, self.options, self.tile = head, rows, target, options, tile
        self.base_logp_all, kl = None, None
        self.raw = tiled_logits(head.head, rows, head.dtype, tile)
        model = reference.log_softmax(head.transform(self.raw))
        if base is None:
            stats = reference.logp_stats(model, target, _NO_TARGET, top=False)
        else:
            base_raw = tiled_logits(base.head, rows, base.dtype, tile)
            base_model = reference.log_softmax(base.transform(base_raw))
            pair = reference.delta_logp_stats(model, base_model, target, _NO_TARGET, top=False)
            stats, kl = reference.LogpStats(pair.logp, pair.entropy, pair.lse), pair.kl
            self.base_logp_all = base_model.logp_all
        self.logp_all, self.entropy, self.kl = model.logp_all, stats.entropy, kl
        old_logp, advantage, self.scale = (x[rows, None] for x in known[:3])
        score, ref_logp, token_weight = (None if x is None else x[rows, None] for x in known[3:])
        tokens = PolicyTokens(
            stats.logp, old_logp, advantage, torch.ones_like(target, dtype=torch.bool), ref_logp,
            self.entropy[:, None], None if kl is None else kl[:, None], token_weight,
        )  # fmt: skip
        weight = reference_policy.reweighting(old_logp, advantage, score, options)
        raw_ratio = reference_policy.raw_log_ratio(tokens.logp, old_logp, tokens.mask, options.importance)
        ratio, reweighted = reference_policy.ratio_of(raw_ratio), weight * advantage
        of_tokens = reference_policy.token_loss(tokens, ratio, reweighted, options)
        self.loss = (of_tokens * self.scale).sum(dtype=torch.float64)
        self.sums = reference_policy.metric_sums(tokens, ratio, weight, reweighted, options)
        self.grad_logp_unscaled = reference_policy.grad_logp_unscaled(tokens, raw_ratio, ratio, reweighted, options)

    def accumulate(self) -> None:
        """Add to the gradients of the head."""
        scale, options = self.scale[:, 0], self.options
        grad_logp, zero = self.grad_logp_unscaled * self.scale, torch.zeros_like(scale)
        pair = () if self.base_logp_all is None else (self.base_logp_all, self.kl, options.kl_beta * scale, zero)
        grad = reference.logits_gradient(
            self.logp_all, self.entropy, grad_logp[:, 0], -options.entropy_coef * scale, zero, *pair
        )
        grad.scatter_add_(1, self.target, grad_logp)
        for tile in tiles(self.raw.shape[1], self.tile):
            self.head.accumulate(self.rows, tile, self.raw[:, tile], grad[:, tile])
