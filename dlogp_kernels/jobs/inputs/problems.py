"""Problems from JSONL, checked and turned into token ids.

A line has `prompt_ids` (token ids), `messages` (a conversation that the model is to go on with; with it optionally
`tools` and `chat_template_kwargs`, which the chat template is given, too) or `prompt` (text), the first of these that
has a value, the `answer` (a string or a number), and optionally `id`. Other columns are kept for the grader.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...report.jsonl import MAX_LINE_BYTES
from ..errors import JobError
from .encoding import encode_prompt
from .messages import ChatTemplate, as_conversation
from .models import Reading
from .records import PARQUET_MAGIC, Record, check_file, columns_of, missing_columns, read_jsonl, sample_id
from .values import BrokenLine, as_id_list, as_text, check_range, fullest_form, kind_of, shown

_FORMS = (("prompt_ids",), ("messages",), ("prompt",))


class Problem(NamedTuple):
    """One problem: its number from 0, its id, its prompt as token ids, and the columns of its line."""

    number: int
    problem_id: str
    prompt_ids: list[int]
    columns: Mapping[str, Any]


def read_problems(
    path: Path,
    reading: Reading,
    *,
    max_new_tokens: int,
    needs_answer: bool,
    max_line_bytes: int = MAX_LINE_BYTES,
    option: str = "--data",
) -> list[Problem]:
    """All problems of a file; JobError with the option and the line's number for one that can not be used."""
    problems: list[Problem] = []
    lines: dict[str, list[int]] = {}
    for record in read_jsonl(path, max_line_bytes):
        try:
            problems.append(_problem(len(problems), record, reading, max_new_tokens, needs_answer))
        except BrokenLine as error:
            raise JobError(f"{option}: line {record.line}: {error}") from error
        lines.setdefault(problems[-1].problem_id, []).append(record.line)
    if not problems:
        raise JobError(f"{option} {path}: there is no line in it, expected one problem a line")
    repeated = {name: at for name, at in lines.items() if len(at) > 1}
    if repeated:
        name, (first, second, *_) = next(iter(repeated.items()))
        warnings.warn(
            f"{option}: ids that several problems have: {len(repeated):,}, such as {shown(name)} of lines {first} and "
            f"{second}; in the responses `problem` tells them apart, `id` does not",
            stacklevel=4,
        )
    return problems


def check_problems(option: str, path: Path) -> None:
    """JobError unless `path` is a file that may hold problems."""
    if check_file(option, path) == PARQUET_MAGIC:
        raise JobError(f"{option} {path}: it is a Parquet file, expected JSONL (dlogp metrics takes both)")


def _problem(number: int, record: Record, reading: Reading, max_new_tokens: int, needs_answer: bool) -> Problem:
    columns = columns_of(record)
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
        raise missing_columns(columns, "expected answer")
    answer = columns["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise BrokenLine(f"answer is a {kind_of(answer)}, expected a string or a number")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise BrokenLine(f"answer is {answer}, expected a string or a finite number")


def _prompt_ids(columns: Mapping[str, Any], tokenizer: Any) -> list[int]:
    match fullest_form(columns, _FORMS):
        case (("prompt_ids") as form,):
            return as_id_list(form, columns[form])
        case ("messages",):
            template = ChatTemplate(tokenizer, columns, otherwise="prompt")
            conversation = as_conversation(columns["messages"])
            if conversation and conversation[-1]["role"] != "assistant":
                return template.encode_prompt(conversation)
            shown_conversation = shown(json.dumps(conversation))
            raise BrokenLine(f"messages is {shown_conversation}, expected a conversation that a user ends")
        case (("prompt") as form,):
            return encode_prompt(tokenizer, as_text(form, columns[form]))
    raise missing_columns(columns, "expected prompt, or prompt_ids, or messages")
