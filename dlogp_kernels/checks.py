"""What is asked of numbers wherever they come in, and of the memory behind a tensor wherever it is read."""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

#: Of what logits and losses are multiplied or divided by: float32 holds it, its inverse, and products with either.
SMALLEST, LARGEST = 1e-30, 1e30


def check_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected a Python number")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} is an integer of {value.bit_length()} bits, expected a number that a float holds")


def check_scale(name: str, value: Any) -> None:
    """A number that logits may be multiplied or divided by: finite, > 0, and float32 can compute with it."""
    check_real(name, value)
    if SMALLEST <= value <= LARGEST:
        return
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number > 0")
    raise ValueError(f"{name} is {value}, expected a number in [{SMALLEST:g}, {LARGEST:g}]: float32 computes with it")


def check_factor(name: str, value: Any, low: float = 0.0) -> None:
    """A finite number ≥ low that may be 0, in a product that float32 holds."""
    check_number(name, value, low, math.inf)
    if abs(value) > LARGEST:
        raise ValueError(f"{name} is {value}, expected a size of at most {LARGEST:g}: float32 computes with it")


def check_drawing_temperature(name: str, value: Any) -> None:
    """0, which takes the largest logit, or a scale."""
    check_number(name, value, 0.0, math.inf)
    if value != 0:
        check_scale(name, value)


def check_quotient(name: str, value: float, other_name: str, other: float) -> None:
    """Of two scales: logits are multiplied by it."""
    if value / other > LARGEST:
        raise ValueError(
            f"{name} / {other_name} is {value} / {other}, expected at most {LARGEST:g}: float32 computes with it"
        )


def check_number(name: str, value: Any, low: float, high: float, low_included: bool = True) -> None:
    """A finite number in [low, high], or in (low, high]."""
    check_real(name, value)
    inside = low <= value <= high and (low_included or value > low) and math.isfinite(value)
    if not inside:
        bracket, end = "[" if low_included else "(", "∞)" if high == math.inf else f"{high:g}]"
        raise ValueError(f"{name} is {value}, expected a number in {bracket}{low:g}, {end}")


def check_integer(name: str, value: Any, low: int, end: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if not low <= value < end:
        raise ValueError(f"{name} is {value}, expected an integer in [{low}, 2**{end.bit_length() - 1})")


def check_storage(name: str, x: Tensor) -> None:
    """ValueError where the storage of x does not hold it: sharding leaves such tensors, and reading one is fatal."""
    if torch.compiler.is_compiling() or (type(x) is not Tensor and type(x) is not nn.Parameter):
        return  # nothing is there yet, or in other tensors inside
    try:
        held = x.untyped_storage().nbytes()
    except NotImplementedError:  # within torch.func transforms, which ask the op again with what is inside
        return
    if x.is_contiguous() and (x.storage_offset() + x.numel()) * x.itemsize <= held:
        return
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    needed = (x.storage_offset() + last + 1) * x.itemsize if x.numel() > 0 else 0
    if needed > held:
        raise ValueError(
            f"{name} has a storage of {held} bytes, expected the {needed} of its shape {tuple(x.shape)} (a tensor that "
            "ZeRO-3 or FSDP sharded has to be gathered first)"
        )


def check_no_tangent(name: str, x: Tensor) -> None:
    """NotImplementedError for one that carries a tangent of forward-mode AD, which an op would drop.

    What torch.func wrapped comes from the input of a transform; one outside of it may have given it the tangent.
    """
    if forward_ad._current_level < 0:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{name} has a tangent, expected none: dlogp_kernels has no forward-mode derivatives (torch.func.jvp, "
            "jacfwd and hessian, dual numbers); torch.func.vjp, jacrev and backward() give gradients"
        )
