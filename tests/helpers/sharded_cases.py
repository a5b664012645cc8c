"""What ranks do for the tests of sharded vocabularies: each takes its shard of whole inputs, and calls."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import cases
import torch
import torch.distributed as distributed
from policy_cases import Outcome
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import VocabShard, backends
from dlogp_kernels.ops import sharded, sharded_sampling

Inputs = dict[str, Any]


class Sharding(NamedTuple):
    """How whole inputs are parted: `starts` of weight, `base_starts` of base_weight (None: whole on every rank)."""

    starts: Sequence[int] | None
    base_starts: Sequence[int] | None
    vocab_size: int | None = None
    says_start: bool = False

    def starts_of(self, name: str) -> Sequence[int] | None:
        return {"weight": self.starts, "bias": self.starts}.get(
            name, self.base_starts if name in ("base_weight", "base_bias") else None
        )

    def part(self, inputs: Inputs, rank: int) -> Inputs:
        """Those of this rank."""
        starts = {name: self.starts_of(name) for name in inputs}
        return {
            name: x if starts[name] is None else x[starts[name][rank] : starts[name][rank + 1]].clone()
            for name, x in inputs.items()
        }

    def group(self, group: Any) -> Any:
        """What the functions are given."""
        if self.vocab_size is None and not self.says_start:
            return group
        return VocabShard(group, self.starts[group.rank()] if self.says_start else None, self.vocab_size)


def alike(starts: Sequence[int]) -> Sharding:
    return Sharding(starts, starts)


class Found(NamedTuple):
    """On one rank: an op's statistics, and gradients by name of the inputs that it had."""

    stats: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


def statistics(
    group: Any,
    op: str,
    inputs: Inputs,
    sharding: Sharding,
    upstream: list[Tensor | None] | None,
    options: dict[str, Any],
    backend: str | None = None,
    workspace: int = backends.DEFAULT_WORKSPACE,
) -> Found:
    own = sharding.part(inputs, group.rank())
    leaves = {name: own[name].detach().requires_grad_() for name in cases.floating(own)} if upstream else {}
    with backends.use_backend(backend), backends.workspace_limit(workspace):
        function = getattr(dlogp_kernels, op)
        stats = cases.asked_for(function(**own | leaves, group=sharding.group(group), **options))
        if upstream is None:
            return Found(tuple(stats), {})
        used = [(x, grad.to(x.dtype)) for x, grad in zip(stats, upstream, strict=True) if grad is not None]
        grads = torch.autograd.grad([x for x, _ in used], list(leaves.values()), [grad for _, grad in used])
    return Found(tuple(x.detach() for x in stats), dict(zip(leaves, grads, strict=True)))


def policy_loss(group: Any, inputs: Inputs, sharding: Sharding, options: dict[str, Any]) -> Outcome:
    own = sharding.part(inputs, group.rank())
    leaves = {name: own[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    loss, metrics = dlogp_kernels.linear_policy_loss(**own, vocab_group=sharding.group(group), **options)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return Outcome(loss.detach(), torch.stack(list(metrics)), dict(zip(leaves, grads, strict=True)))


class Drawn(NamedTuple):
    """On one rank: a draw, and the bytes of what it told of its winners; none where it gathered logits."""

    sample: tuple[Tensor, ...]
    told: list[int]


def samples(
    group: Any, inputs: Inputs, sharding: Sharding, calls: list[dict[str, Any]], workspace: int, backend: str | None
) -> list[Drawn]:
    """Of one call after the other, each with its options."""
    own, drawn = sharding.part(inputs, group.rank()) | {"group": sharding.group(group)}, []
    for options in calls:
        with sent(sharded_sampling) as told, backends.workspace_limit(workspace), backends.use_backend(backend):
            drawn.append(Drawn(tuple(dlogp_kernels.linear_extrapolated_sample(**own, **options)), told))
    return drawn


@contextmanager
def sent(module: Any) -> Iterator[list[int]]:
    """Bytes of each tensor that this module has gathered."""
    sizes: list[int] = []
    gathered = module.gathered

    def counted(x: Tensor, group: Any) -> Tensor:
        sizes.append(x.nbytes)
        return gathered(x, group)

    with mock.patch.object(module, "gathered", counted):
        yield sizes


def misused(_: Any, op: str, inputs: Inputs, sharding: Sharding, changes: dict[int, Inputs]) -> Any:
    """Errors of a rank in a new group: of a call with these changes, of one without, and with them again; or None."""
    group = distributed.new_group(list(range(distributed.get_world_size())))
    right = sharding.part(inputs, group.rank()) | {"group": sharding.group(group)}
    wrong = right | changes.get(group.rank(), {})
    if "shard" in wrong:
        wrong["group"] = VocabShard(group, *wrong.pop("shard"))
    errors: list[Exception | None] = []
    for own in (wrong, right, wrong):
        given = dict(own)
        if op == "linear_policy_loss":
            given["vocab_group"] = given.pop("group")
        if op == "linear_extrapolated_sample":
            given.pop("target")
        workspace = given.pop("workspace", backends.DEFAULT_WORKSPACE)
        try:
            with backends.workspace_limit(workspace):
                getattr(dlogp_kernels, op)(**given)
            errors.append(None)
        except Exception as error:
            errors.append(type(error)(str(error)))
    return errors


def vocabularies(_: Any, op: str, batches: list[tuple[Inputs, Sharding]]) -> Any:
    """Of calls in one new group, one after the other."""
    group = distributed.new_group(list(range(distributed.get_world_size())))
    return [statistics(group, op, inputs, sharding, None, {}).stats for inputs, sharding in batches]


def rank_that_dies(group: Any, op: str, inputs: Inputs, sharding: Sharding) -> Any:
    """The last rank is killed after a first call."""
    statistics(group, op, inputs, sharding, None, {})
    if group.rank() == group.size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return statistics(group, op, inputs, sharding, None, {})


def compiled(group: Any, op: str, batches: list[tuple[Inputs, Sharding, float]]) -> int:
    """Gradients by a compiled function are those of the function itself; returns how often it was compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    function, counter = getattr(dlogp_kernels, op), CompileCounterWithBackend("aot_eager")

    def loss(inputs: Inputs, temperature: float) -> Tensor:
        if op == "linear_policy_loss":
            return function(**inputs, vocab_group=group, temperature=temperature).loss
        stats = function(**inputs, group=group, temperature=temperature)
        return sum(x.sum() for x in stats if x is not None)

    compiled_loss = torch.compile(loss, backend=counter, fullgraph=True)
    for batch, sharding, temperature in batches:
        own = sharding.part(batch, group.rank())
        names = ("hidden", "weight", "bias") if op == "linear_policy_loss" else cases.floating(own)
        leaves = [own[name].requires_grad_() for name in names]
        expected = torch.autograd.grad(loss(own, temperature), leaves)
        found = torch.autograd.grad(compiled_loss(own, temperature), leaves)
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other)
    return counter.frame_count


def second_derivative(group: Any, op: str, inputs: Inputs, sharding: Sharding) -> None:
    own = sharding.part(inputs, group.rank())
    hidden = own["hidden"].requires_grad_()
    stats = getattr(dlogp_kernels, op)(**own, group=group)
    (grad,) = torch.autograd.grad(stats.logp.sum(), hidden, create_graph=True)
    grad.sum().backward()


def sums(group: Any, of_ranks: list[Tensor], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of a tensor that each rank has: on every rank, and this rank's rows alone."""
    own = of_ranks[group.rank()].clone()
    name = group.group_name
    return torch.ops.dlogp.sum_over_ranks(own, name), torch.ops.dlogp.sum_of_rows(own, name, list(starts))


def bytes_gathered(group: Any, op: str, inputs: Inputs, sharding: Sharding) -> int:
    """That this rank sends in forward, once the ranks have agreed."""
    statistics(group, op, inputs, sharding, None, {})
    with sent(sharded) as sizes:
        statistics(group, op, inputs, sharding, None, {})
    return sum(sizes)


def peak_mib(group: Any, op: str, inputs: Inputs, sharding: Sharding, seed: int) -> float:
    """Of a call with all gradients, over inputs, outputs and gradients, of this rank."""
    from dlogp_kernels.demo.memory import peak_over

    own = sharding.part(inputs, group.rank())
    del inputs
    leaves = [own[name].requires_grad_() for name in cases.floating(own)]

    def call(rows: int) -> list[Tensor]:
        some = {name: x[:rows] if name == "target" or name.endswith("hidden") else x for name, x in own.items()}
        stats = getattr(dlogp_kernels, op)(**some, group=group)
        return [*(x.detach() for x in stats if x is not None), *torch.autograd.grad(stats.logp.sum(), leaves)]

    call(2)
    return peak_over(lambda: call(own["target"].shape[0])).extra / 2**20


def checked_ops(group: Any) -> dict[str, set[str]]:
    """What `torch.library.opcheck` says of each op, in a group of one rank."""
    rows, columns = 5, 31
    inputs = cases.make_inputs("linear_delta_logp", rows, v=columns, k=2)
    names = ("hidden", "weight", "bias")
    model, base_model = (
        [inputs[prefix + name].requires_grad_() for name in names] for prefix in ("", "base_")
    )  # fmt: skip
    transform, starts, weight = [0.7, 3.0, 1.3], [0, columns], model[1]
    of_target = (inputs["target"], -100, group.group_name, starts)
    heads = (*model[:2], None, transform, *base_model[:2], None, transform)
    drawing = (None, 5, 2, None, None, 0, 0.3, "kl", 0.1, "rl", 0.7, 0, 1.0, 0.0)
    arguments = {
        "sharded_linear_extrapolated_sample": (
            *(x.detach() if isinstance(x, Tensor) else x for x in heads),
            group.group_name,
            starts,
            *drawing,
        ),
        "sharded_linear_logp_fwd": (*model, transform, *of_target, True),
        "sharded_linear_delta_logp_fwd": (*model, transform, *base_model, transform, *of_target, False),
        "rows_of_ranks": (weight, group.group_name, starts, starts),
        "own_rows": (weight, group.group_name, [0, columns - 1]),
        "all_rows": (weight, group.group_name, starts),
        "sum_of_rows": (weight.detach(), group.group_name, starts),
        "sum_over_ranks": (weight.detach(), group.group_name),
    }
    return {
        name: set(torch.library.opcheck(getattr(torch.ops.dlogp, name).default, given).values())
        for name, given in arguments.items()
    }
