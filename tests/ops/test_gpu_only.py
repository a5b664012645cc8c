"""What only a GPU can show: large sizes, its memory, streams, graphs, devices. The rest is in the tests of the ops.

Inputs are made on the device. Without `needs_gpu`, a test also runs under Triton's interpreter, with tiny sizes.
"""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
from cases import LINEAR_OPS, OPS, fewer, floating, is_linear, is_pair, op_rows, upstream_of
from tolerances import LOGP_ERROR, MEMORY_MIB, TIMES_CUBLAS
from torch import Tensor

import dlogp_kernels
from dlogp_kernels.reference import statistics as reference

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.served_by("triton", "gemm", "cuda"),
    pytest.mark.also_by("cuda"),
]
needs_gpu = pytest.mark.needs_gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Inputs = dict[str, Tensor]


def make(
    op: str,
    n: int,
    *,
    v: int,
    d: int = 64,
    dtype: torch.dtype = BF16,
    spread: float = 2.0,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Inputs:
    """Inputs on the device, without large temporaries: logits of standard deviation `spread`."""
    device = cases.DEVICE if device is None else device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device).mul_(scale)

    inputs: Inputs = {}
    for prefix, width in (("", d), ("base_", d + 8))[: 1 + is_pair(op)]:
        if is_linear(op):
            inputs[f"{prefix}hidden"] = normal(n, width)
            inputs[f"{prefix}weight"] = normal(v, width, scale=spread / math.sqrt(width))
        else:
            inputs[f"{prefix}logits"] = normal(n, v, scale=spread)
    return inputs | {"target": torch.randint(v, (n,), generator=generator, device=device)}


def run(op: str, inputs: Inputs, **options: Any) -> Any:
    return cases.asked_for(getattr(dlogp_kernels, op)(**inputs, **options))


def upstream(stats: tuple[Tensor, ...]) -> list[Tensor]:
    return [grad.to(x.device) for grad, x in zip(upstream_of(stats), stats, strict=True)]


def backward(op: str, inputs: Inputs, wanted: list[str], grads: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    stats = run(op, inputs | leaves)
    return torch.autograd.grad(stats, list(leaves.values()), upstream(stats) if grads is None else grads)


def rows(inputs: Inputs, index: slice) -> Inputs:
    return {name: x if "weight" in name else x[index] for name, x in inputs.items()}


def per_row(op: str) -> list[str]:
    return [f"{prefix}{op_rows(op)}" for prefix in ("", "base_")[: 1 + is_pair(op)]]


def assert_same(values: Any, others: Any) -> None:
    for value, other in zip(values, others, strict=True):
        assert torch.equal(value, other)


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    if cases.DEVICE.type == "cuda":
        torch.cuda.empty_cache()


LARGE = {"more than 2³¹ logits": (16_400, 131_072), "70 000 rows": (70_000, 1_003)}


@pytest.mark.parametrize("size", fewer(LARGE, ["70 000 rows"]))
@pytest.mark.parametrize("op", fewer(OPS, ["linear_delta_logp", "logp"]))
def test_last_rows_of_many_are_those_rows_alone(op, size):
    """Forward and gradient, bit for bit: no offset wraps around."""
    n, v = fewer(LARGE[size], (70, 131))
    inputs, last = make(op, n, v=v), slice(n - 16, n)
    stats = run(op, inputs)
    assert all(x.isfinite().all() for x in stats)
    assert_same([x[last] for x in stats], run(op, rows(inputs, last)))
    grads = upstream(stats)
    values = backward(op, inputs, per_row(op), grads)
    alone = backward(op, rows(inputs, last), per_row(op), [x[last] for x in grads])
    for value, other in zip(values, alone, strict=True):
        assert value.shape[0] == n and value[0].count_nonzero() > 0
        if is_linear(op):  # the products of another number of rows may be summed in another order
            torch.testing.assert_close(value[last], other, rtol=2e-2, atol=2e-2 * other.abs().max().item())
        else:
            assert torch.equal(value[last], other)


@pytest.mark.parametrize("op", fewer(OPS, ["linear_logp", "delta_logp"]))
def test_a_row_alone_is_the_row_among_4096(op):
    n, v, d = fewer((4096, 50_257, 1024), (40, 131, 40))
    inputs = make(op, n, v=v, d=d)
    stats = run(op, inputs)
    for row in (0, 1, n // 2, n - 1):
        index = slice(row, row + 1)
        assert_same([x[index] for x in stats], run(op, rows(inputs, index)))


@pytest.mark.parametrize("op", fewer(OPS, ["linear_logp", "delta_logp"]))
def test_forward_and_backward_are_the_same_in_every_run(op):
    n, v, d = fewer((4096, 50_257, 1024), (20, 131, 40))
    inputs = make(op, n, v=v, d=d)
    stats, values = run(op, inputs), backward(op, inputs, floating(inputs))
    for _ in range(fewer(3, 1)):
        assert_same(run(op, inputs), stats)
        assert_same(backward(op, inputs, floating(inputs)), values)


@pytest.mark.parametrize("op", fewer(OPS, ["linear_logp", "delta_logp"]))
def test_launch_from_a_worker_thread(op, backend):
    inputs = make(op, 20, v=131)
    results: list[tuple[Tensor, ...]] = []

    def work() -> None:
        results.append((*run(op, inputs), *backward(op, inputs, floating(inputs))))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert_same(results[0], (*run(op, inputs), *backward(op, inputs, floating(inputs))))


@pytest.mark.parametrize("dtype", fewer([FP32], [BF16]), ids=str)
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_error_at_a_large_hidden_size(op, dtype, accuracy, backend):
    """Against float64 of the same inputs, with |z| up to 50."""
    n, v, d = fewer((64, 151_936, 4096), (5, 301, 256))
    inputs = make(op, n, v=v, d=d, dtype=dtype, spread=8.0)
    exact = cases.upcast(inputs)
    expected = cases.asked_for(getattr(reference, op)(**exact))
    z = torch.stack([(exact[f"{x}hidden"] @ exact[f"{x}weight"].t()).abs().amax(-1) for x in _models(op)])
    assert 20 < z.max() <= 60
    terms = [(exact[f"{x}hidden"].abs() @ exact[f"{x}weight"].abs().t()).amax(-1) for x in _models(op)]
    magnitude = torch.stack(terms).amax(0) + math.log(v)
    stats = run(op, inputs)
    on_cpu = [type(x)(*(value.detach().cpu() for value in x)) for x in (stats, expected)]
    accuracy.statistics(op, *on_cpu, magnitude.cpu(), dtype)
    limit = LOGP_ERROR
    if backend == "gemm":  # the vendor's float32 product sums in another order: off by 4e-5 on an H100
        product = (inputs["hidden"] @ inputs["weight"].t()).double()
        limit = max(limit, TIMES_CUBLAS * (_logp_and_entropy(product, inputs["target"])[0] - expected.logp).abs().max())
    assert (stats.logp - expected.logp).abs().max() <= limit


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_error_on_tensor_cores_beside_the_vendors_product(op, dtype, accuracy):
    """4096 rows at a hidden size of 4096: what the sums of tensor cores lose, cuBLAS loses too."""
    inputs = make(op, 4096, v=151_936, d=4096, dtype=dtype, spread=3.0)
    stats = run(op, inputs)
    for prefix in _models(op):
        hidden, weight, target = inputs[f"{prefix}hidden"], inputs[f"{prefix}weight"], inputs["target"]
        found: dict[str, list[Tensor]] = {"truth": [], "cublas": []}
        for rows in torch.arange(4096, device=cases.DEVICE).split(512):
            found["truth"].append(_logp_and_entropy(hidden[rows].double() @ weight.double().t(), target[rows]))
            product = torch.mm(hidden[rows], weight.t(), out_dtype=torch.float32)
            found["cublas"].append(_logp_and_entropy(product.double(), target[rows]))
        truth, cublas = (torch.cat(parts, 1) for parts in found.values())
        ours = torch.stack([getattr(stats, f"{prefix}{name}") for name in ("logp", "entropy")])
        for name, own, expected, other in zip(("logp", "entropy"), ours, truth, cublas, strict=True):
            accuracy.beside_cublas(f"{op} {prefix}{name}", own - expected, other - expected, dtype)


def _logp_and_entropy(z: Tensor, target: Tensor) -> Tensor:
    logp_all = z.log_softmax(-1)
    return torch.stack([logp_all.gather(1, target[:, None])[:, 0], -(logp_all.exp() * logp_all).sum(-1)])


def _models(op: str) -> tuple[str, ...]:
    return ("", "base_")[: 1 + is_pair(op)]


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_a_target_outside_the_vocabulary_makes_its_row_nan_and_no_other(op):
    inputs = make(op, 40, v=1003)
    clean = run(op, inputs)
    for bad in (-1, 1003, 2**40):
        spoilt = inputs | {"target": inputs["target"].index_fill(0, torch.tensor([7], device=cases.DEVICE), bad)}
        for value, expected in zip(run(op, spoilt), clean, strict=True):
            assert value[7].isnan()
            assert torch.equal(value[:7], expected[:7]) and torch.equal(value[8:], expected[8:])


@needs_gpu
def test_a_target_outside_the_vocabulary_raises_when_asked_to_check():
    code = (
        "import torch, dlogp_kernels\n"
        "dlogp_kernels.logp(torch.zeros(2, 5, device='cuda'), torch.tensor([1, 9], device='cuda'))"
    )
    env = os.environ | {"DLOGP_CHECK": "1"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert finished.returncode != 0
    assert "IndexError: target[1] is 9, expected a token in [0, 5)" in finished.stderr


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_inputs_on_a_device_that_is_not_the_current_one(op):
    inputs = make(op, 300, v=1003, device="cuda:1")
    with torch.cuda.device(0):
        stats, values = run(op, inputs), backward(op, inputs, floating(inputs))
    assert all(x.device == torch.device("cuda:1") for x in (*stats, *values))
    with torch.cuda.device(1):
        assert_same((*stats, *values), (*run(op, inputs), *backward(op, inputs, floating(inputs))))


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_gpu(op):
    inputs = make(op, 300, v=1003)
    grads = upstream(run(op, inputs))
    backward(op, inputs, floating(inputs), grads)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(op, inputs, floating(inputs), grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_graph_of_forward_replays_with_new_inputs(op):
    inputs, others = make(op, 300, v=1003), make(op, 300, v=1003, seed=1)
    expected = run(op, others)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(op, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = run(op, inputs)
    for name, x in inputs.items():
        x.copy_(others[name])
    graph.replay()
    assert_same(stats, expected)


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_another_stream(op):
    """Inputs that a stream is still computing are waited for on that stream, and on no other."""
    ready = make(op, 300, v=1003)
    expected = (*run(op, ready), *backward(op, ready, floating(ready)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = {name: x.clone() for name, x in ready.items()}
        values = (*run(op, late), *backward(op, late, floating(late)))
    stream.synchronize()
    assert_same(values, expected)


@needs_gpu
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("op", OPS)
def test_peak_memory(op, way, backend, record_property):
    """Over inputs, outputs and gradients, of a call that is not the first."""
    n, v, d = 8192, 151_936, 1024
    small = make(op, 300, v=v, d=d)
    backward(op, small, floating(small))
    del small
    inputs = make(op, n, v=v, d=d)
    leaves = {name: inputs[name].requires_grad_(way == "backward") for name in floating(inputs)}
    if way == "backward":
        stats = run(op, inputs)
        grads = upstream(stats)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(op, inputs) if way == "forward" else torch.autograd.grad(stats, list(leaves.values()), grads)
    torch.cuda.synchronize()
    growth = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)
    workspace = growth / 2**20
    record_property(f"{op} {way} MiB", workspace)
    print(f"{op} {backend} {way}: {workspace:.1f} MiB")
    assert workspace <= MEMORY_MIB[backend][way == "backward"]
