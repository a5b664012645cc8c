"""Means over the tokens of all processes, for the log."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from ..results import PolicyMetrics

#: Of Δlog p to the start of training: the share of tokens below the one and above the other.
LOWERED_BELOW, RAISED_ABOVE = -1.0, 0.25

_NAMES = {
    "approx_kl": "approx_kl",
    "mean_ratio": "ratio/mean",
    "mean_weight": "reweight/mean_weight",
    "ref_kl": "kl",
    "entropy": "entropy",
}


class TokenSums:
    """Sums over tokens of this process, and extremes; `means` puts all processes together."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        #: The largest of a quantity times a sign.
        self._extremes: dict[str, tuple[Tensor, float]] = {}

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        """The sum of a quantity over `count` tokens."""
        self._sums[name] = total.float(), count.float()

    def add_largest(self, name: str, value: Tensor) -> None:
        """The largest value of a quantity; −inf where there are no tokens."""
        self._extremes[name] = value.float(), 1.0

    def add_least(self, name: str, value: Tensor) -> None:
        """The least value of a quantity; +inf where there are no tokens."""
        self._extremes[name] = -value.float(), -1.0

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and extremes over the tokens of all processes, of what there are tokens of."""
        pairs = torch.stack([torch.stack(pair) for pair in self._sums.values()])
        totals = accelerator.reduce(pairs, reduction="sum").tolist()
        values = {name: total / count for name, (total, count) in zip(self._sums, totals, strict=True) if count}
        if self._extremes:
            largest = torch.stack([value for value, _ in self._extremes.values()])[None]
            all_largest = accelerator.gather(largest).amax(0).tolist()
            for (name, (_, sign)), value in zip(self._extremes.items(), all_largest, strict=True):
                if math.isfinite(value):
                    values[name] = sign * value
        return values


def policy_sums(metrics: PolicyMetrics, count: Tensor, *, reweighted: bool, kl: bool) -> TokenSums:
    """What the loss says about its `count` tokens: its weights if it has `reweighted` the advantages, a divergence from
    the reference model if there is `kl`."""
    sums = TokenSums()
    for field, name in _NAMES.items():
        if {"mean_weight": reweighted, "ref_kl": kl}.get(field, True):
            sums.add(name, getattr(metrics, field) * count, count)
    sums.add_largest("ratio/max", metrics.max_ratio)
    return sums


def add_clip_ratios(sums: TokenSums, low: Tensor, high: Tensor, dual: Tensor, mask: Tensor, *, cispo: bool) -> None:
    """The shares of tokens that a bound took the gradient from, over all tokens and in the sequence with the least or
    most of them; (B, T) each. With a ratio of sequences (B, 1), the shares of sequences, empty ones among them, as TRL
    has it."""
    if low.shape[1] == 1:
        mask = torch.ones_like(low)
    total, lengths = mask.sum(), mask.sum(1)
    shares = {"low": low & mask, "high": high & mask, "region": (low | high) & mask, "dual": dual & mask}
    for name, places in shares.items():
        sums.add(f"clip_ratio/{name}_mean", places.sum(), total)
    if cispo:
        sums.add("cispo_clip_ratio", shares["high"].sum(), total)
    sums.add_least("clip_ratio/low_min", (shares["low"].sum(1) / lengths).masked_fill(lengths == 0, torch.inf).amin())
    high_shares = (shares["high"].sum(1) / lengths).masked_fill(lengths == 0, -torch.inf)
    sums.add_largest("clip_ratio/high_max", high_shares.amax())


def add_delta_logp(sums: TokenSums, delta_logp: Tensor, mask: Tensor) -> None:
    """Mean, extremes and tails of Δlog p (B, T) where `mask` (B, T); nothing is read elsewhere."""
    kept, count = delta_logp.masked_fill(~mask, 0.0), mask.sum()
    sums.add("delta_logp/mean", kept.sum(), count)
    sums.add(f"delta_logp/below_{LOWERED_BELOW:g}", (kept < LOWERED_BELOW).sum(), count)
    sums.add(f"delta_logp/above_{RAISED_ABOVE:g}", (kept > RAISED_ABOVE).sum(), count)
    sums.add_largest("delta_logp/max", delta_logp.masked_fill(~mask, -torch.inf).amax())
    sums.add_least("delta_logp/min", delta_logp.masked_fill(~mask, torch.inf).amin())
