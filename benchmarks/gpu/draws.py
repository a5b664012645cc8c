"""Whether a sampler drew what the definition draws from the same noise, in float64."""

import math
from typing import Any

import torch
from torch import Tensor

from dlogp_kernels import reference_sample

from ..harness import WrongResultError

_DEFAULTS: dict[str, Any] = {
    "gamma": 0.0,
    "criterion": "all",
    "threshold": None,
    "draft": "base",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
}


def check_draws(
    drawn: Any, z: Tensor, base_z: Tensor, *, seed: int, step: int, slack: float, options: dict[str, Any]
) -> tuple[int, float]:
    """How many rows drew another token of a score that is equal within `slack`, and the largest error of log p.

    Raises WrongResultError for any other token. z and base_z (B, V) are logits in float64.
    """
    chosen = _DEFAULTS | options
    row_id = torch.arange(z.shape[0], device=z.device)
    noise = (torch.tensor([seed], device=z.device), torch.tensor([step], device=z.device))
    truth = reference_sample.extrapolated_sample(z, base_z, row_id, *noise, **chosen)
    drafted = base_z if chosen["draft"] == "base" else z
    replacing = reference_sample.extrapolated_logits(z, base_z, chosen["gamma"])
    ties = 0
    for row in range(z.shape[0]):
        same_selection = bool(drawn.selected[row] == truth.selected[row])
        for name, logits, stream in (
            ("draft_token", drafted, reference_sample.DRAFT),
            ("token", replacing if drawn.selected[row] else drafted, int(drawn.selected[row])),
        ):
            token = int(getattr(drawn, name)[row])
            if token == int(getattr(truth, name)[row]):
                continue
            if not 0 <= token < z.shape[1]:
                raise WrongResultError(f"row {row}: {name} is {token}, expected a token in [0, {z.shape[1]})")
            size = (1 + 2 * chosen["gamma"]) * slack
            gap = _gap(logits[row], token, stream, row_id[row : row + 1], noise, chosen, size)
            if not gap <= size * max(1.0, logits[row].abs().max().item()):
                expected = int(getattr(truth, name)[row])
                raise WrongResultError(
                    f"row {row}: {name} is {token}, expected {expected}, which scores {gap:.2g} more"
                )
            ties += 1
        ties += not same_selection
    if ties > 0.1 * z.shape[0] + 1:
        raise WrongResultError(f"{ties} of {z.shape[0]} rows drew other tokens, all of them ties: expected hardly any")
    return ties, _largest_error(drawn, z, base_z, slack)


def _gap(
    z: Tensor,
    token: int,
    stream: int,
    row_id: Tensor,
    noise: tuple[Tensor, Tensor],
    chosen: dict[str, Any],
    slack: float,
) -> float:
    """How much more than `token` another one scores; infinite if a filter cuts it off even when a little looser."""
    temperature = chosen["temperature"]
    if temperature == 0.0:
        return (z.max() - z[token]).item()
    scaled = z[None] / temperature
    top_p, min_p, top_k = chosen["top_p"], chosen["min_p"], chosen["top_k"]
    loose = reference_sample.kept_tokens(
        scaled, top_k + 1 if top_k else 0, min(1.0, top_p + slack), max(0.0, min_p * (1 - slack))
    )
    if not loose[0, token]:
        return math.inf
    strict = reference_sample.kept_tokens(
        scaled, max(1, top_k - 1) if top_k else 0, top_p if top_p == 1.0 else top_p - slack, min_p * (1 + slack)
    )
    tokens = torch.arange(z.shape[0], device=z.device)
    bits = reference_sample.noise_bits(tokens, row_id, *noise, stream)
    score = (scaled + reference_sample.gumbel(bits, torch.float64))[0]
    return (score.masked_fill(~strict[0], -torch.inf).max() - score[token]).item()


def _largest_error(drawn: Any, z: Tensor, base_z: Tensor, slack: float) -> float:
    """Of log p of the tokens that were drawn, which has to be within `slack` of float64."""
    largest = 0.0
    for name, logits in (("logp", z), ("base_logp", base_z)):
        truth = logits.log_softmax(-1).gather(-1, drawn.token[:, None])[:, 0]
        error = ((getattr(drawn, name).double() - truth).abs() / truth.abs().clamp_min(1.0)).max().item()
        if not error <= slack:
            raise WrongResultError(f"{name} is off by {error:.2e}, expected at most {slack:.0e}")
        largest = max(largest, error)
    return largest
