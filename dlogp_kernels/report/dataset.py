"""The data set of token statistics: one row per response token, in Parquet files that any tool reads.

    DIR/tokens/part-00000.parquet …     the rows, in the order of the responses
    DIR/responses/part-00000.parquet …  a row for each response of the part of that number, in the same order
    DIR/summary.json                    what is in them; it appears when the run is complete

A part is written whole or not at all, and its digest is kept (`ledger`): a damaged one is not read. `DIR/tokens` holds
nothing else, so `pandas.read_parquet("DIR/tokens")` works. The metadata of each file say under "dlogp" what was
measured and how, as JSON (`Origin`). A file has groups of `ROWS_PER_GROUP` rows with the least and largest value of
each column, so that a reader who filters by response or by Δlog p leaves most of them out.
"""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from .errors import DatasetError
from .files import write_atomically
from .ledger import Ledger, Piece, check, piece_of

#: The float32 columns, in nats: fields of `DeltaLogpStats`. Named one by one: they are the format of the files.
STATISTICS = (
    "delta_logp", "logp", "base_logp", "entropy", "base_entropy", "kl", "reverse_kl", "lse", "base_lse",
)  # fmt: skip
#: Of a response, and of each of its tokens.
_OF_RESPONSE = (
    pa.field("sample_id", pa.string(), nullable=False),  # `id` of the data, or the line number
    pa.field("line", pa.int64(), nullable=False),  # of the data, from 1
    pa.field("source", pa.string()),  # who wrote the response, as the data says
)
_OUTCOME = (
    pa.field("correct", pa.float32()),  # the response's score; above 0 is right
    pa.field("finished", pa.bool_()),  # whether it came to its end
)
#: Earlier data sets end before one of these groups of columns, which are then read as null.
_LATER = (
    # Each model's most likely token and its log p.
    (
        pa.field("top_token", pa.int32()),
        pa.field("top_logp", pa.float32()),
        pa.field("base_top_token", pa.int32()),
        pa.field("base_top_logp", pa.float32()),
    ),
    # Of a token that took the place of another: that one.
    (*_OUTCOME, pa.field("draft_id", pa.int32()), pa.field("draft_text", pa.string())),
)
_FIRST = (
    *_OF_RESPONSE,
    pa.field("position", pa.int32(), nullable=False),  # in the response, from 0
    pa.field("token_id", pa.int32(), nullable=False),
    pa.field("token_text", pa.string(), nullable=False),
    *(pa.field(name, pa.float32(), nullable=False) for name in STATISTICS),
)
SCHEMA = pa.schema([*_FIRST, *(field for group in _LATER for field in group)])
_EARLIER_SCHEMAS = (pa.schema(_FIRST), pa.schema([*_FIRST, *_LATER[0]]))
RESPONSES_SCHEMA = pa.schema(
    [
        *_OF_RESPONSE,
        pa.field("prompt", pa.string()),  # its text, decoded from the ids
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("num_tokens", pa.int32(), nullable=False),  # of the response
        *_OUTCOME,
    ]
)

TOKENS_DIRECTORY, RESPONSES_DIRECTORY = "tokens", "responses"
SUMMARY_FILE = "summary.json"
#: Of a directory without one.
UNFINISHED = "The run is not complete: this shows the part that is written."
ROWS_PER_GROUP = 8192
_METADATA = b"dlogp"


class Origin(NamedTuple):
    """What was measured and how, as the files say it; a revision is that of the Hub, None for a directory."""

    version: str
    rl: str
    base: str
    rl_revision: str | None
    base_revision: str | None
    dtype: str
    temperature: float


class Replaced(NamedTuple):
    """Where tokens of a response took the place of others, and those: their ids and texts."""

    positions: Sequence[int] = ()
    draft_ids: Sequence[int] = ()
    draft_texts: Sequence[str] = ()


class ResponseRows(NamedTuple):
    """One response and its statistics, by the names of their columns, each an array with one value a token."""

    sample_id: str
    line: int
    source: str | None
    token_ids: np.ndarray
    token_texts: Sequence[str]
    statistics: Mapping[str, np.ndarray]
    prompt: str | None = None
    prompt_ids: Sequence[int] | np.ndarray | None = None
    correct: float | None = None
    finished: bool | None = None
    replaced: Replaced = Replaced()


def part_paths(directory: Path, index: int) -> tuple[Path, Path]:
    """Where the tokens and the responses of part `index` of the data set in `directory` lie."""
    name = f"part-{index:05d}.parquet"
    return directory / TOKENS_DIRECTORY / name, directory / RESPONSES_DIRECTORY / name


def to_table(responses: Sequence[ResponseRows]) -> pa.Table:
    """The tokens of responses as rows of `SCHEMA`, in their order."""
    lengths = np.array([len(response.token_ids) for response in responses], np.int64)

    def of_response(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([getattr(response, name) for response in responses], kind).take(of_row)

    def joined(arrays: Iterator[np.ndarray], kind: pa.DataType) -> pa.Array:
        return pa.array(np.concatenate([np.zeros(0, kind.to_pandas_dtype()), *arrays]), kind)

    of_row = pa.array(np.repeat(np.arange(len(responses)), lengths))
    columns: dict[str, Any] = {field.name: of_response(field.name, field.type) for field in (*_OF_RESPONSE, *_OUTCOME)}
    columns["position"] = joined(map(np.arange, lengths), pa.int32())
    columns["token_id"] = joined((response.token_ids for response in responses), pa.int32())
    columns["token_text"] = pa.array([text for response in responses for text in response.token_texts], pa.string())
    columns["draft_id"], columns["draft_text"] = _drafts(responses, lengths)
    for field in SCHEMA:
        if field.name not in columns:
            columns[field.name] = joined((response.statistics[field.name] for response in responses), field.type)
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _drafts(responses: Sequence[ResponseRows], lengths: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """Ids and texts of what was drafted, null where nothing was replaced."""
    total = int(lengths.sum())
    if not any(len(response.replaced.positions) for response in responses):
        return pa.nulls(total, pa.int32()), pa.nulls(total, pa.string())
    ids, texts = np.full(total, None), np.full(total, None)
    for response, end, length in zip(responses, lengths.cumsum(), lengths, strict=True):
        places = end - length + np.asarray(response.replaced.positions, np.int64)
        ids[places], texts[places] = response.replaced.draft_ids, response.replaced.draft_texts
    return pa.array(ids, pa.int32()), pa.array(texts, pa.string())


def to_responses_table(responses: Sequence[ResponseRows]) -> pa.Table:
    """A row of `RESPONSES_SCHEMA` for each response."""
    rows = [response._asdict() | {"num_tokens": len(response.token_ids)} for response in responses]
    return pa.table({name: [row[name] for row in rows] for name in RESPONSES_SCHEMA.names}, schema=RESPONSES_SCHEMA)


def write_part(
    directory: Path, index: int, responses: Sequence[ResponseRows], origin: Origin | None = None
) -> list[tuple[Path, Piece]]:
    """Write one part, and say where, and what; at any moment a file is absent or whole. Equal rows give equal bytes."""
    tables = (to_table(responses), to_responses_table(responses))
    return [_write(path, table, origin) for path, table in zip(part_paths(directory, index), tables, strict=True)]


def _write(path: Path, table: pa.Table, origin: Origin | None) -> tuple[Path, Piece]:
    if origin is not None:
        table = table.replace_schema_metadata({_METADATA: json.dumps(origin._asdict())})
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    places = ["position"] if "position" in table.column_names else []
    others = [name for name in table.column_names if name not in (*floats, *places)]
    encodings = dict.fromkeys(floats, "BYTE_STREAM_SPLIT") | dict.fromkeys(places, "DELTA_BINARY_PACKED")
    sink = pa.BufferOutputStream()
    # Of floats the bytes of one kind stand together, which zstd shrinks: few values are there twice.
    pq.write_table(
        table, sink, compression="zstd", row_group_size=ROWS_PER_GROUP, use_dictionary=others,
        column_encoding=encodings, write_page_index=True,
    )  # fmt: skip
    data = sink.getvalue().to_pybytes()
    write_atomically(path, data)
    return path, piece_of(data)


def check_part(path: Path, schemas: Sequence[pa.Schema] = (SCHEMA, *_EARLIER_SCHEMAS)) -> None:
    """DatasetError if a file is not readable as a part with one of these schemas."""
    with _explained_reads(path):
        schema = pq.read_schema(path)
    if not any(schema.equals(known) for known in schemas):
        raise DatasetError(f"{path} has other columns than this version writes")


@contextlib.contextmanager
def _explained_reads(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not a readable Parquet file: {error}") from error


def hint_below(directory: Path, *names: str) -> str:
    """A directory in it that holds one of these, as the end of a message; "" if none does."""
    found = min((path for name in names for path in directory.glob(f"*/{name}")), default=None)
    return "" if found is None else f"; did you mean {found.parent}?"


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
                f"as `dlogp metrics --out` writes them{hint_below(self.directory, TOKENS_DIRECTORY)}"
            )
        if verify:
            check(Ledger.read(self.directory), self.directory / TOKENS_DIRECTORY, parts)
        for part in parts:
            check_part(part)
        self._dataset = ds.dataset([str(part) for part in parts], schema=SCHEMA, format="parquet")
        self._responses = sorted(self.directory.glob(f"{RESPONSES_DIRECTORY}/part-*.parquet"))
        if verify and self._responses:
            check(Ledger.read(self.directory), self.directory / RESPONSES_DIRECTORY, self._responses)
        for part in self._responses:
            check_part(part, [RESPONSES_SCHEMA])

    @property
    def complete(self) -> bool:
        """Whether the run that writes this data set has finished."""
        return (self.directory / SUMMARY_FILE).exists()

    def __len__(self) -> int:
        return self._dataset.count_rows()

    def origin(self) -> Origin | None:
        """What was measured and how; None of a data set of an earlier version."""
        with _explained_reads(self.directory):
            metadata = pq.read_schema(self._dataset.files[0]).metadata or {}
        try:
            return Origin(**json.loads(metadata[_METADATA])) if _METADATA in metadata else None
        except (ValueError, TypeError) as error:
            raise DatasetError(f"{self._dataset.files[0]}: its metadata are not as this version writes them") from error

    def responses(self) -> pa.Table:
        """A row of `RESPONSES_SCHEMA` for each response, in order; without prompts of data sets of earlier versions."""
        with _explained_reads(self.directory):
            if self._responses:
                files = [str(path) for path in self._responses]
                return ds.dataset(files, schema=RESPONSES_SCHEMA, format="parquet").to_table()
            names = [field.name for field in _OF_RESPONSE]
            rows = self._dataset.to_table(columns=names)
        counted = rows.group_by(names, use_threads=False).aggregate([([], "count_all")])
        counted = counted.rename_columns([*names, "num_tokens"])
        columns = [
            counted[field.name].cast(field.type)
            if field.name in counted.column_names
            else pa.nulls(len(counted), field.type)
            for field in RESPONSES_SCHEMA
        ]
        return pa.table(columns, schema=RESPONSES_SCHEMA)

    def tokens(self, columns: Sequence[str], lines: Sequence[int] | None = None) -> pa.Table:
        """These columns of all rows in order, or of the rows of the responses with these lines."""
        chosen = None if lines is None else pc.field("line").isin(list(lines))
        with _explained_reads(self.directory):
            return self._dataset.to_table(columns=list(columns), filter=chosen)

    def sources(self) -> list[str | None]:
        """The different sources, sorted; None last."""
        return list(self.source_counts)

    @functools.cached_property
    def source_counts(self) -> dict[str | None, int]:
        """How many tokens each source has, in the order of `sources`."""
        counts: Counter[str | None] = Counter()
        for batch in self.batches(["source"]):
            counts.update({row["values"]: row["counts"] for row in batch["source"].value_counts().to_pylist()})
        return dict(sorted(counts.items(), key=lambda item: (item[0] is None, item[0] or "")))

    def batches(self, columns: Sequence[str], chosen: ds.Expression | None = None) -> Iterator[pa.RecordBatch]:
        """These columns of all rows in order, or of those for which `chosen` holds, a few thousand rows at a time."""
        with _explained_reads(self.directory):
            # Part by part: of all together what is read ahead grows with the data set.
            for part in self._dataset.get_fragments():
                yield from part.to_batches(schema=SCHEMA, columns=list(columns), filter=chosen)

    def values(self, columns: Sequence[str], source: str | None) -> Iterator[list[np.ndarray]]:
        """These numeric columns of the rows of one source (None: of those without), a few thousand rows at a time."""
        for batch in self.batches(columns, _is_source(source)):
            yield [batch[name].to_numpy() for name in columns]

    def rows(self, numbers: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """These columns of the rows with these numbers, which count from 0 and ascend."""
        with _explained_reads(self.directory):
            return self._dataset.take(pa.array(numbers, pa.int64()), columns=list(columns))

    def column(self, name: str, source: str | None = None, *, every_source: bool = False) -> np.ndarray:
        """All values of a numeric column, of one source (None: rows without one) or of every source."""
        with _explained_reads(self.directory):
            table = self._dataset.to_table(columns=[name], filter=None if every_source else _is_source(source))
        return table[name].to_numpy()

    @functools.cached_property
    def sums_by_token(self) -> pa.Table:
        """A row for each source, right or wrong, and token, in memory that does not grow with the data.

        Returns:
            `source`, `right` (null where it is not known), `token_id`, its `text`, how many there are (`count`), of how
            many Δlog p is no NaN (`defined`), sums of `delta_logp` over these, of its `size` where it is finite, and of
            `logp` and `base_logp`.
        """
        delta_logp, nothing = pc.field("delta_logp"), pa.scalar(None, pa.float32())
        columns = {
            "source": pc.field("source"),
            "right": pc.field("correct") > 0,
            "token_id": pc.field("token_id"),
            "text": pc.field("token_text"),
            "delta_logp": pc.if_else(pc.is_nan(delta_logp), nothing, delta_logp),
            "size": pc.if_else(pc.is_finite(delta_logp), pc.abs(delta_logp), nothing),
            "logp": pc.field("logp"),
            "base_logp": pc.field("base_logp"),
        }
        aggregates: list[Any] = [("text", "hash_one", None, "text"), ([], "hash_count_all", None, "count")]
        aggregates += [("delta_logp", "hash_count", None, "defined")]
        aggregates += [(name, "hash_sum", None, name) for name in ("delta_logp", "size", "logp", "base_logp")]
        read = ["source", "correct", "token_id", "token_text", "delta_logp", "logp", "base_logp"]
        # In order and by one thread, so that the same data give the same sums.
        scan = acero.ScanNodeOptions(self._dataset, columns=read, require_sequenced_output=True)
        steps = [
            acero.Declaration("scan", scan),
            acero.Declaration("project", acero.ProjectNodeOptions(list(columns.values()), list(columns))),
            acero.Declaration("aggregate", acero.AggregateNodeOptions(aggregates, ["source", "right", "token_id"])),
        ]
        with _explained_reads(self.directory):
            return acero.Declaration.from_sequence(steps).to_table(use_threads=False)


def _is_source(source: str | None) -> ds.Expression:
    return ds.field("source").is_null() if source is None else ds.field("source") == source
