"""Names of the library that only benchmarks need from outside: the tiles of its Triton kernels."""

import contextlib
from collections.abc import Iterator
from typing import Any

from dlogp_kernels import backends

configs: Any
try:
    from dlogp_kernels.triton import configs
except ImportError:  # without Triton nothing of it is measured
    configs = None


def tile(*sizes: int) -> Any:
    return configs.Config(*sizes)


def has_group() -> bool:
    return "group" in configs.Config._fields


def with_group(config: Any, group: int) -> Any:
    return config._replace(group=group)


def named(config: Any) -> str:
    """As configs.py writes it."""
    return f"Config({', '.join(map(str, config))})"


@contextlib.contextmanager
def fused(config: Any | None = None) -> Iterator[None]:
    """Ops by the Triton kernels, with this tile."""
    with backends.use_backend("triton"), contextlib.nullcontext() if config is None else configs.use_config(config):
        yield


@contextlib.contextmanager
def gemm(rows: int, tokens: int) -> Iterator[None]:
    """Ops by the vendor's GEMM, with tiles of this size."""
    use = getattr(configs, "use_gemm_tile", None)
    with backends.use_backend("gemm"), _patched((rows, tokens)) if use is None else use((rows, tokens)):
        yield


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
