"""What does not fit is refused by name: the argument, what was given, what was expected."""

import linear_policy_cases
import numpy as np
import policy_cases
import pytest
import torch
from cases import LINEAR_OPS, OPS, PAIR_OPS, call, is_pair, make_inputs

import dlogp_kernels

pytestmark = pytest.mark.cpu_only


def _refused(op: str, error: type[Exception], message: str, **changes) -> None:
    tensors = make_inputs(op, (2, 3), v=30, d=4)
    with pytest.raises(error, match=message):
        call(op, tensors | changes)


@pytest.mark.parametrize("op", OPS)
def test_every_tensor_must_be_a_tensor(op):
    for name in make_inputs(op, 1):
        for value, kind in (([1.0, 2.0], "list"), (np.zeros(3), "ndarray"), (1, "int")):
            _refused(op, TypeError, rf"^{name} is {kind}, expected a tensor", **{name: value})


@pytest.mark.parametrize("op", OPS)
def test_floating_inputs_must_be_floating(op):
    for name, x in make_inputs(op, (2, 3), v=30, d=4).items():
        if name != "target":
            for dtype in (torch.int64, torch.bool, torch.complex64):
                _refused(op, TypeError, rf"^{name} has dtype {dtype}, expected bfloat16", **{name: x.to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_target_must_be_integer(op, dtype):
    _refused(op, TypeError, f"^target has dtype {dtype}, expected an integer", target=torch.zeros(2, 3).to(dtype))


@pytest.mark.parametrize("shape", [(), (3,), (6,), (3, 2), (2, 4), (2, 3, 0), (1, 2, 3), (2, 3, 4, 1)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_target_shape(op, shape):
    message = rf"^target has shape .*expected \(2, 3\) or \(2, 3, 'K'\) for {'hidden' if 'linear' in op else 'logits'}"
    _refused(op, ValueError, message, target=torch.zeros(shape, dtype=torch.int64))


BAD_HEADS = [
    ("hidden", (), r"hidden has shape \(\), expected \(…, D\)"),
    ("hidden", (2, 3, 0), r"hidden has shape \(2, 3, 0\), expected \(…, D\) with D ≥ 1"),
    ("hidden", (2, 3, 5), r"weight has shape .*expected \(V, 5\) for (base_)?hidden of shape \(2, 3, 5\)"),
    ("weight", (30,), r"weight has shape \(30,\), expected \(V, "),
    ("weight", (30, 7), r"weight has shape \(30, 7\), expected \(V, "),
    ("weight", (0, 4), r"weight has shape \(0, 4\), expected \(V, "),
    ("weight", (1, 30, 4), r"weight has shape \(1, 30, 4\), expected \(V, "),
    ("bias", (), r"bias has shape \(\), expected \(30,\)"),
    ("bias", (29,), r"bias has shape \(29,\), expected \(30,\)"),
    ("bias", (30, 1), r"bias has shape \(30, 1\), expected \(30,\)"),
]


@pytest.mark.parametrize(
    ("name", "shape", "message"), BAD_HEADS, ids=[f"{name}{shape}" for name, shape, _ in BAD_HEADS]
)
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_shapes_of_a_head(op, name, shape, message):
    for prefix in ("", "base_")[: 1 + is_pair(op)]:
        _refused(op, ValueError, f"^{prefix}{message}", **{prefix + name: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 0)], ids=str)
def test_shape_of_logits(shape):
    _refused("logp", ValueError, r"^logits has shape .*, expected \(…, V\) with V ≥ 1", logits=torch.zeros(shape))
    _refused("delta_logp", ValueError, r"^logits has shape", logits=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 3, 31), (3, 2, 30), (6, 30)], ids=str)
def test_base_logits_must_have_the_shape_of_logits(shape):
    message = r"^base_logits has shape .*, expected that of logits, \(2, 3, 30\)"
    _refused("delta_logp", ValueError, message, base_logits=torch.zeros(shape))


def test_base_hidden_must_have_the_rows_of_hidden():
    message = r"^base_hidden has shape \(3, 2, 12\), expected the leading dimensions of hidden, \(2, 3, 4\)"
    _refused("linear_delta_logp", ValueError, message, base_hidden=torch.zeros(3, 2, 12))


def test_both_models_must_have_one_vocabulary():
    message = r"^base_weight has 31 rows, expected the vocabulary of weight \(30 rows\)"
    _refused("linear_delta_logp", ValueError, message, base_weight=torch.zeros(31, 12), base_bias=torch.zeros(31))


@pytest.mark.parametrize("op", OPS)
def test_devices_must_agree(op):
    _, *others = make_inputs(op, (2, 3), v=30, d=4).items()
    for name, x in others:
        message = rf"^{name} is on meta, expected cpu, the device of"
        if name == "base_hidden":  # compared first with its own head
            message = "^base_weight is on cpu, expected meta, the device of base_hidden"
        _refused(op, ValueError, message, **{name: x.to("meta")})


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_shapes(op):
    inputs = {name: x.to("meta") for name, x in make_inputs(op, (2, 3), k=4).items()}
    stats = call(op, inputs)
    assert stats.logp.is_meta and stats.logp.shape == (2, 3, 4) and stats.lse.shape == (2, 3)


OPTIONS = ["temperature", "logit_scale", "softcap"]


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.5, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("op", OPS)
def test_options_must_be_positive_and_finite(op, name, value):
    _refused(op, ValueError, rf"^{name} is {value}, expected a finite number > 0", **{name: value})
    if op in PAIR_OPS and name != "temperature":
        _refused(op, ValueError, rf"^base_{name} is {value}, expected a finite", **{f"base_{name}": value})


@pytest.mark.parametrize("value", [True, "1", [1.0], 1j, torch.tensor(1.0)], ids=repr)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("op", OPS)
def test_options_must_be_python_numbers(op, name, value):
    _refused(op, TypeError, rf"^{name} is .*, expected a Python number", **{name: value})


@pytest.mark.parametrize("name", ["temperature", "logit_scale"])
@pytest.mark.parametrize("op", OPS)
def test_none_is_only_a_softcap(op, name):
    _refused(op, TypeError, rf"^{name} is None, expected a Python number", **{name: None})


@pytest.mark.parametrize("value", [None, 1.0, True, "-100", torch.tensor(-100)], ids=repr)
@pytest.mark.parametrize("op", OPS)
def test_ignore_index_must_be_an_integer(op, value):
    _refused(op, TypeError, r"^ignore_index is .*, expected an integer", ignore_index=value)


@pytest.mark.parametrize("value", [None, 0, 1, "yes", torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("op", OPS)
def test_top_must_be_true_or_false(op, value):
    _refused(op, TypeError, r"^top is .*, expected True or False", top=value)


def test_the_most_likely_token_of_more_tokens_than_float32_tells_apart():
    """The last of those that it does is told; of one more, nothing, before anything is read."""
    logits = torch.zeros(1, 2**24 + 1)
    logits[0, -2:] = 1.0
    target = torch.tensor([0])
    assert dlogp_kernels.logp(logits[:, :-1], target, top=True).top_token.item() == 2**24 - 1
    with pytest.raises(ValueError, match="top is True for a vocabulary of 16777217, expected at most 16777216 tokens"):
        dlogp_kernels.logp(logits, target, top=True)
    assert dlogp_kernels.logp(logits, target).top_token is None


@pytest.mark.parametrize("op", OPS)
def test_misspelt_options_are_refused(op):
    _refused(op, TypeError, "unexpected keyword argument 'temprature'", temprature=1.0)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        dlogp_kernels.logp(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("op", OPS)
def test_numbers_of_other_kinds_are_accepted(op):
    inputs = make_inputs(op, 3)
    expected = call(op, inputs, temperature=2.0)
    for value in (2, np.float64(2.0)):
        for x, other in zip(call(op, inputs, temperature=value), expected, strict=True):
            assert torch.equal(x, other)


#: At the edge of float32: what it has no inverse of, and what overflows it.
_TINY, _HUGE = (1e-46, 1e-40, 2e-39), (1e38, 1e39, 1e300, 10**400)


@pytest.mark.parametrize("value", [*_TINY, *_HUGE], ids=lambda value: f"{float(min(value, 1e308)):g}")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("op", OPS)
def test_options_must_be_numbers_that_float32_computes_with(op, name, value):
    _refused(op, ValueError, rf"^{name} is .*, expected a number (in \[1e-30, 1e\+30\]|that a float)", **{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"logit_scale": 1e20, "temperature": 1e-20},
        {"softcap": 1e20, "temperature": 1e-20},
        {"softcap": 1e-25, "logit_scale": 1e25},
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_quotients_of_options_must_be_numbers_that_float32_computes_with(op, options):
    _refused(op, ValueError, r"^\w+ / \w+ is \S+ / \S+, expected at most 1e\+30", **options)


@pytest.mark.parametrize("options", [{"temperature": 1e-30}, {"temperature": 1e30}, {"softcap": 1e-30}], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_last_options_that_are_allowed_give_numbers(op, options):
    assert all(x.isfinite().all() for x in call(op, make_inputs(op, 5), **options))


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("op", OPS)
def test_ignore_index_must_have_64_bits(op, value):
    _refused(op, ValueError, rf"^ignore_index is {value}, expected an integer of 64 bits", ignore_index=value)


def _sample(**options):
    z = 5 * torch.randn(3, 50)
    return dlogp_kernels.extrapolated_sample(z, z + 1, **({"seed": 1} | options)), z


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1e-40}, r"temperature is 1e-40, expected a number in \[1e-30, 1e\+30\]"),
        ({"temperature": 1e39}, r"temperature is 1e\+39, expected a number in \[1e-30"),
        ({"gamma": 1e39}, r"gamma is 1e\+39, expected a size of at most 1e\+30"),
        ({"gamma": 1e20, "temperature": 1e-20}, r"gamma / temperature is 1e\+20 / 1e-20, expected at most 1e\+30"),
        ({"criterion": "random", "threshold": 2}, r"threshold is 2, expected a number in \[0, 1\]"),
        ({"criterion": "kl", "threshold": 10**400}, r"threshold is an integer of 1329 bits, expected a number that a"),
        ({"row_id": torch.tensor([0, 2**32, 1])}, r"row_id has 4294967296, expected integers in \[0, 2\*\*32\)"),
        (
            {"row_id": torch.tensor([0, -1, 1], dtype=torch.int32)},
            r"row_id has -1, expected integers in \[0, 2\*\*32\)",
        ),
        ({"step": torch.tensor([2**32])}, r"step has 4294967296, expected integers in \[0, 2\*\*32\)"),
        ({"step": torch.tensor([0, 1, -(2**40)])}, r"step has -1099511627776, expected integers in"),
        ({"step": 2**32}, r"step is 4294967296, expected an integer in \[0, 2\*\*32\)"),
        ({"seed": 2**64}, r"seed is 18446744073709551616, expected an integer in \[0, 2\*\*64\)"),
    ],
    ids=str,
)
def test_options_of_draws_that_their_numbers_can_not_hold(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        _sample(**options)


def test_the_lowest_temperature_that_is_allowed_draws_the_largest_logit():
    drawn, z = _sample(temperature=1e-30)
    assert torch.equal(drawn.token, z.argmax(-1))


def _tangents():
    for op in OPS:
        for name in make_inputs(op, 3):
            if name != "target":
                yield op, name
    yield from (("policy_loss", name) for name in ("logp", "old_logp", "entropy", "ref_logp", "token_weight"))
    yield from (("linear_policy_loss", name) for name in ("hidden", "weight", "bias", "old_logp"))
    yield from (("extrapolated_sample", name) for name in ("logits", "base_logits"))


def _function_of(op: str, name: str):
    """Of one tensor, and that tensor."""
    if op == "policy_loss":
        inputs = policy_cases.make_inputs(2, 5)
    elif op == "linear_policy_loss":
        inputs = linear_policy_cases.make_inputs(2, 5, v=30, d=4)
    elif op == "extrapolated_sample":
        inputs = {"logits": torch.randn(3, 30), "base_logits": torch.randn(3, 30), "seed": 1}
    else:
        inputs = make_inputs(op, (2, 3), v=30, d=4)

    def function(x):
        return getattr(dlogp_kernels, op)(**(inputs | {name: x}))[0].sum()

    return function, inputs[name]


@pytest.mark.parametrize(("op", "name"), list(_tangents()))
def test_tangents_of_forward_mode_are_refused_and_not_dropped(op, name):
    function, x = _function_of(op, name)
    tangents = {
        "jvp": lambda: torch.func.jvp(function, (x,), (torch.ones_like(x),)),
        "jacfwd": lambda: torch.func.jacfwd(function)(x),
        "jvp of grad": lambda: torch.func.jvp(torch.func.grad(function), (x,), (torch.ones_like(x),)),
    }
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=f"^{name} has a tangent, expected none"):
            function(dual)
        function(x)  # without one
    for transform in tangents.values():
        with pytest.raises(NotImplementedError, match=f"^{name} has a tangent, expected none"):
            transform()


@pytest.mark.parametrize("op", OPS)
def test_a_tangent_of_the_gradient_is_refused_and_not_dropped(op):
    inputs = make_inputs(op, 3)
    for name, x in inputs.items():
        if name != "target":
            x.requires_grad_()
    logp = call(op, inputs)[0]
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(torch.ones_like(logp), torch.ones_like(logp))
        with pytest.raises(NotImplementedError, match="a gradient has a tangent"):
            logp.backward(grad)
