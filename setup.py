"""Builds the compiled extensions where that is possible; everything else is in pyproject.toml.

The CPU's wherever there is a C++ compiler; the one for CUDA, a library of its own, where nvcc is found too, whether or
not this machine has a GPU. `DLOGP_BUILD=cpu` leaves the latter out, `DLOGP_BUILD=none` both. Build with
`--no-build-isolation`, so that they are compiled against the installed torch. `DLOGP_BUILD=asan` builds the CPU's with
sanitizers, in build/asan, where only what looks for it there finds it.
"""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).parent
CUDA = "dlogp_kernels._cuda"
CPU_SOURCES = sorted(glob("python_bindings/*_cpu.cpp", root_dir=ROOT) + glob("csrc/cpu/*.cpp", root_dir=ROOT))
CUDA_BINDINGS = sorted(glob("python_bindings/*_cuda.cpp", root_dir=ROOT))
CUDA_SOURCES = [*CUDA_BINDINGS, *sorted(glob("csrc/cuda/*.cu", root_dir=ROOT))]
COMPILE_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
#: What a sanitizer finds ends the process.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
SANITIZED_FLAGS = [*COMPILE_FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
SANITIZED_BUILD = ROOT / "build" / "asan"
#: The stable ABI of torch 2.11: what is built against a later torch runs with every one from there on.
NVCC_FLAGS = [
    "-O3", "-std=c++20", "--expt-relaxed-constexpr", "--threads=2", "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xcompiler=-fPIC,-fvisibility=hidden",
]  # fmt: skip
#: What the CUDA library takes from libtorch_cuda.
OF_TORCH_CUDA = "aoti_torch_get_current_cuda_stream"
#: GPU architecture → the first nvcc that knows it.
ARCHITECTURES = {"80": (12, 0), "90a": (12, 0), "100a": (12, 8)}


def why_not() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if os.environ.get("DLOGP_BUILD") == "none":
        return "DLOGP_BUILD was none"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler was found (Debian and Ubuntu: apt install g++)"
    if not find_ninja():
        return "ninja was not found (pip install ninja)"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch was not in the build environment (pip's option --no-build-isolation shows it the installed one)"
    return None


def find_ninja() -> str | None:
    """The program, on PATH or where its Python package lays it, which need not be there."""
    folders = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    with contextlib.suppress(ImportError, AttributeError):
        folders.append(importlib.import_module("ninja").BIN_DIR)
    return shutil.which("ninja", path=os.pathsep.join(folders))


def keep_reason(problem: str | None) -> None:
    """Write why there are no kernels where the installed package finds it: pip does not show what is printed here."""
    path = ROOT / "dlogp_kernels" / "_no_kernels.txt"
    if problem is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(f"{problem}\n", encoding="utf-8")


def why_not_cuda() -> str | None:
    if os.environ.get("DLOGP_BUILD") in ("cpu", "asan"):
        return f"DLOGP_BUILD={os.environ['DLOGP_BUILD']}"
    if not shutil.which("nvcc"):
        return "nvcc was not found"
    if not architectures():
        return f"nvcc is older than {min(ARCHITECTURES.values())[0]}.0"
    return None


def architectures() -> list[str]:
    """Those that the installed nvcc compiles for."""
    shown = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", shown)
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    return [name for name, first in ARCHITECTURES.items() if version >= first]


def build_cuda(destination: Path) -> None:
    """Compile where a source has changed since the last time."""
    built = ROOT / "build" / "cuda" / destination.name
    sources = [ROOT / "setup.py", *ROOT.glob("csrc/common/*"), *ROOT.glob("csrc/cuda/*")]
    sources += ROOT.glob("python_bindings/*cuda*")
    if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        built.parent.mkdir(parents=True, exist_ok=True)
        compile_cuda(built)
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, destination)


def compile_cuda(output: Path) -> None:
    """Each source for every architecture; linear_sm90.cu, which others have no instructions for, for Hopper alone."""
    from torch.utils.cpp_extension import include_paths, library_paths

    def compile_for(names: list[str], sources: list[str], *more: str) -> None:
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
        command = ["nvcc", *NVCC_FLAGS, *targets, *(f"-I{path}" for path in include_paths()), *sources, *more]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, cwd=ROOT)

    hopper = str(output.parent / "linear_sm90.o")
    compile_for(["90a"], ["csrc/cuda/linear_sm90.cu"], "-c", "-o", hopper)
    others = [source for source in CUDA_SOURCES if "sm90" not in source]
    libraries = [link_stand_in(output.parent / "stand_in"), *library_paths()]
    compile_for(
        architectures(), [*others, hopper], "-shared", "--cudart=static", *(f"-L{path}" for path in libraries),
        "-ltorch_cpu", "-lc10", "-ltorch_cuda", "-o", str(output),
    )  # fmt: skip


def link_stand_in(folder: Path) -> Path:
    """A libtorch_cuda.so to link with, since the one at hand may be a CPU build of torch.

    What is linked names the library that it needs, and so finds the one that Python has loaded for itself alone.
    """
    folder.mkdir(exist_ok=True)
    source = f'extern "C" int {OF_TORCH_CUDA}(int, void**) {{ return 1; }}'
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*command, "-o", str(folder / "libtorch_cuda.so")], input=source, text=True, check=True)
    return folder


def extensions() -> dict[str, Any]:
    problem = why_not()
    keep_reason(problem)
    if problem is not None:
        print(f"dlogp_kernels: building without compiled kernels: {problem}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # torch looks for ninja on PATH alone.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(find_ninja() or "").parent)])
    sanitized = os.environ.get("DLOGP_BUILD") == "asan"

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if sanitized:
                self.inplace, self.build_lib = False, str(SANITIZED_BUILD)
                self.build_temp = str(SANITIZED_BUILD / "objects")

        def build_extension(self, extension: Extension) -> None:
            if extension.name == CUDA:
                build_cuda(Path(self.get_ext_fullpath(CUDA)).absolute())
            else:
                super().build_extension(extension)

    # OpenMP is not linked: the symbols come with torch, so that both share one pool of threads.
    flags = SANITIZED_FLAGS if sanitized else COMPILE_FLAGS
    links = SANITIZERS if sanitized else []
    modules = [CppExtension("dlogp_kernels._cpu", CPU_SOURCES, extra_compile_args=flags, extra_link_args=links)]
    problem = why_not_cuda()
    if problem is None:
        # Its .cu files would make torch look for a CUDA build of itself.
        modules.append(Extension(CUDA, CUDA_BINDINGS))
    else:
        print(f"dlogp_kernels: building without CUDA C++ kernels: {problem}", file=sys.stderr)
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**extensions())
