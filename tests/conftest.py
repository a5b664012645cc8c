"""Fixtures of all tests: poisoned allocations, the backends, and the record of measured errors."""

import ctypes
import platform
from collections.abc import Iterator

import pytest
import torch
from tolerances import Accuracy

from dlogp_kernels import backends

_M_PERTURB = -6  # of <malloc.h>
_MEASURED = pytest.StashKey[dict[tuple[str, ...], tuple[float, float]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASURED] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Fill every allocation with 0xFF bytes: NaN in each floating dtype, −1 in integers.

    glibc's malloc does it, so that buffers inside C++ ops and libraries are poisoned like `torch.empty`, and the
    algorithms that torch chooses stay as they are. (Some blocks under 1 KiB come from a cache that is not refilled.)
    """
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


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can serve the CPU here, selected for the test."""
    problem = backends.unavailable(request.param, "linear_logp_fwd", "cpu")
    if problem is not None:
        pytest.skip(f"backend {request.param}: {problem}")
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture
def accuracy(request: pytest.FixtureRequest, backend: str, record_property) -> Accuracy:
    """Compares with float64 truth, asserts tolerances.py, and reports the error that was measured."""
    measured = request.config.stash[_MEASURED]

    def report(op: str, quantity: str, dtype: str, error: float, limit: float) -> None:
        record_property(f"{op} {quantity} {dtype} error", error)
        print(f"{op} {backend} {dtype} {quantity}: {error:.3g} roundings (limit {limit:g})")
        key = (op, backend, dtype, quantity)
        measured[key] = (max(error, measured.get(key, (0.0, limit))[0]), limit)

    return Accuracy(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line an op, backend and dtype: the largest error of each quantity, in units of tolerances.py."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for (*key, quantity), (error, limit) in sorted(config.stash[_MEASURED].items()):
        lines.setdefault(tuple(key), []).append(f"{quantity} {error:.2g}/{limit:g}")
    if lines:
        terminalreporter.section("largest error against float64, in roundings (measured/limit)")
        for key, errors in lines.items():
            terminalreporter.write_line(" ".join(key) + ": " + ", ".join(errors))
