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
    TOP = "(N,), or (0,) where the most likely token is not asked for"


PerTarget = Annotated[Tensor, Shape.TARGET]
PerRow = Annotated[Tensor, Shape.ROW]
TopToken = Annotated[Tensor | None, Shape.TOP, torch.int64]
TopLogp = Annotated[Tensor | None, Shape.TOP]


class LogpStats(NamedTuple):
    """Statistics of one model's next-token distribution, in nats.

    `logp` has the shape of the target; the rest have its leading shape (without candidates). With `top=True`,
    `top_token` is the most likely token, the first of several, −1 where the row is ignored or has no numbers, and
    `top_logp` its log p; else they are None. Read fields by name: later ones are appended.
    """

    logp: PerTarget
    entropy: PerRow
    lse: PerRow
    top_token: TopToken = None
    top_logp: TopLogp = None


class DeltaLogpStats(NamedTuple):
    """Statistics of a pair of models at the same positions, in nats.

    `delta_logp`, `logp` and `base_logp` have the shape of the target; the rest have its leading shape.
    `kl` is KL(model ‖ base), `reverse_kl` is KL(base ‖ model). The last four are as in LogpStats.
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
    top_token: TopToken = None
    top_logp: TopLogp = None
    base_top_token: TopToken = None
    base_top_logp: TopLogp = None


_Stats = TypeVar("_Stats", LogpStats, DeltaLogpStats)


@functools.cache
def _fields(kind: Any) -> tuple[tuple[Shape, torch.dtype | None], ...]:
    """Shape of each field of LogpStats or DeltaLogpStats, and its dtype where that is not the one of the op."""
    hints = get_type_hints(kind, include_extras=True).values()
    return tuple((shape, *dtype, None)[:2] for shape, *dtype in (hint.__metadata__ for hint in hints))


def allocated(kind: Any, target: Tensor, new: Callable[..., Tensor], dtype: torch.dtype, top: bool) -> Any:
    """A `kind` of tensors, each from new(its shape, dtype=…), for target (N, K); a token is −1."""
    sizes = {Shape.TARGET: target.shape, Shape.ROW: target.shape[:1], Shape.TOP: target.shape[:1] if top else (0,)}
    made = [new(sizes[shape], dtype=own or dtype) for shape, own in _fields(kind)]
    for (_, own), tensor in zip(_fields(kind), made, strict=True):
        if top and own is torch.int64:
            tensor.fill_(-1)
    return kind(*made)


def stats_of(kind: type[_Stats], outputs: Sequence[Tensor], rows: Tensor, target: Tensor, top: bool) -> _Stats:
    """What the function returns of an op's outputs, which end in what is for backward alone."""
    count = len(kind._fields) - (0 if top else len(kind._field_defaults))
    return kind(*shaped(outputs[:count], rows, target))


def present(results: Any) -> dict[str, Tensor]:
    """The fields by name, without those that were not asked for."""
    return {name: value for name, value in results._asdict().items() if value is not None}


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
