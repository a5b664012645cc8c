"""What RL changed, as a paragraph: which tokens rose and fell, where in the responses, in which of them."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .dataset import TokenDataset
from .text import counted, percent
from .words import LOWERED, RAISED, Part, TokenChange, Words, changed_tokens, marked

_NAMED_TOKENS, _NAMED_SOURCES = 3, 4
#: Sizes are counted by the upper bits of their float32, which tell apart what differs by a hundredth.
_LOWER_BITS = 16


class Spread(NamedTuple):
    """How Σ|Δlog p| is spread over tokens by size, and over the fifths of responses that have as many tokens."""

    counts: np.ndarray
    sizes: np.ndarray
    fifths: np.ndarray

    def carriers(self, share: float) -> int:
        """How many tokens carry this share of Σ|Δlog p|, the largest first."""
        counts, sums = self.counts[::-1], np.cumsum(self.sizes[::-1])
        wanted = share * sums[-1]
        last = int(np.searchsorted(sums, wanted * (1 - 1e-12)))
        before = sums[last - 1] if last else 0.0
        in_last = math.ceil(counts[last] * (wanted - before) / (sums[last] - before) - 1e-9)
        return int(counts[:last].sum()) + in_last


def tell(dataset: TokenDataset) -> str:
    """What RL changed in these responses, in plain words."""
    words = changed_tokens(dataset, limit=_NAMED_TOKENS, limit_of_part=1)
    spread = measure_spread(dataset)
    everything, finite = words.parts[0], int(spread.counts.sum())
    if not finite:
        tokens = counted(everything.num_tokens, "token")
        return f"There is no finite Δlog p in {tokens}: what RL changed can not be said."
    if not everything.size:
        return f"Δlog p is 0 everywhere ({counted(finite, 'token')}): there is no change.{_without(everything, finite)}"
    sentences = [
        f"Over {counted(finite, 'response token')} Σ|Δlog p|, the sum of sizes, is {_nats(everything.size)}, and "
        f"the mean of Δlog p is {_mean(everything)}.",
        _concentration(spread, finite) if finite > 1 else "",
        f"RL raised {_most(everything.rankings['sum', RAISED])}.",
        f"It lowered {_most(everything.rankings['sum', LOWERED])}.",
        _where(spread),
        *_differences(words),
    ]
    return " ".join(filter(None, sentences)) + _without(everything, finite)


def measure_spread(dataset: TokenDataset) -> Spread:
    """The spread of Σ|Δlog p| over tokens and places, read a batch at a time."""
    counts, sizes = np.zeros((2, 1 << (32 - _LOWER_BITS)))
    fifths = np.zeros(5)
    for positions, values in _whole_responses(dataset):
        size = np.abs(values)
        finite = np.isfinite(size)
        bits = size[finite].view(np.uint32) >> _LOWER_BITS
        counts += np.bincount(bits, minlength=len(counts))
        sizes += np.bincount(bits, size[finite], len(counts))
        lengths = np.diff(np.flatnonzero(np.append(positions, 0) == 0))
        of_row = np.repeat(lengths, lengths)
        long = finite & (of_row >= 5)
        fifths += np.bincount(5 * positions[long] // of_row[long], size[long], 5)
    return Spread(counts, sizes, fifths)


def _whole_responses(dataset: TokenDataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions and Δlog p of some responses at a time."""
    positions, values = np.zeros(0, np.int64), np.zeros(0, np.float32)
    for batch in dataset.batches(["position", "delta_logp"]):
        positions = np.concatenate([positions, batch["position"].to_numpy()])
        values = np.concatenate([values, batch["delta_logp"].to_numpy()])
        last = max(np.flatnonzero(positions == 0), default=0)
        yield positions[:last], values[:last]
        positions, values = positions[last:], values[last:]
    yield positions, values


def _without(everything: Part, finite: int) -> str:
    left_out = everything.num_tokens - finite
    return f" Not in Σ|Δlog p|: {counted(left_out, 'token')} whose Δlog p is not finite." if left_out else ""


def _nats(value: float) -> str:
    size = f"{value:,.0f}".replace("inf", "∞") if value >= 1000 else f"{value:.3g}"
    return f"{size} nat{'' if size == '1' else 's'}"


def _concentration(spread: Spread, finite: int) -> str:
    half, most = spread.carriers(0.5), spread.carriers(0.9)
    return (
        f"Half of it lies on {counted(half, 'token')} ({percent(half / finite)}), nine tenths on "
        f"{counted(most, 'token')} ({percent(most / finite)})."
    )


def _most(tokens: Sequence[TokenChange]) -> str:
    """Tokens with their sums, the first with a context."""
    if not tokens:
        return "no token"
    shown = [
        f"{marked(token.text)} ({'+' if token.total > 0 else '−'}{_nats(abs(token.total))} in "
        f"{counted(token.occurrences, 'place')}, {percent(token.share)} of Σ|Δlog p|{_as_in(token, ', {}')})"
        for token in tokens
    ]
    return f"most of all {_listed(shown)}"


def _as_in(token: TokenChange, frame: str) -> str:
    """A context in its frame, where there is more than the token."""
    context = token.contexts[0]
    return "" if context == marked(token.text) else frame.format(f"as in “{context}”")


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _where(spread: Spread) -> str:
    total = spread.fifths.sum()
    if not total:
        return ""
    first, *middle, last = spread.fifths / total
    return (
        f"{percent(first)} of Σ|Δlog p| lies in the first fifth of a response, {percent(sum(middle))} in the three "
        f"fifths in the middle and {percent(last)} in the last fifth (of responses of 5 tokens or more)."
    )


def _differences(words: Words) -> Iterator[str]:
    """How sources, and the right and the wrong, differ."""
    everything = words.parts[0]
    parts = [part for part in words.parts[1:] if part.defined and part.num_tokens < everything.num_tokens]
    graded = [part for part in parts if part.selection.every_source]
    sources = [part for part in parts if part.selection.right is None]
    if len(sources) > _NAMED_SOURCES:
        sources.sort(key=lambda part: part.total / part.defined)
        low, high = sources[0], sources[-1]
        yield f"Among the sources the mean goes from {_means([low])} to {_means([high])}."
        sources = []
    if sources or graded:
        yield f"The mean of Δlog p is {_means(sources + graded)}."
    for part in graded:
        ends = {end: part.rankings["sum", end] for end in (RAISED, LOWERED)}
        told = [
            f"{end} most {marked(tokens[0].text)}{_as_in(tokens[0], ' ({})')}" for end, tokens in ends.items() if tokens
        ]
        if told:
            yield f"In {part.selection} RL {_listed(told)}."


def _mean(part: Part) -> str:
    mean = f"{part.total / part.defined:+.3g}".replace("-", "−")
    return mean.replace("inf", "∞").replace("+nan", "undefined")


def _means(parts: Sequence[Part]) -> str:
    return _listed([f"{_mean(part)} over {part.selection}" for part in parts])
