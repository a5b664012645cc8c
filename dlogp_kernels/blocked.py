"""The backend without compiled kernels: the reference, in blocks of rows and slabs of the vocabulary.

Launchers with the arguments of the op's schema plus the workspace in bytes, for any device. Forward holds full rows of
logits for as many rows as the workspace allows; backward recomputes logits slab by slab. float32 accumulation (float64
for float64 inputs); deterministic as far as the device's matmul is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference, reference_policy, reference_sample
from .policy_rows import PolicyRows
from .reference import accumulation_dtype, transform_gradient, transform_logits
from .reference_policy import PolicyTokens
from .results import PolicyMetrics

# Temporaries of the size of a block of logits that are alive at once, per model, at most.
_TEMPORARIES = 8
# Of 8 bytes, while sampling: the noise is computed in 64-bit integers.
_SAMPLE_TEMPORARIES = 24
# Of 8 bytes, a token of the policy loss.
_POLICY_TEMPORARIES = 24
# An ignore_index that none of the targets left has.
_NO_TARGET = -1
# Both models' logits, transformed and not.
_PAIR_OF_LOGITS = 4
_SLAB = 4096
_BACKWARD_ROWS = 1024


def linear_logp_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, weight.shape[0], ignore_index)
    dtype = accumulation_dtype(hidden, weight, bias)
    logp, entropy, lse = _zeros_like_target(target, dtype, ("K", "", ""))
    for rows in _row_blocks(target, ignore_index, weight.shape[0], dtype, 1, workspace):
        raw = slabbed_logits(rows_of(hidden, rows), weight, bias, dtype)
        z = transform_logits(raw, temperature, softcap, logit_scale)
        stats = reference.logp_of_rows(z, target[rows], ignore_index)
        logp[rows], entropy[rows], lse[rows] = stats
    return _poisoned((logp, entropy, lse), bad_rows)


def linear_delta_logp_fwd(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    base_bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, weight.shape[0], ignore_index)
    dtype = accumulation_dtype(hidden, weight, bias, base_hidden, base_weight, base_bias)
    outputs = _zeros_like_target(target, dtype, _PAIR_SHAPES)
    for rows in _row_blocks(target, ignore_index, weight.shape[0], dtype, 2, workspace):
        raw = slabbed_logits(rows_of(hidden, rows), weight, bias, dtype)
        base_raw = slabbed_logits(rows_of(base_hidden, rows), base_weight, base_bias, dtype)
        z = transform_logits(raw, temperature, softcap, logit_scale)
        base_z = transform_logits(base_raw, temperature, base_softcap, base_logit_scale)
        stats = reference.delta_logp_of_rows(z, base_z, target[rows], ignore_index)
        for output, value in zip(outputs, stats, strict=True):
            output[rows] = value
    return _poisoned(outputs, bad_rows)


def logp_fwd(
    logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, logits.shape[-1], ignore_index)
    dtype = accumulation_dtype(logits)
    outputs = _zeros_like_target(target, dtype, ("K", "", ""))
    for rows in _row_blocks(target, ignore_index, logits.shape[-1], dtype, 1, workspace):
        z = transform_logits(rows_of(logits, rows).to(dtype), temperature, softcap, logit_scale)
        stats = reference.logp_of_rows(z, target[rows], ignore_index)
        for output, value in zip(outputs, stats, strict=True):
            output[rows] = value
    return _poisoned(outputs, bad_rows)


def delta_logp_fwd(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, logits.shape[-1], ignore_index)
    dtype = accumulation_dtype(logits, base_logits)
    outputs = _zeros_like_target(target, dtype, _PAIR_SHAPES)
    for rows in _row_blocks(target, ignore_index, logits.shape[-1], dtype, 2, workspace):
        z = transform_logits(rows_of(logits, rows).to(dtype), temperature, softcap, logit_scale)
        base_z = transform_logits(rows_of(base_logits, rows).to(dtype), temperature, base_softcap, base_logit_scale)
        stats = reference.delta_logp_of_rows(z, base_z, target[rows], ignore_index)
        for output, value in zip(outputs, stats, strict=True):
            output[rows] = value
    return _poisoned(outputs, bad_rows)


def linear_logp_bwd(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    head = _Head(hidden, weight, bias, temperature, softcap, logit_scale, output_mask, lse.dtype)
    for rows in _kept_blocks(target, ignore_index, _BACKWARD_ROWS):
        row_stats = _ModelRows(rows, target, ignore_index, grad_logp, grad_entropy, grad_lse, entropy, lse)
        for slab in _slabs(weight.shape[0]):
            raw = head.logits(rows, slab)
            logp_all = head.transform(raw) - row_stats.lse[:, None]
            head.accumulate(rows, slab, raw, row_stats.gradient(logp_all, slab))
    return head.gradients()


def linear_delta_logp_bwd(
    grad_logp: Tensor | None,
    grad_base_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_base_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_lse: Tensor | None,
    grad_base_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    base_bias: Tensor | None,
    entropy: Tensor,
    base_entropy: Tensor,
    kl: Tensor,
    reverse_kl: Tensor,
    lse: Tensor,
    base_lse: Tensor,
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    wanted = [output_mask[i] for i in (0, 1, 4)]
    base_wanted = [output_mask[i] for i in (2, 3, 5)]
    head = _Head(hidden, weight, bias, temperature, softcap, logit_scale, wanted, lse.dtype)
    base_head = _Head(
        base_hidden, base_weight, base_bias, temperature, base_softcap, base_logit_scale, base_wanted, lse.dtype
    )
    for rows in _kept_blocks(target, ignore_index, _BACKWARD_ROWS):
        pair = _PairRows(
            _ModelRows(rows, target, ignore_index, grad_logp, grad_entropy, grad_lse, entropy, lse),
            _ModelRows(
                rows, target, ignore_index, grad_base_logp, grad_base_entropy, grad_base_lse, base_entropy, base_lse
            ),
            *(_rows_or_zero(x, rows, lse) for x in (kl, reverse_kl, grad_kl, grad_reverse_kl)),
        )
        for slab in _slabs(weight.shape[0]):
            raw, base_raw = head.logits(rows, slab), base_head.logits(rows, slab)
            logp_all = head.transform(raw) - pair.model.lse[:, None]
            base_logp_all = base_head.transform(base_raw) - pair.base.lse[:, None]
            if any(wanted):
                head.accumulate(rows, slab, raw, pair.gradient(logp_all, base_logp_all, slab))
            if any(base_wanted):
                base_grad = pair.base_gradient(logp_all, base_logp_all, slab)
                base_head.accumulate(rows, slab, base_raw, base_grad)
    gradients, base_gradients = head.gradients(), base_head.gradients()
    return (*gradients[:2], *base_gradients[:2], gradients[2], base_gradients[2])


def logp_bwd(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace: int,
) -> Tensor:
    grad_logits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _row_blocks(target, ignore_index, logits.shape[-1], lse.dtype, 1, workspace):
        row_stats = _ModelRows(rows, target, ignore_index, grad_logp, grad_entropy, grad_lse, entropy, lse)
        grad = _logp_gradient(row_stats, rows, logits, (temperature, softcap, logit_scale))
        grad_logits.view(-1, logits.shape[-1])[rows] = grad
    return grad_logits


def _logp_gradient(
    row_stats: "_ModelRows", rows: Tensor, logits: Tensor, options: tuple[float, float | None, float]
) -> Tensor:
    """Of a block of rows. What it needs besides is gone before the next block begins."""
    raw = rows_of(logits, rows).to(row_stats.lse.dtype)
    logp_all = transform_logits(raw, *options) - row_stats.lse[:, None]
    grad_z = row_stats.gradient(logp_all, slice(0, logits.shape[-1]))
    return transform_gradient(grad_z, raw, *options).to(logits.dtype)


def delta_logp_bwd(
    grad_logp: Tensor | None,
    grad_base_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_base_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_lse: Tensor | None,
    grad_base_lse: Tensor | None,
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    entropy: Tensor,
    base_entropy: Tensor,
    kl: Tensor,
    reverse_kl: Tensor,
    lse: Tensor,
    base_lse: Tensor,
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    vocabulary = logits.shape[-1]
    gradients = [
        torch.zeros(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in zip((logits, base_logits), output_mask, strict=True)
    ]
    for rows in _row_blocks(target, ignore_index, vocabulary, lse.dtype, 2, workspace):
        pair = _PairRows(
            _ModelRows(rows, target, ignore_index, grad_logp, grad_entropy, grad_lse, entropy, lse),
            _ModelRows(
                rows, target, ignore_index, grad_base_logp, grad_base_entropy, grad_base_lse, base_entropy, base_lse
            ),
            *(_rows_or_zero(x, rows, lse) for x in (kl, reverse_kl, grad_kl, grad_reverse_kl)),
        )
        found = _delta_logp_gradients(
            pair,
            rows,
            logits,
            base_logits,
            (temperature, softcap, logit_scale),
            (temperature, base_softcap, base_logit_scale),
            output_mask,
        )
        for gradient, of_rows in zip(gradients, found, strict=True):
            if of_rows is not None:
                gradient.view(-1, vocabulary)[rows] = of_rows
    return tuple(gradients)


def _delta_logp_gradients(
    pair: "_PairRows",
    rows: Tensor,
    logits: Tensor,
    base_logits: Tensor,
    options: tuple[float, float | None, float],
    base_options: tuple[float, float | None, float],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of a block of rows, likewise."""
    dtype, vocabulary = pair.model.lse.dtype, slice(0, logits.shape[-1])
    raw, base_raw = rows_of(logits, rows).to(dtype), rows_of(base_logits, rows).to(dtype)
    logp_all = transform_logits(raw, *options) - pair.model.lse[:, None]
    base_logp_all = transform_logits(base_raw, *base_options) - pair.base.lse[:, None]
    grad = base_grad = None
    if wanted[0]:
        grad_z = pair.gradient(logp_all, base_logp_all, vocabulary)
        grad = transform_gradient(grad_z, raw, *options).to(logits.dtype)
    if wanted[1]:
        grad_z = pair.base_gradient(logp_all, base_logp_all, vocabulary)
        base_grad = transform_gradient(grad_z, base_raw, *base_options).to(base_logits.dtype)
    return grad, base_grad


def extrapolated_sample(
    logits: Tensor,
    base_logits: Tensor,
    row_id: Tensor | None,
    seed: int,
    step: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    gamma: float,
    criterion: str,
    threshold: float | None,
    draft: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    workspace: int,
) -> tuple[Tensor, ...]:
    dtype, device = accumulation_dtype(logits, base_logits), logits.device
    n, v = logits.shape[:-1].numel(), logits.shape[-1]
    row_id = torch.arange(n, device=device) if row_id is None else row_id
    seed_tensor = torch.full((1,), seed, device=device) if seed_tensor is None else seed_tensor
    steps = torch.full((1,), step, device=device) if step_tensor is None else step_tensor
    steps = steps.expand(n)
    options = (gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    blocks = []
    for rows in torch.arange(n, device=device).split(max(1, workspace // (v * 8 * _SAMPLE_TEMPORARIES))):
        z, base_z = (rows_of(x, rows).to(dtype) for x in (logits, base_logits))
        block = reference_sample.extrapolated_sample(z, base_z, row_id[rows], seed_tensor, steps[rows], *options)
        blocks.append(block)
    return tuple(torch.cat(values) for values in zip(*blocks, strict=True))


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
    options = reference_policy.options_of(choices, numbers, max_length)
    sequences = _Sequences(
        PolicyTokens(logp, old_logp, advantage, mask, ref_logp, entropy, kl, token_weight), offsets, workspace
    )
    counts, s = sequences.counts(), None
    if options.reweight == "ppl":
        assert group is not None
        perplexity = [reference_policy.log_perplexity(x.old_logp, x.mask) for _, x in sequences.blocks()]
        joined = torch.cat([logp.new_zeros(0, dtype=sequences.dtype), *perplexity])
        s = reference_policy.normalized_in_group(joined, group, counts > 0)
    longest = logp.shape[-1] if max_length is None else max_length
    scale = reference_policy.sequence_scale(
        counts, counts.sum(), counts.shape[0], longest, denominator, options.loss_type
    )
    coefficient = torch.zeros_like(logp, dtype=sequences.dtype) if with_gradient else logp.new_empty(0)
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
            grad = reference_policy.coefficient(tokens, raw, ratio, reweighted, options)
            sequences.write(coefficient, block, grad)
    metrics = reference_policy.finished_metrics(sums, counts.sum())
    return loss.to(sequences.dtype), metrics.to(sequences.dtype), coefficient, scale.to(sequences.dtype, copy=True)


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
    scale = scale * grad_loss
    of_tokens = scale[:, None] if offsets is None else scale.repeat_interleave(offsets.diff(), output_size=mask.numel())
    wants_logp, *wants_constant = output_mask
    grad_logp = coefficient * of_tokens if wants_logp else scale.new_empty(0)
    constants = (
        (factor * of_tokens).masked_fill(~mask, 0.0) if wanted else scale.new_empty(0)
        for factor, wanted in zip((-entropy_coef, kl_beta), wants_constant, strict=True)
    )
    return grad_logp, *constants


def linear_policy_loss_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    base_hidden: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    old_logp: Tensor,
    advantage: Tensor,
    scale: Tensor,
    score: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor | None,
    choices: list[str],
    numbers: list[float],
    temperature: float,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    ignore_index: int,
    output_mask: list[bool],
    workspace: int,
) -> tuple[Tensor, ...]:
    target, bad_rows = check_target(target, weight.shape[0], ignore_index)
    options, dtype = reference_policy.options_of(choices, numbers, None), scale.dtype
    known = PolicyRows(old_logp, advantage, scale, score, ref_logp, token_weight)
    head = _Head(hidden, weight, bias, temperature, softcap, logit_scale, output_mask, dtype)
    base = None
    if base_hidden is not None and base_weight is not None:
        base = _Head(
            base_hidden, base_weight, base_bias, temperature, base_softcap, base_logit_scale, [False] * 3, dtype
        )
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    sums = torch.zeros(len(PolicyMetrics._fields), dtype=torch.float64, device=hidden.device)
    count = 0
    for rows in _row_blocks(target, ignore_index, weight.shape[0], dtype, 1 if base is None else 2, workspace):
        block = _PolicyBlock(head, base, rows, target[rows], known, options)
        loss, sums = loss + block.loss, reference_policy.merged(sums, block.sums)
        count += rows.numel()
        if any(output_mask):
            block.accumulate()
        del block  # before there is the next one
    if bad_rows is not None:
        loss = loss.masked_fill(bad_rows.any(), torch.nan)
    metrics = reference_policy.finished_metrics(sums, torch.tensor(count, device=hidden.device))
    gradients = (hidden.new_zeros(0, dtype=dtype) if grad is None else grad for grad in head.grads)
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


def linear_extrapolated_sample(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    bias: Tensor | None,
    base_bias: Tensor | None,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    row_id: Tensor | None,
    seed: int,
    step: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    gamma: float,
    criterion: str,
    threshold: float | None,
    draft: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    workspace: int,
) -> tuple[Tensor, ...]:
    """Logits of a block of rows, then the op `extrapolated_sample`, by whatever backend serves that one.

    So it also serves what needs a whole row of logits, the filters, on every backend.
    """
    dtype, device = accumulation_dtype(hidden, weight, bias, base_hidden, base_weight, base_bias), hidden.device
    n, v = hidden.shape[:-1].numel(), weight.shape[0]
    row_id = torch.arange(n, device=device) if row_id is None else row_id
    per_row = step_tensor is not None and step_tensor.numel() > 1
    options = (gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    blocks = []
    for rows in torch.arange(n, device=device).split(max(1, workspace // (v * dtype.itemsize * _PAIR_OF_LOGITS))):
        raw = slabbed_logits(rows_of(hidden, rows), weight, bias, dtype)
        base_raw = slabbed_logits(rows_of(base_hidden, rows), base_weight, base_bias, dtype)
        z = transform_logits(raw, 1.0, softcap, logit_scale)
        base_z = transform_logits(base_raw, 1.0, base_softcap, base_logit_scale)
        steps = step_tensor[rows] if per_row and step_tensor is not None else step_tensor
        block = torch.ops.dlogp.extrapolated_sample(z, base_z, row_id[rows], seed, step, seed_tensor, steps, *options)
        blocks.append(block)
    return tuple(torch.cat(values) for values in zip(*blocks, strict=True))


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (…, columns) by their flat index, without a copy of the others."""
    index: list[Tensor] = []
    for size in reversed(x.shape[1:-1]):  # not torch.unravel_index, which a CUDA graph can not capture
        index.insert(0, rows % size)
        rows = rows // size
    return x[rows, *index]


def check_target(target: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """A target that can be looked up, and the rows (N,) whose outputs have to become NaN, or None.

    On the CPU, IndexError naming the first target that is neither in [0, V) nor ignored. Elsewhere that would mean to
    wait for the device; such a target becomes 0, and its row is poisoned.
    """
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if target.device.type != "cpu":
        return target.masked_fill(bad, 0), bad.any(-1)
    if bad.any():
        row, candidate = bad.nonzero()[0].tolist()
        raise IndexError(
            f"target[{row}, {candidate}] is {target[row, candidate].item()}, expected a token in [0, {vocabulary}) "
            f"or ignore_index ({ignore_index})"
        )
    return target, None


def _poisoned(outputs: tuple[Tensor, ...], bad_rows: Tensor | None) -> tuple[Tensor, ...]:
    if bad_rows is not None:
        for output in outputs:
            output.masked_fill_(bad_rows if output.dim() == 1 else bad_rows[:, None], torch.nan)
    return outputs


_PAIR_SHAPES = ("K", "K", "K", "", "", "", "", "", "")


def _zeros_like_target(target: Tensor, dtype: torch.dtype, shapes: tuple[str, ...]) -> tuple[Tensor, ...]:
    """One zero tensor an output, of the shape of target (N, K) where "K" stands, else (N,)."""
    return tuple(
        torch.zeros(target.shape if shape == "K" else target.shape[:1], dtype=dtype, device=target.device)
        for shape in shapes
    )


def _row_blocks(
    target: Tensor, ignore_index: int, vocabulary: int, dtype: torch.dtype, models: int, workspace: int
) -> Iterator[Tensor]:
    row_bytes = vocabulary * dtype.itemsize * _TEMPORARIES * models
    return _kept_blocks(target, ignore_index, max(1, workspace // row_bytes))


def _kept_blocks(target: Tensor, ignore_index: int, size: int) -> Iterator[Tensor]:
    rows = reference.kept_rows(target, ignore_index)
    return iter(rows.split(size) if rows.numel() else ())


def _slabs(vocabulary: int) -> Iterator[slice]:
    for begin in range(0, vocabulary, _SLAB):
        yield slice(begin, min(begin + _SLAB, vocabulary))


def slabbed_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`reference.linear_logits` without a converted copy of the whole weight."""
    raw = torch.empty((hidden.shape[0], weight.shape[0]), dtype=dtype, device=hidden.device)
    for slab in _slabs(weight.shape[0]):
        slab_bias = None if bias is None else bias[slab]
        raw[:, slab] = reference.linear_logits(hidden, weight[slab], slab_bias, dtype)
    return raw


def _rows_or_zero(value: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(rows, dtype=like.dtype) if value is None else value[rows]


class _Sequences:
    """The sequences of a policy loss, brought into the form of its definition a block of them at a time."""

    def __init__(self, tokens: PolicyTokens, offsets: Tensor | None, workspace: int) -> None:
        self.tokens, self.offsets = tokens, offsets
        self.dtype = accumulation_dtype(*tokens)
        self.number = tokens.logp.shape[0] if offsets is None else offsets.shape[0] - 1
        longest = tokens.logp.shape[-1] if offsets is None else int(offsets.diff().max()) if self.number else 0
        self.size = max(1, workspace // (max(1, longest) * 8 * _POLICY_TEMPORARIES))
        self.of_sequences = tokens.advantage.shape == (self.number,)

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
            if self.of_sequences:
                tokens = tokens._replace(advantage=tokens.advantage[block])
        return reference_policy.as_padded(tokens, offsets, self.dtype, of_sequences=self.of_sequences)

    def write(self, out: Tensor, block: slice, values: Tensor) -> None:
        """Of a block (b, t) to their places in `out`, which has the shape of logp."""
        if self.offsets is None:
            out[block] = values
            return
        offsets = self.offsets[block.start : block.stop + 1]
        inside = torch.arange(values.shape[1], device=out.device) < offsets.diff()[:, None]
        out[offsets[0] : offsets[-1]] = values[inside]


class _ModelRows:
    """What backward needs of one model at a block of rows."""

    def __init__(
        self,
        rows: Tensor,
        target: Tensor,
        ignore_index: int,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
        entropy: Tensor,
        lse: Tensor,
    ) -> None:
        self.target = target[rows]
        grad = torch.zeros_like(self.target, dtype=lse.dtype) if grad_logp is None else grad_logp[rows]
        self.grad_logp = grad.masked_fill(self.target == ignore_index, 0.0)
        self.grad_entropy = _rows_or_zero(grad_entropy, rows, lse)
        self.grad_lse = _rows_or_zero(grad_lse, rows, lse)
        self.entropy, self.lse = entropy[rows], lse[rows]

    def gradient(self, logp_all: Tensor, slab: slice, *pair: Tensor) -> Tensor:
        """∂/∂z in a slab of the vocabulary, the 1-hot term of `logp` included."""
        grad = reference.logits_gradient(
            logp_all, self.entropy, self.grad_logp.sum(-1), self.grad_entropy, self.grad_lse, *pair
        )
        inside = (self.target >= slab.start) & (self.target < slab.stop)
        column = (self.target - slab.start).masked_fill(~inside, 0)
        return grad.scatter_add(1, column, self.grad_logp.masked_fill(~inside, 0.0))


class _PairRows:
    """What backward needs of both models at a block of rows."""

    def __init__(
        self,
        model: _ModelRows,
        base: _ModelRows,
        kl: Tensor,
        reverse_kl: Tensor,
        grad_kl: Tensor,
        grad_reverse_kl: Tensor,
    ) -> None:
        self.model, self.base = model, base
        self.kl, self.reverse_kl = kl, reverse_kl
        self.grad_kl, self.grad_reverse_kl = grad_kl, grad_reverse_kl

    def gradient(self, logp_all: Tensor, base_logp_all: Tensor, slab: slice) -> Tensor:
        return self.model.gradient(logp_all, slab, base_logp_all, self.kl, self.grad_kl, self.grad_reverse_kl)

    def base_gradient(self, logp_all: Tensor, base_logp_all: Tensor, slab: slice) -> Tensor:
        return self.base.gradient(base_logp_all, slab, logp_all, self.reverse_kl, self.grad_reverse_kl, self.grad_kl)


class _Head:
    """One model's last layer: recomputes slabs of logits and accumulates the gradients that are wanted."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        wanted: list[bool],
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.options = (temperature, softcap, logit_scale)
        self.dtype = dtype
        self.inputs = (hidden, weight, bias)
        self.grads = [
            x.new_zeros(x.shape, dtype=dtype) if want and x is not None else None
            for x, want in zip(self.inputs, wanted, strict=True)
        ]

    def logits(self, rows: Tensor, slab: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[slab]
        return reference.linear_logits(rows_of(self.hidden, rows), self.weight[slab], bias, self.dtype)

    def transform(self, raw: Tensor) -> Tensor:
        return transform_logits(raw, *self.options)

    def accumulate(self, rows: Tensor, slab: slice, raw: Tensor, grad_z: Tensor) -> None:
        grad = transform_gradient(grad_z, raw, *self.options)
        grad_hidden, grad_weight, grad_bias = self.grads
        if grad_hidden is not None:
            grad_hidden.view(-1, grad_hidden.shape[-1])[rows] += grad @ self.weight[slab].to(self.dtype)
        if grad_weight is not None:
            grad_weight[slab] += grad.t() @ rows_of(self.hidden, rows).to(self.dtype)
        if grad_bias is not None:
            grad_bias[slab] += grad.sum(0)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtype of each input; empty where not wanted."""
        hidden, weight, bias = (
            self.hidden.new_zeros(0) if grad is None or x is None else grad.to(x.dtype)
            for x, grad in zip(self.inputs, self.grads, strict=True)
        )
        return hidden, weight, bias


class _PolicyBlock:
    """A block of rows of a policy loss with its logits in full: the loss, sums for the metrics, and the gradient."""

    def __init__(
        self,
        head: "_Head",
        base: "_Head | None",
        rows: Tensor,
        target: Tensor,
        known: PolicyRows,
        options: reference_policy.PolicyOptions,
    ) -> None:
        self.head, self.rows, self.target, self.options = head, rows, target, options
        self.base_z, stats, kl = None, None, None
        self.raw = slabbed_logits(rows_of(head.hidden, rows), head.weight, head.bias, head.dtype)
        self.z = head.transform(self.raw)
        if base is None:
            stats = reference.logp_of_rows(self.z, target, _NO_TARGET)
        else:
            base_raw = slabbed_logits(rows_of(base.hidden, rows), base.weight, base.bias, base.dtype)
            self.base_z = base.transform(base_raw)
            pair = reference.delta_logp_of_rows(self.z, self.base_z, target, _NO_TARGET)
            stats, kl = reference.LogpStats(pair.logp, pair.entropy, pair.lse), pair.kl
            self.base_lse = pair.base_lse
        self.entropy, self.lse, self.kl = stats.entropy, stats.lse, kl
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
        self.coefficient = reference_policy.coefficient(tokens, raw_ratio, ratio, reweighted, options)

    def accumulate(self) -> None:
        """Add to the gradients of the head."""
        scale, options, logp_all = self.scale[:, 0], self.options, self.z - self.lse[:, None]
        grad_logp, zero = self.coefficient * self.scale, torch.zeros_like(scale)
        pair = (
            ()
            if self.base_z is None
            else (self.base_z - self.base_lse[:, None], self.kl, options.kl_beta * scale, zero)
        )
        grad = reference.logits_gradient(
            logp_all, self.entropy, grad_logp[:, 0], -options.entropy_coef * scale, zero, *pair
        )
        grad.scatter_add_(1, self.target, grad_logp)
        for slab in _slabs(self.z.shape[1]):
            self.head.accumulate(self.rows, slab, self.raw[:, slab], grad[:, slab])
