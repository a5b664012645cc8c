"""The CUDA C++ ops on the CPU: kernels and bindings are their own source, CUDA itself is cuda_on_cpu.

The op is then `torch.ops.dlogp._cuda_extrapolated_sample` for tensors of the CPU.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from paths import HELPERS, ROOT
from torch.utils.cpp_extension import include_paths, library_paths

from dlogp_kernels import backends

STAND_IN = HELPERS / "cuda_on_cpu"
#: What is of the device in the bindings, and what takes its place.
_REPLACED = {
    "STABLE_TORCH_LIBRARY_IMPL(dlogp, CUDA, library)": "STABLE_TORCH_LIBRARY_IMPL(dlogp, CPU, library)",
    "is_cuda()": "is_cpu()",
    "const torch::stable::accelerator::DeviceGuard guard(logits.get_device());": "",
    '#include "../csrc/': f'#include "{ROOT}/csrc/',
    '#include "cuda_checks.h"': f'#include "{ROOT}/python_bindings/cuda_checks.h"',
}
_COMPILER = shutil.which("g++")
WHY_NOT = None if _COMPILER else "no g++"


class Launch(NamedTuple):
    """Blocks of a cluster, whether they keep their logits in shared memory, and the order in which threads run."""

    blocks: int = 1
    kept: bool = True
    backwards: bool = False


@functools.cache
def _library() -> ctypes.CDLL:
    source = (ROOT / "python_bindings" / "sampling_cuda.cpp").read_text()
    for old, new in _REPLACED.items():
        assert old in source, f"{old} is not in the bindings any more"
        source = source.replace(old, new)
    flags = [
        "-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{STAND_IN}", *(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths()),
    ]  # fmt: skip
    assert _COMPILER is not None
    # What is loaded stays when its file is gone.
    with tempfile.TemporaryDirectory(prefix="cuda_on_cpu") as folder:
        binding, built = Path(folder, "sampling_cuda.cpp"), Path(folder, "cuda_on_cpu.so")
        binding.write_text(source)
        sources = [str(binding), *sorted(map(str, STAND_IN.glob("*.cpp")))]
        subprocess.run([_COMPILER, *flags, *sources, "-ltorch_cpu", "-lc10", "-o", str(built)], check=True)
        torch.ops.load_library(built)
        loaded = ctypes.CDLL(str(built))
    loaded.set_launch.argtypes = (ctypes.c_int, ctypes.c_bool, ctypes.c_bool)
    return loaded


@contextmanager
def emulated(launch: Launch) -> Iterator[None]:
    """Within this context `extrapolated_sample` is served by the CUDA C++ kernel, on the CPU."""
    _library().set_launch(*launch)
    with (
        mock.patch.object(backends, "_cuda_problem", return_value=None),
        backends.use_backend("cuda"),
    ):
        yield
