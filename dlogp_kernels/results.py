"""What the functions return. `base_` marks the base model; the unmarked one is the RL model or the policy.

LogpStats and DeltaLogpStats are also the table by which ops declare, allocate and save their statistics.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor


class Shape(Enum):
    """Of a statistic inside an op, for target (N, K)."""

    TARGET = "(N, K)"
    ROW = "(N,)"


PerTarget = Annotated[Tensor, Shape.TARGET]
PerRow = Annotated[Tensor, Shape.ROW]


class LogpStats(NamedTuple):
    """Statistics of one model's next-token distribution, in nats.

    `logp` has the shape of the target; `entropy` and `lse` have its leading shape (without candidates).
    """

    logp: PerTarget
    entropy: PerRow
    lse: PerRow


class DeltaLogpStats(NamedTuple):
    """Statistics of a pair of models at the same positions, in nats.

    `delta_logp`, `logp` and `base_logp` have the shape of the target; the rest have its leading shape.
    `kl` is KL(model ‖ base), `reverse_kl` is KL(base ‖ model).
    """

    delta_logp: PerTarget
    logp: PerTarget
    base_logp: PerTarget
    entropy: PerRow
    base_entropy: PerRow
    kl: PerRow
    reverse_kl: PerRow
    lse: PerRow
    base_lse: PerRow


_Stats = TypeVar("_Stats", LogpStats, DeltaLogpStats)


@functools.cache
def shapes(kind: Any) -> tuple[Shape, ...]:
    """Of each field of LogpStats or DeltaLogpStats."""
    return tuple(hint.__metadata__[0] for hint in get_type_hints(kind, include_extras=True).values())


def allocated(kind: Any, target: Tensor, new: Callable[..., Tensor], **options: Any) -> Any:
    """A `kind` of tensors, each from new(its shape, **options), for target (N, K)."""
    per_target, per_row = target.shape, target.shape[:1]
    return kind(*[new(per_target if shape is Shape.TARGET else per_row, **options) for shape in shapes(kind)])


def stats_of(kind: type[_Stats], outputs: Sequence[Tensor], rows: Tensor, target: Tensor) -> _Stats:
    """What the function returns of an op's outputs, which end in what is for backward alone."""
    return kind(*shaped(outputs[: len(kind._fields)], rows, target))


def shaped(values: Iterable[Tensor], rows: Tensor, target: Tensor | None = None) -> list[Tensor]:
    """In the leading shape of rows (…, columns); what is (N, K), in the shape of target."""
    return [_viewed(x, target.shape if target is not None and x.dim() == 2 else rows.shape[:-1]) for x in values]


def _viewed(x: Tensor, shape: torch.Size) -> Tensor:
    return x if x.shape == shape else x.view(shape)


class Sample(NamedTuple):
    """What `extrapolated_sample` drew at each position; every field has the leading shape of the logits.

    `token` is what to go on with, `draft_token` what the draft was, `selected` where the criterion held and the draft
    was replaced. `delta_logp` is of the draft token, `logp` and `base_logp` are of `token`, in nats, over the whole
    vocabulary at temperature 1. A row from which nothing can be drawn has token −1.
    """

    token: Tensor
    draft_token: Tensor
    selected: Tensor
    delta_logp: Tensor
    logp: Tensor
    base_logp: Tensor


class PolicyMetrics(NamedTuple):
    """Means over the tokens of a batch, scalars without a gradient; 0 where there are no tokens.

    `clip_low`, `clip_high`, `clip_dual`: the share of tokens whose gradient the lower, upper, dual bound took away.
    `approx_kl`: of r − 1 − log r, an estimate of KL(π_old ‖ π). `mean_ratio`, `max_ratio`: of the importance ratio.
    `mean_weight`: of what the advantages were reweighted by. `ref_kl`: of the divergence to the reference model, and
    `entropy`; 0 where they are not given.
    """

    clip_low: Tensor
    clip_high: Tensor
    clip_dual: Tensor
    approx_kl: Tensor
    mean_ratio: Tensor
    max_ratio: Tensor
    mean_weight: Tensor
    ref_kl: Tensor
    entropy: Tensor


class PolicyLoss(NamedTuple):
    """What `policy_loss` and `linear_policy_loss` return: the scalar to call `backward` on, and its metrics."""

    loss: Tensor
    metrics: PolicyMetrics
