"""The linear functions where `group` is given: each rank's own checks, what ranks agree on, then the ops over them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, ops, policy_checks
from ..inputs import Shards
from ..ops import backends
from ..ops.library import without_gradient
from ..reference.policy import TokenInputs
from ..results import DeltaLogpStats, LogpStats, PolicyLoss, Sample, shaped, stats_of
from ..sharding import Layout, agreed, checked_on_all, local_rows, shard_of

#: hidden, weight and bias of a model.
Head = tuple[Tensor, Tensor, Tensor | None]
OptionalHead = tuple[Tensor | None, Tensor | None, Tensor | None]
_NO_BASE: OptionalHead = (None, None, None)
#: Neither tensors nor text: temperature, softcap and logit scale of one model, or of both as check_transforms has them.
TransformOptions = tuple[Any, ...]


class _Call(NamedTuple):
    """How this rank was called, checked by itself: heads and options as ops take them; `same` on all ranks."""

    head: Head
    base: OptionalHead
    options: Any
    same: dict[str, Any]


def linear_logp(
    group: Any, head: Head, target: Tensor, transform: TransformOptions, ignore_index: int, top: bool
) -> LogpStats:
    """As the public function; the arguments are not checked."""

    def check() -> _Call:
        checked = checks.check_transform(*transform)
        same = {"transform": checked, "ignore_index": ignore_index, "top": top}
        return _Call(checks.check_head(*head, sharded=True), _NO_BASE, checked, same)

    call, shards = _agreed("linear_logp", group, check, "target", target)
    checks.check_top(top, shards.starts[-1])
    targets = checks.check_target(target, "hidden", head[0], ignore_index, shards.starts[-1])
    outputs = torch.ops.dlogp.sharded_linear_logp_fwd(*call.head, call.options, targets, ignore_index, *shards, top)
    return stats_of(LogpStats, outputs, head[0], target, top)


def linear_delta_logp(
    group: Any, head: Head, base: Head, target: Tensor, transforms: TransformOptions, ignore_index: int, top: bool
) -> DeltaLogpStats:
    """As the public function; the arguments are not checked."""

    def check() -> _Call:
        checked = checks.check_transforms(*transforms)
        same = {"transforms": checked, "ignore_index": ignore_index, "top": top}
        return _Call(*_checked_heads(head, base), checked, same)

    call, shards = _agreed("linear_delta_logp", group, check, "target", target)
    checks.check_top(top, shards.starts[-1])
    targets = checks.check_target(target, "hidden", head[0], ignore_index, shards.starts[-1])
    outputs = torch.ops.dlogp.sharded_linear_delta_logp_fwd(
        *call.head, call.options[0], *call.base, call.options[1], targets, ignore_index, *shards, top
    )
    return stats_of(DeltaLogpStats, outputs, head[0], target, top)


def linear_extrapolated_sample(
    group: Any,
    head: Head,
    base: Head,
    transforms: TransformOptions,
    options: tuple[Any, ...],
    noise: tuple[Any, ...],
) -> Sample:
    """As the public function; the arguments are not checked."""

    def check() -> _Call:
        checked = checks.check_transforms(*transforms), checks.check_sampling(*options)
        return _Call(*_checked_heads(head, base), checked, {"options of draws": checked})

    call, shards = _agreed("linear_extrapolated_sample", group, check, "hidden", head[0])
    drawing = checks.check_noise("hidden", head[0], *noise)
    (transform, base_transform), sampling = call.options
    heads = *call.head, transform, *call.base, base_transform
    drawn = without_gradient(torch.ops.dlogp.sharded_linear_extrapolated_sample, *heads, *shards, *drawing, *sampling)
    return Sample(*shaped(drawn, head[0]))


def linear_policy_loss(
    group: Any,
    head: Head,
    base: OptionalHead,
    target: Tensor,
    transforms: TransformOptions,
    options: dict[str, Any],
    tokens: TokenInputs,
    denominators: tuple[Any, Any],
) -> PolicyLoss:
    """As the public function; the arguments are not checked."""

    def check() -> _Call:
        checked = checks.check_transforms(*transforms), policy_checks.check_options(**options)
        own_base = policy_checks.check_frozen_base(*head[:2], *base, sharded=True)
        return _Call(checks.check_head(*head, sharded=True), own_base, checked, {"options of the loss": checked})

    call, shards = _agreed("linear_policy_loss", group, check, "target", target)
    both_transforms, policy = call.options
    targets, tokens = policy_checks.check_target_and_tokens(
        target, head[0], call.head, call.base, policy, tokens, *denominators, vocabulary=shards.starts[-1]
    )
    return ops.linear_policy_loss.loss_of(call.head, call.base, both_transforms, targets, tokens, policy, shards)


def _checked_heads(head: Head, base: Head) -> tuple[Head, Head]:
    hidden, weight, bias = head
    return checks.check_head(hidden, weight, bias, sharded=True), checks.check_base_head(
        hidden, weight, *base, sharded=True
    )


def _agreed(function: str, group: Any, check: Callable[[], _Call], name: str, rows: Tensor) -> tuple[_Call, Shards]:
    """The call with the weights of this rank's tokens, and who has the others; all ranks were called alike."""
    shard = shard_of(group)
    call, group_name = checked_on_all(function, shard, check), shard.group.group_name
    same = {**call.same, "workspace_limit": backends.workspace(), **_kinds("", call.head)}
    base_rows = None
    if call.base[1] is not None:
        base_rows = call.base[1].shape[0]
        same |= _kinds("base_", call.base)
    # The number of tokens may be another in the next call, and is not known to a compiler.
    shape = () if torch.compiler.is_compiling() else ((f"the shape of {name}", str(tuple(rows.shape))),)
    layout = agreed(
        function, group_name, shard.start, shard.vocab_size, call.head[1].shape[0], base_rows,
        tuple((key, str(value)) for key, value in same.items()), shape,
    )  # fmt: skip
    head = _local(call.head, group_name, layout.model, layout)
    base = call.base if base_rows is None else _local(call.base, group_name, layout.base, layout)
    return call._replace(head=head, base=base), Shards(group_name, list(layout.starts))


def _kinds(prefix: str, head: Any) -> dict[str, Any]:
    """What of one model's tensors has to be the same on all ranks."""
    hidden, weight, bias = head
    kinds = {f"the dtype of {prefix}{name}": x.dtype for name, x in (("hidden", hidden), ("weight", weight))}
    return kinds | {
        f"the size of {prefix}hidden": hidden.shape[-1],
        f"the dtype of {prefix}bias": None if bias is None else bias.dtype,
        f"requires_grad of {prefix}hidden": torch.is_grad_enabled() and hidden.requires_grad,
    }


def _local(head: Any, group: str, own: tuple[int, ...] | None, layout: Layout) -> Any:
    hidden, weight, bias = head
    return hidden, *(None if x is None else local_rows(x, group, own, layout) for x in (weight, bias))
