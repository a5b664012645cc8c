"""Which backend serves an op on a device, and why not another.

A backend supplies launchers: functions with the arguments of the op's schema plus the workspace in bytes. Those in
Python take structures (inputs.py) where schemas.STRUCTURES has them.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import installation
from ..checks import check_storage
from ..inputs import rebuilt
from . import schemas

#: In order of preference, but for what the table below says: C++ for the CPU, fused Triton kernels, CUDA C++, the
#: vendor's GEMM with Triton kernels around it, and plain PyTorch.
BACKENDS = ("cpu", "triton", "cuda", "gemm", "reference")
#: Those with an extension module `_<backend>`.
COMPILED = ("cpu", "cuda")
#: Modules with the launchers of ops that are not private ops of such an extension (`is_private`).
_MODULES = {
    "triton": "dlogp_kernels.triton",
    "cuda": "dlogp_kernels.triton.hopper",
    "gemm": "dlogp_kernels.triton.gemm",
    "reference": "dlogp_kernels.eager",
}
_LINEAR_FORWARD = ("linear_logp_fwd", "linear_delta_logp_fwd")
#: Of "cuda", on Hopper alone.
_HOPPER = (*_LINEAR_FORWARD, "linear_logp_bwd", "linear_delta_logp_bwd")
#: Ops of the backends that do not have all. The others are served by "triton" when such a backend is asked for.
_ONLY = {"gemm": _LINEAR_FORWARD, "cuda": ("extrapolated_sample", *_HOPPER)}
#: Compute capabilities that the CUDA C++ kernels are compiled for: of sampling, and of _HOPPER.
_SAMPLING_CAPABILITIES = ("8.x", "9.0", "10.0")
_LINEAR_CAPABILITIES = ("9.0",)
#: The Triton that each PyTorch is built for. Of a later one it is not known here, and any Triton will do.
_TRITON_OF_TORCH = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8"}
#: Releases of PyTorch that this version was tried with, and where. It can be installed beside others.
TRIED_TORCH = {"2.11": "on an H100", "2.13": "without a GPU", "2.14": "without a GPU"}

DEFAULT_WORKSPACE = 256 * 2**20
NOT_MEASURED = "not measured"
#: Of which `report` speaks, and `select` where nothing is said.
_HIDDEN_SIZE = 4096

_Launcher = Callable[..., tuple[torch.Tensor, ...]]
_extension_problems: dict[str, str] = {}
#: Kinds of devices of which it was looked whether kernels are missing, and said.
_checked_for_kernels: set[str] = set()
_chosen: str | None = os.environ.get("DLOGP_BACKEND") or None
_workspace = DEFAULT_WORKSPACE

if _chosen is not None and _chosen not in BACKENDS:
    raise ValueError(f"DLOGP_BACKEND is {_chosen!r}, expected one of {', '.join(BACKENDS)}")


class Preference(NamedTuple):
    """A line of the table: on GPUs of this architecture (10 · compute capability; None: any), and for inputs of these
    dtypes (none: any) and hidden sizes, `backend` comes first. `measured` names the results that say so.

    There is no choice by the number of tokens: it would change a row's bits.
    """

    op: str
    backend: str
    architecture: int | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    hidden_sizes: range = range(2**31)
    measured: str | None = None

    def holds(self, op: str, architecture: int, dtype: torch.dtype, hidden_size: int) -> bool:
        return (
            self.op == op
            and self.architecture in (None, architecture)
            and (not self.dtypes or dtype in self.dtypes)
            and hidden_size in self.hidden_sizes
        )


_VISIT = "benchmarks/results/h100_visit1.json"
_HOPPER_VISIT = "benchmarks/results/h200_visit1.json"
#: Lines that hold count in their order. Of what has no line "triton" comes first, unmeasured.
PREFERENCES = (
    Preference("linear_logp_fwd", "cuda", 90, (torch.bfloat16,), range(896, 8193), _HOPPER_VISIT),
    Preference("linear_logp_fwd", "triton", 90, (torch.bfloat16,), range(896, 4097), _VISIT),
    Preference("linear_delta_logp_fwd", "cuda", 90, (torch.bfloat16,), range(896, 8193), _HOPPER_VISIT),
    Preference("linear_delta_logp_fwd", "triton", 90, (torch.bfloat16,), range(896, 4097), _VISIT),
    Preference("linear_logp_bwd", "cuda", 90, (torch.bfloat16,), range(896, 8193), _HOPPER_VISIT),
    Preference("extrapolated_sample", "cuda", 90, (torch.bfloat16,), measured=_VISIT),
    Preference("extrapolated_sample", "cuda"),
)


class Choice(NamedTuple):
    """One line of `report()`: the backend that serves `op` on `device`, and why each other one does not.

    `measured`: where several have kernels for it, the results by which this one comes first, or that there are none.
    """

    op: str
    device: str
    backend: str
    others: dict[str, str]
    measured: str | None = None


def has(backend: str, op: str) -> bool:
    """Whether `backend` implements `op` at all."""
    return backend not in _ONLY or op in _ONLY[backend]


def is_private(backend: str, op: str) -> bool:
    """Whether `backend` has `op` as `torch.ops.dlogp._<backend>_<op>`, which takes the flat list and the workspace."""
    return backend == "cpu" or (backend, op) == ("cuda", "extrapolated_sample")


def load_extensions() -> None:
    """Load the compiled kernels, remembering why that was not possible."""
    try:
        importlib.import_module("dlogp_kernels._cpu")
    except ModuleNotFoundError:
        _extension_problems["cpu"] = installation.why_no_kernels()
    except ImportError as error:
        _extension_problems["cpu"] = (
            f"the compiled extension does not load with torch {torch.__version__} (was it built for another version?): "
            f"{error}. To build it anew: {installation.how_to_install()}"
        )
    problem = _load_cuda_library()
    if problem is not None:
        _extension_problems["cuda"] = problem


def _load_cuda_library() -> str | None:
    """A library without Python in it; it needs symbols that only CUDA builds of torch have."""
    found = sorted(Path(__file__).parent.parent.glob("_cuda*.so"))
    if not found:
        return "the CUDA extension is missing: it is built at installation where nvcc is found"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the CUDA extension does not load with torch {torch.__version__}: {error}"
    kernels = [schema.split("(")[0] for schema in schemas.LINEAR_KERNELS]
    kernels += [f"_cuda_{op}" for op in schemas.SCHEMAS if is_private("cuda", op)]
    for name in kernels:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dlogp::{name}", "CUDA"):
            return f"the CUDA extension has no {name}: older sources. To build it anew: {installation.how_to_install()}"
    return None


def unavailable(
    backend: str,
    op: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    misfit: str | None = None,
) -> str | None:
    """Why `backend` can not serve `op` of inputs of this dtype on `device`; None if it can.

    `misfit`: what else there is about the inputs that the kernels of "cuda" do not take.
    """
    if backend == "reference":
        return None
    device = torch.device(device)
    if backend == "cpu":
        return _extension_problems.get("cpu") if device.type == "cpu" else "it has kernels for the CPU only"
    if not has(backend, op):
        return "it has linear forward ops only" if backend == "gemm" else f"it has {', '.join(_ONLY[backend])} only"
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if backend == "cuda" and op in _HOPPER:
        return _hopper_problem(device, dtype) or misfit
    if backend == "cuda":
        return _cuda_problem(device, _SAMPLING_CAPABILITIES)
    return _triton_problem() or _device_problem(device)


def select(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    hidden_size: int | None = None,
    misfit: str | None = None,
) -> str:
    """The backend that serves `op` of inputs of this dtype and hidden size (None: of 4096) on `device` now.

    `misfit` as in `unavailable`.
    """
    device = torch.device(device)
    if _chosen is None:
        return _first(op, device, dtype, _candidates(op, device, dtype, hidden_size), misfit)
    return _first(op, device, dtype, (_chosen if has(_chosen, op) else "triton",), misfit)


def _first(op: str, device: torch.device, dtype: torch.dtype, candidates: tuple[str, ...], misfit: str | None) -> str:
    for backend in candidates:
        problem = unavailable(backend, op, device, dtype, misfit)
        if problem is None:
            return backend
    raise RuntimeError(
        f"dlogp_kernels.{op}: backend {candidates[0]!r} was asked for on {device.type} with {dtype}, but {problem}"
    )


def _candidates(op: str, device: torch.device, dtype: torch.dtype, hidden_size: int | None) -> tuple[str, ...]:
    lines = _lines(op, device, dtype, hidden_size)
    return (*dict.fromkeys((*(line.backend for line in lines), *BACKENDS)),)


@functools.cache
def _lines(op: str, device: torch.device, dtype: torch.dtype, hidden_size: int | None) -> tuple[Preference, ...]:
    """Of the table, those that hold."""
    if device.type != "cuda":
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    at = (op, 10 * major + minor, dtype, _HIDDEN_SIZE if hidden_size is None else hidden_size)
    return tuple(line for line in PREFERENCES if line.holds(*at))


def torch_release() -> str:
    """The installed PyTorch's version up to the minor number, as in `TRIED_TORCH`."""
    return ".".join(torch.__version__.split(".")[:2])


@functools.cache
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    expected = _TRITON_OF_TORCH.get(torch_release())
    if expected is not None and version.split(".")[:2] != expected.split("."):
        return f"triton {version} does not fit torch {torch.__version__}, which is built for triton {expected}"
    return None


def _device_problem(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None if interpreting() else "it has kernels for GPUs only (TRITON_INTERPRET=1 runs them on the CPU)"
    if device.type != "cuda":
        return f"it has no kernels for the device {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, expected 8.0 or later"
    return None


def _hopper_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype.itemsize != 2:
        return "it multiplies bfloat16 and float16 only"
    return _cuda_problem(device, _LINEAR_CAPABILITIES) or _triton_problem()


def _misfit(given: dict[str, Any]) -> str | None:
    """What of an op's arguments keeps the kernels for Hopper from serving them.

    They copy tiles 16 bytes at a time, and do not look for the most likely token.
    """
    dtype = given["hidden"].dtype
    for prefix in ("", "base_") if "base_hidden" in given else ("",):
        hidden, weight = given[f"{prefix}hidden"], given[f"{prefix}weight"]
        if not hidden.dtype == weight.dtype == dtype:
            return f"hidden is {dtype}, {prefix}hidden {hidden.dtype} and {prefix}weight {weight.dtype}"
        stride = weight.stride(0)
        if weight.stride(1) != 1 or stride % 8 or stride < weight.shape[1] or weight.data_ptr() % 16:
            return f"rows of {prefix}weight do not begin on 16 bytes"
    return "it does not look for the most likely token" if given.get("top") else None


def _cuda_problem(device: torch.device, capabilities: tuple[str, ...]) -> str | None:
    if device.type != "cuda":
        return "it has kernels for GPUs only"
    if "cuda" in _extension_problems:
        return _extension_problems["cuda"]
    major, minor = torch.cuda.get_device_capability(device)
    if f"{major}.x" not in capabilities and f"{major}.{minor}" not in capabilities:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, expected {', '.join(capabilities)}"
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def warn_of_missing_kernels(device: torch.device | str) -> None:
    """A UserWarning, once a process, where plain PyTorch serves a device because its kernels are missing.

    Nothing is said of a backend that was asked for.
    """
    kind = torch.device(device).type
    if _chosen is not None or kind in _checked_for_kernels:
        return
    _checked_for_kernels.add(kind)
    # An op and a dtype that all kernels have.
    if select("logp_fwd", device) == "reference":
        problem = unavailable("cpu" if kind == "cpu" else "triton", "logp_fwd", device)
        warnings.warn(
            f"plain PyTorch serves the ops on the device {kind}, many times slower than kernels would: {problem}",
            stacklevel=2,
        )


def launch(op: str, first: torch.Tensor, dtype: torch.dtype, *arguments: object) -> tuple[torch.Tensor, ...]:
    """Run `op` with the backend selected for inputs of this dtype, of which `first` is the first tensor."""
    hidden_size, misfit = None, None
    if first.is_cuda and op in _HOPPER and "cuda" not in _extension_problems:
        given: dict[str, Any] = dict(zip(_argument_names(op), arguments, strict=True))
        first = given["hidden"]
        hidden_size, misfit = first.shape[-1], _misfit(given)
        dtype = dtype if dtype == torch.float64 else first.dtype
    backend = select(op, first.device, dtype, hidden_size, misfit)
    if not is_private(backend, op):
        _check_storages(op, arguments)
    with without_autocast(first.device):
        if backend == "reference":
            warn_of_missing_kernels(first.device)
        return _launcher(backend, op)(*arguments, _workspace)


def launch_blocked(op: str, first: torch.Tensor, dtype: torch.dtype, *arguments: object) -> tuple[torch.Tensor, ...]:
    """Run plain PyTorch's form of `op`, which calls other ops: those are served by the backend selected for them."""
    _check_storages(op, arguments)
    with without_autocast(first.device):
        return _launcher("reference", op)(*arguments, _workspace)


def _check_storages(op: str, arguments: tuple[object, ...]) -> None:
    """Those of every tensor; the bindings of compiled backends do it themselves, where they take a pointer."""
    for name, x in zip(_argument_names(op), arguments, strict=True):
        if isinstance(x, torch.Tensor):
            check_storage(name, x)


@functools.cache
def _argument_names(op: str) -> tuple[str, ...]:
    return tuple(argument.name for argument in getattr(torch.ops.dlogp, op).default._schema.arguments)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The op's arguments are as autocast wants them; the matrix products inside must not be cast again."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()  # entering autocast takes longer than a small batch
    return torch.autocast(device.type, enabled=False)


@functools.cache
def _launcher(backend: str, op: str) -> _Launcher:
    if is_private(backend, op):
        return getattr(torch.ops.dlogp, f"_{backend}_{op}")
    launcher, structures = getattr(importlib.import_module(_MODULES[backend]), op), schemas.STRUCTURES.get(op)
    return launcher if structures is None else functools.partial(_with_structures, launcher, structures)


def _with_structures(launcher: _Launcher, structures: tuple[Any, ...], *flat: object) -> tuple[torch.Tensor, ...]:
    rest = iter(flat)
    return launcher(*rebuilt(structures, rest), *rest)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within this context every op is served by the backend `name`; None gives the choice back to the library.

    Raises ValueError for an unknown name; an op that the backend can not serve raises RuntimeError when called.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


@contextlib.contextmanager
def workspace_limit(size: int) -> Iterator[None]:
    """Within this context an op may allocate up to `size` bytes over its inputs and outputs (default 256 MiB).

    The Triton kernels take up to twice that in backward, and three times in `linear_policy_loss` with gradients.
    """
    global _workspace
    if size < 2**20:
        raise ValueError(f"size is {size} bytes, expected at least 1 MiB ({2**20})")
    previous, _workspace = _workspace, size
    try:
        yield
    finally:
        _workspace = previous


def workspace() -> int:
    """Bytes that an op may allocate over its inputs and outputs now."""
    return _workspace


def report() -> list[Choice]:
    """Which backend serves each op on each kind of device of this machine, and why not the others.

    Of bfloat16 inputs on a GPU, of float32 ones on the CPU; another dtype has a line of its own where another backend
    serves it, or where nobody measured that it should.
    """
    dtypes = {"cpu": (torch.float32, torch.float64), "cuda": (torch.bfloat16, torch.float32, torch.float64)}
    choices = []
    for op in schemas.SCHEMAS:
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            usual, *others = (_choice(op, device, dtype) for dtype in dtypes[device])
            choices.append(usual)
            for dtype, other in zip(dtypes[device][1:], others, strict=True):
                if (other.backend, other.measured) != (usual.backend, usual.measured):
                    choices.append(other._replace(device=f"{device} ({str(dtype).removeprefix('torch.')})"))
    return choices


def _choice(op: str, device: str, dtype: torch.dtype) -> Choice:
    backend = select(op, device, dtype)
    others = {
        other: unavailable(other, op, device, dtype) or f"{backend} is preferred"
        for other in BACKENDS
        if other != backend
    }
    if any(other in _ONLY and "preferred" in why for other, why in others.items()) or backend in _ONLY:
        lines = [line for line in _lines(op, torch.device(device), dtype, None) if line.backend == backend]
        return Choice(op, device, backend, others, (lines[0].measured if lines else None) or NOT_MEASURED)
    return Choice(op, device, backend, others)
