"""Names of the library that only benchmarks need from outside: the tiles of its Triton kernels."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from dlogp_kernels import backends

try:
    from dlogp_kernels.triton import configs
except ImportError:  # without Triton nothing of it is measured
    configs = None  # type: ignore[assignment]


def tile(*sizes: int, group: int | None = None) -> Any:
    """A configuration of the fused forward kernels; `group` where configurations have it."""
    assert configs is not None
    config = configs.Config(*sizes)
    return config if group is None or not has_group() else config._replace(**{"group": group})


def has_group() -> bool:
    return configs is not None and "group" in configs.Config._fields


def named(config: Any) -> str:
    """As configs.py writes it."""
    return f"Config({', '.join(map(str, config))})"


@contextlib.contextmanager
def fused(config: Any | None = None) -> Iterator[None]:
    """Ops by the Triton kernels, with this tile."""
    with backends.use_backend("triton"):
        if config is None:
            yield
        else:
            with configs.use_config(config):
                yield


@contextlib.contextmanager
def gemm(rows: int, tokens: int) -> Iterator[None]:
    """Ops by the vendor's GEMM, with tiles of this size."""
    with backends.use_backend("gemm"), _gemm_tile((rows, tokens)):
        yield


def _gemm_tile(size: tuple[int, int]) -> AbstractContextManager[None]:
    use = getattr(configs, "use_gemm_tile", None)
    return _patched(size) if use is None else use(*size)


@contextlib.contextmanager
def _patched(size: tuple[int, int]) -> Iterator[None]:
    names = ("_GEMM_TILE", "_INTERPRETED_GEMM_TILE")
    previous = [getattr(configs, name) for name in names]
    for name in names:
        setattr(configs, name, size)
    try:
        yield
    finally:
        for name, value in zip(names, previous, strict=True):
            setattr(configs, name, value)


@contextlib.contextmanager
def policy_rows(of_slice: int, of_block: int) -> Iterator[None]:
    """`linear_policy_loss` by the Triton kernels, with so many rows of logits and of gradients at a time."""
    from dlogp_kernels.triton import linear_policy_loss as launcher

    names, rows = ("_SLICE_ROWS", "_BLOCK_ROWS"), (of_slice, of_block)
    previous = [getattr(launcher, name) for name in names]
    for name, value in zip(names, rows, strict=True):
        setattr(launcher, name, value)
    try:
        # The default workspace would cut larger ones down.
        with backends.use_backend("triton"), backends.workspace_limit(2**30):
            yield
    finally:
        for name, value in zip(names, previous, strict=True):
            setattr(launcher, name, value)


@contextlib.contextmanager
def backward_tile(rows: int, tokens: int) -> Iterator[None]:
    """The fused forward, and backward with tiles of this size."""
    with backends.use_backend("triton"), _gemm_tile((rows, tokens)):
        yield
