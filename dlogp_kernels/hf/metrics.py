"""Hidden states with their last layer, and the statistics of a pair of models at the tokens of a batch."""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import linear_delta_logp
from ..ops import backends
from ..reference.statistics import accumulation_dtype
from ..results import DeltaLogpStats, LogpStats, allocated, present, stats_of
from .backbone import check_prefill_chunk, check_tokens, needs_gradient, run_backbone
from .documents import (
    Batch,
    Group,
    as_batch,
    as_mask,
    common_vocabulary,
    first_document,
    gather,
    groups,
    longest_document,
    predicted,
    scatter,
)
from .heads import IGNORED, LmHead, LmHeadInputs, first_rows, unwrapped
from .lengths import side_of
from .memory import Plan, as_bytes, merged_bytes, plan_memory
from .verify import verified_lm_head, verify_in_chunks


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

    Gradients: flow to the backbone through `hidden`, and to the last layer.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; a model that is not a causal language model, or
            whose logits are not those of its backbone and its last layer. That is checked on a few tokens at the first
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

    Gradients: to the backbone and to the last layer, through every field, unless within `torch.no_grad()`.

    Raises:
        TypeError, ValueError, RuntimeError: as `lm_head_inputs`.
    """
    batch = as_batch(input_ids, attention_mask, position_ids)
    target = _targets(batch, "response_mask", response_mask)
    stats = _lm_head_inputs(model, batch, prefill_chunk).logp(target, temperature=temperature)
    return LogpStats(**{name: field[:, :-1] for name, field in present(stats).items()})


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
    top: bool = False,
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
        top: also each model's most likely token and its log p, as in `linear_delta_logp`.

    Returns:
        DeltaLogpStats: every field (B, T − 1), entry t about predicting token t + 1; 0 (a most likely token −1) where
        that token is masked, is the first of its row or of a packed document, or follows nothing.

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
    given = _Backbones(unwrapped(model), _base_to_run(base_model, base_hidden, input_ids), base_hidden)
    for causal_lm in given.to_run():
        check_tokens(batch, causal_lm)
        check_prefill_chunk(prefill_chunk, causal_lm)
    tokens = first_document(batch)
    head = verified_lm_head(model, tokens)
    base_head = base_model if isinstance(base_model, LmHead) else verified_lm_head(base_model, tokens)
    rows = common_vocabulary(head.weight.shape[0], base_head.weight.shape[0], batch)
    heads = first_rows(head, rows), first_rows(base_head, rows)
    plan = Plan(input_ids.numel(), prefill_chunk, None)
    if memory_limit is not None:
        plan = _plan_within(memory_limit, prefill_chunk, given, heads, batch)
    if plan.prefill_chunk is not None:
        for causal_lm in given.to_run():
            verify_in_chunks(causal_lm, tokens, longest_document(batch), plan.prefill_chunk)
    with contextlib.nullcontext() if plan.workspace is None else backends.workspace_limit(plan.workspace):
        return _measure(given, *heads, batch, target, temperature, plan, top)


class _Backbones(NamedTuple):
    """What gives the hidden states of both: the model, and the base model or its hidden states (B, T, D_base)."""

    model: PreTrainedModel
    base: PreTrainedModel | None
    base_hidden: Tensor | None

    def to_run(self) -> list[PreTrainedModel]:
        return [self.model] if self.base is None else [self.model, self.base]

    def hidden(self, group: Group, prefill_chunk: int | None) -> dict[str, Any]:
        """Of a group's documents, by the names that `linear_delta_logp` has for them."""
        if self.base is not None:
            base_hidden = run_backbone(self.base, group.input_ids, prefill_chunk)
        elif self.base_hidden is not None:
            base_hidden = gather(self.base_hidden.flatten(0, 1), group)
        return {"hidden": run_backbone(self.model, group.input_ids, prefill_chunk), "base_hidden": base_hidden}


def _plan_within(
    memory_limit: int | str, prefill_chunk: int | None, given: _Backbones, heads: tuple[LmHead, LmHead], batch: Batch
) -> Plan:
    if prefill_chunk is not None:
        raise ValueError("prefill_chunk is given together with memory_limit, which chooses it: expected one of them")
    if any(map(needs_gradient, given.to_run())):
        raise RuntimeError(
            "memory_limit bounds the memory of inference; expected a call within torch.no_grad() or "
            "torch.inference_mode()"
        )
    gathered = 0 if given.base_hidden is None else given.base_hidden.shape[-1] * given.base_hidden.element_size()
    return plan_memory(
        as_bytes(memory_limit),
        given.to_run(),
        heads,
        longest_document(batch),
        int((batch.document >= 0).sum()),
        beside=sum(map(merged_bytes, given.to_run(), heads)),
        gathered=gathered,
    )


def _measure(
    given: _Backbones,
    head: LmHead,
    base_head: LmHead,
    batch: Batch,
    target: Tensor,
    temperature: float,
    plan: Plan,
    top: bool,
) -> DeltaLogpStats:
    """Statistics (B, T − 1), of as many tokens at once as the plan says."""
    dtype = accumulation_dtype(head.weight, base_head.weight, given.base_hidden)
    outputs = allocated(DeltaLogpStats, target.flatten(), target.new_zeros, dtype, top).flat()
    fields = present(stats_of(DeltaLogpStats, outputs, target[..., None], target, top))
    heads = head._asdict() | {f"base_{name}": value for name, value in base_head._asdict().items()}
    for group in groups(batch, plan.max_tokens, side_of(given.to_run())):
        stats = linear_delta_logp(
            # Within the call, so that a group's hidden states are gone before the next one's are made.
            **given.hidden(group, plan.prefill_chunk),
            **heads,
            target=gather(target.flatten(), group).masked_fill(group.place < 0, IGNORED),
            temperature=temperature,
            ignore_index=IGNORED,
            top=top,
        )
        for name, value in present(stats).items():
            scatter(value, group, fields[name].view(-1))
    return DeltaLogpStats(**{name: field[:, :-1] for name, field in fields.items()})


def _targets(batch: Batch, name: str, mask: Tensor | None) -> Tensor:
    """(B, T): the token after each one, or `IGNORED` where there is none to measure; `mask` came as `name`."""
    measured = predicted(batch)
    if mask is not None:
        mask = as_mask(name, mask, [tuple(batch.input_ids.shape), tuple(measured.shape)])
        measured = measured & mask[:, mask.shape[1] - measured.shape[1] :].to(measured.device)
    target = torch.full_like(batch.input_ids, IGNORED, dtype=torch.int64)
    target[:, :-1] = batch.input_ids[:, 1:].long().masked_fill(~measured, IGNORED)
    return target


def _base_to_run(
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
