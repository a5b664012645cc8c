"""The order in which the C++ kernels take the statistics' arguments, until their bindings follow schemas.py."""

from collections.abc import Callable
from typing import Any

from ..inputs import arguments
from . import schemas
from .schemas import STATISTICS

_ONE_MODEL_OPTIONS = "float temperature, float? softcap, float logit_scale, int ignore_index"
_PAIR_OPTIONS = (
    "float temperature, float? softcap, float? base_softcap, float logit_scale, float base_logit_scale, "
    "int ignore_index"
)
_LINEAR_INPUTS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias"
_LINEAR_PAIR_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor base_hidden, Tensor base_weight, Tensor target, "
    "Tensor? bias, Tensor? base_bias"
)
_ONE_MODEL_GRADIENTS = "Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse"
_PAIR_GRADIENTS = (
    "Tensor? grad_logp, Tensor? grad_base_logp, Tensor? grad_entropy, Tensor? grad_base_entropy, "
    "Tensor? grad_kl, Tensor? grad_reverse_kl, Tensor? grad_lse, Tensor? grad_base_lse"
)
_ONE_MODEL_SAVED = "Tensor entropy, Tensor lse"
_PAIR_SAVED = "Tensor entropy, Tensor base_entropy, Tensor kl, Tensor reverse_kl, Tensor lse, Tensor base_lse"
_ONE_MODEL_STATS = "(Tensor logp, Tensor entropy, Tensor lse)"
_PAIR_STATS = (
    "(Tensor delta_logp, Tensor logp, Tensor base_logp, Tensor entropy, Tensor base_entropy, "
    "Tensor kl, Tensor reverse_kl, Tensor lse, Tensor base_lse)"
)


SCHEMAS = {
    "linear_logp_fwd": (f"{_LINEAR_INPUTS}, {_ONE_MODEL_OPTIONS}", _ONE_MODEL_STATS),
    "linear_logp_bwd": (
        f"{_ONE_MODEL_GRADIENTS}, {_LINEAR_INPUTS}, {_ONE_MODEL_SAVED}, {_ONE_MODEL_OPTIONS}, bool[3] output_mask",
        "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    ),
    "linear_delta_logp_fwd": (f"{_LINEAR_PAIR_INPUTS}, {_PAIR_OPTIONS}", _PAIR_STATS),
    "linear_delta_logp_bwd": (
        f"{_PAIR_GRADIENTS}, {_LINEAR_PAIR_INPUTS}, {_PAIR_SAVED}, {_PAIR_OPTIONS}, bool[6] output_mask",
        "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_base_hidden, Tensor grad_base_weight, "
        "Tensor grad_bias, Tensor grad_base_bias)",
    ),
    "logp_fwd": (f"Tensor logits, Tensor target, {_ONE_MODEL_OPTIONS}", _ONE_MODEL_STATS),
    "logp_bwd": (
        f"{_ONE_MODEL_GRADIENTS}, Tensor logits, Tensor target, {_ONE_MODEL_SAVED}, {_ONE_MODEL_OPTIONS}",
        "Tensor grad_logits",
    ),
    "delta_logp_fwd": (f"Tensor logits, Tensor base_logits, Tensor target, {_PAIR_OPTIONS}", _PAIR_STATS),
    "delta_logp_bwd": (
        f"{_PAIR_GRADIENTS}, Tensor logits, Tensor base_logits, Tensor target, {_PAIR_SAVED}, {_PAIR_OPTIONS}, "
        "bool[2] output_mask",
        "(Tensor grad_logits, Tensor grad_base_logits)",
    ),
}


def _names(op: str) -> list[str]:
    return [x.split()[-1] for x in SCHEMAS[op][0].split(", ")]


def in_old_order(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    table, backward = STATISTICS[op[:-4]], op.endswith("_bwd")
    new = [x.name for x in ((*table.upstream(), *table.inputs()) if backward else table.inputs())]
    if backward:
        new += [*(x.name for x in arguments(table.saved)), "output_mask"]
    old, pair = _names(op), len(table.models) == 2
    order = [0, 1, 3, 4, 2, 5] if op == "linear_delta_logp_bwd" else None

    def run(*arguments: Any) -> Any:
        *values, workspace = arguments
        by_name = dict(zip(new, values, strict=True))
        by_name["temperature"], by_name["softcap"], by_name["logit_scale"] = by_name["transform"]
        by_name["softcap"] = by_name["softcap"] or None
        if pair:
            _, by_name["base_softcap"], by_name["base_logit_scale"] = by_name["base_transform"]
            by_name["base_softcap"] = by_name["base_softcap"] or None
        if order:
            by_name["output_mask"] = [by_name["output_mask"][i] for i in order]
        if op == "logp_bwd" and not by_name["output_mask"][0]:
            return by_name["logits"].new_empty(0)
        found = kernel(*(by_name[name] for name in old), workspace)
        return tuple(found[order.index(i)] for i in range(6)) if order else found

    return run


def backend_schema(backend: str, op: str) -> str:
    arguments, returns = SCHEMAS.get(op, schemas.SCHEMAS[op])
    return f"_{backend}_{op}({arguments}, int workspace) -> {returns}"
