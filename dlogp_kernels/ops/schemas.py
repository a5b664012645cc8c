"""Every schema string of the library, once. Those of the statistics follow from results.py and inputs.py:

    linear_logp_fwd(Tensor hidden, Tensor weight, Tensor? bias, float[] transform, Tensor target, int ignore_index,
        bool top) -> (Tensor logp, Tensor entropy, Tensor lse, Tensor extra)
    linear_logp_bwd(Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, <as forward but top>, Tensor entropy,
        Tensor extra, bool[3] output_mask) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)

N tokens lie in the leading dimensions, at least one, of hidden (…, D) and logits (…, V); weight is (V, D). Targets
are flat, (N, K) int64, and so are outputs, (N, K) or (N,) as results.py says; after them comes `extra`, see
results.Outputs. In a backward op `output_mask` says which gradients to compute, in the order of the floating inputs;
the others come back empty. Sampling has no gradient.

The policy loss takes logp and reference.policy.TokenInputs: tokens (B, T), or (N,) with the offsets (B + 1,) int64 of
B sequences; advantage is of each token or (B,), mask bool, group (B,) int64, denominator () of the dtype of the loss:
num_tokens or num_sequences; str_options and float_options are those options of reference.policy.PolicyOptions, in its
order (PyTorch's time for a call goes by the square of the number of arguments).
Its forward op leaves `grad_logp_unscaled`, the shape of logp, empty unless with_gradient, and `scale` (B,): the
gradient by logp is their product. metrics are in the order of PolicyMetrics.

The linear policy loss takes target (N, 1) and the rows of reference.rows.PolicyRows, (N,) of the dtype of the loss. Its
forward op leaves the gradients of the loss that output_mask asks for in that dtype, float32 or float64, whatever the
inputs' is: they are rounded once, when backward has multiplied them.

What begins with `sharded_` takes Shards behind the targets: weights and biases are then those of this rank's tokens.
rows_of_ranks gives each rank of a group other rows of a tensor than those it has, both by their starts; own_rows gives
it its own of a whole one, all_rows the whole of everyone's, sum_of_rows its own of the sum of everyone's wholes;
sum_over_ranks is a sum of tensors of one shape.

A compiled backend implements a private copy of a schema, `_<backend>_<op>`, with one more argument, the workspace in
bytes; `backends.py` chooses between backends.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from ..inputs import (
    Argument,
    Asked,
    Gradients,
    Head,
    Logits,
    NoiseInputs,
    OptionalHead,
    PairGradients,
    PairSaved,
    SampleOptions,
    Saved,
    Shards,
    Targets,
    arguments,
)
from ..reference.policy import TokenInputs
from ..reference.rows import PolicyRows
from ..results import DeltaLogpStats, LogpStats, Sample, shapes_of


class Statistics(NamedTuple):
    """An op of statistics: what it returns, what it takes of each model, and what its backward takes besides.

    `places` are what it takes of both models together.
    """

    stats: type[Any]
    models: tuple[type[Any], ...]
    grads: type[Any]
    saved: type[Any]
    places: tuple[type[Any], ...] = (Targets,)

    def inputs(self) -> tuple[Argument, ...]:
        """Of forward before Asked; in backward they stand between the upstream gradients and what was saved."""
        parts = (*zip(self.models, ("", "base_"), strict=False), *((place, "") for place in self.places))
        return tuple(argument for structure, prefix in parts for argument in arguments(structure, prefix))

    def outputs(self) -> tuple[str, ...]:
        """Of forward."""
        kind: Any = self.stats
        return *shapes_of(kind), "extra"

    def upstream(self) -> tuple[Argument, ...]:
        return tuple(Argument(x.type, f"grad_{x.name}") for x in arguments(self.grads))

    def differentiable(self) -> list[int]:
        """Places among the inputs of those that have a gradient."""
        return [i for i, x in enumerate(self.inputs()) if x.type.startswith("Tensor") and x.name != "target"]

    def forward(self) -> tuple[str, str]:
        return _joined((*self.inputs(), *arguments(Asked))), _tuple_of(self.outputs())

    def backward(self) -> tuple[str, str]:
        takes = _joined((*self.upstream(), *self.inputs(), *arguments(self.saved)))
        returns = [f"grad_{self.inputs()[i].name}" for i in self.differentiable()]
        return f"{takes}, bool[{len(returns)}] output_mask", _tuple_of(returns)


def _joined(some: Iterable[Argument]) -> str:
    return ", ".join(f"{x.type} {x.name}" for x in some)


def _tuple_of(names: Iterable[str]) -> str:
    return "(" + ", ".join(f"Tensor {name}" for name in names) + ")"


STATISTICS = {
    "linear_logp": Statistics(LogpStats, (Head,), Gradients, Saved),
    "linear_delta_logp": Statistics(DeltaLogpStats, (Head, Head), PairGradients, PairSaved),
    "logp": Statistics(LogpStats, (Logits,), Gradients, Saved),
    "delta_logp": Statistics(DeltaLogpStats, (Logits, Logits), PairGradients, PairSaved),
}

#: Those whose vocabulary lies on the ranks of a process group.
SHARDED = {
    f"sharded_{name}": STATISTICS[name]._replace(places=(Targets, Shards))
    for name in ("linear_logp", "linear_delta_logp")
}

_PAIR_OF_HEADS = _joined((*arguments(Head), *arguments(Head, "base_")))
_SAMPLE_OPTIONS = _joined((*arguments(NoiseInputs), *arguments(SampleOptions)))
_POLICY_OPTIONS = "str[] str_options, float[] float_options"
_LINEAR_POLICY = (*arguments(Head), *arguments(OptionalHead, "base_"), *arguments(Targets), *arguments(PolicyRows))
_SAMPLE = _tuple_of(Sample._fields)
#: op name → (arguments, returns)
SCHEMAS: dict[str, tuple[str, str]] = {
    **{f"{name}_fwd": op.forward() for name, op in STATISTICS.items()},
    **{f"{name}_bwd": op.backward() for name, op in STATISTICS.items()},
    "extrapolated_sample": (f"Tensor logits, Tensor base_logits, {_SAMPLE_OPTIONS}", _SAMPLE),
    "linear_extrapolated_sample": (f"{_PAIR_OF_HEADS}, {_SAMPLE_OPTIONS}", _SAMPLE),
    "policy_loss_fwd": (
        f"Tensor logp, {_joined(arguments(TokenInputs))}, {_POLICY_OPTIONS}, int? max_length, bool with_gradient",
        "(Tensor loss, Tensor metrics, Tensor grad_logp_unscaled, Tensor scale)",
    ),
    "policy_loss_bwd": (
        "Tensor grad_loss, Tensor grad_logp_unscaled, Tensor scale, Tensor mask, Tensor? offsets, float entropy_coef, "
        "float kl_beta, bool[3] output_mask",
        "(Tensor grad_logp, Tensor grad_entropy, Tensor grad_kl)",
    ),
    "linear_policy_loss_fwd": (
        f"{_joined(_LINEAR_POLICY)}, {_POLICY_OPTIONS}, bool[3] output_mask",
        "(Tensor loss, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    ),
    "linear_policy_loss_bwd": (
        "Tensor grad_loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, ScalarType hidden_dtype, "
        "ScalarType weight_dtype, ScalarType bias_dtype, bool[3] output_mask",
        "(Tensor scaled_hidden, Tensor scaled_weight, Tensor scaled_bias)",
    ),
}

#: Those that no backend has by itself: sharded.py and sharded_sampling.py serve them on every device, with other ops
#: and collectives.
OVER_RANKS: dict[str, tuple[str, str]] = {
    **{f"{name}_fwd": op.forward() for name, op in SHARDED.items()},
    **{f"{name}_bwd": op.backward() for name, op in SHARDED.items()},
    "sharded_linear_extrapolated_sample": (
        f"{_PAIR_OF_HEADS}, {_joined(arguments(Shards))}, {_SAMPLE_OPTIONS}",
        _SAMPLE,
    ),
    "rows_of_ranks": ("Tensor rows, str group, int[] starts, int[] wanted_starts", "Tensor"),
    "own_rows": ("Tensor whole, str group, int[] starts", "Tensor"),
    "all_rows": ("Tensor rows, str group, int[] starts", "Tensor"),
    "sum_of_rows": ("Tensor whole, str group, int[] starts", "Tensor"),
    "sum_over_ranks": ("Tensor x, str group", "Tensor"),
}

#: op name → the structures that its flat list begins with, for the ops whose launchers in Python take structures
STRUCTURES: dict[str, tuple[type[Any], ...]] = {
    **{f"{name}_fwd": (*op.models, Targets, Asked) for name, op in STATISTICS.items()},
    **{f"{name}_bwd": (op.grads, *op.models, Targets, op.saved) for name, op in STATISTICS.items()},
    "extrapolated_sample": (Tensor, Tensor, NoiseInputs, SampleOptions),
    "linear_extrapolated_sample": (Head, Head, NoiseInputs, SampleOptions),
    "policy_loss_fwd": (Tensor, TokenInputs),
    "linear_policy_loss_fwd": (Head, OptionalHead, Targets, PolicyRows),
}

_ONE_HEAD = "Tensor{0} {1}hidden, Tensor{0} {1}weight, Tensor? {1}bias, float {1}tanh_scale, float {1}output_scale"
#: The kernels for Hopper, called by triton/hopper.py: states and x at the targets of one pass, of one model or a pair;
#: and the gradient by the logits of a block of rows and tokens.
LINEAR_KERNELS = (
    f"_cuda_linear_states({_ONE_HEAD.format('', '')}, {_ONE_HEAD.format('?', 'base_')}, Tensor target, "
    "Tensor? row_index, Tensor? num_rows, int first, Tensor(a!) state, Tensor(b!) target_logits) -> ()",
    f"_cuda_linear_gradient({_ONE_HEAD.format('', '')}, Tensor target, Tensor target_terms, Tensor row_terms, "
    "int first, int first_token, Tensor(a!) gradient) -> ()",
)


def public_schema(op: str) -> str:
    arguments, returns = (SCHEMAS | OVER_RANKS)[op]
    return f"{op}({arguments}) -> {returns}"


def backend_schema(backend: str, op: str) -> str:
    arguments, returns = SCHEMAS[op]
    return f"_{backend}_{op}({arguments}, int workspace) -> {returns}"
