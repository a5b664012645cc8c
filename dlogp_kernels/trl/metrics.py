"""Means over the tokens of all processes, for the log."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from ..results import PolicyMetrics

#: Of Δlog p to the start of training: the share of tokens below the one and above the other.
LOWERED_BELOW, RAISED_ABOVE = -1.0, 0.25

_NAMES = {
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clip_dual": "clip_ratio/dual_mean",
    "approx_kl": "approx_kl",
    "mean_ratio": "ratio/mean",
    "mean_weight": "reweight/mean_weight",
    "ref_kl": "kl",
    "entropy": "entropy",
}


class TokenSums:
    """Sums over some tokens of this process, and largest values; `means` puts all processes together."""

    def __init__(self, count: Tensor) -> None:
        self._count = count.float()
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._least: set[str] = set()

    def add(self, name: str, total: Tensor) -> None:
        """The sum of a quantity over the tokens."""
        self._sums[name] = total.float()

    def add_largest(self, name: str, value: Tensor) -> None:
        """The largest value of a quantity; −inf where there are no tokens."""
        self._largest[name] = value.float()

    def add_least(self, name: str, value: Tensor) -> None:
        """The least value of a quantity; +inf where there are no tokens."""
        self.add_largest(name, -value)
        self._least.add(name)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and largest values over the tokens of all processes; nothing where there are none."""
        sums = torch.stack([self._count, *self._sums.values()])
        count, *totals = accelerator.reduce(sums, reduction="sum").tolist()
        largest: list[float] = []
        if self._largest:
            gathered = accelerator.gather(torch.stack([*self._largest.values()])[None])
            largest = gathered.amax(0).tolist()
        if count == 0:
            return {}
        means = {name: total / count for name, total in zip(self._sums, totals, strict=True)}
        extremes = dict(zip(self._largest, largest, strict=True))
        return means | {name: -value if name in self._least else value for name, value in extremes.items()}


def policy_sums(metrics: PolicyMetrics, count: Tensor, *, reweighted: bool, with_reference: bool) -> TokenSums:
    """What the loss says about its `count` tokens.

    Args:
        reweighted: whether the loss has reweighted the advantages, so that its mean weight says something.
        with_reference: whether there is a KL term.
    """
    sums = TokenSums(count)
    said = {"mean_weight": reweighted, "ref_kl": with_reference}
    for field, name in _NAMES.items():
        if said.get(field, True):
            sums.add(name, getattr(metrics, field) * count)
    sums.add("clip_ratio/region_mean", (metrics.clip_low + metrics.clip_high) * count)
    sums.add_largest("ratio/max", metrics.max_ratio)
    return sums


def add_delta_logp(sums: TokenSums, delta_logp: Tensor, mask: Tensor) -> None:
    """Mean, extremes and tails of Δlog p (B, T) where `mask` (B, T)."""
    kept = delta_logp.masked_fill(~mask, 0.0)
    sums.add("delta_logp/mean", kept.sum())
    sums.add(f"delta_logp/below_{LOWERED_BELOW:g}", (kept < LOWERED_BELOW).sum())
    sums.add(f"delta_logp/above_{RAISED_ABOVE:g}", (kept > RAISED_ABOVE).sum())
    sums.add_largest("delta_logp/max", delta_logp.masked_fill(~mask, -torch.inf).amax())
    sums.add_least("delta_logp/min", delta_logp.masked_fill(~mask, torch.inf).amin())
