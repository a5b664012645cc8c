"""Drawing the responses of a chunk, grading them, and showing how far that is."""

import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..hf import Generation, generate
from ..report.responses import Response, Setting, SettingResult
from .errors import explained_computation
from .graders import Grader
from .inputs.problems import Problem
from .options import Decoding
from .progress import bar, layers_told, say, show_layer
from .token_text import TokenTexts


class Chunk(NamedTuple):
    """The responses that are drawn and written together: `samples` to each of some problems."""

    setting: Setting
    seed: int
    problems: Sequence[Problem]


class Progress:
    """On a bar of responses: tokens a second, and the share of replaced tokens and the accuracy of the setting.

    Steps are told where chunks are drawn in this process; of others each moves the bar when it is written.
    """

    def __init__(self) -> None:
        self.show_on(bar(enabled=False))

    def show_on(self, shown: tqdm) -> None:
        """From now on, on this bar."""
        self._bar = shown
        self._started = time.monotonic()
        self._setting: Setting | None = None
        self._tokens = self._chunk_tokens = self._chunk_rows = 0
        self._share = self._accuracy = "–"

    def begin(self, setting: Setting) -> None:
        """A chunk begins."""
        self._chunk_tokens = self._chunk_rows = 0
        if setting != self._setting:
            self._setting = setting
            self._share = self._accuracy = "–"
            self._bar.set_description_str(str(setting), refresh=False)

    def on_layer(self, done: int, total: int) -> None:
        """The models run the first prompts of a chunk."""
        show_layer(self._bar, done, total)

    def on_step(self, tokens: int, selected: int, rows_done: int) -> None:
        """A token of every row in the batch was drawn; all counts are of this chunk so far."""
        if self._accuracy == "–" and tokens:
            self._share = f"{selected / tokens:.1%}"
        self._move_to(tokens, rows_done)

    def end(self, responses: Sequence[Response], result: SettingResult) -> None:
        """A chunk is written, with these responses; `result` is of all chunks of its setting so far."""
        if result.setting != self._setting:
            self.begin(result.setting)
        self._share = "–" if result.replaced_share is None else f"{result.replaced_share.mean:.1%}"
        self._accuracy = "–" if result.accuracy is None else f"{result.accuracy.mean:.3f}"
        self._move_to(sum(len(response.token_ids) for response in responses), len(responses))
        self._chunk_tokens = self._chunk_rows = 0

    def _move_to(self, tokens: int, rows_done: int) -> None:
        """Show what there is of this chunk."""
        self._tokens += tokens - self._chunk_tokens
        num_done = rows_done - self._chunk_rows
        self._chunk_tokens, self._chunk_rows = tokens, rows_done
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        text = f"{rate:,.0f} tokens/s, replaced {self._share}, accuracy {self._accuracy}"
        say(self._bar, text, num_done)


@dataclass
class Drawing:
    """Draws the responses of chunks, and grades them."""

    grader: Grader
    tokenizer: Any
    decoding: Decoding
    device: torch.device
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._texts = TokenTexts(self.tokenizer)

    def __call__(self, models: Sequence[Any], chunk: Chunk) -> list[Response]:
        """The graded responses of a chunk, samples of a problem one after another; `models` are RL and base."""
        rl, base = models
        self.progress.begin(chunk.setting)
        samples = self.decoding.samples
        input_ids, attention_mask = _pad_left([problem.prompt_ids for problem in chunk.problems], self.device)
        # The numbers of a chunk's problems follow each other.
        first = chunk.problems[0].number * samples
        with _explained_generation(), layers_told(models, self.progress.on_layer) as enough:

            def on_step(*counts: int) -> None:
                enough()
                self.progress.on_step(*counts)

            generation = generate(
                rl,
                base,
                input_ids,
                attention_mask,
                **chunk.setting._asdict(),
                temperature=self.decoding.temperature,
                top_k=self.decoding.top_k,
                top_p=self.decoding.top_p,
                min_p=self.decoding.min_p,
                seed=chunk.seed,
                max_new_tokens=self.decoding.max_new_tokens,
                stop_token_ids=self.decoding.stop_token_ids,
                num_return_sequences=samples,
                row_id=range(first, first + len(chunk.problems) * samples),
                max_batch_size=self.decoding.batch_size,
                on_step=on_step,
            )
        return list(self._responses(chunk, generation))

    def _responses(self, chunk: Chunk, generation: Generation) -> Iterator[Response]:
        """The rows of a generation as responses; each knows the places, Δlog p and drafts of its replaced tokens."""
        names = ("tokens", "draft_tokens", "selected", "delta_logp", "lengths", "finished")
        columns = (getattr(generation, name).cpu() for name in names)
        places = itertools.product(chunk.problems, range(self.decoding.samples))
        for (problem, sample), *row in zip(places, *columns, strict=True):
            all_tokens, all_drafts, is_selected, delta_logp, length, finished = row
            tokens, selected = all_tokens[:length], is_selected[:length].nonzero().flatten()
            text, drafts = self.tokenizer.decode(tokens, skip_special_tokens=True), all_drafts[selected]
            grade = self.grader(text, problem.columns)
            yield Response(
                problem.problem_id,
                problem.number,
                sample,
                chunk.setting,
                chunk.seed,
                text,
                problem.prompt_ids,
                tokens.tolist(),
                bool(finished),
                grade.score,
                grade.error,
                selected.tolist(),
                delta_logp[selected].float().tolist(),
                drafts.tolist(),
                self._texts(drafts.numpy()),
                self._texts(tokens[selected].numpy()),
            )


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, longest prompt)."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows).to(device), pad([torch.ones_like(row) for row in rows]).to(device)


@contextmanager
def _explained_generation() -> Iterator[None]:
    """What the models (RuntimeError: one that gives NaN) and the ops can not do with these arguments, as a JobError."""
    failed, kinds = "the responses can not be drawn", (ValueError, TypeError, IndexError, RuntimeError)
    with explained_computation(failed, "a smaller --batch-size", kinds), warnings.catch_warnings():
        # It was said before the models were loaded.
        warnings.filterwarnings("ignore", message="threshold is .* replaces nearly every token")
        yield
