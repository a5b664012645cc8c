"""Builders of inputs for the four ops, their float64 truth, and gradients of either.

Inputs, results and truth are on the CPU. `call` takes the inputs to the device under test, with their strides, and
brings the results back; their gradients take the other way.
"""

import collections
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.reference import statistics as reference
from dlogp_kernels.results import present

OPS = ("linear_logp", "linear_delta_logp", "logp", "delta_logp")
LINEAR_OPS, PAIR_OPS = OPS[:2], OPS[1::2]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ALL_OPTIONS = {
    "temperature": 0.7,
    "softcap": 6.0,
    "base_softcap": 4.0,
    "logit_scale": 1.3,
    "base_logit_scale": 0.6,
}  # fmt: skip

#: The device under test, `--device` of pytest.
DEVICE = torch.device("cpu")

_WIDTH = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1, torch.float64: 2}
Inputs = dict[str, Tensor]


def fewer(values: Any, few: Any) -> Any:
    """`few` instead of `values` under Triton's interpreter, whose time goes by the number of operations."""
    return few if backends.interpreting() else values


def is_linear(op: str) -> bool:
    return op in LINEAR_OPS


def is_pair(op: str) -> bool:
    return op in PAIR_OPS


def options_for(op: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that `op` takes: one model has no base."""
    return {name: value for name, value in options.items() if is_pair(op) or not name.startswith("base_")}


def make_inputs(
    op: str,
    shape: int | tuple[int, ...] = 17,
    *,
    v: int = 301,
    d: int = 24,
    k: int | None = None,
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    bias: bool = True,
    spread: float = 2.0,
    seed: int = 0,
) -> Inputs:
    """Tensor arguments of `op`: logits of standard deviation about `spread`, target all valid.

    `shape` is the leading shape, `dtype` one for all or by name (float32 where missing). The base model has another D.
    """
    generator = torch.Generator().manual_seed(seed)
    leading = (shape,) if isinstance(shape, int) else shape

    def normal(name: str, *size: int, scale: float = 1.0) -> Tensor:
        kind = dtype.get(name, torch.float32) if isinstance(dtype, dict) else dtype
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(kind)

    inputs: Inputs = {}
    for prefix, width in (("", d), ("base_", d + 8))[: 1 + is_pair(op)]:
        if is_linear(op):
            inputs[f"{prefix}hidden"] = normal(f"{prefix}hidden", *leading, width)
            inputs[f"{prefix}weight"] = normal(f"{prefix}weight", v, width, scale=spread / math.sqrt(width))
            if bias:
                inputs[f"{prefix}bias"] = normal(f"{prefix}bias", v)
        else:
            inputs[f"{prefix}logits"] = normal(f"{prefix}logits", *leading, v, scale=spread)
    target_shape = leading if k is None else (*leading, k)
    inputs["target"] = torch.randint(v, target_shape, generator=generator)
    return inputs


def from_logits(
    op: str,
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Arguments of `op` that produce these (N, V) logits; a linear layer has −inf, in a whole column, as its bias."""
    inputs: Inputs = {}
    for prefix, z in (("", logits), ("base_", base_logits))[: 1 + is_pair(op)]:
        if is_linear(op):
            masked = z == -torch.inf
            assert torch.equal(masked.any(0), masked.all(0))
            inputs[f"{prefix}hidden"] = torch.eye(z.shape[0], dtype=dtype)
            inputs[f"{prefix}weight"] = z.masked_fill(masked, 0.0).t().contiguous().to(dtype)
            inputs[f"{prefix}bias"] = torch.zeros(z.shape[1], dtype=dtype).masked_fill(masked.any(0), -torch.inf)
        else:
            inputs[f"{prefix}logits"] = z.to(dtype)
    return inputs | {"target": target}


def floating(inputs: Inputs) -> list[str]:
    """Names of the inputs that have a gradient."""
    return [name for name in inputs if name != "target"]


def widest(inputs: Inputs) -> torch.dtype:
    return max((inputs[name].dtype for name in floating(inputs)), key=_WIDTH.__getitem__)


def upcast(inputs: Inputs) -> Inputs:
    return {name: x.to(torch.int64 if name == "target" else torch.float64) for name, x in inputs.items()}


def asked_for(stats: Any) -> Any:
    """Those of the statistics that were asked for, as a NamedTuple of them alone."""
    found = present(stats)
    return _kind_of(type(stats).__name__, tuple(found))(**found)


@functools.cache
def _kind_of(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def call(op: str, inputs: Inputs, **options: Any) -> Any:
    """What the op's function gives; without what was not asked for."""
    function = getattr(dlogp_kernels, op)
    if DEVICE.type == "cpu":
        return asked_for(function(**inputs, **options))
    stats = asked_for(function(**on_device(inputs), **options))
    return type(stats)(*(_Move.apply(x, torch.device("cpu")) for x in stats))


def on_device(inputs: Inputs) -> Inputs:
    """The inputs on the device under test, differentiably; one tensor used twice stays one."""
    moved = {id(x): x if x.device.type == DEVICE.type else _Move.apply(x, DEVICE) for x in inputs.values()}
    return {name: moved[id(x)] for name, x in inputs.items()}


class _Move(torch.autograd.Function):
    """A copy on another device with the same strides (0 and gaps included) and the same offset in its storage."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device) -> Tensor:
        ctx.device = x.device
        size = x.untyped_storage().nbytes() // x.element_size()
        storage = x.as_strided((size,), (1,), 0).to(device)
        return storage.as_strided(x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _Move.apply(grads[0], ctx.device), None


def _definition(op: str, inputs: Inputs, **options: Any) -> Any:
    return asked_for(getattr(reference, op)(**upcast(inputs), **options))


def _content(x: Any) -> Any:
    """What two arguments have in common if and only if they are the same; nothing of their strides."""
    if isinstance(x, dict):
        return tuple((name, _content(value)) for name, value in x.items())
    if isinstance(x, list):
        return tuple(map(_content, x))
    if not isinstance(x, Tensor):
        return x
    data = x.detach().reshape(-1).contiguous().view(torch.uint8)
    return x.dtype, x.shape, hashlib.blake2b(data.numpy()).digest()


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers the last result: the next backend, and the gradients, are held against the same."""
    last: dict[Any, Any] = {}

    @functools.wraps(function)
    def kept(*args: Any, **options: Any) -> Any:
        key = _content([*args, options])
        if key not in last:
            last.clear()
            last[key] = function(*args, **options)
        return last[key]

    return kept


@_kept
def truth(op: str, inputs: Inputs, **options: Any) -> Any:
    """The definition, in float64 of the same inputs."""
    return _definition(op, inputs, **options)


@_kept
def magnitude(op: str, inputs: Inputs, **options: Any) -> Tensor:
    """m of tolerances.py, (…): the largest intermediate of z − lse in each row, over both models."""
    total = torch.zeros(inputs[op_rows(op)].shape[:-1], dtype=torch.float64)
    for prefix in ("", "base_")[: 1 + is_pair(op)]:
        if is_linear(op):
            hidden, weight = inputs[f"{prefix}hidden"].double().abs(), inputs[f"{prefix}weight"].double().abs()
            z = hidden @ weight.t()
            if f"{prefix}bias" in inputs:
                z = z + inputs[f"{prefix}bias"].double().abs()
        else:
            z = inputs[f"{prefix}logits"].double().abs()
        size = math.log(z.shape[-1])
        scale = options.get(f"{prefix}logit_scale", 1.0) / options.get("temperature", 1.0)
        z = z.masked_fill(~z.isfinite(), 0.0).amax(-1) * scale + size
        total = torch.maximum(total, z)
    return total


def op_rows(op: str) -> str:
    """The input whose leading dimensions are the tokens."""
    return "hidden" if is_linear(op) else "logits"


def upstream_of(stats: Any, seed: int = 1) -> list[Any]:
    """A random gradient for each output, of its dtype; exactly representable in float32. None for what has none."""
    generator = torch.Generator().manual_seed(seed)
    fields = getattr(stats, "_fields", [""] * len(stats))
    return [
        None if "top" in name else torch.randn(x.shape, generator=generator).to(x.dtype)
        for name, x in zip(fields, stats, strict=True)
    ]


def gradients(
    op: str,
    inputs: Inputs,
    upstream: list[Tensor | None],
    *,
    wanted: list[str] | None = None,
    definition: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Gradients by input name; None in `upstream` leaves that output out. `definition`: float64 autograd's."""
    wanted = floating(inputs) if wanted is None else wanted
    inputs = upcast(inputs) if definition else inputs
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    stats = (_definition if definition else call)(op, inputs | leaves, **options)
    used = [(x, grad.to(x.dtype)) for x, grad in zip(stats, upstream, strict=True) if grad is not None]
    values = torch.autograd.grad(
        [x for x, _ in used],
        list(leaves.values()),
        [grad for _, grad in used],
        materialize_grads=definition,  # logp does not depend on the base; an op itself gives zeros
    )
    return {name: value.cpu() for name, value in zip(leaves, values, strict=True)}


@_kept
def true_gradients(op: str, inputs: Inputs, upstream: list[Tensor | None], **options: Any) -> dict[str, Tensor]:
    """Of the definition, by input name, of every input: some outputs need some inputs only."""
    return gradients(op, inputs, upstream, definition=True, **options)


@_kept
def gradient_scales(
    op: str, inputs: Inputs, upstream: list[Tensor | None], **options: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """(s, S) of tolerances.py by input name, from the absolute terms of `reference.logits_gradient`."""
    inputs = upcast(inputs)
    kept = (inputs["target"] != options.get("ignore_index", -100)).reshape(*inputs[op_rows(op)].shape[:-1], -1)
    weights = {
        name: torch.zeros(x.shape, dtype=torch.float64) if grad is None else grad.double().abs()
        for (name, x), grad in zip(truth(op, inputs, **options)._asdict().items(), upstream, strict=True)
    }
    scales: dict[str, tuple[Tensor, Tensor]] = {}
    for prefix in ("", "base_")[: 1 + is_pair(op)]:
        dz = _absolute_logits_gradient(op, prefix, inputs, weights, kept, options)
        if not is_linear(op):
            scales[f"{prefix}logits"] = (dz, dz)
            continue
        hidden = inputs[f"{prefix}hidden"].masked_fill(~kept.any(-1, keepdim=True), 0.0)
        flat, hidden = dz.reshape(-1, dz.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        weight = inputs[f"{prefix}weight"]
        terms = {
            "hidden": (flat, weight),
            "weight": (flat.t(), hidden),
            "bias": (flat.t(), torch.ones_like(flat[:, :1])),
        }
        for name, (left, right) in terms.items():
            if (x := inputs.get(prefix + name)) is not None:
                walk, absolute = (left.square() @ right.square()).sqrt(), left @ right.abs()
                scales[prefix + name] = (walk.view(x.shape), absolute.view(x.shape))
    return scales


def _absolute_logits_gradient(
    op: str, prefix: str, inputs: Inputs, weights: dict[str, Tensor], kept: Tensor, options: dict[str, Any]
) -> Tensor:
    """Σ |terms| of the gradient with respect to a model's logits; `weights` are the absolute upstream gradients."""
    log_p = _log_probabilities(op, prefix, inputs, options)
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0.0)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    of_target = weights[f"{prefix}logp"] + weights.get("delta_logp", 0.0)
    of_target = of_target.reshape(kept.shape).masked_fill(~kept, 0.0)
    of_entropy, of_lse = weights[f"{prefix}entropy"][..., None], weights[f"{prefix}lse"][..., None]
    total = p * (of_target.sum(-1, keepdim=True) + of_entropy * (1 + log_p.abs() + entropy) + of_lse)
    total.scatter_add_(-1, inputs["target"].reshape(kept.shape).masked_fill(~kept, 0), of_target)
    if is_pair(op):
        log_q = _log_probabilities(op, "" if prefix else "base_", inputs, options)
        away, towards = ("reverse_kl", "kl") if prefix else ("kl", "reverse_kl")
        excess = (log_p - log_q).abs().masked_fill((p == 0) | (log_q == -torch.inf), 0.0)
        kl = (p * excess).sum(-1, keepdim=True)
        total += weights[away][..., None] * p * (1 + excess + kl) + weights[towards][..., None] * (p + log_q.exp())
    factor = options.get(f"{prefix}logit_scale", 1.0) / options.get("temperature", 1.0)
    return total.masked_fill(~kept.any(-1, keepdim=True), 0.0) * factor


def _log_probabilities(op: str, prefix: str, inputs: Inputs, options: dict[str, Any]) -> Tensor:
    if is_linear(op):
        hidden, weight, bias = (inputs.get(f"{prefix}{name}") for name in ("hidden", "weight", "bias"))
        assert hidden is not None and weight is not None
        raw = reference.linear_logits(hidden, weight, bias, torch.float64)
    else:
        raw = inputs[f"{prefix}logits"]
    softcap, logit_scale = options.get(f"{prefix}softcap"), options.get(f"{prefix}logit_scale", 1.0)
    return reference.transform_logits(raw, options.get("temperature", 1.0), softcap, logit_scale).log_softmax(-1)


def check_statistics(accuracy: Any, op: str, inputs: Inputs, stats: Any, **options: Any) -> None:
    """These statistics are within tolerance of float64; the most likely token may be one that is as likely as that."""
    magnitudes, expected = magnitude(op, inputs, **options), truth(op, inputs, **options)
    accuracy.statistics(op, stats, expected, magnitudes, widest(inputs))
    of_tokens = {
        name.replace("token", "logp"): _log_p_of_tokens(op, name, inputs, value, options)
        for name, value in stats._asdict().items()
        if name.endswith("top_token")
    }
    accuracy.statistics(op, expected._replace(**of_tokens), expected, magnitudes, widest(inputs))


def _log_p_of_tokens(op: str, name: str, inputs: Inputs, token: Tensor, options: dict[str, Any]) -> Tensor:
    """log p (…) in float64 of these tokens; 0 of −1."""
    logp_all = _log_probabilities(op, name.removesuffix("top_token"), upcast(inputs), options)
    assert token.dtype == torch.int64 and (token < logp_all.shape[-1]).all() and (token >= -1).all()
    return logp_all.gather(-1, token.clamp_min(0)[..., None])[..., 0].masked_fill(token < 0, 0.0)


def check_gradients(
    accuracy: Any, op: str, inputs: Inputs, upstream: list[Tensor | None], actual: dict[str, Tensor], **options: Any
) -> None:
    """These gradients, by input name, are within tolerance of float64."""
    every = true_gradients(op, inputs, upstream, **options)
    expected = {name: every[name] for name in actual}
    scales = gradient_scales(op, inputs, upstream, **options)
    for name, grad in actual.items():
        assert grad.dtype == inputs[name].dtype
    accuracy.gradients(op, actual, expected, scales, magnitude(op, inputs, **options), widest(inputs))


def check_gradients_against_truth(
    accuracy: Any,
    op: str,
    inputs: Inputs,
    upstream: list[Tensor | None],
    *,
    wanted: list[str] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Backward of `op` within tolerance of float64; returns the gradients."""
    actual = gradients(op, inputs, upstream, wanted=wanted, **options)
    check_gradients(accuracy, op, inputs, upstream, actual, **options)
    return actual


def check_against_truth(accuracy: Any, op: str, inputs: Inputs, **options: Any) -> Any:
    """Forward and backward of `op` within tolerance of float64; returns the statistics."""
    stats = call(op, inputs, **options)
    check_statistics(accuracy, op, inputs, stats, **options)
    check_gradients_against_truth(accuracy, op, inputs, upstream_of(stats), **options)
    return stats
