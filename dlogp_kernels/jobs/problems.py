"""Problems from JSONL, checked and turned into token ids.

A line has `prompt` (text), `prompt_ids` (token ids) or `messages` (a conversation that the model is to go on with), the
`answer` (a string or a number), and optionally `id`. Other columns are kept for the grader.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .data import (
    BrokenLine,
    Record,
    as_id_list,
    as_text,
    check_messages,
    check_range,
    encode_text,
    kind_of,
    read_jsonl,
    render_conversation,
    sample_id,
    shown,
)
from .errors import JobError
from .models import Reading

_FORMS = ("prompt_ids", "messages", "prompt")


class Problem(NamedTuple):
    """One problem: its number from 0, its id, its prompt as token ids, and the columns of its line."""

    number: int
    problem_id: str
    prompt_ids: list[int]
    columns: Mapping[str, Any]


def read_problems(path: Path, reading: Reading, *, max_new_tokens: int, needs_answer: bool) -> list[Problem]:
    """All problems of a file; JobError with the line's number for one that can not be used."""
    problems: list[Problem] = []
    for record in read_jsonl(path):
        try:
            problems.append(_problem(len(problems), record, reading, max_new_tokens, needs_answer))
        except BrokenLine as error:
            raise JobError(f"--data: line {record.line}: {error}") from error
    if not problems:
        raise JobError(f"--data {path}: there is no line in it, expected one problem a line")
    return problems


def check_file(path: Path) -> None:
    """JobError unless `path` is a file."""
    if not path.is_file():
        raise JobError(f"--data {path}: there is no such file")


def _problem(number: int, record: Record, reading: Reading, max_new_tokens: int, needs_answer: bool) -> Problem:
    if isinstance(record.columns, BrokenLine):
        raise record.columns
    columns = record.columns
    if needs_answer:
        _check_answer(columns)
    ids = _prompt_ids(columns, reading.tokenizer)
    if not ids:
        raise BrokenLine("the prompt has no tokens")
    check_range("prompt", ids, reading.vocabulary)
    if reading.context is not None and len(ids) + max_new_tokens > reading.context:
        raise BrokenLine(
            f"the prompt has {len(ids)} tokens and --max-new-tokens is {max_new_tokens}: together more than the "
            f"context of the models, {reading.context} tokens"
        )
    return Problem(number, sample_id(columns, record.line), ids, columns)


def _check_answer(columns: Mapping[str, Any]) -> None:
    if "answer" not in columns:
        names = ", ".join(map(shown, columns)) or "none"
        raise BrokenLine(f"missing columns: it has {names}; expected answer")
    answer = columns["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise BrokenLine(f"answer is a {kind_of(answer)}, expected a string or a number")


def _prompt_ids(columns: Mapping[str, Any], tokenizer: Any) -> list[int]:
    form = next((form for form in _FORMS if form in columns), None)
    match form:
        case "prompt_ids":
            return as_id_list(form, columns[form])
        case "messages":
            return _render(columns[form], tokenizer)
        case "prompt":
            return encode_text(tokenizer, as_text(form, columns[form]), beginning=True)
    names = ", ".join(map(shown, columns)) or "none"
    raise BrokenLine(f"missing columns: it has {names}; expected prompt, or prompt_ids, or messages")


def _render(messages: Any, tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise BrokenLine("it has messages, but the tokenizer has no chat template: expected prompt")
    check_messages(messages)
    if not messages or messages[-1].get("role") == "assistant":
        raise BrokenLine(f"messages is {shown(json.dumps(messages))}, expected a conversation that a user ends")
    return render_conversation(tokenizer, messages, add_generation_prompt=True)
