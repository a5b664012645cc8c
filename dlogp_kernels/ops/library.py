"""What every op file uses to register its op."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checks import check_no_tangent
from ..reference.statistics import accumulation_dtype
from . import backends

LIBRARY = torch.library.Library("dlogp", "DEF")


def register(op: str, fake: Callable[..., Any], in_blocks: Callable[..., bool] | None = None) -> None:
    """Give `op` its fake, and a kernel that runs the backend selected at the time of the call.

    For arguments of which `in_blocks` holds only "cpu" has a kernel of its own: else eager/ serves them, by other ops.
    """

    def run(*arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        first, exact = tensors[0], accumulation_dtype(*tensors) == torch.float64
        dtype, launch = torch.float64 if exact else first.dtype, backends.launch
        if in_blocks is not None and in_blocks(*arguments):
            compiled = first.device.type == "cpu" and backends.select(op, first.device, dtype) == "cpu"
            launch = backends.launch if compiled else backends.launch_blocked
        return one_or_all(launch(op, first, dtype, *arguments))

    register_everywhere(op, fake, run)


def register_everywhere(op: str, fake: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Give `op` its fake, and `run` on every device."""
    for dispatch_key in ("CPU", "CUDA"):
        LIBRARY.impl(op, run, dispatch_key)
    torch.library.register_fake(f"dlogp::{op}", fake, lib=LIBRARY)


def register_autograd(op: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Differentiate `<op>_fwd` by `backward`, which calls `<op>_bwd`; second derivatives raise."""

    def no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"dlogp_kernels: {op} has no second derivative")

    def backward_alone(ctx: Any, *grads: Tensor | None) -> Any:
        for grad in grads:
            if grad is not None:
                check_no_tangent("a gradient", grad)
        return backward(ctx, *grads)

    LIBRARY.impl(f"{op}_fwd", _differentiated(op, setup_context, backward_alone), "Autograd", with_keyset=True)
    torch.library.register_autograd(f"dlogp::{op}_bwd", no_second_derivative, lib=LIBRARY)


def _differentiated(op: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.library.register_autograd` makes, which also looks for defaults of every argument: 0.05 to 0.1 ms."""
    forward_op = getattr(torch.ops.dlogp, f"{op}_fwd").default

    def run(keyset: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Differentiated(torch.autograd.Function):
        """The keyset comes last: inputs have the places that they have in the op."""

        @staticmethod
        def forward(ctx: Any, *inputs_and_keyset: Any) -> Any:
            *inputs, keyset = inputs_and_keyset
            output = run(keyset, *inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *backward(ctx, *grads), None

    def dispatched(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Differentiated.apply(*inputs, keyset)
        return run(keyset, *inputs)

    return dispatched


def one_or_all(outputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """An op with one output returns it alone."""
    return outputs[0] if isinstance(outputs, tuple) and len(outputs) == 1 else outputs


def without_gradient(op: Callable[..., Any], *arguments: Any) -> Any:
    """Of an op that has none. Where there is no gradient to begin with, no_grad would take longer than the checks."""
    with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
        return op(*arguments)


def fake_sample(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What sampling returns for each of `rows` (…, columns)."""
    n = math.prod(rows.shape[:-1])  # numel() would fix a symbolic size
    tokens = [rows.new_empty(n, dtype=torch.int64) for _ in range(2)]
    values = [rows.new_empty(n, dtype=dtype) for _ in range(3)]
    return *tokens, rows.new_empty(n, dtype=torch.bool), *values


def fake_gradients(inputs: tuple[Tensor | None, ...], output_mask: list[bool]) -> tuple[Tensor, ...]:
    """Contiguous like each input where wanted, else empty, of the first input's dtype where the input is None."""
    like = [inputs[0] if x is None else x for x in inputs]
    return tuple(
        x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip(like, output_mask, strict=True) if x is not None
    )


def by_inputs(
    num_inputs: int, places: Sequence[int], gradients: Tensor | tuple[Tensor, ...], output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """What backward returns: the gradients that a backward op found, each at the place of its input where wanted."""
    found: list[Tensor | None] = [None] * num_inputs
    given = (gradients,) if isinstance(gradients, Tensor) else gradients
    for place, gradient, wanted in zip(places, given, output_mask, strict=True):
        if wanted:
            found[place] = gradient
    return tuple(found)
