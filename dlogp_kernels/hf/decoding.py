"""The loop that draws the tokens of many rows: each prompt is run once, a row that is done leaves the batch, and one
that waits takes its place."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..results import Sample
from .cached import CachedModel, CachedRows

#: Places of finished rows are filled when they are this share of the batch: a prefill of each model fills them all.
_REFILL_SHARE = 1 / 8


class _Row(NamedTuple):
    """A row of the batch: its number among all, its prompt, and the tokens that were generated."""

    number: int
    prompt: Tensor
    tokens: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


@dataclass
class Decoder:
    """The rows that are in the batch, in mid-sequence in the cache of each model; always ready to draw.

    Args:
        models: the RL model and the base model, or the one that is both.
        prompts: `samples` rows begin with each.
        draw: gives a token to each row from the logits of both models, `row_id` and `step`.
        row_ids: of all rows.
        stop: the tokens that end a row.
        max_new_tokens: of each row.
    """

    models: Sequence[CachedModel]
    prompts: Sequence[Tensor]
    samples: int
    draw: Callable[..., Sample]
    row_ids: Sequence[int]
    stop: frozenset[int]
    max_new_tokens: int

    def __post_init__(self) -> None:
        self.drawn = Drawn()
        self._waiting = len(self.prompts) * self.samples
        #: The state after the prompt of the first row that waits, if another row began with it.
        self._kept: list[CachedRows] = []
        self._rows: list[_Row] = []
        self._states: list[CachedRows] = []
        self._row_id = torch.empty(0)

    @property
    def remaining(self) -> int:
        """Rows that are not done."""
        return self._waiting + len(self._rows)

    def steps(self, max_batch_size: int) -> Iterator[Sample]:
        """What is drawn at each step until no row is left."""
        while self.remaining:
            free = min(max_batch_size - len(self._rows), self._waiting)
            if free and (not self._rows or free >= max_batch_size * _REFILL_SHARE):
                self._enter(free)
            yield self._step()

    def _enter(self, count: int) -> None:
        """The next rows join, ready to draw their first token."""
        begin = len(self.prompts) * self.samples - self._waiting
        numbers = range(begin, begin + count)
        prompt_of = [number // self.samples for number in numbers]
        states = self._prefilled(prompt_of[0], prompt_of[-1] + 1)
        self._waiting -= count
        last_waits = numbers.stop % self.samples > 0
        self._kept = _taken(states, [prompt_of[-1] - prompt_of[0]]) if last_waits else []
        if self.samples > 1:
            states = _taken(states, [prompt - prompt_of[0] for prompt in prompt_of])
        self._states = _appended(self._states, states) if self._states else states
        self._rows += [_Row(number, self.prompts[number // self.samples], []) for number in numbers]
        self._rows_changed()

    def _prefilled(self, begin: int, end: int) -> list[CachedRows]:
        """The states after prompts `begin` to `end`, a row each; the first may have been run before."""
        prompts = self.prompts[begin + bool(self._kept) : end]
        if not prompts:
            return self._kept
        states = [model.prefill(prompts) for model in self.models]
        return _appended(self._kept, states) if self._kept else states

    def _step(self) -> Sample:
        """Draw a token for every row, let go of the rows that are done, and run the models for the others."""
        logits, base_logits = self._states[0].logits, self._states[-1].logits
        sample = self.draw(logits, base_logits, row_id=self._row_id, step=self._places())
        self.drawn.add(self._rows, sample)
        staying = self._staying(sample.token.tolist())
        tokens, any_leaves = sample.token, len(staying) < len(self._rows)
        if any_leaves:
            tokens = tokens[staying]
            self._states = _taken(self._states, staying) if staying else []
        self._rows = [self._rows[place] for place in staying]
        if self._rows:
            if any_leaves:
                # The width is of what the cache holds, all tokens but this one.
                self._rows_changed(missing=1)
            lengths = [row.length for row in self._rows]
            pairs = zip(self.models, self._states, strict=True)
            self._states = [model.advance(state, tokens, lengths, self._tokens) for model, state in pairs]
        return sample

    def _tokens(self, place: int) -> Tensor:
        """All tokens of the row at that place of the batch."""
        row = self._rows[place]
        return torch.cat([row.prompt, row.prompt.new_tensor(row.tokens)])

    def _places(self) -> int | Tensor:
        """The place of the token to draw in each row: a number where it is the same in all."""
        places = [len(row.tokens) for row in self._rows]
        return places[0] if min(places) == max(places) else torch.tensor(places, device=self._row_id.device)

    def _staying(self, tokens: Sequence[int]) -> list[int]:
        """Places of the rows that go on after these tokens, which each gets."""
        staying = []
        for place, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            if token < 0:
                name = "model" if _is_bad(self._states[0].logits[place]) else "base_model"
                raise RuntimeError(
                    f"row {row.number}, step {len(row.tokens)}: {name} gives logits with NaN or +inf, or no finite "
                    "one, expected some from which a token can be drawn"
                )
            row.tokens.append(token)
            if token in self.stop:
                self.drawn.finished.append(row.number)
            elif len(row.tokens) < self.max_new_tokens:
                staying.append(place)
        return staying

    def _rows_changed(self, missing: int = 0) -> None:
        width = max(row.length for row in self._rows) - missing
        for state in self._states:
            state.resize(width)
        row_ids = [self.row_ids[row.number] for row in self._rows]
        self._row_id = torch.tensor(row_ids, device=self._states[0].logits.device)


class Drawn:
    """What was drawn, step by step: of each token the number of its row and its place there, beside the samples."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.places: list[int] = []
        self.samples: list[Sample] = []
        #: Numbers of the rows that ended with a stop token.
        self.finished: list[int] = []
        self._selected = 0
        self._counted = 0

    def add(self, rows: Sequence[_Row], sample: Sample) -> None:
        self.rows += [row.number for row in rows]
        self.places += [len(row.tokens) for row in rows]
        self.samples.append(sample)

    def selected(self) -> int:
        """How many tokens were selected so far."""
        self._selected += sum(int(sample.selected.sum()) for sample in self.samples[self._counted :])
        self._counted = len(self.samples)
        return self._selected


def _taken(states: Sequence[CachedRows], rows: Sequence[int]) -> list[CachedRows]:
    return [state.take(rows) for state in states]


def _appended(states: list[CachedRows], others: Sequence[CachedRows]) -> list[CachedRows]:
    for state, other in zip(states, others, strict=True):
        state.append(other)
    return states


def _is_bad(logits: Tensor) -> bool:
    return bool(logits.isnan().any() or (logits == torch.inf).any() or not logits.isfinite().any())
