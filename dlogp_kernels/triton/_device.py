"""What launch code asks of a GPU."""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import backends


class Device(NamedTuple):
    """`arch`: 10 · compute capability, or 0 for what is neither (Triton's interpreter, AMD's GPUs).

    `programs` is the number of multiprocessors; `descriptors`: tiles can be loaded by tensor descriptor.
    """

    arch: int
    programs: int
    descriptors: bool


_INTERPRETER = Device(arch=0, programs=3, descriptors=True)


@functools.cache
def properties(device: torch.device) -> Device:
    """Of a CUDA device (with an index), or of Triton's interpreter on the CPU."""
    if device.type == "cpu":
        return _INTERPRETER
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip is not None:
        return Device(0, programs, descriptors=False)
    major, minor = torch.cuda.get_device_capability(device)
    return Device(10 * major + minor, programs, descriptors=major >= 9)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies inputs of this dtype: float32 in full, unless the user allowed TF32."""
    if dtype != torch.float32:
        return "ieee"
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def interpreted() -> bool:
    return backends.interpreting()
