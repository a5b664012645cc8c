"""What goes to a terminal: text without markup or escapes, and tables that lose nothing on a narrow one."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .text import one_line, printable

#: A column of text is not made narrower; between two columns there are a border and a space on either side of it.
_LEAST_TEXT_WIDTH = 12
_BETWEEN_COLUMNS = 3


class Terminal(Console):
    """A console to which every string is text: one place that spells out control characters, for all that is printed.

    Lines are as long as they are; a terminal breaks them where it ends.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Rich calls it for all strings, those in tables too; markup and emoji codes are text here."""
        kept = {name: options[name] for name in ("style", "justify", "overflow") if options.get(name) is not None}
        return Text(printable(text), **kept)


class TextTable:
    """A table for `print`: its first columns are text, which is folded, and its others numbers, which are not.

    Where it would not fit, there are a few lines for each row instead: nothing is cropped at any width.
    """

    def __init__(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1
    ) -> None:
        self._title = printable(title)
        self._columns = list(map(printable, columns))
        self._rows = [[printable(cell) for cell in row] for row in rows]
        self._text_columns = text_columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width() <= options.max_width:
            yield self._table()
        else:
            yield from self._records()

    def _least_width(self) -> int:
        widths = [max(map(_width, cells)) for cells in zip(self._columns, *self._rows, strict=True)]
        for number in range(self._text_columns):
            widths[number] = min(widths[number], _LEAST_TEXT_WIDTH)
        return sum(widths) + _BETWEEN_COLUMNS * len(widths) + 1

    def _table(self) -> Table:
        table = Table(title=Text(self._title))
        for number, heading in enumerate(self._columns):
            if number < self._text_columns:
                table.add_column(Text(heading), overflow="fold")
            else:
                table.add_column(Text(heading), justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(*map(Text, row))
        return table

    def _records(self) -> Iterator[Text]:
        yield Text(self._title, "italic", overflow="fold", no_wrap=False)
        for row in self._rows:
            for number, (heading, cell) in enumerate(zip(self._columns, row, strict=True)):
                line = f"{heading}: {cell}" if heading else cell
                yield Text(f"  {line}" if number else line, "" if number else "bold", overflow="fold", no_wrap=False)


def _width(text: str) -> int:
    """Columns of a terminal that its longest line takes."""
    return max(map(cell_len, text.split("\n")))


def print_files(console: Console, files: Iterable[Path]) -> None:
    """Where they lie, each in a line."""
    for file in files:
        console.print(one_line(str(file)))
