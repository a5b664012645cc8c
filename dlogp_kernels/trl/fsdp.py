"""Weights that FSDP2 shards, outside of a forward that all processes run together."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered, if it shards the model."""
    for module in _sharded(model):
        module.reshard()


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within this context each process has all weights of the model, and may run forwards that others do not run.

    Processes draw responses of different lengths, and would wait for each other's weights otherwise.
    """
    _settle_root(model)
    modules = _sharded(model)
    frees = [_frees_after_forward(module) for module in modules]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module, free in zip(modules, frees, strict=True):
            module.set_reshard_after_forward(free, recurse=False)
            module.reshard()


def _sharded(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _settle_root(model: nn.Module) -> None:
    """Run the hooks of a forward: FSDP2 takes the first module that has one for the root, and it may be one within."""
    name = "_no_forward"
    setattr(model, name, lambda: None)
    # Nothing happens where the model is not sharded.
    register_fsdp_forward_method(model, name)
    getattr(model, name)()
    delattr(model, name)


def _frees_after_forward(module: Any) -> bool:
    """What `set_reshard_after_forward` sets; there is no other way to ask."""
    state = module._get_fsdp_state()
    # Older versions of torch have one at most.
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)
