"""A step of selective replacement from two models' logits, or hidden states, beside other ways to draw.

- eager: all of a call in plain PyTorch, with a sort for each draw that a filter needs;
- warpers: one draw from the extrapolated logits by the warpers of `transformers`, softmax and `torch.multinomial`; no
  draft, no criterion;
- logits: from hidden states, the products of both models, made float32, then `extrapolated_sample`.

Ours are verified token for token against the definition in float64; what others draw must not be a token that the
filter excludes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import Sample
from dlogp_kernels.reference import sampling as reference_sample

from . import problem
from .floors import bare_products
from .problem import Problem, float64_logits
from .shapes import Workload
from .timing import OURS, Candidate, NotMeasuredError, WrongResultError, verify

GAMMA, THRESHOLD = 0.1, -0.3
_OPTIONS: Mapping[str, Any] = {"gamma": GAMMA, "criterion": "delta_logp", "threshold": THRESHOLD, "seed": 1}
#: The most that a call can have to do: every row draws twice.
_ALL_REPLACED: Mapping[str, Any] = {"gamma": GAMMA, "seed": 1}
#: By the variant of a workload: none, that of the paper's evaluation, and others of transformers.
FILTERS: Mapping[str, dict[str, Any]] = {
    "": {},
    "top-p 0.7": {"top_p": 0.7},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
}
_NO_FILTERS: Mapping[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
_DEFAULTS = {"gamma": 0.0, "criterion": "all", "threshold": None, "draft": "base", "temperature": 1.0, **_NO_FILTERS}
#: Rows that are compared token for token: rounding changes a token in one of thousands.
_CHECKED_ROWS = 16
#: By so much a filter is moved before a token counts as excluded: a sum of float32 probabilities has an error.
_SLACK = 1e-3


def build(work: Workload, device: torch.device) -> Problem:
    """Logits (B, V), or hidden states and weights, of two models that are near one another; options are filters."""
    given = problem.build(work, device)
    inputs = {name: x for name, x in given.inputs.items() if name != "target"}
    return Problem(work, inputs, FILTERS[work.variant])


def _logits(draws: Problem) -> list[Tensor]:
    """Of both models, float32."""
    given = [*draws.inputs.values()]
    if draws.work.linear:
        given = [given[0] @ given[1].t(), given[2] @ given[3].t()]
    return [logits.float() for logits in given]


def _first_rows(draws: Problem) -> dict[str, Tensor]:
    return {name: x if "weight" in name else x[:_CHECKED_ROWS] for name, x in draws.inputs.items()}


def ours(draws: Problem, options: Mapping[str, Any] = _OPTIONS) -> Sample:
    return draws.call(partial(getattr(dlogp_kernels, draws.work.op), **options))


def from_logits(draws: Problem) -> Sample:
    logits, base_logits = _logits(draws)
    return dlogp_kernels.extrapolated_sample(logits, base_logits, **_OPTIONS, **draws.options)


def eager(draws: Problem) -> Tensor:
    logits, base_logits = _logits(draws)
    draft = _draw(base_logits, **draws.options)
    logp, base_logp = (x.log_softmax(-1).gather(-1, draft[:, None])[:, 0] for x in (logits, base_logits))
    replacement = _draw((1 + GAMMA) * logits - GAMMA * base_logits, **draws.options)
    return torch.where(logp - base_logp < THRESHOLD, replacement, draft)


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


def warpers(draws: Problem) -> Tensor:
    try:
        from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper  # which no GPU needs
    except ModuleNotFoundError as error:
        raise NotMeasuredError(f"not installed: {error.name}") from error

    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    logits, base_logits = _logits(draws)
    scores = (1 + GAMMA) * logits - GAMMA * base_logits
    for name, value in draws.options.items():
        scores = kinds[name](value)(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def of_ours(draws: Problem, name: str, options: Mapping[str, Any]) -> Candidate:
    def check() -> dict[str, float]:
        few = _first_rows(draws)
        drawn, limit = Sample(*(x[:_CHECKED_ROWS] for x in ours(draws, options))), OURS["output"]
        if not drawn.token.is_cuda:  # whose tensor cores truncate their sums
            limit /= float64_logits(few, "").abs().max().clamp_min(1.0).item()
        return check_draws(drawn, few, {**options, **draws.options}, limit)

    return Candidate(name, lambda: ours(draws, options), check=check, limits=OURS)


def candidates(draws: Problem) -> list[Candidate]:
    def other(name: str, draw: Callable[[Problem], Tensor]) -> Candidate:
        excluded = lambda: _excluded(draw(draws), draws)  # noqa: E731
        return Candidate(name, partial(draw, draws), check=excluded, limits={"output": 0.0})

    found = [of_ours(draws, "ours", _OPTIONS), of_ours(draws, "ours, all replaced", _ALL_REPLACED)]
    found.append(other("eager", eager))
    if not draws.work.linear:
        return [*found, other("warpers", warpers)]
    # Its logits are rounded to the inputs' dtype, which changes tokens: it is not checked.
    return [*found, Candidate("logits", partial(from_logits, draws))]


def floor(draws: Problem) -> list[Candidate]:
    if not draws.work.linear:
        return []
    pairs = [(draws.inputs[f"{x}hidden"], draws.inputs[f"{x}weight"]) for x in ("", "base_")]
    return bare_products(pairs, training=False)


def _excluded(tokens: Tensor, draws: Problem) -> dict[str, float]:
    """The share of some rows' tokens that the filters, a little looser, exclude from what may be drawn."""
    filters = {**_NO_FILTERS, **draws.options}
    filters["top_k"] += 1 if filters["top_k"] else 0
    filters["top_p"], filters["min_p"] = min(1.0, filters["top_p"] + _SLACK), filters["min_p"] * (1 - _SLACK)
    few = _first_rows(draws)
    logits, base_logits = (float64_logits(few, prefix) for prefix in ("", "base_"))
    scores = (base_logits, logits, (1 + GAMMA) * logits - GAMMA * base_logits)
    allowed = torch.stack([reference_sample.kept_tokens(x, **filters) for x in scores]).any(0)
    return {"excluded token": (~allowed.gather(-1, tokens[: len(allowed), None].long())).double().mean().item()}


def check_draws(drawn: Sample, inputs: Mapping[str, Tensor], options: dict[str, Any], limit: float) -> dict[str, float]:
    """Errors of log p of all rows of `inputs`, whose numbers begin at 0.

    Raises WrongResultError where a token is another one than the definition's, or log p is off by more than `limit`.
    """
    z, base_z = (float64_logits(inputs, prefix) for prefix in ("", "base_"))
    chosen = _DEFAULTS | options
    seed, step = (torch.tensor([value], device=z.device) for value in (chosen.pop("seed"), 0))
    rows = torch.arange(z.shape[0], device=z.device)
    truth = reference_sample.extrapolated_sample(z, base_z, rows, seed, step, **chosen)
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
