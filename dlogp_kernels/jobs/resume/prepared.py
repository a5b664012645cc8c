"""The data of a run as token ids on disk: checked once, mapped into memory, never all of it at once."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...report.dataset import Replaced
from ...report.files import replaced_atomically, write_atomically
from ...report.ledger import Ledger
from ...report.text import counted
from ..errors import JobError
from ..inputs.records import Encoder, Example, Record
from ..inputs.values import BrokenLine, shown

_SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("remark", pa.string()),
        ("correct", pa.float32()),
        ("finished", pa.bool_()),
        ("positions", pa.list_(pa.int32())),
        ("draft_ids", pa.list_(pa.int32())),
        ("draft_texts", pa.list_(pa.string())),
    ]
)
_SAMPLES_FILE = "samples.arrow"
_BROKEN_FILE = "broken_lines.json"
_SAMPLES_PER_BATCH = 256


class BrokenLineReport(NamedTuple):
    """A line that was left out, and why."""

    line: int
    reason: str


class Remark(NamedTuple):
    """Something to know about lines that are used: how many they are, and the number of the first."""

    text: str
    lines: int
    first_line: int

    def __str__(self) -> str:
        return f"line {self.first_line} ({counted(self.lines, 'line')} in all): {self.text}"


def prepare(
    directory: Path,
    ledger: Ledger,
    records: Iterable[Record],
    encode: Encoder,
    *,
    skip_broken: bool,
    on_broken: Callable[[Sequence[BrokenLineReport]], None] | None,
) -> None:
    """Encode all records into `directory`, whose files are in the ledger when that is done.

    A broken line is left out if `skip_broken`, and `on_broken` is given all so far; else a JobError with its number.
    """
    broken: list[BrokenLineReport] = []

    def samples() -> Iterator[Example]:
        for record in records:
            try:
                yield encode(record)
            except BrokenLine as error:
                if not skip_broken:
                    raise JobError(f"--data: line {record.line}: {error}") from error
                broken.append(BrokenLineReport(record.line, str(error)))
                if on_broken is not None:
                    on_broken(broken)

    with replaced_atomically(directory / _SAMPLES_FILE) as temporary:
        _write_samples(temporary, samples())
    write_atomically(directory / _BROKEN_FILE, json.dumps(broken).encode())
    ledger.record_files(_files(directory))


def _files(directory: Path) -> list[Path]:
    return [directory / _SAMPLES_FILE, directory / _BROKEN_FILE]


def _write_samples(path: Path, samples: Iterator[Example]) -> None:
    with open(path, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        while batch := list(itertools.islice(samples, _SAMPLES_PER_BATCH)):
            rows = [sample._asdict() | sample.replaced._asdict() for sample in batch]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))


class PreparedData:
    """What `prepare` wrote into `directory`."""

    def __init__(self, directory: Path) -> None:
        with pa.memory_map(str(directory / _SAMPLES_FILE)) as source:
            self._table = pa.ipc.open_file(source).read_all()
        self.broken = [
            BrokenLineReport(*entry) for entry in json.loads((directory / _BROKEN_FILE).read_text(encoding="utf-8"))
        ]
        #: Tokens of each sample's response, and of prompt and response together.
        self.response_lengths = self._lengths("response_ids")
        self.lengths = self._lengths("prompt_ids") + self.response_lengths

    @staticmethod
    def exists(directory: Path, ledger: Ledger) -> bool:
        """Whether preparation of `directory` was finished, and its files are as they were then."""
        return all(map(ledger.holds, _files(directory)))

    def __len__(self) -> int:
        return self._table.num_rows

    def samples(self, begin: int, end: int) -> list[Example]:
        """Samples `begin` to `end` − 1, in the order of the data."""
        piece = self._table.slice(begin, end - begin)
        columns: dict[str, list[Any]] = {"replaced": _replaced(piece)}
        for name in Example._fields:
            if name not in columns:
                lists = name in ("prompt_ids", "response_ids")
                columns[name] = _arrays(piece[name]) if lists else piece[name].to_pylist()
        return list(map(Example, *(columns[name] for name in Example._fields)))

    def remarks(self) -> list[Remark]:
        """What there is to say of lines that are used: how their text became token ids, and ids that are not unique."""
        lines = self._table["line"].to_numpy()
        found: dict[str, list[int]] = {}
        for line, text in zip(lines.tolist(), self._table["remark"].to_pylist(), strict=True):
            if text is not None:
                found.setdefault(text, []).append(line)
        return [*self._repeated_ids(lines), *(Remark(text, len(at), at[0]) for text, at in found.items())]

    def _repeated_ids(self, lines: np.ndarray) -> list[Remark]:
        first, codes = np.unique(self._table["sample_id"].to_numpy(), return_index=True, return_inverse=True)[1:]
        repeated = np.flatnonzero(first[codes] != np.arange(len(codes)))
        if not len(repeated):
            return []
        place = repeated[0]
        name = shown(self._table["sample_id"][int(place)].as_py())
        text = (
            f"the id is that of an earlier line (such as {name} of line {lines[first[codes[place]]]}): in the data set "
            "`line` tells them apart, `sample_id` does not"
        )
        return [Remark(text, len(repeated), int(lines[place]))]

    def _lengths(self, name: str) -> np.ndarray:
        return pc.list_value_length(self._table[name]).to_numpy().astype(np.int64)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column without nulls, which lie one after the other."""
    values = pc.list_flatten(column).to_numpy()
    ends = itertools.accumulate(pc.list_value_length(column).to_pylist(), initial=0)
    return [values[begin:end] for begin, end in itertools.pairwise(ends)]


def _replaced(piece: pa.Table) -> list[Replaced]:
    if not len(pc.list_flatten(piece["positions"])):
        # Most data have none, and Python objects of lists are slow to make.
        return [Replaced()] * len(piece)
    return list(map(Replaced, *(piece[name].to_pylist() for name in Replaced._fields)))
