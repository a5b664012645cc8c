"""Tables as files, in Markdown and CSV. Their cells are text that is safe there, see `text`."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

#: How Markdown says that a column stands on the left or on the right.
_ALIGNMENTS = {"l": ":---", "r": "---:"}


def markdown_table(
    title: str, introduction: str, head: Sequence[str], align: str, rows: Iterable[Sequence[Any]]
) -> str:
    """A page with one table, as `table_lines` has it."""
    return "\n".join([f"# {title}", "", introduction, "", *table_lines(head, align, rows)]) + "\n"


def table_lines(head: Sequence[str], align: str, rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table in Markdown; `align` has an l or an r for each column."""
    cells = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [cells[0], f"|{'|'.join(_ALIGNMENTS[side] for side in align)}|", *cells[1:]]


def csv_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """One line a row; None is an empty cell."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows([head, *rows])
    return sink.getvalue()
