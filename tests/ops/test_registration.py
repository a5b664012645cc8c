"""What PyTorch expects of an op: opcheck, fullgraph compilation without recompiling, autocast, threads, DTensor."""

import shutil
import threading

import cases
import pytest
import torch
from cases import (
    ALL_OPTIONS,
    LINEAR_OPS,
    OPS,
    call,
    check_against_truth,
    fewer,
    floating,
    gradients,
    make_inputs,
    on_device,
    options_for,
    upstream_of,
)

import dlogp_kernels
from dlogp_kernels import inputs
from dlogp_kernels.inputs import flat_transform
from dlogp_kernels.ops import schemas

pytestmark = pytest.mark.usefixtures("backend")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def _forward_arguments(op: str, dtype: torch.dtype, k: int, present: bool) -> list:
    """The inputs of `<op>_fwd` and `<op>_bwd` in order, on the device under test; optional ones given or None."""
    given = make_inputs(op, 6, v=31, d=5, k=k, dtype=dtype)
    given["target"][2] = -100
    given = on_device(given)
    if not present:
        given = {name: x for name, x in given.items() if "bias" not in name}
    transform = flat_transform(0.7, 4.0, 1.3) if present else flat_transform(1.0, None, 1.0)
    given |= {"transform": transform, "base_transform": transform, "ignore_index": -100}
    arguments = [given.get(x.name) for x in schemas.STATISTICS[op].inputs()]
    assert not present or all(x is not None for x in arguments), "an input of the table that no case has"
    return arguments


@pytest.mark.parametrize("present", [True, False], ids=["every optional argument", "no optional argument"])
@pytest.mark.parametrize("dtype", fewer([BF16, FP32, FP64], [BF16]), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_forward(op, dtype, present):
    arguments = _forward_arguments(op, dtype, 2, present)
    arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(getattr(torch.ops.dlogp, f"{op}_fwd").default, [*arguments, *_asked(present)])


def _asked(present: bool) -> tuple[bool, ...]:
    """What forward takes besides: whether each thing on demand is asked for."""
    return tuple(present for _ in inputs.Asked._fields)


@pytest.mark.parametrize("mask", fewer(["all", "first", "last", "none"], ["all", "last"]))
@pytest.mark.parametrize("present", [True, False], ids=["every optional argument", "no optional argument"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck_backward(op, present, mask):
    arguments = _forward_arguments(op, BF16, 2, present)
    forward, table = getattr(torch.ops.dlogp, f"{op}_fwd").default, schemas.STATISTICS[op]
    names, outputs = [x.name for x in forward._schema.returns], forward(*arguments, *_asked(present))
    found = dict(zip(names, outputs, strict=True))
    upstream = dict(zip(names, (grad.to(cases.DEVICE) for grad in upstream_of(outputs)), strict=True))
    grads = [upstream[x.name] for x in inputs.arguments(table.grads)]
    if not present:
        grads = [grad if i == 0 else None for i, grad in enumerate(grads)]
    saved = [found[x.name] for x in inputs.arguments(table.saved)]
    differentiable = [table.inputs()[i].name for i in table.differentiable()]
    computable = [i for i, name in enumerate(differentiable) if present or "bias" not in name]
    chosen = {"all": computable, "first": computable[:1], "last": computable[-1:], "none": []}[mask]
    arguments = [*grads, *arguments, *saved, [i in chosen for i in range(len(differentiable))]]
    torch.library.opcheck(getattr(torch.ops.dlogp, f"{op}_bwd").default, arguments)


#: What follows from the tables of results.py and inputs.py, as PyTorch prints it.
_STATISTICS_SCHEMAS = {
    "linear_logp_fwd": """(
        Tensor hidden, Tensor weight, Tensor? bias, float[] transform, Tensor target, int ignore_index, bool top
        ) -> (Tensor logp, Tensor entropy, Tensor lse, Tensor extra)""",
    "logp_bwd": """(
        Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, Tensor logits, float[] transform, Tensor target,
        int ignore_index, Tensor entropy, Tensor extra, bool[1] output_mask
        ) -> Tensor grad_logits""",
    "delta_logp_fwd": """(
        Tensor logits, float[] transform, Tensor base_logits, float[] base_transform, Tensor target, int ignore_index,
        bool top) -> (Tensor delta_logp, Tensor logp, Tensor base_logp, Tensor entropy, Tensor base_entropy, Tensor kl,
        Tensor reverse_kl, Tensor lse, Tensor base_lse, Tensor extra)""",
    "linear_delta_logp_bwd": """(
        Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_base_logp, Tensor? grad_base_entropy,
        Tensor? grad_base_lse, Tensor? grad_kl, Tensor? grad_reverse_kl, Tensor hidden, Tensor weight, Tensor? bias,
        float[] transform, Tensor base_hidden, Tensor base_weight, Tensor? base_bias, float[] base_transform,
        Tensor target, int ignore_index, Tensor entropy, Tensor base_entropy, Tensor kl,
        Tensor reverse_kl, Tensor extra, bool[6] output_mask
        ) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_base_hidden,
        Tensor grad_base_weight, Tensor grad_base_bias)""",
}


@pytest.mark.parametrize("op", _STATISTICS_SCHEMAS)
def test_schemas_that_follow_from_the_tables(op):
    printed = str(getattr(torch.ops.dlogp, op).default._schema)
    assert "".join(printed.split()) == "".join(f"dlogp::{op}{_STATISTICS_SCHEMAS[op]}".split())


def test_every_public_op_has_an_opcheck():
    """Those of this file, of test_policy_loss.py and test_sample.py, and of both that begin with test_linear_."""
    differentiable = (*OPS, "policy_loss", "linear_policy_loss")
    sampling = {"extrapolated_sample", "linear_extrapolated_sample"}
    assert set(schemas.SCHEMAS) == {f"{op}_{way}" for op in differentiable for way in ("fwd", "bwd")} | sampling


def _found(stats) -> tuple[torch.Tensor, ...]:
    """What was asked for, as a compiled graph returns it."""
    return tuple(x for x in stats if x is not None)


@pytest.mark.around_launchers
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_and_not_again_for_other_numbers_of_tokens(op, k, counter):
    options = options_for(op, ALL_OPTIONS)

    def loss(inputs):
        return sum(x.sum() for x in _found(getattr(dlogp_kernels, op)(**inputs, **options)))

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for n in (5, 9, 17, 40, 3, 128):
        inputs = on_device(make_inputs(op, n, v=31, k=k))
        leaves = [inputs[name].requires_grad_() for name in floating(inputs)]
        values = torch.autograd.grad(compiled(inputs), leaves)
        assert counter.frame_count <= 2, f"compiled again for N = {n}"  # the second compilation is for any N
        for value, other in zip(values, torch.autograd.grad(loss(inputs), leaves), strict=True):
            torch.testing.assert_close(value, other)


@pytest.mark.around_launchers
@pytest.mark.parametrize("op", OPS)
def test_not_compiled_again_for_other_numbers_of_candidates_or_batches(op, counter):
    function = getattr(dlogp_kernels, op)
    compiled = torch.compile(lambda inputs: _found(function(**inputs)), backend=counter, fullgraph=True)
    for batch, length, k in ((2, 5, 3), (3, 7, 4), (4, 6, 5), (7, 9, 2), (5, 8, 11)):
        inputs = on_device(make_inputs(op, (batch, length), v=31, k=k))
        for value, other in zip(compiled(inputs), _found(function(**inputs)), strict=True):
            torch.testing.assert_close(value, other)
    assert counter.frame_count <= 2


@pytest.mark.around_launchers
@pytest.mark.parametrize("op", OPS)
def test_python_numbers_as_options_compile(op, counter):
    """Integers and floats that change from call to call, at fullgraph."""
    function, inputs = getattr(dlogp_kernels, op), on_device(make_inputs(op, 5, v=31))
    compiled = torch.compile(lambda t: _found(function(**inputs, temperature=t)), backend=counter, fullgraph=True)
    for temperature in (1, 2, 0.5, 0.25, 3.0):
        for value, other in zip(
            compiled(temperature), _found(function(**inputs, temperature=temperature)), strict=True
        ):
            assert value.dtype == FP32
            torch.testing.assert_close(value, other)


@pytest.mark.cpu_only
@pytest.mark.served_by("cpu", "reference")
def test_compiled_call_still_checks_targets(counter):
    compiled = torch.compile(lambda inputs: dlogp_kernels.logp(**inputs).logp, backend=counter, fullgraph=True)
    inputs = on_device(make_inputs("logp", 5, v=31))
    inputs["target"][3] = 31
    with pytest.raises(IndexError, match=r"target\[3, 0\] is 31"):
        compiled(inputs)


@pytest.mark.around_launchers
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
@pytest.mark.parametrize("op", OPS)
def test_inductor(op):
    function, inputs = getattr(dlogp_kernels, op), on_device(make_inputs(op, (2, 5), v=31))
    compiled = torch.compile(lambda inputs: _found(function(**inputs)), fullgraph=True, dynamic=True)
    for value, other in zip(compiled(inputs), _found(function(**inputs)), strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_autocast_converts_as_linear_does(op):
    inputs = make_inputs(op, v=fewer(1187, 301))
    leaves = [inputs[name].requires_grad_() for name in floating(inputs)]
    with torch.autocast(cases.DEVICE.type, dtype=BF16):
        stats = call(op, inputs)
        moved = on_device(inputs)
        assert torch.nn.functional.linear(moved["hidden"], moved["weight"], moved["bias"]).dtype == BF16
    narrow = {name: x if name == "target" else x.detach().to(BF16) for name, x in inputs.items()}
    for value, other in zip(stats, call(op, narrow), strict=True):
        assert value.dtype == FP32
        assert torch.equal(value, other)
    upstream = upstream_of(stats)
    expected = gradients(op, narrow, upstream)
    for name, value in zip(floating(inputs), torch.autograd.grad(stats, leaves, upstream), strict=True):
        assert value.dtype == FP32
        assert torch.equal(value, expected[name].float())


@pytest.mark.served_by("cpu", "reference")
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_autocast_leaves_float64_alone(op):
    with torch.autocast(cases.DEVICE.type, dtype=BF16):
        assert call(op, make_inputs(op, dtype=FP64)).logp.dtype == FP64


@pytest.mark.parametrize("op", ["logp", "delta_logp"])
def test_autocast_leaves_given_logits_alone(op):
    inputs = make_inputs(op)
    expected = call(op, inputs)
    with torch.autocast(cases.DEVICE.type, dtype=BF16):
        for value, other in zip(call(op, inputs), expected, strict=True):
            assert torch.equal(value, other)


@pytest.mark.not_interpreted("the interpreter has one program at a time")
@pytest.mark.parametrize("op", OPS)
def test_worker_threads(op):
    """Four threads at once, each with its own backward."""
    inputs = [make_inputs(op, 64, v=1187, dtype=BF16, seed=seed) for seed in range(4)]
    upstream = [upstream_of(call(op, x)) for x in inputs]
    expected = [gradients(op, x, grads) for x, grads in zip(inputs, upstream, strict=True)]
    results: list = [None] * 4

    def work(i):
        results[i] = gradients(op, inputs[i], upstream[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for value, other in zip(results, expected, strict=True):
        for name in other:
            torch.testing.assert_close(value[name], other[name])


@pytest.fixture
def sharded():
    """A function that makes a DTensor on a mesh of one process."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs torch.distributed, with no process group yet")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda x: distribute_tensor(x, mesh, [Shard(0)])
    distributed.destroy_process_group()


@pytest.mark.cpu_only
@pytest.mark.parametrize("op", OPS)
def test_sharded_inputs_are_refused_by_name_but_for_weights(op, sharded):
    """Which are gathered (tests/ranks has more than one process)."""
    inputs = make_inputs(op)
    for name in inputs:
        if name.endswith("weight"):
            for value, other in zip(call(op, inputs | {name: sharded(inputs[name])}), call(op, inputs), strict=True):
                assert torch.equal(value, other)
            continue
        with pytest.raises(TypeError, match=rf"^{name} is a sharded DTensor.*{name}\.full_tensor\(\)"):
            call(op, inputs | {name: sharded(inputs[name])})


@pytest.mark.parametrize("name", ["weight", "base_weight"])
def test_a_partitioned_weight_is_refused_with_advice(name):
    """ZeRO-3 leaves an empty parameter behind."""
    with pytest.raises(ValueError, match=rf"^{name} has shape \(0,\).*ZeRO-3.*gathered"):
        call("linear_delta_logp", make_inputs("linear_delta_logp") | {name: torch.empty(0)})


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_not_modified(accuracy, op):
    inputs = make_inputs(op, dtype=BF16)
    before = {name: x.clone() for name, x in inputs.items()}
    check_against_truth(accuracy, op, inputs)
    for name, x in before.items():
        assert torch.equal(inputs[name], x)
