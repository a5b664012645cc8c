"""Selective token replacement and extrapolation, decoded from a pair of models with a key-value cache each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import extrapolated_sample, linear_logp
from ..results import Sample
from .backbone import Batch, as_batch, check_tokens
from .cached import CachedModel, CachedRows, uncompiled, vocabulary_of
from .heads import unwrapped
from .loading import context_length
from .metrics import common_rows, lm_head_inputs
from .verify_head import evaluation, verify_decoding

#: Places of finished rows are filled when they are this share of the batch: a prefill of each model fills them all.
_REFILL_SHARE = 1 / 8

#: Called after every step with the tokens generated so far, those of them that were selected, and the rows done.
OnStep = Callable[[int, int, int], object]


class Streamer(Protocol):
    """As `transformers.TextStreamer`."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


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
    streamer: Streamer | None = None,
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
    _check_counts(max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences)
    batch = as_batch(input_ids, attention_mask, None)
    pair = tuple(unwrapped(uncompiled(x)) for x in (model, base_model))
    vocabulary = _check_pair(pair, batch)
    prompts = _prompts(batch, pair, max_new_tokens)
    rows = len(prompts) * num_return_sequences
    if max_batch_size is not None:
        _check_counts(max_batch_size=max_batch_size)
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
    rl = CachedModel(model, vocabulary)
    models = _Models(rl, rl if base_model is model else CachedModel(base_model, vocabulary))
    queue = _Queue(models, prompts, num_return_sequences)
    decoder = _Decoder(models, draw, _row_ids(row_id, rows), stop, max_new_tokens)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for x in pair:
            stack.enter_context(evaluation(x))
            verify_decoding(x, prompts[0], max(map(len, prompts)) + max_new_tokens)
        if streamer is not None:
            streamer.put(prompts[0][None].cpu())
        for step in _steps(decoder, queue, max_batch_size or rows):
            if streamer is not None:
                streamer.put(step.token.cpu())
            if on_step is not None:
                on_step(decoder.log.tokens, decoder.log.selected(), rows - queue.remaining - len(decoder.rows))
        if streamer is not None:
            streamer.end()
        result = decoder.log.result(rows, _padding_token(pair, stop, vocabulary))
        return _as_in_one_go(result, prompts, models, vocabulary)


def _as_in_one_go(result: Generation, prompts: Sequence[Tensor], models: _Models, vocabulary: int) -> Generation:
    """`logp` and `base_logp` of tokens drawn before the rotary frequencies of their rows changed: as they are now."""
    for model, field in ((models.rl, result.logp), (models.base, result.base_logp)):
        for row, length in enumerate(result.lengths.tolist()):
            prompt = prompts[row // (len(field) // len(prompts))]
            begin, end = len(prompt), len(prompt) + length
            drawn = sum(model.changes_within(begin + step, end) for step in range(length))
            if drawn:
                tokens = torch.cat([prompt, result.tokens[row, :length]])
                head = lm_head_inputs(model.causal_lm, tokens[None])
                field[row, :drawn] = linear_logp(
                    head.hidden[0, begin - 1 : begin - 1 + drawn],
                    head.weight[:vocabulary],
                    tokens[begin : begin + drawn],
                    bias=None if head.bias is None else head.bias[:vocabulary],
                    softcap=head.softcap,
                    logit_scale=head.logit_scale,
                ).logp
    return result


class _Row(NamedTuple):
    """A row of the batch: its number among all, its prompt, and how many tokens were generated."""

    number: int
    prompt: Tensor
    generated: int

    @property
    def length(self) -> int:
        return len(self.prompt) + self.generated


class _States(NamedTuple):
    """Rows in mid-sequence, of both models: the same object twice where they are one model."""

    rl: CachedRows
    base: CachedRows

    def take(self, rows: Sequence[int]) -> _States:
        return _both(self, lambda side: side.take(rows))

    def append(self, other: _States) -> _States:
        for side, joining in _distinct(self, other):
            side.append(joining)
        return self

    def resize(self, width: int) -> None:
        for (side,) in _distinct(self):
            side.resize(width)


class _Models(NamedTuple):
    rl: CachedModel
    base: CachedModel

    def prefill(self, prompts: Sequence[Tensor]) -> _States:
        return _both(self, lambda model: model.prefill(prompts))

    def advance(self, states: _States, tokens: Tensor, lengths: Sequence[int], row: Callable[[int], Tensor]) -> None:
        for model, side in _distinct(self, states):
            model.advance(side, tokens, lengths, row)


def _both(pair: tuple[Any, Any], compute: Callable[[Any], CachedRows]) -> _States:
    """What is computed of both sides; once where they are one."""
    rl = compute(pair[0])
    return _States(rl, rl if pair[1] is pair[0] else compute(pair[1]))


def _distinct(*pairs: tuple[Any, Any]) -> list[tuple[Any, ...]]:
    """The two sides of all pairs, side by side; the first alone where both are one."""
    sides = list(zip(*pairs, strict=True))
    return sides[:1] if pairs[0][0] is pairs[0][1] else sides


class _Queue:
    """Rows that wait, in order. A prompt is run when its first sample leaves, and its state is kept for the others."""

    def __init__(self, models: _Models, prompts: Sequence[Tensor], samples: int) -> None:
        self.remaining = len(prompts) * samples
        self._models = models
        self._prompts = prompts
        self._samples = samples
        self._kept: _States | None = None

    def pop(self, count: int) -> tuple[list[_Row], _States]:
        """The next `count` rows, ready to draw their first token."""
        begin = len(self._prompts) * self._samples - self.remaining
        numbers = range(begin, begin + count)
        prompt_of = [number // self._samples for number in numbers]
        states = self._prefilled(prompt_of[0], prompt_of[-1] + 1)
        self.remaining -= count
        last_waits = numbers.stop % self._samples > 0
        self._kept = states.take([prompt_of[-1] - prompt_of[0]]) if last_waits else None
        if self._samples > 1:
            states = states.take([prompt - prompt_of[0] for prompt in prompt_of])
        return [_Row(number, self._prompts[number // self._samples], 0) for number in numbers], states

    def _prefilled(self, begin: int, end: int) -> _States:
        """The states after prompts `begin` to `end`, a row each; the first may have been run before."""
        if self._kept is None:
            return self._models.prefill(self._prompts[begin:end])
        if end == begin + 1:
            return self._kept
        return self._kept.append(self._models.prefill(self._prompts[begin + 1 : end]))


class _Log:
    """What was drawn, step by step."""

    def __init__(self) -> None:
        self.tokens = 0
        self.finished: list[int] = []
        self._selected = 0
        self._counted = 0
        self._rows: list[int] = []
        self._steps: list[int] = []
        self._samples: list[Sample] = []

    def add(self, rows: Sequence[_Row], sample: Sample) -> None:
        self._rows += [row.number for row in rows]
        self._steps += [row.generated for row in rows]
        self._samples.append(sample)
        self.tokens += len(rows)

    def tokens_of(self, number: int) -> Tensor:
        """The tokens of a row so far."""
        places = [place for place, row in enumerate(self._rows) if row == number]
        return torch.cat([sample.token for sample in self._samples])[places]

    def selected(self) -> int:
        """How many tokens were selected so far."""
        self._selected += sum(int(sample.selected.sum()) for sample in self._samples[self._counted :])
        self._counted = len(self._samples)
        return self._selected

    def result(self, rows: int, padding: int) -> Generation:
        device = self._samples[0].token.device
        row, step = torch.tensor(self._rows, device=device), torch.tensor(self._steps, device=device)
        lengths = torch.bincount(row, minlength=rows)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        finished[self.finished] = True
        fields = []
        for name, values in zip(Sample._fields, zip(*self._samples, strict=True), strict=True):
            value = torch.cat(values)
            field = value.new_full((rows, int(lengths.max())), padding if name.endswith("token") else 0)
            field[row, step] = value
            fields.append(field)
        return Generation(fields[0], lengths, finished, *fields[1:])


class _Decoder:
    """The rows that are in the batch, with the states of both models; always ready to draw."""

    def __init__(
        self,
        models: _Models,
        draw: Callable[..., Sample],
        row_ids: Sequence[int],
        stop: frozenset[int],
        max_new_tokens: int,
    ) -> None:
        self.rows: list[_Row] = []
        self.log = _Log()
        self._models = models
        self._draw = draw
        self._row_ids = row_ids
        self._stop = stop
        self._max_new_tokens = max_new_tokens
        self._states: _States | None = None
        self._row_id = torch.empty(0)

    def enter(self, rows: Sequence[_Row], states: _States) -> None:
        self._states = states if self._states is None else self._states.append(states)
        self.rows = [*self.rows, *rows]
        self._rows_changed()

    def step(self) -> Sample:
        """Draw a token for every row, let go of the rows that are done, and run the models for the others."""
        assert self._states is not None
        sample = self._draw(self._states.rl.logits, self._states.base.logits, row_id=self._row_id, step=self._step())
        self.log.add(self.rows, sample)
        staying = self._staying(sample.token.tolist())
        tokens = sample.token
        if len(staying) < len(self.rows):
            tokens = tokens[staying]
            self._states = self._states.take(staying) if staying else None
            self.rows = [self.rows[place] for place in staying]
        self.rows = [row._replace(generated=row.generated + 1) for row in self.rows]
        if self._states is not None:
            if len(staying) < len(sample.token):
                # The width is of what the cache holds, all tokens but this one.
                self._rows_changed(missing=1)
            self._models.advance(self._states, tokens, [row.length for row in self.rows], self._tokens)
        return sample

    def _tokens(self, place: int) -> Tensor:
        """All tokens of the row at that place of the batch."""
        row = self.rows[place]
        return torch.cat([row.prompt, self.log.tokens_of(row.number)])

    def _step(self) -> int | Tensor:
        """The place of the token to draw in each row: a number where it is the same in all."""
        steps = [row.generated for row in self.rows]
        return steps[0] if min(steps) == max(steps) else torch.tensor(steps, device=self._row_id.device)

    def _staying(self, tokens: Sequence[int]) -> list[int]:
        """Places of the rows that go on after these tokens."""
        staying = []
        for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if token < 0:
                raise RuntimeError(self._no_token(row, place))
            if token in self._stop:
                self.log.finished.append(row.number)
            elif row.generated + 1 < self._max_new_tokens:
                staying.append(place)
        return staying

    def _rows_changed(self, missing: int = 0) -> None:
        assert self._states is not None
        self._states.resize(max(row.length for row in self.rows) - missing)
        row_ids = [self._row_ids[row.number] for row in self.rows]
        self._row_id = torch.tensor(row_ids, device=self._states.rl.logits.device)

    def _no_token(self, row: _Row, place: int) -> str:
        assert self._states is not None
        name = "model" if _is_bad(self._states.rl.logits[place]) else "base_model"
        return (
            f"row {row.number}, step {row.generated}: {name} gives logits with NaN or +inf, or no finite one, expected "
            "some from which a token can be drawn"
        )


def _is_bad(logits: Tensor) -> bool:
    return bool(logits.isnan().any() or (logits == torch.inf).any() or not logits.isfinite().any())


def _draw(logits: Tensor, base_logits: Tensor, **options: Any) -> Sample:
    # A single place that calls, so that a warning about the options is shown once.
    return extrapolated_sample(logits, base_logits, **options)


def _steps(decoder: _Decoder, queue: _Queue, max_batch_size: int) -> Iterator[Sample]:
    """What is drawn at each step until no row is left."""
    while decoder.rows or queue.remaining:
        free = min(max_batch_size - len(decoder.rows), queue.remaining)
        if free and (not decoder.rows or free >= max_batch_size * _REFILL_SHARE):
            decoder.enter(*queue.pop(free))
        yield decoder.step()


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{name} is {value}, expected a number ≥ 1")


def _check_pair(pair: Sequence[PreTrainedModel], batch: Batch) -> int:
    """The size of the vocabulary that both models have; errors where models and tokens do not fit together."""
    model, base_model = pair
    if model.device != base_model.device:
        raise ValueError(f"base_model is on {base_model.device}, expected {model.device}, the device of model")
    for x in pair:
        check_tokens(batch, x)
    return common_rows(vocabulary_of(model), vocabulary_of(base_model), batch)


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
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"stop_token_ids has {token!r}, expected integers")
        if not 0 <= token < vocabulary:
            raise ValueError(f"stop_token_ids has {token}, expected tokens in [0, {vocabulary})")
    return frozenset(tokens)


def _special_tokens(model: PreTrainedModel, name: str) -> list[int]:
    """Tokens of that name in the generation config, or else in the config; those below 0 stand for none."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True)):
        value: Any = getattr(config, name, None)
        values = value if isinstance(value, list | tuple) else [value]
        tokens = [int(token) for token in values if token is not None and token >= 0]
        if tokens:
            return tokens
    return []


def _padding_token(pair: Sequence[PreTrainedModel], stop: Collection[int], vocabulary: int) -> int:
    """A token that a tokenizer knows, where there is one."""
    known = [*(token for x in pair for token in _special_tokens(x, "pad_token_id")), *sorted(stop)]
    return next((token for token in known if token < vocabulary), 0)


def _row_ids(given: Sequence[int] | Tensor | None, rows: int) -> list[int]:
    if given is None:
        return list(range(rows))
    if isinstance(given, Tensor) and (given.is_floating_point() or given.dtype == torch.bool):
        raise TypeError(f"row_id has dtype {given.dtype}, expected an integer dtype")
    ids = given.tolist() if isinstance(given, Tensor) else list(given)
    if len(ids) != rows:
        raise ValueError(f"row_id has {len(ids)} numbers, expected {rows}, one of each row")
    for number in ids:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"row_id has {number!r}, expected integers")
        if not 0 <= number < 2**32:
            raise ValueError(f"row_id has {number}, expected integers in [0, 2**32)")
    return ids
