"""What is asked of inputs: of numbers, of the memory behind a tensor, of the tensors and options of statistics and
sampling. What a function here returns is its inputs in the form that the ops take."""

import math
import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .inputs import NoiseInputs, SampleOptions, flat_transform
from .reference import sampling as reference_sample

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_CHECK = os.environ.get("DLOGP_CHECK") == "1"
#: Of what logits and losses are multiplied or divided by: float32 holds it, its inverse, and products with either.
SMALLEST, LARGEST = 1e-30, 1e30
#: float32 holds every token below.
_MOST_TOP_TOKENS = 2**24


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


def check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], kind: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected a tensor")
    if type(x) is not Tensor and hasattr(x, "full_tensor"):
        raise TypeError(f"{name} is a sharded DTensor, expected a whole tensor: pass {name}.full_tensor()")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {kind}")
    check_storage(name, x)


def check_floating(name: str, x: Any) -> None:
    check_tensor(name, x, FLOATING, "bfloat16, float16, float32 or float64")
    check_no_tangent(name, x)


def has_values(x: Tensor) -> bool:
    """Whether x can be looked at: on CUDA that would wait; compiled and fake tensors have no values."""
    has_values = type(x) is Tensor and not torch.compiler.is_compiling()
    return has_values and (x.device.type == "cpu" or (_CHECK and x.device.type == "cuda"))


def digest(x: Tensor) -> int:
    """Of integers or truth values and their places."""
    numbers = x.reshape(-1).to(torch.int64)
    places = torch.arange(numbers.numel(), device=x.device)
    return int((numbers * (2654435761 * places + 1)).sum())


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, expected {other.device}, the device of {other_name}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "", *, sharded: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden (…, D), weight (V, D) and bias (V,) of one model, which fit together, after autocast.

    A sharded weight may have no rows.
    """
    hidden_name, weight_name, bias_name = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    check_floating(hidden_name, hidden)
    check_floating(weight_name, weight)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"{hidden_name} has shape {tuple(hidden.shape)}, expected (…, D) with D ≥ 1")
    if weight.dim() != 2 or (weight.shape[0] == 0 and not sharded) or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has shape {tuple(weight.shape)}, expected (V, {hidden.shape[-1]}) for {hidden_name} of "
            f"shape {tuple(hidden.shape)} (a weight sharded by ZeRO-3 or FSDP has to be gathered first)"
        )
    check_same_device(weight_name, weight, hidden_name, hidden)
    if bias is not None:
        check_floating(bias_name, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{bias_name} has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
        check_same_device(bias_name, bias, hidden_name, hidden)
    return _autocast(as_rows(hidden), weight, bias)


def check_base_head(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    base_bias: Tensor | None,
    *,
    sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The base model's fit together, and with those of the model; of sharded weights ranks compare the rows."""
    base = check_head(base_hidden, base_weight, base_bias, "base_", sharded=sharded)
    if base_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"base_hidden has shape {tuple(base_hidden.shape)}, expected the leading dimensions of hidden, "
            f"{tuple(hidden.shape)}"
        )
    check_same_device("base_hidden", base_hidden, "hidden", hidden)
    if base_weight.shape[0] != weight.shape[0] and not sharded:
        raise ValueError(
            f"base_weight has {base_weight.shape[0]} rows, expected the vocabulary of weight ({weight.shape[0]} rows)"
        )
    return base


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `torch.autocast` does to the inputs of a linear layer."""
    # Asked of other devices it may raise, and torch.compile of 2.11 can not trace the question whether it would.
    if hidden.device.type not in ("cpu", "cuda"):
        return hidden, weight, bias
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if x.dtype == torch.float32 else x

    return convert(hidden), convert(weight), None if bias is None else convert(bias)


def as_rows(x: Tensor) -> Tensor:
    """At least one leading dimension; no copy."""
    return x if x.dim() > 1 else x[None]


def check_logits(name: str, logits: Tensor) -> None:
    check_floating(name, logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}, expected (…, V) with V ≥ 1")


def check_pair_of_logits(logits: Tensor, base_logits: Tensor) -> None:
    check_logits("logits", logits)
    check_logits("base_logits", base_logits)
    if base_logits.shape != logits.shape:
        raise ValueError(
            f"base_logits has shape {tuple(base_logits.shape)}, expected that of logits, {tuple(logits.shape)}"
        )
    check_same_device("base_logits", base_logits, "logits", logits)


def check_transform(temperature: float, softcap: float | None, logit_scale: float, prefix: str = "") -> list[float]:
    """Of one model's logits, as ops take it; `prefix` is that of the names of its own options."""
    check_scale("temperature", temperature)
    check_scale(f"{prefix}logit_scale", logit_scale)
    if softcap is None:
        check_quotient(f"{prefix}logit_scale", logit_scale, "temperature", temperature)
    else:
        check_scale(f"{prefix}softcap", softcap)
        check_quotient(f"{prefix}logit_scale", logit_scale, f"{prefix}softcap", softcap)
        check_quotient(f"{prefix}softcap", softcap, "temperature", temperature)
    return flat_transform(temperature, softcap, logit_scale)


def check_transforms(
    temperature: float, softcap: float | None, base_softcap: float | None, logit_scale: float, base_logit_scale: float
) -> tuple[list[float], list[float]]:
    """Of both models' logits."""
    transform = check_transform(temperature, softcap, logit_scale)
    return transform, check_transform(temperature, base_softcap, base_logit_scale, "base_")


def check_top(top: bool, vocabulary: int) -> None:
    """Ops give tokens as floating-point numbers."""
    if not isinstance(top, bool):
        raise TypeError(f"top is {top!r}, expected True or False")
    if top and vocabulary > _MOST_TOP_TOKENS:
        raise ValueError(f"top is True for a vocabulary of {vocabulary}, expected at most {_MOST_TOP_TOKENS} tokens")


def check_target(target: Tensor, rows_name: str, rows: Tensor, ignore_index: int, vocabulary: int | None) -> Tensor:
    """target (…) or (…, K), for `rows` (…, D or V), as (N, K) int64. None: the vocabulary is not known yet."""
    check_tensor("target", target, INTEGER, "an integer dtype")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {ignore_index!r}, expected an integer")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}, expected an integer of 64 bits")
    leading = rows.shape[:-1]
    with_candidates = target.dim() == rows.dim() and target.shape[:-1] == leading and target.shape[-1] > 0
    if target.shape != leading and not with_candidates:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {tuple(leading)} or {(*leading, 'K')} for {rows_name} "
            f"of shape {tuple(rows.shape)}"
        )
    check_same_device("target", target, rows_name, rows)
    if vocabulary is not None and has_values(target) and not all_inside(target, vocabulary):
        check_target_range(target, target != ignore_index, vocabulary, f"or ignore_index ({ignore_index})")
    return target.reshape(-1, target.shape[-1] if target.dim() == rows.dim() else 1).to(torch.int64)


def all_inside(target: Tensor, vocabulary: int) -> bool:
    """The usual case, told with one operation instead of six: they take as long as a small batch."""
    if target.numel() == 0:
        return True
    low, high = target.aminmax()
    return low.item() >= 0 and high.item() < vocabulary


def check_target_range(target: Tensor, counted: Tensor, vocabulary: int, otherwise: str) -> None:
    """IndexError for one that counts outside of the vocabulary; `otherwise` says what else may stand in its place."""
    target = target.to(torch.int64)  # of fewer bits it may not hold the size of the vocabulary
    outside = ((target < 0) | (target >= vocabulary)) & counted
    if outside.any():
        position = tuple(outside.nonzero()[0].tolist())
        index = ", ".join(map(str, position))
        raise IndexError(
            f"target[{index}] is {int(target[position])}, expected a token in [0, {vocabulary}) {otherwise}"
        )


def check_sampling(
    gamma: float,
    criterion: str,
    threshold: float | None,
    draft: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> SampleOptions:
    _check_criterion(criterion, threshold)
    check_choice("draft", draft, ("base", "rl"))
    check_factor("gamma", gamma)
    check_drawing_temperature("temperature", temperature)
    if temperature != 0:
        check_quotient("gamma", gamma, "temperature", temperature)
    check_number("top_p", top_p, 0.0, 1.0, low_included=False)
    check_number("min_p", min_p, 0.0, 1.0)
    check_integer("top_k", top_k, 0, 2**63)
    limit = None if threshold is None else float(threshold)
    return SampleOptions(float(gamma), criterion, limit, draft, float(temperature), top_k, float(top_p), float(min_p))


def _check_criterion(criterion: str, threshold: float | None) -> None:
    check_choice("criterion", criterion, reference_sample.CRITERIA)
    if criterion not in reference_sample.WITH_THRESHOLD:
        if threshold is not None:
            raise ValueError(f"threshold is {threshold}, expected None: the criterion {criterion!r} has none")
        return
    if threshold is None:
        raise ValueError(f"threshold is None, expected a number: the criterion {criterion!r} compares with it")
    check_real("threshold", threshold)
    if math.isnan(threshold):
        raise ValueError("threshold is nan, expected a number")
    if criterion == "random":
        check_number("threshold", threshold, 0.0, 1.0)
    if criterion == "delta_logp" and threshold >= 0 and not torch.compiler.is_compiling():
        warnings.warn(
            f"threshold is {threshold}: one that is not below 0 replaces nearly every token (criterion 'delta_logp')",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The stacklevel at which a function here warns of what was called from outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{__package__}."):
        level, frame = level + 1, frame.f_back
    return level


def check_noise(
    rows_name: str, rows: Tensor, seed: int | Tensor, row_id: Tensor | None, step: int | Tensor
) -> NoiseInputs:
    flat_row_id = None if row_id is None else _per_row("row_id", row_id, rows_name, rows)
    seed_number, seed_tensor = _counter("seed", seed, 2**64, rows_name, rows)
    if isinstance(step, Tensor) and step.numel() != 1:
        return NoiseInputs(flat_row_id, seed_number, 0, seed_tensor, _per_row("step", step, rows_name, rows))
    step_number, step_tensor = _counter("step", step, 2**32, rows_name, rows)
    return NoiseInputs(flat_row_id, seed_number, step_number, seed_tensor, step_tensor)


def _per_row(name: str, value: Tensor, rows_name: str, rows: Tensor) -> Tensor:
    """An integer tensor (…) as (N,) int64."""
    check_tensor(name, value, INTEGER, "an integer dtype")
    if value.shape != rows.shape[:-1]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(rows.shape[:-1])}")
    check_same_device(name, value, rows_name, rows)
    numbers = value.reshape(-1).to(torch.int64)
    if has_values(value):
        _check_counters(name, numbers)
    return numbers


def _check_counters(name: str, numbers: Tensor) -> None:
    """Of 32 bits, as the noise counts rows and steps."""
    outside = (numbers < 0) | (numbers >= 2**32)
    if outside.any():
        raise ValueError(f"{name} has {numbers[outside][0].item()}, expected integers in [0, 2**32)")


def _counter(name: str, value: int | Tensor, end: int, rows_name: str, rows: Tensor) -> tuple[int, Tensor | None]:
    """A number as signed 64 bits, and None; or 0 and the tensor (1,) that holds it."""
    if not isinstance(value, Tensor):
        check_integer(name, value, 0, end)
        return value - 2**64 if value >= 2**63 else value, None
    if value.dtype != torch.int64 or value.numel() != 1:
        raise ValueError(
            f"{name} has dtype {value.dtype} and shape {tuple(value.shape)}, expected an int64 tensor of one element"
        )
    check_same_device(name, value, rows_name, rows)
    check_storage(name, value)
    if end == 2**32 and has_values(value):
        _check_counters(name, value.reshape(1))
    return 0, value.reshape(1)
