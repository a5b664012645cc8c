"""Which responses are computed together. It depends on the data and on `batch_tokens` alone, never on the past."""

from collections.abc import Sequence

import numpy as np

#: A part is what is written at once, and what a killed run may have to compute again.
BATCHES_PER_PART = 8


def cut_parts(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[tuple[int, int]]:
    """Ranges of consecutive samples that hold about `BATCHES_PER_PART` batches each."""
    parts = []
    begin = tokens = 0
    for end, length in enumerate(lengths, 1):
        tokens += int(length)
        if tokens >= BATCHES_PER_PART * batch_tokens:
            parts.append((begin, end))
            begin, tokens = end, 0
    if begin < len(lengths):
        parts.append((begin, len(lengths)))
    return parts


def cut_batches(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[list[int]]:
    """The samples of a part, longest first, in batches of at most `batch_tokens` with their padding.

    A sample that is longer than that is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        # The first of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * int(lengths[batches[-1][0]]) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
