"""Gradients: gradcheck, each subset of outputs and inputs, what is not asked for, long sums, repeated backward."""

import itertools

import pytest
import torch
from cases import (
    ALL_OPTIONS,
    LINEAR_OPS,
    OPS,
    PAIR_OPS,
    call,
    check_against_truth,
    check_gradients_against_truth,
    fewer,
    floating,
    gradients,
    is_pair,
    make_inputs,
    options_for,
    truth,
    upstream_of,
)
from same_bits import assert_same_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from dlogp_kernels import backends
from dlogp_kernels.ops import schemas

pytestmark = pytest.mark.usefixtures("backend")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.served_by("cpu", "reference")
@pytest.mark.parametrize(
    "options", [{}, ALL_OPTIONS, {"softcap": 2.0}, {"temperature": 2.5}], ids=["", "all", "cap", "T"]
)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, k, options):
    inputs = make_inputs(op, 3, v=7, d=2, k=k, dtype=FP64)
    inputs["target"].view(-1)[1] = -100
    names = floating(inputs)

    def run(*tensors):
        return tuple(call(op, inputs | dict(zip(names, tensors, strict=True)), **options_for(op, options)))

    assert torch.autograd.gradcheck(run, [inputs[name].requires_grad_() for name in names])


def _output_subsets(count: int) -> list[tuple[int, ...]]:
    """All subsets of few outputs; of many, all of one, two, all but one, and all."""
    sizes = range(1, count + 1) if count <= 3 else fewer((1, 2, count - 1, count), (1, count))
    return [subset for size in sizes for subset in itertools.combinations(range(count), size)]


@pytest.mark.parametrize("op", OPS)
def test_each_subset_of_outputs(accuracy, exact, op):
    inputs = make_inputs(op, 5, v=31, d=6, k=2, dtype=exact)
    upstream = upstream_of(call(op, inputs))
    for subset in _output_subsets(len(upstream)):
        chosen = [grad if i in subset else None for i, grad in enumerate(upstream)]
        check_gradients_against_truth(accuracy, op, inputs, chosen, **options_for(op, ALL_OPTIONS))


@pytest.mark.parametrize("op", OPS)
def test_each_subset_of_requires_grad(accuracy, exact, op):
    """What else is asked for does not change a gradient."""
    inputs = make_inputs(op, 5, v=31, d=6, k=2, dtype=exact)
    options = options_for(op, ALL_OPTIONS)
    upstream = upstream_of(call(op, inputs))
    names = floating(inputs)
    expected = gradients(op, inputs, upstream, **options)
    for size in fewer(range(1, len(names)), [1]):
        for wanted in itertools.combinations(names, size):
            values = gradients(op, inputs, upstream, wanted=list(wanted), **options)
            assert_same_gradients(accuracy, op, inputs, upstream, values, expected, **options)


class _BackwardCalls(TorchDispatchMode):
    """Records the arguments and results of the backward ops that run within."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "dlogp" and func.__name__.startswith(OPS) and "_bwd" in func.__name__:
            self.calls.append((func.__name__, args, result))
        return result


@pytest.mark.parametrize("op", OPS)
def test_only_what_is_asked_for_is_computed(op):
    """A frozen input: output_mask says so, and no buffer of its size comes back."""
    inputs = make_inputs(op, 5, v=61)
    upstream = upstream_of(call(op, inputs))
    table = schemas.STATISTICS[op]
    names = [table.inputs()[i].name for i in table.differentiable()]
    for wanted in names:
        with _BackwardCalls() as recorded:
            gradients(op, inputs, upstream, wanted=[wanted])
        ((_, args, results),) = recorded.calls
        assert args[-1] == [name == wanted for name in names]
        results = [results] if isinstance(results, torch.Tensor) else results
        assert [x.numel() for x in results] == [inputs[name].numel() if name == wanted else 0 for name in names]


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_saved_or_attached_without_requires_grad(op):
    assert not any(x.requires_grad for x in call(op, make_inputs(op)))
    inputs = make_inputs(op)
    inputs[floating(inputs)[0]].requires_grad_()
    with torch.no_grad():
        assert not any(x.requires_grad for x in call(op, inputs))


@pytest.mark.not_interpreted("minutes")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_weight_gradient_over_many_chunks(accuracy, op, dtype):
    """66 blocks of 1024 rows, or more with the smallest workspace: sums must not lose what they have."""
    inputs = make_inputs(op, 66 * 1024 + 5, v=20, d=5, dtype=dtype)
    upstream = upstream_of(truth(op, inputs))
    wanted = [name for name in floating(inputs) if "hidden" not in name]
    with backends.workspace_limit(2**20):
        check_gradients_against_truth(accuracy, op, inputs, upstream, wanted=wanted)


@pytest.mark.gemm_interpreted
@pytest.mark.served_by("cpu", "reference", "gemm", *fewer(["triton"], []))  # one backward of both; its forward is quick
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_gradients_in_blocks_of_rows_and_of_tokens(accuracy, op):
    """So large a hidden size that the smallest workspace has room for neither all rows nor all tokens."""
    inputs = make_inputs(op, fewer(300, 136), v=fewer(1_100, 200), d=1_600)
    upstream = upstream_of(truth(op, inputs))
    with backends.workspace_limit(2**20):
        check_gradients_against_truth(accuracy, op, inputs, upstream)


@pytest.mark.parametrize("op", OPS)
def test_upstream_gradients_are_applied_per_token(accuracy, op):
    """One token's weight of 0, another's of −1000: not a mean applied to a sum."""
    inputs = make_inputs(op, 6)
    upstream = upstream_of(call(op, inputs))
    for grad in upstream:
        grad.mul_(torch.tensor([0.0, 1.0, -1000.0, 1e-3, 0.0, 2.0]))
    check_gradients_against_truth(accuracy, op, inputs, upstream)


@pytest.mark.parametrize("op", OPS)
def test_repeated_backward_gives_the_same_gradients(op):
    inputs = make_inputs(op, dtype=BF16)
    leaves = [inputs[name].requires_grad_() for name in floating(inputs)]
    loss = sum(x.sum() for x in call(op, inputs))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for value, other in zip(first, second, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("op", OPS)
def test_second_derivative_raises(op):
    inputs = make_inputs(op)
    leaves = [inputs[name].requires_grad_() for name in floating(inputs)]
    first = torch.autograd.grad(call(op, inputs).entropy.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
        torch.autograd.grad(first[0].sum(), leaves)


@pytest.mark.parametrize("op", OPS)
def test_softcap_derivative_at_saturation(accuracy, op):
    """Logits far above the cap: 1 − tanh² in float32 is tiny, and is not left out."""
    inputs = make_inputs(op, spread=20.0)
    upstream = upstream_of(call(op, inputs))
    capped = check_gradients_against_truth(
        accuracy, op, inputs, upstream, **options_for(op, {"softcap": 5.0, "base_softcap": 5.0})
    )
    free = gradients(op, inputs, upstream)
    name = "hidden" if "hidden" in inputs else "logits"
    assert not torch.allclose(capped[name], free[name], rtol=0.1)


@pytest.mark.parametrize("op", OPS)
def test_temperature_chain_rule(exact, op):
    """Temperature T is logit_scale 1/T when there is no softcap, in value and gradient."""
    inputs = make_inputs(op, dtype=exact)
    upstream = upstream_of(call(op, inputs))
    scale = options_for(op, {"logit_scale": 0.4, "base_logit_scale": 0.4})
    for value, other in zip(call(op, inputs, temperature=2.5), call(op, inputs, **scale), strict=True):
        torch.testing.assert_close(value, other)
    scaled = gradients(op, inputs, upstream, **scale)
    for name, value in gradients(op, inputs, upstream, temperature=2.5).items():
        torch.testing.assert_close(value, scaled[name])


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_one_tensor_used_twice_gets_both_gradients(exact, op):
    """Tied embeddings; for a pair, one head shared by both models."""
    inputs = make_inputs(op, 5, v=31, d=6, dtype=exact)
    if is_pair(op):
        inputs["base_hidden"], inputs["base_weight"] = inputs["base_hidden"][:, :6], inputs["weight"]
    else:
        inputs["hidden"] = inputs["weight"][:5]
    expected = gradients(op, inputs, upstream_of(call(op, inputs)))
    weight = inputs["weight"].requires_grad_()
    inputs |= {"base_weight": weight} if is_pair(op) else {"hidden": weight[:5]}
    stats = call(op, inputs)
    (both,) = torch.autograd.grad(stats, [weight], upstream_of(stats))
    if is_pair(op):
        torch.testing.assert_close(both, expected["weight"] + expected["base_weight"])
    else:
        torch.testing.assert_close(both, expected["weight"].index_add(0, torch.arange(5), expected["hidden"]))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("bias", [None, "bias", "base_bias"])
def test_one_head_of_both_models(accuracy, bias, dtype):
    """The same tensor, as where training froze it: kernels may load it once."""
    inputs = make_inputs("linear_delta_logp", fewer(200, 40), v=fewer(301, 150), d=64, dtype=dtype)
    inputs |= {"base_weight": inputs["weight"], "base_hidden": inputs["base_hidden"][:, :64].contiguous()}
    inputs = {name: x for name, x in inputs.items() if "bias" not in name or name == bias}
    check_against_truth(accuracy, "linear_delta_logp", inputs)


@pytest.mark.parametrize("op", PAIR_OPS)
def test_delta_logp_is_the_difference_of_two_models(exact, op):
    """A pair's logp, entropy and gradients are those of each model alone."""
    inputs = make_inputs(op, dtype=exact)
    alone = op.replace("delta_", "")
    stats = call(op, inputs)
    upstream = upstream_of(stats)
    both = gradients(op, inputs, [None, *upstream[1:5], None, None, *upstream[7:]])
    for prefix, indices in (("", (1, 3, 7)), ("base_", (2, 4, 8))):
        own = {name.removeprefix("base_"): x for name, x in inputs.items() if name.startswith("base_") == bool(prefix)}
        own["target"] = inputs["target"]
        single = call(alone, own)
        for value, i in zip(single, indices, strict=True):
            torch.testing.assert_close(value, stats[i])
        for name, value in gradients(alone, own, [upstream[i] for i in indices]).items():
            torch.testing.assert_close(value, both[prefix + name])


@pytest.mark.parametrize("op", PAIR_OPS)
def test_a_base_model_without_numbers_where_no_divergence_has_a_gradient(op):
    inputs = make_inputs(op, 5)
    upstream = upstream_of(call(op, inputs))
    for i, name in enumerate(call(op, inputs)._fields):
        if "base" in name or "delta" in name or "kl" in name:
            upstream[i][2] = 0.0
    model = [name for name in floating(inputs) if not name.startswith("base_")]
    expected = gradients(op, inputs, upstream, wanted=model)
    for name, x in inputs.items():
        if name in ("base_hidden", "base_logits"):
            x[2] = torch.nan
    actual = gradients(op, inputs, upstream, wanted=model)
    for name in model:
        torch.testing.assert_close(actual[name], expected[name])
