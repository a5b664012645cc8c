"""Sizes and layouts: empty, single, many rows, offsets beyond 2³¹, strides of every kind."""

import cases
import pytest
import torch
from cases import (
    LINEAR_OPS,
    OPS,
    call,
    check_against_truth,
    check_gradients,
    check_statistics,
    fewer,
    floating,
    gradients,
    make_inputs,
    truth,
    upstream_of,
)
from same_bits import assert_same_gradients, assert_same_statistics

pytestmark = pytest.mark.usefixtures("backend")

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_rows(op, shape, k):
    inputs = make_inputs(op, shape, k=k)
    for name in floating(inputs):
        inputs[name].requires_grad_()
    stats = call(op, inputs)
    assert stats.logp.shape == inputs["target"].shape and stats.lse.shape == shape
    sum(x.sum() for x in stats).backward()
    for name in floating(inputs):
        assert inputs[name].grad.shape == inputs[name].shape
        assert inputs[name].grad.count_nonzero() == 0


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("shape", fewer([(), (1,), (1, 1), (2, 3, 4)], [(), (2, 1, 3)]), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_leading_shapes(accuracy, op, shape, k):
    inputs = make_inputs(op, shape, k=k)
    stats = check_against_truth(accuracy, op, inputs)
    for name, value in stats._asdict().items():
        assert value.shape == (inputs["target"].shape if name.endswith("logp") else shape)


@pytest.mark.not_interpreted("minutes")
@pytest.mark.parametrize("op", OPS)
def test_more_rows_than_65535(accuracy, op):
    check_against_truth(accuracy, op, make_inputs(op, 70_000, v=11, d=3, dtype=BF16))


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _every_other(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype) if x.is_floating_point() else None
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), -7) if wide is None else wide
    wide[..., ::2] = x
    return wide[..., ::2]


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    buffer = x.new_empty(x.numel() + 1)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def _padded_rows(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_empty((*x.shape[:-1], x.shape[-1] + 3))
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


LAYOUTS = [_transposed, _every_other, _misaligned, _padded_rows]


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("dtype", fewer([BF16, FP32], [BF16]), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.strip("_"))
@pytest.mark.parametrize("op", OPS)
def test_strides_of_inputs_and_upstream_gradients(accuracy, op, layout, dtype):
    inputs = make_inputs(op, fewer((4, 9), (2, 3)), v=fewer(303, 143), d=21, k=3, dtype=dtype)
    strided = {name: layout(x) for name, x in inputs.items()}
    stats, expected = call(op, strided), call(op, inputs)
    assert_same_statistics(accuracy, op, inputs, stats, expected)
    check_statistics(accuracy, op, strided, stats)
    upstream = upstream_of(stats)
    values = gradients(op, strided, [layout(x) for x in upstream])
    assert_same_gradients(accuracy, op, inputs, upstream, values, gradients(op, inputs, upstream))
    check_gradients(accuracy, op, strided, upstream, values)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_expanded_inputs(accuracy, op, dtype):
    """Stride 0 over rows, and (for a weight) over tokens of the vocabulary."""
    inputs = make_inputs(op, 1, v=303, dtype=dtype)
    inputs = {name: x.expand(12, *x.shape[1:]) if x.shape[0] == 1 else x for name, x in inputs.items()}
    if "weight" in inputs:
        inputs["weight"] = inputs["weight"][:1].expand(303, -1)
        inputs["bias"] = inputs["bias"][:1].expand(303)
    check_against_truth(accuracy, op, inputs)


@pytest.mark.parametrize("op", OPS)
def test_all_but_the_last_position_of_a_batch(accuracy, op):
    """`logits[:, :-1]`, `ids[:, 1:]`: leading dimensions that do not flatten to one stride."""
    inputs = make_inputs(op, (3, 8), v=303)
    inputs = {
        name: x if "weight" in name or "bias" in name else x[:, 1:] if name == "target" else x[:, :-1]
        for name, x in inputs.items()
    }
    check_against_truth(accuracy, op, inputs)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_expanded_upstream_of_a_sum(op, dtype):
    inputs = make_inputs(op, (2, 7), dtype=dtype)
    ones = [torch.ones_like(x) for x in call(op, inputs)]
    expected = gradients(op, inputs, ones)
    leaves = {name: inputs[name].requires_grad_() for name in floating(inputs)}
    sum(x.sum() for x in call(op, inputs)).backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name])


@pytest.fixture
def sparse(tmp_path):
    """A zero tensor of bf16; on the CPU it occupies no memory until written."""

    def make(name: str, rows: int, row_stride: int) -> torch.Tensor:
        if cases.DEVICE.type == "cuda":
            return torch.zeros((rows, row_stride), dtype=BF16, device=cases.DEVICE)
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(2 * rows * row_stride)
        return torch.from_file(str(path), shared=True, size=rows * row_stride, dtype=BF16).view(rows, row_stride)

    return make


@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_2_to_31(accuracy, op, sparse):
    """Row strides of 2³⁰ elements: row 3 begins beyond 2³¹."""
    small = make_inputs(op, 4, v=4 if op in LINEAR_OPS else 303, d=5, dtype=BF16)
    far = dict(small)
    for name, x in small.items():
        if x.dim() == 2:
            far[name] = sparse(name, 4, 2**30)[:, : x.shape[1]]
            far[name].copy_(x)
    assert_same_statistics(accuracy, op, small, call(op, far), call(op, small))
    upstream = upstream_of(truth(op, small))
    values = gradients(op, far, upstream)
    assert_same_gradients(accuracy, op, small, upstream, values, gradients(op, small, upstream))


@pytest.mark.not_interpreted("minutes")
def test_contiguous_logits_of_more_than_2_to_31_elements(sparse):
    """Only the first and last rows count; the others are ignored and not read."""
    n, v = 16_400, 131_072
    logits = sparse("logits", n, v)
    rows = torch.tensor([0, 1, n - 2, n - 1])
    small = make_inputs("logp", 4, v=v, dtype=BF16)
    logits[rows] = small["logits"].to(logits.device)
    target = torch.full((n,), -100).index_copy(0, rows, small["target"])
    for value, expected in zip(call("logp", {"logits": logits, "target": target}), call("logp", small), strict=True):
        assert torch.equal(value[rows], expected)
        assert value.count_nonzero() == expected.count_nonzero()


@pytest.mark.slow
def test_gradient_of_more_than_2_to_31_elements(sparse):
    n, v = 16_400, 131_072
    logits = sparse("logits", n, v)
    rows = torch.tensor([0, 1, n - 2, n - 1])
    small = make_inputs("logp", 4, v=v, dtype=BF16)
    logits[rows] = small["logits"].to(logits.device)
    target = torch.full((n,), -100).index_copy(0, rows, small["target"])
    upstream = [torch.ones(n)] * 3
    value = gradients("logp", {"logits": logits, "target": target}, upstream)["logits"]
    assert torch.equal(value[rows], gradients("logp", small, [torch.ones(4)] * 3)["logits"])
    assert value[2].count_nonzero() == 0 and value[n // 2].count_nonzero() == 0 and value[-3].count_nonzero() == 0
