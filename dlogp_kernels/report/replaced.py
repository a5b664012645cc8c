"""The tokens replaced most often and what took their place: Markdown, CSV, and a page of HTML."""

import html
from collections.abc import Callable, Iterator, Sequence

from .responses import ReplacedToken
from .tables import csv_table, markdown_table
from .text import csv_cell, escape_markdown, percent, quoted, visible

_TITLE = "Tokens replaced most often"
_SPELT = "Spaces are shown as ␣; control and formatting characters are spelt out."
# No script, no picture, nothing from elsewhere: a token's text is text.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #0072b2; --muted: light-dark(#595959, #adadad); }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p { color: var(--muted); margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .28rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { background: #8882; border-radius: 3px; font: .93em ui-monospace, monospace; padding: .05rem .3rem;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.share { min-width: 9rem; } .share i { background: var(--bar); display: block; height: .35rem; margin-top: .2rem; }
.new { display: inline-block; margin-right: 1rem; white-space: nowrap; } .new span { color: var(--muted); }
"""


def replacements_text(token: ReplacedToken, escape: Callable[[str], str] = str) -> str:
    """What took the token's place most often, each with its share, for a terminal or, escaped, for another place."""
    shares = ((escape(visible(new)), percent(count / token.occurrences)) for new, count in token.replacements)
    return ", ".join(f"{new} ({share})" for new, share in shares)


def tokens_markdown(tokens: Sequence[ReplacedToken], min_count: int) -> str:
    """The tokens replaced most often, with what took their place."""
    rows = [
        (
            escape_markdown(token.criterion),
            escape_markdown(visible(token.text)),
            token.token_id,
            f"{token.occurrences:,}",
            percent(token.share),
            f"{token.delta_logp:+.4f}",
            replacements_text(token, escape_markdown),
        )
        for token in tokens
    ]
    head = ("criterion", "token", "id", "times replaced", "share", "mean Δlog p", "replaced by")
    return markdown_table(_TITLE, f"{_introduction(min_count)} {_SPELT}", head, "llrrrrl", rows)


def tokens_csv(tokens: Sequence[ReplacedToken]) -> str:
    """The same as CSV, a row for each token and what took its place; tokens are JSON strings."""
    head = ["criterion", "token", "token_id", "count", "share", "mean_delta_logp", "replaced_by", "replaced_by_count"]
    rows = []
    for token in tokens:
        numbers = token.token_id, token.occurrences, f"{token.share:.9g}", f"{token.delta_logp:.9g}"
        old = csv_cell(token.criterion), quoted(token.text), *numbers
        rows += [(*old, quoted(new), count) for new, count in token.replacements]
    return csv_table(head, rows)


def tokens_html(tokens: Sequence[ReplacedToken], min_count: int) -> str:
    """The same as a page that needs nothing else; a table for each criterion."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_TITLE}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{_TITLE}</h1>",
            f"<p>{_introduction(min_count)}</p><p>{_SPELT}</p>",
            *_tables(tokens),
            "</body></html>\n",
        ]
    )


def _tables(tokens: Sequence[ReplacedToken]) -> Iterator[str]:
    for criterion in dict.fromkeys(token.criterion for token in tokens):
        mine = [token for token in tokens if token.criterion == criterion]
        widest = max(token.share for token in mine)
        yield f"<h2>Replaced by the criterion {_code(criterion)}</h2>"
        yield '<table><thead><tr><th>token</th><th class="number">id</th><th class="number">times</th>'
        yield '<th>share of the replacements</th><th class="number">mean Δlog p</th><th>replaced by</th></tr></thead>'
        yield "<tbody>"
        yield from (_row(token, widest) for token in mine)
        yield "</tbody></table>"
    if not tokens:
        yield "<p>No token was replaced so often by a criterion.</p>"


def _row(token: ReplacedToken, widest: float) -> str:
    new = "".join(
        f'<span class="new">{_code(text)} <span>{count:,} · {percent(count / token.occurrences)}</span></span>'
        for text, count in token.replacements
    )
    bar = f'<i style="width:{100 * token.share / widest:.1f}%"></i>'
    return (
        f'<tr><td>{_code(token.text)}</td><td class="number">{token.token_id}</td>'
        f'<td class="number">{token.occurrences:,}</td><td class="share">{percent(token.share)}{bar}</td>'
        f'<td class="number">{token.delta_logp:+.3f}</td><td>{new}</td></tr>'
    )


def _code(text: str) -> str:
    return f"<code>{html.escape(visible(text))}</code>"


def _introduction(min_count: int) -> str:
    rare = f" Tokens replaced fewer than {min_count} times are left out." if min_count > 1 else ""
    return (
        "Over all settings of a criterion. Share: of all tokens that the criterion replaced. Mean Δlog p of the "
        f"drafted token, in nats.{rare}"
    )
