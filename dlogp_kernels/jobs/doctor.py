"""What this machine and this installation have, and which backend serves each op."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from .. import __version__
from ..ops import backends

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "safetensors",
    "trl",
    "pyarrow",
    "matplotlib",
)
_TOOLS = {"C++ compiler": ("c++", "g++", "clang++"), "ninja": ("ninja",), "nvcc": ("nvcc",)}
#: Instruction sets that a kernel may use, as Linux and then macOS spell them.
_INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "bf16",
    "sve",
)


class Processor(NamedTuple):
    """The CPU: its name, what PyTorch uses of it, the instruction sets that matter, cores and threads."""

    name: str
    capability: str
    instruction_sets: list[str]
    cores: int
    torch_threads: int


class Gpu(NamedTuple):
    """One CUDA device."""

    number: int
    name: str
    compute_capability: str
    memory_gib: float


class Report(NamedTuple):
    """What `dlogp doctor` shows; `versions` and `tools` map a name to None where it is missing.

    `torch_trial` says where this version was tried with the installed torch, or with which ones instead.
    """

    python: str
    system: str
    versions: dict[str, str | None]
    tools: dict[str, str | None]
    torch_trial: str
    processor: Processor
    cuda: str | None
    gpus: list[Gpu]
    backends: list[backends.Choice]

    def to_json(self) -> dict[str, object]:
        """The report as plain dictionaries and lists."""
        return {
            **self._asdict(),
            "processor": self.processor._asdict(),
            "gpus": [gpu._asdict() for gpu in self.gpus],
            "backends": [choice._asdict() for choice in self.backends],
        }


def examine() -> Report:
    """Look at the machine and at the installation; nothing is changed."""
    return Report(
        python=platform.python_version(),
        system=platform.platform(),
        versions={"dlogp_kernels": __version__, **{name: _version(name) for name in _PACKAGES}},
        tools={name: _first_tool(candidates) for name, candidates in _TOOLS.items()},
        torch_trial=_torch_trial(),
        processor=_processor(),
        cuda=torch.version.cuda,
        gpus=_gpus(),
        backends=backends.report(),
    )


def _torch_trial() -> str:
    where = backends.TRIED_TORCH.get(backends.torch_release())
    if where is not None:
        return f"torch {torch.__version__}: tried {where}"
    tried = ", ".join(f"{release} ({where})" for release, where in backends.TRIED_TORCH.items())
    return f"torch {torch.__version__}: not tried; tried: {tried}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_tool(candidates: tuple[str, ...]) -> str | None:
    """The first line that the first tool found prints about its version, and where it lies."""
    for candidate in candidates:
        path = shutil.which(candidate, path=_search_path())
        if path is not None:
            return f"{_tool_version(path)} ({path})"
    return None


def _search_path() -> str:
    """PATH, and where the packages of this Python lay their programs: there setup.py finds ninja, too."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def _tool_version(path: str) -> str:
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = shown.strip().splitlines()
    # nvcc names its release in the last lines but one.
    return next((line for line in lines if "release" in line), lines[0] if lines else "version unknown")


def _processor() -> Processor:
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Processor(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        instruction_sets=[name for name in _INSTRUCTION_SETS if name in flags],
        cores=os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
    )


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor that Linux lists; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(Gpu(index, properties.name, capability, round(properties.total_memory / 2**30, 1)))
    return gpus
