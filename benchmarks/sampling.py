"""What the benchmarks of sampling share: a pair's logits, what one call draws from them, and other ways to draw it.

- eager: all of a call in plain PyTorch, with a sort for each draw;
- warpers: one draw from the extrapolated logits by the warpers of `transformers`, softmax and `torch.multinomial`; no
  draft, no criterion;
- numpy: the authors' loop over rows, on all log-probabilities instead of the 50 largest: draft, Δlog p, replacement.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlogp_kernels import Sample, extrapolated_sample
from dlogp_kernels.reference import sampling as reference_sample

from .harness import NotMeasuredError, WrongResultError, verify
from .shapes import DTYPES, Workload

GAMMA, THRESHOLD, SEED = 0.1, -0.3, 1
#: By the variant of a workload: none, that of the paper's evaluation, and others of transformers.
FILTERS: Mapping[str, dict[str, Any]] = {
    "no truncation": {},
    "top-p 0.7": {"top_p": 0.7},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
}
NO_FILTERS: Mapping[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
_DEFAULTS = {"gamma": 0.0, "criterion": "all", "threshold": None, "draft": "base", "temperature": 1.0, **NO_FILTERS}
#: Largest |error| of a log-probability, and share of the checked rows that may have another token than the definition,
#: or one that a filter excludes.
TOLERANCES = {"logp": 1e-4, "base_logp": 1e-4, "delta_logp": 2e-4, "other token": 0.0, "excluded token": 0.0}

_STD, _BASE_NOISE = 3.0, 0.3
_CHECKED_ROWS = 16
#: By so much a filter is moved before a token counts as excluded: a sum of float32 probabilities has an error.
_SLACK = 1e-3

Draw = Callable[["Draws"], Any]


@dataclass(frozen=True)
class Draws:
    """Logits (B, V) of two models that are near one another."""

    work: Workload
    logits: Tensor
    base_logits: Tensor

    @property
    def filters(self) -> dict[str, Any]:
        return FILTERS[self.work.variant]

    def checked(self) -> tuple[Tensor, "Draws"]:
        """Rows that are compared with the definition: their numbers, and themselves in float64."""
        rows = torch.linspace(0, self.work.n - 1, min(self.work.n, _CHECKED_ROWS), device=self.logits.device).long()
        return rows, Draws(self.work, self.logits[rows].double(), self.base_logits[rows].double())


def build(work: Workload, device: torch.device) -> Draws:
    """Logits of standard deviation 3, the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    size = (work.n, work.shape.v)
    logits = torch.randn(size, generator=generator, device=device) * _STD
    base_logits = logits + torch.randn(size, generator=generator, device=device) * (_STD * _BASE_NOISE)
    dtype = DTYPES[work.dtype]
    return Draws(work, logits.to(dtype), base_logits.to(dtype))


def ours(draws: Draws) -> Sample:
    return extrapolated_sample(
        draws.logits, draws.base_logits, gamma=GAMMA, criterion="delta_logp", threshold=THRESHOLD, seed=SEED,
        **draws.filters,
    )  # fmt: skip


def ours_all_replaced(draws: Draws) -> Sample:
    """The most that a call can have to do: every row draws twice."""
    return extrapolated_sample(draws.logits, draws.base_logits, gamma=GAMMA, seed=SEED, **draws.filters)


def ours_one_model(draws: Draws) -> Sample:
    """Ordinary sampling from the RL model."""
    return extrapolated_sample(
        draws.logits, draws.logits, criterion="none", draft="rl", seed=SEED, **draws.filters
    )  # fmt: skip


#: Of each form of ours, what the definition takes instead of its defaults, and whether both models are the RL one.
_OPTIONS: Mapping[Draw, tuple[dict[str, Any], bool]] = {
    ours: ({"gamma": GAMMA, "criterion": "delta_logp", "threshold": THRESHOLD}, False),
    ours_all_replaced: ({"gamma": GAMMA}, False),
    ours_one_model: ({"criterion": "none", "draft": "rl"}, True),
}


def eager(draws: Draws) -> Tensor:
    return eager_pair(draws.logits, draws.base_logits, **draws.filters)


def eager_pair(logits: Tensor, base_logits: Tensor, **filters: Any) -> Tensor:
    logits, base_logits = logits.float(), base_logits.float()
    draft = _draw(base_logits, **filters)
    logp, base_logp = (x.log_softmax(-1).gather(-1, draft[:, None])[:, 0] for x in (logits, base_logits))
    replacement = _draw((1 + GAMMA) * logits - GAMMA * base_logits, **filters)
    return torch.where(logp - base_logp < THRESHOLD, replacement, draft)


def eager_one_model(draws: Draws) -> Tensor:
    return _draw(draws.logits.float(), **draws.filters)


def _draw(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Tokens (B,): p over an exponential number is largest with probability p, so nothing has to be summed."""
    p = logits.softmax(-1)
    if not (top_k or top_p < 1.0 or min_p):
        return (p / torch.empty_like(p).exponential_()).argmax(-1)
    p, order = p.sort(-1, descending=True)
    kept = p.cumsum(-1) - p < top_p
    if top_k:
        kept &= torch.arange(p.shape[-1], device=p.device) < top_k
    if min_p:
        kept &= p >= min_p * p[:, :1]
    place = (p.masked_fill(~kept, 0.0) / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
    return order.gather(-1, place)[:, 0]


def warpers(draws: Draws) -> Tensor:
    try:
        from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    except ModuleNotFoundError as error:
        raise NotMeasuredError(f"not installed: {error.name}") from error
    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    scores = (1 + GAMMA) * draws.logits - GAMMA * draws.base_logits
    for warper in (TemperatureLogitsWarper(1.0), *(kinds[name](value) for name, value in draws.filters.items())):
        scores = warper(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def in_numpy(draws: Draws) -> Tensor:
    logp, base_logp = (_log_softmax(x.cpu().numpy()) for x in (draws.logits, draws.base_logits))
    generator = np.random.default_rng(0)
    rows = zip(logp, base_logp, strict=True)
    return torch.tensor([_row_in_numpy(row, base_row, draws.filters, generator) for row, base_row in rows])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _row_in_numpy(
    logp: np.ndarray, base_logp: np.ndarray, filters: dict[str, Any], generator: np.random.Generator
) -> int:
    token = _draw_in_numpy(base_logp, filters, generator)
    if logp[token] - base_logp[token] < THRESHOLD:
        token = _draw_in_numpy((1 + GAMMA) * logp - GAMMA * base_logp, filters, generator)
    return token


def _draw_in_numpy(scores: np.ndarray, filters: dict[str, Any], generator: np.random.Generator) -> int:
    p = np.exp(scores.astype(np.float64) - scores.max())
    p /= p.sum()
    order = np.argsort(-p)
    ordered = p[order]
    kept = np.ones(len(p), dtype=bool)
    if "top_k" in filters:
        kept[filters["top_k"] :] = False
    if "top_p" in filters:
        kept &= np.cumsum(ordered) - ordered < filters["top_p"]
    if "min_p" in filters:
        kept &= ordered >= filters["min_p"] * ordered[0]
    ordered = np.where(kept, ordered, 0.0)
    return int(order[generator.choice(len(p), p=ordered / ordered.sum())])


def errors_of(draw: Draw, draws: Draws, *, one_model: bool = False) -> dict[str, float]:
    """How far one call is from what is right, on some rows, by the names of TOLERANCES.

    A form of ours: from the definition in float64, token for token (rounding could only change one at a tie). Others
    have noise of their own: a token that the filters exclude is wrong; `one_model` says that they look at the RL model
    alone.
    """
    rows, exact = draws.checked()
    drawn = draw(draws)
    if draw in _OPTIONS:
        return _errors_of_ours(drawn, rows, exact, *_OPTIONS[draw])
    tokens = drawn.to(rows.device)[rows].long()
    allowed = torch.zeros_like(exact.logits, dtype=torch.bool)
    extrapolated = (1 + GAMMA) * exact.logits - GAMMA * exact.base_logits
    for scores in (exact.logits,) if one_model else (exact.base_logits, exact.logits, extrapolated):
        allowed |= reference_sample.kept_tokens(scores, **_moved(draws.filters))
    excluded = ~allowed.gather(-1, tokens[:, None])
    return {"excluded token": excluded.double().mean().item()}


def _errors_of_ours(
    drawn: Sample, rows: Tensor, exact: Draws, options: dict[str, Any], one_model: bool
) -> dict[str, float]:
    base_logits = exact.logits if one_model else exact.base_logits
    truth = _definition(exact.logits, base_logits, rows, seed=SEED, **exact.filters, **options)
    errors = {
        name: (getattr(drawn, name)[rows] - getattr(truth, name)).abs().max().item()
        for name in ("logp", "base_logp", "delta_logp")
    }
    return errors | {"other token": (drawn.token[rows] != truth.token).double().mean().item()}


def _definition(logits: Tensor, base_logits: Tensor, rows: Tensor, seed: int, **options: Any) -> Sample:
    """Of rows with these numbers, at step 0."""
    seeds, steps = (torch.tensor([value], device=rows.device) for value in (seed, 0))
    return reference_sample.extrapolated_sample(logits, base_logits, rows, seeds, steps, **(_DEFAULTS | options))


def _moved(filters: dict[str, Any]) -> dict[str, Any]:
    """The filters, a little looser."""
    moved = dict(NO_FILTERS) | filters
    top_k = moved["top_k"] + 1 if moved["top_k"] else 0
    return {"top_k": top_k, "top_p": min(1.0, moved["top_p"] + _SLACK), "min_p": moved["min_p"] * (1 - _SLACK)}


def check_draws(drawn: Sample, inputs: Mapping[str, Tensor], options: dict[str, Any], limit: float) -> dict[str, float]:
    """Errors of log p; raises WrongResultError where a token is another one, or log p is off by more than `limit`.

    Rounding changes a token in one row of thousands, so few rows are compared token for token.
    """

    def logits(prefix: str) -> Tensor:
        if f"{prefix}logits" in inputs:
            return inputs[f"{prefix}logits"].double()
        return inputs[f"{prefix}hidden"].double() @ inputs[f"{prefix}weight"].double().t()

    z, base_z = logits(""), logits("base_")
    truth = _definition(z, base_z, torch.arange(z.shape[0], device=z.device), **options)
    for name in ("draft_token", "selected", "token"):
        found, expected = getattr(drawn, name), getattr(truth, name)
        for row in (found != expected).nonzero().flatten().tolist():
            raise WrongResultError(f"row {row}: {name} is {found[row].item()}, expected {expected[row].item()}")
    errors = {
        name: ((getattr(drawn, name) - getattr(truth, name)).abs().max() / z.abs().max().clamp_min(1.0)).item()
        for name in ("logp", "base_logp", "delta_logp")
    }
    verify("per largest logit", errors, dict.fromkeys(errors, limit))
    return errors
