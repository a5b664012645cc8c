"""The kernels for Hopper on a GPU, where the tests of all backends do not reach: gradients without one by a bias."""

import cases
import pytest
import torch
from cases import LINEAR_OPS, is_pair, make_inputs
from tolerances import ROUNDED_GRADIENT_ERROR

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.reference import statistics as reference

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.also_by("cuda"),
    pytest.mark.served_by("cuda"),
    pytest.mark.needs_gpu,
]

BF16, FP16 = torch.bfloat16, torch.float16
STATS = ("logp", "entropy", "lse", "base_logp", "base_entropy", "base_lse")
VARIANTS = {
    "plain": {},
    "hot, scaled": {"temperature": 2.5, "logit_scale": 0.5},
    "softcap": {"softcap": 4.0, "base_softcap": 6.0, "temperature": 0.7},
}


def gradients(function, inputs, options, wanted, upstream):
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    stats = function(**(inputs | leaves), **options)
    loss = sum((grad.to(x) * x).sum() for name, grad in upstream.items() if (x := getattr(stats, name)) is not None)
    return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))


def assert_gradients(op, inputs, options, wanted, names=STATS):
    generator = torch.Generator(cases.DEVICE).manual_seed(1)
    stats = getattr(reference, op)(**cases.upcast(inputs), **options)
    kept = inputs["target"] != -100
    upstream = {
        name: torch.randn(getattr(stats, name).shape, generator=generator, device=cases.DEVICE)
        for name in names
        if getattr(stats, name, None) is not None
    }
    found = gradients(getattr(dlogp_kernels, op), inputs, options, wanted, upstream)
    expected = gradients(getattr(reference, op), cases.upcast(inputs), options, wanted, upstream)
    for name, x in found.items():
        truth = expected[name]
        if "hidden" in name:
            assert x[~kept.view(x.shape[0], -1).any(-1)].count_nonzero() == 0
        limit, errors = ROUNDED_GRADIENT_ERROR[x.dtype], (x.double() - truth).norm(dim=-1)
        print(f"{op} {name} {x.dtype}: {(errors.norm() / truth.norm()).item():.2e}")
        assert errors.norm() <= limit * truth.norm(), name
        assert errors.max() <= 10 * limit * truth.norm(dim=-1).max(), name  # no row alone


def on_device(inputs):
    return {name: x.to(cases.DEVICE) for name, x in inputs.items()}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "a frozen bias"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_gradients(op, dtype, bias, options):
    inputs = on_device(make_inputs(op, 300, v=5003, d=72, dtype=dtype, bias=bias))
    inputs["target"][::3] = -100
    options = cases.options_for(op, options)
    wanted = [name for name in inputs if "hidden" in name or "weight" in name]
    assert_gradients(op, inputs, options, wanted)


@pytest.mark.parametrize("n", [1, 64, 128, 129, 1000])
@pytest.mark.parametrize("v", [1, 7, 255, 256, 257, 8448, 8449, 20_011])
def test_rows_and_vocabularies(n, v):
    inputs = on_device(make_inputs("linear_logp", n, v=v, d=64, dtype=BF16, bias=False))
    assert_gradients("linear_logp", inputs, {}, ["hidden", "weight"], names=("logp", "lse"))


@pytest.mark.parametrize("k", [2, 5])
def test_candidates_of_which_some_are_ignored_and_some_equal(k):
    inputs = on_device(make_inputs("linear_logp", 200, v=301, d=40, k=k, dtype=BF16, bias=False))
    inputs["target"][::2, 0] = -100
    inputs["target"][1] = inputs["target"][1, :1]
    inputs["target"][3] = torch.arange(k, device=cases.DEVICE) + 5
    assert_gradients("linear_logp", inputs, {"softcap": 3.0}, ["hidden", "weight"])


def test_a_hidden_size_that_is_no_multiple_of_8_in_a_padded_weight():
    inputs = on_device(make_inputs("linear_logp", 300, v=1003, d=100, dtype=BF16, bias=False))
    inputs["weight"] = torch.nn.functional.pad(inputs["weight"], (0, 4), value=torch.nan)[:, :100]
    assert_gradients("linear_logp", inputs, {}, ["hidden", "weight"])


def test_an_impossible_token_at_a_temperature_near_0():
    inputs = on_device(make_inputs("linear_logp", 20, v=301, d=24, dtype=BF16))
    inputs["bias"][7] = -torch.inf
    inputs["target"] = inputs["target"].masked_fill(inputs["target"] == 7, 8)
    leaf = inputs["hidden"].requires_grad_()
    dlogp_kernels.linear_logp(**inputs, temperature=1e-14).logp.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize("wanted", [["hidden"], ["weight"]], ids=str)
def test_in_a_small_workspace(wanted):
    """Block of rows by block of rows, and blocks of tokens that begin within a tile."""
    inputs = on_device(make_inputs("linear_logp", 3000, v=5003, d=64, dtype=BF16))
    with backends.workspace_limit(4 * 2**20):
        assert_gradients("linear_logp", inputs, {}, wanted)


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_what_can_not_be_served_raises_and_says_why(op):
    inputs = on_device(make_inputs(op, 3, v=40, d=24, dtype=BF16))
    function = getattr(dlogp_kernels, op)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' was asked for .* rows of weight do not begin on 16 bytes"):
        function(**inputs | {"weight": torch.nn.functional.pad(inputs["weight"], (0, 1))[:, :-1]})
    with pytest.raises(RuntimeError, match="but it multiplies bfloat16 and float16 only"):
        function(**{name: x if name == "target" else x.float() for name, x in inputs.items()})
    with pytest.raises(RuntimeError, match="but it does not look for the most likely token"):
        function(**inputs, top=True)
    if is_pair(op):
        with pytest.raises(RuntimeError, match=r"base_hidden torch\.float16 and base_weight"):
            function(**inputs | {name: inputs[name].half() for name in ("base_hidden", "base_weight")})
