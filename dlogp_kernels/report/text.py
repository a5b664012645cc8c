"""Text of models and files that is safe to show: control characters spelt out, no markup, no formula."""

import json
import re
import string
import unicodedata

_NAMED = {" ": "␣", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_FORMULA_STARTS = ("=", "+", "-", "@")
#: Nothing that Markdown reads in a cell of a table; it makes links of some addresses.
_PLAIN_WORDS = re.compile(r"(?!.*www\.)(?:[^\W_]|[ ,.=-])*", re.IGNORECASE)
_MARKDOWN_ESCAPES = str.maketrans({character: f"\\{character}" for character in string.punctuation})


def visible(text: str) -> str:
    """`text` with every space, control, formatting and unassigned character spelt out; "∅" if it is empty.

    Right-to-left marks, zero-width characters and terminal escapes do nothing any more.
    """
    shown = "".join(_NAMED.get(character) or _spelt(character) for character in text)
    # A combining mark would join whatever comes before it.
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown or "∅"


def printable(text: str) -> str:
    """`text` for a terminal or a picture: what is not spaces, ends of lines or characters to see is spelt out.

    Terminal escapes, right-to-left marks and halves of surrogate pairs do nothing any more; all else stays as it is.
    """
    return "".join(x if x == "\n" or unicodedata.category(x) == "Zs" else _spelt(x) for x in text)


def one_line(text: str) -> str:
    """`printable` text with the ends of its lines spelt out, too: a name, a cell of a table."""
    return printable(text).replace("\n", "\\n")


def _spelt(character: str) -> str:
    """The character, or its number where there is nothing to see of it."""
    if unicodedata.category(character)[0] not in "CZ":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escape_markdown(text: str) -> str:
    """`text` as it stands, in Markdown: no pipe ends a table cell, no tag, entity, link or emphasis begins."""
    shown = one_line(text)
    return shown if _PLAIN_WORDS.fullmatch(shown) else shown.translate(_MARKDOWN_ESCAPES)


def csv_cell(text: str) -> str:
    """`text` in one line, and nothing that a spreadsheet takes for a formula."""
    shown = one_line(text)
    return f"'{shown}" if shown.startswith(_FORMULA_STARTS) else shown


def quoted(text: str) -> str:
    """`text` as a JSON string: exact, in ASCII, and nothing that a spreadsheet takes for a formula."""
    return json.dumps(text)


def counted(count: int, noun: str) -> str:
    """A number of things: "1 token", "2,000 tokens"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """A share in percent, with a digit behind the point where it is small."""
    return (
        f"{100 * share:.0f} %"
        if share >= 0.0995
        else f"{100 * share:.1f} %"
        if share >= 0.0095
        else f"{100 * share:.1g} %"
    )
