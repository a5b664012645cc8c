"""The data set of token statistics: one row per response token, in Parquet files that any tool reads.

    DIR/tokens/part-00000.parquet …   the rows, in the order of the responses
    DIR/summary.json                  what is in them; it appears when the run is complete

A part is written whole or not at all, and its digest is kept (`ledger`): a damaged one is not read. `DIR/tokens` holds
nothing else, so `pandas.read_parquet("DIR/tokens")` works.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from .errors import DatasetError
from .files import write_atomically
from .ledger import Ledger, Piece, check, piece_of

#: The float32 columns, in nats: fields of `DeltaLogpStats`. Named one by one: they are the format of the files.
STATISTICS = (
    "delta_logp", "logp", "base_logp", "entropy", "base_entropy", "kl", "reverse_kl", "lse", "base_lse",
)  # fmt: skip
#: Each model's most likely token and its log p. Earlier data sets lack these columns, which are then read as null.
_MOST_LIKELY = (
    ("top_token", pa.int32()), ("top_logp", pa.float32()),
    ("base_top_token", pa.int32()), ("base_top_logp", pa.float32()),
)  # fmt: skip

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),  # `id` of the data, or the line number
        pa.field("line", pa.int64(), nullable=False),  # of the data file, from 1
        pa.field("source", pa.string()),  # who wrote the response, as the data says
        pa.field("position", pa.int32(), nullable=False),  # in the response, from 0
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token_text", pa.string(), nullable=False),
        *(pa.field(name, pa.float32(), nullable=False) for name in STATISTICS),
        *(pa.field(name, kind) for name, kind in _MOST_LIKELY),
    ]
)

_EARLIER_SCHEMA = pa.schema(list(SCHEMA)[: -len(_MOST_LIKELY)])

TOKENS_DIRECTORY = "tokens"
SUMMARY_FILE = "summary.json"


class ResponseRows(NamedTuple):
    """One response and its statistics, by the names of their columns, each an array with one value a token."""

    sample_id: str
    line: int
    source: str | None
    token_ids: np.ndarray
    token_texts: Sequence[str]
    statistics: Mapping[str, np.ndarray]


def part_path(directory: Path, index: int) -> Path:
    """Where part `index` of the data set in `directory` lies."""
    return directory / TOKENS_DIRECTORY / f"part-{index:05d}.parquet"


def to_table(responses: Sequence[ResponseRows]) -> pa.Table:
    """The responses as rows of `SCHEMA`, in their order."""
    tables = [SCHEMA.empty_table()]
    for response in responses:
        count = len(response.token_ids)
        columns: dict[str, Any] = {
            "sample_id": pa.repeat(response.sample_id, count),
            "line": pa.repeat(response.line, count),
            "source": pa.repeat(pa.scalar(response.source, pa.string()), count),
            "position": np.arange(count),
            "token_id": response.token_ids,
            "token_text": response.token_texts,
            **response.statistics,
        }
        tables.append(pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA))
    return pa.concat_tables(tables).combine_chunks()


def write_part(directory: Path, index: int, table: pa.Table) -> tuple[Path, Piece]:
    """Write one part, and say where, and what; at any moment it is absent or whole. Equal rows give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    path, data = part_path(directory, index), sink.getvalue().to_pybytes()
    write_atomically(path, data)
    return path, piece_of(data)


def check_part(path: Path) -> None:
    """DatasetError if a file is not readable as a part."""
    with _explained_reads(path):
        schema = pq.read_schema(path)
    if not (schema.equals(SCHEMA) or schema.equals(_EARLIER_SCHEMA)):
        raise DatasetError(f"{path} has other columns than this version writes")


@contextlib.contextmanager
def _explained_reads(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not a readable Parquet file: {error}") from error


class TokenDataset:
    """A data set of token statistics on disk, read a column or a batch at a time.

    Raises DatasetError if `directory` does not hold one, or a part is not what the run wrote (`verify`: its digest).
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        parts = sorted(self.directory.glob(f"{TOKENS_DIRECTORY}/part-*.parquet"))
        if not parts:
            raise DatasetError(
                f"{self.directory} holds no token statistics: expected {TOKENS_DIRECTORY}/part-*.parquet in it, "
                "as `dlogp metrics --out` writes them"
            )
        if verify:
            check(Ledger.read(self.directory), self.directory / TOKENS_DIRECTORY, parts)
        for part in parts:
            check_part(part)
        self._dataset = ds.dataset([str(part) for part in parts], schema=SCHEMA, format="parquet")

    @property
    def complete(self) -> bool:
        """Whether the run that writes this data set has finished."""
        return (self.directory / SUMMARY_FILE).exists()

    def __len__(self) -> int:
        return self._dataset.count_rows()

    def sources(self) -> list[str | None]:
        """The different sources, sorted; None last."""
        found: set[str | None] = set()
        with _explained_reads(self.directory):
            for batch in self._dataset.to_batches(columns=["source"]):
                found.update(batch["source"].unique().to_pylist())
        return sorted(found, key=lambda source: (source is None, source or ""))

    def column(self, name: str, source: str | None = None, *, every_source: bool = False) -> np.ndarray:
        """All values of a numeric column, of one source (None: rows without one) or of every source."""
        with _explained_reads(self.directory):
            table = self._dataset.to_table(columns=[name], filter=None if every_source else _is_source(source))
        return table[name].to_numpy()

    def means_by_token(self, columns: Sequence[str]) -> pa.Table:
        """A row for each token, in memory that does not grow with the data: id, text, count, means of these columns."""
        names = ["token_id", "token_text", *columns]
        aggregates: list[Any] = [("token_text", "hash_one", None, "text"), ([], "hash_count_all", None, "count")]
        aggregates += [(name, "hash_mean", None, name) for name in columns]
        # In order and by one thread, so that the same data give the same sums.
        in_order = acero.ScanNodeOptions(self._dataset, columns=names, require_sequenced_output=True)
        by_token = acero.AggregateNodeOptions(aggregates, keys=["token_id"])
        steps = [acero.Declaration("scan", in_order), acero.Declaration("aggregate", by_token)]
        with _explained_reads(self.directory):
            return acero.Declaration.from_sequence(steps).to_table(use_threads=False)


def _is_source(source: str | None) -> ds.Expression:
    return ds.field("source").is_null() if source is None else ds.field("source") == source
