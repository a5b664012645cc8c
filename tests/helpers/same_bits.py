"""Where tests ask for the same bits, and where on a GPU for the same accuracy instead.

Promised bit for bit is what a call gives in every run and, with compiled kernels, forward whatever the other rows are.
On the CPU and under Triton's interpreter more has the same bits: other strides of the inputs, or another set of wanted
gradients, do not change the arithmetic. On a GPU they choose other code, which rounds in other places. cuBLAS takes its
algorithm, and with it the order of its sums, from strides, alignment and transposition of what it multiplies: in
backward of the linear ops, in forward of `gemm` and of plain PyTorch, whose reductions do likewise. Triton compiles a
kernel anew for a pointer or a stride that is a multiple of 16, a stride of 1 and an argument that is None; each lies
over the threads, whose parts are added in turn, and contracts multiplications and additions as the compiler likes; and
weights whose rows begin at odd addresses are read in other tiles. There the measure is that of every result: the error
against float64.
"""

from typing import Any

import cases
import torch
from torch import Tensor


def assert_same_statistics(
    accuracy: Any, op: str, inputs: cases.Inputs, actual: tuple, expected: tuple, **options: Any
) -> None:
    """`actual` has the bits of `expected`; on a GPU it is as right as they are. `inputs` have the values of both."""
    if cases.DEVICE.type == "cuda":
        cases.check_statistics(accuracy, op, inputs, actual, **options)
        return
    for value, other in zip(actual, expected, strict=True):
        assert torch.equal(value, other)


def assert_same_gradients(
    accuracy: Any,
    op: str,
    inputs: cases.Inputs,
    upstream: list[Tensor | None],
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    **options: Any,
) -> None:
    """As `assert_same_statistics`, of the gradients in `actual`, which need not be all."""
    if cases.DEVICE.type == "cuda":
        cases.check_gradients(accuracy, op, inputs, upstream, actual, **options)
        return
    for name, value in actual.items():
        assert torch.equal(value, expected[name])


def assert_same_policy(actual: Any, expected: Any) -> None:
    """Loss and the gradient by logp of two calls of `policy_loss`, whose error against float64 others measure."""
    pairs = (actual.loss, expected.loss), (actual.gradients["logp"], expected.gradients["logp"])
    for value, other in pairs:
        if cases.DEVICE.type == "cuda":
            torch.testing.assert_close(value, other)
        else:
            assert torch.equal(value, other)
