"""What this machine and this installation have, and which backend serves each op."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

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
    "ray",
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


def examine() -> dict[str, Any]:
    """Look at the machine and at the installation, and change nothing; plain values, as `dlogp doctor --json` has them.

    `versions` and `tools` map a name to None where it is missing; `torch_trial` says where this version was tried with
    the installed torch, or with which ones instead.
    """
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {"dlogp_kernels": __version__, **{name: _version(name) for name in _PACKAGES}},
        "tools": {name: _first_tool(candidates) for name, candidates in _TOOLS.items()},
        "torch_trial": _torch_trial(),
        "processor": _processor(),
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "backends": [choice._asdict() for choice in backends.report()],
    }


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


def _processor() -> dict[str, Any]:
    """The CPU, the instruction sets that matter of those it has, and what PyTorch uses of it."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "cores": os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
    }


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor that Linux lists; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _gpus() -> list[dict[str, Any]]:
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count() if torch.cuda.is_available() else 0))
    return [
        {
            "number": number,
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
        }
        for number, gpu in enumerate(found)
    ]
