"""The responses of `dlogp generate` and `dlogp sweep`: one JSON object a line, and what they say about each setting.

DIR/responses.jsonl   one response a line, as `to_line` writes it; whole lines only, but for the last of a killed run
DIR/summary.json      the results of each setting and what the run was; it appears when the run is complete
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .dataset import Replaced
from .errors import DatasetError
from .jsonl import MAX_WRITTEN_LINE_BYTES, written_lines
from .ledger import Ledger, check

RESPONSES_FILE = "responses.jsonl"
#: So many of what took a token's place are told.
_REPLACEMENTS = 4

_SHOWN_CRITERIA = {
    "delta_logp": "Δlog p <",
    "kl": "KL(RL ‖ base) >",
    "reverse_kl": "KL(base ‖ RL) >",
    "avg_kl": "mean KL >",
    "entropy": "entropy of base >",
    "rl_entropy": "entropy of RL >",
    "random": "u <",
}

#: The columns of a line in their order, and what they are, or what the entries of those that are lists are (integers:
#: ids or places); the length is that of the token ids, and is not read.
_KINDS: dict[str, Any] = {
    "id": str, "problem": int, "sample": int, "criterion": str, "threshold": int | float | None, "gamma": int | float,
    "draft": str, "seed": int, "correct": int | float | None, "error": str | None, "length": None, "finished": bool,
    "text": str, "prompt_ids": [int], "token_ids": [int], "selected": [int], "delta_logp": [int | float | str],
    "draft_ids": [int], "draft_texts": [str], "new_texts": [str],
}  # fmt: skip
_OF_REPLACED = ("selected", "delta_logp", "draft_ids", "draft_texts", "new_texts")
#: Fields of a response that a line calls otherwise.
_COLUMN_OF = {"problem_id": "id", "score": "correct"}
#: What earlier versions did not write, and what it is there.
_LATER: dict[str, Any] = {"prompt_ids": []}


class Setting(NamedTuple):
    """When a drafted token is replaced, and from what; the arguments of `extrapolated_sample` of the same names."""

    criterion: str = "all"
    threshold: float | None = None
    gamma: float = 0.0
    draft: str = "base"

    def __str__(self) -> str:
        rule = {"all": "everywhere", "none": "nowhere"}.get(self.criterion, self.criterion)
        if self.threshold is not None:
            rule = f"{_SHOWN_CRITERIA.get(self.criterion, self.criterion)} {self.threshold:.4g}"
        gamma = f", γ = {self.gamma:g}" if self.gamma else ""
        return rule + gamma + (", drafts of RL" if self.draft == "rl" else "")

    @property
    def source(self) -> str:
        """Who wrote a response: one of the models alone, "rl" or "base", or both of them, under this setting."""
        if self.criterion == "none":
            return self.draft
        return "rl" if self.criterion == "all" and self.gamma == 0 else str(self)


#: Every token from the base model, or every token from the RL model.
BASE, RL = Setting("none"), Setting("all")


class Response(NamedTuple):
    """One response, and the prompt that it answers, of which earlier versions wrote no tokens.

    The last five are of the replaced tokens: place, Δlog p, id and text of the draft, text of what took its place.
    """

    problem_id: str
    problem: int
    sample: int
    setting: Setting
    seed: int
    text: str
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    finished: bool
    score: float | None
    error: str | None
    selected: Sequence[int]
    delta_logp: Sequence[float]
    draft_ids: Sequence[int]
    draft_texts: Sequence[str]
    new_texts: Sequence[str]

    @property
    def replaced(self) -> Replaced:
        """The chosen tokens; none where all were drawn anew, and no draft counted."""
        if self.setting.criterion == "all":
            return Replaced()
        return Replaced(self.selected, self.draft_ids, self.draft_texts)


def to_line(response: Response) -> bytes:
    """The response as one line of JSON, its end included; the same response gives the same bytes."""
    values = {_COLUMN_OF.get(name, name): value for name, value in response._asdict().items()}
    values |= response.setting._asdict() | {"length": len(response.token_ids)}
    values["delta_logp"] = map(_to_json, response.delta_logp)
    columns = {name: list(values[name]) if isinstance(kind, list) else values[name] for name, kind in _KINDS.items()}
    # ASCII: half of a surrogate pair in a text has no UTF-8, and a line separator in it is not the end of a line.
    return (json.dumps(columns, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def from_line(line: bytes) -> Response:
    """The response that `to_line` wrote; ValueError if it is none."""
    try:
        return from_columns(json.loads(line))
    except RecursionError as error:
        raise ValueError(f"not a response as this version writes it: {error!r}") from error


def from_columns(given: Any) -> Response:
    """The response of what a line holds; ValueError if it is none."""
    try:
        columns = _LATER | given
        _check_kinds(columns)
        columns["delta_logp"] = list(map(float, columns["delta_logp"]))
        columns["setting"] = Setting(*(columns[name] for name in Setting._fields))
        return Response(*(columns[_COLUMN_OF.get(name, name)] for name in Response._fields))
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a response as this version writes it: {error!r}") from error


def _check_kinds(columns: Mapping[str, Any]) -> None:
    """TypeError for a value that `to_line` does not write; the file may come from anywhere."""
    for name, kind in _KINDS.items():
        if kind is None:
            continue
        value = columns[name]
        if isinstance(kind, list):
            good = _is_list_of(kind[0], value)
        else:
            good = isinstance(value, kind) and not (isinstance(value, int | float) and not math.isfinite(value))
        if not good:
            raise TypeError(f"{name} is {value!r:.60}")
    if len({len(columns[name]) for name in _OF_REPLACED}) > 1:
        raise TypeError(f"{', '.join(_OF_REPLACED)} have different lengths")
    places = columns["selected"]
    if places != sorted(set(places)) or (places and places[-1] >= len(columns["token_ids"])):
        raise TypeError(f"selected is {places!r:.60}, expected ascending places among the token_ids")


def _is_list_of(kind: Any, value: Any) -> bool:
    """Whether it is a list with such entries; integers are of int32, which the data set has, and not below 0."""
    if not isinstance(value, list) or kind is not int:
        return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)
    return set(map(type, value)) <= {int} and all(0 <= entry < 2**31 for entry in value)


def _to_json(value: float) -> float | str:
    """Seven digits, which is what float32 has; JSON has no infinities."""
    return float(f"{value:.7g}") if math.isfinite(value) else str(value)


class Estimate(NamedTuple):
    """A mean and its standard error over problems; None where one problem is all there is."""

    mean: float
    standard_error: float | None

    def __str__(self) -> str:
        return self.text()

    def text(self, sign: str = "", factor: int = 1, digits: int = 3) -> str:
        """Both times `factor`; the sign "+" shows that of a mean above 0."""
        error = "" if self.standard_error is None else f" ± {factor * self.standard_error:.{digits}f}"
        return f"{factor * self.mean:{sign}.{digits}f}{error}"


def estimate(sums: np.ndarray, counts: np.ndarray) -> Estimate | None:
    """Σ sums / Σ counts, entries of which belong to one problem each; None without counts.

    The standard error is that of a ratio over problems drawn at random: responses to one problem are alike.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    total = counts.sum()
    if total == 0:
        return None
    mean = float(sums.sum() / total)
    num_problems = len(counts)
    if num_problems < 2:
        return Estimate(mean, None)
    residuals = sums - mean * counts
    return Estimate(mean, float(np.sqrt(num_problems / (num_problems - 1) * (residuals**2).sum()) / total))


class ReplacedToken(NamedTuple):
    """A token that was drafted and replaced, under one criterion, and by what most often: text and count.

    `share` is of all tokens that the criterion replaced.
    """

    criterion: str
    token_id: int
    text: str
    occurrences: int
    share: float
    delta_logp: float
    replacements: list[tuple[str, int]]


class SettingResult(NamedTuple):
    """What the responses of one setting came to.

    `accuracy` is over the responses that the grader graded (None if none), `replaced_share` over all response tokens,
    `scores` has the mean score of each problem by its number.
    """

    setting: Setting
    seeds: list[int]
    problems: int
    responses: int
    graded: int
    grader_errors: int
    accuracy: Estimate | None
    replaced_share: Estimate | None
    tokens: int
    mean_length: float
    finished_share: float
    scores: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values; without the scores of single problems."""
        columns = self._asdict()
        del columns["scores"], columns["setting"]
        for name in ("accuracy", "replaced_share"):
            value = columns.pop(name)
            columns[name] = None if value is None else value.mean
            columns[f"{name}_standard_error"] = None if value is None else value.standard_error
        return {**self.setting._asdict(), **columns}


@dataclass
class _ReplacedTally:
    """Sums over the places where one token was replaced."""

    text: str
    delta_logp: float = 0.0
    replacements: Counter[str] = field(default_factory=Counter)


class Collector:
    """Takes responses one by one and keeps sums; `results` and `replaced_tokens` can be asked at any time."""

    def __init__(self) -> None:
        self._sums: dict[Setting, dict[int, Counter[str]]] = {}
        self._seeds: dict[Setting, set[int]] = {}
        #: By criterion and token.
        self._replaced: dict[str, dict[int, _ReplacedTally]] = {}

    def add(self, response: Response) -> None:
        """Count one response."""
        by_problem = self._sums.setdefault(response.setting, {})
        by_problem.setdefault(response.problem, Counter()).update(  # type: ignore[call-overload]
            responses=1,
            finished=response.finished,
            tokens=len(response.token_ids),
            replaced=len(response.selected),
            grader_errors=response.error is not None,
            graded=response.score is not None,
            score=response.score or 0.0,
        )
        self._seeds.setdefault(response.setting, set()).add(response.seed)
        rows = zip(response.draft_ids, response.draft_texts, response.new_texts, response.delta_logp, strict=True)
        for token_id, text, new_text, delta_logp in rows:
            tallies = self._replaced.setdefault(response.setting.criterion, {})
            tally = tallies.get(token_id) or tallies.setdefault(token_id, _ReplacedTally(text))
            tally.delta_logp += delta_logp
            tally.replacements[new_text] += 1

    def results(self) -> list[SettingResult]:
        """One entry a setting, in the order in which they came."""
        return [self.result(setting) for setting in self._sums]

    def result(self, setting: Setting) -> SettingResult:
        """What the responses of `setting` came to so far."""
        by_problem = self._sums[setting]
        # By the name of the sum, its value for each problem.
        sums = {name: np.array([of[name] for of in by_problem.values()]) for name in next(iter(by_problem.values()))}
        totals = {name: values.sum().item() for name, values in sums.items()}
        return SettingResult(
            setting,
            sorted(self._seeds[setting]),
            len(by_problem),
            totals["responses"],
            totals["graded"],
            totals["grader_errors"],
            estimate(sums["score"], sums["graded"]),
            estimate(sums["replaced"], sums["tokens"]),
            totals["tokens"],
            totals["tokens"] / totals["responses"],
            totals["finished"] / totals["responses"],
            {problem: of["score"] / of["graded"] for problem, of in by_problem.items() if of["graded"]},
        )

    def replaced_tokens(self, *, limit: int, min_count: int = 1) -> list[ReplacedToken]:
        """For each criterion but `all`, the `limit` tokens replaced most often, over all its settings; ties by id."""
        found: list[ReplacedToken] = []
        for criterion, tallies in self._replaced.items():
            if criterion == "all":
                continue
            counts = {token_id: tally.replacements.total() for token_id, tally in tallies.items()}
            total = sum(counts.values())
            often = [(-count, token_id) for token_id, count in counts.items() if count >= min_count]
            for _, token_id in sorted(often)[:limit]:
                tally, count = tallies[token_id], counts[token_id]
                new = sorted(tally.replacements.items(), key=lambda item: (-item[1], item[0]))[:_REPLACEMENTS]
                share, delta_logp = count / total, tally.delta_logp / count
                found.append(ReplacedToken(criterion, token_id, tally.text, count, share, delta_logp, new))
        return found


def read_responses(directory: str | Path) -> Iterator[Response]:
    """The responses in a directory, in their order; a last line that is only half there is left out.

    Raises DatasetError where there are none, or where a line is not one, or not what the run wrote.
    """
    path = Path(directory) / RESPONSES_FILE
    if not path.is_file():
        raise DatasetError(f"{directory} holds no {RESPONSES_FILE}, as `dlogp generate` and `dlogp sweep` write it")
    check(Ledger.read(Path(directory)), path, [path])
    for number, line in written_lines(path, MAX_WRITTEN_LINE_BYTES):
        try:
            yield from_line(line)
        except ValueError as error:
            raise DatasetError(f"{path}: line {number}: {error}") from error


def collect(responses: Iterable[Response]) -> Collector:
    """All of them counted."""
    collector = Collector()
    for response in responses:
        collector.add(response)
    return collector
