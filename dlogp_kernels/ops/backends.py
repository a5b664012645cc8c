"""Which backend serves an op on a device, and why not another.

A backend supplies launchers: functions with the arguments of the op's schema plus the workspace in bytes.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import schemas

#: In order of preference.
BACKENDS = ("cpu", "reference")
#: Those with private ops of their own, `torch.ops.dlogp._<backend>_<op>`.
COMPILED = ("cpu",)

DEFAULT_WORKSPACE = 256 * 2**20

_Launcher = Callable[..., tuple[torch.Tensor, ...]]
_extension_problem: str | None = None
_chosen: str | None = os.environ.get("DLOGP_BACKEND") or None
_workspace = DEFAULT_WORKSPACE

if _chosen is not None and _chosen not in BACKENDS:
    raise ValueError(f"DLOGP_BACKEND is {_chosen!r}, expected one of {', '.join(BACKENDS)}")


class Choice(NamedTuple):
    """One line of `report()`: the backend that serves `op` on `device`, and why each other one does not."""

    op: str
    device: str
    backend: str
    others: dict[str, str]


def load_extension() -> None:
    """Load the compiled CPU kernels, remembering why that was not possible."""
    global _extension_problem
    try:
        importlib.import_module("dlogp_kernels._cpu")
    except ModuleNotFoundError:
        _extension_problem = (
            "the compiled extension is missing: it is built at installation where a C++ compiler and ninja are found "
            "(pip install --no-build-isolation, so that the build sees this torch)"
        )
    except ImportError as error:
        _extension_problem = f"the compiled extension does not load with torch {torch.__version__}: {error}"


def unavailable(backend: str, op: str, device_type: str) -> str | None:
    """Why `backend` can not serve `op` on a device of this type; None if it can."""
    if backend == "reference":
        return None
    if device_type != "cpu":
        return "it has kernels for the CPU only"
    return _extension_problem


def select(op: str, device_type: str) -> str:
    """The backend that serves `op` on a device of this type now."""
    for backend in BACKENDS if _chosen is None else (_chosen,):
        problem = unavailable(backend, op, device_type)
        if problem is None:
            return backend
    raise RuntimeError(f"dlogp_kernels.{op}: backend {_chosen!r} was asked for on {device_type}, but {problem}")


def launch(op: str, device: torch.device, *arguments: object) -> tuple[torch.Tensor, ...]:
    """Run `op` with the backend selected for `device`."""
    # The op's arguments are as autocast wants them; the matrix products inside must not be cast again.
    with torch.autocast(device.type, enabled=False):
        return _launcher(select(op, device.type), op)(*arguments, _workspace)


def _launcher(backend: str, op: str) -> _Launcher:
    if backend == "reference":
        return getattr(importlib.import_module("dlogp_kernels.blocked"), op)
    return getattr(torch.ops.dlogp, f"_{backend}_{op}")


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
    """Within this context an op may allocate up to `size` bytes over its inputs and outputs (default 256 MiB)."""
    global _workspace
    if size < 2**20:
        raise ValueError(f"size is {size} bytes, expected at least 1 MiB ({2**20})")
    previous, _workspace = _workspace, size
    try:
        yield
    finally:
        _workspace = previous


def report() -> list[Choice]:
    """Which backend serves each op on each kind of device of this machine, and why not the others."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    choices = []
    for op in schemas.SCHEMAS:
        for device in devices:
            backend = select(op, device)
            others = {
                other: unavailable(other, op, device) or f"{backend} is preferred"
                for other in BACKENDS
                if other != backend
            }
            choices.append(Choice(op, device, backend, others))
    return choices
