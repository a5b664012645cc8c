"""What triton_interpreter.py corrects: bfloat16 in Triton's interpreter is that of PyTorch, bit for bit."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

BF16 = torch.bfloat16
SIZE = 1024


@triton.jit
def _cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _store_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "subtract":
        z = x - y
    elif OP == "multiply":
        z = x * y
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "where":
        z = tl.where(x < y, x, -y)
    tl.store(out_ptr + i, z)


@triton.jit
def _masked_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i % 3 == 0, other=float("-inf")), mask=i % 2 == 0)


@triton.jit
def _bitcast_kernel(x_ptr, bits_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    bits = tl.load(x_ptr + i).to(tl.int16, bitcast=True)
    tl.store(bits_ptr + i, bits)
    tl.store(y_ptr + i, bits.to(tl.bfloat16, bitcast=True))


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(sum_ptr, tl.sum(x.to(tl.float32), 0))
    tl.store(max_ptr, tl.max(x, 0))


@triton.jit
def _compare_kernel(x_ptr, scalar_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, scalar = tl.load(x_ptr + i), tl.load(scalar_ptr)
    tl.store(y_ptr + i, tl.where((x < 0.0) | (scalar == 0.0), 1, 2))


class _Operands(NamedTuple):
    left: object
    right: object
    bias: object


@triton.jit
def _dot_kernel(operands, out_ptr, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for d in range(0, D, BLOCK_D):
        if isinstance(operands.left, tl.tensor_descriptor):
            left, right = operands.left.load([0, d]), operands.right.load([0, d])
        else:
            left = tl.load(operands.left + i[:, None] * D + d + k, mask=d + k < D, other=0.0)
            right = tl.load(operands.right + i[:, None] * D + d + k, mask=d + k < D, other=0.0)
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    if operands.bias is not None:
        acc += tl.load(operands.bias + i)
    tl.store(out_ptr + i[:, None] * BLOCK + i, acc)


def _special(dtype: torch.dtype) -> torch.Tensor:
    """Numbers of every size, ties between neighbours in bf16, subnormals, infinities, NaN."""
    bits = torch.randint(-(2**31), 2**31, (SIZE,)).to(torch.int32)
    bits[:256] = (bits[:256] & ~0xFFFF) | 0x8000
    x = bits.view(torch.float32)
    x[256:264] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-39, 3.3961775e38])
    return x.to(dtype)


def _assert_same(value: torch.Tensor, expected: torch.Tensor) -> None:
    assert value.dtype == expected.dtype
    assert torch.equal(value.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(value[kept], expected[kept])
    assert torch.equal(value[kept].signbit(), expected[kept].signbit())


@pytest.mark.parametrize("kernel", [_cast_kernel, _store_kernel], ids=["cast", "store"])
@pytest.mark.parametrize(
    ("source", "destination"), [(torch.float32, BF16), (BF16, torch.float32), (BF16, BF16)], ids=str
)
def test_casts(kernel, source, destination):
    x, y = _special(source), torch.empty(SIZE, dtype=destination)
    kernel[(1,)](x, y, SIZE)
    _assert_same(y, x.to(destination))


@pytest.mark.parametrize(("source", "destination"), [(torch.float16, BF16), (BF16, torch.float16)], ids=str)
def test_casts_between_narrow_types(source, destination):
    x, y = torch.randn(SIZE).to(source), torch.empty(SIZE, dtype=destination)
    _cast_kernel[(1,)](x, y, SIZE)
    _assert_same(y, x.to(destination))


@pytest.mark.parametrize("op", ["add", "subtract", "multiply", "maximum", "abs", "where"])
def test_arithmetic(op):
    x, y = torch.randn(2, SIZE).to(BF16)
    out = torch.empty(SIZE, dtype=BF16)
    _arithmetic_kernel[(1,)](x, y, out, op, SIZE)
    expected = torch.where(x < y, x, -y) if op == "where" else getattr(torch, op)(*(x, y)[: 1 + (op != "abs")])
    _assert_same(out, expected)


def test_masks():
    x, y = torch.randn(SIZE).to(BF16), torch.zeros(SIZE, dtype=BF16)
    _masked_kernel[(1,)](x, y, SIZE)
    i = torch.arange(SIZE)
    _assert_same(y, x.masked_fill(i % 3 != 0, -torch.inf).masked_fill(i % 2 != 0, 0.0))


def test_bitcasts():
    x = torch.randn(SIZE).to(BF16)
    bits, y = torch.empty(SIZE, dtype=torch.int16), torch.empty(SIZE, dtype=BF16)
    _bitcast_kernel[(1,)](x, bits, y, SIZE)
    assert torch.equal(bits, x.view(torch.int16))
    _assert_same(y, x)


def test_reductions():
    x = torch.randn(SIZE).to(BF16)
    total, largest = torch.empty(1), torch.empty(1, dtype=BF16)
    _reduce_kernel[(1,)](x, total, largest, SIZE)
    torch.testing.assert_close(total[0], x.float().sum())
    assert largest[0] == x.max()


@pytest.mark.parametrize("scalar", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_comparison_of_a_scalar_beside_one_of_a_block(dtype, scalar):
    x, y = torch.randn(SIZE).to(dtype), torch.empty(SIZE, dtype=torch.int32)
    _compare_kernel[(1,)](x, torch.tensor(scalar, dtype=dtype), y, SIZE)
    assert torch.equal(y, torch.where((x < 0) | (scalar == 0), 1, 2).to(torch.int32))


@pytest.mark.parametrize("bias", [False, True], ids=["None", "bias"])
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("described", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_dot_of_pointers_and_descriptors(dtype, described, precision, bias):
    block, block_d, d = 32, 16, 40
    left, right = torch.randn(2, block, d).to(dtype)
    operands = _Operands(left, right, torch.randn(block).to(dtype) if bias else None)
    arguments = operands
    if described:
        arguments = operands._replace(
            left=TensorDescriptor.from_tensor(left, [block, block_d]),
            right=TensorDescriptor.from_tensor(right, [block, block_d]),
        )
    out = torch.empty(block, block)
    _dot_kernel[(1,)](arguments, out, d, block, block_d, precision)
    expected = left.double() @ right.double().t()
    if bias:
        expected += operands.bias.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
