"""`policy_loss` and `linear_policy_loss`, with all gradients, beside the loss as TRL's trainer writes it.

`trl_loss` is GRPOTrainer._compute_loss, eager, line by line; it has no reweighting, which ours includes, and no
metrics: "TRL with metrics" has those that TRL logs. Of `linear_policy_loss`, "eager" makes float32 logits and derives
that loss by autograd, and the floor is three products of N·V·D.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlogp_kernels import linear_policy_loss, policy_loss

from . import problem
from .floors import bare_products
from .shapes import Shape, Workload
from .timing import Candidate, relative_error

#: The batch of given log-probabilities; and the responses of one from hidden states, N tokens in all.
TOKENS, SHAPE = 64 * 4096, Shape("B=64 T=4096", 0, 0)
SEQUENCES = {"policy_loss": 64, "linear_policy_loss": 8}
LEAVES = ("hidden", "weight")
LIMITS = {"loss": 1e-5, "d_logp": 1e-5}
#: Relative. The eager loss rounds its logits to the dtype of the inputs; ours rounds gradients only.
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


class Loss(NamedTuple):
    """What is computed; the same options by our names and by TRL's."""

    loss_type: str = "dapo"
    importance: str = "token"
    kl_beta: float = 0.0


DAPO = Loss()
LOSSES = {
    "DAPO": DAPO,
    "DAPO, KL to a reference": Loss(kl_beta=0.04),
    "GRPO": Loss("grpo"),
    "GSPO": Loss("grpo", importance="sequence"),
    "CISPO": Loss("cispo"),
    "SAPO": Loss("sapo"),
}


class Batch(NamedTuple):
    """Tokens (B, T) by the names of `policy_loss`'s arguments; advantage (B,)."""

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    mask: Tensor
    ref_logp: Tensor

    def gradient(self, loss: object) -> tuple[Tensor, ...]:
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, [self.logp])


@dataclass(frozen=True)
class Step:
    """Inputs by the names of `linear_policy_loss`'s arguments; hidden (B, T, D)."""

    inputs: Mapping[str, Tensor]

    def gradients(self, loss: object) -> tuple[Tensor, ...]:
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, [self.inputs[name] for name in LEAVES])

    def first(self, sequences: int, exact: bool) -> "Step":
        """The first responses; `exact`: in float64."""

        def few(name: str, x: Tensor) -> Tensor:
            x = x if name == "weight" else x[:sequences]
            if not exact:
                return x
            return (x.detach().double() if x.is_floating_point() else x).requires_grad_(name in LEAVES)

        return Step({name: few(name, x) for name, x in self.inputs.items()})


def build_batch(sequences: int, tokens: int, device: torch.device) -> Batch:
    """Responses of T / 4 to T tokens, the same in every process. logp requires a gradient."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    old_logp = normal(sequences, tokens).abs_().neg_()
    logp = (old_logp + _off_the_edges(0.2 * normal(sequences, tokens), _MARGIN)).requires_grad_()
    lengths = torch.randint(tokens // 4, tokens + 1, (sequences, 1), generator=generator, device=device)
    mask = torch.arange(tokens, device=device) < lengths
    return Batch(logp, old_logp, normal(sequences), mask, logp.detach() + 0.2 * normal(sequences, tokens))


def build_step(work: Workload, device: torch.device) -> Step:
    """Every token counts; old log-probabilities are near the policy's."""
    rows = problem.build(work, device)
    hidden, weight, target = (rows.inputs[name].detach() for name in (*LEAVES, "target"))
    with torch.no_grad():
        logits = [(x @ weight.t()).float() for x in hidden.split(_CHECKED)]
    logp = torch.cat([x.log_softmax(-1) for x in logits]).gather(-1, target[:, None])
    sequences = SEQUENCES["linear_policy_loss"]
    shape = (sequences, work.n // sequences)
    generator = torch.Generator(device).manual_seed(1)
    log_ratio = _off_the_edges(0.2 * torch.randn(shape, generator=generator, device=device), _LINEAR_MARGIN)
    inputs = {
        "hidden": hidden.reshape(*shape, -1).requires_grad_(),
        "weight": weight.requires_grad_(),
        "target": target.reshape(shape),
        "old_logp": logp.reshape(shape) - log_ratio,
        "advantage": torch.randn(sequences, generator=generator, device=device),
        "mask": torch.ones(shape, dtype=torch.bool, device=device),
    }
    return Step(inputs)


def _off_the_edges(log_ratio: Tensor, margin: float) -> Tensor:
    """0 instead of log-ratios within `margin` of where clipping begins."""
    near = torch.stack([(log_ratio - math.log(edge)).abs() < margin for edge in _EDGES]).any(0)
    return log_ratio.masked_fill(near, 0.0)


def trl_loss(batch: Batch, loss: Loss, with_metrics: bool = False) -> Tensor:
    """`with_metrics`: also the clip fractions that TRL logs."""
    logp, old_logp, advantage, mask, ref_logp = batch
    advantages, mask = advantage.unsqueeze(1), mask.to(torch.int64)
    log_ratio = logp - old_logp
    if loss.importance == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if loss.loss_type == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=0.28).detach() * advantages * logp
    elif loss.loss_type == "sapo":
        temperatures = torch.where(advantages > 0, 1.0, 1.05)
        per_token_loss = -torch.sigmoid(temperatures * (coef_1 - 1)) * 4 / temperatures * advantages
    else:
        coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if loss.kl_beta:
        per_token_loss = per_token_loss + loss.kl_beta * (torch.exp(ref_logp - logp) - (ref_logp - logp) - 1)
    if loss.loss_type in ("grpo", "sapo"):
        total = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    else:
        total = (per_token_loss * mask).sum() / mask.sum()
    if with_metrics:
        low, high = (coef_1 < 1 - 0.2) & (advantages < 0), (coef_1 > 1 + 0.28) & (advantages > 0)
        for clipped in (low, high, low | high):
            (clipped.float() * mask).sum() / mask.sum()
            (clipped.float() * mask).sum(-1) / mask.sum(-1)
    return total


def ours(batch: Batch, loss: Loss, reweight: str = "low_prob") -> Tensor:
    return policy_loss(
        *batch[:4], loss_type=loss.loss_type, importance=loss.importance, reweight=reweight, kl_beta=loss.kl_beta,
        ref_logp=batch.ref_logp if loss.kl_beta else None,
    ).loss  # fmt: skip


def linear_ours(step: Step, reweight: str = "low_prob") -> Tensor:
    options: Any = {**step.inputs, "reweight": reweight}
    return linear_policy_loss(**options).loss


def linear_eager(step: Step) -> Tensor:
    inputs = step.inputs
    logits = inputs["hidden"] @ inputs["weight"].t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = logits.log_softmax(-1).gather(-1, inputs["target"][..., None])[..., 0]
    return trl_loss(Batch(logp, inputs["old_logp"], inputs["advantage"], inputs["mask"], logp), DAPO)


def errors_of(function: Callable[[Batch, Loss], Tensor], batch: Batch, loss: Loss) -> dict[str, float]:
    """Relative, against TRL's in float64; without reweighting."""
    exact = Batch(*(x.detach().double() if x.is_floating_point() else x for x in batch))
    exact.logp.requires_grad_()
    truth, found = trl_loss(exact, loss), function(batch, loss)
    (expected,), (gradient,) = exact.gradient(truth), batch.gradient(found)
    return {"loss": _loss_error(found, truth), "d_logp": relative_error(gradient, expected)}


def linear_errors_of(function: Callable[[Step], Tensor], step: Step) -> dict[str, float]:
    """Relative, of the first responses, against eager in float64; without reweighting."""
    mask = step.inputs["mask"]
    sequences = max(1, _CHECKED * mask.shape[0] // mask.numel())
    few, exact = step.first(sequences, exact=False), step.first(sequences, exact=True)
    truth, found = linear_eager(exact), function(few)
    gradients = zip(LEAVES, few.gradients(found), exact.gradients(truth), strict=True)
    return {"loss": _loss_error(found, truth)} | {f"d_{name}": relative_error(x, y) for name, x, y in gradients}


def _loss_error(found: Tensor, truth: Tensor) -> float:
    return abs(found.item() - truth.item()) / max(1.0, abs(truth.item()))


def build(work: Workload, device: torch.device) -> tuple[Batch, Loss]:
    sequences = SEQUENCES["policy_loss"]
    return build_batch(sequences, work.n // sequences, device), LOSSES[work.variant]


def candidates(given: tuple[Batch, Loss]) -> list[Candidate]:
    batch, loss = given

    def candidate(name: str, function: Callable[..., Tensor], **plain: Any) -> Candidate:
        check = partial(errors_of, partial(function, **plain), batch, loss)
        return Candidate(name, partial(function, batch, loss), batch.gradient, check, LIMITS)

    metrics = partial(trl_loss, with_metrics=True)
    return [
        candidate("ours", ours, reweight="none"), candidate("TRL", trl_loss), candidate("TRL with metrics", metrics)
    ]  # fmt: skip


def linear_candidates(step: Step) -> list[Candidate]:
    def candidate(name: str, function: Callable[..., Tensor], **plain: Any) -> Candidate:
        check = partial(linear_errors_of, partial(function, **plain), step)
        return Candidate(name, partial(function, step), step.gradients, check, LINEAR_LIMITS[name])

    return [candidate("ours", linear_ours, reweight="none"), candidate("eager", linear_eager)]


def linear_floor(step: Step) -> list[Candidate]:
    hidden, weight = (step.inputs[name] for name in LEAVES)
    return bare_products([(hidden.flatten(0, 1), weight)], training=True, logits_kept=True)
