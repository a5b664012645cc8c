"""`extrapolated_sample`: every backend against the definition in float64, against statistics, and against bad input."""

import importlib
import math
import warnings
from typing import Any

import cases
import frequencies
import pytest
import torch
from sampling import (
    BF16,
    FILTERS,
    FP16,
    FP32,
    FP64,
    NO_OPTIONS,
    THRESHOLDS,
    adversarial_pair,
    check_against_definition,
    check_part_of_a_vocabulary,
    criterion_options,
    criterion_value,
    is_definition,
    random_pair,
    sample,
)
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import Sample, backends
from dlogp_kernels.ops import schemas
from dlogp_kernels.reference import sampling as reference_sample
from dlogp_kernels.reference.sampling import CRITERIA, RANDOM

pytestmark = [pytest.mark.usefixtures("serves_sampling", "few_walks"), pytest.mark.also_by("cuda")]


QWEN = 151_936


@pytest.fixture
def serves_sampling(backend: str) -> None:
    problem = backends.unavailable(backend, "extrapolated_sample", cases.DEVICE)
    if problem is not None:
        pytest.skip(f"backend {backend}: {problem}")


@pytest.fixture
def few_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter needs as long for 64 numbers as for eight, and half as many walks then find a cut."""
    if backends.interpreting():
        import triton.language as tl

        kernels = importlib.import_module("dlogp_kernels.triton.extrapolated_sample")
        monkeypatch.setattr(kernels, "_MARKS", tl.constexpr(64))


@pytest.fixture
def walks_as_on_a_gpu(few_walks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


def assert_same_rows(drawn: Sample, other: Sample) -> None:
    """Bit for bit; but on a GPU the sums of PyTorch's own kernels depend on how many rows there are."""
    of_pytorch = backends.select("extrapolated_sample", cases.DEVICE) == "reference" and cases.DEVICE.type == "cuda"
    for name, x, y in zip(drawn._fields, drawn, other, strict=True):
        if of_pytorch and x.is_floating_point():
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(x, y), name


@pytest.mark.served_by("reference")
def test_philox_known_answers():
    """Random123's known answers, by which every implementation of Philox4x32-10 is checked; a token has its word."""
    zeros, ones = (torch.tensor([value]) for value in (0, 0xFFFFFFFF))
    answers = {
        (zeros, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (ones, -1): "408f276d 41c83b0e a20bc7c6 6d5451fd",
    }
    for (counter, seed), answer in answers.items():
        key = torch.tensor([seed])
        words = reference_sample.philox((counter,) * 4, key)
        assert " ".join(f"{int(word):08x}" for word in words) == answer
        block = 4 * counter + torch.arange(4)  # of four tokens, with this counter
        bits = reference_sample.noise_bits(block, counter, key, counter, int(counter))
        assert bits.tolist() == [[int(word) for word in words]]


def uniforms(row_ids: Tensor, seed: int, step: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The backend's own u of stream 2, found by bisection over the threshold, to 2⁻³³."""
    logits = torch.zeros(row_ids.shape[0], 2)
    lows, highs = torch.full(row_ids.shape, low, dtype=FP64), torch.full(row_ids.shape, high, dtype=FP64)
    for row in range(row_ids.shape[0]):
        lo, hi = low, high
        for _ in range(34):
            middle = (lo + hi) / 2
            drawn = sample(
                logits[row : row + 1],
                logits[row : row + 1],
                criterion="random",
                threshold=middle,
                seed=seed,
                step=step,
                row_id=row_ids[row : row + 1],
            )
            lo, hi = (lo, middle) if drawn.selected.item() else (middle, hi)
        lows[row], highs[row] = lo, hi
    return (lows + highs) / 2


@pytest.mark.not_interpreted("34 launches a number")
def test_the_backend_has_philox_with_known_answers():
    """Its counter (0, row_id, step, 2) cannot be all zeros; so the words are those of the checked implementation."""
    for seed, step, row_id in ((0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (0x0123456789ABCDEF, 77, 12345)):
        ids = torch.tensor([row_id])
        signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        bits = reference_sample.noise_bits(torch.zeros(1).long(), ids, signed, torch.tensor([step]), RANDOM)
        expected = (int(bits) + 0.5) * 2.0**-32
        assert abs(uniforms(ids, seed, step).item() - expected) <= 2.0**-33


@pytest.mark.parametrize("draft", ["base", "rl"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_draws_what_the_definition_draws(accuracy, exact, backend, criterion, draft):
    logits, base_logits = adversarial_pair(301, exact)
    temperatures = (0.7,) if is_definition(backend) else cases.fewer((0.0, 0.7, 1.0), (0.7,))
    combination = CRITERIA.index(criterion) + len(CRITERIA) * (draft == "rl")
    if backends.interpreting():
        # Over the combinations every row meets every filter once.
        third = slice(combination // len(FILTERS), None, 3)
        logits, base_logits = logits[third], base_logits[third]
    for number, filters in enumerate(FILTERS.values()):
        if backends.interpreting() and number != combination % len(FILTERS):
            continue
        for temperature in temperatures:
            gamma = (0.0, 0.1, 1.0)[(number + round(10 * temperature)) % 3]
            options = criterion_options(criterion) | filters | {"gamma": gamma, "temperature": temperature}
            check_against_definition(accuracy, logits, base_logits, draft=draft, seed=7, step=number, **options)


@pytest.mark.parametrize("v", [1, 2, 3, 4, 5, 63, 64, 65, 1023, 1025, 4099])
def test_any_vocabulary(accuracy, exact, v):
    # Of few tokens, each filter keeps some and not others.
    few, many = v <= 5, v > 2000
    logits, base_logits = random_pair(cases.fewer(5, 3 if few else 1), v, exact)
    for filters in list(FILTERS.values())[cases.fewer(0, 0 if few else 4 if many else 3) :]:
        for temperature in cases.fewer((0.0, 0.7), (0.7,)):
            options = filters | {"temperature": temperature, "gamma": 0.3}
            check_against_definition(
                accuracy, logits, base_logits, criterion="delta_logp", threshold=-0.2, seed=3, **options
            )


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dtypes(accuracy, dtype):
    logits, base_logits = random_pair(cases.fewer(8, 2), 700, dtype)
    for filters in list(FILTERS.values())[:: cases.fewer(1, 4)]:
        check_against_definition(accuracy, logits, base_logits, gamma=0.1, temperature=0.7, seed=5, **filters)
        drawn = sample(logits, base_logits, gamma=0.1, seed=5, **filters)
        widened = sample(logits.float(), base_logits.float(), gamma=0.1, seed=5, **filters)
        assert all(torch.equal(x, y) for x, y in zip(drawn, widened, strict=True))
        mixed = sample(logits.float(), base_logits, gamma=0.1, seed=5, **filters)
        assert all(torch.equal(x, y) for x, y in zip(mixed, widened, strict=True))


@pytest.mark.not_interpreted("a whole vocabulary")
@pytest.mark.served_by("cpu", "triton", "cuda")
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_a_whole_vocabulary(accuracy, filters):
    logits, base_logits = random_pair(2, QWEN, FP32)
    options = criterion_options("delta_logp") | filters | {"gamma": 0.1, "temperature": 1.0}
    check_against_definition(accuracy, logits, base_logits, seed=11, **options)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.999999])
def test_top_p_of_many_equal_and_nearly_equal_logits(exact, top_p):
    """The crossing bucket of a histogram then holds nearly all tokens."""
    v = cases.fewer(5001, 1001)
    logits, base_logits = torch.zeros(4, v, dtype=exact), torch.zeros(4, v, dtype=exact)
    logits[1, 17] = 1.0
    logits[2] = torch.arange(v) * 1e-9
    logits[3] = (torch.arange(v) % 2) * 1e-3
    logits[3, 5] = 30.0
    base_logits[2] = -torch.arange(v) / v
    for temperature in cases.fewer((1.0, 0.25), (0.25,)):
        for top_k in cases.fewer((0, v - 5, 200), (0, v - 5)):
            options = {"top_p": top_p, "top_k": top_k, "temperature": temperature}
            check_against_definition(None, logits, base_logits, seed=2, **options)


def distinct_logits(v: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(v, generator=generator).double() * (8.0 / v)).float()


@pytest.mark.not_interpreted("too many draws")
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all three"])
def test_kept_tokens_are_those_of_transformers(backend, name, temperature):
    """Every token drawn survives the warpers; every survivor that should have come up has."""
    logits = distinct_logits(200)
    filters = FILTERS[name]
    kept = warped(logits, temperature, filters)
    probability = (logits.double() / temperature).masked_fill(~kept, -torch.inf).softmax(-1)
    draws = 2000 if is_definition(backend) else 20_000
    rows = logits.expand(draws, -1)
    drawn = sample(rows, rows, temperature=temperature, seed=9, **filters)
    counts = torch.stack([drawn.token, drawn.draft_token]).flatten().bincount(minlength=logits.shape[0])
    assert not counts[~kept].any()
    expected_often = probability * 2 * draws > 30
    assert counts[expected_often].all() and expected_often[kept].float().mean() > 0.5


#: Logits about as large as each other.
SIX = torch.tensor([0.0, 0.3, 0.1, 0.4, 0.2, 0.5])


@pytest.mark.usefixtures("walks_as_on_a_gpu")
@pytest.mark.parametrize(
    "filters",
    [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.75}, {"top_k": 5, "top_p": 0.7}, {"top_k": 2, "min_p": 0.5}],
    ids=str,
)
def test_the_last_token_that_a_filter_keeps(filters):
    """Of six tokens about as likely as each other, few draws show one too many and one too few."""
    assert torch.equal(tokens_drawn(SIX, **filters), warped(SIX, 1.0, filters))


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.75}], ids=str)
def test_the_end_of_a_vocabulary(filters):
    """Half of those six tokens lie behind the last whole block of a row, and of 1021 others none ever comes up."""
    logits = torch.cat([torch.full((1021,), -30.0), SIX])
    assert torch.equal(tokens_drawn(logits, **filters), warped(logits, 1.0, filters) & (logits >= 0.0))


def tokens_drawn(logits: Tensor, **filters: Any) -> Tensor:
    """Which tokens came up in a few rows of these logits, (V,) bool."""
    rows = logits.expand(cases.fewer(200, 12), -1)
    drawn = sample(rows, rows, seed=9, **filters)
    return torch.stack([drawn.token, drawn.draft_token]).flatten().bincount(minlength=logits.shape[0]) > 0


def warped(logits: Tensor, temperature: float, filters: dict[str, Any]) -> Tensor:
    transformers = pytest.importorskip("transformers")
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits.double()[None])
    warpers = {
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    for option, value in filters.items():
        scores = warpers[option](value)(None, scores)
    return scores[0] > -torch.inf


@pytest.mark.not_interpreted("it is of the definition")
@pytest.mark.served_by("reference")
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_definition_keeps_what_transformers_keeps(temperature):
    for seed in range(5):
        logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed), dtype=FP64) * 3
        for filters in FILTERS.values():
            chosen = NO_OPTIONS | filters
            kept = reference_sample.kept_tokens(
                logits[None] / temperature, chosen["top_k"], chosen["top_p"], chosen["min_p"]
            )
            assert torch.equal(kept[0], warped(logits, temperature, filters))


@pytest.mark.parametrize("criterion", [name for name in THRESHOLDS if name != "random"])
def test_criteria_are_their_formulas(exact, criterion):
    """Selected on one side of the float64 value and not on the other."""
    logits, base_logits = random_pair(6, 301, exact)
    options = {"criterion": criterion, "seed": 4}
    draft = sample(logits, base_logits, criterion="none", seed=4).token
    value = criterion_value(logits.double(), base_logits.double(), draft, criterion)
    slack = 64 * torch.finfo(exact).eps
    for row in range(6):
        one = slice(row, row + 1)
        for side in (-1, 1):
            threshold = value[row].item() + side * slack * max(1.0, abs(value[row].item()))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                drawn = sample(
                    logits[one], base_logits[one], threshold=threshold, row_id=torch.tensor([row]), **options
                )
            assert drawn.draft_token == draft[row]
            assert drawn.selected.item() == (side == (1 if criterion == "delta_logp" else -1))


@pytest.mark.filterwarnings("ignore:threshold is 0")
def test_inequalities_are_strict():
    logits, _ = random_pair(5, 100, FP32)
    for criterion in ("delta_logp", "kl", "reverse_kl", "avg_kl"):
        drawn = sample(logits, logits, criterion=criterion, threshold=0.0)
        assert not drawn.selected.any() and (drawn.delta_logp == 0).all()
    certain = torch.full((3, 100), -torch.inf).index_fill(1, torch.tensor([4]), 2.0)
    for criterion in ("entropy", "rl_entropy"):
        assert not sample(certain, certain, criterion=criterion, threshold=0.0).selected.any()
        assert sample(certain, certain, criterion=criterion, threshold=-1e-6).selected.all()


def test_random_criterion_is_strict_and_as_frequent_as_it_says():
    count = 40_000
    bits = reference_sample.noise_bits(
        torch.zeros(1).long(), torch.arange(count), torch.tensor([1]), torch.tensor([0]), RANDOM
    )
    u = (bits[:, 0].double() + 0.5) * 2.0**-32
    assert abs((u < 0.05).double().mean() - 0.05) < 4.5 * math.sqrt(0.05 * 0.95 / count)
    rows = torch.zeros(cases.fewer(count, 20), 3)
    for threshold in (0.05, 0.5):
        drawn = sample(rows, rows, criterion="random", threshold=threshold)
        assert torch.equal(drawn.selected, u[: rows.shape[0]] < threshold)
    options = {"criterion": "random", "row_id": torch.tensor([6])}
    assert not sample(rows[:1], rows[:1], threshold=u[6].item(), **options).selected
    assert sample(rows[:1], rows[:1], threshold=math.nextafter(u[6].item(), 1), **options).selected


def test_criterion_all_and_none():
    logits, base_logits = random_pair(cases.fewer(20, 8), 50, FP32)
    replaced, kept = (sample(logits, base_logits, criterion=criterion) for criterion in ("all", "none"))
    assert replaced.selected.all() and not kept.selected.any()
    assert torch.equal(kept.token, kept.draft_token) and torch.equal(replaced.draft_token, kept.draft_token)
    assert (replaced.token != replaced.draft_token).any()


def test_gamma_0_is_ordinary_sampling_from_the_rl_model():
    logits, base_logits = random_pair(cases.fewer(50, 6), 301, FP32)
    base_logits[: cases.fewer(10, 3), ::2] = -torch.inf
    plain = sample(logits, logits, gamma=0.0, top_p=0.9)
    assert torch.equal(sample(logits, base_logits, gamma=0.0, top_p=0.9).token, plain.token)


@pytest.mark.parametrize("gamma", [0.1, 5.0])
def test_impossible_tokens(exact, gamma):
    """−inf in z_R is never a replacement; −inf in z_B alone makes nothing infinite."""
    rows = cases.fewer(4000, 24)
    z, base_z = (x.expand(rows, -1) for x in random_pair(1, 40, exact))
    z, base_z = z.clone(), base_z.clone()
    z[:, :20] = -torch.inf
    base_z[:, 10:30] = -torch.inf
    drawn = sample(z, base_z, gamma=gamma)
    assert (drawn.token >= 20).all() and drawn.logp.isfinite().all()
    assert not ((drawn.draft_token >= 10) & (drawn.draft_token < 30)).any()
    assert (drawn.base_logp[drawn.token < 30] == -torch.inf).all() and not drawn.delta_logp.isnan().any()
    # z_R is random there, so some of the tokens that only the base excludes are likely.
    assert ((drawn.token >= 20) & (drawn.token < 30)).any()


def test_the_least_base_logit_may_be_the_last():
    """It stands in for −inf in z_B, here of token 3, which then is nearly always the replacement."""
    logits, base_logits = torch.zeros(2, 4, 1027)
    logits[:, -1], base_logits[:, -1], base_logits[:, 3] = -60.0, -20.0, -torch.inf
    assert (sample(logits, base_logits, gamma=1.0).token == 3).all()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"temperature": 0.6, "top_k": 9}], ids=str)
def test_a_row_does_not_depend_on_the_batch(options):
    logits, base_logits = random_pair(cases.fewer(33, 4), 1187, FP32)
    row_id = torch.arange(logits.shape[0]) * 1_000_003 % 2**32
    everything = sample(logits, base_logits, row_id=row_id, gamma=0.2, **options)
    order = torch.randperm(logits.shape[0])
    shuffled = sample(logits[order], base_logits[order], row_id=row_id[order], gamma=0.2, **options)
    assert_same_rows(Sample(*(value[order] for value in everything)), shuffled)
    for row in {0, 3, logits.shape[0] - 1}:
        one = slice(row, row + 1)
        alone = sample(logits[one], base_logits[one], row_id=row_id[one], gamma=0.2, **options)
        assert_same_rows(Sample(*(value[one] for value in everything)), alone)


@pytest.mark.cpu_only
@pytest.mark.not_interpreted("the interpreter has one program at a time")
def test_a_row_does_not_depend_on_the_number_of_threads():
    logits, base_logits = random_pair(7, 3000, FP32)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(sample(logits, base_logits, top_p=0.9))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_seed_step_and_row_id_are_what_the_noise_depends_on():
    rows = cases.fewer(64, 6)
    logits = torch.zeros(rows, 1000)
    first = sample(logits, logits, seed=5, step=3)
    assert torch.equal(first.token, sample(logits, logits, seed=5, step=3, row_id=torch.arange(rows)).token)
    for other in (
        {"seed": 6, "step": 3},
        {"seed": 5 + 2**32, "step": 3},
        {"seed": 5 + 2**63, "step": 3},
        {"seed": 5, "step": 4},
        {"seed": 5, "step": 3 + 2**31},
        {"seed": 5, "step": 3, "row_id": torch.arange(rows) + 64},
        {"seed": 5, "step": 3, "row_id": torch.arange(rows) + 2**31},
    ):
        drawn = sample(logits, logits, **other)
        for name in ("token", "draft_token"):
            equal = (getattr(drawn, name) == getattr(first, name)).sum()
            assert equal <= cases.fewer(3, 1), f"{other}: {equal} of {rows} tokens are the same"
    assert (first.token == first.draft_token).sum() <= cases.fewer(3, 1)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_seed_and_step_from_tensors(accuracy, seed):
    logits, base_logits = random_pair(cases.fewer(8, 2), 200, FP32)
    for step in (0, 17, 2**32 - 1):
        number = check_against_definition(accuracy, logits, base_logits, seed=seed, step=step)
        signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        tensors = sample(logits, base_logits, seed=signed, step=torch.tensor(step))
        assert all(torch.equal(x, y) for x, y in zip(number, tensors, strict=True))


def test_a_part_of_a_vocabulary_has_the_noise_of_the_whole():
    check_part_of_a_vocabulary(*cases.fewer((1025, 204, 903), (260, 100, 250)))


def _strided(x: Tensor) -> dict[str, Tensor]:
    wide = torch.full((x.shape[0], 2 * x.shape[1] + 3), torch.nan, dtype=x.dtype)
    wide[:, 1 : 1 + 2 * x.shape[1] : 2] = x
    padded = torch.full((2 * x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype)
    padded[::2, 3:-2] = x
    return {
        "every second column": wide[:, 1 : 1 + 2 * x.shape[1] : 2],
        "every second row, with gaps": padded[::2, 3:-2],
        "transposed": x.t().contiguous().t(),
    }


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_strides(dtype):
    logits, base_logits = random_pair(cases.fewer(6, 2), 301, dtype)
    options = {"gamma": 0.3, "top_p": 0.9, "temperature": 0.8}
    expected = sample(logits, base_logits, **options)
    for z in _strided(logits).values():
        for base_z in _strided(base_logits).values():
            drawn = sample(z, base_z, **options)
            assert all(torch.equal(x, y) for x, y in zip(drawn, expected, strict=True))


def test_expanded_rows():
    logits, base_logits = random_pair(1, 301, FP32)
    expected = sample(logits.repeat(9, 1), base_logits.repeat(9, 1))
    drawn = sample(logits.expand(9, -1), base_logits.expand(9, -1))
    assert all(torch.equal(x, y) for x, y in zip(drawn, expected, strict=True))
    assert drawn.token.unique().numel() > 1


def test_leading_dimensions():
    rows = cases.fewer(24, 12)
    logits, base_logits = random_pair(rows, 50, FP32)
    row_id = torch.randint(2**32, (rows,))
    flat = sample(logits, base_logits, row_id=row_id)
    shaped = sample(logits.view(2, 3, -1, 50), base_logits.view(2, 3, -1, 50), row_id=row_id.view(2, 3, -1))
    turned = [x.view(-1, 6, 50).transpose(0, 1) for x in (logits, base_logits)]
    swapped = sample(*turned, row_id=row_id.view(-1, 6).t())
    alone = sample(logits[3], base_logits[3], row_id=row_id[3])
    for value, whole, other, one in zip(flat, shaped, swapped, alone, strict=True):
        assert torch.equal(whole, value.view(2, 3, -1))
        assert torch.equal(other, value.view(-1, 6).t())
        assert one.shape == () and torch.equal(one, value[3])


@pytest.mark.parametrize("leading", [(0,), (3, 0)])
def test_no_rows(leading):
    logits = torch.empty(*leading, 50)
    drawn = sample(logits, logits)
    assert all(x.shape == leading for x in drawn)
    assert [x.dtype for x in drawn] == [torch.int64, torch.int64, torch.bool, FP32, FP32, FP32]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.7}, {"top_k": 3, "gamma": 0.5}], ids=str)
def test_bad_rows_give_minus_one_and_nan(options):
    """NaN, +inf or no finite logit, in either model, first, last or in the middle of a row; the others go on."""
    v = 301
    logits, base_logits = random_pair(12, v, FP32)
    expected = sample(logits, base_logits, **options)
    for x, rows in ((logits, (1, 2, 3, 4, 5)), (base_logits, (6, 7, 8, 9, 10))):
        x[rows[0], 0] = torch.nan
        x[rows[1], v - 1] = torch.nan
        x[rows[2], 150] = torch.inf
        x[rows[3]] = -torch.inf
        x[rows[4]] = torch.nan
    drawn = sample(logits, base_logits, **options)
    good = torch.tensor([0, 11])
    for value, other in zip(drawn, expected, strict=True):
        assert torch.equal(value[good], other[good])
    bad = slice(1, 11)
    assert (drawn.token[bad] == -1).all() and (drawn.draft_token[bad] == -1).all() and not drawn.selected[bad].any()
    assert all(x[bad].isnan().all() for x in drawn[3:])


def test_temperature_0_takes_the_first_maximum():
    z = torch.zeros(4, 700)
    z[0, [13, 64, 699]] = 5.0
    z[1, [0, 1]] = 2.0
    z[3, 128:] = -torch.inf
    z[3, 100] = 1e-30
    for options in ({}, {"top_k": 1}, {"top_p": 1e-6, "min_p": 1.0}, {"gamma": 0.7}):
        drawn = sample(z, z, temperature=0.0, **options)
        assert drawn.token.tolist() == drawn.draft_token.tolist() == [13, 0, 0, 100]


@pytest.mark.served_by("cpu", "triton", "cuda")
def test_huge_scores_stay_inside_the_vocabulary():
    """What overflows on the way to a score has no meaning; it must not be read out of bounds."""
    z = torch.full((3, 70), 3e38)
    z[1, ::2] = -3e38
    several = ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 60, "top_p": 0.5})
    for options in several[:: cases.fewer(1, 2)]:
        for temperature, gamma in ((1e-3, 0.0), (1.0, 3.0), (1e-3, 3.0)):
            drawn = sample(z, -z, temperature=temperature, gamma=gamma, **options)
            for token in (drawn.token, drawn.draft_token):
                assert ((token >= -1) & (token < 70)).all()


def both_draws(logits: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draft and replacement of a row, whose noise is independent."""
    drawn = sample(logits, logits, seed=seed, step=step)
    return drawn.token, drawn.draft_token


def check_frequencies(v: int, draws: int, seed: int) -> None:
    p = frequencies.p_value(both_draws, v, draws, seed, torch.device("cpu"))
    assert p > 1e-4, f"seed {seed}: chi-square has p = {p:.2g}"


@pytest.mark.not_interpreted("too many draws")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_frequencies(backend, seed):
    if is_definition(backend):
        return check_frequencies(500, 10_000, seed)
    check_frequencies(500, 400_000, seed)
    check_frequencies(QWEN, 10_000, seed)


@pytest.mark.slow
@pytest.mark.not_interpreted("too many draws")
@pytest.mark.served_by("cpu", "triton", "cuda")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_frequencies_of_a_million_draws_over_a_whole_vocabulary(seed):
    check_frequencies(QWEN, 1_000_000, seed)


@pytest.mark.not_interpreted("too many draws")
def test_draft_and_replacement_are_independent():
    logits = torch.arange(8) / 4
    probability = logits.double().softmax(-1)
    rows = logits.expand(100_000, -1)
    drawn = sample(rows, rows, seed=8)
    observed = (8 * drawn.draft_token + drawn.token).bincount(minlength=64)
    expected = (probability[:, None] * probability).flatten() * rows.shape[0]
    assert frequencies.chi_square_p(observed.double(), expected) > 1e-4


@pytest.mark.not_interpreted("too many draws")
@pytest.mark.served_by("cpu", "triton", "cuda")
@pytest.mark.parametrize("rare", [1e-8, pytest.param(1e-9, marks=pytest.mark.slow)])
def test_tail_tokens_come_at_their_rate(rare):
    """100 000 tokens of this probability each, behind one that has nearly all of it (vLLM #43150)."""
    batches = 5 if rare == 1e-8 else 25
    found, expected = frequencies.tail(both_draws, rare, 100_000, 4000, batches, 10, torch.device("cpu"))
    assert abs(found.numel() - expected) < 4.5 * math.sqrt(expected), f"{found.numel()} of {expected:.1f} expected"
    assert found.unique().numel() >= found.numel() - 1


def test_improbable_tokens_are_never_drawn():
    """A probability of e⁻⁸⁰ is 0 for every purpose; −inf is 0 exactly (pytorch #192577)."""
    v = cases.fewer(20_000, 1000)
    logits = torch.full((v,), -80.0)
    logits[::2] = -torch.inf
    logits[77] = 0.0
    rows = logits.expand(cases.fewer(100, 5), -1)
    drawn = sample(rows, rows)
    assert (drawn.token == 77).all() and (drawn.draft_token == 77).all()


def _op_arguments(dtype: torch.dtype, tensors: bool) -> list[Any]:
    """Every argument of the op in order; optional ones given, or None."""
    rows = cases.fewer(6, 2)
    logits, base_logits = (x.to(cases.DEVICE) for x in random_pair(rows, 31, dtype))
    row_id = torch.arange(rows, device=cases.DEVICE) + 3 if tensors else None
    counters = [torch.tensor([x], device=cases.DEVICE) if tensors else None for x in (5, 2)]
    criterion, threshold = ("delta_logp", -0.1) if tensors else ("all", None)
    return [
        logits, base_logits, row_id, 5, 2, *counters, 4, 0.3, criterion, threshold, "rl", 0.7, 10, 0.9, 0.01
    ]  # fmt: skip


@pytest.mark.parametrize("tensors", [True, False], ids=["every optional argument", "no optional argument"])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_opcheck(dtype, tensors):
    torch.library.opcheck(torch.ops.dlogp.extrapolated_sample.default, _op_arguments(dtype, tensors))
    assert "extrapolated_sample" in schemas.SCHEMAS


@pytest.mark.around_launchers
@pytest.mark.parametrize("criterion", ["all", "delta_logp"])
def test_compiles_whole_and_not_again_for_other_numbers_of_rows(criterion, counter):
    options = criterion_options(criterion) | {"gamma": 0.1, "temperature": 0.7, "top_p": 0.9}

    def draw(logits, base_logits, seed):
        return tuple(dlogp_kernels.extrapolated_sample(logits, base_logits, seed=seed, **options))

    compiled = torch.compile(draw, backend=counter, fullgraph=True)
    for n in (5, 9, 17, 40, 3):
        pair = [x.to(cases.DEVICE) for x in random_pair(n, 31, FP32)]
        seed = torch.tensor([n], device=cases.DEVICE)
        for value, other in zip(compiled(*pair, seed), draw(*pair, seed), strict=True):
            assert torch.equal(value, other)
        assert counter.frame_count <= 2, f"compiled again for N = {n}"


def test_inputs_are_not_modified_and_no_gradient_is_attached():
    logits, base_logits = random_pair(5, 100, FP32)
    before = logits.clone(), base_logits.clone()
    drawn = sample(logits.requires_grad_(), base_logits.requires_grad_(), gamma=0.2, top_p=0.8)
    assert torch.equal(logits, before[0]) and torch.equal(base_logits, before[1])
    assert not any(x.requires_grad for x in drawn)


def test_smallest_workspace_draws_the_same():
    logits, base_logits = random_pair(cases.fewer(40, 3), 1187, FP32)
    expected = sample(logits, base_logits, top_p=0.9)
    with backends.workspace_limit(2**20):
        drawn = sample(logits, base_logits, top_p=0.9)
    assert_same_rows(drawn, expected)


_WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other vocabulary": (
        {"base_logits": torch.zeros(4, 9)},
        ValueError,
        r"base_logits has shape \(4, 9\).*\(4, 10\)",
    ),
    "not a tensor": ({"logits": [1.0]}, TypeError, "logits is list"),
    "integers": ({"base_logits": torch.zeros(4, 10).long()}, TypeError, "base_logits has dtype torch.int64"),
    "no vocabulary": ({"logits": torch.zeros(4, 0)}, ValueError, r"logits has shape \(4, 0\)"),
    "criterion": ({"criterion": "surprise"}, ValueError, "criterion is 'surprise', expected one of delta_logp"),
    "threshold missing": ({"criterion": "kl"}, ValueError, "threshold is None, expected a number: .*'kl'"),
    "threshold too much": ({"threshold": 0.1}, ValueError, "threshold is 0.1, expected None: .*'all'"),
    "threshold nan": ({"criterion": "kl", "threshold": math.nan}, ValueError, "threshold is nan"),
    "threshold text": ({"criterion": "kl", "threshold": "0.1"}, TypeError, "threshold is '0.1'"),
    "draft": ({"draft": "policy"}, ValueError, "draft is 'policy', expected one of base, rl"),
    "gamma": ({"gamma": -0.1}, ValueError, r"gamma is -0.1, expected a number in \[0, ∞\)"),
    "gamma infinite": ({"gamma": math.inf}, ValueError, "gamma is inf"),
    "gamma type": ({"gamma": "much"}, TypeError, "gamma is 'much'"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
    "top_p 0": ({"top_p": 0.0}, ValueError, r"top_p is 0.0, expected a number in \(0, 1\]"),
    "top_p 1.1": ({"top_p": 1.1}, ValueError, "top_p is 1.1"),
    "min_p": ({"min_p": 1.5}, ValueError, r"min_p is 1.5, expected a number in \[0, 1\]"),
    "top_k": ({"top_k": -1}, ValueError, "top_k is -1"),
    "top_k float": ({"top_k": 5.0}, TypeError, "top_k is 5.0, expected an integer"),
    "seed": ({"seed": 2**64}, ValueError, r"seed is 18446744073709551616, expected an integer in \[0, 2\*\*64\)"),
    "seed negative": ({"seed": -1}, ValueError, "seed is -1"),
    "seed bool": ({"seed": True}, TypeError, "seed is True"),
    "seed tensor": ({"seed": torch.zeros(2).long()}, ValueError, r"seed has dtype torch.int64 and shape \(2,\)"),
    "step": ({"step": 2**32}, ValueError, "step is 4294967296"),
    "step tensor": ({"step": torch.zeros(1)}, ValueError, "step has dtype torch.float32"),
    "row_id shape": ({"row_id": torch.zeros(5).long()}, ValueError, r"row_id has shape \(5,\), expected \(4,\)"),
    "row_id dtype": ({"row_id": torch.zeros(4)}, TypeError, "row_id has dtype torch.float32"),
}


@pytest.mark.not_interpreted("of what is in front of the backends")
@pytest.mark.parametrize("name", _WRONG)
def test_what_does_not_fit_is_refused_by_name(name):
    changed, error, message = _WRONG[name]
    arguments = {"logits": torch.zeros(4, 10), "base_logits": torch.zeros(4, 10), "seed": 1} | changed
    with pytest.raises(error, match=f"^{message}"):
        dlogp_kernels.extrapolated_sample(**arguments)


def test_a_step_for_every_row():
    logits, base_logits = random_pair(6, 301, FP32)
    steps, row_id = torch.tensor([5, 0, 2**32 - 1, 7, 7, 1]), torch.arange(6) + 9
    drawn = sample(logits, base_logits, step=steps, row_id=row_id, gamma=0.1)
    for row in range(6):
        one = slice(row, row + 1)
        alone = sample(logits[one], base_logits[one], step=int(steps[row]), row_id=row_id[one], gamma=0.1)
        assert_same_rows(Sample(*(x[one] for x in drawn)), alone)


def test_seed_has_no_default():
    with pytest.raises(TypeError, match="seed"):
        dlogp_kernels.extrapolated_sample(torch.zeros(4, 10), torch.zeros(4, 10))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_a_threshold_of_delta_logp_that_is_not_negative_warns(threshold):
    logits, base_logits = random_pair(4, 10, FP32)
    with pytest.warns(UserWarning, match=f"threshold is {threshold}.*replaces nearly every token"):
        sample(logits, base_logits, criterion="delta_logp", threshold=threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(logits, base_logits, criterion="delta_logp", threshold=-0.1)
        sample(logits, base_logits, criterion="kl", threshold=0.3)
