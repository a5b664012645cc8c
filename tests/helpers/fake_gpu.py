"""A GPU that is not there: kernels are specialised, compiled and launched for it by Triton itself, and do not run.

`pretend(gpu)` makes Triton believe in it, so that `kernel[grid](...)` with tensors on the CPU goes Triton's own way, to
machine code and, on NVIDIA's GPUs, through its launcher to the driver, where stub_libcuda/libcuda.c keeps what arrives;
what would have been computed stays as it was allocated. `launch_code_sees(gpu)` makes the library's launch code choose
as it would there.
"""

import atexit
import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
import triton.backends.nvidia.driver as nvidia
from paths import HELPERS
from tolerances import REGISTERS, SPILLED_BYTES
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
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


#: Kernels that multiply hidden states and weights themselves.
MULTIPLY = ("_linear_logp_fwd_kernel", "_linear_delta_logp_fwd_kernel", "_linear_extrapolated_sample_kernel")
TRITON = ".".join(triton.__version__.split(".")[:2])


class Kernel(NamedTuple):
    """A compiled kernel: its compile-time arguments by name, assembly, registers a thread, bytes spilled to memory."""

    name: str
    constants: dict[str, Any]
    assembly: str
    registers: int
    spilled: int
    shared_memory: int


class Arrived(NamedTuple):
    """What a launch brought to the driver: the bytes of each parameter that the machine code has, in its order."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_memory: int
    function: int
    parameters: list[bytes]


class Launch(NamedTuple):
    """One `kernel[grid](...)`: what Triton compiled, the arguments by name, and what arrived, None on AMD's GPUs."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    arrived: Arrived | None


class _Record(ctypes.Structure):
    """As in stub_libcuda/libcuda.c."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_memory", ctypes.c_uint32),
        ("launches", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("parameters", ctypes.c_uint8 * 32764),
    )


class TensorMap(ctypes.Structure):
    """What a tensor map was made from, the innermost dimension first; strides in bytes, without the innermost."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("dimensions", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
        ("element_strides", ctypes.c_uint32 * 5),
        *((name, ctypes.c_uint8) for name in ("type", "rank", "interleave", "swizzle", "l2_promotion", "fill")),
    )


@functools.cache
def directory() -> Path:
    """For what this process builds, so that nothing is left of other versions and runs."""
    path = tempfile.mkdtemp(prefix="offline_gpu_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def libcuda() -> ctypes.CDLL:
    """stub_libcuda/libcuda.c, which then is libcuda.so.1 to this process, for Triton's modules too."""
    path, source = directory() / "libcuda.so.1", HELPERS / "stub_libcuda" / "libcuda.c"
    command = ["gcc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{path.name}", f"-o{path}", str(source)]
    subprocess.run([*command, *(f"-I{x}" for x in nvidia.include_dirs)], check=True)
    library = ctypes.CDLL(str(path))
    if not hasattr(ctypes.CDLL(path.name), "offline_launch"):
        pytest.skip("this process has loaded the driver of a GPU: launches would reach it")
    library.offline_launch.restype = ctypes.POINTER(_Record)
    # Triton links what it builds for a launch with the library in this directory.
    triton.knobs.nvidia.libcuda_path = str(path.parent)
    return library


class _Current:
    """What a driver of Triton says, where its own would ask torch."""

    gpu: Gpu

    def get_current_device(self) -> int:
        return self.gpu.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target


class _Cuda(_Current, nvidia.CudaDriver):
    """Triton's own but for that."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        libcuda().offline_device(gpu.device, gpu.shared_memory, gpu.programs)
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher


class _HipUtils:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared_memory, "multiprocessor_count": self.gpu.programs}

    def load_binary(self, name: str, binary: bytes, shared_memory: int, device: int) -> tuple[int, int, int, int, int]:
        module, function, registers, spills, largest_block = 1, 1, 0, 0, 1024
        return module, function, registers, spills, largest_block


class _Hip(_Current):
    """As much of a Triton driver as compiling and launching uses; what builds its launcher needs ROCm."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.utils = gpu, _HipUtils(gpu)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None


@contextlib.contextmanager
def pretend(gpu: Gpu) -> Iterator[list[Launch]]:
    """Within this context launches go to this GPU, which never runs them; yields them, in order."""
    launched: list[Launch] = []
    run, get_launcher, cuda = JITFunction.run, CompiledKernel.__getitem__, gpu.target.backend == "cuda"

    def record(compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any], launch: Callable[[], Any]) -> None:
        sizes = parameter_sizes(compiled.asm["ptx"]) if cuda else []
        if cuda:
            libcuda().offline_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        launch()
        launched.append(Launch(compiled, grid, arguments, _arrived(sizes) if cuda else None))

    @functools.wraps(run)
    def run_and_record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = self.signature.bind(*args, **{x: kwargs[x] for x in kwargs if x in self.signature.parameters})
        record(compiled, grid, arguments.arguments, lambda: run(self, *args, grid=grid, warmup=False, **kwargs))
        return compiled

    def launcher_that_records(self: CompiledKernel, grid: tuple[int, ...]) -> Callable[..., None]:
        """Of a kernel that the launch code kept: it has to be the one that Triton takes for these arguments."""
        options = {name: getattr(self.metadata, name) for name in ("num_warps", "num_stages")}

        def launch_and_record(*args: Any) -> None:
            own_choice = run(self.src.fn, *args, grid=grid, warmup=True, **options)
            assert own_choice.hash == self.hash, f"{self.name} was kept for other arguments"
            arguments = dict(zip(self.src.fn.arg_names, args, strict=True))
            record(self, grid, arguments, lambda: get_launcher(self, grid)(*args))

        return launch_and_record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", None)
        patch.setattr(triton.knobs.cache, "dir", str(directory() / "cache"))
        driver.set_active(_Cuda(gpu) if cuda else _Hip(gpu))
        patch.setattr(JITFunction, "run", run_and_record)
        patch.setattr(CompiledKernel, "__getitem__", launcher_that_records)
        yield launched


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel; an array, as a tensor map is, has a number of elements."""
    (parameters,) = re.findall(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    declared = re.findall(r"\.param\b[^,]*?\.[a-z](\d+)\s[^,]*?\w+(?:\[(\d+)\])?\s*(?:,|$)", parameters)
    assert len(declared) == parameters.count(".param")
    return [int(bits) // 8 * int(elements or 1) for bits, elements in declared]


def _arrived(sizes: list[int]) -> Arrived:
    record, place, parameters = libcuda().offline_launch().contents, 0, []
    raw = bytes(record.parameters[: sum(sizes)])
    for size in sizes:
        parameters.append(raw[place : place + size])
        place += size
    return Arrived(tuple(record.grid), tuple(record.block), record.shared_memory, record.function, parameters)


def kernels(launched: list[Launch]) -> list[Kernel]:
    """Each kernel that was launched, once."""
    return [_kernel(compiled) for compiled in {id(x.compiled): x.compiled for x in launched}.values()]


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


def assert_fits(gpu: str, kernel: Kernel) -> None:
    print(f"{kernel.name} {kernel.constants}: {kernel[3:]}")
    aligned, one_target = kernel.constants.get("DESCRIPTORS"), kernel.constants.get("ONE_TARGET", True)
    names = [kernel.name] + [f"{kernel.name} of several targets"] * bool(aligned and not one_target)
    allowed = max(SPILLED_BYTES.get((TRITON, gpu, name), 0) for name in names)
    assert kernel.spilled <= allowed, f"{kernel.name} {kernel.constants} spills {kernel.spilled} bytes a thread"
    assert kernel.registers <= REGISTERS[GPUS[gpu].target.backend]
    assert kernel.shared_memory <= GPUS[gpu].shared_memory


def assert_uses(gpu: str, kernel: Kernel, aligned: bool) -> None:
    """The instructions that it is for; `aligned`: rows of the weight begin on 16 bytes."""
    if kernel.name in MULTIPLY:
        assert re.search(GPUS[gpu].matrix_instruction, kernel.assembly)
        assert kernel.constants["DESCRIPTORS"] == (GPUS[gpu].descriptors and aligned)
        assert ("cp.async.bulk.tensor" in kernel.assembly) == kernel.constants["DESCRIPTORS"]
    if kernel.name == "_policy_loss_fwd_kernel" and gpu != "gfx942":
        # What the last program adds up: all written before it was told, none of it from a cache of its own.
        assert "atom.global.gpu.acq_rel" in kernel.assembly and "ld.global.cg" in kernel.assembly


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
        # Nothing that torch compiles is used: any Triton will do.
        patch.setattr(backends, "_triton_problem", lambda: None)
        yield
