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
from ..sharding import Layout, agreed, check_shard, checked_on_all, local_rows, shard_of

#: hidden, weight and bias of a model.
Head = tuple[Tensor, Tensor, Tensor | None]
OptionalHead = tuple[Tensor | None, Tensor | None, Tensor | None]
_NO_BASE: OptionalHead = (None, None, None)
#: temperature, softcap and logit scale of one model, or of both as check_transforms has them.
TransformOptions = tuple[Any, ...]


class _Call(NamedTuple):
    """How this rank was called, checked by itself: as ops take it.

    rest: what the function needs besides the heads. same: options that have to be the same on all ranks, by name;
    same_now: tensors of integers likewise, and numbers that differ from call to call.
    """

    head: Head
    base: OptionalHead
    rest: Any
    same: dict[str, Any]
    same_now: dict[str, Any]


def linear_logp(
    group: Any, head: Head, target: Tensor, transform: TransformOptions, ignore_index: int, top: bool
) -> LogpStats:
    """As the public function; the arguments are not checked."""

    def check() -> _Call:
        own_head = checks.check_head(*head, sharded=True)
        checks.check_target(target, "hidden", head[0], ignore_index, None)
        checks.check_top(top, 1)
        checked = checks.check_transform(*transform)
        same = {"transform": checked, "ignore_index": ignore_index, "top": top}
        return _Call(own_head, _NO_BASE, checked, same, {"target": target})

    call, shards = _agreed("linear_logp", group, check)
    checks.check_top(top, shards.starts[-1])
    targets = checks.check_target(target, "hidden", head[0], ignore_index, shards.starts[-1])
    outputs = torch.ops.dlogp.sharded_linear_logp_fwd(*call.head, call.rest, targets, ignore_index, *shards, top)
    return stats_of(LogpStats, outputs, head[0], target, top)


def linear_delta_logp(
    group: Any, head: Head, base: Head, target: Tensor, transforms: TransformOptions, ignore_index: int, top: bool
) -> DeltaLogpStats:
    """As the public function; the arguments are not checked."""

    def check() -> _Call:
        heads = _checked_heads(head, base)
        checks.check_target(target, "hidden", head[0], ignore_index, None)
        checks.check_top(top, 1)
        checked = checks.check_transforms(*transforms)
        same = {"transforms": checked, "ignore_index": ignore_index, "top": top}
        return _Call(*heads, checked, same, {"target": target})

    call, shards = _agreed("linear_delta_logp", group, check)
    checks.check_top(top, shards.starts[-1])
    targets = checks.check_target(target, "hidden", head[0], ignore_index, shards.starts[-1])
    (transform, base_transform) = call.rest
    outputs = torch.ops.dlogp.sharded_linear_delta_logp_fwd(
        *call.head, transform, *call.base, base_transform, targets, ignore_index, *shards, top
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
        heads = _checked_heads(head, base)
        checked = checks.check_transforms(*transforms), checks.check_sampling(*options)
        drawing = checks.check_noise("hidden", head[0], *noise)
        now = dict(zip(("seed", "row_id", "step"), noise, strict=True))
        return _Call(*heads, (*checked, drawing), {"options of the draws": checked}, now)

    call, shards = _agreed("linear_extrapolated_sample", group, check)
    (transform, base_transform), sampling, drawing = call.rest
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
        own_head = checks.check_head(*head, sharded=True)
        own_base = policy_checks.check_frozen_base(*head[:2], *base, sharded=True)
        both, policy = checks.check_transforms(*transforms), policy_checks.check_options(**options)
        targets, checked = policy_checks.check_target_and_tokens(
            target, head[0], own_head, own_base, policy, tokens, *denominators, vocabulary=None
        )
        rest = both, policy, targets, checked
        now = {"target": target, "mask": checked.mask, "offsets": tokens.offsets}
        return _Call(own_head, own_base, rest, {"options of the loss": (both, policy)}, now)

    call, shards = _agreed("linear_policy_loss", group, check)
    both_transforms, policy, targets, checked = call.rest
    policy_checks.check_masked_target(target, checked.mask, shards.starts[-1])
    return ops.linear_policy_loss.loss_of(call.head, call.base, both_transforms, targets, checked, policy, shards)


def _checked_heads(head: Head, base: Head) -> tuple[Head, Head]:
    hidden, weight, bias = head
    return checks.check_head(hidden, weight, bias, sharded=True), checks.check_base_head(
        hidden, weight, *base, sharded=True
    )


def _agreed(function: str, group: Any, check: Callable[[], _Call]) -> tuple[_Call, Shards]:
    """The call with the weights of this rank's tokens, and who has the others; all ranks were called alike."""
    shard = shard_of(group)

    def check_all() -> _Call:
        check_shard(shard)
        return check()

    call, group_name = checked_on_all(function, shard, check_all), shard.group.group_name
    compiling = torch.compiler.is_compiling()
    # A compiler does not know the numbers of options and tokens, which may be others in the next call.
    same = {"workspace_limit": backends.workspace(), **({} if compiling else call.same), **_kinds("", call.head)}
    now = {} if compiling else _now(call)
    rows, base_rows = _fixed(call.head[1].shape[0]), None
    if call.base[1] is not None:
        base_rows = _fixed(call.base[1].shape[0])
        same |= _kinds("base_", call.base)
    layout = agreed(
        function, group_name, shard.start, shard.vocab_size, rows, base_rows, _texts(same), _texts(now)
    )  # fmt: skip
    head = _local(call.head, group_name, layout.model, layout)
    base = call.base if base_rows is None else _local(call.base, group_name, layout.base, layout)
    return call._replace(head=head, base=base), Shards(group_name, list(layout.starts))


def _fixed(size: int) -> int:
    """The same number. A compiler, which may take a size for any, compiles for this one alone then."""
    return len(range(size))


def _kinds(prefix: str, head: Any) -> dict[str, Any]:
    """What of one model's tensors has to be the same on all ranks."""
    kinds: dict[str, Any] = {f"the size of {prefix}hidden": _fixed(head[0].shape[-1])}
    for name, x in zip(("hidden", "weight", "bias"), head, strict=True):
        kinds[f"the dtype of {prefix}{name}"] = None if x is None else x.dtype
        kinds[f"requires_grad of {prefix}{name}"] = x is not None and torch.is_grad_enabled() and x.requires_grad
    return kinds


def _now(call: _Call) -> dict[str, Any]:
    now: dict[str, Any] = {"the shape of hidden": tuple(call.head[0].shape)}
    for name, x in call.same_now.items():
        if isinstance(x, Tensor):
            now[f"the shape of {name}"] = tuple(x.shape)
            if checks.has_values(x):
                now[f"{name} (a digest)"] = checks.digest(x)
        else:
            now[name] = x
    return now


def _texts(values: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items())


def _local(head: Any, group: str, own: tuple[int, ...] | None, layout: Layout) -> Any:
    hidden, weight, bias = head
    return hidden, *(None if x is None else local_rows(x, group, own, layout) for x in (weight, bias))
