"""What ranks do for the tests of DTensors."""

from typing import Any

import cases
import torch
import torch.distributed as distributed
from sharded_cases import Found, Inputs
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.ops import sharded

_MESHES: dict[tuple[int, str | None], DeviceMesh] = {}


def mesh_of(group: Any, name: str | None) -> DeviceMesh:
    """Of the ranks of a group, with one dimension."""
    key = group.size(), name
    if key not in _MESHES:
        _MESHES[key] = DeviceMesh.from_group(group, "cpu", mesh_dim_names=None if name is None else (name,))
    return _MESHES[key]


def _placed(x: Tensor, mesh: DeviceMesh, placement: Any) -> DTensor:
    return distribute_tensor(x.detach(), mesh, [placement])


def statistics(
    group: Any,
    op: str,
    inputs: Inputs,
    upstream: list[Tensor | None],
    mesh_name: str | None,
    sharded_hidden: bool = False,
    gives_group: bool = False,
    **options: Any,
) -> tuple[Found, dict[str, str]]:
    """Weights and biases sharded over a mesh of this name; gradients of whole inputs, and how they were placed."""
    mesh = mesh_of(group, mesh_name)
    leaves: dict[str, Any] = {name: x for name, x in inputs.items() if name != "target"}
    for name, x in leaves.items():
        if name.endswith("hidden"):
            x = _placed(x, mesh, Shard(0)) if sharded_hidden else x.detach()
        else:
            x = _placed(x, mesh, Shard(0))
        leaves[name] = x.requires_grad_()
    if gives_group:
        options["group"] = group
    stats = cases.asked_for(getattr(dlogp_kernels, op)(**inputs | leaves, **options))
    used = [(x, grad.to(x.dtype)) for x, grad in zip(stats, upstream, strict=True) if grad is not None]
    torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])
    placed = {name: str(x.grad.placements) for name, x in leaves.items() if isinstance(x.grad, DTensor)}
    grads = {name: x.grad.full_tensor() if name in placed else x.grad for name, x in leaves.items()}
    return Found(tuple(x.detach() for x in stats), grads), placed


def own_tokens(group: Any, op: str, batches: list[Inputs], upstreams: list[list[Tensor | None]]) -> Any:
    """As data-parallel ranks: each its own tokens, one weight sharded over them; and how often rows were gathered."""
    gathers, gathered_rows = [], sharded.gathered_rows

    def counted(x: Tensor, *args: Any) -> Tensor:
        gathers.append(tuple(x.shape))
        return gathered_rows(x, *args)

    sharded.gathered_rows = counted
    try:
        with backends.workspace_limit(2**20):
            found, placed = statistics(group, op, batches[group.rank()], upstreams[group.rank()], None)
    finally:
        sharded.gathered_rows = gathered_rows
    return found, placed, gathers


def refused(group: Any, op: str, inputs: Inputs, how: str) -> Any:
    mesh, own = mesh_of(group, "tp"), {name: x for name, x in inputs.items() if how == "bias" or name != "bias"}
    if how == "columns":
        own["weight"] = _placed(own["weight"], mesh, Shard(1))
    elif how == "bias":
        own["weight"], own["bias"] = _placed(own["weight"], mesh, Shard(0)), _placed(own["bias"], mesh, Replicate())
    elif how == "group":
        own["weight"], own["group"] = _placed(own["weight"], mesh, Shard(0)), distributed.group.WORLD
    elif how == "no group":
        own["weight"], own["group"] = _placed(own["weight"], mesh, Shard(0)), "tp"
    elif how == "target":
        own["weight"], own["target"] = (_placed(own[name], mesh, Shard(0)) for name in ("weight", "target"))
    elif how == "places":
        weight = _placed(own["weight"], mesh, Shard(0))
        getattr(dlogp_kernels, op)(own["hidden"], weight, own["target"], inputs["bias"])
    getattr(dlogp_kernels, op)(**own)


def two_dimensions(_: Any, inputs: Inputs, batches: list[Inputs], kind: str) -> Any:
    """On a mesh of two by two ranks: a weight of two replicas in two shards, and tokens of each rank or replica."""
    world = distributed.get_rank()
    names = ("dp", "tp") if kind != "hsdp" else ("replica", "shard")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    weight = distribute_tensor(inputs["weight"], mesh, [Replicate(), Shard(0)])
    if kind != "hidden":
        weight.requires_grad_()
    own, target = batches[world], batches[world]["target"]
    hidden: Any = own["hidden"]
    if kind == "hidden":
        hidden = distribute_tensor(inputs["hidden"], mesh, [Shard(0), Replicate()]).requires_grad_()
        target = inputs["target"].chunk(2)[world // 2]
    loss = -dlogp_kernels.linear_logp(hidden, weight, target).logp.sum()
    loss.backward()
    grad = hidden.grad if kind == "hidden" else weight.grad
    return grad.placements, grad.full_tensor() if kind == "hidden" else grad.to_local()


def inference_weight(group: Any, inputs: Inputs) -> Any:
    with torch.inference_mode():
        weight = _placed(inputs["weight"], mesh_of(group, None), Shard(0))
        return tuple(cases.asked_for(dlogp_kernels.linear_logp(inputs["hidden"], weight, inputs["target"])))


def written_between(group: Any, op: str, inputs: Inputs) -> None:
    own = {name: x for name, x in inputs.items() if "bias" not in name}
    weight = own["weight"] = _placed(own["weight"], mesh_of(group, None), Shard(0)).requires_grad_()
    loss = getattr(dlogp_kernels, op)(**own).logp.sum()
    with torch.no_grad():
        weight.mul_(2.0)
    loss.backward()


def whole_weight(group: Any, op: str, inputs: Inputs) -> Any:
    mesh = mesh_of(group, "tp")
    own = {name: _placed(x, mesh, Replicate()) if "weight" in name else x for name, x in inputs.items()}
    return tuple(cases.asked_for(getattr(dlogp_kernels, op)(**own)))


def optimiser_steps(group: Any, inputs: Inputs, mesh_name: str | None, steps: int) -> list[Tensor]:
    """Losses of a head that AdamW trains."""
    head = inputs["weight"].detach()
    if mesh_name is not None:
        head = _placed(head, mesh_of(group, mesh_name), Shard(0))
    weight = torch.nn.Parameter(head)
    optimiser, losses = torch.optim.AdamW([weight], lr=0.02, foreach=False), []
    for _ in range(steps):
        loss = -dlogp_kernels.linear_logp(inputs["hidden"], weight, inputs["target"]).logp.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses
