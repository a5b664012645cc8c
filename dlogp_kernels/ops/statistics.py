"""`linear_logp`, `linear_delta_logp`, `logp` and `delta_logp`: fakes and autograd, by the table in schemas.py."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..inputs import Asked, arguments
from ..reference.statistics import accumulation_dtype
from ..results import allocated
from . import library
from .schemas import STATISTICS, Statistics

_Register = Callable[[str, Callable[..., Any]], None]


def register(name: str, op: Statistics, register_forward: _Register, register_backward: _Register) -> None:
    """Both ops of `op` by what registers an op with its fake, and the autograd of them."""
    inputs, upstream, differentiable = op.inputs(), op.upstream(), op.differentiable()
    tensors = [i for i, x in enumerate(inputs) if x.type.startswith("Tensor")]
    options = [i for i in range(len(inputs)) if i not in tensors]
    fields = op.outputs()
    saved = [fields.index(x.name) for x in arguments(op.saved)]
    constant = [i for i, x in enumerate(fields) if f"grad_{x}" not in {*(x.name for x in upstream), "grad_delta_logp"}]
    target = next(i for i in tensors if inputs[i].name == "target")

    # Backward has gradients by all fields, then the tensors that were saved, then the options; the op takes them so:
    at_hand = [*(f"grad_{x}" for x in fields), *(inputs[i].name for i in tensors), *(fields[i] for i in saved)]
    at_hand += [inputs[i].name for i in options]
    in_order = itemgetter(*(at_hand.index(x.name) for x in (*upstream, *inputs, *arguments(op.saved))))

    def fake_fwd(*values: Any) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(*(values[i] for i in differentiable))
        asked = Asked._make(values[len(inputs) :])
        return allocated(op.stats, values[target], values[target].new_empty, dtype, asked.top).flat()

    def fake_bwd(*values: Any) -> Tensor | tuple[Tensor, ...]:
        given = tuple(values[len(upstream) + i] for i in differentiable)
        return library.one_or_all(library.fake_gradients(given, values[-1]))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*[inputs[i] for i in tensors], *[output[i] for i in saved])
        ctx.options = [inputs[i] for i in options]
        ctx.mark_non_differentiable(*[output[i] for i in constant])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if fields[0] == "delta_logp":
            grads = _without_delta(*grads)
        output_mask = [ctx.needs_input_grad[i] for i in differentiable]
        run = getattr(torch.ops.dlogp, f"{name}_bwd")
        found = run(*in_order((*grads, *ctx.saved_tensors, *ctx.options)), output_mask)
        return library.by_inputs(len(inputs) + len(Asked._fields), differentiable, found, output_mask)

    register_forward(f"{name}_fwd", fake_fwd)
    register_backward(f"{name}_bwd", fake_bwd)
    library.register_autograd(name, setup_context, backward)


def _without_delta(
    delta_logp: Tensor | None, logp: Tensor | None, base_logp: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    """delta_logp = logp − base_logp, so its gradient goes to those."""
    if delta_logp is None:
        return None, logp, base_logp, *others
    return None, _sum(logp, delta_logp), _sum(base_logp, -delta_logp), *others


def _sum(gradient: Tensor | None, other: Tensor) -> Tensor:
    return other if gradient is None else gradient + other


for _name, _op in STATISTICS.items():
    register(_name, _op, library.register, library.register)
