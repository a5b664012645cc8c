"""Δlog p, entropies and KLs of a pair of models at every token of a file of responses; resumable.

A run killed at any moment and started again with the same arguments goes on where it was, and its data set is that of a
run that was not interrupted: what is computed together depends on the data and the arguments alone (`resume.plan`), and
parts appear whole or not at all. (On the same machine with as many threads: how many share a matrix product shows in
the last bit.)
"""

import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..checks import check_scale
from ..hf import HiddenStore, LmHead, lm_head
from ..hf.memory import as_bytes
from ..report.dataset import TOKENS_DIRECTORY, ResponseRows, TokenDataset, part_path, to_table, write_part
from .errors import JobError, check_option
from .inputs.models import DTYPES, ModelPlace, check_device, find_model, load_weights, read_pair, warn_of_rounding
from .inputs.records import MAX_LINE_BYTES, Encoder, Sample, line_limit, read_records
from .progress import bar, note, show_layer
from .resume.fingerprint import Fingerprints, versions
from .resume.plan import cut_batches, cut_parts
from .resume.prepared import BrokenLineReport, PreparedData, prepare
from .resume.run_directory import RunDirectory, State, known_stamps
from .resume.stopwatch import Stopwatch
from .summary import describe
from .token_statistics import Setting, measure, response_hidden
from .token_text import TokenTexts

DEFAULT_BATCH_TOKENS = 8192
_HIDDEN_DIRECTORY = "base_hidden"
_SHOWN_BROKEN_LINES = 20

#: Of a batch: its samples and their keys.
_Statistics = Callable[[Sequence[Sample], Sequence[str]], list[dict[str, np.ndarray]]]


class Arguments(NamedTuple):
    """The arguments of a run that its numbers depend on, checked and in plain types."""

    memory_limit: int | None
    batch_tokens: int
    dtype: str
    device: str
    sequential: bool
    on_error: str
    temperature: float
    trust_remote_code: bool
    max_line_size: int


def run_metrics(
    rl: str | Path,
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    memory_limit: int | str | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    dtype: str = "auto",
    device: str | None = None,
    sequential: bool = False,
    resume: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    temperature: float = 1.0,
    trust_remote_code: bool = False,
    max_line_size: int | str = MAX_LINE_BYTES,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute the statistics of every response token of `data` and write them to the directory `out`.

    Args:
        rl, base: directories of the two models, or their names on the Hub; safetensors only.
        data: a JSONL or Parquet file; its columns are described in `jobs.inputs.records`.
        out: receives the data set (`report.dataset`), `manifest.json` and `summary.json`. Where it holds a run of the
            same arguments, data and models, that run goes on, or nothing is done if it is complete; a run of others is
            an error, and stays as it is.
        memory_limit: bytes or text such as "4GiB" that may be allocated beyond the models.
        batch_tokens: tokens, padding included, that go through the models at once.
        dtype: of the weights in memory: auto (each checkpoint's own, so that none is rounded), bf16, fp16 or fp32. The
            softmax is in float32 whatever it is.
        device: where the models run; CUDA if there is one, else the CPU.
        sequential: run the base model over all the data first, keep its hidden states on disk (below `out`), free it,
            then run the RL model. The numbers are the same; only one model is in memory at a time.
        resume: insist that `out` holds a run to go on with; without it a new run may begin.
        on_error: what to do with a line that can not be used: "raise" a JobError that names it, before any model is
            run, or "skip" it and list it in the summary.
        temperature: both models' logits are divided by it.
        trust_remote_code: run code that comes with the models.
        max_line_size: bytes or text such as "16MiB" that a line of JSONL may have; a longer one can not be used, and is
            never held in memory. Parsed, a line may take forty times its size.
        progress: show progress and broken lines on stderr.

    Returns:
        What `summary.json` holds.

    Raises:
        JobError: an argument, the data, a model or the directory can not be used, or the disk is full.
    """
    arguments = _check_arguments(
        memory_limit, batch_tokens, dtype, device, sequential, on_error, temperature, trust_remote_code, max_line_size
    )
    rl_place = find_model("--rl", rl, trust_remote_code=trust_remote_code)
    base_place = find_model("--base", base, trust_remote_code=trust_remote_code)
    data_path = Path(data)
    # Opened here for the errors of a file that is missing or empty, before anything else is looked at.
    records = read_records(data_path, arguments.max_line_size)
    fingerprints = Fingerprints(known_stamps(out), progress=progress)
    identity = {
        "arguments": arguments._asdict(),
        "data": fingerprints.file(data_path),
        "rl": fingerprints.model(rl_place),
        "base": fingerprints.model(base_place),
        "versions": versions(arguments.device),
    }
    directory = RunDirectory(out, identity, fingerprints.stamps)
    if directory.state() is State.NEW and resume:
        raise JobError(f"--out {out}: --resume is given, but there is no run to go on with")
    with directory.claimed() as state:
        if state is State.COMPLETE:
            return directory.summary()
        reading = read_pair(rl_place, base_place, trust_remote_code=trust_remote_code)
        warn_of_rounding(rl_place, base_place, dtype, trust_remote_code=trust_remote_code)
        if not (state is State.PARTIAL and PreparedData.exists(directory.work, directory.ledger)):
            encoder = Encoder(reading.tokenizer, vocabulary=reading.vocabulary, context=reading.context)
            with directory.writing():
                prepare(
                    directory.work,
                    directory.ledger,
                    bar(enabled=progress, iterable=records, desc="reading", unit=" lines", leave=False),
                    encoder,
                    skip_broken=arguments.on_error == "skip",
                    on_broken=_Announcer(progress),
                )
        prepared = PreparedData(directory.work)
        _check_not_empty(data_path, prepared)
        for remark in prepared.remarks() if progress else ():
            note(f"{data_path}: {remark}")
        texts = TokenTexts(reading.tokenizer)
        run = _Run(directory, arguments, prepared, texts, rl_place, base_place, fingerprints, progress)
        run.compute()
        summary = run.summary({"rl": str(rl), "base": str(base), "data": str(data)}, identity)
        _warn_of_nan(summary)
        with directory.writing():
            directory.finish(summary)
        return summary


def _check_arguments(
    memory_limit: int | str | None,
    batch_tokens: int,
    dtype: str,
    device: str | None,
    sequential: bool,
    on_error: str,
    temperature: float,
    trust_remote_code: bool,
    max_line_size: int | str,
) -> Arguments:
    if batch_tokens < 1:
        raise JobError(f"--batch-tokens is {batch_tokens}, expected at least 1")
    check_option(check_scale, "--temperature", temperature)
    if dtype not in DTYPES:
        raise JobError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if on_error not in ("raise", "skip"):
        raise JobError(f"--on-error is {on_error!r}, expected raise or skip")
    try:
        limit = None if memory_limit is None else as_bytes(memory_limit)
    except ValueError as error:
        raise JobError(f"--memory-limit: {error}") from error
    return Arguments(
        limit,
        batch_tokens,
        dtype,
        check_device(device),
        sequential,
        on_error,
        float(temperature),
        trust_remote_code,
        line_limit(max_line_size),
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


class _Announcer:
    """Shows broken lines as they are found, the first few in full."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._count = 0

    def __call__(self, broken: BrokenLineReport) -> None:
        self._count += 1
        if self._enabled and self._count <= _SHOWN_BROKEN_LINES:
            note(f"skipped line {broken.line}: {broken.reason}")
        if self._enabled and self._count == _SHOWN_BROKEN_LINES + 1:
            note("more lines are skipped; summary.json will list them all")


class _Run:
    """The computation of a run whose data are prepared."""

    def __init__(
        self,
        directory: RunDirectory,
        arguments: Arguments,
        data: PreparedData,
        texts: TokenTexts,
        rl: ModelPlace,
        base: ModelPlace,
        fingerprints: Fingerprints,
        progress: bool,
    ) -> None:
        self._directory = directory
        self._arguments = arguments
        self._data = data
        self._texts = texts
        self._rl = rl
        self._base = base
        self._fingerprints = fingerprints
        self._progress = progress
        self._parts = cut_parts(data.lengths, arguments.batch_tokens)
        self._setting = Setting(
            torch.device(arguments.device), arguments.temperature, arguments.memory_limit, self._on_layer
        )
        self._shown: tqdm | None = None
        self._stopwatch = Stopwatch(directory.ledger)

    def compute(self) -> None:
        """Compute and write the parts that are not there yet, or not as they were written."""
        missing = [index for index in range(len(self._parts)) if not self._is_written(index)]
        if missing:
            statistics = self._from_disk(missing) if self._arguments.sequential else self._from_both_models()
            self._write_parts(missing, statistics)

    def summary(self, names: Mapping[str, str], identity: Mapping[str, Any]) -> dict[str, Any]:
        """What is written when all parts are there."""
        num_tokens, num_response_tokens = int(self._data.lengths.sum()), int(self._data.response_lengths.sum())
        seconds = self._stopwatch.seconds
        return {
            "responses": len(self._data),
            "response_tokens": num_response_tokens,
            "tokens": num_tokens,
            "sources": describe(TokenDataset(self._directory.out, verify=False)),
            "broken_lines": [broken._asdict() for broken in self._data.broken],
            "remarks": [remark._asdict() for remark in self._data.remarks()],
            "arguments": {**names, **self._arguments._asdict()},
            "versions": {"python": platform.python_version(), **identity["versions"]},
            "seconds": round(seconds, 3),
            "tokens_per_second": round(num_tokens / seconds, 1) if seconds else None,
            "response_tokens_per_second": round(num_response_tokens / seconds, 1) if seconds else None,
        }

    def _is_written(self, index: int) -> bool:
        path = part_path(self._directory.out, index)
        if self._directory.ledger.holds(path):
            return True
        if self._directory.ledger.knows(path):
            warnings.warn(f"{path} is damaged or gone: it is computed again", stacklevel=2)
        return False

    def _from_both_models(self) -> _Statistics:
        models = self._load(self._rl), self._load(self._base)
        return lambda samples, _: measure(samples, *models, self._setting)

    def _from_disk(self, parts: Sequence[int]) -> _Statistics:
        """Statistics from the base model's hidden states on disk, which are computed first, and the RL model."""
        store = self._store_base(parts)
        head = _on_device(store.head(), self._setting.device)
        model = self._load(self._rl)

        def statistics(samples: Sequence[Sample], keys: Sequence[str]) -> list[dict[str, np.ndarray]]:
            hidden = [store.read(key, input_ids=_response(sample)) for sample, key in zip(samples, keys, strict=True)]
            return measure(samples, model, head, self._setting, hidden)

        return statistics

    def _store_base(self, parts: Sequence[int]) -> HiddenStore:
        """The base model's hidden states of all samples of the parts; what is there and whole stays."""
        directory = self._directory.work / _HIDDEN_DIRECTORY
        if (found := HiddenStore.whole(directory)) and all(
            self._has(found, *batch) for index in parts for batch in self._batches(self._parts[index])
        ):
            return found
        base = self._load(self._base)
        with self._directory.writing():
            self._directory.begin(TOKENS_DIRECTORY)
            store = HiddenStore.create(directory, lm_head(base))
        with self._bar("base", parts) as shown:
            self._stopwatch.start()
            for index in parts:
                computed = False
                for samples, keys in self._batches(self._parts[index]):
                    if not self._has(store, samples, keys):
                        computed = True
                        with _explained_computation():
                            hidden = response_hidden(samples, base, self._setting)
                        with self._directory.writing():
                            for sample, key, states in zip(samples, keys, hidden, strict=True):
                                store.write(key, states, input_ids=_response(sample))
                    shown.update(_count_tokens(samples))
                if computed:
                    with self._directory.writing():
                        self._stopwatch.save_lap()
        return store

    @staticmethod
    def _has(store: HiddenStore, samples: Sequence[Sample], keys: Sequence[str]) -> bool:
        return all(store.has(key, input_ids=_response(sample)) for sample, key in zip(samples, keys, strict=True))

    def _write_parts(self, missing: Sequence[int], statistics: _Statistics) -> None:
        with self._bar("rl" if self._arguments.sequential else "rl and base", missing) as shown:
            self._stopwatch.start()
            for index in missing:
                rows: dict[str, ResponseRows] = {}
                for samples, keys in self._batches(self._parts[index]):
                    with _explained_computation():
                        measured = statistics(samples, keys)
                        _check_numbers(samples, measured)
                    rows.update(zip(keys, map(self._rows, samples, measured), strict=True))
                    shown.update(_count_tokens(samples))
                # Keys sort as the data do.
                table = to_table([rows[key] for key in sorted(rows)])
                with self._directory.writing():
                    self._directory.begin(TOKENS_DIRECTORY)
                    self._stopwatch.save_lap()
                    self._directory.ledger.record(*write_part(self._directory.out, index, table))

    def _batches(self, part: tuple[int, int]) -> Iterator[tuple[list[Sample], list[str]]]:
        """The samples of a part in batches, each with a key of its own."""
        begin, end = part
        samples = self._data.samples(begin, end)
        for members in cut_batches(self._data.lengths[begin:end], self._arguments.batch_tokens):
            yield [samples[member] for member in members], [f"{begin + member:012d}" for member in members]

    def _rows(self, sample: Sample, statistics: Mapping[str, np.ndarray]) -> ResponseRows:
        texts = self._texts(sample.response_ids)
        return ResponseRows(sample.sample_id, sample.line, sample.source, sample.response_ids, texts, statistics)

    def _load(self, place: ModelPlace) -> Any:
        model = load_weights(
            place,
            DTYPES[self._arguments.dtype],
            self._setting.device,
            trust_remote_code=self._arguments.trust_remote_code,
        )
        self._fingerprints.check_loaded(place)
        return model

    def _bar(self, name: str, parts: Sequence[int]) -> tqdm:
        """A bar of tokens, prompts included; its rate and time left are of the parts that are computed now."""
        total = int(self._data.lengths.sum())
        self._shown = bar(
            desc=name,
            total=total,
            initial=total - sum(int(self._data.lengths[slice(*self._parts[index])].sum()) for index in parts),
            unit=" tokens",
            unit_scale=True,
            enabled=self._progress,
        )
        return self._shown

    def _on_layer(self, done: int, total: int) -> None:
        if self._shown is not None:
            show_layer(self._shown, done, total)


@contextmanager
def _explained_computation() -> Iterator[None]:
    """What the models and the ops can not do with these arguments, as a JobError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise JobError(
            "the device's memory is full: give --memory-limit, or fewer --batch-tokens, with another --out; "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (ValueError, TypeError, IndexError) as error:
        raise JobError(f"the statistics can not be computed: {error}") from error


def _check_numbers(samples: Sequence[Sample], measured: Sequence[Mapping[str, np.ndarray]]) -> None:
    """ValueError where no Δlog p is a number; single ones that are none are counted in the summary."""
    if not all(np.isnan(statistics["delta_logp"]).all() for statistics in measured):
        return
    models = [name for name in ("logp", "base_logp") if np.isnan(measured[0][name]).all()]
    blamed = " and ".join({"logp": "--rl", "base_logp": "--base"}[name] for name in models) or "the pair"
    raise ValueError(
        f"Δlog p of every token is NaN from line {samples[0].line} on: the logits of {blamed} are no numbers; the "
        "weights are damaged, or --dtype or --temperature do not suit them"
    )


def _warn_of_nan(summary: Mapping[str, Any]) -> None:
    count = sum(source["statistics"]["delta_logp"]["nan"] for source in summary["sources"].values())
    if count:
        warnings.warn(f"Δlog p of {count} of {summary['response_tokens']} tokens is NaN", stacklevel=3)


def _on_device(head: LmHead, device: torch.device) -> LmHead:
    bias = None if head.bias is None else head.bias.to(device)
    return head._replace(weight=head.weight.to(device), bias=bias)


def _response(sample: Sample) -> torch.Tensor:
    return torch.tensor(sample.response_ids)


def _count_tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.prompt_ids) + len(sample.response_ids) for sample in samples)
