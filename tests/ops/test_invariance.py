"""Bit for bit: a row alone, among others, in another order; and from run to run."""

import cases
import pytest
import torch
from cases import ALL_OPTIONS, OPS, call, fewer, gradients, is_linear, make_inputs, options_for, upstream_of

from dlogp_kernels import backends

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = fewer((torch.bfloat16, torch.float16, torch.float32), (torch.bfloat16,))


@pytest.fixture
def invariant(backend, op):
    """The documented promise is that of the compiled kernels.

    PyTorch's matmul takes another path for another N, and on a GPU so do its reductions.
    """
    if backend == "reference" and is_linear(op):
        pytest.skip("not promised for linear ops without compiled kernels")
    if backend == "reference" and cases.DEVICE.type == "cuda":
        pytest.skip("not promised without compiled kernels: PyTorch splits its sums on a GPU by the shape")


def _rows(inputs: dict, index: object) -> dict:
    """The tokens of `index` alone."""
    return {name: x if "weight" in name or "bias" in name else x[index] for name, x in inputs.items()}


def _assert_rows_equal(stats: tuple, others: tuple, index: object) -> None:
    for name, value, other in zip(stats._fields, stats, others, strict=True):
        assert torch.equal(value[index], other), f"{name} depends on the batch"


@pytest.mark.gemm_interpreted
@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_row_alone_is_the_row_among_4096(op, dtype):
    n = fewer(4096, 70)
    inputs = make_inputs(op, n, v=fewer(1187, 203), d=72, dtype=dtype)
    stats = call(op, inputs)
    for row in (0, 1, 31, 32, n // 4 - 1, n // 2, n - 1):
        _assert_rows_equal(stats, call(op, _rows(inputs, slice(row, row + 1))), slice(row, row + 1))


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_batch_size_to_40(op, dtype):
    inputs = make_inputs(op, 40, v=fewer(1187, 301), d=72, dtype=dtype)
    stats = call(op, inputs, **options_for(op, ALL_OPTIONS))
    for n in fewer(range(1, 41), (2, 17, 31, 33)):
        _assert_rows_equal(stats, call(op, _rows(inputs, slice(n)), **options_for(op, ALL_OPTIONS)), slice(n))


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_order_of_rows_and_workspace_do_not_matter(op, dtype):
    n, v = fewer((300, 9_001), (50, 301))
    inputs = make_inputs(op, n, v=v, d=40, dtype=dtype)
    stats = call(op, inputs)
    order = torch.randperm(n)
    _assert_rows_equal(stats, call(op, _rows(inputs, order)), order)
    with backends.workspace_limit(2**20):
        _assert_rows_equal(stats, call(op, inputs), slice(None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_candidates_do_not_matter_to_each_other(op, dtype):
    inputs = make_inputs(op, fewer(20, 5), v=fewer(1187, 301), k=5, dtype=dtype)
    stats = call(op, inputs)
    for k in range(5):
        alone = call(op, inputs | {"target": inputs["target"][:, k]})
        assert torch.equal(stats.logp[:, k], alone.logp)
        assert torch.equal(stats.entropy, alone.entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward_are_the_same_in_every_run(op, dtype):
    inputs = make_inputs(op, fewer(1100, 35), v=fewer(1187, 203), d=72, dtype=dtype)
    stats = call(op, inputs)
    upstream = upstream_of(stats)
    expected = gradients(op, inputs, upstream)
    for _ in range(fewer(3, 1)):
        for value, first in zip(call(op, inputs), stats, strict=True):
            assert torch.equal(value, first)
        for name, value in gradients(op, inputs, upstream).items():
            assert torch.equal(value, expected[name])


@pytest.mark.served_by("cpu", "reference")
@pytest.mark.parametrize("op", OPS)
def test_number_of_threads_does_not_matter_to_forward(op):
    inputs = make_inputs(op, 100, v=9_001, dtype=torch.bfloat16)
    stats, threads = call(op, inputs), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        _assert_rows_equal(stats, call(op, inputs), slice(None))
    finally:
        torch.set_num_threads(threads)
