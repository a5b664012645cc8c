"""`linear_extrapolated_sample`: every backend against the definition in float64, whatever batch, tiles and threads."""

import random
import threading
from typing import Any

import cases
import pytest
import torch
from cases import Inputs, fewer, from_logits, make_inputs, upcast, widest
from sampling import (
    BF16,
    FILTERS,
    FP16,
    FP32,
    FP64,
    THRESHOLDS,
    adversarial_pair,
    check_sample,
    criterion_options,
    criterion_value,
    definition,
    is_definition,
)
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import Sample, backends
from dlogp_kernels.inputs import flat_transform
from dlogp_kernels.reference import statistics as reference
from dlogp_kernels.reference.sampling import CRITERIA

pytestmark = pytest.mark.usefixtures("serves_sampling")

HEADS = {"softcap": 6.0, "base_softcap": 4.0, "logit_scale": 1.3, "base_logit_scale": 0.6}
#: Where Triton takes a logit for −inf.
_IMPOSSIBLE = -1e25


@pytest.fixture
def serves_sampling(backend: str) -> None:
    problem = backends.unavailable(backend, "linear_extrapolated_sample", cases.DEVICE)
    if problem is not None:
        pytest.skip(f"backend {backend}: {problem}")


def pair_inputs(shape: int | tuple[int, ...] = 9, **changes: Any) -> Inputs:
    """Hidden states, weights and biases of two models."""
    inputs = make_inputs("linear_delta_logp", shape, **changes)
    del inputs["target"]
    return inputs


def near_pair_inputs(rows: int, v: int = 301, d: int = 24, dtype: torch.dtype = FP32) -> Inputs:
    """Two models near one another, so that a criterion sometimes holds."""
    inputs = pair_inputs(rows, v=v, d=d, dtype=dtype, bias=False)
    for name in ("hidden", "weight"):
        x = inputs[name].double()
        inputs[f"base_{name}"] = (x + 0.1 * torch.randn(x.shape, dtype=FP64) * x.std()).to(dtype)
    return inputs


def inputs_of_logits(logits: Tensor, base_logits: Tensor, dtype: torch.dtype) -> Inputs:
    inputs = from_logits("linear_delta_logp", logits, base_logits, torch.zeros(0), dtype)
    del inputs["target"]
    return inputs


def sample(inputs: Inputs, **options: Any) -> Sample:
    """The op on the device under test; results on the CPU."""
    options = {name: x.to(cases.DEVICE) if isinstance(x, Tensor) else x for name, x in ({"seed": 1} | options).items()}
    drawn = dlogp_kernels.linear_extrapolated_sample(**cases.on_device(inputs), **options)
    return Sample(*(x.cpu() for x in drawn))


def logits_of(inputs: Inputs, prefix: str, dtype: torch.dtype, options: dict[str, Any]) -> Tensor:
    hidden, weight, bias = (inputs.get(f"{prefix}{name}") for name in ("hidden", "weight", "bias"))
    assert hidden is not None and weight is not None
    raw = reference.linear_logits(hidden, weight, bias, dtype)
    scale = options.get(f"{prefix}logit_scale", 1.0)
    return reference.transform_logits(raw, 1.0, options.get(f"{prefix}softcap"), scale)


def check(accuracy: Any | None, inputs: Inputs, **options: Any) -> Sample:
    """Token for token what the definition draws from float64 logits, but for ties within rounding."""
    actual = sample(inputs, **options)
    heads = {name: options.pop(name) for name in HEADS if name in options}
    exact = upcast(inputs)
    z, base_z = (logits_of(exact, prefix, FP64, heads) for prefix in ("", "base_"))
    magnitude = cases.magnitude("linear_delta_logp", inputs, **heads)
    check_sample(
        accuracy, "linear_extrapolated_sample", actual, z, base_z, magnitude, widest(inputs), magnitude, **options
    )
    return actual


def assert_equal(drawn: Sample, expected: Sample) -> None:
    for name, value, other in zip(Sample._fields, drawn, expected, strict=True):
        assert torch.equal(value.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0)), name


@pytest.mark.filterwarnings("ignore:threshold is .* not below 0")
@pytest.mark.parametrize("draft", fewer(["base", "rl"], ["base"]))
@pytest.mark.parametrize("criterion", CRITERIA)
def test_random_inputs(accuracy, exact, criterion, draft):
    """The threshold is the median, so that about half of the rows are replaced."""
    rows = fewer(40, 8)
    inputs = near_pair_inputs(rows, v=fewer(301, 90), dtype=exact)
    z, base_z = (logits_of(upcast(inputs), prefix, FP64, {}) for prefix in ("", "base_"))
    everything = [(1.0, 0.0), (1.0, 0.3), (0.7, 2.0), (0.0, 0.3), (0.0, 0.0)]
    for temperature, gamma in fewer(everything, everything[2 : 3 + (criterion == "all")]):
        options = {"temperature": temperature, "gamma": gamma, "draft": draft, "seed": 2, "step": 3}
        drafted = definition(z, base_z, criterion="none", **options).draft_token
        if criterion in THRESHOLDS and criterion != "random":
            threshold = criterion_value(z, base_z, drafted, criterion).quantile(0.5).item()
        else:
            threshold = THRESHOLDS.get(criterion)
        drawn = check(accuracy, inputs, criterion=criterion, threshold=threshold, **options)
        assert criterion in ("all", "none") or 0 < drawn.selected.sum() < rows


@pytest.mark.parametrize(
    "dtype",
    [BF16, FP16, FP32, FP64, {"weight": BF16, "base_weight": BF16}, {"hidden": BF16, "base_weight": FP16}],
    ids=str,
)
def test_dtypes_and_heads(accuracy, backend, dtype):
    if backend == "triton" and dtype == FP64:
        pytest.skip("it has no float64 kernels")
    for bias in fewer((True, False), (False,)):
        for heads in ({"base_softcap": 3.0, "logit_scale": 1.3}, HEADS, {"logit_scale": 0.5})[: fewer(3, 1)]:
            inputs = pair_inputs(fewer(12, 5), v=fewer(1187, 90), d=33, dtype=dtype, bias=bias)
            drawn = check(accuracy, inputs, gamma=0.3, temperature=0.8, seed=2**63, **heads)
            assert drawn.logp.dtype == (FP64 if dtype == FP64 else FP32)


@pytest.mark.parametrize("v", fewer([1, 2, 3, 5, 63, 64, 65, 257, 1025, 4099], [1, 5, 65]))
def test_any_vocabulary(accuracy, exact, v):
    inputs = pair_inputs(3, v=v, d=7, dtype=exact)
    for temperature in fewer((1.0, 0.0), (1.0,)):
        check(accuracy, inputs, gamma=0.3, criterion="avg_kl", threshold=0.2, seed=5, temperature=temperature)


@pytest.mark.parametrize("d", fewer([1, 2, 3, 8, 15, 16, 17, 31, 64, 129], [1, 129]))
def test_any_hidden_size(accuracy, exact, d):
    """The base has a larger one."""
    v = fewer(130, 70)
    check(accuracy, pair_inputs(5, v=v, d=d, dtype=exact), gamma=0.2)
    check(accuracy, pair_inputs(5, v=v, d=d, dtype=BF16, bias=False), gamma=0.2)


@pytest.mark.not_interpreted("a whole vocabulary")
@pytest.mark.served_by("cpu", "triton")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_whole_vocabulary(accuracy, dtype):
    inputs = near_pair_inputs(2, v=151_936, d=64, dtype=dtype)
    check(accuracy, inputs, gamma=0.1, **criterion_options("delta_logp"))


@pytest.mark.parametrize("criterion", fewer(["all", "delta_logp", "kl", "reverse_kl", "rl_entropy"], ["reverse_kl"]))
def test_adversarial_logits(accuracy, backend, exact, criterion):
    """Row by row, since a linear layer can give −inf to a token of all rows only."""
    logits, base_logits = adversarial_pair(301, exact)
    rows = fewer(range(logits.shape[0]), (4, 12, 14, 17, 20))
    for row in rows:
        one = slice(row, row + 1)
        if backend == "triton" and base_logits[row].min() < _IMPOSSIBLE and base_logits[row].isfinite().all():
            continue
        inputs = inputs_of_logits(logits[one], base_logits[one], exact)
        for temperature in fewer((1.0, 0.0), (1.0,)):
            options = criterion_options(criterion) | {"temperature": temperature, "gamma": 0.4}
            check(accuracy, inputs, seed=3, row_id=torch.tensor([row]), **options)


@pytest.mark.parametrize("criterion", fewer(["all", "kl", "reverse_kl", "entropy"], ["all", "kl"]))
def test_masked_vocabularies(accuracy, backend, exact, criterion):
    """−inf in both, in either alone, in whole tiles; the stand-in then decides between two kinds of token."""
    v = 301 if is_definition(backend) else fewer(1187, 150)
    inputs = pair_inputs(fewer(12, 8), v=v, dtype=exact)
    masks = (
        (slice(0, v // 2), slice(0, v // 2)),
        (slice(0, 0), slice(v // 4, v)),
        (slice(v // 2, v), slice(0, 0)),
        (slice(0, v // 3), slice(v // 4, v // 2)),
        (slice(0, 0), slice(1, v)),
    )
    for masked, base_masked in fewer(masks, masks[1::2]):
        biases = {"bias": inputs["bias"].clone(), "base_bias": inputs["base_bias"].clone()}
        biases["bias"][masked] = biases["base_bias"][base_masked] = -torch.inf
        for temperature, gamma in ((1.0, 0.5), (0.6, 3.0), (0.0, 0.5), (1.0, 0.0))[: fewer(4, 1)]:
            options = criterion_options(criterion) | {"temperature": temperature, "gamma": gamma}
            drawn = check(accuracy, inputs | biases, seed=7, **options)
            assert biases["bias"][drawn.token[drawn.selected]].isfinite().all()
            assert biases["base_bias"][drawn.draft_token].isfinite().all()


def test_a_softcap_makes_masked_tokens_possible(accuracy, exact):
    inputs = pair_inputs(5, v=130, dtype=exact)
    inputs["bias"][:100] = inputs["base_bias"][50:] = -torch.inf
    check(accuracy, inputs, gamma=0.5, **HEADS)


@pytest.mark.parametrize(("offset", "base_offset"), [(1e4, -1e4), (-1e4, 1e4), (1e4, 0.0)])
def test_common_offsets(accuracy, exact, offset, base_offset):
    inputs = pair_inputs(6, v=fewer(301, 90), dtype=exact)
    inputs["bias"] += offset
    inputs["base_bias"] += base_offset
    for temperature in fewer((1.0, 0.0), (1.0,)):
        check(accuracy, inputs, gamma=0.2, temperature=temperature)


@pytest.mark.parametrize(
    "options", fewer([{}, {"temperature": 0.0}, {"gamma": 0.5}, {"top_p": 0.7}], [{"gamma": 0.5}]), ids=str
)
def test_bad_rows_give_minus_one_and_nan(options):
    rows, v = fewer((70, 301), (20, 70))
    inputs = pair_inputs(rows, v=v)
    expected = sample(inputs, **options)
    bad = [0, 5, rows - 4]
    broken = inputs | {"hidden": inputs["hidden"].clone(), "base_hidden": inputs["base_hidden"].clone()}
    broken["hidden"][0, 3] = torch.nan
    broken["base_hidden"][5, :] = torch.nan
    broken["hidden"][rows - 4] = torch.inf * torch.ones(24)  # ∞ − ∞
    drawn = sample(broken, **options)
    good = torch.ones(rows, dtype=torch.bool).index_fill_(0, torch.tensor(bad), False)
    for value, other in zip(drawn, expected, strict=True):
        assert torch.equal(value[good], other[good])
    assert (drawn.token[bad] == -1).all() and (drawn.draft_token[bad] == -1).all() and not drawn.selected[bad].any()
    assert all(x[bad].isnan().all() for x in drawn[3:])
    for value in (torch.inf, torch.nan):
        for name in ("bias", "base_bias"):
            one_token = inputs[name].index_fill(0, torch.tensor([v - 1]), value)
            assert (sample(inputs | {name: one_token}, **options).token == -1).all()
    for name in ("bias", "base_bias"):
        drawn = sample(inputs | {name: torch.full((v,), -torch.inf)}, **options)
        assert (drawn.token == -1).all() and drawn.logp.isnan().all()


def test_temperature_0_takes_the_first_maximum():
    """Equal tokens far apart: in one block, in different tiles, parts and programs."""
    v = fewer(3000, 400)
    for places in ([13, 64, v - 1], [0, 1], [v // 2, v // 2 + 1], [v - 2, v - 1], [70, 200])[: fewer(5, 1)]:
        logits = torch.zeros(1, v).index_fill_(1, torch.tensor(places), 5.0)
        for gamma in (0.0, 0.7):
            drawn = sample(inputs_of_logits(logits, logits, FP32), temperature=0.0, gamma=gamma)
            assert drawn.token.item() == drawn.draft_token.item() == places[0]


@pytest.mark.served_by("cpu", "triton")
def test_huge_scores_stay_inside_the_vocabulary():
    """What overflows on the way to a score has no meaning; it must not be read out of bounds."""
    z = torch.full((1, 70), 3e38)
    z[0, ::2] = -3e38
    for sign in (1, -1):
        for temperature, gamma in fewer(((1e-3, 0.0), (1.0, 3.0), (1e-3, 3.0)), ((1e-3, 3.0),)):
            inputs = inputs_of_logits(sign * z, -sign * z, FP32)
            drawn = sample(inputs, temperature=temperature, gamma=gamma)
            for token in (drawn.token, drawn.draft_token):
                assert ((token >= -1) & (token < 70)).all()


@pytest.mark.served_by("cpu", "triton")
@pytest.mark.parametrize("filters", fewer([{}, {"top_p": 0.9}], [{}]), ids=str)
def test_the_smaller_workspace_draws_the_same(filters):
    """More rows than a pass through the vocabulary takes."""
    inputs = pair_inputs(fewer(200, 40), v=fewer(3000, 130), d=fewer(24, 1_100), dtype=BF16)
    options = {"gamma": 0.3, **criterion_options("delta_logp"), **filters}
    expected = sample(inputs, **options)
    with backends.workspace_limit(2**20):
        assert_equal(sample(inputs, **options), expected)


@pytest.mark.served_by("reference")
def test_blocks_of_rows_of_logits():
    """As many rows as the smallest workspace has room for, which plain PyTorch hands on with what is theirs alone."""
    rows = 17
    inputs = pair_inputs(rows, v=3_000, dtype=FP64)
    options = {"row_id": torch.arange(rows).flip(0), "step": torch.arange(rows) % 3, "gamma": 0.3}
    expected = sample(inputs, **options)
    with backends.workspace_limit(2**20):
        drawn = sample(inputs, **options)
    assert torch.equal(drawn.token, expected.token) and torch.equal(drawn.draft_token, expected.draft_token)


@pytest.mark.not_interpreted("thousands of rows")
@pytest.mark.served_by("cpu", "triton")
def test_thousands_of_rows(accuracy):
    check(accuracy, pair_inputs(2100, v=301), gamma=0.1, **criterion_options("delta_logp"))


@pytest.mark.served_by("cpu", "triton")
@pytest.mark.parametrize("dtype", fewer([BF16, FP32, {"weight": BF16, "base_weight": BF16}], [FP32]), ids=str)
@pytest.mark.parametrize("filters", fewer([{}, {"top_p": 0.9}], [{}]), ids=str)
def test_a_row_does_not_depend_on_the_batch(dtype, filters, backend):
    if filters and backend != "cpu":
        pytest.skip("plain PyTorch's products of a row of logits depend on the batch")
    rows = fewer(150, 40)
    inputs = pair_inputs(rows, v=fewer(3000, 130), d=37, dtype=dtype)
    row_id = torch.arange(rows) * 1_000_003 % 2**32
    options = {"gamma": 0.2, "criterion": "delta_logp", "threshold": -1.0, **filters}
    everything = sample(inputs, row_id=row_id, **options)
    assert everything.selected.any() and not everything.selected.all()
    for chosen in (torch.randperm(rows).tolist(), [3, 1], [0], [rows - 1], list(range(5, 13)))[: fewer(5, 2)]:
        some = inputs | {name: inputs[name][chosen] for name in ("hidden", "base_hidden")}
        assert_equal(sample(some, row_id=row_id[chosen], **options), Sample(*(x[chosen] for x in everything)))


@pytest.mark.cpu_only
@pytest.mark.served_by("cpu")
def test_a_row_does_not_depend_on_the_number_of_threads():
    inputs = pair_inputs(7, v=5000)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            options: list[dict[str, Any]] = [{"gamma": 0.5}, {"temperature": 0.0}, {"gamma": 0.5, "top_p": 0.8}]
            results.append([sample(inputs, **given) for given in options])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for drawn, expected in zip(other, results[0], strict=True):
            assert_equal(drawn, expected)


@pytest.mark.not_interpreted("the interpreter has one program at a time")
def test_worker_threads():
    inputs = [pair_inputs(8, v=1187, dtype=BF16, seed=seed) for seed in range(4)]
    expected = [sample(x, gamma=0.1) for x in inputs]
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        results[i] = sample(inputs[i], gamma=0.1)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for drawn, other in zip(results, expected, strict=True):
        assert_equal(drawn, other)


def test_seed_step_and_row_id_are_what_the_noise_depends_on():
    inputs = inputs_of_logits(*(torch.zeros(64, fewer(700, 250)) for _ in range(2)), FP32)
    first = sample(inputs, seed=5, step=3)
    assert_equal(sample(inputs, seed=5, step=3, row_id=torch.arange(64)), first)
    for other in (
        {"seed": 6, "step": 3},
        {"seed": 5 + 2**32, "step": 3},
        {"seed": 5, "step": 3 + 2**31},
        {"seed": 5, "step": 3, "row_id": torch.arange(64) + 2**31},
    ):
        drawn = sample(inputs, **other)
        for name in ("token", "draft_token"):
            assert (getattr(drawn, name) == getattr(first, name)).sum() <= 4, other
    assert (first.token == first.draft_token).sum() <= 4


@pytest.mark.parametrize("seed", fewer([0, 2**63, 2**64 - 1], [2**64 - 1]))
def test_seed_and_step_from_tensors(accuracy, seed):
    inputs = pair_inputs(6, v=fewer(200, 60))
    for step in fewer((0, 17, 2**32 - 1), (2**32 - 1,)):
        number = check(accuracy, inputs, seed=seed, step=step)
        signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        assert_equal(sample(inputs, seed=signed, step=torch.tensor(step)), number)


def test_a_step_for_every_row():
    inputs = pair_inputs(6, v=fewer(301, 60))
    steps, row_id = torch.tensor([5, 0, 2**32 - 1, 7, 7, 1]), torch.arange(6) + 9
    for options in ({"gamma": 0.1}, {"gamma": 0.1, "top_p": 0.8})[: fewer(2, 1)]:
        drawn = sample(inputs, step=steps, row_id=row_id, **options)
        for row in fewer(range(6), (2,)):
            again = sample(inputs, step=int(steps[row]), row_id=row_id, **options)
            assert all(torch.equal(x[row], y[row]) for x, y in zip(drawn, again, strict=True))


def test_a_part_of_a_vocabulary_has_the_noise_of_the_whole():
    """One that says where it begins is drawn from as the whole one is where all other tokens are masked."""
    first, end = fewer((204, 903), (100, 250))
    inputs = cases.on_device(pair_inputs(8, v=fewer(1025, 260), bias=False))
    names = ("hidden", "weight", "base_hidden", "base_weight")
    hidden, weight, base_hidden, base_weight = (inputs[name] for name in names)
    outside = torch.full(weight.shape[:1], -torch.inf, device=cases.DEVICE)
    outside[first:end] = 0.0
    options = (0.3, "random", 0.5, "base", 0.7, 0, 1.0, 0.0)
    drawn, whole = (
        Sample(
            *torch.ops.dlogp.linear_extrapolated_sample(
                hidden, weight[tokens], bias, flat_transform(1.0, None, 1.0), base_hidden, base_weight[tokens], bias,
                flat_transform(1.0, None, 1.0), None, 5, 2, None, None, begin, *options,
            )
        )
        for tokens, bias, begin in ((slice(first, end), None, first), (slice(None), outside, 0))
    )  # fmt: skip
    assert drawn.selected.any() and not drawn.selected.all() and torch.equal(drawn.selected, whole.selected)
    assert torch.equal(drawn.token + first, whole.token) and torch.equal(drawn.draft_token + first, whole.draft_token)


@pytest.mark.parametrize("filters", fewer([*FILTERS.values(), {"top_k": 2000}], [{"min_p": 0.1}]), ids=str)
def test_filters_draw_from_logits(accuracy, filters):
    """With them on, what `extrapolated_sample` draws."""
    inputs = pair_inputs(fewer(12, 4), v=fewer(301, 60))
    check(accuracy, inputs, gamma=0.3, temperature=0.8, **criterion_options("delta_logp"), **filters, **HEADS)


@pytest.mark.not_interpreted("two ops, which have tests of their own there")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_tokens_are_those_of_the_logits(dtype, per_row):
    inputs = pair_inputs((3, 7), v=12_007, dtype=dtype)
    rows = torch.arange(21).view(3, 7)
    where = {"row_id": rows + 100, "step": rows % 5} if per_row else {"step": 4}
    options = {"gamma": 0.3, "criterion": "delta_logp", "threshold": -0.2, "temperature": 0.8, "seed": 2**63} | where
    for filters in ({}, {"top_p": 0.9}):
        pair = [logits_of(inputs, prefix, FP32, HEADS).to(cases.DEVICE) for prefix in ("", "base_")]
        moved = {name: x.to(cases.DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
        expected = dlogp_kernels.extrapolated_sample(*pair, **moved, **filters)
        assert expected.selected.any() and not expected.selected.all()
        for size in (2**20, backends.DEFAULT_WORKSPACE):  # many blocks of rows, one block
            with backends.workspace_limit(size):
                drawn = sample(inputs, **HEADS, **options, **filters)
            assert torch.equal(drawn.token, expected.token.cpu())
            assert torch.equal(drawn.selected, expected.selected.cpu())
            torch.testing.assert_close(drawn.logp, expected.logp.cpu(), rtol=0, atol=1e-5)
            torch.testing.assert_close(drawn.delta_logp, expected.delta_logp.cpu(), rtol=0, atol=1e-5)


def _strided(x: Tensor) -> list[Tensor]:
    wide = torch.full((x.shape[0], 2 * x.shape[1] + 3), torch.nan, dtype=x.dtype)
    wide[:, 1 : 1 + 2 * x.shape[1] : 2] = x
    padded = torch.full((2 * x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype)
    padded[::2, 3:-2] = x
    return [wide[:, 1 : 1 + 2 * x.shape[1] : 2], padded[::2, 3:-2], x.t().contiguous().t()]


@pytest.mark.parametrize("dtype", fewer([BF16, FP32], [FP32]), ids=str)
def test_strides(dtype):
    inputs = pair_inputs(6, v=fewer(301, 60), d=16, dtype=dtype)
    expected = sample(inputs, gamma=0.3)
    for name in fewer(("hidden", "weight", "base_hidden", "base_weight"), ("hidden", "weight")):
        for view in _strided(inputs[name]):
            drawn = sample(inputs | {name: view}, gamma=0.3)
            assert torch.equal(drawn.token, expected.token)
            torch.testing.assert_close(drawn.logp, expected.logp, rtol=0, atol=1e-5)
    every_second = torch.stack([inputs["bias"], torch.full_like(inputs["bias"], torch.nan)], 1)[:, 0]
    assert_equal(sample(inputs | {"bias": every_second}, gamma=0.3), expected)


def test_one_weight_of_both_models(accuracy, exact):
    inputs = pair_inputs(9, v=fewer(301, 90), d=32, dtype=exact, bias=False)
    inputs["base_hidden"] = inputs["base_hidden"][:, :32].contiguous()
    inputs["base_weight"] = inputs["weight"]
    check(accuracy, inputs, gamma=0.3, **criterion_options("reverse_kl"))


def test_leading_dimensions_and_expanded_rows():
    inputs = pair_inputs(24, v=fewer(90, 40))
    row_id = torch.randint(2**32, (24,))
    flat = sample(inputs, row_id=row_id)
    shaped = inputs | {name: inputs[name].view(2, 3, 4, -1) for name in ("hidden", "base_hidden")}
    for value, other in zip(sample(shaped, row_id=row_id.view(2, 3, 4)), flat, strict=True):
        assert torch.equal(value, other.view(2, 3, 4))
    swapped = inputs | {name: inputs[name].view(4, 6, -1).transpose(0, 1) for name in ("hidden", "base_hidden")}
    for value, other in zip(sample(swapped, row_id=row_id.view(4, 6).t()), flat, strict=True):
        assert torch.equal(value, other.view(4, 6).t())
    alone = inputs | {name: inputs[name][3] for name in ("hidden", "base_hidden")}
    for value, other in zip(sample(alone, row_id=row_id[3]), flat, strict=True):
        assert value.shape == ()
        torch.testing.assert_close(value, other[3])
    expanded = inputs | {name: inputs[name][:1].expand(24, -1) for name in ("hidden", "base_hidden")}
    repeated = inputs | {name: inputs[name][:1].repeat(24, 1) for name in ("hidden", "base_hidden")}
    drawn = sample(expanded)
    assert_equal(drawn, sample(repeated))
    assert drawn.token.unique().numel() > 1


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("leading", [(0,), (3, 0)])
def test_no_rows(leading, options):
    drawn = sample(pair_inputs(leading, v=50), **options)
    assert all(x.shape == leading for x in drawn)
    assert [x.dtype for x in drawn] == [torch.int64, torch.int64, torch.bool, FP32, FP32, FP32]


def _op_arguments(dtype: torch.dtype, present: bool, top_p: float) -> list[Any]:
    """Every argument of the op in order; optional ones given, or None."""
    inputs = cases.on_device(pair_inputs(6, v=31, d=5, dtype=dtype))
    heads: list[Any] = []
    for prefix, options in (("", (5.0, 1.3)), ("base_", (4.0, 0.7))):
        heads += [inputs[f"{prefix}hidden"], inputs[f"{prefix}weight"], inputs[f"{prefix}bias"] if present else None]
        heads.append(flat_transform(1.0, *(options if present else (None, 1.0))))
    row_id = torch.arange(6, device=cases.DEVICE) + 3 if present else None
    counters = [torch.tensor([x], device=cases.DEVICE) if present else None for x in (5, 2)]
    criterion, threshold = ("delta_logp", -0.1) if present else ("all", None)
    return [
        *heads, row_id, 5, 2, *counters, 4, 0.3, criterion, threshold, "rl", 0.7, 0, top_p, 0.0
    ]  # fmt: skip


@pytest.mark.parametrize("top_p", fewer([1.0, 0.9], [1.0]))
@pytest.mark.parametrize("present", [True, False], ids=["every optional argument", "no optional argument"])
@pytest.mark.parametrize("dtype", fewer([BF16, FP32, FP64], [BF16]), ids=str)
def test_opcheck(dtype, present, top_p):
    op = torch.ops.dlogp.linear_extrapolated_sample.default
    torch.library.opcheck(op, _op_arguments(dtype, present, top_p))


@pytest.mark.around_launchers
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}], ids=str)
def test_compiles_whole_and_not_again_for_other_numbers_of_rows(filters, counter):
    options = criterion_options("delta_logp") | {"gamma": 0.1, "temperature": 0.7} | filters

    def draw(inputs: Inputs, seed: Tensor) -> tuple[Tensor, ...]:
        return tuple(dlogp_kernels.linear_extrapolated_sample(**inputs, seed=seed, **options))

    compiled = torch.compile(draw, backend=counter, fullgraph=True)
    for n in (5, 9, 17, 40, 3):
        inputs, seed = cases.on_device(pair_inputs(n, v=31)), torch.tensor([n], device=cases.DEVICE)
        for value, other in zip(compiled(inputs, seed), draw(inputs, seed), strict=True):
            assert torch.equal(value, other)
        assert counter.frame_count <= 2, f"compiled again for N = {n}"


def test_inputs_are_not_modified_and_no_gradient_is_attached():
    inputs = {name: x.requires_grad_() for name, x in pair_inputs(5, v=100).items()}
    before = {name: x.detach().clone() for name, x in inputs.items()}
    drawn = sample(inputs, gamma=0.2)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    assert not any(x.requires_grad for x in drawn)


def test_autocast_converts_as_linear_does():
    inputs = pair_inputs(5, v=130)
    with torch.autocast(cases.DEVICE.type, dtype=BF16):
        drawn = sample(inputs, gamma=0.2)
    assert_equal(drawn, sample({name: x.to(BF16) for name, x in inputs.items()}, gamma=0.2))


@pytest.mark.parametrize("seed", range(fewer(30, 3)))
def test_random_case(accuracy, backend, exact, seed):
    rng = random.Random(seed)
    dtype = rng.choice((BF16, FP16, FP32, exact))
    rows, v = rng.choice((1, 2, 8, 33, 70)), rng.randint(1, fewer(3000, 150))
    inputs = pair_inputs(rows, v=v, d=rng.randint(1, 130), dtype=dtype, bias=rng.random() < 0.5, seed=seed)
    for name in ("bias", "base_bias"):
        if name in inputs and v > 10 and rng.random() < 0.4:
            inputs[name][rng.randrange(v - 5) :: rng.randint(2, 5)] = -torch.inf
    heads = {name: x for name, x in HEADS.items() if rng.random() < 0.3}
    criterion = rng.choice(CRITERIA)
    options = criterion_options(criterion) | {
        "gamma": rng.choice((0.0, 0.1, 2.0)),
        "temperature": rng.choice((0.0, 0.5, 1.0, 1.7)),
        "draft": rng.choice(("base", "rl")),
        "seed": rng.randrange(2**64),
        "step": rng.randrange(2**32),
    }
    print({name: (tuple(x.shape), x.dtype) for name, x in inputs.items()}, heads, options)
    check(accuracy, inputs, **heads, **options)


_WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other vocabulary": (
        {"base_weight": torch.zeros(9, 32), "base_bias": None},
        ValueError,
        "base_weight has 9 rows, expected the vocabulary of weight",
    ),
    "other rows": ({"base_hidden": torch.zeros(2, 32)}, ValueError, r"base_hidden has shape \(2, 32\)"),
    "bias": ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\), expected \(30,\)"),
    "not a tensor": ({"weight": [1.0]}, TypeError, "weight is list"),
    "softcap": ({"base_softcap": 0.0}, ValueError, "base_softcap is 0.0"),
    "gamma": ({"gamma": -1.0}, ValueError, "gamma is -1.0, expected a number in"),
    "criterion": ({"criterion": "surprise"}, ValueError, "criterion is 'surprise'"),
    "threshold": ({"criterion": "kl"}, ValueError, "threshold is None"),
    "draft": ({"draft": "policy"}, ValueError, "draft is 'policy'"),
    "top_p": ({"top_p": 0.0}, ValueError, "top_p is 0.0"),
    "seed": ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
    "row_id": ({"row_id": torch.arange(3)}, ValueError, r"row_id has shape \(3,\), expected \(4,\)"),
    "step": ({"step": torch.zeros(1)}, ValueError, "step has dtype torch.float32"),
    "misspelt": ({"tempreature": 1.0}, TypeError, ".*tempreature"),
}


@pytest.mark.not_interpreted("of what is in front of the backends")
@pytest.mark.parametrize("name", _WRONG)
def test_what_does_not_fit_is_refused_by_name(name):
    changed, error, message = _WRONG[name]
    with pytest.raises(error, match=f"^{message}"):
        dlogp_kernels.linear_extrapolated_sample(**pair_inputs(4, v=30) | {"seed": 1} | changed)


def test_a_threshold_of_delta_logp_that_is_not_negative_warns_where_it_is_called():
    with pytest.warns(UserWarning, match="threshold is 0.3.*replaces nearly every token") as caught:
        dlogp_kernels.linear_extrapolated_sample(
            **cases.on_device(pair_inputs(4, v=30)), seed=1, criterion="delta_logp", threshold=0.3
        )
    assert caught[0].filename == __file__
