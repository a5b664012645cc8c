"""Forward and backward of every op against float64 truth: dtypes, options, sizes, hard distributions."""

import pytest
import torch
from cases import (
    ALL_OPTIONS,
    DTYPES,
    LINEAR_OPS,
    OPS,
    PAIR_OPS,
    call,
    check_against_truth,
    check_gradients_against_truth,
    fewer,
    from_logits,
    gradients,
    is_linear,
    make_inputs,
    options_for,
    truth,
    upstream_of,
)
from tolerances import TENSOR_CORE_ERROR, TIMES_CUBLAS, ZERO_KL_ROUNDINGS, Accuracy

pytestmark = pytest.mark.usefixtures("backend")

BF16, FP16, FP32, FP64 = DTYPES
OPTIONS = {
    "defaults": {},
    "cold": {"temperature": 0.25},
    "hot": {"temperature": 3.0},
    "softcap": {"softcap": 3.0, "base_softcap": 5.0},
    "scaled": {"logit_scale": 0.125, "base_logit_scale": 2.5},
    "all": ALL_OPTIONS,
}


@pytest.mark.also_by("cuda")
@pytest.mark.parametrize("options", fewer(OPTIONS, ["all"]))
@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=pytest.mark.gemm_interpreted), FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtypes_and_options(accuracy, op, dtype, options):
    inputs = make_inputs(op, 33, v=fewer(1187, 267), d=40, dtype=dtype)
    check_against_truth(accuracy, op, inputs, **options_for(op, OPTIONS[options]))


@pytest.mark.also_by("cuda")
@pytest.mark.parametrize("dtype", fewer(DTYPES, [BF16]), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_vocabulary_of_several_tiles_and_a_remainder(accuracy, op, dtype):
    """Of given logits, whose columns go to several programs of Triton's from 16 385 on, under the interpreter too."""
    v = fewer(20_011, 4_501 if is_linear(op) else 19_011)
    check_against_truth(accuracy, op, make_inputs(op, fewer(19, 3), v=v, d=72, dtype=dtype))


SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 255, 257, 511, 512, 513, 1025, 4095, 4096, 4097, 8193]


@pytest.mark.also_by("cuda")
@pytest.mark.parametrize("v", fewer(SIZES, [1, 64, 257, 1025]))
@pytest.mark.parametrize("op", OPS)
def test_vocabulary_sizes_around_tile_bounds(accuracy, op, v):
    check_against_truth(accuracy, op, make_inputs(op, 5, v=v, d=8, dtype=BF16))


@pytest.mark.parametrize("dtype", fewer([BF16, FP32], [BF16]), ids=str)
@pytest.mark.parametrize("d", fewer([1, 2, 3, 31, 33, 129, 896], [1, 33, 136]))
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_hidden_sizes(accuracy, op, d, dtype):
    check_against_truth(accuracy, op, make_inputs(op, 6, v=333, d=d, dtype=dtype))


@pytest.mark.also_by("cuda")
@pytest.mark.gemm_interpreted
@pytest.mark.parametrize("k", fewer([1, 2, 7], [7]))
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_candidates_some_ignored(accuracy, op, dtype, k):
    inputs = make_inputs(op, (3, fewer(8, 3)), v=301, k=k, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    inputs["target"][torch.rand(inputs["target"].shape, generator=generator) < 0.4] = -100
    inputs["target"][0, 0] = -100
    if k > 1:
        inputs["target"][1, 1] = torch.tensor([5, 5, *[-100] * (k - 2)])  # a token twice
    check_against_truth(accuracy, op, inputs, **options_for(op, ALL_OPTIONS))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_bias_is_optional(accuracy, op, bias):
    check_against_truth(accuracy, op, make_inputs(op, bias=bias))


def test_bias_of_one_model_of_a_pair(accuracy):
    inputs = make_inputs("linear_delta_logp")
    for name in ("bias", "base_bias"):
        check_against_truth(accuracy, "linear_delta_logp", {x: inputs[x] for x in inputs if x != name})


MIXTURES = {
    "fp32 head, bf16 body": ({"hidden": BF16, "base_hidden": BF16}, FP32),
    "fp32 head, fp16 body": ({"hidden": FP16, "base_hidden": FP16}, FP32),
    "bf16 head, fp32 body": ({"weight": BF16, "base_weight": BF16}, FP32),
    "bf16 with fp32 bias": ({x: BF16 for x in ("hidden", "weight", "base_hidden", "base_weight")}, FP32),
    "fp32 with bf16 bias": ({"bias": BF16, "base_bias": FP16}, FP32),
    "bf16 with fp16 weight": ({"hidden": BF16, "weight": FP16, "base_hidden": FP16, "base_weight": BF16}, FP32),
    "bf16 model, fp32 base": ({"hidden": BF16, "weight": BF16, "bias": BF16}, FP32),
    "fp32 model, bf16 base": ({"base_hidden": BF16, "base_weight": BF16, "base_bias": BF16}, FP32),
    "fp64 weight alone": ({"weight": FP64}, FP64),
    "fp64 base hidden alone": ({"base_hidden": FP64}, FP64),
}


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize(("dtypes", "output"), MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_mixed_dtypes_of_linear_inputs(accuracy, op, dtypes, output):
    if op == "linear_logp" and all(name.startswith("base_") for name in dtypes):
        output = FP32
    stats = check_against_truth(accuracy, op, make_inputs(op, fewer(17, 5), v=fewer(1187, 143), dtype=dtypes))
    assert {x.dtype for x in stats} == {output}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("name", ["logits", "base_logits"])
def test_mixed_dtypes_of_logits(accuracy, name, dtype):
    stats = check_against_truth(accuracy, "delta_logp", make_inputs("delta_logp", v=1187, dtype={name: dtype}))
    assert {x.dtype for x in stats} == {FP64 if dtype == FP64 else FP32}


@pytest.mark.not_interpreted("the backend does not see it")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("v", [101, 300, 40_000, 80_000])
@pytest.mark.parametrize("op", OPS)
def test_narrow_target_dtypes_mean_the_same_tokens(op, v, dtype):
    inputs = make_inputs(op, 3, v=v, d=4)
    inputs["target"] = torch.tensor([1, 2, 100])
    expected = call(op, inputs)
    inputs["target"] = inputs["target"].to(dtype)
    for value, other in zip(call(op, inputs), expected, strict=True):
        assert torch.equal(value, other)


def test_uint8_target_is_not_taken_for_the_ignore_index():
    inputs = make_inputs("logp", 1, v=300)
    inputs["target"] = torch.tensor([156], dtype=torch.uint8)  # −100 modulo 256
    assert call("logp", inputs).logp.item() < 0


def _hard_logits(name: str) -> torch.Tensor:
    n, v = fewer((8, 9_001), (4, 701))
    half = v * 5 // 9
    z = torch.randn(n, v, generator=torch.Generator().manual_seed(len(name)))
    match name:
        case "peak of 60":
            z[torch.arange(n), torch.arange(n) * (v // 9)] += 60
        case "all below -300":
            z -= 300
        case "first half masked":
            z[:, :half] = -torch.inf
        case "last half masked":
            z[:, -half:] = -torch.inf
        case "every other token masked":
            z[:, ::2] = -torch.inf
        case "all but one token masked":
            z[:, torch.arange(v) != v - v // 9] = -torch.inf
        case "offset +1e4":
            z += 1e4
        case "offset -1e4":
            z -= 1e4
        case "rising":
            z += torch.linspace(-80, 80, v)
        case "falling":
            z += torch.linspace(80, -80, v)
        case "nearly uniform":
            z *= 0.01
    return z


HARD = [
    "peak of 60", "all below -300", "first half masked", "last half masked", "every other token masked",
    "all but one token masked", "offset +1e4", "offset -1e4", "rising", "falling", "nearly uniform",
]  # fmt: skip


@pytest.mark.parametrize("dtype", fewer([BF16, FP16, FP32], [FP32]), ids=str)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("op", OPS)
def test_hard_distributions(accuracy, op, name, dtype):
    logits = _hard_logits(name)
    base_logits = torch.where(logits == -torch.inf, logits, logits.flip(0) + 0.5 * torch.randn(logits.shape))
    target = (logits > -torch.inf).float().multinomial(1).squeeze(1)
    target[0] = logits[0].argmax()
    stats = check_against_truth(accuracy, op, from_logits(op, logits, base_logits, target, dtype))
    assert all(x.isfinite().all() for x in stats)
    if name == "all but one token masked":
        assert all(x.count_nonzero() == 0 for field, x in stats._asdict().items() if "lse" not in field)


@pytest.mark.parametrize("op", OPS)
def test_masked_target_has_logp_minus_infinity(op):
    logits = torch.randn(3, 50).index_fill_(1, torch.tensor([0, 7]), -torch.inf)
    stats = call(op, from_logits(op, logits, torch.randn(3, 50), torch.tensor([7, 8, 9])))
    assert stats.logp[0] == -torch.inf
    assert stats.logp[1:].isfinite().all() and stats.entropy.isfinite().all() and stats.lse.isfinite().all()


V = fewer(9_001, 401)


@pytest.mark.parametrize("op", PAIR_OPS)
class TestKullbackLeibler:
    def test_infinite_where_only_the_other_model_has_no_probability(self, accuracy, op):
        v = V if is_linear(op) else fewer(V, 1_301)  # a block of Triton's columns, and the masked one behind it
        logits, base_logits = torch.randn(2, 4, v)
        base_logits[:, v - 9] = -torch.inf
        stats = call(op, from_logits(op, logits, base_logits, torch.tensor([1, 2, 3, v - 9])))
        assert torch.equal(stats.kl, torch.full((4,), torch.inf))
        assert stats.reverse_kl.isfinite().all() and (stats.reverse_kl > 0).all()
        assert stats.delta_logp[:3].isfinite().all() and stats.delta_logp[3] == torch.inf

    def test_infinite_where_the_probability_underflows(self, op):
        logits, base_logits = torch.randn(2, 2, V)
        logits[:, V - 9] = -1_000.0  # p > 0, though exp(−1000) is 0 in float32 and float64
        base_logits[:, V - 9] = -torch.inf
        stats = call(op, from_logits(op, logits, base_logits, torch.tensor([1, 2])))
        assert torch.equal(stats.kl, torch.full((2,), torch.inf))

    def test_gradients_of_the_other_outputs_are_finite_where_it_is_infinite(self, accuracy, op):
        logits, base_logits = torch.randn(2, 4, V)
        base_logits[:, V - 9] = -torch.inf
        inputs = from_logits(op, logits, base_logits, torch.tensor([1, 2, 3, 4]))
        upstream = upstream_of(truth(op, inputs))
        upstream[5] = None
        without = check_gradients_against_truth(accuracy, op, inputs, upstream)
        upstream[5] = torch.zeros(4)
        for name, value in gradients(op, inputs, upstream).items():
            assert torch.equal(value, without[name])

    @pytest.mark.parametrize("masked", [[], [0], list(range(V // 2)), list(range(V // 2, V))], ids=len)
    def test_tokens_without_probability_contribute_nothing(self, accuracy, op, masked):
        logits, base_logits = torch.randn(2, 4, V)
        logits[:, masked] = -torch.inf
        inputs = from_logits(op, logits, base_logits, torch.full((4,), V // 2 if 0 in masked else 1))
        stats, expected = call(op, inputs), truth(op, inputs)
        assert stats.kl.isfinite().all()
        assert torch.equal(stats.reverse_kl.isinf(), torch.full((4,), bool(masked)))
        accuracy.statistics(op, stats, expected, torch.full((4,), 8.0), FP32)

    def test_not_negative(self, op):
        for seed in fewer(range(20), (1, 3, 5, 7)):
            inputs = make_inputs(op, fewer(64, 16), v=257, d=8, seed=seed, bias=False)
            for name in [name for name in inputs if name.startswith("base_")]:
                own = inputs[name.removeprefix("base_")]
                inputs[name] = own + 10.0 ** -(seed % 8) * torch.randn(own.shape)
            stats = call(op, inputs)
            assert (stats.kl >= 0).all() and (stats.reverse_kl >= 0).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_identical_models(self, op, dtype):
        inputs = make_inputs(op, fewer(64, 8), v=V, d=32, dtype=dtype)
        inputs |= {name: inputs[name.removeprefix("base_")].clone() for name in inputs if name.startswith("base_")}
        stats = call(op, inputs)
        assert stats.delta_logp.count_nonzero() == 0
        for name in ("logp", "entropy", "lse"):
            assert torch.equal(getattr(stats, name), getattr(stats, f"base_{name}"))
        limit = ZERO_KL_ROUNDINGS * torch.finfo(stats.kl.dtype).eps * 10
        assert stats.kl.max() <= limit and stats.reverse_kl.max() <= limit


@pytest.mark.cpu_only
@pytest.mark.served_by("reference")
@pytest.mark.parametrize(("row", "wrong"), [(slice(None), "at 0.5"), (slice(8), "at 0.999"), (slice(1), "largest")])
def test_a_kernel_is_held_against_cublas_at_the_median_the_tail_and_the_largest(row, wrong):
    """What the tests of a GPU ask of tensor cores: the errors of 4096 rows, all of them, 8 or one of them larger."""
    reported: list[str] = []
    held = Accuracy(lambda op, quantity, dtype, error, limit: reported.append(quantity))
    of_cublas = torch.full((4096,), 1e-5)
    held.beside_cublas("logp", of_cublas * TIMES_CUBLAS * 0.99, of_cublas, BF16)
    assert reported == ["50 %", "99.9 %", "largest"]
    error = of_cublas.clone()
    error[row] = TENSOR_CORE_ERROR * 1.01 if wrong == "largest" else 1e-5 * TIMES_CUBLAS * 1.01
    with pytest.raises(AssertionError, match=wrong):
        held.beside_cublas("logp", error, of_cublas, BF16)
