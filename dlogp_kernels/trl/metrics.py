"""Means over the tokens of all processes, for the log."""

import math
from dataclasses import dataclass, field

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


@dataclass
class TokenSums:
    """Sums over tokens of this process, each with the number of tokens, and extremes: −inf or +inf where there are no
    tokens."""

    totals: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    least: dict[str, Tensor] = field(default_factory=dict)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and extremes over the tokens of all processes, of what there are tokens of."""
        pairs = torch.stack([torch.stack([total.float(), count.float()]) for total, count in self.totals.values()])
        totals = accelerator.reduce(pairs, reduction="sum").tolist()
        values = {name: total / count for name, (total, count) in zip(self.totals, totals, strict=True) if count}
        extremes = self.largest | {name: -value for name, value in self.least.items()}
        if extremes:
            gathered = accelerator.gather(torch.stack([value.float() for value in extremes.values()])[None])
            for name, value in zip(extremes, gathered.amax(0).tolist(), strict=True):
                if math.isfinite(value):
                    values[name] = -value if name in self.least else value
        return values


def policy_sums(metrics: PolicyMetrics, count: Tensor, *, reweighted: bool, kl: bool) -> TokenSums:
    """What the loss says about its `count` tokens: its weights if it has `reweighted` the advantages, a divergence from
    the reference model if there is `kl`."""
    sums = TokenSums()
    for metric, name in _NAMES.items():
        if {"mean_weight": reweighted, "ref_kl": kl}.get(metric, True):
            sums.totals[name] = getattr(metrics, metric) * count, count
    sums.largest["ratio/max"] = metrics.max_ratio
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
        sums.totals[f"clip_ratio/{name}_mean"] = places.sum(), total
    if cispo:
        sums.totals["cispo_clip_ratio"] = shares["high"].sum(), total
    sums.least["clip_ratio/low_min"] = (shares["low"].sum(1) / lengths).masked_fill(lengths == 0, torch.inf).amin()
    high_shares = (shares["high"].sum(1) / lengths).masked_fill(lengths == 0, -torch.inf)
    sums.largest["clip_ratio/high_max"] = high_shares.amax()


def add_delta_logp(sums: TokenSums, delta_logp: Tensor, mask: Tensor) -> None:
    """Mean, extremes and tails of Δlog p (B, T) where `mask` (B, T); nothing is read elsewhere."""
    kept, count = delta_logp.masked_fill(~mask, 0.0), mask.sum()
    sums.totals["delta_logp/mean"] = kept.sum(), count
    sums.totals[f"delta_logp/below_{LOWERED_BELOW:g}"] = (kept < LOWERED_BELOW).sum(), count
    sums.totals[f"delta_logp/above_{RAISED_ABOVE:g}"] = (kept > RAISED_ABOVE).sum(), count
    sums.largest["delta_logp/max"] = delta_logp.masked_fill(~mask, -torch.inf).amax()
    sums.least["delta_logp/min"] = delta_logp.masked_fill(~mask, torch.inf).amin()
