"""`policy_loss` and `linear_policy_loss`, with all gradients, beside the loss as TRL's trainer writes it.

`trl_loss` is GRPOTrainer._compute_loss, eager, line by line; it has no reweighting, which ours includes, and no
metrics: "TRL with metrics" has those that TRL logs. Of `linear_policy_loss`, "eager" makes float32 logits and derives
that loss by autograd, and the floor is three products of N·V·D. Each is verified against the definition in float64.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlogp_kernels import linear_policy_loss, policy_loss

from . import problem
from .floors import bare_products
from .problem import Function, Problem
from .shapes import DTYPES, Shape, Workload
from .timing import Candidate

#: The batch of given log-probabilities, its responses' length, and the responses of a batch from hidden states.
TOKENS, SHAPE = 64 * 4096, Shape("B=64 T=4096", 0, 0)
_LENGTH, _LINEAR_RESPONSES = 4096, 8
LEAVES = ("hidden", "weight")
_LIMITS = {"loss": 1e-5, "d_logp": 1e-5}
#: The eager loss rounds its logits to the dtype of the inputs; ours rounds gradients only.
LINEAR_LIMITS = {
    "ours": {"loss": 1e-4, "d_hidden": 0.02, "d_weight": 0.02},
    "eager": {"loss": 0.05, "d_hidden": 0.1, "d_weight": 0.1},
}
#: Ratios at which the gradient of a clipped loss jumps.
_EDGES = (1 - 0.2, 1 + 0.28)
#: Log-ratios so near to an edge are not drawn: there rounding decides between a token's gradient and none, and what is
#: right would now and then be refused for it. Of logits in bfloat16 it is more than they can change log p by, mostly.
_MARGIN, _LINEAR_MARGIN = 1e-4, 0.05
#: Tokens that are compared with float64.
_CHECKED = 64


#: What is computed, by our names; TRL has the same with the same default numbers.
LOSSES: Mapping[str, dict[str, Any]] = {
    "DAPO": {},
    "DAPO, KL to a reference": {"kl_beta": 0.04},
    "GRPO": {"loss_type": "grpo"},
    "GSPO": {"loss_type": "grpo", "importance": "sequence"},
    "CISPO": {"loss_type": "cispo"},
    "SAPO": {"loss_type": "sapo"},
}


class Loss(NamedTuple):
    """What others return, and what is compared of ours."""

    loss: Tensor


def build_batch(sequences: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Tokens (B, T) of responses of T / 4 to T tokens, the same in every process; advantage (B,)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    old_logp = normal(sequences, tokens).abs_().neg_()
    logp = old_logp + _off_the_edges(0.2 * normal(sequences, tokens), _MARGIN)
    lengths = torch.randint(tokens // 4, tokens + 1, (sequences, 1), generator=generator, device=device)
    mask = torch.arange(tokens, device=device) < lengths
    advantage, ref_logp = normal(sequences), logp + 0.2 * normal(sequences, tokens)
    return {"logp": logp, "old_logp": old_logp, "advantage": advantage, "mask": mask, "ref_logp": ref_logp}


def build(work: Workload, device: torch.device) -> Problem:
    sequences, options = max(2, work.n // _LENGTH), LOSSES[work.variant]
    inputs = build_batch(sequences, work.n // sequences, device)
    inputs = {name: x.to(DTYPES[work.dtype]) if x.is_floating_point() else x for name, x in inputs.items()}
    inputs["logp"].requires_grad_()
    if not options.get("kl_beta"):
        del inputs["ref_logp"]
    return Problem(work, inputs, options, ("logp",), {"loss": torch.ones((), device=device)})


def build_linear(work: Workload, device: torch.device) -> Problem:
    """Every token counts; old log-probabilities are near the policy's."""
    rows = problem.build(work, device)
    hidden, weight, target = (rows.inputs[name].detach() for name in (*LEAVES, "target"))
    logits = [(x @ weight.t()).float() for x in hidden.split(_CHECKED)]
    logp = torch.cat([x.log_softmax(-1) for x in logits]).gather(-1, target[:, None])
    shape = (_LINEAR_RESPONSES, work.n // _LINEAR_RESPONSES)
    generator = torch.Generator(device).manual_seed(1)
    log_ratio = _off_the_edges(0.2 * torch.randn(shape, generator=generator, device=device), _LINEAR_MARGIN)
    inputs = {
        "hidden": hidden.reshape(*shape, -1).requires_grad_(),
        "weight": weight.requires_grad_(),
        "target": target.reshape(shape),
        "old_logp": logp.reshape(shape) - log_ratio,
        "advantage": torch.randn(_LINEAR_RESPONSES, generator=generator, device=device),
        "mask": torch.ones(shape, dtype=torch.bool, device=device),
    }
    made = Problem(work, inputs, {}, LEAVES, {"loss": torch.ones((), device=device)})
    few = max(1, _CHECKED * _LINEAR_RESPONSES // work.n)
    first = {name: x if name == "weight" else x.detach()[:few] for name, x in inputs.items()}
    first["hidden"].requires_grad_()
    return replace(made, part=replace(made, inputs=first))


def _off_the_edges(log_ratio: Tensor, margin: float) -> Tensor:
    """0 instead of log-ratios within `margin` of where clipping begins."""
    near = torch.stack([(log_ratio - math.log(edge)).abs() < margin for edge in _EDGES]).any(0)
    return log_ratio.masked_fill(near, 0.0)


def trl_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, ref_logp: Tensor | None = None, *,
    loss_type: str = "dapo", importance: str = "token", kl_beta: float = 0.0, reweight: str = "none",
    with_metrics: bool = False,
) -> Loss:  # fmt: skip
    """`with_metrics`: also the clip fractions that TRL logs."""
    assert reweight == "none"
    advantages, mask = advantage.unsqueeze(1), mask.to(torch.int64)
    log_ratio = logp - old_logp
    if importance == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if loss_type == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=0.28).detach() * advantages * logp
    elif loss_type == "sapo":
        temperatures = torch.where(advantages > 0, 1.0, 1.05)
        per_token_loss = -torch.sigmoid(temperatures * (coef_1 - 1)) * 4 / temperatures * advantages
    else:
        coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if ref_logp is not None:
        per_token_loss = per_token_loss + kl_beta * (torch.exp(ref_logp - logp) - (ref_logp - logp) - 1)
    if loss_type in ("grpo", "sapo"):
        total = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    else:
        total = (per_token_loss * mask).sum() / mask.sum()
    if with_metrics:
        low, high = (coef_1 < 1 - 0.2) & (advantages < 0), (coef_1 > 1 + 0.28) & (advantages > 0)
        for clipped in (low, high, low | high):
            (clipped.float() * mask).sum() / mask.sum()
            (clipped.float() * mask).sum(-1) / mask.sum(-1)
    return Loss(total)


def eager(
    hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, **options: Any
) -> Loss:
    logits = (hidden @ weight.t()).float()
    logp = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return trl_loss(logp, old_logp, advantage, mask, **options)


def _loss_of(function: Function) -> Function:
    return lambda **given: Loss(function(**given).loss)


def as_others(given: Problem) -> Problem:
    """The same without reweighting, which others have not."""
    part = None if given.part is None else as_others(given.part)
    return replace(given, options={**given.options, "reweight": "none"}, part=part)


def candidates(given: Problem) -> list[Candidate]:
    others: dict[str, Function] = {"TRL": trl_loss, "TRL with metrics": partial(trl_loss, with_metrics=True)}
    return [
        given.candidate("ours", _loss_of(policy_loss), _LIMITS),
        *(as_others(given).candidate(name, function, _LIMITS) for name, function in others.items()),
    ]


def linear_candidates(given: Problem) -> list[Candidate]:
    return [
        given.candidate("ours", _loss_of(linear_policy_loss), LINEAR_LIMITS["ours"]),
        as_others(given).candidate("eager", eager, LINEAR_LIMITS["eager"]),
    ]


def linear_floor(given: Problem) -> list[Candidate]:
    hidden, weight = (given.inputs[name] for name in LEAVES)
    return bare_products([(hidden.flatten(0, 1), weight)], training=True, logits_kept=True)
