"""What launch code asks of a GPU."""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """`kind`: "cuda", "hip" (AMD) or "interpreter" (Triton's, on the CPU); `arch`: 10 · compute capability of CUDA.

    `programs` is the number of multiprocessors; `descriptors`: tiles can be loaded by tensor descriptor.
    """

    kind: str
    arch: int
    programs: int
    descriptors: bool


_INTERPRETER = Device("interpreter", arch=0, programs=3, descriptors=True)


@functools.cache
def properties(device: torch.device) -> Device:
    """Of a CUDA device (with an index), or of Triton's interpreter on the CPU."""
    if device.type == "cpu":
        return _INTERPRETER
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip is not None:
        return Device("hip", 0, programs, descriptors=False)
    major, minor = torch.cuda.get_device_capability(device)
    return Device("cuda", 10 * major + minor, programs, descriptors=major >= 9)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def precision(device: Device, dtype: torch.dtype) -> str:
    """How tl.dot multiplies inputs of this dtype: float32 in full, unless the user allowed TF32."""
    if dtype != torch.float32 or device.kind == "hip":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
