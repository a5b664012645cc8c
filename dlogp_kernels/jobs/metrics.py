"""Δlog p, entropies and KLs of a pair of models at every token of a file of responses; resumable.

A run killed at any moment and started again with the same arguments goes on where it was, and its data set is that of a
run that was not interrupted: what is computed together depends on the data and the arguments alone (`resume.plan`), and
parts appear whole or not at all. (On the same machine with as many threads: how many share a matrix product shows in
the last bit.)
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import __version__
from ..hf import HiddenStore
from ..hf.memory import as_bytes
from ..report.dataset import (
    RESPONSES_DIRECTORY,
    TOKENS_DIRECTORY,
    Origin,
    ResponseRows,
    TokenDataset,
    part_paths,
    write_part,
)
from ..report.story import tell
from .allowed import check_options, taken
from .errors import JobError
from .inputs.models import ModelPlace, check_device, find_pair, read_pair, warn_of_rounding
from .inputs.records import Encoder, Example, Record, line_limit, read_records
from .inputs.rollouts import is_unfinished
from .options import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, Measuring, Working
from .progress import bar, note, show_layer
from .resume.fingerprint import Fingerprints, versions
from .resume.plan import cut_batches, cut_parts
from .resume.prepared import BrokenLineReport, PreparedData, prepare
from .resume.run_directory import RunDirectory
from .summary import describe
from .token_statistics import parted
from .token_text import TokenTexts
from .workers.duty import Engine, Task, Team
from .workers.engines import check_working, engine_of
from .workers.measurer import MeasuringDuty, batch_task, key_of

_HIDDEN_DIRECTORY = "base_hidden"
_SHOWN_BROKEN_LINES = 20


def run_metrics(
    rl: str | Path,
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Compute the statistics of every response token of `data` and write them to the directory `out`.

    Args:
        rl, base: directories of the two models, or their names on the Hub; safetensors only.
        data: a JSONL or Parquet file, or a directory of some; the columns are described in `jobs.inputs.records`.
        out: receives the data set (`report.dataset`), `manifest.json` and `summary.json`. Where it holds a run of the
            same arguments, data and models, that run goes on, or nothing is done if it is complete; a run of others is
            an error, and stays as it is.
        resume: insist that `out` holds a run to go on with; without it a new run may begin.
        progress: show progress and broken lines on stderr.
        options: the fields of `jobs.options.Measuring`, sizes also as text such as "4GiB". The softmax is in float32
            whatever `dtype` is; with `sequential` the base model runs over all the data first, and its hidden states
            are on disk (below `out`) until the RL model has run: the numbers are the same. A line that can not be used
            is, for `on_error`, a JobError that names it before any model is run, or is skipped and listed in the
            summary. And those of `Working`: workers, which may be others when the run goes on. Those of this machine
            share the threads of this process.

    Returns:
        What `summary.json` holds.

    Raises:
        JobError: an argument, the data, a model or the directory can not be used, or the disk is full.
    """
    working = Working(**taken(Working, options))
    device = check_working(working, options.get("device"))
    arguments = checked(Measuring(**options | {"device": device}))
    gathering = engine_of(working, arguments.device, device)
    rl_place, base_place = find_pair(rl, base, trust_remote_code=arguments.trust_remote_code)
    data_path = Path(data)
    # Opened here for the errors of a file that is missing or empty, before anything else is looked at.
    records = read_records(data_path, arguments.max_line_size)
    if is_unfinished(data_path):
        warnings.warn(f"{data_path}: the run is not complete: the part that is written is measured", stacklevel=2)
    fingerprints = Fingerprints(out, progress=progress)
    identity = {
        "arguments": asdict(arguments),
        "data": fingerprints.data(data_path),
        "rl": fingerprints.model(rl_place),
        "base": fingerprints.model(base_place),
        "versions": versions(arguments.device),
    }
    directory = RunDirectory(out, identity, fingerprints.stamps)
    with directory.claimed(resume=resume) as finished:
        if finished is not None:
            return finished
        with gathering as engine:
            reading = read_pair(rl_place, base_place)
            warn_of_rounding(rl_place, base_place, arguments.dtype)
            prepared = _prepared(directory, data_path, records, Encoder(*reading), arguments, progress=progress)
            run = _Run(
                directory, arguments, prepared, TokenTexts(reading.tokenizer), rl_place, base_place, fingerprints,
                identity["versions"], engine, progress,
            )  # fmt: skip
            run.compute()
        found = run.summary()
        _warn_of_nan(found)
        return directory.finish(found, {"rl": str(rl), "base": str(base), "data": str(data), **asdict(arguments)})


def _prepared(
    directory: RunDirectory,
    path: Path,
    records: Iterable[Record],
    encoder: Encoder,
    arguments: Measuring,
    *,
    progress: bool,
) -> PreparedData:
    """The data as token ids, which a run that goes on has already; JobError where there are none."""
    if not PreparedData.exists(directory.work, directory.ledger):
        with directory.writing():
            prepare(
                directory.work,
                directory.ledger,
                bar(enabled=progress, iterable=records, desc="reading", unit=" lines", leave=False),
                encoder,
                skip_broken=arguments.on_error == "skip",
                on_broken=_announce if progress else None,
            )
    prepared = PreparedData(directory.work)
    _check_not_empty(path, prepared)
    for remark in prepared.remarks() if progress else ():
        note(f"{path}: {remark}")
    return prepared


def checked(given: Measuring) -> Measuring:
    """The options in plain types, the default device named; JobError for a value that can not be."""
    try:
        memory_limit = None if given.memory_limit is None else as_bytes(given.memory_limit)
    except ValueError as error:
        raise JobError(f"--memory-limit: {error}") from error
    measuring = replace(given, memory_limit=memory_limit, max_line_size=line_limit(given.max_line_size))
    check_options(measuring)
    device = check_device(measuring.device)
    default = CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS
    return replace(
        measuring,
        device=device,
        temperature=float(measuring.temperature),
        batch_tokens=default if measuring.batch_tokens is None else measuring.batch_tokens,
    )


def _check_not_empty(data: Path, prepared: PreparedData) -> None:
    if len(prepared):
        return
    if prepared.broken:
        first = prepared.broken[0]
        raise JobError(
            f"--data {data}: none of its {len(prepared.broken)} lines can be used; line {first.line}: {first.reason}"
        )
    raise JobError(f"--data {data}: there is no line in it, expected one response a line")


def _announce(broken: Sequence[BrokenLineReport]) -> None:
    """Show the line that was found last, of the first few."""
    if len(broken) <= _SHOWN_BROKEN_LINES:
        note(f"skipped line {broken[-1].line}: {broken[-1].reason}")
    elif len(broken) == _SHOWN_BROKEN_LINES + 1:
        note("more lines are skipped; summary.json will list them all")


@dataclass
class _Run:
    """The computation of a run whose data are prepared."""

    directory: RunDirectory
    arguments: Measuring
    data: PreparedData
    texts: TokenTexts
    rl: ModelPlace
    base: ModelPlace
    fingerprints: Fingerprints
    versions: Mapping[str, str]
    engine: Engine
    progress: bool

    def __post_init__(self) -> None:
        arguments = self.arguments
        assert arguments.batch_tokens is not None, "options are checked, which names a default"
        self._batch_tokens = arguments.batch_tokens
        self._parts = cut_parts(self.data.lengths, self._batch_tokens)
        self._origin = Origin(
            __version__, self.rl.name, self.base.name, self.rl.revision, self.base.revision, arguments.dtype,
            arguments.temperature,
        )  # fmt: skip
        self._shown = bar(enabled=False)

    def compute(self) -> None:
        """Compute and write the parts that are not there yet, or not as they were written."""
        missing = [index for index in range(len(self._parts)) if not self._is_written(index)]
        if not missing:
            return
        if self.arguments.sequential:
            self._store_base(missing)
            self._write_parts(missing, self._team(self.rl, None, self._hidden_directory))
        else:
            self._write_parts(missing, self._team(self.rl, self.base, None))

    def summary(self) -> dict[str, Any]:
        """What is written when all parts are there."""
        dataset = TokenDataset(self.directory.out, verify=False)
        num_tokens, num_response_tokens = int(self.data.lengths.sum()), int(self.data.response_lengths.sum())
        return {
            "responses": len(self.data),
            "response_tokens": num_response_tokens,
            "tokens": num_tokens,
            "sources": describe(dataset),
            "words": tell(dataset),
            "broken_lines": [broken._asdict() for broken in self.data.broken],
            "remarks": [remark._asdict() for remark in self.data.remarks()],
            "tokens_per_second": self.directory.rate(num_tokens),
            "response_tokens_per_second": self.directory.rate(num_response_tokens),
        }

    def _is_written(self, index: int) -> bool:
        ledger, paths = self.directory.ledger, part_paths(self.directory.out, index)
        lost = [path for path in paths if not ledger.holds(path)]
        for path in lost:
            if ledger.pieces(path):
                warnings.warn(f"{path} is damaged or gone: it is computed again", stacklevel=2)
        return not lost

    @property
    def _hidden_directory(self) -> Path:
        return self.directory.work / _HIDDEN_DIRECTORY

    def _team(self, rl: ModelPlace | None, base: ModelPlace | None, store: Path | None) -> AbstractContextManager[Team]:
        """Whoever computes with these models, or with the base model's hidden states in the store."""
        duty = MeasuringDuty(self.arguments, rl, base, store, self.fingerprints, self.versions)
        return self.engine(duty, self._on_layer)

    def _store_base(self, parts: Sequence[int]) -> None:
        """Keep the base model's hidden states of all samples of the parts; what is there and whole stays."""
        found = HiddenStore.whole(self._hidden_directory)
        if found is not None and all(_has(found, task.payload) for task in self._tasks(parts)):
            return
        with self._team(None, self.base, None) as team:
            assert team.greeting is not None, "the base model is alone"
            with self.directory.writing():
                self.directory.begin(TOKENS_DIRECTORY)
                store = HiddenStore.create(self._hidden_directory, team.greeting)
            with self._bar("base", parts) as shown:
                self.directory.start_lap()
                for task, hidden in team.results(self._without(store, parts, shown)):
                    with self.directory.writing():
                        for sample, states in zip(task.payload, hidden, strict=True):
                            store.write(key_of(sample), states, input_ids=sample.response_ids.tolist())
                        self.directory.save_lap()
                    shown.update(_count_tokens(task.payload))

    def _without(self, store: HiddenStore, parts: Sequence[int], shown: tqdm) -> Iterator[Task]:
        """The batches of which the store lacks something."""
        for task in self._tasks(parts):
            if _has(store, task.payload):
                shown.update(_count_tokens(task.payload))
            else:
                yield task

    def _write_parts(self, missing: Sequence[int], gathering: AbstractContextManager[Team]) -> None:
        """Each when all of its batches are there, in whatever order they come."""
        begun: dict[int, list[ResponseRows]] = {}
        with gathering as team, self._bar("rl" if self.arguments.sequential else "rl and base", missing) as shown:
            self.directory.start_lap()
            for task, measured in team.results(self._tasks(missing)):
                part, _ = task.key
                rows = begun.setdefault(part, [])
                rows += map(self._rows, task.payload, parted(task.payload, measured))
                shown.update(_count_tokens(task.payload))
                begin, end = self._parts[part]
                if len(rows) == end - begin:
                    self._write_part(part, begun.pop(part))
        assert not begun, "each batch comes once"

    def _write_part(self, index: int, rows: list[ResponseRows]) -> None:
        rows.sort(key=lambda row: row.line)
        with self.directory.writing():
            self.directory.begin(TOKENS_DIRECTORY, RESPONSES_DIRECTORY)
            self.directory.save_lap()
            for path, piece in write_part(self.directory.out, index, rows, self._origin):
                self.directory.ledger.record(path, piece)

    def _tasks(self, parts: Sequence[int]) -> Iterator[Task]:
        """The batches of the parts."""
        for index in parts:
            begin, end = self._parts[index]
            samples = self.data.samples(begin, end)
            for place, members in enumerate(cut_batches(self.data.lengths[begin:end], self._batch_tokens)):
                yield batch_task(index, place, [samples[member] for member in members])

    def _rows(self, sample: Example, statistics: Mapping[str, np.ndarray]) -> ResponseRows:
        return ResponseRows(
            sample.sample_id,
            sample.line,
            sample.source,
            sample.response_ids,
            self.texts(sample.response_ids),
            statistics,
            self.texts.joined(sample.prompt_ids),
            sample.prompt_ids,
            sample.correct,
            sample.finished,
            sample.replaced,
        )

    def _bar(self, name: str, parts: Sequence[int]) -> tqdm:
        """A bar of tokens, prompts included; its rate and time left are of the parts that are computed now."""
        total = int(self.data.lengths.sum())
        self._shown = bar(
            desc=name,
            total=total,
            initial=total - sum(int(self.data.lengths[slice(*self._parts[index])].sum()) for index in parts),
            unit=" tokens",
            unit_scale=True,
            enabled=self.progress,
        )
        return self._shown

    def _on_layer(self, done: int, total: int) -> None:
        show_layer(self._shown, done, total)


def _warn_of_nan(summary: Mapping[str, Any]) -> None:
    count = sum(source["statistics"]["delta_logp"]["nan"] for source in summary["sources"].values())
    if count:
        warnings.warn(f"Δlog p of {count} of {summary['response_tokens']} tokens is NaN", stacklevel=3)


def _has(store: HiddenStore, samples: Sequence[Example]) -> bool:
    """Whether the hidden states of all samples are there and whole."""
    return all(store.has(key_of(sample), input_ids=sample.response_ids.tolist()) for sample in samples)


def _count_tokens(samples: Sequence[Example]) -> int:
    return sum(len(sample.prompt_ids) + len(sample.response_ids) for sample in samples)
