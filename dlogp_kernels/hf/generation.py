"""Selective token replacement and extrapolation, decoded from a pair of models with a key-value cache each."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..checks import check_integer
from ..functional import extrapolated_sample
from ..results import Sample
from .backbone import check_tokens, evaluation
from .cached import CachedModel
from .decoding import Decoder, Drawn
from .documents import Batch, as_batch, common_vocabulary
from .heads import LmHead, LmHeadInputs, first_rows, uncompiled, unwrapped, vocabulary_of
from .loading import context_length
from .metrics import lm_head_inputs
from .verify import verify_decoding

#: Called after every step with the tokens generated so far, those of them that were selected, and the rows done.
OnStep = Callable[[int, int, int], object]


class Generation(NamedTuple):
    """What `generate` returns: R = B · num_return_sequences rows, the samples of a prompt next to each other.

    `tokens` (R, T) are the generated ones without the prompt, a stop token included, T of the longest row; `lengths`
    (R,) says how many there are. `finished` (R,) is whether a row ended with a stop token (else it ran out of
    max_new_tokens). The rest is (R, T), as the fields of `Sample`: `draft_token` before a replacement, whether it was
    `selected`, its `delta_logp`, and `logp` and `base_logp` of the token. Beyond a row's length, tokens are a padding
    token and the rest is 0.
    """

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    draft_tokens: Tensor
    selected: Tensor
    delta_logp: Tensor
    logp: Tensor
    base_logp: Tensor


def generate(
    model: nn.Module,
    base_model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    gamma: float = 0.0,
    criterion: str = "all",
    threshold: float | None = None,
    draft: str = "base",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int,
    max_new_tokens: int,
    stop_token_ids: int | Collection[int] | None = None,
    num_return_sequences: int = 1,
    row_id: Sequence[int] | Tensor | None = None,
    max_batch_size: int | None = None,
    streamer: BaseStreamer | None = None,
    on_step: OnStep | None = None,
) -> Generation:
    """Decode with `extrapolated_sample` at every token of every row (Algorithm 1 and Fig. 4 of the paper).

    Each model has a key-value cache. A prompt is run once for all its samples; rows that are done leave the batch, and
    waiting ones take their places.

    Args:
        model, base_model: causal language models of one vocabulary (sizes may differ), a PeftModel or a
            `torch.compile`d model of one. They run in evaluation mode and are left in their own. One model given twice
            runs once: with criterion "none" that is ordinary sampling.
        input_ids: (B, T), integer: the prompts.
        attention_mask: (B, T), bool or 0/1; 0 marks padding, on any side. Masked tokens are as if they were not there.
        gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p: as in `extrapolated_sample`.
        seed: 64 bits. A token depends on (seed, its row's row_id, its place in the row) and on the row's logits, not
            on the batch around it: on another batch size the same tokens come out, unless rounding in the models
            decides between two of them.
        max_new_tokens: ≥ 1, of each row.
        stop_token_ids: tokens that end a row. By default the end-of-sequence tokens of both models, of their generation
            configs or else their configs; () for none.
        num_return_sequences: samples of each prompt.
        row_id: R numbers in [0, 2³²), the identity of each row's noise; 0, 1, … in order by default.
        max_batch_size: rows in the batch at any time; None: all R.
        streamer: of `transformers`, for a single row: is given the prompt, each token, and the end.
        on_step: called after every step with the tokens generated so far, how many of them were selected, and how many
            rows are done.

    Returns:
        Generation, on the device of the model.

    The logits are the models' own: those of a bfloat16 model are rounded to bfloat16, and Δlog p with them.

    Where a row grows beyond a length at which a model changes its rotary frequencies (LongRoPE), it is run again there,
    as `transformers` does. `logp` and `base_logp` of the tokens drawn before are those of the row as it ends, as of
    `token_metrics`; `selected` and `delta_logp` are as they were when the tokens were drawn.

    The first call with a model runs 16 tokens three times, to see that its cache gives what one go gives, and as often
    16 tokens more than a length at which it may switch (a sliding window), if a row can come to that.

    Gradients: none.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; a prompt that is empty, or longer with
            max_new_tokens than the context of a model; vocabularies that differ by more than padding; a model whose
            cache gives other numbers than one go.
        IndexError: a token outside the vocabulary.
        RuntimeError: a model gave NaN or no finite logit, with the row and the step.

    Source: arXiv 2603.22117, Algorithm 1, Sec. 4 (extrapolation).
    """
    counts = {"max_new_tokens": max_new_tokens, "num_return_sequences": num_return_sequences}
    for name, count in (counts | ({} if max_batch_size is None else {"max_batch_size": max_batch_size})).items():
        check_integer(name, count, 1, 2**63)
    batch = as_batch(input_ids, attention_mask, None)
    pair = unwrapped(uncompiled(model)), unwrapped(uncompiled(base_model))
    if pair[0].device != pair[1].device:
        raise ValueError(f"base_model is on {pair[1].device}, expected {pair[0].device}, the device of model")
    for x in pair:
        check_tokens(batch, x)
    vocabulary = common_vocabulary(vocabulary_of(pair[0]), vocabulary_of(pair[1]), batch)
    prompts = _prompts(batch, pair, max_new_tokens)
    rows = len(prompts) * num_return_sequences
    if streamer is not None and rows != 1:
        raise ValueError(f"streamer is given with {rows} rows, expected a single one")
    stop = _stop_tokens(stop_token_ids, pair, vocabulary)
    draw = partial(
        _draw,
        gamma=gamma,
        criterion=criterion,
        threshold=threshold,
        draft=draft,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
    )
    # Errors of the options, before a model runs.
    zeros = prompts[0].new_zeros(1, 1, dtype=torch.float32)
    draw(zeros, zeros)
    models = [CachedModel(x, vocabulary) for x in ((model,) if base_model is model else (model, base_model))]
    decoder = Decoder(models, prompts, num_return_sequences, draw, _row_ids(row_id, rows), stop, max_new_tokens)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for x in pair:
            stack.enter_context(evaluation(x))
            verify_decoding(x, prompts[0], max(map(len, prompts)) + max_new_tokens)
        if streamer is not None:
            streamer.put(prompts[0][None].cpu())
        for sample in decoder.steps(max_batch_size or rows):
            if streamer is not None:
                streamer.put(sample.token.cpu())
            if on_step is not None:
                on_step(len(decoder.drawn.rows), decoder.drawn.selected(), rows - decoder.remaining)
        if streamer is not None:
            streamer.end()
        result = _generation(decoder.drawn, rows, _padding_token(pair, stop, vocabulary))
        return _as_in_one_go(result, prompts, models, vocabulary)


def _generation(drawn: Drawn, rows: int, padding: int) -> Generation:
    """What was drawn, row by row, with padding at their ends."""
    device = drawn.samples[0].token.device
    row, place = torch.tensor(drawn.rows, device=device), torch.tensor(drawn.places, device=device)
    lengths = torch.bincount(row, minlength=rows)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    finished[drawn.finished] = True
    fields = []
    for name, values in zip(Sample._fields, zip(*drawn.samples, strict=True), strict=True):
        value = torch.cat(values)
        field = value.new_full((rows, int(lengths.max())), padding if name.endswith("token") else 0)
        field[row, place] = value
        fields.append(field)
    return Generation(fields[0], lengths, finished, *fields[1:])


def _as_in_one_go(
    result: Generation, prompts: Sequence[Tensor], models: Sequence[CachedModel], vocabulary: int
) -> Generation:
    """`logp` and `base_logp` of tokens drawn before the rotary frequencies of their rows changed: as they are now."""
    for model, field in ((models[0], result.logp), (models[-1], result.base_logp)):
        for row, length in enumerate(result.lengths.tolist()):
            prompt = prompts[row // (len(field) // len(prompts))]
            begin, end = len(prompt), len(prompt) + length
            drawn = sum(model.changes_within(begin + step, end) for step in range(length))
            if drawn:
                tokens = torch.cat([prompt, result.tokens[row, :length]])
                inputs = lm_head_inputs(model.causal_lm, tokens[None])
                hidden = inputs.hidden[0, begin - 1 : begin - 1 + drawn]
                inputs = LmHeadInputs(hidden, *first_rows(LmHead(*inputs[1:]), vocabulary))
                field[row, :drawn] = inputs.logp(tokens[begin : begin + drawn]).logp
    return result


def _draw(logits: Tensor, base_logits: Tensor, **options: Any) -> Sample:
    # A single place that calls, so that a warning about the options is shown once.
    return extrapolated_sample(logits, base_logits, **options)


def _prompts(batch: Batch, pair: Sequence[PreTrainedModel], max_new_tokens: int) -> list[Tensor]:
    """Each row's tokens that are not masked, on the models' device."""
    kept = batch.document >= 0
    prompts = [ids[mask].to(pair[0].device, torch.int64) for ids, mask in zip(batch.input_ids, kept, strict=True)]
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} has no tokens that are not masked, expected at least one")
        for name, x in zip(("model", "base_model"), pair, strict=True):
            context = context_length(x)
            if context is not None and len(prompt) + max_new_tokens > context:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, {len(prompt) + max_new_tokens} together with "
                    f"max_new_tokens ({max_new_tokens}): expected at most {context}, the context of {name}"
                )
    return prompts


def _stop_tokens(
    given: int | Collection[int] | None, pair: Sequence[PreTrainedModel], vocabulary: int
) -> frozenset[int]:
    if given is None:
        # One that the models' logits do not have can not be drawn.
        return frozenset(token for x in pair for token in _special_tokens(x, "eos_token_id"))
    tokens = [given] if isinstance(given, int) else list(given)
    _check_integers("stop_token_ids", tokens, vocabulary, f"tokens in [0, {vocabulary})")
    return frozenset(tokens)


def as_tokens(value: Any) -> list[int]:
    """Tokens that a config names, one or several; those below 0 stand for none."""
    values = value if isinstance(value, list | tuple) else [value]
    return [int(token) for token in values if token is not None and token >= 0]


def _special_tokens(model: PreTrainedModel, name: str) -> list[int]:
    """Tokens of that name in the generation config, or else in the config."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True))
    return next(filter(None, (as_tokens(getattr(config, name, None)) for config in configs)), [])


def _padding_token(pair: Sequence[PreTrainedModel], stop: Collection[int], vocabulary: int) -> int:
    """A token that a tokenizer knows, where there is one."""
    known = [*(token for x in pair for token in _special_tokens(x, "pad_token_id")), *sorted(stop)]
    return next((token for token in known if token < vocabulary), 0)


def _row_ids(given: Sequence[int] | Tensor | None, rows: int) -> list[int]:
    if given is None:
        return list(range(rows))
    ids = given.tolist() if isinstance(given, Tensor) else list(given)
    if len(ids) != rows:
        raise ValueError(f"row_id has {len(ids)} numbers, expected {rows}, one of each row")
    _check_integers("row_id", ids, 2**32, "integers in [0, 2**32)")
    return ids


def _check_integers(name: str, values: Sequence[Any], end: int, expected: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} has {value!r}, expected integers")
        if not 0 <= value < end:
            raise ValueError(f"{name} has {value}, expected {expected}")
