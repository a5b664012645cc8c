"""What a page shows of a directory: all of its responses, or a sample of whole ones."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..dataset import STATISTICS, Replaced, ResponseRows, TokenDataset
from ..errors import DatasetError

_COLUMNS = (*STATISTICS, "top_logp", "base_top_logp", "top_token", "base_top_token")


class Chosen(NamedTuple):
    """Which of the responses are shown, and how many there are, with their tokens."""

    indices: list[int]
    tokens: int
    all_responses: int
    all_tokens: int

    def remark(self) -> str | None:
        """That it is a sample, if it is one."""
        if len(self.indices) == self.all_responses:
            return None
        return (
            f"This is a sample: {len(self.indices):,} of {self.all_responses:,} responses with {self.tokens:,} of "
            f"{self.all_tokens:,} tokens, drawn by prompts; --max-tokens shows more."
        )


def choose(prompts: Sequence[Any], lengths: Sequence[int], max_tokens: int) -> Chosen:
    """All responses, or prompts drawn at random, the same in every run, with as many responses as there is room for.

    `prompts` and `lengths` are of each response; one is shown if it is the shortest, even if it is too long.
    """
    sizes = np.asarray(lengths, np.int64)
    number_of = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    rank = np.random.default_rng(0).permutation(len(number_of))
    if sizes.sum() <= max_tokens:
        indices = list(range(len(sizes)))
    else:
        indices, left = [], max_tokens
        for index in sorted(range(len(sizes)), key=lambda index: rank[number_of[prompts[index]]]):
            if sizes[index] <= left:
                indices.append(index)
                left -= int(sizes[index])
        indices = sorted(indices) or [int(sizes.argmin())]
    return Chosen(indices, int(sizes[indices].sum()), len(sizes), int(sizes.sum()))


def read_dataset(dataset: TokenDataset, max_tokens: int) -> tuple[list[ResponseRows], Chosen]:
    """The chosen responses of a data set, with the statistics that it has.

    Raises DatasetError where there is none, or where tokens are missing.
    """
    about = dataset.responses().drop_columns("prompt_ids").to_pylist()
    if not about:
        raise DatasetError(f"{dataset.directory} holds no responses")
    prompts = [row["sample_id"] if row["prompt"] is None else row["prompt"] for row in about]
    chosen = choose(prompts, [row["num_tokens"] for row in about], max_tokens)
    about = [about[index] for index in chosen.indices]
    names = ("token_id", "token_text", "draft_id", "draft_text", *_COLUMNS)
    table = dataset.tokens(names, lines=[row["line"] for row in about])
    if len(table) != chosen.tokens:
        raise DatasetError(
            f"{dataset.directory}: {len(table):,} tokens of responses that have {chosen.tokens:,}: the data set is "
            "not whole"
        )
    # A data set of an earlier version lacks some of the columns.
    there = [name for name in _COLUMNS if not len(table) or table[name].null_count < len(table)]
    statistics = {name: _numbers(table[name]) for name in there}
    ids, is_replaced = table["token_id"].to_numpy(), table["draft_id"].is_valid().to_numpy()
    texts, draft_ids, draft_texts = (table[name].to_pylist() for name in ("token_text", "draft_id", "draft_text"))
    rows, begin = [], 0
    for row in about:
        end = begin + row.pop("num_tokens")
        of_response = {name: values[begin:end] for name, values in statistics.items()}
        places = np.flatnonzero(is_replaced[begin:end])
        drafts = ([values[begin + place] for place in places] for values in (draft_ids, draft_texts))
        replaced = Replaced(places.tolist(), *drafts)
        rows.append(
            ResponseRows(
                **row, token_ids=ids[begin:end], token_texts=texts[begin:end], statistics=of_response, replaced=replaced
            )
        )
        begin = end
    return rows, chosen


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Missing ones are NaN, or −1 where numbers are whole."""
    return (column.fill_null(-1) if pa.types.is_integer(column.type) else column).to_numpy()
