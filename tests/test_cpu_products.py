"""The CPU's products with vectors of every width, of which this processor's own are one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

_SOURCE = Path(__file__).parent / "cpu_kernels" / "panel_product.cpp"
_COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
#: Of sums of up to 1500 terms, in roundings of the sum of their magnitudes.
_MOST_ROUNDINGS = 8.0


@pytest.mark.skipif(_COMPILER is None, reason="no C++ compiler")
def test_every_width(tmp_path):
    program = tmp_path / "panel_product"
    paths = [f"-I{path}" for path in include_paths()]
    subprocess.run([_COMPILER, "-std=c++20", "-O1", *paths, _SOURCE, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    errors = {(name, int(width)): float(error) for name, width, error in map(str.split, printed.splitlines())}
    assert errors.keys() == {(name, width) for name in ("float", "double") for width in (16, 32, 64)}
    assert all(error <= _MOST_ROUNDINGS for error in errors.values()), errors
