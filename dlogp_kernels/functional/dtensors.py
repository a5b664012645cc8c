"""DTensors as hidden states, weights and biases of the linear functions, taken as they are."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from ..sharding import shard_of

#: The name of a mesh's dimension over which a vocabulary is computed in shards; over others weights are gathered.
TENSOR_PARALLEL = "tp"
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def takes_dtensors(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """The function for weights that are DTensors too: called with local tensors and a group, or with whole weights."""
    signature = inspect.signature(function)
    group_name = "vocab_group" if "vocab_group" in signature.parameters else "group"

    @functools.wraps(function)
    def taking(*args: Any, **named: Any) -> Any:
        if not any(map(is_dtensor, (*args, *named.values()))):
            return function(*args, **named)
        given: dict[str, Any] = signature.bind(*args, **named).arguments
        whole: list[_Whole] = []
        for prefix in ("", "base_"):
            if is_dtensor(given.get(f"{prefix}weight")):
                whole += _Model(given, prefix).take(group_name)
        if not whole:
            return function(**given)  # type: ignore[call-arg]
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, whole), _unpack):
            return function(**given)  # type: ignore[call-arg]

    return taking


def is_dtensor(x: Any) -> bool:
    """Without an import of what a build of torch may lack."""
    return hasattr(type(x), "full_tensor")


class _Model:
    """One of the models that a function is given, whose weight is a DTensor, in the arguments by name."""

    def __init__(self, given: dict[str, Any], prefix: str) -> None:
        self.given, self.name, self.hidden_name = given, f"{prefix}weight", f"{prefix}hidden"
        self.weight = given[self.name]
        self.mesh = self.weight.device_mesh
        bias: Any = given.get(f"{prefix}bias")
        self.tensors = {self.name: self.weight} | ({f"{prefix}bias": bias} if is_dtensor(bias) else {})
        if is_dtensor(bias) and (bias.device_mesh, bias.placements) != (self.mesh, self.weight.placements):
            raise TypeError(
                f"{prefix}bias is a DTensor with placements {bias.placements}, expected those of {self.name}, "
                f"{self.weight.placements}, on the same mesh"
            )

    def take(self, group_name: str) -> list["_Whole"]:
        """Put what the function takes in the places of the DTensors. What was gathered is returned."""
        dimension, group = self.sharded_dimension(), self.given.get(group_name)
        names = self.mesh.mesh_dim_names
        if dimension is None:
            self.check_replicas(None)
            self.given |= {name: x.to_local() for name, x in self.tensors.items()}
            return []
        own_group = self.mesh.get_group(dimension)
        if group is None and (names is None or names[dimension] != TENSOR_PARALLEL):
            whole = [_Whole.of(x, dimension) for x in self.tensors.values()]
            self.given |= {name: x.tensor for name, x in zip(self.tensors, whole, strict=True)}
            return whole
        self.check_replicas(dimension)
        self.check_group(group_name, group, own_group)
        self.given |= {name: x.to_local() for name, x in self.tensors.items()}
        self.given[group_name] = own_group if group is None else group
        hidden = self.given[self.hidden_name]
        if is_dtensor(hidden) and hidden.device_mesh == self.mesh:
            self.given[self.hidden_name] = _replicated(hidden, dimension)
        return []

    def sharded_dimension(self) -> int | None:
        """Of the mesh, that over which the rows are sharded; None where the weight is whole."""
        from torch.distributed.tensor import Shard

        placements = self.weight.placements
        sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
        # A subclass of Shard orders rows otherwise.
        if len(sharded) > 1 or any(type(placements[i]) is not Shard or placements[i].dim != 0 for i in sharded):
            raise TypeError(
                f"{self.name} is a DTensor with placements {placements}, expected Shard(0) over one dimension of its "
                f"mesh: pass {self.name}.full_tensor()"
            )
        return sharded[0] if sharded else None

    def check_replicas(self, sharded: int | None) -> None:
        """TypeError where ranks that may have other tokens would each have a gradient of their own."""
        names = self.mesh.mesh_dim_names or (None,) * self.mesh.ndim
        for i, name in enumerate(names):
            if i == sharded or name == TENSOR_PARALLEL or self.mesh.size(i) == 1 or not torch.is_grad_enabled():
                continue
            if any(x.requires_grad for x in self.tensors.values()):
                raise TypeError(
                    f"{self.name} is a DTensor with placements {self.weight.placements} that requires a gradient, "
                    f"which would be of each rank's tokens alone over dimension {i} of its mesh: pass "
                    f"{self.name}.to_local(), "
                    "with the process group of its shards if it has some, and reduce the gradient yourself"
                )

    def check_group(self, group_name: str, group: Any, own_group: Any) -> None:
        if group is None:
            return
        ranks, own_ranks = (distributed.get_process_group_ranks(x) for x in (shard_of(group).group, own_group))
        if ranks != own_ranks:
            raise ValueError(
                f"{group_name} has the ranks {ranks}, expected {own_ranks}, over which {self.name} is sharded"
            )


def _replicated(x: Any, dimension: int) -> Tensor:
    """Whole over this dimension of the mesh. The gradient, which is that of all shards, goes back to where x lies."""
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if i == dimension else placement for i, placement in enumerate(x.placements)]
    return x.redistribute(placements=placements).to_local()


class _Shard(NamedTuple):
    """Rows of a rank, and how the whole is gathered again; `version` of the DTensor tells of writing to it."""

    rows: Tensor
    group_name: str
    starts: list[int]
    dtensor: Any
    version: int


class _Whole(NamedTuple):
    """A gathered weight or bias. Its gradient is averaged over all ranks of the mesh, as FSDP does, and sharded."""

    tensor: Tensor
    shard: _Shard

    @classmethod
    def of(cls, x: Any, dimension: int) -> "_Whole":
        mesh, rows, total = x.device_mesh, x.to_local(), x.shape[0]
        group, ranks = mesh.get_group(dimension), mesh.size(dimension)
        size = -(-total // ranks)
        starts = [min(rank * size, total) for rank in range(ranks + 1)]
        if rows.requires_grad:
            replicas = [mesh.get_group(i).group_name for i in range(mesh.ndim) if i != dimension]
            rows.register_hook(functools.partial(_averaged, replicas=replicas, ranks=mesh.size()))
        shard = _Shard(rows.detach(), group.group_name, starts, x, -1 if x.is_inference() else x._version)
        return cls(torch.ops.dlogp.all_rows(rows, group.group_name, starts), shard)


def _averaged(grad: Tensor, replicas: list[str], ranks: int) -> Tensor:
    """Of a shard's gradient, which is the sum over the ranks that have the other shards."""
    for group_name in replicas:
        grad = torch.ops.dlogp.sum_over_ranks(grad, group_name)
    return grad / ranks


def _pack(whole: list[_Whole], x: Tensor) -> Tensor | _Shard:
    """Of a gathered weight backward keeps the shard."""
    for tensor, shard in whole:
        if (x.data_ptr(), x.shape, x.dtype) == (tensor.data_ptr(), tensor.shape, tensor.dtype):
            return shard
    return x


def _unpack(kept: Tensor | _Shard) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if not kept.dtensor.is_inference() and kept.dtensor._version != kept.version:
        raise RuntimeError("a sharded weight was written to between forward and backward, which gathers it again")
    return torch.ops.dlogp.all_rows(kept.rows, kept.group_name, kept.starts)
