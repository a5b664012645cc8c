"""Fixtures of all tests: poisoned allocations, the backends, and the record of measured errors.

The tests of the ops run in three kinds of process: an ordinary one (the backends of the CPU, with all other tests), one
under TRITON_INTERPRET=1 (Triton's kernels on the CPU) and, on a machine with a GPU, one with `--device cuda`.
"""

import ctypes
import functools
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from tolerances import Accuracy

from dlogp_kernels import backends

_TESTS = Path(__file__).resolve().parent
_M_PERTURB = -6  # of <malloc.h>
_MEASURED = "error against float64"

#: The folders that each kind of process collects; the ordinary one has all but these kernels' own.
_FOLDERS = {"interpreter": ("ops", "interpreter"), "cuda": ("ops",)}
_NOT_ORDINARY = ("interpreter",)
_BACKENDS = {
    "ordinary": ("cpu", "reference"),
    "interpreter": ("triton", "gemm"),
    "cuda": ("triton", "gemm", "reference"),
}


def _kind_of_process() -> str:
    if cases.DEVICE.type == "cuda":
        return "cuda"
    return "interpreter" if backends.interpreting() else "ordinary"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--quick", action="store_true", help="the first backend alone, and nothing that torch compiles")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the ops of the op tests run")


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "cpu_only: of what is so on the CPU only",
        "needs_gpu: of what is so on a GPU only",
        "served_by(*backends): of what is so with these backends only",
        "also_by(*backends): on a GPU, of what backends do that have this op only",
        "gemm_interpreted: what the backend gemm takes under the interpreter, where it is slow",
        "around_launchers: of what is the same whichever backend runs: with the first one alone, not interpreted",
        "not_interpreted(reason): not for Triton's interpreter, because it is too slow or can not",
    ):
        config.addinivalue_line("markers", marker)
    config.pluginmanager.register(_MeasuredErrors())
    cases.DEVICE = torch.device(config.getoption("--device"))
    if cases.DEVICE.type == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device cuda: torch {torch.__version__} finds no GPU on this machine")
        if backends.interpreting():
            raise pytest.UsageError("--device cuda: TRITON_INTERPRET=1 would run the kernels on the CPU")
    if backends.interpreting():
        import triton_interpreter

        triton_interpreter.correct()
        # Masked-off lanes hold anything, which numpy remarks upon.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
        config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:triton.runtime.interpreter")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.parent != _TESTS or not collection_path.is_dir():
        return None
    kind = _kind_of_process()
    if kind == "ordinary":
        return collection_path.name in _NOT_ORDINARY or None
    return collection_path.name not in _FOLDERS[kind] or None


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each case by one backend after the other: the float64 truth of the last case is kept (cases.py)."""
    if "backend" in metafunc.fixturenames:
        names = _BACKENDS[_kind_of_process()]
        if metafunc.config.getoption("--quick") or metafunc.definition.get_closest_marker("around_launchers"):
            names = names[:1]
        also = metafunc.definition.get_closest_marker("also_by")
        if also is not None and _kind_of_process() == "cuda":
            names = (*names, *also.args)
        metafunc.parametrize("backend", names, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out_of_scope = [item for item in items if _out_of_scope(item)]
    config.hook.pytest_deselected(items=out_of_scope)
    items[:] = [item for item in items if item not in set(out_of_scope)]
    if config.getoption("--slow") or config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def _out_of_scope(item: pytest.Item) -> bool:
    """What has no meaning in this kind of process, or for the item's backend."""
    if item.get_closest_marker("cpu_only") and _kind_of_process() == "cuda":
        return True
    if item.get_closest_marker("needs_gpu") and _kind_of_process() != "cuda":
        return True
    if item.get_closest_marker("not_interpreted") and _kind_of_process() == "interpreter":
        return True
    if item.get_closest_marker("around_launchers") and (
        _kind_of_process() == "interpreter" or item.config.getoption("--quick")
    ):
        return True
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend = parameters.get("backend")
    if backend in ("gemm", "cuda") and parameters.get("op", "linear") in ("logp", "delta_logp"):
        return True  # those ops are served by "triton" then, which has its own turn
    if backend == "cuda" and "linear" in parameters.get("op", "") and parameters.get("dtype", torch.half).itemsize != 2:
        return True
    if backend == "gemm" and backends.interpreting() and item.get_closest_marker("gemm_interpreted") is None:
        return True
    served_by = item.get_closest_marker("served_by")
    if served_by is not None and backend not in served_by.args:
        return True
    return backend in ("triton", "gemm", "cuda") and any(map(_is_float64, parameters.values()))


def _is_float64(parameter: Any) -> bool:
    return torch.float64 in (parameter.values() if isinstance(parameter, dict) else (parameter,))


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill every allocation with 0xFF bytes: NaN in each floating dtype, −1 in integers.

    glibc's malloc does it, so that buffers inside C++ ops and libraries are poisoned like `torch.empty`, and the
    algorithms that torch chooses stay as they are. (Some blocks under 1 KiB come from a cache that is not refilled.)
    On CUDA the functions through which launchers allocate do it, not torch.use_deterministic_algorithms, which would
    change what PyTorch's own ops do.
    """
    if cases.DEVICE.type == "cuda":
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Allocated bytes become the complement of the low byte, freed ones the low byte; any bit set switches it on.
        assert libc.mallopt(_M_PERTURB, 0x100) == 1
        yield
        libc.mallopt(_M_PERTURB, 0)
    else:
        torch.use_deterministic_algorithms(True, warn_only=True)  # at::empty then fills with NaN
        yield
        torch.use_deterministic_algorithms(False)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        if type(x) is torch.Tensor and x.is_cuda:
            x.detach().fill_(torch.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -1)
        return x

    return allocate_and_fill


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of this kind of process (`pytest_generate_tests`), selected for the test."""
    parameters = request.node.callspec.params
    samples = request.param == "cuda" and "linear" not in str(parameters.get("op"))
    op = "extrapolated_sample" if samples else "linear_logp_fwd"
    problem = backends.unavailable(request.param, op, cases.DEVICE, torch.bfloat16)
    if problem is not None:
        pytest.skip(f"backend {request.param}: {problem}")
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture
def counter() -> Iterator[Any]:
    """A backend of torch.compile that counts the graphs it is given, `frame_count`."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def exact(backend: str) -> torch.dtype:
    """The widest dtype that the backend computes in."""
    unavailable = backends.unavailable(backend, "linear_logp_fwd", cases.DEVICE, torch.float64)
    return torch.float32 if unavailable else torch.float64


@pytest.fixture
def accuracy(backend: str, record_property) -> Accuracy:
    """Compares with float64 truth, asserts tolerances.py, and reports the error that was measured."""

    def report(op: str, quantity: str, dtype: str, error: float, limit: float) -> None:
        record_property(_MEASURED, [op, backend, dtype, quantity, error, limit])
        print(f"{op} {backend} {dtype} {quantity}: {error:.3g} (limit {limit:.3g})")

    return Accuracy(report, cases.DEVICE.type)


class _MeasuredErrors:
    """One line an op, backend and dtype at the end: the largest error of each quantity, in units of tolerances.py.

    It comes from the reports of tests, which several processes send to the one that prints.
    """

    def __init__(self) -> None:
        self._largest: dict[tuple[str, ...], tuple[float, float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == _MEASURED:
                *key, error, limit = value
                self._largest[*key] = (max(error, self._largest.get((*key,), (0.0, limit))[0]), limit)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines: dict[tuple[str, ...], list[str]] = {}
        for (*key, quantity), (error, limit) in sorted(self._largest.items()):
            lines.setdefault(tuple(key), []).append(f"{quantity} {error:.2g}/{limit:.2g}")
        if lines:
            terminalreporter.section("largest error against float64, in units of tolerances.py (measured/limit)")
            for key, errors in lines.items():
                terminalreporter.write_line(" ".join(key) + ": " + ", ".join(errors))


@pytest.fixture
def dlogp(monkeypatch, capsys):
    """Run a command in this process; gives its exit status, stdout and stderr."""
    from dlogp_kernels import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dlogp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return call
