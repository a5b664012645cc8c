"""Names of the library that only benchmarks need from outside: the tiles of its Triton kernels."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from dlogp_kernels import backends

configs: Any
try:
    from dlogp_kernels.triton import configs
except ImportError:  # without Triton nothing of it is measured
    configs = None


def named(config: Any) -> str:
    """As configs.py writes it."""
    return f"Config({', '.join(map(str, config))})"


@contextlib.contextmanager
def fused(config: Any | None = None) -> Iterator[None]:
    """Ops by the Triton kernels, with this tile."""
    with backends.use_backend("triton"), contextlib.nullcontext() if config is None else configs.use_config(config):
        yield


@contextlib.contextmanager
def gemm(rows: int, tokens: int, backend: str = "gemm") -> Iterator[None]:
    """Ops by the vendor's GEMM, with tiles of this size; by "triton", its backward has them."""
    names = ("_GEMM_TILE", "_BACKWARD_TILE", "_INTERPRETED_GEMM_TILE")
    tiles: dict[str, Any] = dict.fromkeys(names, (rows, tokens))
    with backends.use_backend(backend), patch.multiple(configs, **tiles):
        yield


@contextlib.contextmanager
def policy_rows(of_slice: int, of_block: int) -> Iterator[None]:
    """`linear_policy_loss` by the Triton kernels, with so many rows of logits and of gradients at a time."""
    from dlogp_kernels.triton import linear_policy_loss as launcher

    rows: dict[str, Any] = {"_SLICE_ROWS": of_slice, "_BLOCK_ROWS": of_block}
    # The default workspace would cut larger ones down.
    with backends.use_backend("triton"), backends.workspace_limit(2**30), patch.multiple(launcher, **rows):
        yield
