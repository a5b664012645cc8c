"""DTensors as hidden states, weights and biases of the linear functions, taken as they are."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from ..sharding import VocabShard

#: The name of a mesh's dimension over which a vocabulary is computed in shards; over others weights are gathered.
TENSOR_PARALLEL = "tp"
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def takes_dtensors(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """The function for weights that are DTensors too: called with local tensors and a group, or with whole weights."""
    names = tuple(inspect.signature(function).parameters)
    group_name = "vocab_group" if "vocab_group" in names else "group"

    @functools.wraps(function)
    def taking(*args: Any, **named: Any) -> Any:
        if not any(map(_is_dtensor, (*args, *named.values()))):
            return function(*args, **named)
        given, whole = dict(zip(names, args, strict=False)) | named, []
        for prefix in ("", "base_"):
            if _is_dtensor(given.get(f"{prefix}weight")):
                whole += _Model(given, prefix).take(group_name)
        if not whole:
            return function(**given)  # type: ignore[call-arg]
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, whole), _unpack):
            return function(**given)  # type: ignore[call-arg]

    return taking


def _is_dtensor(x: Any) -> bool:
    return hasattr(type(x), "full_tensor")


class _Model:
    """One of the models that a function is given, whose weight is a DTensor, in the arguments by name."""

    def __init__(self, given: dict[str, Any], prefix: str) -> None:
        self.given, self.name, self.hidden_name = given, f"{prefix}weight", f"{prefix}hidden"
        self.weight = given[self.name]
        self.mesh = self.weight.device_mesh
        bias: Any = given.get(f"{prefix}bias")
        self.tensors = {self.name: self.weight} | ({f"{prefix}bias": bias} if _is_dtensor(bias) else {})
        if _is_dtensor(bias) and (bias.device_mesh, bias.placements) != (self.mesh, self.weight.placements):
            raise TypeError(
                f"{prefix}bias is a DTensor with placements {bias.placements}, expected those of {self.name}, "
                f"{self.weight.placements}, on the same mesh"
            )

    def take(self, group_name: str) -> list["_Whole"]:
        """Put what the function takes in the places of the DTensors. What was gathered is returned."""
        dimension, group = self.sharded_dimension(), self.given.get(group_name)
        names = self.mesh.mesh_dim_names
        if dimension is None:
            self.given |= {name: x.to_local() for name, x in self.tensors.items()}
            return []
        own_group = self.mesh.get_group(dimension)
        if group is None and (names is None or names[dimension] != TENSOR_PARALLEL):
            whole = [_Whole.of(x, own_group) for x in self.tensors.values()]
            self.given |= {name: x.tensor for name, x in zip(self.tensors, whole, strict=True)}
            return whole
        self.check_group(group_name, group, own_group)
        self.given |= {name: x.to_local() for name, x in self.tensors.items()}
        self.given[group_name] = own_group if group is None else group
        hidden = self.given[self.hidden_name]
        if _is_dtensor(hidden) and hidden.device_mesh == self.mesh:
            self.given[self.hidden_name] = _replicated(hidden)
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

    def check_group(self, group_name: str, group: Any, own_group: Any) -> None:
        if group is None:
            return
        given = group.group if isinstance(group, VocabShard) else group
        ranks, own_ranks = (distributed.get_process_group_ranks(x) for x in (given, own_group))
        if ranks != own_ranks:
            raise ValueError(
                f"{group_name} has the ranks {ranks}, expected {own_ranks}, over which {self.name} is sharded"
            )


def _replicated(x: Any) -> Tensor:
    """Whole on every rank. The gradient, which is that of all shards there, goes back to where x lies."""
    from torch.distributed.tensor import Replicate

    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim).to_local()


class _Shard(NamedTuple):
    """Rows of a rank, and how the whole is gathered again; `version` of the DTensor tells of writing to it."""

    rows: Tensor
    group_name: str
    starts: list[int]
    dtensor: Any
    version: int


class _Whole(NamedTuple):
    """A gathered weight or bias. Its gradient is averaged over ranks, as FSDP does, and sharded."""

    tensor: Tensor
    shard: _Shard

    @classmethod
    def of(cls, x: Any, group: Any) -> "_Whole":
        rows, ranks, total = x.to_local(), group.size(), x.shape[0]
        size = -(-total // ranks)
        starts = [min(rank * size, total) for rank in range(ranks + 1)]
        if rows.requires_grad:
            rows.register_hook(lambda grad: grad / ranks)
        shard = _Shard(rows.detach(), group.group_name, starts, x, x._version)
        return cls(torch.ops.dlogp.all_rows(rows, group.group_name, starts), shard)


def _pack(whole: list[_Whole], x: Tensor) -> Tensor | _Shard:
    """Of a gathered weight backward keeps the shard."""
    for tensor, shard in whole:
        if x.data_ptr() == tensor.data_ptr() and x.shape == tensor.shape:
            return shard
    return x


def _unpack(kept: Tensor | _Shard) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if kept.dtensor._version != kept.version:
        raise RuntimeError("a sharded weight was written to between forward and backward, which gathers it again")
    return torch.ops.dlogp.all_rows(kept.rows, kept.group_name, kept.starts)
