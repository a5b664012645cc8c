"""The tokens that RL changed, ranked from both ends, in their contexts: of all responses and of parts of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .dataset import TokenDataset
from .errors import DatasetError
from .sources import responses_of, shown_sources
from .tables import csv_table, table_lines
from .text import counted, csv_cell, escape_markdown, one_line, percent, quoted, visible

#: Rows of a table of all responses, and of one of a part of them.
TOP_TOKENS, TOP_OF_PART = 50, 10
DEFAULT_MIN_COUNT = 10
#: A token with this share of Σ|Δlog p| is ranked by its mean however rarely it occurs.
_LARGE_SHARE = 0.01
_CONTEXTS = 3
#: Places may read alike: of so many, those that differ are shown.
_PLACES = 3 * _CONTEXTS
#: Tokens of a context on either side.
_NEIGHBOURS = 5

RAISED, LOWERED, EITHER = "raised", "lowered", "either"
#: Titles of rankings by their order and end, and what they rank by.
_RANKINGS = {
    ("sum", RAISED): ("Raised, by Σ Δlog p", "delta_logp"),
    ("sum", LOWERED): ("Lowered, by Σ Δlog p", "delta_logp"),
    ("mean", RAISED): ("Raised, by mean Δlog p", "mean"),
    ("mean", LOWERED): ("Lowered, by mean Δlog p", "mean"),
    ("share", EITHER): ("By share of Σ|Δlog p|", "share"),
}


class Selection(NamedTuple):
    """Some responses: of every source or of one (None: of those without), and the right, the wrong or both."""

    every_source: bool = True
    source: str | None = None
    right: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "right ", False: "wrong ", None: "all " if self.every_source else ""}[self.right]
        if self.every_source:
            return f"{verdict}responses"
        return verdict + (responses_of(self.source) if self.source is not None else "responses without a source")

    def mask(self, source: pa.Array, right: pa.Array) -> pa.Array:
        """Where rows with these columns belong to it."""
        of_source = pa.scalar(True) if self.every_source else pc.is_in(source, pa.array([self.source], pa.string()))
        of_right = pc.is_in(right, pa.array([True, False, None] if self.right is None else [self.right], pa.bool_()))
        return pc.and_(of_source, of_right)


class TokenChange(NamedTuple):
    """A token in some responses: sum and mean of its Δlog p, share of Σ|Δlog p|, means of log p, contexts."""

    token_id: int
    text: str
    occurrences: int
    total: float
    delta_logp: float
    share: float
    logp: float
    base_logp: float
    contexts: tuple[str, ...] = ()


class Part(NamedTuple):
    """Some responses: their tokens, of how many Δlog p is not NaN, its sum, Σ|Δlog p|, and the tokens at either end.

    `rankings` are by order ("sum", "mean" or "share") and end ("raised", "lowered" or "either"), largest change first.
    """

    selection: Selection
    num_tokens: int
    defined: int
    total: float
    size: float
    rankings: dict[tuple[str, str], list[TokenChange]]


class Words(NamedTuple):
    """All responses first, then parts of them; a remark if some sources are left out."""

    parts: list[Part]
    remark: str
    min_count: int


def changed_tokens(
    dataset: TokenDataset,
    *,
    min_count: int = DEFAULT_MIN_COUNT,
    limit: int = TOP_TOKENS,
    limit_of_part: int = TOP_OF_PART,
) -> Words:
    """Rank tokens by Σ Δlog p, by its mean and by their share of Σ|Δlog p|, from both ends, with contexts.

    Args:
        dataset: read three times, a batch at a time.
        min_count: a token that occurs less often is not ranked by its mean, which says little, unless it has a
            hundredth of Σ|Δlog p|.
        limit: tokens of a ranking over all responses.
        limit_of_part: those of one over the right or wrong responses, or the ones of a source.

    Raises:
        DatasetError: `min_count` is less than 1.
    """
    if min_count < 1:
        raise DatasetError(f"min_count is {min_count}, expected at least 1")
    sums = dataset.sums_by_token
    selections, remark = _selections(dataset, sums)
    parts = [
        _part(sums, selection, min_count, limit_of_part if number else limit)
        for number, selection in enumerate(selections)
    ]
    # Where no token has a space in it, the tokenizer drops those between words.
    separator = "" if pc.any(pc.match_substring_regex(sums["text"], r"\s")).as_py() else " "
    return Words(_with_contexts(dataset, parts, separator), remark, min_count)


def _selections(dataset: TokenDataset, sums: pa.Table) -> tuple[list[Selection], str]:
    """Those that hold responses; a single source is all of them."""
    sources, remark = shown_sources(dataset)
    verdicts = (None, True, False) if pc.any(pc.is_valid(sums["right"])).as_py() else (None,)
    chosen = [Selection(right=right) for right in verdicts]
    if len(sources) > 1:
        chosen += [Selection(False, source, right) for source in sources for right in verdicts]
    return [x for x in chosen if x == chosen[0] or pc.any(x.mask(sums["source"], sums["right"])).as_py()], remark


def _part(sums: pa.Table, selection: Selection, min_count: int, limit: int) -> Part:
    chosen = sums.filter(selection.mask(sums["source"], sums["right"]))
    names = ["count", "defined", "delta_logp", "size", "logp", "base_logp"]
    by_token = chosen.group_by("token_id", use_threads=False)
    table = by_token.aggregate([("text", "first"), *((name, "sum") for name in names)])
    table = table.rename_columns(["token_id", "text", *names])
    columns = {name: table[name].to_numpy().astype(np.float64) for name in names}
    size = np.nansum(columns["size"])
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["mean"] = columns["delta_logp"] / columns["defined"]
        columns["share"] = np.nan_to_num(columns["size"] / size)
        means = [columns[name] / columns["count"] for name in ("logp", "base_logp")]
        # A token that is NaN everywhere has no sum; where there are both infinities, there is none of all.
        total = float(columns["delta_logp"][columns["defined"] > 0].sum())
    often = (columns["count"] >= min_count) | (columns["share"] >= _LARGE_SHARE)
    ids, texts = table["token_id"].to_numpy(), table["text"]
    shown = np.stack([columns[name] for name in ("delta_logp", "mean", "share")] + means)
    rankings = {}
    for (order, end), (_, by) in _RANKINGS.items():
        # A token that is NaN everywhere has no sum: it is at neither end.
        keys = -columns[by] if end == LOWERED else columns[by]
        rows = np.flatnonzero((keys > 0) & (often | (order != "mean")))
        rows = rows[np.lexsort((ids[rows], -keys[rows]))][:limit]
        rankings[order, end] = [
            TokenChange(int(ids[i]), texts[i].as_py(), int(columns["count"][i]), *shown[:, i].tolist())
            for i in rows.tolist()
        ]
    return Part(selection, int(columns["count"].sum()), int(columns["defined"].sum()), total, float(size), rankings)


def _with_contexts(dataset: TokenDataset, parts: Sequence[Part], separator: str) -> list[Part]:
    """The parts, their tokens with contexts: where they changed most in the direction of their sum."""
    signs = [
        {token.token_id: -1 if token.total < 0 else 1 for tokens in part.rankings.values() for token in tokens}
        for part in parts
    ]
    # Rows of token id, change and number of the row.
    places = [np.zeros((0, 3))] * len(parts)
    begin = 0
    for batch in dataset.batches(["source", "token_id", "delta_logp", "correct"]):
        ids, values = batch["token_id"].to_numpy(), batch["delta_logp"].to_numpy()
        right = pc.greater(batch["correct"], 0)
        for number, part in enumerate(parts):
            wanted = np.array(sorted(signs[number]), np.int64)
            sign = np.array([signs[number][token_id] for token_id in wanted.tolist()])
            rows = np.flatnonzero(np.isin(ids, wanted) & part.selection.mask(batch["source"], right).to_numpy(False))
            changes = values[rows] * sign[np.searchsorted(wanted, ids[rows])] if len(rows) else values[rows]
            new = np.stack([ids[rows], changes, rows + begin], axis=1)[changes > 0]
            places[number] = _largest(np.concatenate([places[number], new]))
        begin += len(batch)
    around = np.arange(-_NEIGHBOURS, _NEIGHBOURS + 1)
    numbers = np.unique(np.concatenate(places)[:, 2].astype(np.int64)[:, None] + around)
    numbers = numbers[(numbers >= 0) & (numbers < begin)]
    near = dataset.rows(numbers, ["line", "position", "token_text"])
    lookup = dict(zip(numbers.tolist(), near.to_pylist(), strict=True))
    found = [_texts(of_part, lookup, separator) for of_part in places]
    return [
        part._replace(
            rankings={
                key: [token._replace(contexts=contexts.get(token.token_id, ())) for token in tokens]
                for key, tokens in part.rankings.items()
            }
        )
        for part, contexts in zip(parts, found, strict=True)
    ]


def _largest(places: np.ndarray) -> np.ndarray:
    """The rows with the largest changes of each token, the largest first, of equal ones the earliest alone.

    Samples of one problem often begin alike: changes that are equal to three digits are of one context.
    """
    places = places[np.lexsort((places[:, 2], -places[:, 1], places[:, 0]))]
    rounded = np.stack([places[:, 0], np.minimum(places[:, 1], 6e4).astype(np.float16)])
    places = places[np.append(True, (rounded[:, 1:] != rounded[:, :-1]).any(0))[: len(places)]]
    begins = np.searchsorted(places[:, 0], places[:, 0])
    return places[np.arange(len(places)) - begins < _PLACES]


def _texts(places: np.ndarray, rows: dict[int, dict[str, Any]], separator: str) -> dict[int, tuple[str, ...]]:
    contexts: dict[int, list[str]] = {}
    for token_id, _, number in places.tolist():
        of_token, context = contexts.setdefault(int(token_id), []), _context(int(number), rows, separator)
        if len(of_token) < _CONTEXTS and context not in of_token:
            of_token.append(context)
    return {token_id: tuple(texts) for token_id, texts in contexts.items()}


def _context(number: int, rows: dict[int, dict[str, Any]], separator: str) -> str:
    """A token «marked» among its neighbours in the response."""
    middle = rows[number]

    def texts(first: int, last: int) -> Iterator[str]:
        for near in range(first, last):
            row = rows.get(number + near)
            if row and (row["line"], row["position"]) == (middle["line"], middle["position"] + near):
                yield row["token_text"]

    before, after = separator.join(texts(-_NEIGHBOURS, 0)), separator.join(texts(1, _NEIGHBOURS + 1))
    return one_line(separator.join(filter(None, (before, marked(middle["token_text"]), after))).strip())


def marked(text: str) -> str:
    """A token in quotes, as contexts have it."""
    return f"«{visible(text)}»"


def words_markdown(words: Words) -> str:
    """All rankings in Markdown, from both ends, all responses first."""
    lines = [
        "# Tokens that RL changed most",
        "",
        "Δlog p in nats; share: of Σ|Δlog p| over these responses. Not ranked by the mean: tokens that occur fewer "
        f"than {counted(words.min_count, 'time')} and have less than {percent(_LARGE_SHARE)} of Σ|Δlog p|. In contexts "
        "the token is «marked». Its spaces are shown as ␣; control and formatting characters are spelt out.",
    ]
    if words.remark:
        lines += ["", f"Sources: {words.remark}."]
    for part in words.parts:
        title = escape_markdown(str(part.selection))
        lines += ["", f"## {title[0].upper()}{title[1:]} ({counted(part.num_tokens, 'token')})"]
        for key, tokens in part.rankings.items():
            rows = [(rank, *_markdown_cells(token)) for rank, token in enumerate(tokens, 1)]
            table = table_lines(_MARKDOWN_HEAD, "rlrrrrrrrl", rows) if rows else ["None."]
            lines += ["", f"### {_RANKINGS[key][0]}", "", *table]
    return "\n".join(lines) + "\n"


_MARKDOWN_HEAD = (
    "rank", "token", "id", "count", "Σ Δlog p", "mean Δlog p", "share", "mean log p, RL", "mean log p, base", "contexts"
)  # fmt: skip


def _markdown_cells(token: TokenChange) -> Iterator[Any]:
    yield from (escape_markdown(visible(token.text)), token.token_id, f"{token.occurrences:,}")
    yield from (f"{token.total:+.4f}", f"{token.delta_logp:+.4f}", percent(token.share))
    yield from (f"{token.logp:+.4f}", f"{token.base_logp:+.4f}", " · ".join(map(escape_markdown, token.contexts)))


def words_csv(words: Words) -> str:
    """All rankings as CSV, rank by rank, so that both ends of each come first; tokens are JSON strings."""
    head = ["rank", "token", "token_id", "count", "mean_delta_logp", "mean_logp", "mean_base_logp", "sum_delta_logp"]
    head += ["share", "order", "direction", "responses", *(f"context_{number}" for number in range(1, _CONTEXTS + 1))]
    rows = []
    orders = [order for order, _ in _RANKINGS]
    for number, part in enumerate(words.parts):
        for (order, end), tokens in part.rankings.items():
            for rank, token in enumerate(tokens, 1):
                values = (token.delta_logp, token.logp, token.base_logp, token.total, token.share)
                cells = (rank, quoted(token.text), token.token_id, token.occurrences, *(f"{x:.9g}" for x in values))
                contexts = [*map(csv_cell, token.contexts), *[""] * (_CONTEXTS - len(token.contexts))]
                where = (order, end, csv_cell(str(part.selection)))
                rows.append(((number, orders.index(order), rank), (*cells, *where, *contexts)))
    return csv_table(head, [cells for _, cells in sorted(rows, key=lambda row: row[0])])
