"""CPU kernels with vectors of every width, of which this processor's own are one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import HELPERS
from torch.utils.cpp_extension import include_paths

_SOURCES = HELPERS / "cpu_kernels"
_COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
_WIDTHS = (16, 32, 64)
#: Of sums of up to 1500 terms, in roundings of the sum of their magnitudes.
_MOST_ROUNDINGS = 8.0

pytestmark = pytest.mark.skipif(_COMPILER is None, reason="no C++ compiler")


def _printed(name: str, directory: Path) -> dict[tuple[str, int], float]:
    """What a program of cpu_kernels prints: a kind, a width and a number a line."""
    program = directory / name
    paths = [f"-I{path}" for path in include_paths()]
    subprocess.run([_COMPILER, "-std=c++20", "-O1", *paths, _SOURCES / f"{name}.cpp", "-o", program], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {(kind, int(width)): float(number) for kind, width, number in map(str.split, lines)}


def test_products(tmp_path):
    errors = _printed("panel_product", tmp_path)
    assert errors.keys() == {(kind, width) for kind in ("float", "double") for width in _WIDTHS}
    assert all(error <= _MOST_ROUNDINGS for error in errors.values()), errors


def test_transposes(tmp_path):
    assert _printed("transpose", tmp_path) == {(kind, width): 0 for kind in ("words", "halves") for width in _WIDTHS}
