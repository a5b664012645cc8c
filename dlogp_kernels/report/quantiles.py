"""Quantiles of more values than fit into memory: exact, by reading them three times."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

#: The bits of a value that each reading tells apart, the upper ones first.
_DIGITS = (11, 11, 10)

#: Some values and the groups that they are of, one for each of them or one for all.
Batch = tuple[np.ndarray | int, np.ndarray]


def quantiles(read: Callable[[], Iterable[Batch]], num_groups: int, shares: Sequence[float]) -> np.ndarray:
    """The quantiles of each group's finite values, interpolated as `numpy.quantile` does by default.

    It takes about 100 KB for each group and share, however many values there are.

    Args:
        read: begins to read from the first batch: groups, and values, which are taken as float32.
        num_groups: groups are numbers below it.
        shares: of the values that lie below a quantile, from 0 to 1.

    Returns:
        float64 of the shape (num_groups, len(shares)); NaN for groups without a finite value.
    """
    # Digits of those values that can be a quantile are counted; they are found digit by digit.
    found = np.repeat(np.arange(num_groups), 2 * len(shares))
    known, sizes, ranks = 0, np.zeros(0), np.zeros(0, np.int64)
    for width in _DIGITS:
        prefixes = np.unique(found)
        counts = _count_digits(read(), prefixes, known, width)
        if not known:
            sizes = counts.sum(1)
            below = np.multiply.outer(np.maximum(sizes - 1, 0), shares)
            ranks = np.stack([np.floor(below), np.ceil(below)], axis=-1).astype(np.int64).ravel()
        up_to = counts.cumsum(1)[np.searchsorted(prefixes, found)]
        digits = np.minimum((up_to <= ranks[:, None]).sum(1), (1 << width) - 1)
        before = np.take_along_axis(up_to, np.maximum(digits - 1, 0)[:, None], 1)[:, 0]
        ranks = ranks - np.where(digits > 0, before, 0)
        found, known = found << width | digits, known + width
    low, high = _value(found).reshape(num_groups, len(shares), 2).transpose(2, 0, 1)
    part = below % 1
    # From the nearer one, as numpy does it.
    between = np.where(part < 0.5, low + (high - low) * part, high - (high - low) * (1 - part))
    return np.where(sizes[:, None] > 0, between, np.nan)


def _count_digits(batches: Iterable[Batch], prefixes: np.ndarray, known: int, width: int) -> np.ndarray:
    """How often each digit of so many bits follows each prefix: a group, and `known` upper bits of a value."""
    counts = np.zeros(len(prefixes) << width, np.int64)
    for groups, values in batches:
        keys = _key(groups, values) >> (32 - known - width)
        places = np.searchsorted(prefixes, keys >> width)
        counted = prefixes[np.minimum(places, len(prefixes) - 1)] == keys >> width
        np.add.at(counts, places[counted] << width | keys[counted] & ((1 << width) - 1), 1)
    return counts.reshape(len(prefixes), -1)


def _key(groups: np.ndarray | int, values: np.ndarray) -> np.ndarray:
    """A group and the bits of each finite value, as integers in the order of values within a group."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    finite = np.isfinite(values)
    # −0 is 0.
    bits = (values[finite] + np.float32(0)).view(np.uint32).astype(np.int64)
    ordered = np.where(bits >> 31, 0xFFFFFFFF - bits, bits | 1 << 31)
    return np.broadcast_to(groups, values.shape)[finite].astype(np.int64) << 32 | ordered


def _value(keys: np.ndarray) -> np.ndarray:
    bits = keys & 0xFFFFFFFF
    bits = np.where(bits >> 31, bits & 0x7FFFFFFF, 0xFFFFFFFF - bits)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)
