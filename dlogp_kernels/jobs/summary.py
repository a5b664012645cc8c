"""The statistics of a data set in a few numbers, for each source."""

from typing import Any

import numpy as np

from ..report.dataset import STATISTICS, TokenDataset

_QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
#: Tail masses of Δlog p: the share of tokens below the first and above the second.
LOWERED_BELOW = (-5.0, -2.0, -1.0, -0.5)
RAISED_ABOVE = (0.25, 0.5, 1.0)


def describe(dataset: TokenDataset) -> dict[str, Any]:
    """For each source (the key "" is for rows without one): tokens, statistics and tail masses of Δlog p."""
    return {source or "": _describe_source(dataset, source) for source in dataset.sources()}


def _describe_source(dataset: TokenDataset, source: str | None) -> dict[str, Any]:
    delta_logp = dataset.column("delta_logp", source)
    return {
        "response_tokens": len(delta_logp),
        "delta_logp_tails": _tail_masses(delta_logp),
        "statistics": {name: _describe_column(dataset.column(name, source)) for name in STATISTICS},
    }


def _describe_column(values: np.ndarray) -> dict[str, Any]:
    """Over the finite values; how many are not is part of it (a KL may be +inf, NaN comes from a broken model)."""
    finite = values[np.isfinite(values)]
    described: dict[str, Any] = {
        "mean": None,
        "std": None,
        "quantiles": None,
        "infinite": int(np.isinf(values).sum()),
        "nan": int(np.isnan(values).sum()),
    }
    if len(finite):
        quantiles = np.quantile(finite, (0.0, *_QUANTILES, 1.0)).tolist()
        described["mean"] = float(finite.mean(dtype=np.float64))
        described["std"] = float(finite.std(dtype=np.float64))
        described["quantiles"] = dict(zip(("min", *map(str, _QUANTILES), "max"), quantiles, strict=True))
    return described


def _tail_masses(delta_logp: np.ndarray) -> dict[str, float]:
    below = {f"below {threshold:g}": float((delta_logp < threshold).mean()) for threshold in LOWERED_BELOW}
    above = {f"above {threshold:g}": float((delta_logp > threshold).mean()) for threshold in RAISED_ABOVE}
    return below | above
