"""Token text that is safe to show: white space and control characters visible, no markup."""

import json
import string
import unicodedata

_NAMED = {" ": "␣", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_MARKDOWN_ESCAPES = str.maketrans({character: f"\\{character}" for character in string.punctuation})


def visible(text: str) -> str:
    """`text` with every space, control, formatting and unassigned character spelt out; "∅" if it is empty.

    Right-to-left marks, zero-width characters and terminal escapes do nothing any more.
    """
    shown = "".join(map(_visible_character, text))
    # A combining mark would join whatever comes before it.
    return f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown or "∅"


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character)[0] not in "CZ":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escape_markdown(text: str) -> str:
    """`text` as it stands, in Markdown: no pipe ends a table cell, no tag, entity, link or emphasis begins."""
    return text.translate(_MARKDOWN_ESCAPES)


def quoted(text: str) -> str:
    """`text` as a JSON string: exact, in ASCII, and nothing that a spreadsheet takes for a formula."""
    return json.dumps(text)
