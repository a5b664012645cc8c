"""The statistics of a data set in a few numbers, for each source; read a few thousand rows at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..report.dataset import STATISTICS, TokenDataset
from ..report.quantiles import Batch, quantiles

_QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
#: Tail masses of Δlog p: the share of tokens below the first and above the second.
LOWERED_BELOW = (-5.0, -2.0, -1.0, -0.5)
RAISED_ABOVE = (0.25, 0.5, 1.0)


def describe(dataset: TokenDataset) -> dict[str, Any]:
    """For each source (the key "" is for rows without one): tokens, statistics and tail masses of Δlog p."""
    return {source or "": _describe_source(dataset, source) for source in dataset.sources()}


def _describe_source(dataset: TokenDataset, source: str | None) -> dict[str, Any]:
    def read() -> Iterator[Batch]:
        for columns in dataset.values(STATISTICS, source):
            yield from enumerate(columns)

    spreads = quantiles(read, len(STATISTICS), (0.0, *_QUANTILES, 1.0))
    columns = [_Column(spread) for spread in spreads]
    tails = {f"below {threshold:g}": 0 for threshold in LOWERED_BELOW}
    tails |= {f"above {threshold:g}": 0 for threshold in RAISED_ABOVE}
    for number, values in read():
        columns[number].add(values)
        if STATISTICS[number] == "delta_logp":
            for threshold in LOWERED_BELOW:
                tails[f"below {threshold:g}"] += int((values < threshold).sum())
            for threshold in RAISED_ABOVE:
                tails[f"above {threshold:g}"] += int((values > threshold).sum())
    total = columns[0].total
    return {
        "response_tokens": total,
        "delta_logp_tails": {name: count / total for name, count in tails.items()},
        "statistics": {name: column.to_json() for name, column in zip(STATISTICS, columns, strict=True)},
    }


class _Column:
    """Over the finite values; how many are not is part of it (a KL may be +inf, NaN comes from a broken model)."""

    def __init__(self, spread: np.ndarray) -> None:
        self._spread = spread.tolist()
        #: Moments about the median, so that those of values far from 0 keep their digits.
        self._center = self._spread[1 + _QUANTILES.index(0.5)]
        self._sum = self._squares = 0.0
        self.total = self._infinite = self._nan = 0

    def add(self, values: np.ndarray) -> None:
        finite = values[np.isfinite(values)].astype(np.float64) - self._center
        self._sum += float(finite.sum())
        self._squares += float(finite @ finite)
        self.total += len(values)
        self._infinite += int(np.isinf(values).sum())
        self._nan += int(np.isnan(values).sum())

    def to_json(self) -> dict[str, Any]:
        finite = self.total - self._infinite - self._nan
        described: dict[str, Any] = {"mean": None, "std": None, "quantiles": None}
        if finite:
            shift = self._sum / finite
            described["mean"] = self._center + shift
            described["std"] = max(self._squares / finite - shift**2, 0.0) ** 0.5
            described["quantiles"] = dict(zip(("min", *map(str, _QUANTILES), "max"), self._spread, strict=True))
        return described | {"infinite": self._infinite, "nan": self._nan}
