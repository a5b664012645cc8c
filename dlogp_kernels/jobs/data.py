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
    return _read_parquet(path) if start == _PARQUET_MAGIC or path.suffix == ".parquet" else read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[Record]:
    """The lines of a JSONL file but blank ones."""
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
        return BrokenLine(f"a JSON {kind_of(columns)}, expected an object")
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
            sample_id(columns, record.line),
            _source(columns),
            np.asarray(prompt_ids, np.int32),
            np.asarray(response_ids, np.int32),
        )

    def _token_ids(self, columns: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        form = next((form for form in _FORMS if columns.keys() >= set(form)), None)
        if form is None:
            names = ", ".join(map(shown, columns)) or "none"
            raise BrokenLine(f"missing columns: it has {names}; {_EXPECTED}")
        if form == ("messages",):
            prompt_ids, response_ids = self._encode_messages(columns["messages"])
        elif form == ("prompt", "response"):
            prompt, response = (as_text(name, columns[name]) for name in form)
            prompt_ids = encode_text(self._tokenizer, prompt, beginning=True)
            response_ids = encode_text(self._tokenizer, response, beginning=False)
        else:
            prompt_ids, response_ids = (as_id_list(name, columns[name]) for name in form)
        for name, ids in zip(("prompt", "response"), (prompt_ids, response_ids), strict=True):
            check_range(name, ids, self._vocabulary)
        return prompt_ids, response_ids

    def _encode_messages(self, messages: Any) -> tuple[list[int], list[int]]:
        """Prompt: the rendering of all messages but the last, as generation starts; response: what follows in full."""
        if not self._tokenizer.chat_template:
            raise BrokenLine("it has messages, but the tokenizer has no chat template: expected prompt and response")
        conversation = _conversation(messages)
        prompt_ids = render_conversation(self._tokenizer, conversation[:-1], add_generation_prompt=True)
        whole = render_conversation(self._tokenizer, conversation, add_generation_prompt=False)
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


def encode_text(tokenizer: Any, text: str, *, beginning: bool) -> list[int]:
    """Token ids; with the special tokens of a beginning, unless the text spells them out itself."""
    special = tokenizer.bos_token
    add_special = beginning and not (special and text.startswith(special))
    return _guarded(lambda: tokenizer.encode(text, add_special_tokens=add_special), "the tokenizer")


def render_conversation(
    tokenizer: Any, conversation: list[dict[str, Any]], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of the messages, by the tokenizer's chat template."""
    return _guarded(
        lambda: tokenizer.apply_chat_template(
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


def as_text(name: str, value: Any) -> str:
    """`value` if it is a string of Unicode; else a BrokenLine with its name."""
    if not isinstance(value, str):
        raise BrokenLine(f"{name} is a {kind_of(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenLine(
            f"{name} has half a surrogate pair at character {error.start + 1}, expected Unicode"
        ) from error
    return value


def as_id_list(name: str, value: Any) -> list[int]:
    """`value` if it is a list of integers; else a BrokenLine with its name."""
    if not isinstance(value, list):
        raise BrokenLine(f"{name} is a {kind_of(value)}, expected a list of integers")
    for position, token_id in enumerate(value):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise BrokenLine(f"{name}[{position}] is {shown(token_id)}, expected an integer")
    return value


def check_range(name: str, ids: list[int], vocabulary: int) -> None:
    """BrokenLine for a token that the models do not have."""
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocabulary:
            raise BrokenLine(
                f"token {position} of the {name} is {shown(token_id)}, outside the vocabulary [0, {vocabulary})"
            )


def _conversation(messages: Any) -> list[dict[str, Any]]:
    check_messages(messages)
    if len(messages) < 2:
        raise BrokenLine(f"messages has {len(messages)} entries, expected a prompt and a response")
    if messages[-1].get("role") != "assistant":
        raise BrokenLine(f"the last message has the role {shown(messages[-1].get('role'))}, expected 'assistant'")
    if not messages[-1].get("content"):
        raise BrokenLine("the response is empty")
    # Parquet gives every message every key.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def check_messages(messages: Any) -> None:
    """BrokenLine unless it is a list of objects whose texts are Unicode."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BrokenLine(f"messages is a {kind_of(messages)}, expected a list of objects with role and content")
    for message in messages:
        for key in ("role", "content"):
            if isinstance(message.get(key), str):
                as_text(f"messages {key}", message[key])


def sample_id(columns: Mapping[str, Any], line: int) -> str:
    """The column `id` as a string; the number of the line where there is none."""
    value = columns.get("id")
    if value is None:
        return str(line)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BrokenLine(f"id is {shown(value)}, expected a string or an integer")
    return as_text("id", str(value))


def _source(columns: Mapping[str, Any]) -> str | None:
    value = columns.get("source")
    return None if value is None else as_text("source", value)


def kind_of(value: Any) -> str:
    """What JSON calls a value of this type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value in a message, cut to a length that a line bears."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
