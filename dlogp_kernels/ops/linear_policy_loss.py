"""`linear_policy_loss`: of ratios of tokens in one op, whose gradients are formed while logits are at hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inputs import Shards
from ..reference.policy import PolicyOptions, TokenInputs
from ..reference.rows import MASKED, policy_rows
from ..reference.statistics import accumulation_dtype
from ..results import DeltaLogpStats, PolicyLoss, PolicyMetrics
from . import library, policy_loss

#: Places of hidden, weight and bias among the arguments.
_DIFFERENTIABLE = (0, 1, 2)
#: Whether the backward pass that runs may run again, by `retain_graph`.
_KEEPS_GRAPH: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def loss_of(
    head: tuple[Tensor, Tensor, Tensor | None],
    base: tuple[Tensor | None, Tensor | None, Tensor | None],
    transforms: tuple[list[float], list[float]],
    target: Tensor,
    tokens: TokenInputs,
    options: PolicyOptions,
    shards: Shards | None = None,
) -> PolicyLoss:
    """Of target (N, 1), MASKED where the mask is 0; without a reference model `base` is None three times.

    A ratio of a response is not known before all of its tokens are, nor log p of a token before all shards are seen:
    then it is a composition of two ops.
    """
    if options.importance != "token" or shards is not None:
        logp, entropy, kl = _statistics((*head, transforms[0]), (*base, transforms[1]), target, shards)
        shape, entropy = tokens.mask.shape, entropy if options.entropy_coef != 0 else entropy.detach()
        if kl is not None:
            kl = (kl if options.kl_beta != 0 else kl.detach()).view(shape)
        if options.importance == "token":
            tokens = _in_dtype(tokens, logp.dtype)
        return policy_loss.loss_of(logp.view(shape), tokens._replace(entropy=entropy.view(shape), kl=kl), options)
    rows = policy_rows(tokens, options, accumulation_dtype(*head, *base))
    loss, metrics, *_ = torch.ops.dlogp.linear_policy_loss_fwd(
        *head, transforms[0], *base, transforms[1], target, MASKED, *rows, *options.arguments()[:2],
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in head],
    )  # fmt: skip
    return PolicyLoss(loss, PolicyMetrics(*metrics.unbind()))


def _in_dtype(tokens: TokenInputs, dtype: torch.dtype) -> TokenInputs:
    """With numbers of that of the loss, as `policy_rows` gives them to the op that forms its gradients."""
    given = {name: getattr(tokens, name) for name in ("old_logp", "advantage", "ref_logp", "token_weight")}
    return tokens._replace(**{name: x.to(dtype) for name, x in given.items() if x is not None})


def _statistics(
    head: tuple[Any, ...], base: tuple[Any, ...], target: Tensor, shards: Shards | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log p, entropy and, with a reference model, the divergence to it."""
    kind, places = ("", ()) if shards is None else ("sharded_", shards)
    if base[0] is None:
        forward = getattr(torch.ops.dlogp, f"{kind}linear_logp_fwd")
        logp, entropy, *_ = forward(*head, target, MASKED, *places, False)
        return logp, entropy, None
    forward = getattr(torch.ops.dlogp, f"{kind}linear_delta_logp_fwd")
    *stats, _ = forward(*head, *base, target, MASKED, *places, False)
    pair = DeltaLogpStats(*stats)
    return pair.logp, pair.entropy, pair.kl


def _fake_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias = arguments[:3]
    output_mask = arguments[-1]
    dtype = accumulation_dtype(*(x for x in arguments if isinstance(x, Tensor)))
    inputs = (hidden, weight, weight if bias is None else bias)
    gradients = (
        x.new_empty(x.shape if wanted else (0,), dtype=dtype) for x, wanted in zip(inputs, output_mask, strict=True)
    )
    loss, metrics = (hidden.new_empty(shape, dtype=dtype) for shape in ((), len(PolicyMetrics._fields)))
    return loss, metrics, *gradients


def _fake_bwd(
    grad_loss: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    gradients, dtypes = (grad_hidden, grad_weight, grad_bias), (hidden_dtype, weight_dtype, bias_dtype)
    return tuple(
        x.new_empty(x.shape if wanted else (0,), dtype=dtype)
        for x, dtype, wanted in zip(gradients, dtypes, output_mask, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    given = [inputs[i] for i in _DIFFERENTIABLE]
    ctx.dtypes = [inputs[0].dtype if x is None else x.dtype for x in given]
    ctx.output_mask, ctx.num_inputs = inputs[-1], len(inputs)
    # The gradients count as differentiable, so that deriving what backward makes of them raises (library.py).
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.num_inputs
    needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    output_mask = [formed and needs for formed, needs in zip(ctx.output_mask, needed, strict=True)]
    formed = ctx.saved_tensors  # once: a checkpoint gives them no second time
    if _may_be_given_away(grad_loss, formed, ctx.dtypes, output_mask):
        found = tuple(x.detach() for x in formed)
    else:
        found = torch.ops.dlogp.linear_policy_loss_bwd(grad_loss, *formed, *ctx.dtypes, output_mask)
    return library.by_inputs(ctx.num_inputs, _DIFFERENTIABLE, found, output_mask)


def _may_be_given_away(
    grad_loss: Tensor, formed: tuple[Tensor, ...], dtypes: list[torch.dtype], output_mask: list[bool]
) -> bool:
    """Whether the gradients that forward formed are what is asked for, and nobody asks again: then they need no copy.

    On a CPU, where the factor is known without waiting; not while a compiler or a transform looks on.
    """
    if grad_loss.device.type != "cpu" or type(grad_loss) is not Tensor or torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active() or _KEEPS_GRAPH():
        return False
    if any(x.dtype != dtype for x, dtype, wanted in zip(formed, dtypes, output_mask, strict=True) if wanted):
        return False
    try:
        return grad_loss.item() == 1.0
    except RuntimeError:  # a batch of gradients
        return False


library.register("linear_policy_loss_fwd", _fake_fwd)
library.register("linear_policy_loss_bwd", _fake_bwd)
library.register_autograd("linear_policy_loss", _setup_context, _backward)
