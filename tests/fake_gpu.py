"""A GPU that is not there: kernels are specialised and compiled for it as in a real launch, and are not run.

`pretend(gpu)` makes Triton believe in it, so that `kernel[grid](...)` with tensors on the CPU compiles through Triton's
own path, to machine code; what would have been computed stays as it was allocated. `launch_code_sees(gpu)` makes the
library's launch code choose as it would there.
"""

import contextlib
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Gpu(NamedTuple):
    """What kernels and launch code can ask of one: shared memory in bytes that a program may have, multiprocessors."""

    target: GPUTarget
    shared_memory: int
    programs: int
    matrix_instruction: str
    descriptors: bool

    @property
    def device(self) -> int:
        """A number of its own, since Triton keeps what it compiled by device."""
        return self.target.arch if self.target.backend == "cuda" else 1000


GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), 166_912, 108, r"mma\.sync", False),
    "sm_89": Gpu(GPUTarget("cuda", 89, 32), 101_376, 128, r"mma\.sync", False),
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 232_448, 132, r"wgmma\.mma_async", True),
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 232_448, 148, r"tcgen05\.mma", True),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 65_536, 304, r"v_mfma", False),
}


class Kernel(NamedTuple):
    """A compiled kernel: its compile-time arguments by name, assembly, registers a thread, bytes spilled to memory."""

    name: str
    constants: dict[str, Any]
    assembly: str
    registers: int
    spilled: int
    shared_memory: int


class _Utils:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared_memory, "multiprocessor_count": self.gpu.programs}

    def load_binary(self, name: str, binary: bytes, shared_memory: int, device: int) -> tuple[int, int, int, int, int]:
        module, function, registers, spills, largest_block = 1, 1, 0, 0, 1024
        return module, function, registers, spills, largest_block


class _Driver:
    """As much of a Triton driver as compiling and launching uses."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.utils = gpu, _Utils(gpu)

    def get_current_device(self) -> int:
        return self.gpu.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None


@contextlib.contextmanager
def pretend(gpu: Gpu) -> Iterator[list[Any]]:
    """Within this context launches go to this GPU; yields Triton's compiled kernels, one for each launch."""
    launched: list[Any] = []
    run = JITFunction.run

    @functools.wraps(run)
    def run_and_record(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        launched.append(run(self, *args, **kwargs))
        return launched[-1]

    previous = driver._active
    driver.set_active(_Driver(gpu))
    JITFunction.run = run_and_record
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver._active = previous


def kernels(launched: list[Any]) -> list[Kernel]:
    """Each kernel that was launched, once."""
    return [_kernel(compiled) for compiled in {id(x): x for x in launched}.values()]


def _kernel(compiled: Any) -> Kernel:
    names = compiled.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in compiled.src.constants.items() if len(path) == 1}
    if "ptx" in compiled.asm:
        assembly = compiled.asm["ptx"]
        registers, spilled = _resources_of_cubin(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = (_number(rf"; {field}: (\d+)", assembly) for field in ("NumVgprs", "ScratchSize"))
    return Kernel(compiled.name, constants, assembly, registers, spilled, compiled.metadata.shared)


def _resources_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers, and the stack frame: the kernels have no arrays or calls, so that all of it is spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", report), _number(r"STACK:(\d+)", report) + _number(r"LOCAL:(\d+)", report)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in {text}"
    return int(found[1])


@contextlib.contextmanager
def launch_code_sees(gpu: Gpu) -> Iterator[None]:
    """Within this context the library's launch code takes tensors on the CPU for tensors on this GPU."""
    import dlogp_kernels.triton.gemm
    from dlogp_kernels import backends
    from dlogp_kernels.triton import _device

    kind, arch = gpu.target.backend, gpu.target.arch
    seen = _device.Device(kind, arch if kind == "cuda" else 0, gpu.programs, gpu.descriptors)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith(dlogp_kernels.triton.__name__) and hasattr(module, "properties"):
                patch.setattr(module, "properties", lambda device: seen)
        patch.setattr(backends, "_device_problem", lambda device: None)
        yield
