"""log p near 0, and gradients under a common offset: what a sum that begins with 1, or a rounded lse, would lose.

All logits are multiples of a half, which bfloat16 and products of tensor cores hold exactly. Truth is float64.
"""

import itertools

import cases
import linear_policy_cases
import pytest
import torch
from cases import OPS, PAIR_OPS, call, check_gradients, fewer, floating, from_logits, gradients, is_pair, upstream_of
from tolerances import CERTAINTY_ERROR, NEAR_CERTAINTY_GRADIENT_ERROR
from torch import Tensor

from dlogp_kernels import backends
from dlogp_kernels.inputs import Asked, flat_transform
from dlogp_kernels.ops import schemas

pytestmark = pytest.mark.usefixtures("backend")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
#: Nats between the likeliest token and the next. In float32 1 + e^-17 is 1, in float64 1 + e^-37.
#: As many as let rows of the weights begin on 16 bytes.
MARGINS = (5.0, 10.0, 13.0, 16.0, 17.0, 20.0, 25.0, 30.0, 36.0, 37.0, 42.0, 46.0, 55.0, 60.0, 70.0, 80.0)
V = 301
#: Of Triton's forward of given logits, under the interpreter too, the columns of a program.
SPLIT = 16_384


def log_p(z: Tensor) -> Tensor:
    """(N, V) float64 of logits: the largest one's log p is −log1p of the sum of the others."""
    z = z.double()
    token = z.argmax(-1, keepdim=True)
    d = z - z.gather(-1, token)
    return d - d.scatter(-1, token, -torch.inf).exp().sum(-1, keepdim=True).log1p()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within CERTAINTY_ERROR of the value, however small that is."""
    error = ((actual.double() - expected).abs() / expected.abs()).nan_to_num(nan=torch.inf).max().item()
    assert error <= CERTAINTY_ERROR[actual.dtype], f"off by {error:.2g} of the value"


def sure_logits(margins: tuple[float, ...], place: int, v: int = V, largest: float = 3.0, seed: int = 0) -> Tensor:
    """A row a margin: `largest` at `place`, the others at random between the margin and 6 nats more below it.

    Further below, at 87.4 nats, float32 has no normal numbers for their probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    below = torch.randint(0, 13, (len(margins), v), generator=generator) / 2.0
    z = largest - torch.tensor(margins)[:, None] - below
    z[:, place] = largest
    z[:, (place + 1) % v] = largest - torch.tensor(margins)
    return z


def pair_inputs(op: str, z: Tensor, target: Tensor, dtype: torch.dtype, base_z: Tensor | None = None) -> cases.Inputs:
    return from_logits(op, z, z.flip(0) if base_z is None else base_z, target, dtype)


def of_models(op: str, z: Tensor, base_z: Tensor) -> list[tuple[str, Tensor]]:
    return [("", z), ("base_", base_z)][: 1 + is_pair(op)]


@pytest.mark.also_by("cuda")
@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_log_p_of_a_token_that_is_nearly_sure(op, dtype):
    """With each of three candidates the sure one in turn; the others are less likely than anything."""
    place = V // 2
    z = sure_logits(MARGINS, place)
    expected = log_p(z)
    assert expected[-1, place] > -1e-30 and expected[0, place] < -1e-2
    others = [place + 1, 3]
    for k in range(3):
        candidates = [*others[:k], place, *others[k:]]
        target = torch.tensor(candidates).expand(len(MARGINS), -1)
        stats = call(op, pair_inputs(op, z, target, dtype))
        assert_near(stats.logp, expected.gather(1, target))
        if is_pair(op):
            assert_near(stats.base_logp, expected.flip(0).gather(1, target))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_one_other_token_is_the_smallest_that_is_promised(op, dtype):
    """log p = −1e-20, and what a temperature makes of twice the margin."""
    z = torch.full((2, V), -120.0)
    z[0, 7], z[0, 200] = 0.0, -46.0
    z[1, 200], z[1, 7] = 0.0, -46.0
    target = torch.tensor([7, 200])
    expected = log_p(z).gather(1, target[:, None])[:, 0]
    assert (expected + 1e-20).abs().max() < 1e-21
    assert_near(call(op, pair_inputs(op, z, target, dtype)).logp, expected)
    assert_near(call(op, pair_inputs(op, 2.0 * z, target, dtype), temperature=2.0).logp, expected)


def _places(op: str) -> tuple[int, list[int]]:
    """V, and tokens at the ends, in the middle and at both sides of bounds of tiles and splits of the backends.

    Of given logits the last split is a block of Triton's columns and a part of one, in which a thread loads both of the
    last tokens at once.
    """
    if op in cases.LINEAR_OPS:
        return fewer((5_003, [0, 127, 128, 255, 256, 2_500, 4_095, 4_096, 5_002]), (301, [0, 63, 64, 127, 128, 300]))
    v = SPLIT + fewer(2_003, 1_427)
    return v, [0, 7, 4_095, 4_096, SPLIT - 1, SPLIT, v - 2, v - 1]


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("op", OPS)
def test_where_the_two_likeliest_tokens_lie(op):
    """In one tile, in two tiles and in two splits, either one first: their sum is merged on the way."""
    v, places = _places(op)
    pairs = [(sure, second) for sure in places for second in places if sure != second]
    z = torch.full((len(pairs), v), -70.0)
    z[:, 1] = -40.0
    rows = torch.arange(len(pairs))
    target = torch.tensor(pairs)
    z[rows, target[:, 1]], z[rows, target[:, 0]] = -20.0, 0.0
    stats, expected = call(op, pair_inputs(op, z, target, FP32)), log_p(z).gather(1, target)
    assert expected[:, 0].max() < -1e-9
    assert_near(stats.logp, expected)


@pytest.mark.parametrize("step", [18.5, 1.5])
@pytest.mark.parametrize("op", OPS)
def test_maxima_that_rise_from_tile_to_tile(op, step):
    """Each likelier token makes the one before it one of the others; falling, it stays the one."""
    v, places = _places(op)
    levels = torch.arange(len(places)) * step - step * (len(places) - 1)
    z = torch.full((2, v), -150.0)
    z[0, places], z[1, places] = levels, levels.flip(0)
    target = torch.tensor([places[::-1], places])
    stats, expected = call(op, pair_inputs(op, z, target, FP32)), log_p(z).gather(1, target)
    assert_near(stats.logp, expected)


@pytest.mark.parametrize("count", [2, 3, "all"])
@pytest.mark.parametrize("op", OPS)
def test_tokens_that_are_equally_likely(accuracy, op, count):
    """In one tile, over tiles, over splits: each is counted."""
    v, places = _places(op)
    tied = range(v) if count == "all" else None
    groups = [tied] if tied else [[p, q, *places[:1]][:count] for p, q in itertools.pairwise(places[1:])]
    z = torch.full((len(groups), v), -90.0)
    for row, group in enumerate(groups):
        z[row, list(group)] = 2.5
    target = torch.tensor([list(group)[:2] for group in groups])
    inputs = pair_inputs(op, z, target, FP32, base_z=z)
    stats = call(op, inputs)
    size = torch.tensor([float(len(set(group))) for group in groups]).double()
    assert_near(stats.logp, -size.log()[:, None].expand_as(stats.logp))
    accuracy.statistics(op, stats, cases.truth(op, inputs), torch.full((len(groups),), 12.0), FP32)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_between_certainty_and_a_tie(op, dtype):
    """Two tokens whose distance is 0 to 4 nats: the sum of the others goes from 1 to nearly 0."""
    distances = torch.cat([torch.arange(1, 9) / 64.0, torch.arange(1, 33) / 8.0])
    z = torch.full((len(distances), V), -90.0)
    z[:, 64], z[:, 128] = 0.0, -distances
    target = torch.tensor([64, 128]).expand(len(distances), -1)
    assert_near(call(op, pair_inputs(op, z, target, dtype)).logp, log_p(z).gather(1, target))


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("v", [1, 2, 3, 9, 131])
@pytest.mark.parametrize("op", OPS)
def test_nothing_beyond_the_vocabulary_counts_under_a_softcap(accuracy, op, v):
    """It makes every token possible, and no column that is none: the largest logit stands beside the first of these."""
    z = torch.full((3, v), -3.0)
    z[:, -1] = 3.0
    options = cases.options_for(op, {"softcap": 4.0, "base_softcap": 6.0})
    inputs = pair_inputs(op, z, torch.tensor([v - 1, 0, v // 2]), FP32)
    cases.check_statistics(accuracy, op, inputs, call(op, inputs, **options), **options)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("op", PAIR_OPS)
def test_delta_of_two_models_that_are_nearly_sure(accuracy, op, dtype):
    """Of the same token and of another one; entropies and divergences are what they always were."""
    z, base_z = sure_logits(MARGINS, 8), sure_logits(MARGINS[::-1], 8, seed=1)
    base_z[::3] = sure_logits(MARGINS[::-1], 250, seed=1)[::3]
    target = torch.tensor([8, 250]).expand(len(MARGINS), -1)
    inputs = pair_inputs(op, z, target, dtype, base_z)
    stats, (model, base) = call(op, inputs), (log_p(x).gather(1, target) for x in (z, base_z))
    error = (stats.delta_logp.double() - (model - base)).abs() / (model.abs() + base.abs())
    assert error.max().item() <= CERTAINTY_ERROR[dtype]
    cases.check_statistics(accuracy, op, inputs, stats)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradients_near_certainty(accuracy, op, dtype):
    """All outputs within the tolerance of all gradients; that of log p by an unlikely token's logit is its −p."""
    margins = fewer(MARGINS, MARGINS[1::3])
    z = sure_logits(margins, 130)
    inputs = pair_inputs(op, z, torch.full((len(margins),), 130), dtype)
    cases.check_gradients_against_truth(accuracy, op, inputs, upstream_of(call(op, inputs)))
    if op not in cases.LINEAR_OPS:
        upstream = [torch.ones_like(x) if name == "logp" else None for name, x in call(op, inputs)._asdict().items()]
        others = torch.arange(V) != 130
        actual, expected = gradients(op, inputs, upstream)["logits"][:, others], -log_p(z)[:, others].exp()
        error = ((actual.double() - expected).abs() / expected.abs()).max().item()
        assert error <= NEAR_CERTAINTY_GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"logit_scale": 1.3}], ids=str)
@pytest.mark.parametrize("op", fewer(OPS, ["logp"]))
def test_the_gradient_of_an_entropy_near_0_whatever_divides_the_logits(op, options):
    """By the logit of the sure token, relative to itself: −p (log p + H), where both are nearly 0."""
    margins = [5.0, 8.0, 11.0, 14.0]
    z = sure_logits(margins, 130, largest=3.37)
    inputs = pair_inputs(op, z, torch.full((len(margins),), 130), FP32)
    if op in cases.LINEAR_OPS:
        name, at = "weight", (130, slice(None))
    else:
        name, at = "logits", (slice(None), 130)
    asked = [torch.ones_like(x) if name == "entropy" else None for name, x in call(op, inputs)._asdict().items()]
    exact = [None if x is None else x.double() for x in asked]
    actual = gradients(op, inputs, asked, **options)[name][at].double()
    expected = cases.true_gradients(op, inputs, exact, **options)[name][at]
    assert ((actual - expected).abs() / expected.abs()).max() <= 2e-5


def offset_inputs(op: str, offset: float) -> cases.Inputs:
    """Logits that are integers, all with `offset` added; a linear layer has it as its bias."""
    generator = torch.Generator().manual_seed(0)
    n, v = 6, 203
    z, base_z = torch.randint(-12, 13, (2, n, v), generator=generator).float()
    inputs = from_logits(op, z, base_z, torch.randint(v, (n, 2), generator=generator))
    for name in floating(inputs):
        if "bias" in name or "logits" in name:
            inputs[name] = inputs[name] + offset
    return inputs


#: What follows from z as it is, and not from differences.
_LSE = ("lse", "base_lse")


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize(
    ("offset", "temperature"),
    fewer(list(itertools.product([1e5, -1e5, 1e7], [1.0, 0.5])), [(1e5, 0.5), (-1e5, 1.0), (1e7, 0.5)]),
)
@pytest.mark.parametrize("op", OPS)
def test_a_common_offset_costs_nothing(accuracy, op, offset, temperature):
    """All outputs but lse, and the gradients of all: as near to float64 as without, of numbers that float32 holds."""
    _check_offset(accuracy, op, offset, temperature=temperature)


@pytest.mark.gemm_interpreted
@pytest.mark.served_by("triton", "gemm")
@pytest.mark.parametrize("temperature", fewer([0.7, 3.0], [0.7]))
@pytest.mark.parametrize("offset", [1e5, 1e7])
@pytest.mark.parametrize("op", OPS)
def test_a_common_offset_costs_nothing_at_a_temperature_that_rounds(accuracy, op, offset, temperature):
    """Triton's kernels hold what the temperature divides apart from it; the others round the quotient to float32."""
    _check_offset(accuracy, op, offset, temperature=temperature)


def _check_offset(accuracy, op: str, offset: float, **options: float) -> None:
    plain, moved = offset_inputs(op, 0.0), offset_inputs(op, offset)
    stats, expected = call(op, moved, **options), cases.truth(op, plain, **options)
    magnitude = cases.magnitude(op, plain, **options)
    kept = {name: value for name, value in expected._asdict().items() if name in _LSE}
    accuracy.statistics(op, stats._replace(**kept), expected, magnitude, FP32)
    upstream = upstream_of(expected)
    check_gradients(accuracy, op, plain, upstream, gradients(op, moved, upstream, **options), **options)


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("offset", [1e5, 1e7])
@pytest.mark.parametrize("base", [False, True])
def test_a_common_offset_costs_the_policy_loss_nothing(offset, base):
    generator = torch.Generator().manual_seed(0)
    inputs = linear_policy_cases.make_inputs(3, 7, v=131, d=5, base=base)
    for name in inputs:
        if name.endswith(("hidden", "weight")):
            inputs[name] = torch.randint(-2, 3, inputs[name].shape, generator=generator).float()
        elif name.endswith("bias"):
            inputs[name] = torch.zeros_like(inputs[name])
    options = {"entropy_coef": 0.2, "kl_beta": 0.3}
    expected = linear_policy_cases.call(inputs, **options)
    moved = inputs | {name: x + offset for name, x in inputs.items() if name.endswith("bias")}
    actual = linear_policy_cases.call(moved, **options)
    torch.testing.assert_close(actual.loss, expected.loss)
    for name, grad in actual.gradients.items():
        size = expected.gradients[name].abs().max().item()
        torch.testing.assert_close(grad, expected.gradients[name], rtol=1e-5, atol=1e-6 * size)


def outputs_of(op: str, inputs: cases.Inputs, temperature: float = 1.0) -> dict[str, Tensor]:
    """All that the op `<op>_fwd` returns, by name; `extra` is what backward has of forward."""
    given = cases.on_device(inputs) | {"ignore_index": -100}
    given |= {name: flat_transform(temperature, None, 1.0) for name in ("transform", "base_transform")}
    forward = getattr(torch.ops.dlogp, f"{op}_fwd").default
    asked = (False for _ in Asked._fields)
    found = forward(*(given.get(x.name) for x in schemas.STATISTICS[op].inputs()), *asked)
    names = [x.name for x in forward._schema.returns]
    return {name: value.cpu() for name, value in zip(names, found, strict=True)}


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("op", OPS)
def test_the_normalizer_is_the_largest_logit_and_the_sum_of_the_rest(op, temperature):
    """Of every backend the same, since backward may run with another one; 0 of an ignored row."""
    inputs = offset_inputs(op, 1e5)
    inputs["target"][2] = -100
    found = outputs_of(op, inputs, temperature)
    kept = torch.arange(6) != 2
    for model, prefix in enumerate(("", "base_")[: 1 + is_pair(op)]):
        largest, rest = found["extra"][2 * model : 2 * model + 2]
        assert largest[2] == 0 and rest[2] == 0
        name = f"{prefix}logits"
        z = inputs[name] if name in inputs else inputs[f"{prefix}weight"].t() + 1e5
        z = z[kept].double() / temperature
        torch.testing.assert_close(largest[kept].double(), z.amax(-1), rtol=2.0**-23, atol=0.0)
        if temperature == 1.0:
            assert torch.equal(largest[kept].double(), z.amax(-1))
            expected = (z - z.amax(-1, keepdim=True)).exp().sum(-1) - 1
            torch.testing.assert_close(rest[kept].double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(largest + rest.log1p(), found[f"{prefix}lse"], rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("op", OPS)
def test_backward_by_another_backend_than_forward(accuracy, backend, op, temperature):
    """What forward leaves means the same to every backward."""
    inputs = cases.make_inputs(op, 9, v=203, k=2)
    for first, second in ((backend, "reference"), ("reference", backend)):
        leaves = {name: inputs[name].detach().clone().requires_grad_() for name in floating(inputs)}
        with backends.use_backend(first):
            stats = call(op, inputs | leaves, temperature=temperature)
        upstream = upstream_of(stats)
        with backends.use_backend(second):
            found = torch.autograd.grad(stats, list(leaves.values()), upstream)
        values = dict(zip(leaves, found, strict=True))
        check_gradients(accuracy, op, inputs, upstream, values, temperature=temperature)
