"""The tokens replaced most often and what took their place: Markdown, CSV, and a page of HTML."""

import csv
import html
import io
from collections.abc import Iterator, Sequence

from .responses import ReplacedToken
from .text import csv_cell, escape_markdown, quoted, visible

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


def replacements_text(token: ReplacedToken) -> str:
    """What took the token's place most often, each with its share, for a terminal."""
    return ", ".join(f"{visible(new)} ({_percent(count / token.occurrences)})" for new, count in token.replacements)


def tokens_markdown(tokens: Sequence[ReplacedToken], min_count: int) -> str:
    """The tokens replaced most often, with what took their place."""
    lines = [
        "# Tokens replaced most often",
        "",
        f"{_introduction(min_count)} {_SPELT}",
        "",
        "| criterion | token | id | times replaced | share | mean Δlog p | replaced by |",
        "|:---|:---|---:|---:|---:|---:|:---|",
    ]
    for token in tokens:
        new = ", ".join(
            f"{escape_markdown(visible(new))} ({_percent(count / token.occurrences)})"
            for new, count in token.replacements
        )
        cells = (
            escape_markdown(token.criterion),
            escape_markdown(visible(token.text)),
            str(token.token_id),
            f"{token.occurrences:,}",
            _percent(token.share),
            f"{token.delta_logp:+.4f}",
            new,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tokens_csv(tokens: Sequence[ReplacedToken]) -> str:
    """The same as CSV, a row for each token and what took its place; tokens are JSON strings."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    head = ["criterion", "token", "token_id", "count", "share", "mean_delta_logp", "replaced_by", "replaced_by_count"]
    writer.writerow(head)
    for token in tokens:
        numbers = [token.token_id, token.occurrences, f"{token.share:.9g}", f"{token.delta_logp:.9g}"]
        for new, count in token.replacements:
            writer.writerow([csv_cell(token.criterion), quoted(token.text), *numbers, quoted(new), count])
    return sink.getvalue()


def tokens_html(tokens: Sequence[ReplacedToken], min_count: int) -> str:
    """The same as a page that needs nothing else; a table for each criterion."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Tokens replaced most often</title><style>{_STYLE}</style></head><body>",
            "<h1>Tokens replaced most often</h1>",
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
        f'<span class="new">{_code(text)} <span>{count:,} · {_percent(count / token.occurrences)}</span></span>'
        for text, count in token.replacements
    )
    bar = f'<i style="width:{100 * token.share / widest:.1f}%"></i>'
    return (
        f'<tr><td>{_code(token.text)}</td><td class="number">{token.token_id}</td>'
        f'<td class="number">{token.occurrences:,}</td><td class="share">{_percent(token.share)}{bar}</td>'
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


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"
