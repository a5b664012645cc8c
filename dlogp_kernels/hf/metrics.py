"""Hidden states with their last layer, and the statistics of a pair of models at the tokens of a batch."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import linear_delta_logp, linear_logp
from ..ops import backends
from ..results import DeltaLogpStats, LogpStats
from .backbone import (
    Batch,
    Group,
    as_batch,
    as_mask,
    check_prefill_chunk,
    check_tokens,
    first_document,
    gather,
    groups,
    longest_document,
    needs_gradient,
    predicted,
    run_backbone,
    scatter,
)
from .heads import LmHead, unwrapped
from .lengths import side_of
from .memory import Plan, as_bytes, merged_bytes, plan_memory
from .verify_head import verified_lm_head, verify_in_chunks

_IGNORED = -100
#: Vocabularies that differ by fewer rows than this differ by padding (rows are padded to a multiple of up to 1024).
_MAX_PADDING_ROWS = 1024


class LmHeadInputs(NamedTuple):
    """What the ops take of a model: hidden (B, T, D), and the fields of `LmHead`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logp(self, target: Tensor, *, temperature: float = 1.0, ignore_index: int = _IGNORED) -> LogpStats:
        """`linear_logp` of these hidden states and this last layer, whatever it does to its logits.

        Args:
            target: (B, T) or (B, T, K); entry t is what follows token t, or `ignore_index`.
            temperature: > 0, divides the logits.
        """
        return linear_logp(
            self.hidden,
            self.weight,
            target,
            bias=self.bias,
            temperature=temperature,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            ignore_index=ignore_index,
        )


def lm_head_inputs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    prefill_chunk: int | None = None,
) -> LmHeadInputs:
    """`model(input_ids).logits` just before they would be formed: hidden states and the last layer.

    Args:
        model: a causal language model of `transformers`, or a PeftModel of one with adapters within its layers.
        input_ids: (B, T), integer.
        attention_mask: (B, T), bool or 0/1; 0 marks padding, on any side. Masked tokens are as if they were not there.
        position_ids: (B, T) or (1, T), or None: positions count the tokens that are not masked. Where given, they
            count 0, 1, 2, … and restart at 0 where the next document of a packed row begins. Documents do not see
            each other, whatever the attention implementation.
        prefill_chunk: run this many tokens at a time through the key-value cache, which bounds activations. The
            numbers are those of one go within rounding. Only without gradients. None: in one go.

    Returns:
        LmHeadInputs: `hidden` (B, T, D) in the model's dtype, 0 where masked; `weight` (V, D), `bias`, `softcap`,
        `logit_scale` as of `lm_head(model)`. Its method `logp(target)` is `linear_logp` of all of them.

    Gradients: flow to the body through `hidden`, and to the last layer.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; a model that is not a causal language model, or
            whose logits are not those of its body and its last layer. That is checked on a few tokens at the first
            call with a model.
        RuntimeError: `prefill_chunk` while a gradient is needed.
    """
    return _lm_head_inputs(model, as_batch(input_ids, attention_mask, position_ids), prefill_chunk)


def _lm_head_inputs(model: nn.Module, batch: Batch, prefill_chunk: int | None) -> LmHeadInputs:
    input_ids, causal_lm = batch.input_ids, unwrapped(model)
    check_tokens(batch, causal_lm)
    check_prefill_chunk(prefill_chunk, causal_lm)
    tokens = first_document(batch)
    head = verified_lm_head(model, tokens)
    if prefill_chunk is not None:
        verify_in_chunks(causal_lm, tokens, longest_document(batch), prefill_chunk)
    hidden = None
    for group in groups(batch, input_ids.numel(), side_of([causal_lm])):
        rows = run_backbone(causal_lm, group.input_ids, prefill_chunk)
        if group.whole:
            return LmHeadInputs(rows, *head)
        if hidden is None:
            hidden = rows.new_zeros(input_ids.numel(), rows.shape[-1])
        scatter(rows, group, hidden)
    if hidden is None:
        hidden = head.weight.new_zeros(input_ids.numel(), head.weight.shape[1], dtype=causal_lm.dtype)
    return LmHeadInputs(hidden.view(*input_ids.shape, -1), *head)


def token_logp(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    response_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    temperature: float = 1.0,
    prefill_chunk: int | None = None,
) -> LogpStats:
    """`model(input_ids).logits[:, :-1].log_softmax(-1)` at each next token, its entropy and lse; no logit is formed.

    Args:
        model: a causal language model of `transformers`, or a PeftModel of one.
        input_ids, attention_mask, position_ids, prefill_chunk: as in `lm_head_inputs`.
        response_mask: (B, T), entry t about token t, or (B, T − 1), entry t about token t + 1; bool or 0/1. Tokens
            where it is 0 are not measured, and are not work for the op. None: all tokens.
        temperature: > 0, divides the logits, as when responses were drawn with it.

    Returns:
        LogpStats: `logp`, `entropy` and `lse`, each (B, T − 1), entry t about predicting token t + 1; 0 where that
        token is not measured, is masked, is the first of its row or of a packed document, or follows nothing. A loss
        over the same tokens has the mask `response_mask[:, 1:]`.

    Gradients: to the body and to the last layer, through every field, unless within `torch.no_grad()`.

    Raises:
        TypeError, ValueError, RuntimeError: as `lm_head_inputs`.
    """
    batch = as_batch(input_ids, attention_mask, position_ids)
    target = _targets(batch, "response_mask", response_mask)
    stats = _lm_head_inputs(model, batch, prefill_chunk).logp(target, temperature=temperature)
    return LogpStats(*(field[:, :-1] for field in stats))


def token_metrics(
    model: nn.Module,
    base_model: nn.Module | LmHead,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: float = 1.0,
    memory_limit: int | str | None = None,
    prefill_chunk: int | None = None,
    base_hidden: Tensor | None = None,
) -> DeltaLogpStats:
    """`linear_delta_logp` of two models at each token of a batch; no logit tensor is formed.

    Args:
        model, base_model: causal language models of one vocabulary. With `base_hidden`, `base_model` may be an
            `LmHead`, so that the base model need not be in memory.
        input_ids, attention_mask, position_ids, prefill_chunk: as in `lm_head_inputs`.
        loss_mask: (B, T), entry t about token t, or (B, T − 1), entry t about token t + 1; bool or 0/1. Tokens where
            it is 0 are not measured, and are not work for the ops.
        temperature: > 0, for both models.
        memory_limit: bytes, or text such as "4GiB", that may be allocated beyond the models, the arguments and the
            result: the batch is then run in parts, long sequences through the key-value cache, and the ops'
            workspace is made to fit. An estimate from the models' configs. Not together with `prefill_chunk`; only
            without gradients.
        base_hidden: (B, T, D_base), the base model's hidden states (`lm_head_inputs(base_model, …).hidden`, or read
            from a `HiddenStore`).

    Returns:
        DeltaLogpStats: every field (B, T − 1), entry t about predicting token t + 1; 0 where that token is masked, is
        the first of its row or of a packed document, or follows nothing.

    Vocabularies: where one model's last layer has up to 1023 rows more than the other's (padding to a round number),
    probabilities are over the rows that both have, and a token beyond them is an error.

    Gradients: as of `linear_delta_logp`, to both models, unless they are within `torch.no_grad()`.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; `memory_limit` too small (the message says the
            least); vocabularies that differ by more than padding.
        RuntimeError: `memory_limit` or `prefill_chunk` while a gradient is needed.

    Source: arXiv 2603.22117, Eq. 1.
    """
    batch = as_batch(input_ids, attention_mask, position_ids)
    target = _targets(batch, "loss_mask", loss_mask)
    pair = _Pair(unwrapped(model), _base_backbone(base_model, base_hidden, input_ids), base_hidden)
    for backbone in pair.backbones():
        check_tokens(batch, backbone)
        check_prefill_chunk(prefill_chunk, backbone)
    tokens = first_document(batch)
    head = verified_lm_head(model, tokens)
    base_head = base_model if isinstance(base_model, LmHead) else verified_lm_head(base_model, tokens)
    head, base_head = _common_vocabulary(head, base_head, batch)
    plan = Plan(input_ids.numel(), prefill_chunk, None)
    if memory_limit is not None:
        plan = _plan_within(memory_limit, prefill_chunk, pair, (head, base_head), batch)
    if plan.prefill_chunk is not None:
        for backbone in pair.backbones():
            verify_in_chunks(backbone, tokens, longest_document(batch), plan.prefill_chunk)
    with contextlib.nullcontext() if plan.workspace is None else backends.workspace_limit(plan.workspace):
        return _measure(pair, head, base_head, batch, target, temperature, plan)


class _Pair(NamedTuple):
    """The model, and the base model's backbone or its hidden states (B, T, D_base)."""

    model: PreTrainedModel
    base: PreTrainedModel | None
    base_hidden: Tensor | None

    def backbones(self) -> list[PreTrainedModel]:
        return [self.model] if self.base is None else [self.model, self.base]

    def op_inputs(
        self, group: Group, head: LmHead, base_head: LmHead, prefill_chunk: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden, weight, base_hidden and base_weight of a group's documents."""
        if self.base is not None:
            base_hidden = run_backbone(self.base, group.input_ids, prefill_chunk)
        elif self.base_hidden is not None:
            base_hidden = gather(self.base_hidden.flatten(0, 1), group)
        hidden = run_backbone(self.model, group.input_ids, prefill_chunk)
        return hidden, head.weight, base_hidden, base_head.weight


def _plan_within(
    memory_limit: int | str,
    prefill_chunk: int | None,
    pair: _Pair,
    heads: tuple[LmHead, LmHead],
    batch: Batch,
) -> Plan:
    if prefill_chunk is not None:
        raise ValueError("prefill_chunk is given together with memory_limit, which chooses it: expected one of them")
    if any(needs_gradient(backbone) for backbone in pair.backbones()):
        raise RuntimeError(
            "memory_limit bounds the memory of inference; expected a call within torch.no_grad() or "
            "torch.inference_mode()"
        )
    tokens = int((batch.document >= 0).sum())
    beside = merged_bytes(pair.model, heads[0])
    if pair.base is not None:
        beside += merged_bytes(pair.base, heads[1])
    gathered = 0 if pair.base_hidden is None else pair.base_hidden.shape[-1] * pair.base_hidden.element_size()
    return plan_memory(
        as_bytes(memory_limit),
        pair.backbones(),
        heads,
        longest_document(batch),
        tokens,
        beside=beside,
        gathered=gathered,
    )


def _measure(
    pair: _Pair,
    head: LmHead,
    base_head: LmHead,
    batch: Batch,
    target: Tensor,
    temperature: float,
    plan: Plan,
) -> DeltaLogpStats:
    """Statistics (B, T − 1), of as many tokens at once as the plan says."""
    fields: list[Tensor] | None = None
    for group in groups(batch, plan.max_tokens, side_of(pair.backbones())):
        # Within the call, so that a group's hidden states are gone before the next one's are made.
        stats = linear_delta_logp(
            *pair.op_inputs(group, head, base_head, plan.prefill_chunk),
            gather(target.flatten(), group).masked_fill(group.place < 0, _IGNORED),
            bias=head.bias,
            base_bias=base_head.bias,
            temperature=temperature,
            softcap=head.softcap,
            base_softcap=base_head.softcap,
            logit_scale=head.logit_scale,
            base_logit_scale=base_head.logit_scale,
            ignore_index=_IGNORED,
        )
        if fields is None:
            fields = [value.new_zeros(target.numel()) for value in stats]
        for value, field in zip(stats, fields, strict=True):
            scatter(value, group, field)
    if fields is None:
        zeros = head.weight.new_zeros(target.numel(), dtype=_output_dtype(head, base_head))
        fields = [zeros] * len(DeltaLogpStats._fields)
    return DeltaLogpStats(*(field.view(target.shape)[:, :-1] for field in fields))


def _output_dtype(head: LmHead, base_head: LmHead) -> torch.dtype:
    double = torch.float64 in (head.weight.dtype, base_head.weight.dtype)
    return torch.float64 if double else torch.float32


def _targets(batch: Batch, name: str, mask: Tensor | None) -> Tensor:
    """(B, T): the token after each one, or `_IGNORED` where there is none to measure; `mask` came as `name`."""
    measured = predicted(batch)
    if mask is not None:
        mask = as_mask(name, mask, [tuple(batch.input_ids.shape), tuple(measured.shape)])
        measured = measured & mask[:, mask.shape[1] - measured.shape[1] :].to(measured.device)
    target = torch.full_like(batch.input_ids, _IGNORED, dtype=torch.int64)
    target[:, :-1] = batch.input_ids[:, 1:].long().masked_fill(~measured, _IGNORED)
    return target


def _base_backbone(
    base_model: nn.Module | LmHead, base_hidden: Tensor | None, input_ids: Tensor
) -> PreTrainedModel | None:
    """The base model if its backbone has to run; None if its hidden states are given."""
    if base_hidden is None:
        if isinstance(base_model, LmHead):
            raise ValueError("base_model is an LmHead and base_hidden is None: expected base_hidden, or a model")
        return unwrapped(base_model)
    if not isinstance(base_hidden, Tensor):
        raise TypeError(f"base_hidden is {type(base_hidden).__name__}, expected a tensor")
    if base_hidden.dim() != 3 or base_hidden.shape[:2] != input_ids.shape:
        raise ValueError(
            f"base_hidden has shape {tuple(base_hidden.shape)}, expected {(*input_ids.shape, 'D_base')} for input_ids "
            f"of shape {tuple(input_ids.shape)}"
        )
    return None


def _common_vocabulary(head: LmHead, base_head: LmHead, batch: Batch) -> tuple[LmHead, LmHead]:
    """Both last layers cut to the rows that both have, where they differ by padding only."""
    common = common_rows(head.weight.shape[0], base_head.weight.shape[0], batch)
    return _first_rows(head, common), _first_rows(base_head, common)


def common_rows(rows: int, base_rows: int, batch: Batch) -> int:
    """Rows of the vocabulary that both models have; an error where they differ by more than padding, or the batch has
    tokens beyond them."""
    if rows == base_rows:
        return rows
    if abs(rows - base_rows) >= _MAX_PADDING_ROWS:
        raise ValueError(
            f"base_model has a vocabulary of {base_rows} rows and model one of {rows}: expected the same, or a "
            f"difference of less than {_MAX_PADDING_ROWS} rows of padding"
        )
    common = min(rows, base_rows)
    beyond = (batch.input_ids >= common) & (batch.document >= 0)
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        raise IndexError(
            f"input_ids[{row}, {column}] is {int(batch.input_ids[row, column])}, expected a token in [0, {common}), "
            "the vocabulary that both models have"
        )
    return common


def _first_rows(head: LmHead, rows: int) -> LmHead:
    if head.weight.shape[0] == rows:
        return head
    return head._replace(weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])
