"""The page: its text and numbers as data, which its scripts draw; what comes from models and files is data alone."""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

import numpy as np

from ..dataset import ResponseRows
from ..text import one_line, printable

#: A longer prompt ends with a remark; as many as there are responses may be in the page.
_MOST_PROMPT_CHARACTERS = 20_000


class Number(NamedTuple):
    """A column of numbers: its name in the data set, how it is called, and what its colours show.

    `scale` is "signed" where both signs mean something, "zero" where values begin there, "range" where they lie
    anywhere. `of_both` is the name that the columns of the two models share.
    """

    name: str
    label: str
    scale: str
    of_both: str | None = None


def _both(name: str, label: str, scale: str = "zero") -> tuple[Number, Number]:
    return Number(name, f"{label}, RL", scale, label), Number(f"base_{name}", f"{label}, base", scale, label)


NUMBERS = (
    Number("delta_logp", "Δlog p", "signed"),
    Number("kl", "KL(RL ‖ base)", "zero"),
    Number("reverse_kl", "KL(base ‖ RL)", "zero"),
    *_both("logp", "log p"),
    *_both("entropy", "entropy"),
    *_both("lse", "log Σ exp z", "range"),
    *_both("top_logp", "largest log p"),
)
#: All that there is of responses whose tokens were not measured, of their replaced tokens.
OF_DRAFTS = (Number("delta_logp", "Δlog p of the draft", "signed"),)
_TOP_TOKENS = ("top_token", "base_top_token")


class _Vocabulary:
    """The different tokens of a page, each an id and its text, by their places."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, str | None], int] = {}

    def __call__(self, ids: Iterable[int], texts: Iterable[str | None]) -> list[int]:
        """The place of each token."""
        places = self._places
        return [places.setdefault(token, len(places)) for token in zip(ids, texts, strict=True)]

    def to_json(self) -> dict[str, Any]:
        return {
            "id": [token_id for token_id, _ in self._places],
            "text": [text and _with_tabs(text) for _, text in self._places],
        }


def _with_tabs(text: str) -> str:
    """Printable text; the page shows ends of lines and tabs as what they are."""
    return "\t".join(map(printable, text.split("\t")))


def unknown_tokens(responses: Sequence[ResponseRows]) -> np.ndarray:
    """Ids of most likely tokens that no response has, whose text its rows do not tell."""
    likely = [response.statistics[name] for response in responses for name in _TOP_TOKENS & response.statistics.keys()]
    found = np.unique(np.concatenate([np.zeros(0, np.int64), *likely]))
    known = np.unique(np.concatenate([np.zeros(0, np.int64), *(response.token_ids for response in responses)]))
    return np.setdiff1d(found[found >= 0], known).astype(np.int64)


def render(
    responses: Sequence[ResponseRows],
    *,
    title: str,
    subtitle: str,
    remarks: Sequence[str] = (),
    numbers: Sequence[Number] = NUMBERS,
    texts: Mapping[int, str] | None = None,
) -> str:
    """The page as HTML.

    Args:
        responses: with their statistics, whose names are those of `numbers`; those that no response has are left out,
            and NaN stands where OF_DRAFTS has no number.
        title, subtitle, remarks: what the page is of, and what there is to know about it.
        numbers: what tokens can be coloured by.
        texts: of `unknown_tokens`, by id; one that is missing is shown as its id.
    """
    there = {name for response in responses for name in response.statistics}
    columns = [number for number in numbers if number.name in there]
    vocabulary = _Vocabulary()
    arrays = {
        "token": _joined([vocabulary(row.token_ids.tolist(), row.token_texts) for row in responses], np.uint32),
        **{number.name: _joined([row.statistics[number.name] for row in responses], np.float32) for number in columns},
    }
    if any(len(row.replaced.positions) for row in responses):
        arrays["draft"] = _joined([_drafts(row, vocabulary) for row in responses], np.int32)
    known = {int(i): text for row in responses for i, text in zip(row.token_ids, row.token_texts, strict=True)}
    known |= texts or {}
    for name in _TOP_TOKENS:
        if name in there:
            ids = _joined([row.statistics[name] for row in responses], np.int64)
            places = np.array(vocabulary(ids.tolist(), map(known.get, ids.tolist())), np.int32)
            arrays[name] = np.where(ids < 0, -1, places).astype(np.int32)
    data = {
        "columns": [number._asdict() for number in columns],
        "replaced_only": numbers is OF_DRAFTS,
        "vocabulary": vocabulary.to_json(),
        **_responses(responses),
    }
    return _fill(data, arrays, title, subtitle, remarks)


def _joined(parts: Sequence[Any], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *(np.asarray(part, kind) for part in parts)])


def _drafts(row: ResponseRows, vocabulary: _Vocabulary) -> np.ndarray:
    """The place of what was drafted, −1 where nothing was replaced."""
    places = np.full(len(row.token_ids), -1)
    places[list(row.replaced.positions)] = vocabulary(row.replaced.draft_ids, row.replaced.draft_texts)
    return places


def _responses(rows: Sequence[ResponseRows]) -> dict[str, Any]:
    """What there is of whole responses, and the prompts and sources that they share."""
    prompts, groups = _numbered(row.prompt for row in rows), _numbered(map(prompt_key, rows))
    sources = _numbered((row.source for row in rows), none=True)
    columns = {
        "id": [one_line(row.sample_id) for row in rows],
        "prompt": [None if row.prompt is None else prompts[row.prompt] for row in rows],
        "group": [groups[prompt_key(row)] for row in rows],
        "source": [sources[row.source] for row in rows],
        "length": [len(row.token_ids) for row in rows],
        "correct": [_finite(row.correct) for row in rows],
        "finished": [row.finished for row in rows],
    }
    names = [None if source is None else one_line(source) for source in sources]
    return {"responses": columns, "prompts": list(map(_shortened, prompts)), "sources": names, "groups": len(groups)}


def prompt_key(row: ResponseRows) -> Any:
    """Responses with the same one answer the same prompt."""
    if row.prompt_ids is not None and len(row.prompt_ids):
        return tuple(row.prompt_ids)
    return row.sample_id if row.prompt is None else row.prompt


def _numbered(values: Iterable[Any], *, none: bool = False) -> dict[Any, int]:
    """The different values by their first appearance."""
    return {value: place for place, value in enumerate(dict.fromkeys(x for x in values if none or x is not None))}


def _shortened(prompt: str) -> str:
    beyond = len(prompt) - _MOST_PROMPT_CHARACTERS
    if beyond <= 0:
        return _with_tabs(prompt)
    return f"{_with_tabs(prompt[:_MOST_PROMPT_CHARACTERS])}\n… and {beyond:,} characters more"


def _finite(score: float | None) -> float | None:
    """Seven digits of a score; JSON has no NaN, which is no grade."""
    return float(f"{score:.7g}") if score is not None and math.isfinite(score) else None


def _fill(
    data: Mapping[str, Any], arrays: Mapping[str, np.ndarray], title: str, subtitle: str, remarks: Sequence[str]
) -> str:
    folder = files(__package__)
    template, style, *scripts = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "data.js", "list.js", "page.js")
    )
    script = "\n".join(scripts)
    columns = (
        f'<script type="text/plain" id="column-{name}">{base64.b64encode(array.tobytes()).decode()}</script>'
        for name, array in arrays.items()
    )
    # ASCII, and no sign of a tag: nothing in it ends the element or begins a comment.
    encoded = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    shown = [f'<p class="remark">{html.escape(printable(remark))}</p>' for remark in remarks]
    # Nothing but this script and this style; nothing from anywhere.
    policy = f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; base-uri 'none'"
    return Template(template).substitute(
        policy=f"{policy}; form-action 'none'",
        title=html.escape(one_line(title)),
        subtitle=html.escape(one_line(subtitle)),
        style=style,
        remarks="\n  ".join(shown),
        columns="\n".join(columns),
        page=encoded,
        script=script,
    )


def _source(text: str) -> str:
    """How a policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
