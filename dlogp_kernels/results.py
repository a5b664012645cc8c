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
    """Of an output of an op, for target (N, K)."""

    TARGET = "(N, K)"
    ROW = "(N,)"


PerTarget = Annotated[Tensor, Shape.TARGET]
PerRow = Annotated[Tensor, Shape.ROW]
#: Of each row, in `extra`.
OnDemand = Tensor | None


class LogpStats(NamedTuple):
    """Statistics of one model's next-token distribution, in nats.

    `logp` has the shape of the target; the rest have its leading shape (without candidates). With `top=True`,
    `top_token` is the most likely token, the first of several, −1 where the row is ignored or has no numbers, and
    `top_logp` its log p; else they are None. Read fields by name: later ones are appended.
    """

    logp: PerTarget
    entropy: PerRow
    lse: PerRow
    top_token: OnDemand = None
    top_logp: OnDemand = None


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
    top_token: OnDemand = None
    top_logp: OnDemand = None
    base_top_token: OnDemand = None
    base_top_logp: OnDemand = None


_Stats = TypeVar("_Stats", LogpStats, DeltaLogpStats)


@functools.cache
def shapes_of(kind: Any) -> dict[str, Shape]:
    """Of the fields of LogpStats or DeltaLogpStats that are outputs of an op by themselves."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if name not in kind._field_defaults}


class Outputs(NamedTuple):
    """What a forward op returns: LogpStats or DeltaLogpStats without what is on demand, and `extra` (rows, N).

    extra has of each row the normalizer of each model, see inputs.Saved, two rows for one, and if they are asked for
    the fields on demand in their order. They are one tensor because every output of an op takes its time.
    """

    stats: Any
    extra: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        return *self.stats[: -len(self.stats._field_defaults)], self.extra


def allocated(kind: Any, target: Tensor, new: Callable[..., Tensor], dtype: torch.dtype, top: bool) -> Outputs:
    """The outputs of an op for target (N, K), each from new(its shape, dtype=…); tokens are −1."""
    sizes = {Shape.TARGET: target.shape, Shape.ROW: target.shape[:1]}
    on_demand = len(kind._field_defaults)
    extra = new((on_demand * (2 if top else 1), target.shape[0]), dtype=dtype)
    if top:
        extra[on_demand::2] = -1
    return Outputs(kind(*(new(sizes[shape], dtype=dtype) for shape in shapes_of(kind).values())), extra)


def stats_of(kind: type[_Stats], outputs: Sequence[Tensor], rows: Tensor, target: Tensor, top: bool) -> _Stats:
    """What the function returns of an op's outputs."""
    *stats, extra = outputs
    if top:
        on_demand = zip(kind._field_defaults, extra[len(kind._field_defaults) :], strict=True)
        # Copies: `extra` is saved for backward, and what is returned may be written to.
        stats += [x.to(torch.int64) if name.endswith("token") else x.clone() for name, x in on_demand]
    return kind(*shaped(stats, rows, target))


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
