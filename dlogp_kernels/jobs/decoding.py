"""Responses to a file of problems under settings of extrapolated sampling, graded: `dlogp generate`, `dlogp sweep`.

A response depends on its setting, seed and number alone, and chunks are cut from the data and the arguments alone: a
run killed at any moment and started again gives the file of a run that was not interrupted. (On the same machine with
as many threads: how many share a matrix product shows in the last bit.) Workers draw whole chunks, which this process
writes in their order: one that is done before its turn waits in memory.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..report.responses import RESPONSES_FILE, Collector, Response, Setting
from .allowed import check_options
from .drawing import Chunk, Drawing
from .errors import JobError
from .graders import EXACT, load_grader
from .inputs.models import check_device, find_pair, read_pair, warn_of_rounding
from .inputs.problems import Problem, check_problems, read_problems
from .options import Decoding, Working
from .progress import bar
from .resume.fingerprint import Fingerprints
from .resume.response_file import ResponseFile
from .resume.run_directory import RunDirectory
from .settings import check_settings
from .workers.drawer import DrawingDuty, chunk_task, drawing_versions
from .workers.duty import Engine, Team
from .workers.engines import check_working, engine_of

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
    **working: Any,
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
        working: the fields of `jobs.options.Working`: workers, which may be others when the run goes on. Those of this
            machine share the threads of this process.

    Returns:
        What `summary.json` holds: accuracy and replaced share with standard errors over problems, lengths, tokens,
        errors of the grader.

    Raises:
        JobError: an argument, the data, a model or the directory can not be used, or the disk is full. UserWarning: a
            threshold of `delta_logp` that is not below 0.
    """
    return run_sweep(
        rl, base, data, out, settings=[setting], seeds=[seed], decoding=decoding, grader=grader, resume=resume,
        progress=progress, command="generate", **working,
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
    **working: Any,
) -> dict[str, Any]:
    """Draw and grade responses to the problems of `data` under each setting with each seed; write them to `out`.

    `settings` come from `jobs.settings.grid`, or from the caller; `command` names the run in its files. Everything else
    is as in `run_generate`; `dlogp plot` draws what comes out.
    """
    decoding = decoding or Decoding()
    check_settings(settings, seeds)
    check_options(decoding)
    workers, stops = Working(**working), decoding.stop_token_ids
    kind = check_working(workers, decoding.device)
    device = check_device(kind)
    gathering = engine_of(workers, device, kind)
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
        "versions": drawing_versions(device),
    }
    directory = RunDirectory(out, identity, fingerprints.stamps)
    with directory.claimed(resume=resume) as finished:
        if finished is not None:
            return finished
        with gathering as engine:
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
            run = _Run(
                directory,
                _cut_chunks(problems, settings, seeds, decoding),
                DrawingDuty(decoding, *places, grader, identity["grader"], fingerprints, identity["versions"]),
                Drawing(loaded_grader, reading.tokenizer, decoding, torch.device(device)),
                engine,
                progress,
            )
            run.compute()
        names = {"rl": str(rl), "base": str(base), "data": str(data), "grader": grader}
        arguments = {"command": command, **names, "seeds": list(seeds), **identity["decoding"]}
        return directory.finish(run.summary(), arguments)


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
    chunks: Sequence[Chunk]
    duty: DrawingDuty
    drawing: Drawing
    engine: Engine
    progress: bool

    def __post_init__(self) -> None:
        self._collector = Collector()
        self._file = ResponseFile(self.directory.out / RESPONSES_FILE, self.directory.ledger)
        self._lengths = [len(chunk.problems) * self.duty.decoding.samples for chunk in self.chunks]

    def compute(self) -> None:
        """Draw, grade and write the chunks that are not there yet, or not as they were written."""
        with self.directory.writing():
            self.directory.begin()
            num_kept, damaged = self._file.keep(len(self.chunks))
        if damaged:
            warnings.warn(f"{self._file.path} is damaged: what is lost is drawn again", stacklevel=2)
        if num_kept == len(self.chunks) and not damaged:
            self._collect(self._file.responses())
            return
        with self.engine(self.duty, self.drawing) as team:
            self._mend(team, [index for index in damaged if index < num_kept])
            self._collect(self._file.responses())
            if num_kept < len(self.chunks):
                self._append(team, num_kept)

    def _mend(self, team: Team, damaged: Sequence[int]) -> None:
        """Write damaged chunks again."""
        for index, responses in self._drawn(team, damaged):
            with self.directory.writing():
                self._file.mend(index, responses, sum(self._lengths[:index]) + 1)

    def _append(self, team: Team, num_kept: int) -> None:
        """Write all chunks behind those that are there."""
        total, done = sum(self._lengths), sum(self._lengths[:num_kept])
        with bar(total=total, initial=done, unit=" responses", enabled=self.progress) as shown:
            self.drawing.progress.show_on(shown)
            self.directory.start_lap()
            for index, responses in self._drawn(team, range(num_kept, len(self.chunks))):
                with self.directory.writing():
                    self._file.append(responses)
                    self.directory.save_lap()
                self._collect(responses)
                self.drawing.progress.end(responses, self._collector.result(self.chunks[index].setting))

    def _drawn(self, team: Team, indices: Sequence[int]) -> Iterator[tuple[int, list[Response]]]:
        """Chunks with their responses, in that order; what a worker has before its turn waits in memory."""
        early: dict[int, list[Response]] = {}
        left = iter(indices)
        following = next(left, None)
        for task, responses in team.results(chunk_task(index, self.chunks[index]) for index in indices):
            [index] = task.key
            early[index] = responses
            while following in early:
                yield following, early.pop(following)
                following = next(left, None)
        assert not early, "each chunk comes once"

    def _collect(self, responses: Iterable[Response]) -> None:
        for response in responses:
            self._collector.add(response)

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
