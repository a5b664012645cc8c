"""Tile shapes of the fused forward kernels, by architecture, dtype and number of models."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ._device import Device, properties


class Config(NamedTuple):
    """A tile of logits is BLOCK_N rows × BLOCK_V tokens, summed over BLOCK_D of the hidden size at a time."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    #: Row tiles that walk through the vocabulary side by side and share its tiles in the L2 cache.
    group: int = 16


#: (architecture, models, bytes of an element) → the default, then alternatives. Chosen so that nothing spills to local
#: memory (tests/offline_gpu/test_compile.py) and the tile is as large as that allows. Those of (90, …, 2) are in the
#: order that an H100 measured (benchmarks/results); nobody has measured the others. A pair holds two tiles of logits in
#: registers at once; in float32 there is a part of its sums beside a tile (linear_forward.logits_tile).
_CONFIGS: dict[tuple[int, int, int], list[Config]] = {
    (80, 1, 2): [Config(128, 128, 64, 8, 3), Config(64, 256, 64, 8, 3), Config(64, 128, 64, 4, 3)],
    (80, 1, 4): [Config(64, 128, 32, 8, 3)],
    (80, 2, 2): [Config(128, 64, 32, 8, 3), Config(64, 64, 64, 8, 3)],
    (80, 2, 4): [Config(64, 32, 32, 8, 3)],
    (90, 1, 2): [
        Config(128, 256, 64, 8, 3, group=32),
        Config(128, 256, 64, 8, 4),
        Config(256, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
    ],
    (90, 1, 4): [Config(128, 128, 32, 8, 3)],
    (90, 2, 2): [Config(128, 128, 64, 8, 4), Config(128, 128, 128, 8, 3), Config(128, 128, 64, 8, 6)],
    (90, 2, 4): [Config(128, 64, 32, 8, 3)],
    (100, 1, 2): [Config(128, 128, 64, 8, 4), Config(128, 256, 64, 8, 3)],
    (100, 1, 4): [Config(128, 128, 32, 8, 3)],
    (100, 2, 2): [Config(128, 64, 64, 8, 3)],
    (100, 2, 4): [Config(64, 64, 32, 4, 3)],
}
#: Bytes of an element → for sampling from a pair, on every architecture: as few rows as fill a matrix unit, since
#: batches are of few rows and memory sets the pace. Noise and winners take registers beside both tiles.
_SAMPLE_CONFIGS = {2: Config(64, 64, 64, 8, 3), 4: Config(64, 32, 32, 8, 3)}
#: On Hopper, by an H100: as many bytes on their way as fit into shared memory.
_HOPPER_SAMPLE_CONFIG = Config(64, 64, 128, 8, 6)
#: Bytes of an element → where rows of the weight do not begin on 16 bytes, or its dtype is another: narrow loads, many
#: addresses.
_UNALIGNED = {2: Config(128, 64, 32, 8, 2), 4: Config(128, 32, 32, 8, 2)}
_UNALIGNED_SAMPLE = {2: Config(64, 64, 32, 8, 2), 4: Config(64, 32, 32, 8, 2)}
#: The interpreter's time goes by the number of operations: few and large ones.
_OTHERS = {"hip": Config(64, 64, 32, 4, 2), "interpreter": Config(32, 64, 32, 1, 1)}

#: Rows × tokens of a tile of float32 logits between a GEMM and a Triton kernel: of the backend "gemm", and in backward,
#: where an H200 was fastest with tiles that outgrow its L2 cache.
_GEMM_TILE = (1024, 4096)
_BACKWARD_TILE = (4096, 4096)
_INTERPRETED_GEMM_TILE = (32, 128)

_chosen: Config | None = None


def chosen() -> Config | None:
    """Of `use_config`."""
    return _chosen


def candidates(models: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Config]:
    """The configurations for one model or a pair on this device, the default first."""
    found = properties(device)
    if found.kind != "cuda":
        return [_OTHERS[found.kind]]
    return _CONFIGS[_architecture(found), models, dtype.itemsize]


def config(models: int, device: torch.device, dtype: torch.dtype, aligned: bool) -> Config:
    """The tile of a call; `aligned`: every model's weight can be copied 16 bytes at a time."""
    default = candidates(models, device, dtype)[0]
    if _chosen is not None:
        return _chosen
    return default if aligned or properties(device).kind != "cuda" else _UNALIGNED[dtype.itemsize]


def sample_config(models: int, device: torch.device, dtype: torch.dtype, aligned: bool) -> Config:
    """As `config`, of linear_extrapolated_sample."""
    found = properties(device)
    if _chosen is not None:
        return _chosen
    if found.kind != "cuda":
        return _OTHERS[found.kind]
    if not aligned:
        return _UNALIGNED_SAMPLE[dtype.itemsize]
    on_hopper = _architecture(found) == 90 and dtype.itemsize == 2
    return _HOPPER_SAMPLE_CONFIG if on_hopper else _SAMPLE_CONFIGS[dtype.itemsize]


@contextlib.contextmanager
def use_config(chosen: Config | None) -> Iterator[None]:
    """Within this context every fused forward takes this configuration: to measure it."""
    global _chosen
    previous, _chosen = _chosen, chosen
    try:
        yield
    finally:
        _chosen = previous


def _architecture(device: Device) -> int:
    """Hopper and datacentre Blackwell have tiles of their own; all others multiply as Ampere does."""
    return {9: 90, 10: 100}.get(device.arch // 10, 80)


def gemm_tile(device: torch.device) -> tuple[int, int]:
    """Rows × tokens of the tiles of logits that a GEMM computes."""
    return _INTERPRETED_GEMM_TILE if properties(device).kind == "interpreter" else _GEMM_TILE


def backward_tile(device: torch.device) -> tuple[int, int]:
    return _INTERPRETED_GEMM_TILE if properties(device).kind == "interpreter" else _BACKWARD_TILE
