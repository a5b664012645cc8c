"""Prompts and responses from JSONL or Parquet, checked and turned into token ids.

A line has one of three forms, the first that it has all columns of:

    prompt_ids, response_ids   token ids, as the models read and wrote them
    messages                   a conversation; the last message is the response, by the assistant
    prompt, response           text; each is tokenized by itself, and nothing is appended to the response

and optionally `id` (a string or an integer) and `source` (a string: who wrote the response). Other columns are ignored,
and so are blank lines.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2.exceptions import TemplateError

from .errors import JobError

_FORMS = (("prompt_ids", "response_ids"), ("messages",), ("prompt", "response"))
_EXPECTED = "expected prompt and response, or messages, or prompt_ids and response_ids"
_PARQUET_MAGIC = b"PAR1"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN = 60


class BrokenLine(ValueError):
    """A line of the data that can not be used; the message says why."""


class Sample(NamedTuple):
    """One prompt and one response to it, as token ids (int32)."""

    line: int
    sample_id: str
    source: str | None
    prompt_ids: np.ndarray
    response_ids: np.ndarray


class Record(NamedTuple):
    """A line as it was read: its number, from 1, and its columns, or why it has none."""

    line: int
    columns: Mapping[str, Any] | BrokenLine


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a JSONL file, or the rows of a Parquet file, one at a time.

    Raises JobError if the file is missing, empty, or a Parquet file without the columns of any form.
    """
    if not path.is_file():
        raise JobError(f"--data {path}: there is no such file")
    with open(path, "rb") as file:
        start = file.read(len(_PARQUET_MAGIC))
    if not start:
        raise JobError(f"--data {path}: the file is empty, expected one response a line")
    return _read_parquet(path) if start == _PARQUET_MAGIC or path.suffix == ".parquet" else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield Record(number, _parse_json(line))


def _parse_json(line: bytes) -> Mapping[str, Any] | BrokenLine:
    try:
        columns = json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        return BrokenLine(f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return BrokenLine(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BrokenLine(f"not JSON that can be read: {error}")
    if not isinstance(columns, dict):
        return BrokenLine(f"a JSON {_kind(columns)}, expected an object")
    return columns


def _read_parquet(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            if not any(names.issuperset(form) for form in _FORMS):
                raise JobError(f"--data {path}: it has the columns {', '.join(sorted(names))}; {_EXPECTED}")
            wanted = [name for name in ("id", "source", *(name for form in _FORMS for name in form)) if name in names]
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, {name: value for name, value in row.items() if value is not None})
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"--data {path}: not a readable Parquet file (after row {number}): {error}") from error


class Encoder:
    """Turns the columns of a line into a `Sample`.

    Args:
        tokenizer: of both models.
        vocabulary: token ids of the data must be below it.
        context: prompt and response together must not be longer.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, context: int | None) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._context = context

    def __call__(self, record: Record) -> Sample:
        """The sample of a line; BrokenLine if it has none."""
        if isinstance(record.columns, BrokenLine):
            raise record.columns
        columns = record.columns
        prompt_ids, response_ids = self._token_ids(columns)
        if not response_ids:
            raise BrokenLine("the response is empty")
        if not prompt_ids:
            raise BrokenLine("the prompt has no tokens: nothing precedes the first token of the response")
        length = len(prompt_ids) + len(response_ids)
        if self._context is not None and length > self._context:
            raise BrokenLine(
                f"prompt ({len(prompt_ids)} tokens) and response ({len(response_ids)}) are longer than the context "
                f"of the models, {self._context} tokens"
            )
        return Sample(
            record.line,
            _sample_id(columns, record.line),
            _source(columns),
            np.asarray(prompt_ids, np.int32),
            np.asarray(response_ids, np.int32),
        )

    def _token_ids(self, columns: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        form = next((form for form in _FORMS if columns.keys() >= set(form)), None)
        if form is None:
            names = ", ".join(map(_shown, columns)) or "none"
            raise BrokenLine(f"missing columns: it has {names}; {_EXPECTED}")
        if form == ("messages",):
            prompt_ids, response_ids = self._encode_messages(columns["messages"])
        elif form == ("prompt", "response"):
            prompt, response = (_text(name, columns[name]) for name in form)
            prompt_ids, response_ids = self._encode(prompt, beginning=True), self._encode(response, beginning=False)
        else:
            prompt_ids, response_ids = (_id_list(name, columns[name]) for name in form)
        for name, ids in zip(("prompt", "response"), (prompt_ids, response_ids), strict=True):
            _check_range(name, ids, self._vocabulary)
        return prompt_ids, response_ids

    def _encode(self, text: str, *, beginning: bool) -> list[int]:
        """Token ids; with the special tokens of a beginning, unless the text spells them out itself."""
        special = self._tokenizer.bos_token
        add_special = beginning and not (special and text.startswith(special))
        return _guarded(lambda: self._tokenizer.encode(text, add_special_tokens=add_special), "the tokenizer")

    def _encode_messages(self, messages: Any) -> tuple[list[int], list[int]]:
        """Prompt: the rendering of all messages but the last, as generation starts; response: what follows in full."""
        if not self._tokenizer.chat_template:
            raise BrokenLine("it has messages, but the tokenizer has no chat template: expected prompt and response")
        conversation = _conversation(messages)
        prompt_ids = self._render(conversation[:-1], add_generation_prompt=True)
        whole = self._render(conversation, add_generation_prompt=False)
        if whole[: len(prompt_ids)] != prompt_ids:
            raise BrokenLine(
                "the chat template does not render the response as a continuation of its prompt: give prompt_ids and "
                "response_ids instead"
            )
        response_ids = whole[len(prompt_ids) :]
        if self._tokenizer.eos_token_id in response_ids:
            # A template may go on after the end of the turn, where no model has written.
            last = len(response_ids) - response_ids[::-1].index(self._tokenizer.eos_token_id)
            response_ids = response_ids[:last]
        return prompt_ids, response_ids

    def _render(self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        return _guarded(
            lambda: self._tokenizer.apply_chat_template(
                conversation, tokenize=True, return_dict=False, add_generation_prompt=add_generation_prompt
            ),
            "the chat template",
        )


def _guarded(encode: Callable[[], Any], what: str) -> list[int]:
    """The result of `encode`, or a BrokenLine that says why `what` refused the line."""
    try:
        return list(encode())
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise BrokenLine(f"{what} refuses it: {error}") from error
    except Exception as error:
        # The tokenizers library raises the bare class for a word that is not in a vocabulary without an unknown token.
        if type(error) is not Exception:
            raise
        raise BrokenLine(f"{what} refuses it: {error}") from error


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BrokenLine(f"{name} is a {_kind(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenLine(
            f"{name} has half a surrogate pair at character {error.start + 1}, expected Unicode"
        ) from error
    return value


def _id_list(name: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise BrokenLine(f"{name} is a {_kind(value)}, expected a list of integers")
    for position, token_id in enumerate(value):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise BrokenLine(f"{name}[{position}] is {_shown(token_id)}, expected an integer")
    return value


def _check_range(name: str, ids: list[int], vocabulary: int) -> None:
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocabulary:
            raise BrokenLine(
                f"token {position} of the {name} is {_shown(token_id)}, outside the vocabulary [0, {vocabulary})"
            )


def _conversation(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BrokenLine(f"messages is a {_kind(messages)}, expected a list of objects with role and content")
    if len(messages) < 2:
        raise BrokenLine(f"messages has {len(messages)} entries, expected a prompt and a response")
    if messages[-1].get("role") != "assistant":
        raise BrokenLine(f"the last message has the role {_shown(messages[-1].get('role'))}, expected 'assistant'")
    for message in messages:
        for key in ("role", "content"):
            if isinstance(message.get(key), str):
                _text(f"messages {key}", message[key])
    if not messages[-1].get("content"):
        raise BrokenLine("the response is empty")
    # Parquet gives every message every key.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _sample_id(columns: Mapping[str, Any], line: int) -> str:
    value = columns.get("id")
    if value is None:
        return str(line)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BrokenLine(f"id is {_shown(value)}, expected a string or an integer")
    return _text("id", str(value))


def _source(columns: Mapping[str, Any]) -> str | None:
    value = columns.get("source")
    return None if value is None else _text("source", value)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
