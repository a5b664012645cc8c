"""nn.Module forms: the functions with options held."""

import copy

import pytest
import torch
from cases import ALL_OPTIONS, OPS, asked_for, call, make_inputs, options_for
from torch import nn

import dlogp_kernels

MODULES = {
    "linear_logp": dlogp_kernels.LinearLogp,
    "linear_delta_logp": dlogp_kernels.LinearDeltaLogp,
    "logp": dlogp_kernels.Logp,
    "delta_logp": dlogp_kernels.DeltaLogp,
}


@pytest.mark.parametrize("op", OPS)
def test_is_the_function_with_its_options(backend, op):
    inputs = make_inputs(op, (2, 5), k=3)
    inputs["target"][0, 0, 0] = 7
    options = options_for(op, ALL_OPTIONS) | {"ignore_index": 7, "top": True}
    for module in (MODULES[op](**options), copy.deepcopy(MODULES[op](**options))):
        for value, expected in zip(asked_for(module(**inputs)), call(op, inputs, **options), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("op", OPS)
def test_defaults_are_the_functions(op):
    inputs = make_inputs(op)
    for value, expected in zip(asked_for(MODULES[op]()(**inputs)), call(op, inputs), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("op", OPS)
def test_has_no_state_and_shows_its_options(op):
    module = MODULES[op](temperature=0.5)
    assert isinstance(module, nn.Module)
    assert list(module.parameters()) == [] and module.state_dict() == {}
    assert "temperature=0.5" in repr(module) and "softcap=None" in repr(module)


@pytest.mark.parametrize("op", OPS)
def test_unknown_options_are_refused(op):
    with pytest.raises(TypeError, match="unexpected keyword"):
        MODULES[op](temprature=1.0)


@pytest.mark.parametrize("op", OPS)
def test_more_inputs_than_there_are_are_refused(op):
    with pytest.raises(
        TypeError, match=rf"^{MODULES[op].__name__} is given 99 inputs by place, expected at most \d+: \w+"
    ):
        MODULES[op]()(*[torch.zeros(1)] * 99)


def test_gradients_flow_to_a_linear_layer():
    head = nn.Linear(6, 11)
    stats = dlogp_kernels.LinearLogp()(torch.randn(4, 6), head.weight, torch.randint(11, (4,)), head.bias)
    stats.logp.sum().backward()
    assert head.weight.grad.shape == (11, 6) and head.bias.grad.count_nonzero() == 11
