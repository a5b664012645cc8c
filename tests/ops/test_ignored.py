"""ignore_index and targets out of range: nothing is read, nothing leaks, nothing is garbage."""

import cases
import pytest
import torch
from cases import (
    OPS,
    call,
    check_against_truth,
    fewer,
    floating,
    gradients,
    make_inputs,
    on_device,
    upstream_of,
)

from dlogp_kernels.inputs import Asked, flat_transform
from dlogp_kernels.ops import schemas

pytestmark = pytest.mark.usefixtures("backend")


def per_row(op: str) -> list[str]:
    """Inputs that have one row a token."""
    return [name for name in ("hidden", "base_hidden", "logits", "base_logits") if name in make_inputs(op, 1)]


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("op", OPS)
def test_all_rows_ignored_give_zero_outputs_and_attached_zero_gradients(op, k):
    inputs = make_inputs(op, (2, 5), k=k)
    inputs["target"].fill_(-100)
    for name in floating(inputs):
        inputs[name].requires_grad_()
    stats = call(op, inputs)
    assert all(x.requires_grad and x.count_nonzero() == 0 for x in stats)
    sum(x.sum() for x in stats).backward()
    for name in floating(inputs):
        assert inputs[name].grad.shape == inputs[name].shape
        assert inputs[name].grad.count_nonzero() == 0


@pytest.mark.parametrize("poison", fewer([torch.nan, torch.inf, -torch.inf], [torch.nan]))
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=pytest.mark.gemm_interpreted),
        *fewer([torch.float16, torch.float32], [torch.float32]),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_poison_in_ignored_rows_reaches_nothing(op, dtype, poison):
    inputs = make_inputs(op, 40, v=fewer(301, 143), dtype=dtype)
    ignored = torch.rand(40) < 0.5
    inputs["target"][ignored] = -100
    clean_stats = call(op, inputs)
    upstream = upstream_of(clean_stats)
    clean = gradients(op, inputs, upstream)
    for name in per_row(op):
        inputs[name][ignored] = poison
    for grad in upstream:
        grad[ignored] = poison
    for value, expected in zip(call(op, inputs), clean_stats, strict=True):
        assert torch.equal(value, expected)
        assert value[ignored].count_nonzero() == 0
    for name, value in gradients(op, inputs, upstream).items():
        assert torch.equal(value, clean[name])
        if name in per_row(op):
            assert value[ignored].count_nonzero() == 0


@pytest.mark.parametrize("op", OPS)
def test_upstream_of_an_ignored_candidate_reaches_nothing(op):
    inputs = make_inputs(op, 6, k=3)
    inputs["target"][:, 1] = -100
    upstream = upstream_of(call(op, inputs))
    clean = gradients(op, inputs, upstream)
    for grad in upstream:
        if grad.dim() == 2:
            grad[:, 1] = torch.nan
    for name, value in gradients(op, inputs, upstream).items():
        assert torch.equal(value, clean[name])


@pytest.mark.parametrize("ignore_index", fewer([-1, 0, 7, 10**6, -(2**40)], [7, -(2**40)]))
@pytest.mark.parametrize("op", OPS)
def test_any_integer_can_be_the_ignore_index(accuracy, op, ignore_index):
    inputs = make_inputs(op, 30, v=20)
    inputs["target"][::3] = ignore_index
    stats = check_against_truth(accuracy, op, inputs, ignore_index=ignore_index)
    assert stats.lse[inputs["target"] == ignore_index].count_nonzero() == 0


@pytest.mark.cpu_only
@pytest.mark.parametrize("bad", [-1, -101, 50, 2**31, 2**32 + 1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("op", OPS)
def test_target_out_of_range_names_its_position(op, bad):
    inputs = make_inputs(op, (2, 3), v=50)
    inputs["target"][1, 2] = bad
    with pytest.raises(IndexError, match=rf"target\[1, 2\] is {bad}, expected a token in \[0, 50\)"):
        call(op, inputs)


@pytest.mark.cpu_only
@pytest.mark.parametrize("op", OPS)
def test_candidate_out_of_range_names_its_position(op):
    inputs = make_inputs(op, (2, 3), v=50, k=4)
    inputs["target"][0] = -100
    inputs["target"][1, 0, 3] = 50
    with pytest.raises(IndexError, match=r"target\[1, 0, 3\] is 50"):
        call(op, inputs)


def _unvalidated(op: str, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The op for target (N, K), without the function's validation, as a compiled graph calls it; rows come first.

    All that can be asked for is.
    """
    inputs = on_device(make_inputs(op, len(target), v=50) | {"target": target})
    inputs |= {name: flat_transform(1.0, None, 1.0) for name in ("transform", "base_transform")}
    arguments = [{"ignore_index": -100, **inputs}.get(x.name) for x in schemas.STATISTICS[op].inputs()]
    asked = (True for _ in Asked._fields)
    found = [x.cpu() for x in getattr(torch.ops.dlogp, f"{op}_fwd")(*arguments, *asked)]
    *stats, extra = found
    top = len(extra) // 2  # where what is on demand begins, a token and its log p of each model
    tokens, top_logp = extra[top::2].to(torch.int64), extra[top + 1 :: 2]
    return *stats, *extra[:top], *tokens, *top_logp


@pytest.mark.cpu_only
@pytest.mark.served_by("cpu", "reference")
@pytest.mark.parametrize("bad", [-1, 50, 2**32 + 1])
@pytest.mark.parametrize("op", OPS)
def test_the_op_itself_checks_targets(op, bad):
    with pytest.raises(IndexError, match=rf"target\[1, 0\] is {bad}"):
        _unvalidated(op, torch.tensor([[1], [bad], [2]]))


@pytest.mark.gemm_interpreted
@pytest.mark.served_by("triton", "gemm", *(["reference"] if cases.DEVICE.type == "cuda" else []))
@pytest.mark.parametrize("bad", [-1, -101, 50, 2**31, 2**32 + 1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("op", OPS)
def test_a_target_out_of_range_makes_its_row_nan_and_no_other(op, bad):
    """To raise, a GPU would have to be waited for. One bad candidate spoils the row, its ignored ones included."""
    target = torch.tensor([[1, 2], [3, bad], [bad, -100], [-100, 4], [-100, -100]])
    good, spoilt = [0, 3, 4], [1, 2]
    clean = _unvalidated(op, target.where(target != bad, 5))
    for value, expected in zip(_unvalidated(op, target), clean, strict=True):
        assert value[spoilt].isnan().all() if value.is_floating_point() else (value[spoilt] == -1).all()
        assert torch.equal(value[good], expected[good])


@pytest.mark.served_by("triton")
def test_ignored_rows_are_left_out_of_the_products():
    """Of more rows than are looked at together those remain, in order, that have a candidate which counts."""
    from dlogp_kernels.triton import _rows

    target = torch.where(torch.rand(2_500, 3) < 0.7, -100, 5)
    expected = (target != -100).any(-1).nonzero()[:, 0]
    index, count = (x.cpu() for x in _rows.kept_rows(target.to(cases.DEVICE), -100))
    assert count.tolist() == [len(expected)]
    assert torch.equal(index[: len(expected)], expected)


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("op", OPS)
def test_ignored_rows_do_not_change_the_others(op):
    inputs = make_inputs(op, 50, dtype=torch.bfloat16)
    alone = make_inputs(op, 50, dtype=torch.bfloat16)
    keep = torch.rand(50) < 0.3
    inputs["target"][~keep] = -100
    alone |= {name: alone[name][keep] for name in (*per_row(op), "target")}
    for value, expected in zip(call(op, inputs), call(op, alone), strict=True):
        assert torch.equal(value[keep], expected)
