"""Who wrote the responses, in words, and which sources are shown where there are too many for one picture or table."""

from collections.abc import Collection

from .dataset import TokenDataset
from .errors import DatasetError
from .text import one_line

#: So many are told apart.
MOST_SOURCES = 12

#: In the order of legends.
_KNOWN = {"rl": "RL", "base": "base"}


def shown_sources(dataset: TokenDataset, most: int = MOST_SOURCES) -> tuple[dict[str | None, int], str]:
    """How many tokens each source has, RL and base first, of many these and the largest, `most` in all; and a remark.

    It says so; "" if these are all.
    """
    counts = dataset.source_counts
    known = [name for name in _KNOWN if name in counts]
    others = [source for source in counts if source not in known]
    largest = sorted(others, key=lambda source: -counts[source])[: most - len(known)]
    shown = [*known, *(source for source in others if source in largest)]
    remark = ""
    if len(counts) > len(shown):
        remark = f"the {most} largest of {len(counts):,} sources"
        remark += f", {' and '.join(_KNOWN[name] for name in known)} in any case" if known else ""
    return {source: counts[source] for source in shown}, remark


def drawn_sources(dataset: TokenDataset, most: int = MOST_SOURCES) -> tuple[dict[str | None, int], str]:
    """The same for a picture; DatasetError where there is nothing to draw."""
    sources, remark = shown_sources(dataset, most)
    if not sources:
        raise DatasetError(f"{dataset.directory} holds no tokens")
    return sources, remark


def numbers_of(sources: Collection[str | None]) -> dict[str | None, int]:
    """The numbers of their colours: RL and base always have theirs."""
    known = {name: number for number, name in enumerate(_KNOWN) if name in sources}
    others = [source for source in sources if source not in known]
    return known | {source: number for number, source in enumerate(others, len(_KNOWN) if known else 0)}


def responses_of(source: str | None) -> str:
    """The responses of a source, as titles and legends call them."""
    if source is None:
        return "responses"
    # A legend drops labels that begin with an underscore, hence the quotes.
    return f"{_KNOWN.get(source) or f'“{one_line(source)}”'} responses"
