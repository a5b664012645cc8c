"""Launches that Triton need not look at again.

`kernel[grid](…)` finds out at every launch for what the kernel was compiled: the type of each argument, and whether it
is 1 or a multiple of 16. In a short call that takes longer than all the rest. Calls of an op whose arguments are alike
share a `Call`, which keeps the compiled kernels and launches those, as `compiled[grid](…)`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import configs
from ._device import properties

#: `Call.launch` or `launch_anew`.
Launch = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
#: So that calls of ever new shapes do not fill the memory.
_MOST_CALLS = 1024
#: Numbers up to here are 32 bits wide to a kernel.
_WIDE = 2**31


class Call:
    """What calls of an op have in common whose arguments are alike: a plan, for its launcher, and compiled kernels.

    A kernel that is launched more than once may differ in tensors that are as aligned, in floats, and in integers that
    are not specialised and of one type. tests/offline_gpu/test_launch.py holds every launch against Triton's choice.
    """

    def __init__(self, keeps_kernels: bool) -> None:
        self.plan: Any = None
        self._keeps_kernels = keeps_kernels
        self._kept: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """`constants`: compile-time arguments, which are a kernel's last ones, in order; then Triton's options."""
        kept = self._kept.get(id(kernel))
        if kept is not None:
            compiled, values = kept
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)
            return
        compiled = kernel[grid](*arguments, **constants)
        if self._keeps_kernels and compiled is not None:  # the interpreter compiles none
            names = kernel.arg_names[len(arguments) :]
            self._kept[id(kernel)] = compiled, tuple(constants[name] for name in names)


_calls: dict[tuple[Any, ...], Call] = {}


def call_of(op: str, device: torch.device, *arguments: Any) -> Call:
    """That of every call of `op` with such tensors, at addresses that are as aligned, and all else the same."""
    key = (op, device, properties(device), configs.chosen(), *map(_kind_of, arguments))
    call = _calls.get(key)
    if call is None:
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        largest = max(max(x.shape, default=0) for x in arguments if isinstance(x, Tensor))
        call = _calls[key] = Call(keeps_kernels=largest < _WIDE)
    return call


def _kind_of(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape, argument.stride(), argument.data_ptr() % 16
    return argument


def launch_anew(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """As `Call.launch`, of launchers that keep no kernels."""
    kernel[grid](*arguments, **constants)
