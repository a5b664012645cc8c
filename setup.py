"""Builds the compiled extension where that is possible; everything else is in pyproject.toml.

`DLOGP_BUILD=none` leaves it out. Build with `--no-build-isolation`, so that it is compiled against the installed torch.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

CPU_SOURCES = [
    "python_bindings/ops_cpu.cpp",
    "python_bindings/ops_cpu_linear_policy.cpp",
    "python_bindings/ops_cpu_policy.cpp",
    "python_bindings/ops_cpu_sample.cpp",
    *sorted(str(path.relative_to(Path(__file__).parent)) for path in Path(__file__).parent.glob("csrc/cpu/*.cpp")),
]
COMPILE_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def why_not() -> str | None:
    """Why the extension can not be built here; None if it can."""
    if os.environ.get("DLOGP_BUILD") == "none":
        return "DLOGP_BUILD=none"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler was found"
    if not shutil.which("ninja"):
        return "ninja was not found"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment (use --no-build-isolation)"
    return None


def extension() -> dict[str, Any]:
    problem = why_not()
    if problem is not None:
        print(f"dlogp_kernels: building without compiled kernels: {problem}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # OpenMP is not linked: the symbols come with torch, so that both share one pool of threads.
    cpu = CppExtension("dlogp_kernels._cpu", CPU_SOURCES, extra_compile_args=COMPILE_FLAGS)
    return {"ext_modules": [cpu], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
