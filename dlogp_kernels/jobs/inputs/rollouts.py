"""Responses as other programs write them, by the names that a line of the data has here.

`dlogp generate`, `dlogp sweep`   token ids, who wrote them, scores, and what was replaced; never tokenised again
TRL's logged completions          prompt, completion: text, or messages
verl's dumped rollouts            input, output: text; score
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...report.dataset import SUMMARY_FILE
from ...report.ledger import Ledger, check
from ...report.responses import RESPONSES_FILE, from_columns
from ..errors import JobError
from .values import BrokenLine, as_text, fullest_form, is_missing

#: Columns of others, and ours in the same order.
_, _VERL = FORMS = (("prompt", "completion"), ("input", "output"))
_OURS = ("prompt", "response")
#: Of a file of others, what is read beside them.
BESIDE = ("score",)
_DRAWN = ("criterion", "token_ids")
#: What a directory may hold, the first of it that there is.
_PATTERNS = (RESPONSES_FILE, "completions_*.parquet", "*.jsonl")


def files_of(data: Path) -> list[Path]:
    """The file itself, or the files of a directory in the order of their steps; JobError if it has none.

    DatasetError if it holds drawn responses that are not as the run wrote them.
    """
    # Of a name that can be none, pathlib's raises in Python 3.11.
    if not os.path.isdir(data):
        return [data]
    for pattern in _PATTERNS:
        # Steps are numbers, not all of which have leading zeros.
        found = sorted(data.glob(pattern), key=lambda path: (len(path.name), path.name))
        if found:
            if pattern == RESPONSES_FILE:
                check(Ledger.read(data), found[0], found)
            return found
    raise JobError(f"--data {data}: a directory without any {' or '.join(_PATTERNS)}, expected one that has them")


def is_unfinished(data: Path) -> bool:
    """Whether this is the directory of a run of `dlogp generate` or `sweep` that is not complete."""
    return os.path.isfile(data / RESPONSES_FILE) and not (data / SUMMARY_FILE).exists()


def renamed(columns: Mapping[str, Any], ours: Sequence[tuple[str, ...]]) -> Mapping[str, Any]:
    """The columns of a line by our names, whose forms are `ours`; as they are where these are fuller than others'.

    BrokenLine for a line that is half written.
    """
    if columns.keys() >= set(_DRAWN):
        return _drawn(columns)
    theirs = fullest_form(columns, (*ours, *FORMS))
    if theirs not in FORMS:
        return columns
    values = [columns[name] for name in theirs]
    for name, value in zip(theirs, values, strict=True):
        if is_missing(value):
            raise BrokenLine(f"{name} is null, expected text or messages")
    conversation = isinstance(values[1], list)
    form = {"messages": [*_messages(*values)]} if conversation else dict(zip(_OURS, values, strict=True))
    score = {"correct": columns["score"]} if theirs == _VERL and "score" in columns else {}
    return {name: value for name, value in columns.items() if name not in theirs} | form | score


def _messages(prompt: Any, completion: Sequence[Any]) -> Iterator[Any]:
    yield from prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    yield from completion


def _drawn(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        response = from_columns(columns)
    except ValueError as error:
        raise BrokenLine(str(error)) from error
    if not response.prompt_ids:
        raise BrokenLine("drawn by an earlier version, which did not keep the prompt: draw it again")
    replaced = response.replaced
    draft_texts = [as_text("draft_texts", text) for text in replaced.draft_texts]
    return {
        "id": response.problem_id,
        "source": response.setting.source,
        "prompt_ids": list(response.prompt_ids),
        "response_ids": list(response.token_ids),
        "correct": response.score,
        "finished": response.finished,
        "replaced": replaced._replace(draft_texts=draft_texts),
    }
