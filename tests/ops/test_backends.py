"""The choice of a backend: what is available, forcing one, what it says when it can not."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import types
import warnings

import cases
import pytest
import torch
from cases import OPS, call, fewer, gradients, is_linear, make_inputs, upstream_of
from paths import ROOT

import dlogp_kernels
from dlogp_kernels import backends, installation
from dlogp_kernels.ops import schemas


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.mark.cpu_only
def test_the_extension_is_there_where_it_can_be_built():
    if not (shutil.which("c++") or shutil.which("g++")) or not shutil.which("ninja", path=_search_path()):
        pytest.skip("no C++ compiler, or no ninja")
    assert backends.unavailable("cpu", "linear_logp_fwd", "cpu") is None


def _search_path() -> str:
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("op", schemas.SCHEMAS)
def test_each_backend_serves_every_op(backend, op):
    """What has no form with the vendor's GEMM is served by the kernels beside it."""
    has_gemm_form = op in ("linear_logp_fwd", "linear_delta_logp_fwd")
    expected = "triton" if backend == "gemm" and not has_gemm_form else backend
    assert backends.select(op, cases.DEVICE) == expected


def test_the_compiled_backend_is_preferred():
    expected = "reference" if backends.unavailable("cpu", "logp_fwd", "cpu") else "cpu"
    assert backends.select("logp_fwd", "cpu") == expected


@pytest.mark.parametrize("op", OPS)
def test_backends_agree(op):
    """Two implementations of one formula, compared directly."""
    inputs = make_inputs(op, fewer(33, 7), v=fewer(1187, 301))
    results = []
    for name in backends.BACKENDS:
        if backends.unavailable(name, f"{op}_fwd", cases.DEVICE) is None:
            with backends.use_backend(name):
                stats = call(op, inputs)
                results.append([*stats, *gradients(op, inputs, upstream_of(stats)).values()])
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_use_backend_nests_and_ends_with_an_error():
    with backends.use_backend("reference"):
        assert backends.select("logp_fwd", "cpu") == "reference"
        with backends.use_backend(None):
            assert backends.select("logp_fwd", "cpu") in backends.BACKENDS
        with pytest.raises(KeyError), backends.use_backend(None):
            raise KeyError
        assert backends.select("logp_fwd", "cpu") == "reference"


def test_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match=r"backend is 'fast', expected one of .*reference"),
        backends.use_backend("fast"),
    ):
        pass


def test_a_backend_that_can_not_serve_names_op_device_and_reason():
    with backends.use_backend("cpu"), pytest.raises(RuntimeError, match=r"logp_fwd.*'cpu'.*cuda.*CPU only"):
        backends.select("logp_fwd", "cuda")


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "problem"),
    [
        ("2.11.0+cu130", "3.6.0", None),
        ("2.12.1", "3.7.0", None),
        ("2.13.0", "3.7.1", None),
        ("2.14.1", "3.8.0", None),
        ("2.15.0", "3.9.0", None),
        ("2.14.1", "3.7.1", "triton 3.7.1 does not fit torch 2.14.1, which is built for triton 3.8"),
    ],
)
def test_triton_has_to_fit_where_it_is_known_which_one_does(monkeypatch, torch_version, triton_version, problem):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(backends.importlib.metadata, "version", {"triton": triton_version}.__getitem__)
    assert backends._triton_problem.__wrapped__() == problem


def test_report_says_who_serves_each_op_and_why_not_another():
    lines = [line for line in backends.report() if line.device == "cpu"]
    assert {line.op for line in lines} == set(schemas.SCHEMAS)
    for line in lines:
        assert set(line.others) == set(backends.BACKENDS) - {line.backend}
        assert all(line.others.values())


def test_report_with_a_forced_backend():
    with backends.use_backend("reference"):
        assert {line.backend for line in backends.report() if line.device == "cpu"} == {"reference"}


@pytest.fixture
def on_gpu(monkeypatch):
    """A function that lets the choice of backends see a GPU of this compute capability, with every backend."""

    def see(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.delitem(backends._extension_problems, "cuda", raising=False)
        monkeypatch.setattr(backends, "_triton_problem", lambda: None)
        backends._lines.cache_clear()

    yield see
    backends._lines.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_what_serves_gpus_is_a_table(on_gpu, capability):
    on_gpu(capability)
    assert backends.select("extrapolated_sample", "cuda", torch.bfloat16) == "cuda"
    on_hopper = capability == (9, 0)
    for op in ("linear_logp_fwd", "linear_delta_logp_fwd", "linear_logp_bwd"):
        for width in (1024, 4096):
            assert backends.select(op, "cuda", torch.bfloat16, width) == ("cuda" if on_hopper else "triton")
        assert backends.select(op, "cuda", torch.bfloat16, 64) == "triton"  # nobody has measured that width
        assert backends.select(op, "cuda", torch.float32, 1024) == "triton"
    lines = {(line.op, line.device): line for line in backends.report()}
    line = lines["linear_logp_fwd", "cuda"]
    assert ("h200" in str(line.measured)) == on_hopper
    if on_hopper:
        assert lines["linear_logp_fwd", "cuda (float32)"].measured == backends.NOT_MEASURED
    else:
        assert line.others["cuda"] == f"a GPU has compute capability {capability[0]}.0, expected 9.0"
    assert lines["logp_fwd", "cuda"].measured is None  # there is nothing to choose


def test_a_line_of_the_table_decides(on_gpu, monkeypatch):
    on_gpu((9, 0))
    line = backends.Preference("linear_logp_fwd", "gemm", 90, (torch.bfloat16,), range(2048))
    monkeypatch.setattr(backends, "PREFERENCES", (line, *backends.PREFERENCES))
    chosen = {
        (dtype, d): backends.select("linear_logp_fwd", "cuda", dtype, d)
        for dtype in (torch.bfloat16, torch.float32)
        for d in (1024, 2048)
    }
    assert [case for case, backend in chosen.items() if backend == "gemm"] == [(torch.bfloat16, 1024)]


def head_of(dtype: torch.dtype = torch.bfloat16, width: int = 16, prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}hidden": torch.zeros(3, width, dtype=dtype),
        f"{prefix}weight": torch.zeros(5, width, dtype=dtype),
    }


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (head_of(), None),
        (head_of() | head_of(width=24, prefix="base_") | {"top": False}, None),
        (head_of(width=12), "rows of weight do not begin on 16 bytes"),
        (head_of() | {"weight": head_of(width=24)["weight"][:, 4:20]}, "rows of weight do not begin on 16 bytes"),
        (head_of() | {"weight": head_of(width=5)["weight"].t()}, "rows of weight do not begin on 16 bytes"),
        (head_of() | head_of(width=12, prefix="base_"), "rows of base_weight do not begin on 16 bytes"),
        (
            head_of() | {"weight": torch.zeros(5, 16)},
            "hidden is torch.bfloat16, hidden torch.bfloat16 and weight torch.float32",
        ),
        (
            head_of() | head_of(torch.float16, prefix="base_"),
            "hidden is torch.bfloat16, base_hidden torch.float16 and base_weight torch.float16",
        ),
        (head_of() | {"weight": head_of()["weight"][:1].expand(5, 16)}, "rows of weight do not begin on 16 bytes"),
        (head_of() | {"top": True}, "it does not look for the most likely token"),
    ],
)  # fmt: skip
def test_what_the_kernels_for_hopper_do_not_take(on_gpu, given, reason):
    on_gpu((9, 0))
    assert backends._misfit(given) == reason
    arguments = ("linear_logp_fwd", "cuda", torch.bfloat16, 1024, reason)
    assert backends.select(*arguments) == ("cuda" if reason is None else "triton")
    if reason is not None:
        with backends.use_backend("cuda"), pytest.raises(RuntimeError, match=re.escape(f"but {reason}")):
            backends.select(*arguments)


def test_what_is_measured_is_said_of_the_backend_that_serves(on_gpu, monkeypatch):
    """Without the CUDA library Triton comes next, and an H100 measured that, not what put the library first."""
    on_gpu((9, 0))
    monkeypatch.setitem(backends._extension_problems, "cuda", "the CUDA extension is missing")
    line = next(line for line in backends.report() if (line.op, line.device) == ("linear_logp_fwd", "cuda"))
    assert (line.backend, line.measured) == ("triton", "benchmarks/results/h100_visit1.json")


@pytest.mark.cpu_only
def test_a_cuda_library_of_older_sources_is_not_used(monkeypatch):
    """It would be missed at the first call only; here it is as if it had been loaded, without any kernel."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(backends.Path, "glob", lambda path, pattern: [path / "_cuda.so"])
    problem = backends._load_cuda_library()
    assert problem is not None
    assert problem.startswith(
        "the CUDA extension has no _cuda_linear_states: older sources. To build it anew: in a clone"
    )


@pytest.mark.parametrize("size", [0, -1, 2**20 - 1])
def test_workspace_below_one_mebibyte_is_refused(size):
    with (
        pytest.raises(ValueError, match=f"size is {size} bytes, expected at least 1 MiB"),
        backends.workspace_limit(size),
    ):
        pass


@pytest.mark.parametrize("op", OPS)
def test_smallest_workspace_computes_the_same(monkeypatch, backend, op):
    """Under the interpreter of hidden states so wide that their rows take two passes.

    Triton's states of given logits, of which it has room for thousands, have a small part of it.
    """
    n, v, d = fewer((203, 3_000, 24), (43, 130, 2_100))
    inputs = make_inputs(op, n, v=v, d=d, dtype=torch.bfloat16)
    expected = call(op, inputs)
    if backend == "triton" and not is_linear(op):
        monkeypatch.setattr("dlogp_kernels.triton.logp._STATE_SHARE", 2**11)
    with backends.workspace_limit(2**20):
        for value, other in zip(call(op, inputs), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@pytest.mark.not_interpreted("the same without it")
def test_environment_variable_chooses():
    code = "from dlogp_kernels import backends; print(backends.select('logp_fwd', 'cpu'))"
    run = _python(code, DLOGP_BACKEND="reference")
    assert run.stdout.strip() == "reference", run.stderr
    run = _python(code, DLOGP_BACKEND="fast")
    assert run.returncode != 0 and "DLOGP_BACKEND is 'fast', expected one of" in run.stderr


@pytest.mark.not_interpreted("the same without it")
def test_import_is_quiet_and_leaves_torch_alone():
    code = (
        "import torch; before = (torch.get_num_threads(), torch.get_default_dtype(), "
        "torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled());"
        "import dlogp_kernels, sys; after = (torch.get_num_threads(), torch.get_default_dtype(), "
        "torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled());"
        "assert before == after; assert not {'transformers', 'trl', 'torch._dynamo'} & set(sys.modules)"
    )
    run = _python(code)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.not_interpreted("the same without it")
def test_an_extension_for_other_schemas_is_an_import_error():
    found = sorted((ROOT / "dlogp_kernels").glob("_cpu*.so"))
    if not found:
        pytest.skip("no compiled extension")
    code = (
        "import importlib.util, torch; library = torch.library.Library('dlogp', 'DEF');"
        "library.define('_cpu_delta_logp_fwd(Tensor x, int workspace) -> Tensor');"
        f"importlib.util.module_from_spec(importlib.util.spec_from_file_location('_cpu', {str(found[0])!r}))"
    )
    run = _python(code)
    assert run.returncode == 1 and "ImportError" in run.stderr and "_cpu_delta_logp_fwd" in run.stderr


@pytest.mark.not_interpreted("the same without it")
def test_packages_that_are_missing_are_named_with_how_to_install_them():
    code = (
        "import sys\nfor name, package in (('safetensors', 'hf'), ('datasets', 'trl')):\n    sys.modules[name] = None\n"
    )
    code += "    try:\n        __import__(f'dlogp_kernels.{package}')\n    except ModuleNotFoundError as error:\n"
    code += "        print(error, error.name)\n    del sys.modules[name]\n"
    lines = _python(code).stdout.splitlines()
    for line, package, name in zip(lines, ("hf", "trl"), ("safetensors", "datasets"), strict=True):
        assert line.startswith(f"dlogp_kernels.{package} needs {name}: ") and f"[{package}]" in line
        assert line.endswith(f" {name}")


def test_allocations_are_poisoned():
    """The fixture of all tests works: Python, and a library's own malloc."""
    for size in (10_000, 10**6):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            like = {"dtype": dtype, "device": cases.DEVICE}
            used = torch.ones(size, **like)
            del used
            assert torch.empty(size, **like).isnan().all()
            assert torch.ones(3, **like).new_empty(size).isnan().all()
            assert torch.empty_like(torch.zeros(size, **like)).isnan().all()
    integers = torch.empty(10_000, dtype=torch.int64, device=cases.DEVICE)
    assert (integers == -1).all() or torch.are_deterministic_algorithms_enabled()


def test_missing_kernels_are_told_once_with_their_reason(monkeypatch, tmp_path):
    reason = tmp_path / "reason.txt"
    reason.write_text("ninja was not found (pip install ninja)\n")
    monkeypatch.setattr(installation, "REASON_FILE", reason)
    monkeypatch.setitem(backends._extension_problems, "cpu", installation.why_no_kernels())
    monkeypatch.setattr(backends, "_checked_for_kernels", set())
    logits, target = torch.randn(2, 5), torch.tensor([1, 2])
    if backends.interpreting():
        pytest.skip("Triton serves the CPU here")
    with backends.use_backend("reference"), warnings.catch_warnings(action="error"):
        dlogp_kernels.logp(logits, target)
    with warnings.catch_warnings(record=True) as told:
        for _ in range(2):
            dlogp_kernels.logp(logits, target)
        backends.warn_of_missing_kernels("cpu")
    assert [str(warning.message) for warning in told] == [
        "plain PyTorch serves the ops on the device cpu, many times slower than kernels would: the compiled extension "
        "is missing: at installation, ninja was not found (pip install ninja). To build it: in a clone of "
        'dlogp_kernels, pip install --no-build-isolation -e "."'
    ]


def test_nothing_is_told_where_kernels_serve(monkeypatch):
    if backends.unavailable("cpu", "logp_fwd", "cpu"):
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(backends, "_checked_for_kernels", set())
    with warnings.catch_warnings(action="error"):
        backends.warn_of_missing_kernels("cpu")


def _setup(monkeypatch) -> dict:
    """What setup.py defines, without its running."""
    monkeypatch.delenv("DLOGP_BUILD", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_ninja_is_found_beside_python_and_as_a_package(monkeypatch, tmp_path):
    setup = _setup(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert setup["find_ninja"]() is None
    for folder, package in (("bin", None), ("package", types.SimpleNamespace(BIN_DIR=str(tmp_path / "package")))):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "ninja"
        program.touch(mode=0o755)
        monkeypatch.setitem(sys.modules, "ninja", package)
        assert setup["find_ninja"]() == str(program)
        program.unlink()


def test_setup_keeps_its_reason_where_the_package_finds_it(monkeypatch, tmp_path):
    setup = _setup(monkeypatch)
    (tmp_path / "dlogp_kernels").mkdir()
    monkeypatch.setitem(setup["keep_reason"].__globals__, "ROOT", tmp_path)
    monkeypatch.setenv("DLOGP_BUILD", "none")
    assert setup["extensions"]() == {}
    kept = tmp_path / "dlogp_kernels" / installation.REASON_FILE.name
    assert kept.read_text() == "DLOGP_BUILD was none\n"
    setup["keep_reason"](None)
    assert not kept.exists()
