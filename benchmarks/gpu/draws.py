"""Whether a sampler drew what the definition draws from the same noise, in float64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlogp_kernels import Sample, reference_sample

from ..harness import WrongResultError

_DEFAULTS: dict[str, Any] = {
    "gamma": 0.0, "criterion": "all", "threshold": None, "draft": "base", "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    "min_p": 0.0,
}  # fmt: skip


def check_draws(
    drawn: Sample, inputs: Mapping[str, Tensor], seed: int, options: dict[str, Any], limit: float
) -> dict[str, float]:
    """Errors of log p; raises WrongResultError where a token is another one, or log p is off by more than `limit`.

    `inputs` are those of `extrapolated_sample` or `linear_extrapolated_sample`. Rounding changes a token in one row of
    thousands, so few rows are compared token for token.
    """
    z, base_z = (_logits(inputs, prefix) for prefix in ("", "base_"))
    rows = torch.arange(z.shape[0], device=z.device)
    noise = (torch.tensor([seed], device=z.device), torch.zeros_like(rows[:1]))
    truth = reference_sample.extrapolated_sample(z, base_z, rows, *noise, **_DEFAULTS | options)
    for name in ("draft_token", "selected", "token"):
        found, expected = getattr(drawn, name), getattr(truth, name)
        other = (found != expected).nonzero().flatten().tolist()
        if other:
            example = f"row {other[0]} has {found[other[0]].item()}, expected {expected[other[0]].item()}"
            raise WrongResultError(f"{name}: {len(other)} of {len(rows)} rows differ; {example}")
    errors = {
        name: ((getattr(drawn, name) - getattr(truth, name)).abs().max() / z.abs().max().clamp_min(1.0)).item()
        for name in ("logp", "base_logp", "delta_logp")
    }
    if not max(errors.values()) <= limit:
        raise WrongResultError(f"off by more than {limit:.0e} of the largest logit: {errors}")
    return errors


def _logits(inputs: Mapping[str, Tensor], prefix: str) -> Tensor:
    if f"{prefix}logits" in inputs:
        return inputs[f"{prefix}logits"].double()
    return inputs[f"{prefix}hidden"].double() @ inputs[f"{prefix}weight"].double().t()
