"""Prompts and responses from JSONL or Parquet, checked and turned into token ids.

A line has one of three forms, the first that it has all columns of, with values in them (neither null nor NaN, nor an
empty list):

    prompt_ids, response_ids   token ids, as the models read and wrote them
    messages                   a conversation; the last message is the response, by the assistant; with it optionally
                               `tools` and `chat_template_kwargs`, which the chat template is given, too
    prompt, response           text; the response continues the prompt, and nothing is appended to it

and optionally `id` (a string or an integer), `source` (a string: who wrote the response), `correct` (a score, above 0
if it is right, or true or false) and `finished` (true or false). Other columns are ignored, and so are blank lines.
Lines of other programs are read as theirs, see `rollouts`; of a directory all files are, lines numbered through.
"""

import itertools
import json
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...hf.memory import as_bytes
from ...report.dataset import Replaced
from ...report.jsonl import MAX_LINE_BYTES, bounded_lines
from ..errors import JobError
from . import rollouts
from .encoding import Encoded, encode_after, encode_prompt
from .messages import RESPONSE_KEYS, ChatTemplate, as_conversation
from .models import Reading
from .values import BrokenLine, as_id_list, as_text, check_range, fullest_form, is_missing, kind_of, shown

_FORMS = (("prompt_ids", "response_ids"), ("messages",), ("prompt", "response"))
_BESIDE = ("id", "source", "correct", "finished", "tools", "chat_template_kwargs")
_EXPECTED = "expected prompt and response, or messages, or prompt_ids and response_ids"
#: That of float32, the column of the data set.
_LARGEST_SCORE = 3e38
PARQUET_MAGIC = b"PAR1"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Example(NamedTuple):
    """One prompt and one response to it, as token ids (int32)."""

    line: int
    sample_id: str
    source: str | None
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    #: On how text became token ids, if there is one to make.
    remark: str | None = None
    correct: float | None = None
    finished: bool | None = None
    replaced: Replaced = Replaced()


class Record(NamedTuple):
    """A line as it was read: its number, from 1, and its columns, or why it has none."""

    line: int
    columns: Mapping[str, Any] | BrokenLine


def read_records(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Record]:
    """The lines of a JSONL file, or the rows of a Parquet file, one at a time; a longer line is a broken one.

    Of a directory those of its files, see `rollouts`. Raises JobError if a file is missing, empty, or a Parquet file
    without the columns of any form.
    """
    # A run that was killed may have left half a line at the end.
    whole_lines = rollouts.is_unfinished(path)
    return _numbered_through([_read_file(file, max_line_bytes, whole_lines) for file in rollouts.files_of(path)])


def _numbered_through(files: Sequence[Iterator[Record]]) -> Iterator[Record]:
    before = 0
    for records in files:
        last = before
        for record in records:
            last = before + record.line
            yield Record(last, record.columns)
        before = last


def _read_file(path: Path, max_line_bytes: int, whole_lines: bool) -> Iterator[Record]:
    start = check_file("--data", path)
    if not start:
        raise JobError(f"--data {path}: the file is empty, expected one response a line")
    if start == PARQUET_MAGIC or path.suffix == ".parquet":
        return _read_parquet(path)
    return read_jsonl(path, max_line_bytes, whole_lines=whole_lines)


def check_file(option: str, path: Path) -> bytes:
    """The first bytes of a file that can be read, as many as tell its kind; JobError for anything else."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise JobError(f"{option} {path}: it is a directory, expected a file")
        if not stat.S_ISREG(mode):
            raise JobError(f"{option} {path}: it is a pipe or a device, expected a file that can be read again")
        with open(path, "rb") as file:
            return file.read(len(PARQUET_MAGIC))
    except FileNotFoundError as error:
        raise JobError(f"{option} {path}: there is no such file") from error
    except OSError as error:
        raise JobError(f"{option} {path}: it can not be read ({error.strerror or error})") from error


def line_limit(size: int | str) -> int:
    """Bytes that a line may have, from an int or from text such as "16MiB"; JobError for anything else."""
    try:
        return as_bytes(size, "--max-line-size")
    except (ValueError, TypeError) as error:
        raise JobError(str(error)) from error


def read_jsonl(path: Path, max_line_bytes: int = MAX_LINE_BYTES, *, whole_lines: bool = False) -> Iterator[Record]:
    """The lines of a JSONL file but blank ones; one of more than `max_line_bytes` is a broken one.

    With `whole_lines` one that does not end is left out.
    """
    with open(path, "rb") as file:
        for number, line in bounded_lines(file, max_line_bytes):
            if line is None:
                reason = f"longer than {max_line_bytes:,} bytes, the limit that --max-line-size sets"
                yield Record(number, BrokenLine(reason))
                continue
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip() and (line.endswith(b"\n") or not whole_lines):
                yield Record(number, _parse_json(line))


def _parse_json(line: bytes) -> Mapping[str, Any] | BrokenLine:
    try:
        columns = json.loads(line.rstrip().decode("utf-8"), object_pairs_hook=_without_double_keys)
    except UnicodeDecodeError as error:
        return BrokenLine(f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return BrokenLine(f"not JSON: {error.msg} at column {error.colno}")
    except BrokenLine as error:
        return error
    except (ValueError, RecursionError) as error:
        return BrokenLine(f"not JSON that can be read: {error}")
    if not isinstance(columns, dict):
        return BrokenLine(f"a JSON {kind_of(columns)}, expected an object")
    return columns


def _without_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; BrokenLine if a key is given twice, of which JSON does not say which one counts."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        (name, count), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise BrokenLine(f"the key {shown(name)} is there {count} times, expected each once")
    return columns


def _read_parquet(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not any(set(names).issuperset(form) for form in (*_FORMS, *rollouts.FORMS)):
                raise JobError(f"--data {path}: it has the columns {', '.join(sorted(names))}; {_EXPECTED}")
            forms = (_BESIDE, *_FORMS, rollouts.BESIDE, *rollouts.FORMS)
            wanted = [name for name in dict.fromkeys(itertools.chain(*forms)) if name in names]
            for name in wanted:
                if names.count(name) > 1:
                    raise JobError(f"--data {path}: it has the column {name} twice, expected each once")
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, {name: _without_nulls(entry) for name, entry in row.items()})
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"--data {path}: not a readable Parquet file (after row {number}): {error}") from error


def _without_nulls(value: Any) -> Any:
    """The same without keys whose value is null: a column of objects gives each of them the keys of all."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(entry) for entry in value]
    return value


class Encoder(Reading):
    """Turns the columns of a line into an `Example`: token ids below the vocabulary, together within the context."""

    def __call__(self, record: Record) -> Example:
        """The sample of a line; BrokenLine if it has none."""
        columns = rollouts.renamed(columns_of(record), _FORMS)
        prompt_ids, response_ids, remark = self._encode(columns)
        if not response_ids:
            raise BrokenLine("the response is empty")
        if not prompt_ids:
            raise BrokenLine("the prompt has no tokens: nothing precedes the first token of the response")
        for name, ids in (("prompt", prompt_ids), ("response", response_ids)):
            check_range(name, ids, self.vocabulary)
        length = len(prompt_ids) + len(response_ids)
        if self.context is not None and length > self.context:
            raise BrokenLine(
                f"prompt ({len(prompt_ids)} tokens) and response ({len(response_ids)}) are longer than the context "
                f"of the models, {self.context} tokens"
            )
        return Example(
            record.line,
            sample_id(columns, record.line),
            _source(columns),
            np.asarray(prompt_ids, np.int32),
            np.asarray(response_ids, np.int32),
            remark,
            _score(columns),
            _finished(columns),
            replaced if isinstance(replaced := columns.get("replaced"), Replaced) else Replaced(),
        )

    def _encode(self, columns: Mapping[str, Any]) -> Encoded:
        match fullest_form(columns, _FORMS):
            case ("prompt_ids", "response_ids") as form:
                prompt_ids, response_ids = (as_id_list(name, columns[name]) for name in form)
                return Encoded(prompt_ids, response_ids)
            case ("messages",):
                return self._encode_messages(columns)
            case ("prompt", "response") as form:
                prompt, response = (as_text(name, columns[name]) for name in form)
                return encode_after(self.tokenizer, prompt, response, partial(encode_prompt, self.tokenizer))
        raise missing_columns(columns, _EXPECTED)

    def _encode_messages(self, columns: Mapping[str, Any]) -> Encoded:
        template = ChatTemplate(self.tokenizer, columns, otherwise="prompt and response")
        conversation = as_conversation(columns["messages"])
        if len(conversation) < 2:
            raise BrokenLine(f"messages has {len(conversation)} entries, expected a prompt and a response")
        last = conversation[-1]
        if last["role"] != "assistant":
            raise BrokenLine(f"the last message has the role {shown(last['role'])}, expected 'assistant'")
        if not any(last.get(name) for name in RESPONSE_KEYS):
            raise BrokenLine("the response is empty")
        return template.encode_pair(conversation)


def columns_of(record: Record) -> Mapping[str, Any]:
    """The columns of a line; BrokenLine if it has none."""
    if isinstance(record.columns, BrokenLine):
        raise record.columns
    return record.columns


def missing_columns(columns: Mapping[str, Any], expected: str) -> BrokenLine:
    """What to raise for a line that has other columns."""
    return BrokenLine(f"missing columns: it has {', '.join(map(shown, columns)) or 'none'}; {expected}")


def sample_id(columns: Mapping[str, Any], line: int) -> str:
    """The column `id` as a string; the number of the line where there is none."""
    value = columns.get("id")
    if is_missing(value):
        return str(line)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BrokenLine(f"id is {shown(value)}, expected a string or an integer")
    return as_text("id", str(value))


def _source(columns: Mapping[str, Any]) -> str | None:
    value = columns.get("source")
    return None if is_missing(value) or value == "" else as_text("source", value)


def _score(columns: Mapping[str, Any]) -> float | None:
    value = columns.get("correct")
    if is_missing(value):
        return None
    if not isinstance(value, bool | int | float) or abs(value) > _LARGEST_SCORE:
        raise BrokenLine(f"correct is {shown(value)}, expected a number, true or false")
    return float(value)


def _finished(columns: Mapping[str, Any]) -> bool | None:
    value = columns.get("finished")
    if is_missing(value):
        return None
    if not isinstance(value, bool):
        raise BrokenLine(f"finished is {shown(value)}, expected true or false")
    return value
