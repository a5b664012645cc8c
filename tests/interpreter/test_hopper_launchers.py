"""The launchers of the kernels for Hopper, with plain PyTorch in the kernels' place: passes, rows, blocks, terms."""

import math
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
from cases import LINEAR_OPS, is_pair, make_inputs, options_for
from tolerances import ROUNDED_GRADIENT_ERROR
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.reference import statistics as reference
from dlogp_kernels.triton import hopper

BF16 = torch.bfloat16
COLUMNS = {1: 256, 2: 160}
OPTIONS = {"temperature": 0.7, "softcap": 4.0, "base_softcap": 6.0, "logit_scale": 1.3}
STATS = ("logp", "entropy", "lse", "base_logp", "base_entropy", "base_lse")


def x_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, tanh_scale: float, tile: int = COLUMNS[1]) -> Tensor:
    for matrix in (hidden, weight):  # or the copies could not be made
        assert matrix.dim() == 2 and matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0
    x = hidden.double() @ weight.double().t()
    if bias is not None:
        assert bias.shape == (math.ceil(weight.shape[0] / tile) * tile,) and bias.dtype == torch.float32
        x += bias[: weight.shape[0]]
    return torch.tanh(x * tanh_scale) if tanh_scale else x


def states(*arguments: Any) -> None:
    """csrc/cuda/linear_sm90.h, launch_linear_forward."""
    *models, target, row_index, num_rows, first, state, target_logits = arguments
    heads = [models[i : i + 5] for i in (0, 5) if models[i] is not None]
    n = first + torch.arange(state.shape[2])
    count = (target.shape[0] if num_rows is None else int(num_rows)) - first
    rows = n[: max(0, min(count, state.shape[2]))]
    index = rows if row_index is None else row_index[rows]
    num_splits, k, tile = state.shape[1], target.shape[1], COLUMNS[len(heads)]
    all_x = [x_of(hidden[: len(rows)], weight, bias, tanh, tile) for hidden, weight, bias, tanh, _ in heads]
    for model, x in enumerate(all_x):
        inside = target[index].clamp(0, x.shape[1] - 1)
        target_logits[model * k : (model + 1) * k, : len(rows)] = x.gather(1, inside).t()
    tiles = math.ceil(all_x[0].shape[1] / tile)
    for split in range(num_splits):
        columns = slice(tile * (tiles * split // num_splits), tile * (tiles * (split + 1) // num_splits))
        fields, exponents, terms = [], [], []
        for x, scale in zip(all_x, (head[4] for head in heads), strict=True):
            d = x[:, columns] - x[:, columns].amax(1, keepdim=True)
            exponents.append(scale * d)
            terms.append(exponents[-1].exp())
            one = torch.zeros_like(d).scatter(1, d.argmax(1, keepdim=True), 1.0)
            fields += [x[:, columns].amax(1), (terms[-1] * (1 - one)).sum(1), (terms[-1] * d).sum(1)]
        if len(heads) == 2:
            u = exponents[0] - exponents[1]
            fields += [(terms[0] * u).sum(1), -(terms[1] * u).sum(1), torch.zeros(len(rows)), torch.zeros(len(rows))]
        state[:, split, : len(rows)] = torch.stack([field.float() for field in fields])


def gradient(*arguments: Any) -> None:
    """launch_linear_gradient."""
    *head, tanh_scale, scale, target, target_terms, row_terms, first, first_token, out = arguments
    x, rows = x_of(*head, tanh_scale), slice(first, first + out.shape[0])
    largest, log_sum, constant, log_term = (term[rows, None].double() for term in row_terms)
    logp = scale * x - largest - log_sum
    by_z = logp.exp() * (constant + log_term * logp)
    for k in range(target.shape[1]):
        token = torch.arange(out.shape[1]) + first_token
        by_z += torch.where(target[rows, k, None] == token, target_terms[rows, k, None].double(), 0.0)
    out.copy_(by_z * scale * (tanh_scale * (1 - x * x) if tanh_scale else 1.0))


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    library = torch.library.Library("dlogp", "IMPL")
    library.impl("_cuda_linear_states", states, "CPU")
    library.impl("_cuda_linear_gradient", gradient, "CPU")
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def on_hopper(kernels, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_hopper_problem", lambda device, dtype: None)
    with backends.use_backend("cuda"):
        yield


def inputs_of(op: str, n: int, v: int, bias: bool, k: int | None = None) -> dict[str, Tensor]:
    """Weights of 20 and 28 numbers in rows of 24 and 32."""
    inputs = make_inputs(op, n, v=v, d=20, dtype=BF16, bias=bias, k=k)
    inputs["target"][::3] = -100
    for name in [name for name in inputs if "weight" in name]:
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 4))[:, :-4]
    return inputs


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize(("n", "v"), [(5, 7), (130, 700), (300, 1111)])
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_forward(op, n, v, k):
    inputs, options = inputs_of(op, n, v, bias=True, k=k), options_for(op, OPTIONS)
    expected = getattr(reference, op)(**cases.upcast(inputs), **options)
    with backends.workspace_limit(2**20):  # more passes than one
        stats = getattr(dlogp_kernels, op)(**inputs, **options)
    for name in stats._fields:
        if (value := getattr(stats, name)) is not None:
            torch.testing.assert_close(value.double(), getattr(expected, name), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("workspace", [2**20, 2**28])
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_backward(op, wanted, workspace):
    """Of all but the divergences, which Triton's backward serves, and a bias that is frozen."""
    n, v = 40, 700
    inputs, options = inputs_of(op, n, v, bias=True, k=2), options_for(op, OPTIONS)
    names = [f"{prefix}{name}" for prefix in ("", "base_")[: 1 + is_pair(op)] for name in wanted]
    generator = torch.Generator().manual_seed(1)

    def gradients(function: Any, given: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: given[name].detach().requires_grad_() for name in names}
        stats = function(**(given | leaves), **options)
        present = [x for name in STATS if (x := getattr(stats, name, None)) is not None]
        upstream = [torch.randn(x.shape, generator=generator.manual_seed(1)).to(x) for x in present]
        return list(torch.autograd.grad(present, list(leaves.values()), upstream))

    with backends.workspace_limit(workspace):
        found = gradients(getattr(dlogp_kernels, op), inputs)
    for value, expected in zip(found, gradients(getattr(reference, op), cases.upcast(inputs)), strict=True):
        assert (value.double() - expected).norm() <= ROUNDED_GRADIENT_ERROR[BF16] * expected.norm()


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_gradients_by_a_bias_or_of_a_divergence_are_left_to_triton(op, monkeypatch):
    inputs = inputs_of(op, 6, 40, bias=True)
    monkeypatch.setattr(hopper, "_terms", lambda *arguments: pytest.fail("the kernel was to be launched"))
    names = [name for name in inputs if "bias" in name or (is_pair(op) and name != "target")]

    def gradients() -> list[Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        stats = getattr(dlogp_kernels, op)(**(inputs | leaves))
        return list(torch.autograd.grad((stats.kl if is_pair(op) else stats.logp).sum(), list(leaves.values())))

    found = gradients()
    with backends.use_backend("triton"):
        for value, expected in zip(found, gradients(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-3)
