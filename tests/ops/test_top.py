"""The most likely token of each model and its log p, where they are asked for: of ties the first."""

import itertools

import cases
import pytest
import torch
from cases import (
    ALL_OPTIONS,
    LINEAR_OPS,
    OPS,
    PAIR_OPS,
    call,
    check_against_truth,
    fewer,
    floating,
    from_logits,
    gradients,
    is_linear,
    is_pair,
    make_inputs,
    on_device,
    options_for,
    truth,
    upstream_of,
)
from same_bits import assert_same_gradients, assert_same_statistics
from tolerances import CERTAINTY_ERROR
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.inputs import Asked, flat_transform
from dlogp_kernels.ops import schemas

pytestmark = pytest.mark.usefixtures("backend")

BF16, FP16, FP32, FP64 = cases.DTYPES
#: Of Triton's forward of given logits, under the interpreter too, the columns of a program.
SPLIT = 16_384


def fields_of(op: str) -> list[str]:
    return [f"{prefix}top_{name}" for prefix in ("", "base_")[: 1 + is_pair(op)] for name in ("token", "logp")]


def of_logits(op: str, z: Tensor, base_z: Tensor | None = None, dtype: torch.dtype = FP32) -> cases.Inputs:
    """Arguments that produce these logits (N, V), of the base model in another order of rows; with a target."""
    target = torch.arange(z.shape[0]) % z.shape[1]
    return from_logits(op, z, z.flip(0) if base_z is None else base_z, target, dtype)


def assert_first_largest(op: str, stats, z: Tensor, base_z: Tensor | None = None) -> None:
    """The token, exactly, and its log p: −log of what all of e^(z − largest) add up to."""
    for prefix, logits in (("", z), ("base_", z.flip(0) if base_z is None else base_z))[: 1 + is_pair(op)]:
        largest, token = logits.double().amax(-1, keepdim=True), logits.double().argmax(-1)
        assert torch.equal(getattr(stats, f"{prefix}top_token"), token)
        expected = -(logits - largest).scatter(-1, token[:, None], -torch.inf).exp().sum(-1).log1p()
        logp = getattr(stats, f"{prefix}top_logp").double()
        assert ((logp - expected).abs() <= CERTAINTY_ERROR[FP32] * expected.abs()).all()


@pytest.mark.parametrize(
    "options", fewer([{}, ALL_OPTIONS], [ALL_OPTIONS]), ids=lambda x: "all options" if x else "defaults"
)
@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=pytest.mark.gemm_interpreted), FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_against_float64(accuracy, op, dtype, options):
    """With candidates and a softcap, the gradients of the others as without."""
    inputs = make_inputs(op, (3, fewer(11, 3)), v=fewer(1187, 267), d=40, k=2, dtype=dtype)
    stats = check_against_truth(accuracy, op, inputs, top=True, **options_for(op, options))
    assert [name for name in stats._fields if "top" in name] == fields_of(op)
    for name in fields_of(op):
        value = getattr(stats, name)
        assert value.shape == (3, fewer(11, 3))
        assert value.dtype == (torch.int64 if name.endswith("token") else stats.logp.dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_of_ties_the_first_in_any_vocabulary(op, dtype):
    """Of logits with three values nearly all rows have many largest ones."""
    for v in fewer([1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 63, 65, 257, 1025, 4097], [1, 2, 9, 65, 1025]):
        z = torch.randint(0, 3, (fewer(9, 4), v), generator=torch.Generator().manual_seed(v)).float()
        assert_first_largest(op, call(op, of_logits(op, z, dtype=dtype), top=True), z)


def places_of(op: str) -> tuple[int, list[int]]:
    """V, and tokens at the ends and at both sides of bounds of tiles and splits of the backends."""
    if is_linear(op):
        return fewer((5_003, [0, 1, 127, 128, 255, 256, 4_095, 4_096, 5_002]), (301, [0, 1, 63, 64, 127, 128, 300]))
    v = SPLIT + fewer(2_003, 403)
    return v, [0, 1, 8, 4_095, 4_096, SPLIT - 1, SPLIT, v - 1]


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("op", OPS)
def test_of_ties_the_first_over_tiles_and_splits(op):
    v, places = places_of(op)
    pairs = list(itertools.combinations(places, 2))
    z = torch.full((len(pairs) + 3, v), -5.0)
    z[:, places] = -2.0  # what was largest before
    for row, pair in enumerate(pairs):
        z[row, list(pair)] = 3.0
    z[-1] = 1.0
    z[-2, places[2:]] = 4.0
    assert_first_largest(op, call(op, of_logits(op, z), top=True), z)


@pytest.mark.parametrize("op", OPS)
def test_the_only_largest_wherever_it_lies(op):
    v, places = places_of(op)
    z = -torch.rand(len(places), v, generator=torch.Generator().manual_seed(0)).mul(8).round()
    z[torch.arange(len(places)), places] = 1.0
    assert_first_largest(op, call(op, of_logits(op, z), top=True), z)


@pytest.mark.parametrize("op", OPS)
def test_a_saturated_softcap_makes_ties(op):
    """What lies far beyond the cap has the same logit, in float64 too: the first such token is the one."""
    z = torch.randint(-9, 0, (4, 203), generator=torch.Generator().manual_seed(0)).float()
    for row, tokens in enumerate(([5, 70, 200], [64, 65], [202], [130, 10])):
        z[row, tokens] = torch.tensor([60.0, 90.0, 120.0])[: len(tokens)]
    options = options_for(op, {"softcap": 1.0, "base_softcap": 1.0})
    stats = call(op, of_logits(op, z), top=True, **options)
    assert stats.top_token.tolist() == [5, 64, 202, 10]
    if is_pair(op):
        assert stats.base_top_token.tolist() == [10, 202, 64, 5]


@pytest.mark.parametrize("op", OPS)
def test_no_temperature_or_scale_changes_the_token(op):
    z = torch.randint(-20, 20, (fewer(12, 4), 301), generator=torch.Generator().manual_seed(0)).float()
    for options in ({"temperature": 0.125}, {"temperature": 8.0}, {"logit_scale": 4.0, "base_logit_scale": 0.25}):
        stats = call(op, of_logits(op, z), top=True, **options_for(op, options))
        assert torch.equal(stats.top_token, z.argmax(-1))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_log_p_of_a_token_that_is_nearly_sure(op, dtype):
    z = torch.full((4, 301), -100.0)
    z[torch.arange(4), torch.tensor([0, 64, 150, 300])] = 0.0
    z[torch.arange(4), torch.tensor([300, 65, 1, 299])] = torch.tensor([-9.0, -20.0, -46.0, -60.0])
    stats = call(op, of_logits(op, z, dtype=dtype), top=True)
    expected = -torch.tensor([-9.0, -20.0, -46.0, -60.0]).double().exp().log1p()
    assert ((stats.top_logp.double() - expected).abs() <= CERTAINTY_ERROR[dtype] * expected.abs()).all()
    at_it = call(op, of_logits(op, z, dtype=dtype) | {"target": stats.top_token})
    assert ((at_it.logp - stats.top_logp).abs() <= CERTAINTY_ERROR[dtype] * expected.abs()).all()


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("op", OPS)
def test_ignored_rows_have_no_token(accuracy, op, k):
    """−1, with a log p of 0; of candidates a row is ignored where all of them are. What is there is not read."""
    inputs = make_inputs(op, 12, v=fewer(301, 150), k=k)
    target = inputs["target"]
    target[::3] = -7
    if k:
        target[1, :2] = -7
    ignored = torch.arange(12) % 3 == 0
    check_against_truth(accuracy, op, inputs, top=True, ignore_index=-7)
    for name in floating(inputs):
        if name.endswith(("hidden", "logits")):
            inputs[name][ignored] = torch.nan
    stats = call(op, inputs, top=True, ignore_index=-7)
    for name in fields_of(op):
        value = getattr(stats, name)
        assert (value[ignored] == (-1 if name.endswith("token") else 0)).all()
        assert (value[~ignored] >= 0 if name.endswith("token") else value[~ignored] < 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("op", ["logp", "delta_logp"])
def test_a_row_of_logits_without_numbers_has_no_token(op, poison):
    """Wherever among the others it stands, before or after what would be the largest."""
    v, places = places_of(op)
    clean = torch.randint(-9, 3, (len(places) + 1, v), generator=torch.Generator().manual_seed(0)).float()
    clean[:, [3, SPLIT + 5]] = 20.0
    z = clean.clone()
    z[torch.arange(len(places)), places] = poison
    _check_spoilt(op, of_logits(op, z, clean), of_logits(op, clean, clean), slice(None, -1), slice(-1, None))


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_a_row_of_hidden_states_without_numbers_has_no_token(op):
    clean = make_inputs(op, 6, v=fewer(301, 150))
    inputs = clean | {"hidden": clean["hidden"].clone()}
    inputs["hidden"][2, 3], inputs["hidden"][4] = torch.nan, torch.nan
    _check_spoilt(op, inputs, clean, torch.tensor([2, 4]), torch.tensor([0, 1, 3, 5]))


def _check_spoilt(op: str, inputs: cases.Inputs, clean: cases.Inputs, spoilt, others) -> None:
    """−1 and NaN of the model in the spoilt rows; the other rows, and a base model that has numbers, as they were."""
    stats, expected = call(op, inputs, top=True), call(op, clean, top=True)
    assert (stats.top_token[spoilt] == -1).all() and stats.top_logp[spoilt].isnan().all()
    assert stats.entropy[spoilt].isnan().all()
    for name in fields_of(op):
        assert torch.equal(getattr(stats, name)[others], getattr(expected, name)[others])
        if name.startswith("base_"):
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name))


@pytest.mark.parametrize("op", PAIR_OPS)
def test_a_base_model_without_numbers_has_no_token(op):
    inputs = make_inputs(op, 5)
    expected = call(op, inputs, top=True)
    name = "base_hidden" if is_linear(op) else "base_logits"
    inputs[name][2, 7] = torch.nan
    stats = call(op, inputs, top=True)
    assert stats.base_top_token[2] == -1 and stats.base_top_logp[2].isnan()
    assert torch.equal(stats.top_token, expected.top_token) and torch.equal(stats.top_logp, expected.top_logp)


@pytest.mark.parametrize("op", OPS)
def test_impossible_tokens_are_none_of_the_most_likely(op):
    """Of a masked vocabulary the first of the possible ones; of a vocabulary without any, none."""
    z = torch.full((3, 301), 2.0)
    z[:, :150] = -torch.inf
    z[:, 260:] = -torch.inf
    stats = call(op, of_logits(op, z), top=True)
    assert stats.top_token.tolist() == [150] * 3
    torch.testing.assert_close(stats.top_logp, torch.full((3,), 110.0).log().neg())
    z[:, 151:] = -torch.inf
    alone = call(op, of_logits(op, z), top=True)
    assert alone.top_token.tolist() == [150] * 3 and alone.top_logp.count_nonzero() == 0
    nothing = call(op, of_logits(op, torch.full((3, 301), -torch.inf)), top=True)
    assert nothing.top_token.tolist() == [-1] * 3 and nothing.top_logp.isnan().all()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("op", OPS)
def test_leading_shapes(op, k, shape):
    inputs = make_inputs(op, shape, v=101, k=k)
    stats, expected = call(op, inputs, top=True), truth(op, inputs, top=True)
    for name in fields_of(op):
        value = getattr(stats, name)
        assert value.shape == shape
        if name.endswith("token"):
            assert torch.equal(value, getattr(expected, name))
        else:
            torch.testing.assert_close(value.double(), getattr(expected, name), rtol=1e-5, atol=1e-6)


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize(
    ("dtype", "options"),
    fewer(list(itertools.product([BF16, FP32, FP64], [{}, ALL_OPTIONS])), [(BF16, ALL_OPTIONS), (FP32, {})]),
    ids=lambda x: str(x) if isinstance(x, torch.dtype) else "all options" if x else "defaults",
)
@pytest.mark.parametrize("op", OPS)
def test_the_statistics_and_gradients_are_those_without_it(accuracy, op, dtype, options):
    """Bit for bit, where no compiler makes another kernel for it: what is asked for besides changes nothing."""
    inputs = make_inputs(op, fewer(40, 6), v=fewer(3_001, 203), k=2, dtype=dtype)
    inputs["target"][1] = -100
    options = options_for(op, options)
    plain, stats = call(op, inputs, **options), call(op, inputs, top=True, **options)
    same = plain._replace(**{name: getattr(stats, name) for name in plain._fields})
    assert_same_statistics(accuracy, op, inputs, same, plain, **options)
    upstream = upstream_of(plain)
    expected = gradients(op, inputs, upstream, **options)
    actual = gradients(op, inputs, upstream_of(stats), top=True, **options)
    assert_same_gradients(accuracy, op, inputs, upstream, actual, expected, **options)


@pytest.mark.parametrize("op", OPS)
def test_there_is_none_where_it_is_not_asked_for(op):
    """Not in the result, and nothing of its size comes back from the op."""
    inputs = on_device(make_inputs(op))
    for options in ({}, {"top": False}):
        stats = getattr(dlogp_kernels, op)(**inputs, **options)
        assert [name for name, x in stats._asdict().items() if x is None] == fields_of(op)
    transform = flat_transform(1.0, None, 1.0)
    given = inputs | {"target": inputs["target"][:, None], "ignore_index": -100}
    given |= {"transform": transform, "base_transform": transform}
    forward = getattr(torch.ops.dlogp, f"{op}_fwd").default
    found = forward(*(given.get(x.name) for x in schemas.STATISTICS[op].inputs()), *Asked(top=False))
    assert forward._schema.returns[-1].name == "extra"
    assert tuple(found[-1].shape) == (2 * (1 + is_pair(op)), len(inputs["target"]))


@pytest.mark.parametrize("op", OPS)
def test_it_may_be_written_to_before_backward(op):
    inputs = on_device(make_inputs(op))
    leaves = [inputs[name].requires_grad_() for name in floating(inputs)]
    expected = torch.autograd.grad(getattr(dlogp_kernels, op)(**inputs).logp.sum(), leaves, allow_unused=True)
    stats = getattr(dlogp_kernels, op)(**inputs, top=True)
    for name in fields_of(op):
        getattr(stats, name).zero_()
    found = torch.autograd.grad(stats.logp.sum(), leaves, allow_unused=True)
    assert all(x is y or torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_it_has_no_gradient(op):
    inputs = make_inputs(op)
    for name in floating(inputs):
        inputs[name].requires_grad_()
    stats = getattr(dlogp_kernels, op)(**on_device(inputs), top=True)
    for name, value in stats._asdict().items():
        assert value.requires_grad == (name not in fields_of(op)), name


@pytest.mark.parametrize("dtype", fewer([BF16, FP32], [BF16]), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_row_does_not_depend_on_the_batch_or_the_workspace(backend, op, dtype):
    n, v = fewer((300, 9_001), (40, 301))
    inputs = make_inputs(op, n, v=v, d=40, dtype=dtype)
    found = call(op, inputs, top=True)
    with backends.workspace_limit(2**20):
        small = call(op, inputs, top=True)
    rows = torch.randperm(n)[: n // 3]
    some = call(
        op, {name: x if "weight" in name or "bias" in name else x[rows] for name, x in inputs.items()}, top=True
    )
    promised = backend != "reference" or not (is_linear(op) or cases.DEVICE.type == "cuda")
    for name in fields_of(op):
        for value, other in (
            (getattr(found, name), getattr(small, name)),
            (getattr(found, name)[rows], getattr(some, name)),
        ):
            if promised:
                assert torch.equal(value, other), name
            else:
                torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_autocast_asks_for_that_of_what_it_converts(op):
    inputs = make_inputs(op, v=fewer(1187, 301))
    with torch.autocast(cases.DEVICE.type, dtype=BF16):
        stats = call(op, inputs, top=True)
    narrow = {name: x if name == "target" else x.to(BF16) for name, x in inputs.items()}
    expected = call(op, narrow, top=True)
    for name in fields_of(op):
        assert torch.equal(getattr(stats, name), getattr(expected, name))


@pytest.mark.around_launchers
@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_and_not_again_for_other_numbers_of_tokens(op, counter):
    def run(inputs):
        stats = getattr(dlogp_kernels, op)(**inputs, top=True)
        return stats.logp.sum(), tuple(getattr(stats, name) for name in fields_of(op))

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for n in (5, 9, 17, 40, 3):
        inputs = on_device(make_inputs(op, n, v=31))
        leaves = [inputs[name].requires_grad_() for name in floating(inputs) if not name.startswith("base_")]
        (loss, found), (expected_loss, expected) = compiled(inputs), run(inputs)
        for value, other in zip(found, expected, strict=True):
            assert torch.equal(value, other) and not value.requires_grad
        for value, other in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected_loss, leaves), strict=True
        ):
            torch.testing.assert_close(value, other)
        assert counter.frame_count <= 2, f"compiled again for N = {n}"
