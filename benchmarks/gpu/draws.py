"""Whether a sampler drew what the definition draws from the same noise, in float64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlogp_kernels import Sample, reference_sample

from ..harness import WrongResultError
from .child import Entry

_DEFAULTS: dict[str, Any] = {
    "gamma": 0.0, "criterion": "all", "threshold": None, "draft": "base", "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    "min_p": 0.0,
}  # fmt: skip


def check_draws(drawn: Sample, inputs: Mapping[str, Tensor], seed: int, options: dict[str, Any], limit: float) -> Entry:
    """Raises WrongResultError where a token is another one that does not score the same within `limit`.

    `inputs` are those of `extrapolated_sample` or `linear_extrapolated_sample`. Ties are rare: hardly any may differ.
    """
    z, base_z = (_logits(inputs, prefix) for prefix in ("", "base_"))
    tokens = torch.stack([drawn.token, drawn.draft_token], -1)
    outside = ((tokens < 0) | (tokens >= z.shape[1])).any(-1).nonzero()
    if len(outside):
        raise WrongResultError(f"row {int(outside[0])} draws a token outside [0, {z.shape[1]})")
    chosen = _DEFAULTS | options
    rows = torch.arange(z.shape[0], device=z.device)
    noise = (torch.tensor([seed], device=z.device), torch.zeros_like(rows[:1]))
    truth = reference_sample.extrapolated_sample(z, base_z, rows, *noise, **chosen)
    other = (drawn.token != truth.token) | (drawn.draft_token != truth.draft_token) | (drawn.selected != truth.selected)
    if other.sum() > 1 + 0.05 * len(rows):
        raise WrongResultError(f"{int(other.sum())} of {len(rows)} rows draw another token than the definition")
    replacing = reference_sample.extrapolated_logits(z, base_z, chosen["gamma"])
    for row in other.nonzero().flatten().tolist():
        streams = {"draft_token": (base_z if chosen["draft"] == "base" else z, reference_sample.DRAFT)}
        if truth.selected[row]:
            streams["token"] = (replacing, reference_sample.REPLACEMENT)
        for name, (logits, stream) in streams.items():
            found, expected = (int(getattr(sample, name)[row]) for sample in (drawn, truth))
            scores = _scores(logits[row], rows[row : row + 1], noise, stream, chosen["temperature"])
            gap = (scores[expected] - scores[found]).abs().item()
            if not gap <= limit * (1 + 2 * chosen["gamma"]) * max(1.0, logits[row].abs().max().item()):
                raise WrongResultError(f"row {row}: {name} is {found}, expected {expected}, {gap:.2g} away in score")
    errors = {
        name: (getattr(drawn, name) - logits.log_softmax(-1).gather(-1, drawn.token[:, None])[:, 0]).abs().max().item()
        for name, logits in (("logp", z), ("base_logp", base_z))
    }
    for name, error in errors.items():
        if not error <= limit * max(1.0, z.abs().max().item()):
            raise WrongResultError(f"{name} is off by {error:.2e}, expected at most {limit:.0e} of the largest logit")
    return {"error_of": errors, "largest": max(errors.values()), "ties": int(other.sum())}


def _logits(inputs: Mapping[str, Tensor], prefix: str) -> Tensor:
    if f"{prefix}logits" in inputs:
        return inputs[f"{prefix}logits"].double()
    return inputs[f"{prefix}hidden"].double() @ inputs[f"{prefix}weight"].double().t()


def _scores(z: Tensor, row_id: Tensor, noise: tuple[Tensor, Tensor], stream: int, temperature: float) -> Tensor:
    """What the largest of is drawn, of one row (V,), without filters."""
    if temperature == 0.0:
        return z
    bits = reference_sample.noise_bits(torch.arange(len(z), device=z.device), row_id, *noise, stream)
    return z / temperature + reference_sample.gumbel(bits, torch.float64)[0]
