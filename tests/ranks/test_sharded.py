"""The linear functions over a vocabulary that the ranks of a gloo group share, against float64 truth."""

import itertools

import cases
import linear_policy_cases
import pytest
import sharded_cases
import torch
from cases import ALL_OPTIONS, LINEAR_OPS, make_inputs, options_for, upstream_of
from ranks import Ranks
from sharded_cases import Sharding, alike
from tolerances import CERTAINTY_ERROR, MEMORY_MIB, ZERO_KL_ROUNDINGS, Accuracy

import dlogp_kernels
from dlogp_kernels.reference import policy as reference_policy
from dlogp_kernels.reference.sampling import CRITERIA, WITH_STATISTICS

BF16, FP16, FP32, FP64 = cases.DTYPES
V = 301
#: That hold in some rows of pair_without_biases.
THRESHOLDS = {
    "delta_logp": -0.1, "kl": 0.2, "reverse_kl": 0.2, "avg_kl": 0.2, "entropy": 4.0, "rl_entropy": 4.0, "random": 0.4,
}  # fmt: skip
#: By number of ranks: shards of any size, also none.
STARTS = {1: (0, V), 2: (0, 250, V), 3: (0, 0, 1, V), 4: (0, 100, 100, 297, V)}
#: Where the noise of a shard can begin.
BY_FOURS = {2: (0, 252, V), 4: (0, 100, 100, 296, V)}
OTHER_STARTS = {2: (0, 7, V), 4: (0, 150, 200, 298, V)}


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture
def accuracy(record_property):
    return Accuracy(lambda *_: None)


def same_bits(x, y):
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def statistics(ranks, op, inputs, sharding, size, upstream=None, backend=None, workspace=2**28, **options):
    """The same bits on all ranks, and gradients by whole inputs."""
    arguments = op, inputs, sharding, upstream, options, backend, workspace
    found = ranks.values(sharded_cases.statistics, *arguments, size=size)
    for other in found[1:]:
        assert all(map(same_bits, found[0].stats, other.stats))
    kind = dlogp_kernels.LogpStats if op == "linear_logp" else dlogp_kernels.DeltaLogpStats
    fields = kind._fields if options.get("top") else [x for x in kind._fields if x not in kind._field_defaults]
    stats = cases.asked_for(kind(**dict(zip(fields, found[0].stats, strict=True))))
    return stats, joined([x.gradients for x in found], sharding)


def joined(gradients, sharding):
    """Of whole inputs: those by shards one after the other, and the rest with the same bits on all ranks."""
    whole = {}
    for name, first in gradients[0].items():
        if sharding.starts_of(name) is not None:
            whole[name] = torch.cat([grads[name] for grads in gradients])
        else:
            assert all(same_bits(first, grads[name]) for grads in gradients)
            whole[name] = first
    return whole


def check_against_truth(accuracy, ranks, op, inputs, sharding, size, backend=None, workspace=2**28, **options):
    upstream = upstream_of(cases.truth(op, inputs, **options))
    stats, gradients = statistics(ranks, op, inputs, sharding, size, upstream, backend, workspace, **options)
    cases.check_statistics(accuracy, op, inputs, stats, **options)
    cases.check_gradients(accuracy, op, inputs, upstream, gradients, **options)
    return stats


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["defaults", "all"])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_statistics_and_gradients(accuracy, ranks, op, size, dtype, options):
    inputs = make_inputs(op, 33, k=2, dtype=dtype)
    inputs["target"][3] = -100
    inputs["target"][4, 1] = -100
    check_against_truth(accuracy, ranks, op, inputs, alike(STARTS[size]), size, **options_for(op, options), top=True)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_other_numbers_of_ranks_without_a_bias(accuracy, ranks, op, size):
    inputs = make_inputs(op, (3, 5), bias=False)
    check_against_truth(accuracy, ranks, op, inputs, alike(STARTS[size]), size)


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_plain_pytorch_on_each_rank(accuracy, ranks, op):
    check_against_truth(accuracy, ranks, op, make_inputs(op), alike(STARTS[4]), 4, backend="reference")


@pytest.mark.parametrize("size", [3, 4])
def test_gradients_are_added_in_blocks(accuracy, ranks, size):
    """153 600 numbers by hidden states, of which a workspace of 1 MiB holds 65 535 at a time."""
    inputs = make_inputs("linear_logp", 300, v=V, d=512, bias=False)
    check_against_truth(accuracy, ranks, "linear_logp", inputs, alike(STARTS[size]), size, workspace=2**20)


def test_sums_over_ranks_are_rounded_once(ranks):
    """In bfloat16 256 + 1 is 256."""
    of_ranks = [torch.full((11, 3), value, dtype=BF16) for value in (256.0, 1.0, 1.0, 1.0)]
    of_ranks[1][7] = 3.0
    expected, starts = sum(x.float() for x in of_ranks).to(BF16), (0, 4, 4, 10, 11)
    for rank, (total, rows) in enumerate(ranks.values(sharded_cases.sums, of_ranks, starts)):
        assert torch.equal(total, expected) and torch.equal(rows, expected[starts[rank] : starts[rank + 1]])


def test_equal_models_do_not_diverge(ranks):
    inputs = make_inputs("linear_delta_logp")
    for name in ("hidden", "weight", "bias"):
        inputs[f"base_{name}"] = inputs[name].clone()
    stats, _ = statistics(ranks, "linear_delta_logp", inputs, alike(STARTS[4]), 4)
    assert (stats.delta_logp == 0).all()
    for kl in (stats.kl, stats.reverse_kl):
        assert (kl >= 0).all() and (kl <= ZERO_KL_ROUNDINGS * torch.finfo(torch.float32).eps * 10.0).all()


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_ignore_index_may_be_a_token_of_a_shard(accuracy, ranks, op):
    """One that two ranks have, counted from their first tokens."""
    inputs = make_inputs(op, 40, k=3)
    inputs["target"][::3] = 5
    inputs["target"][1::3, 0] = 105
    check_against_truth(accuracy, ranks, op, inputs, alike(STARTS[4]), 4, ignore_index=5, top=True)


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_a_batch_without_a_token_that_counts(ranks, op):
    inputs = make_inputs(op, 4)
    inputs["target"][:] = -100
    inputs["hidden"][:] = torch.nan
    upstream = upstream_of(cases.truth(op, inputs, top=True))
    stats, gradients = statistics(ranks, op, inputs, alike(STARTS[2]), 2, upstream, top=True)
    for name, value in stats._asdict().items():
        assert (value == (-1 if name.endswith("token") else 0)).all(), name
    assert all((grad == 0).all() for grad in gradients.values())
    empty, _ = statistics(ranks, op, make_inputs(op, 0), alike(STARTS[2]), 2)
    assert empty.logp.shape == (0,)


@pytest.mark.parametrize("base", ["elsewhere", "whole", "sharded"])
@pytest.mark.parametrize("size", [2, 4])
def test_models_that_are_parted_otherwise(accuracy, ranks, size, base):
    """Whichever model lies otherwise, its rows are moved and its gradient comes back complete."""
    starts = {"elsewhere": OTHER_STARTS[size], "whole": None, "sharded": STARTS[size]}[base]
    sharding = Sharding(None if base == "sharded" else STARTS[size], starts)
    check_against_truth(accuracy, ranks, "linear_delta_logp", make_inputs("linear_delta_logp"), sharding, size)


@pytest.mark.parametrize("whole_base", [False, True])
def test_padding_is_left_out(accuracy, ranks, whole_base):
    """A vocabulary of 301 in shards of 100: rows of weights beyond it do not count, and have no gradient."""
    op = "linear_delta_logp"
    inputs, padded = make_inputs(op), make_inputs(op, v=400)
    for name in ("weight", "bias", "base_weight", "base_bias"):
        padded[name][:V] = inputs[name]
        padded[name][V:] = 50.0
    padded |= {name: x for name, x in inputs.items() if name == "target" or name.endswith("hidden")}
    starts = (0, 100, 200, 300, 400)
    sharding = Sharding(starts, None if whole_base else starts, vocab_size=V, says_start=True)
    upstream = upstream_of(cases.truth(op, inputs, top=True))
    stats, gradients = statistics(ranks, op, padded, sharding, 4, upstream, top=True)
    cases.check_statistics(accuracy, op, inputs, stats, top=True)
    for name in ("weight", "bias", "base_weight", "base_bias"):
        assert gradients[name].shape == padded[name].shape and (gradients[name][V:] == 0).all()
        gradients[name] = gradients[name][:V]
    cases.check_gradients(accuracy, op, inputs, upstream, gradients, top=True)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_near_certainty(ranks, dtype):
    """log p of a token that is nearly sure, beside others on the same and on other ranks, is that of 1 − p."""
    gaps = torch.tensor([1.0, 5.0, 20.0, 40.0, 43.0])
    logits = torch.zeros(len(gaps), V, dtype=torch.float64)
    for row, (gap, sure) in enumerate(zip(gaps, (0, 99, 100, 250, 300), strict=True)):
        logits[row] = torch.linspace(-1.0, 0.0, V) - gap
        logits[row, sure] = 0.0
    target = torch.tensor([0, 99, 100, 250, 300])
    inputs = cases.from_logits("linear_logp", logits, logits, target, dtype)
    stats, _ = statistics(ranks, "linear_logp", inputs, alike(STARTS[4]), 4, top=True)
    truth = cases.truth("linear_logp", inputs).logp
    assert ((stats.logp - truth) / truth).abs().max() < CERTAINTY_ERROR[dtype]
    assert torch.equal(stats.top_logp, stats.logp) and torch.equal(stats.top_token, target)


@pytest.mark.parametrize("on_ranks", [None, "reference"])
def test_tokens_of_which_a_model_has_none(accuracy, ranks, on_ranks):
    """Masked shards of one model, of the other, of both, and tokens that only one has."""
    op, (first, *_, last) = "linear_delta_logp", (slice(0, 100), slice(100, 297), slice(297, V))
    for masked, base_masked in ((first, last), (first, first), (last, slice(0, 0)), (slice(50, 299), slice(60, 61))):
        inputs = make_inputs(op)
        inputs["bias"][masked] = -torch.inf
        inputs["base_bias"][base_masked] = -torch.inf
        inputs["target"] = torch.arange(17) * 18
        stats, _ = statistics(ranks, op, inputs, alike(STARTS[4]), 4, backend=on_ranks, top=True)
        cases.check_statistics(accuracy, op, inputs, stats, top=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_what_is_not_a_number_is_seen_on_every_rank(ranks, op, value):
    """As without a group: NaN in a shard is in no other number lost, whoever has the target."""
    inputs = make_inputs(op, 6)
    inputs["bias"][298] = value
    stats, _ = statistics(ranks, op, inputs, alike(STARTS[4]), 4, top=True)
    whole = cases.call(op, inputs, top=True)
    for name, x in stats._asdict().items():
        torch.testing.assert_close(x, getattr(whole, name), equal_nan=True, msg=name)


def test_all_tokens_masked(ranks):
    inputs = make_inputs("linear_logp", 3)
    inputs["bias"][:] = -torch.inf
    stats, _ = statistics(ranks, "linear_logp", inputs, alike(STARTS[2]), 2, top=True)
    assert stats.logp.isnan().all() and stats.entropy.isnan().all() and (stats.top_token == -1).all()


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_equal_logits_go_to_the_first_token(ranks, op):
    inputs = make_inputs(op, 4)
    inputs["weight"][:] = 0.0
    inputs["bias"][:] = 0.0
    inputs["bias"][[98, 260, 299]] = 2.0
    stats, _ = statistics(ranks, op, inputs, alike(STARTS[4]), 4, top=True)
    assert (stats.top_token == 98).all()


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_bits_do_not_depend_on_the_run_or_on_other_rows(ranks, op):
    inputs = make_inputs(op, 67, v=1003, d=40)
    starts, upstream = (0, 300, 300, 900, 1003), upstream_of(cases.truth(op, inputs, top=True))
    stats, gradients = statistics(ranks, op, inputs, alike(starts), 4, upstream, top=True)
    again = statistics(ranks, op, inputs, alike(starts), 4, upstream, top=True)
    assert all(map(same_bits, stats, again[0]))
    assert all(same_bits(x, again[1][name]) for name, x in gradients.items())
    some = {name: x[5:18] if x.shape[0] == 67 else x for name, x in inputs.items()}
    few, few_gradients = statistics(
        ranks, op, some, alike(starts), 4, [grad if grad is None else grad[5:18] for grad in upstream], top=True
    )
    assert all(same_bits(x[5:18], y) for x, y in zip(stats, few, strict=True))
    assert same_bits(gradients["hidden"][5:18], few_gradients["hidden"])


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_policy_loss(accuracy, ranks, size, base, importance):
    inputs = linear_policy_cases.make_inputs(base=base)
    options = {"importance": importance, "reweight": "ppl", "kl_beta": 0.3, "entropy_coef": 0.2}
    sharding = Sharding(STARTS[size], None if size == 2 else STARTS[size])
    found = ranks.values(sharded_cases.policy_loss, inputs, sharding, options, size=size)
    assert all(same_bits(x.loss[None], found[0].loss[None]) for x in found)
    whole = found[0]._replace(gradients=joined([x.gradients for x in found], sharding))
    linear_policy_cases.check(accuracy, inputs, whole, **options)


def test_the_loss_has_the_dtype_of_the_model(ranks):
    """Whatever that of what is known of its tokens, as on one device."""
    inputs = linear_policy_cases.make_inputs()
    inputs |= {name: inputs[name].double() for name in ("old_logp", "advantage", "token_weight", "ref_logp")}
    options = {"num_tokens": 7.0, "kl_beta": 0.3}
    expected = linear_policy_cases.call(inputs, **options)
    for found in ranks.values(sharded_cases.policy_loss, inputs, alike(STARTS[2]), options, size=2):
        assert found.loss.dtype == expected.loss.dtype == FP32
        torch.testing.assert_close(found.loss, expected.loss)


def pair_without_biases(dtype=FP32, rows=40):
    """Two models near one another, so that a criterion sometimes holds."""
    inputs = make_inputs("linear_delta_logp", rows, dtype=dtype, bias=False)
    del inputs["target"]
    for name in ("hidden", "weight"):
        x = inputs[name].double()
        inputs[f"base_{name}"] = (x + 0.2 * torch.randn(x.shape, dtype=FP64) * x.std()).to(dtype)
    return inputs


def draws(ranks, inputs, sharding, calls, size, workspace=2**28, backend=None):
    """Of each call, with the same bits on all ranks, and bytes a row of what a rank told of its winners."""
    found = ranks.values(sharded_cases.samples, inputs, sharding, calls, workspace, backend, size=size)
    for of_ranks in zip(*found, strict=True):
        for other in of_ranks[1:]:
            assert all(map(same_bits, of_ranks[0].sample, other.sample)) and of_ranks[0].told == other.told
    rows = max(1, inputs["hidden"].shape[:-1].numel())
    return [dlogp_kernels.Sample(*x.sample) for x in found[0]], [sum(x.told) // rows for x in found[0]]


def check_draws(drawn, inputs, calls):
    """Those of the op over the whole vocabulary."""
    for found, options in zip(drawn, calls, strict=True):
        whole = dlogp_kernels.linear_extrapolated_sample(**inputs, **options)
        for name, x, y in zip(whole._fields, found, whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True, msg=f"{name}, {options}")


@pytest.mark.parametrize(("size", "dtype"), [(2, FP32), (4, FP32), (4, BF16), (4, FP64)], ids=str)
def test_draws_by_the_winners_of_shards(ranks, size, dtype):
    """64 bytes a row, with the statistics of some criteria 96."""
    inputs = pair_without_biases(dtype, (4, 10))
    turns = itertools.cycle((("base", 0.0, 1.0), ("rl", 0.5, 0.7), ("base", 0.3, 0.0), ("rl", 2.0, 1.0)))
    calls = [
        {"criterion": criterion, "threshold": THRESHOLDS.get(criterion), "seed": 2**63 + 1, "step": 3}
        | dict(zip(("draft", "gamma", "temperature"), next(turns), strict=True))
        for criterion in CRITERIA
    ]
    of_rows = {"seed": torch.tensor(-7), "step": torch.arange(40).view(4, 10), "row_id": torch.arange(40).view(4, 10)}
    calls += [of_rows | {"gamma": 0.3, "softcap": 6.0, "base_softcap": 4.0, "logit_scale": 1.3}]
    drawn, told = draws(ranks, inputs, alike(BY_FOURS[size]), calls, size)
    check_draws(drawn, inputs, calls)
    assert told == [96 if x.get("criterion") in WITH_STATISTICS else 64 for x in calls]
    assert all(0 < x.selected.sum() < 40 for x, options in zip(drawn, calls, strict=True) if options.get("threshold"))


@pytest.mark.parametrize("size", [2, 4])
def test_draws_that_need_logits_gather_them(ranks, size):
    """Filters; a bias, which may mask whole shards; shards that do not begin where noise does."""
    inputs, options = make_inputs("linear_delta_logp", (4, 16)), {"seed": 3, "gamma": 0.5}
    del inputs["target"]
    inputs["bias"][250:] = inputs["base_bias"][:100] = -torch.inf
    filters = ({"top_p": 0.7, "criterion": "kl", "threshold": 0.3}, {"top_k": 5}, {"min_p": 0.1, "draft": "rl"})
    calls = [options | x for x in ({}, *filters)]
    for workspace in (2**28, 2**20):
        drawn, told = draws(ranks, inputs, Sharding(STARTS[size], OTHER_STARTS[size]), calls, size, workspace)
        check_draws(drawn, inputs, calls)
        assert not any(told)
    inputs = pair_without_biases()
    drawn, told = draws(ranks, inputs, alike(STARTS[size]), [options], size)
    check_draws(drawn, inputs, [options])
    assert told == [0]


def test_draws_do_not_depend_on_the_run_or_on_other_rows(ranks):
    inputs, starts = pair_without_biases(rows=300), alike(BY_FOURS[4])
    options = {"seed": 3, "gamma": 0.5, "criterion": "kl", "threshold": THRESHOLDS["kl"]}
    [drawn], _ = draws(ranks, inputs, starts, [options | {"row_id": torch.arange(300)}], 4)
    [again], _ = draws(ranks, inputs, starts, [options], 4, workspace=2**20)
    assert all(map(same_bits, drawn, again))
    some = inputs | {name: inputs[name][5:18] for name in ("hidden", "base_hidden")}
    [few], _ = draws(ranks, some, starts, [options | {"row_id": torch.arange(5, 18)}], 4)
    assert all(same_bits(x[5:18], y) for x, y in zip(drawn, few, strict=True))
    none = inputs | {name: inputs[name][:0] for name in ("hidden", "base_hidden")}
    assert draws(ranks, none, starts, [options], 4)[0][0].token.shape == (0,)


@pytest.mark.parametrize("on_ranks", [None, "reference"])
@pytest.mark.parametrize("name", ["weight", "base_weight"])
def test_rows_without_a_draw_have_none_on_any_rank(ranks, name, on_ranks):
    """NaN in a row, and in one shard an infinite logit of every second row."""
    inputs = pair_without_biases()
    inputs["hidden"][3, 2] = torch.nan
    hidden = inputs[name.replace("weight", "hidden")]
    hidden[:, 0] = torch.tensor([10.0, 0.0]).repeat(20)
    inputs[name][298, 0] = 3e38
    calls = [{"seed": 3, "gamma": 0.5}, {"seed": 3, "criterion": "kl", "threshold": 0.1}]
    drawn, _ = draws(ranks, inputs, alike(BY_FOURS[4]), calls, 4, backend=on_ranks)
    check_draws(drawn, inputs, calls)
    bad = (torch.arange(40) % 2 == 0) | (torch.arange(40) == 3)
    assert all(torch.equal(x.token == -1, bad) and not x.selected[bad].any() for x in drawn)


def test_equal_logits_are_drawn_as_the_first_token(ranks):
    inputs = pair_without_biases()
    inputs["weight"][[98, 260, 299]] = inputs["base_weight"][[98, 260, 299]] = 0.0
    inputs["weight"], inputs["base_weight"] = (-inputs[name].abs() for name in ("weight", "base_weight"))
    inputs["hidden"], inputs["base_hidden"] = (inputs[name].abs() for name in ("hidden", "base_hidden"))
    calls = [{"seed": 1, "temperature": 0.0, "gamma": gamma, "draft": "rl"} for gamma in (0.0, 0.5)]
    drawn, told = draws(ranks, inputs, alike(BY_FOURS[4]), calls, 4)
    assert all((x.draft_token == 98).all() for x in drawn) and (drawn[0].token == 98).all() and all(told)
    check_draws(drawn, inputs, calls)


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_errors_are_those_of_a_whole_vocabulary_and_little_more(ranks, op):
    """At most 1.5 times those, in the mean square: a token's log p is rounded by its rank, and at the end."""
    inputs, sharding = make_inputs(op, 1024, v=8001, d=64, dtype=BF16), alike((0, 4000, 8001))
    truth, whole = cases.truth(op, inputs), cases.call(op, inputs)
    found, _ = statistics(ranks, op, inputs, sharding, 2)
    for name, exact in truth._asdict().items():
        of_whole, of_shards = ((getattr(x, name) - exact).square().mean().sqrt() for x in (whole, found))
        assert of_shards <= 1.5 * of_whole, name


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_bytes_of_a_token(ranks, op):
    """In float32, of one candidate: at most 64 a model."""
    inputs = make_inputs(op, 1000, v=50)
    sent = ranks.values(sharded_cases.bytes_gathered, op, inputs, alike((0, 25, 50)), size=2)
    assert sent == [{"linear_logp": 20_000, "linear_delta_logp": 48_000}[op]] * 2


def test_memory_of_a_rank(ranks):
    """Its shard is an input, and beside that there is the workspace; logits of its shard would be 1 GiB."""
    n, v, d = 4096, 131072, 16
    inputs = {"hidden": torch.randn(n, d), "weight": torch.randn(v, d), "target": torch.randint(v, (n,))}
    for peak in ranks.values(sharded_cases.peak_mib, "linear_logp", inputs, alike((0, v // 2, v)), 0, size=2):
        assert peak < MEMORY_MIB["cpu"][1]


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_compiles_whole(ranks, op):
    batches = [(make_inputs(op, n), alike(STARTS[2]), 1.0) for n in (5, 9, 40)]
    for count in ranks.values(sharded_cases.compiled, op, batches, size=2):
        assert count <= 2


@pytest.mark.parametrize("op", [*LINEAR_OPS, "linear_policy_loss"])
def test_compiles_for_other_vocabularies_and_options(ranks, op):
    def make(v):
        return linear_policy_cases.make_inputs(v=v) if op == "linear_policy_loss" else make_inputs(op, v=v)

    cuts = ((30, 1.0), (36, 1.0), (42, 0.5), (48, 0.7), (30, 2.0))
    batches = [(make(v), alike((0, v // 3, v)), temperature) for v, temperature in cuts]
    ranks.values(sharded_cases.compiled, op, batches, size=2)


def test_ops_are_registered_right(ranks):
    [found] = ranks.values(sharded_cases.checked_ops, size=1)
    assert len(found) == 8 and set().union(*found.values()) == {"SUCCESS"}


def test_second_derivatives_raise(ranks):
    inputs = make_inputs("linear_logp")
    for error in ranks(sharded_cases.second_derivative, "linear_logp", inputs, alike(STARTS[2]), size=2):
        assert isinstance(error, RuntimeError) and "has no second derivative" in str(error)
