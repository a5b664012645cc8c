"""Responses to a file of problems under settings of extrapolated sampling, graded: `dlogp generate`, `dlogp sweep`.

A response depends on its setting, seed and number alone, and chunks are cut from the data and the arguments alone: a
run killed at any moment and started again gives the file of a run that was not interrupted. (On the same machine with
as many threads: how many share a matrix product shows in the last bit.)
"""

import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..hf import Generation, generate
from ..report.responses import RESPONSES_FILE, Collector, Response, Setting, SettingResult
from .allowed import check_options
from .errors import JobError, explained_computation
from .graders import EXACT, Grader, load_grader
from .inputs.models import ModelPlace, check_device, find_pair, read_pair, warn_of_rounding
from .inputs.problems import Problem, check_problems, read_problems
from .options import Decoding
from .progress import bar, layers_told, say, show_layer
from .resume.fingerprint import Fingerprints, versions
from .resume.response_file import ResponseFile
from .resume.run_directory import RunDirectory
from .settings import check_settings
from .token_text import TokenTexts

_NUM_ROW_IDS = 2**32


def run_generate(
    rl: str | Path,
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    setting: Setting,
    seed: int = 0,
    decoding: Decoding | None = None,
    grader: str = EXACT,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw and grade responses to the problems of `data` and write them to the directory `out`.

    Args:
        rl, base: directories of the two models, or their names on the Hub; safetensors only.
        data: a JSONL file; its columns are described in `jobs.inputs.problems`.
        out: receives `responses.jsonl` (`report.responses`), `manifest.json` and `summary.json`. Where it holds a run
            of the same arguments, data and models, that run goes on, or nothing is done if it is complete; a run of
            others is an error, and stays as it is.
        setting: when a token of the draft is replaced, and from what.
        seed: of the noise, 64 bits. Runs of one seed share their noise: their accuracies can be compared in pairs.
        decoding: temperature and filters, samples, lengths, batches, device.
        grader: `exact`, `math-verify` or `module:function`, see `jobs.graders`. One that raises, ends its process or
            takes longer than `decoding.grader_timeout` is counted, and the reason is kept with the response.
        resume: insist that `out` holds a run to go on with; without it a new run may begin.
        progress: show progress on stderr.

    Returns:
        What `summary.json` holds: accuracy and replaced share with standard errors over problems, lengths, tokens,
        errors of the grader.

    Raises:
        JobError: an argument, the data, a model or the directory can not be used, or the disk is full. UserWarning: a
            threshold of `delta_logp` that is not below 0.
    """
    return run_sweep(
        rl, base, data, out, settings=[setting], seeds=[seed], decoding=decoding, grader=grader, resume=resume,
        progress=progress, command="generate",
    )  # fmt: skip


def run_sweep(
    rl: str | Path,
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    settings: Sequence[Setting],
    seeds: Sequence[int] = (0,),
    decoding: Decoding | None = None,
    grader: str = EXACT,
    resume: bool = False,
    progress: bool = True,
    command: str = "sweep",
) -> dict[str, Any]:
    """Draw and grade responses to the problems of `data` under each setting with each seed; write them to `out`.

    `settings` come from `jobs.settings.grid`, or from the caller; `command` names the run in its files. Everything else
    is as in `run_generate`; `dlogp plot` draws what comes out.
    """
    decoding = decoding or Decoding()
    check_settings(settings, seeds)
    check_options(decoding)
    device, stops = check_device(decoding.device), decoding.stop_token_ids
    decoding = replace(decoding, device=device, stop_token_ids=None if stops is None else list(stops))
    loaded_grader = load_grader(grader, timeout=decoding.grader_timeout)
    places = find_pair(rl, base, trust_remote_code=decoding.trust_remote_code)
    check_problems("--data", Path(data))
    fingerprints = Fingerprints(out, progress=progress)
    identity: dict[str, Any] = {
        "command": command,
        "settings": [setting._asdict() for setting in settings],
        "seeds": list(seeds),
        "decoding": asdict(decoding),
        "grader": dict(loaded_grader.identity),
        "data": fingerprints.file(Path(data)),
        "rl": fingerprints.model(places[0]),
        "base": fingerprints.model(places[1]),
        "versions": versions(device, "extrapolated_sample"),
    }
    directory = RunDirectory(out, identity, fingerprints.stamps)
    with directory.claimed(resume=resume) as finished:
        if finished is not None:
            return finished
        reading = read_pair(*places)
        warn_of_rounding(*places, decoding.dtype)
        problems = read_problems(
            Path(data),
            reading,
            max_new_tokens=decoding.max_new_tokens,
            needs_answer=loaded_grader.needs_answer,
            max_line_bytes=decoding.max_line_size,
        )
        if len(problems) * decoding.samples >= _NUM_ROW_IDS:
            raise JobError(
                f"--samples: {len(problems)} problems × {decoding.samples} are too many, expected below 2**32"
            )
        drawing = Drawing(loaded_grader, reading.tokenizer, decoding, torch.device(device))
        run = _Run(directory, drawing, _cut_chunks(problems, settings, seeds, decoding), fingerprints, progress)
        run.compute(places)
        names = {"rl": str(rl), "base": str(base), "data": str(data), "grader": grader}
        arguments = {"command": command, **names, "seeds": list(seeds), **identity["decoding"]}
        return directory.finish(run.summary(), arguments)


class Chunk(NamedTuple):
    """The responses that are drawn and written together: `samples` to each of some problems."""

    setting: Setting
    seed: int
    problems: Sequence[Problem]


def _cut_chunks(
    problems: Sequence[Problem], settings: Sequence[Setting], seeds: Sequence[int], decoding: Decoding
) -> list[Chunk]:
    size = decoding.problems_per_chunk
    return [
        Chunk(setting, seed, problems[begin : begin + size])
        for setting in settings
        for seed in seeds
        for begin in range(0, len(problems), size)
    ]


@dataclass
class _Run:
    """The computation of a run whose problems are read."""

    directory: RunDirectory
    drawing: "Drawing"
    chunks: Sequence[Chunk]
    fingerprints: Fingerprints
    progress: bool

    def __post_init__(self) -> None:
        self._collector = Collector()

    def compute(self, places: Sequence[ModelPlace]) -> None:
        """Draw, grade and write the chunks that are not there yet."""
        file = ResponseFile(self.directory.out / RESPONSES_FILE, self.directory.ledger)
        decoding = self.drawing.decoding
        lengths = [len(chunk.problems) * decoding.samples for chunk in self.chunks]
        with self.directory.writing():
            self.directory.begin()
            num_kept, damaged = file.keep(len(self.chunks))
        missing = self.chunks[num_kept:]
        load = partial(self.fingerprints.load, dtype=decoding.dtype, device=self.drawing.device)
        models: list[Any] = []
        if missing or damaged:
            rl = load(places[0])
            # One that is both is run once.
            models = [rl, rl if places[0].directory == places[1].directory else load(places[1])]
        draw = partial(self.drawing, models)
        if damaged:
            warnings.warn(f"{file.path} is damaged: what is lost is drawn again", stacklevel=2)
        for index in (index for index in damaged if index < num_kept):
            responses = draw(self.chunks[index])
            with self.directory.writing():
                file.mend(index, responses, sum(lengths[:index]) + 1)
        for response in file.responses():
            self._collector.add(response)
        if not missing:
            return
        total, done = sum(lengths), sum(lengths[:num_kept])
        with bar(total=total, initial=done, unit=" responses", enabled=self.progress) as shown:
            progress = _Progress(shown)
            self.directory.start_lap()
            for chunk in missing:
                progress.begin(chunk.setting)
                responses = draw(chunk, progress)
                with self.directory.writing():
                    file.append(responses)
                    self.directory.save_lap()
                for response in responses:
                    self._collector.add(response)
                progress.end(self._collector.result(chunk.setting))

    def summary(self) -> dict[str, Any]:
        """What is written when all responses are there."""
        results = self._collector.results()
        tokens = sum(result.tokens for result in results)
        return {
            "settings": [result.to_json() for result in results],
            "responses": sum(result.responses for result in results),
            "tokens": tokens,
            "grader_errors": sum(result.grader_errors for result in results),
            "tokens_per_second": self.directory.rate(tokens),
        }


@dataclass
class Drawing:
    """Draws the responses of chunks, and grades them."""

    grader: Grader
    tokenizer: Any
    decoding: Decoding
    device: torch.device

    def __post_init__(self) -> None:
        self._texts = TokenTexts(self.tokenizer)

    def __call__(self, models: Sequence[Any], chunk: Chunk, progress: "_Progress | None" = None) -> list[Response]:
        """The graded responses of a chunk, samples of a problem one after another; `models` are RL and base."""
        rl, base = models
        progress = progress or _Progress(bar(enabled=False))
        samples = self.decoding.samples
        input_ids, attention_mask = _pad_left([problem.prompt_ids for problem in chunk.problems], self.device)
        # The numbers of a chunk's problems follow each other.
        first = chunk.problems[0].number * samples
        with _explained_generation(), layers_told(models, progress.on_layer) as enough:

            def on_step(*counts: int) -> None:
                enough()
                progress.on_step(*counts)

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


class _Progress:
    """On a bar of responses: tokens a second, and the share of replaced tokens and the accuracy of the setting."""

    def __init__(self, shown: tqdm) -> None:
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
        self._tokens += tokens - self._chunk_tokens
        if self._accuracy == "–" and tokens:
            self._share = f"{selected / tokens:.1%}"
        self._show(rows_done - self._chunk_rows)
        self._chunk_tokens, self._chunk_rows = tokens, rows_done

    def end(self, result: SettingResult) -> None:
        """The chunk is written; `result` is of all chunks of its setting so far."""
        self._share = "–" if result.replaced_share is None else f"{result.replaced_share.mean:.1%}"
        self._accuracy = "–" if result.accuracy is None else f"{result.accuracy.mean:.3f}"
        self._show(0)

    def _show(self, num_done: int) -> None:
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        text = f"{rate:,.0f} tokens/s, replaced {self._share}, accuracy {self._accuracy}"
        say(self._bar, text, num_done)


@contextmanager
def _explained_generation() -> Iterator[None]:
    """What the models (RuntimeError: one that gives NaN) and the ops can not do with these arguments, as a JobError."""
    failed, kinds = "the responses can not be drawn", (ValueError, TypeError, IndexError, RuntimeError)
    with explained_computation(failed, "a smaller --batch-size", kinds), warnings.catch_warnings():
        # It was said before the models were loaded.
        warnings.filterwarnings("ignore", message="threshold is .* replaces nearly every token")
        yield
