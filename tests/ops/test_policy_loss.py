"""`policy_loss` of every backend: every option against float64, bad input, layouts, and what PyTorch asks of an op."""

import itertools

import cases
import pytest
import torch
from cases import fewer
from policy_cases import (
    ALL_EXTRAS,
    EXTRAS,
    call,
    check_against_truth,
    cut,
    make_inputs,
    pack,
    truth,
    with_kl,
    without_extras,
)
from same_bits import assert_same_policy

import dlogp_kernels
from dlogp_kernels import backends, policy_checks
from dlogp_kernels.reference import policy as reference_policy
from dlogp_kernels.reference.policy import PolicyOptions
from dlogp_kernels.results import PolicyMetrics

pytestmark = pytest.mark.usefixtures("backend")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LENGTHS = [37, 20, 5, 0, 1]


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
@pytest.mark.parametrize("loss_type", reference_policy.LOSS_TYPES)
def test_loss_types(accuracy, loss_type, importance):
    inputs = make_inputs()
    for dual_clip, extras in ((None, {}), (1.2, ALL_EXTRAS)):
        options = {"loss_type": loss_type, "importance": importance, "dual_clip": dual_clip, **extras}
        check_against_truth(accuracy, inputs if extras else without_extras(inputs), upstream=-2.5, **options)


@pytest.mark.parametrize("sign", reference_policy.REWEIGHT_SIGNS)
@pytest.mark.parametrize("reweight", reference_policy.REWEIGHTS)
def test_reweights(accuracy, reweight, sign):
    inputs = make_inputs(7)
    result = check_against_truth(accuracy, inputs, reweight=reweight, reweight_sign=sign, alpha=0.7)
    weight = dict(zip(PolicyMetrics._fields, result.metrics, strict=True))["mean_weight"]
    assert (abs(weight - 1.0) > 1e-3) == (reweight != "none")


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_optional_argument(accuracy, extra):
    inputs = with_kl(make_inputs()) if extra == "kl" else make_inputs()
    check_against_truth(accuracy, without_extras(inputs) | {extra: inputs[extra]}, **EXTRAS[extra])


def test_an_exact_divergence(accuracy):
    """Instead of ref_logp, with a gradient of its own."""
    inputs = with_kl(make_inputs())
    for given in (inputs, pack(inputs, LENGTHS)):
        result = check_against_truth(accuracy, given, importance="sequence", **ALL_EXTRAS)
        assert set(result.gradients) == {"logp", "entropy", "kl"}


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo"])
def test_options_have_their_effect(accuracy, loss_type):
    """Against the definition, where another value gives another loss."""
    inputs, losses = make_inputs(), []
    for options in (
        {"clip_low": 0.05, "clip_high": 0.9},
        {"clip_low": 0.4, "clip_high": 0.0},
        {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0, "clip_high": 5.0},
    ):
        losses.append(check_against_truth(accuracy, inputs, loss_type=loss_type, **options).loss.item())
    assert len(set(losses)) >= (3 if loss_type == "dapo" else 2)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_dtypes(accuracy, dtype):
    if dtype == FP64 and backends.unavailable(backends.select("policy_loss_fwd", cases.DEVICE), "policy_loss_fwd",
                                              cases.DEVICE, dtype):  # fmt: skip
        pytest.skip("no float64 kernels")
    check_against_truth(accuracy, make_inputs(dtype=dtype), **ALL_EXTRAS)
    mixed = make_inputs(dtype=FP32) | {"old_logp": make_inputs(dtype=BF16)["old_logp"]}
    check_against_truth(accuracy, mixed, **ALL_EXTRAS)


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
def test_advantages_of_tokens(accuracy, importance):
    inputs = make_inputs()
    inputs["advantage"] = torch.randn(5, 37, generator=torch.Generator().manual_seed(1))
    check_against_truth(accuracy, inputs, importance=importance, **ALL_EXTRAS)
    check_against_truth(accuracy, pack(inputs, LENGTHS), importance=importance, **ALL_EXTRAS)


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
@pytest.mark.parametrize("loss_type", fewer(reference_policy.LOSS_TYPES, ["grpo", "dr_grpo"]))
def test_packed(accuracy, loss_type, importance):
    """Packed responses, some of them empty, are as padded ones."""
    inputs, options = make_inputs(), {"loss_type": loss_type, "importance": importance, "reweight": "ppl"}
    options |= {"max_length": 37, **ALL_EXTRAS}
    packed = check_against_truth(accuracy, pack(inputs, LENGTHS), **options)
    padded = call(cut(inputs, LENGTHS), **options)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(packed.metrics, padded.metrics, rtol=1e-6, atol=1e-7)
    for name, grad in packed.gradients.items():
        expected = pack({"x": padded.gradients[name]}, LENGTHS)["x"]
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
def test_long_and_many_sequences(accuracy, importance):
    """Over any block of tokens or sequences that a kernel takes at a time."""
    check_against_truth(accuracy, make_inputs(2, fewer(9_001, 2_501)), importance=importance, **ALL_EXTRAS)
    if importance == "sequence" or not backends.interpreting():
        check_against_truth(accuracy, make_inputs(fewer(1_300, 130), 3), importance=importance, reweight="ppl")


@pytest.mark.served_by("reference")
def test_blocks_of_sequences(accuracy):
    """As many as the smallest workspace has room for, here two, then the last one alone."""
    inputs = make_inputs(5, 2_501)
    with backends.workspace_limit(2**20):
        for given in (inputs, pack(inputs, [2_501, 2_300, 5, 0, 700])):
            check_against_truth(accuracy, given, reweight="ppl", **ALL_EXTRAS)


@pytest.mark.parametrize("shape", [(600, 3), (2, 2_501)], ids=str)
def test_means_of_many_and_of_long_sequences(accuracy, shape):
    """Each by its own number of tokens: of more parts than a kernel adds at a time, of several parts a sequence."""
    check_against_truth(accuracy, without_extras(make_inputs(*shape)), loss_type="grpo")


@pytest.mark.parametrize("layout", ["padded", "packed", "strided"])
@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
def test_long_stretches_that_do_not_count(accuracy, importance, layout):
    """Longer than what a kernel takes at a time, so that it may leave them out."""
    inputs = make_inputs(4, fewer(1_500, 700))
    inputs["mask"][0, 100:-100] = False
    inputs["mask"][1, 300:] = False
    if layout == "packed":
        inputs = pack(inputs, fewer([1_500, 1_300, 700, 0], [700, 650, 300, 0]))
    elif layout == "strided":
        inputs = {name: x.t().contiguous().t() if x.dim() == 2 else x for name, x in inputs.items()}
    counted = inputs["mask"]
    poisoned = {
        name: x.masked_fill(~counted, torch.nan) if x.shape == counted.shape and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    check_against_truth(accuracy, inputs, importance=importance, **ALL_EXTRAS)
    clean, actual = (call(x, importance=importance, **ALL_EXTRAS) for x in (inputs, poisoned))
    assert torch.equal(actual.loss, clean.loss) and torch.equal(actual.metrics, clean.metrics)
    for name, grad in actual.gradients.items():
        assert torch.equal(grad, clean.gradients[name])
        assert (grad[~counted] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
def test_a_broken_advantage_stays_where_it_is(importance, bad):
    """Not a number in one response: not in what does not count there, and in no other response's gradient."""
    inputs = without_extras(make_inputs())
    inputs["advantage"][1] = bad
    gradient = call(inputs, importance=importance).gradients["logp"]
    assert (gradient[~inputs["mask"]] == 0).all()
    assert gradient[[0, 2, 3, 4]].isfinite().all() and not gradient[1][inputs["mask"][1]].isfinite().all()


@pytest.mark.served_by("cpu", "reference")
@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
def test_very_long_responses(accuracy, importance):
    """So long that blocks grow with them."""
    check_against_truth(accuracy, make_inputs(3, 300_000), importance=importance, **ALL_EXTRAS)


@pytest.mark.parametrize("loss_type", fewer(["dapo", "bnpo", "cispo"], ["dapo"]))
@pytest.mark.parametrize("tokens", [7, 33.5, "tensor", 0])
def test_num_tokens_is_the_denominator(accuracy, loss_type, tokens):
    inputs = make_inputs()
    expected = truth(inputs, loss_type=loss_type, denominator=33.5 if tokens == "tensor" else float(tokens))
    given = torch.tensor([33.5], device=cases.DEVICE) if tokens == "tensor" else tokens
    actual = call(inputs, loss_type=loss_type, num_tokens=given)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    grads = actual.gradients["logp"].double(), expected.gradients["logp"]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", fewer(["grpo", "sapo", "dr_grpo"], ["grpo"]))
@pytest.mark.parametrize("sequences", [7, 2.5, "tensor", 0])
def test_num_sequences_is_the_denominator(accuracy, loss_type, sequences):
    inputs = make_inputs()
    inputs["mask"][1] = False
    expected = truth(inputs, loss_type=loss_type, denominator=2.5 if sequences == "tensor" else float(sequences))
    given = torch.tensor([2.5], device=cases.DEVICE) if sequences == "tensor" else sequences
    actual = call(inputs, loss_type=loss_type, num_sequences=given)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    grads = actual.gradients["logp"].double(), expected.gradients["logp"]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_a_ratio_of_sequences_with_the_gradients_of_tokens():
    """GSPO-token: GSPO's loss; weights of tokens are within its gradients, where GSPO's are the same for a response."""
    inputs = without_extras(make_inputs())
    inputs["logp"] = inputs["old_logp"] + 0.05 * torch.randn(inputs["logp"].shape)
    options = {"loss_type": "grpo", "reweight": "low_prob", "alpha": 0.5, "clip_low": 0.5, "clip_high": 0.5}
    of_sequence, of_token = (call(inputs, importance=name, **options) for name in ("sequence", "sequence_token"))
    torch.testing.assert_close(of_token.loss, of_sequence.loss)
    p, one, other = inputs["old_logp"].exp(), of_sequence.gradients["logp"], of_token.gradients["logp"]
    for row, kept in enumerate(inputs["mask"]):
        same, weighted = one[row][kept], other[row][kept] / (1 + 0.5 * (1 - p[row][kept]))
        for values in (same, weighted):
            torch.testing.assert_close(values, values.mean().expand_as(values), rtol=1e-5, atol=1e-8)
    assert p[inputs["mask"]].std() > 0.1
    torch.testing.assert_close(other.sum(1), one.sum(1))


def test_accumulation_over_batches_is_one_batch():
    """Two halves with the whole's number of tokens add up to the whole."""
    inputs = make_inputs(6)
    whole, tokens = call(inputs), inputs["mask"].sum().item()
    halves = [
        call({name: x[part] for name, x in inputs.items()}, num_tokens=tokens) for part in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(halves[0].loss + halves[1].loss, whole.loss, rtol=1e-5, atol=1e-6)
    grads = torch.cat([half.gradients["logp"] for half in halves])
    torch.testing.assert_close(grads, whole.gradients["logp"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("poison", fewer([torch.nan, torch.inf, -torch.inf], [torch.nan, -torch.inf]))
@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
def test_masked_places_are_not_read(poison, importance):
    inputs = make_inputs() | {"advantage": torch.randn(5, 37)}
    poisoned = {
        name: x.masked_fill(~inputs["mask"], poison) if x.is_floating_point() else x for name, x in inputs.items()
    }
    for reweight in fewer(reference_policy.REWEIGHTS, ["ppl"]):
        options = {"importance": importance, "reweight": reweight, **ALL_EXTRAS}
        clean, actual = call(inputs, **options), call(poisoned, **options)
        assert torch.equal(actual.loss, clean.loss) and torch.equal(actual.metrics, clean.metrics)
        for name, grad in actual.gradients.items():
            assert torch.equal(grad, clean.gradients[name])
            assert (grad[~inputs["mask"]] == 0).all()


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
@pytest.mark.parametrize("loss_type", reference_policy.LOSS_TYPES)
def test_nothing_counts(loss_type, importance):
    """All masked: zeros, and gradients that are there."""
    inputs = make_inputs()
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    for given in (inputs, pack(inputs, LENGTHS)):
        result = call(given, loss_type=loss_type, importance=importance, reweight="ppl", max_length=9, **ALL_EXTRAS)
        assert result.loss == 0 and (result.metrics == 0).all()
        assert set(result.gradients) == {"logp", "entropy"}
        assert all((grad == 0).all() for grad in result.gradients.values())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_no_tokens_at_all(shape, loss_type):
    result = call(make_inputs(*shape), loss_type=loss_type, reweight="ppl", importance="sequence", **ALL_EXTRAS)
    assert result.loss == 0 and (result.metrics == 0).all()
    assert result.gradients["logp"].shape == shape


def test_no_packed_tokens():
    inputs = pack(make_inputs(3, 4), [0, 0, 0])
    result = call(inputs, reweight="ppl", importance="sequence", **ALL_EXTRAS)
    assert result.loss == 0 and result.gradients["logp"].shape == (0,)


@pytest.mark.served_by("triton")
@pytest.mark.parametrize("offsets", [[2, 5, 5, 9], [9, 5, 5, 2], [4, 4], [3]], ids=str)
@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
def test_packed_tokens_of_no_sequence_have_zeros(importance, offsets):
    """Where offsets on a GPU, which nobody reads before, leave some out; the launchers fill nothing beforehand."""
    tokens = pack(with_kl(make_inputs(1, 12)), [12])
    tokens = {name: x.to(cases.DEVICE) for name, x in tokens.items()}
    reached = torch.zeros(12, dtype=torch.bool)
    for begin, end in itertools.pairwise(offsets):
        reached[begin:end] = True
    numbers = PolicyOptions(importance=importance, **ALL_EXTRAS).arguments()
    given = [tokens["logp"], tokens["old_logp"], tokens["old_logp"], tokens["mask"]]
    given += [torch.tensor(offsets, device=cases.DEVICE), None, None, tokens["entropy"], tokens["kl"], None, None]
    _, _, coefficient, scale = torch.ops.dlogp.policy_loss_fwd(*given, *numbers, True)
    grad_loss = torch.ones((), device=cases.DEVICE)
    rest = [given[3], given[4], 0.2, 0.3, [True] * 3]
    gradients = torch.ops.dlogp.policy_loss_bwd(grad_loss, coefficient, scale, *rest)
    for x in (coefficient, *gradients):
        assert x.isfinite().all() and (x[~reached] == 0).all()


def test_a_group_of_one_and_equal_perplexities_weigh_one():
    inputs = make_inputs()
    inputs["group"] = torch.arange(5)
    assert torch.equal(call(inputs, reweight="ppl", alpha=0.9).loss, call(inputs, reweight="none").loss)
    inputs["group"] = torch.zeros(5, dtype=torch.int64)
    inputs["old_logp"] = torch.full_like(inputs["old_logp"], -0.75)
    actual, expected = call(inputs, reweight="ppl", alpha=0.9), call(inputs, reweight="none")
    torch.testing.assert_close(actual.loss, expected.loss)


def test_group_ids_are_names():
    inputs = make_inputs(6)
    inputs["group"] = torch.tensor([7, -3, 2**40, -3, 7, 2**40])
    renamed = inputs | {"group": torch.tensor([0, 1, 2, 1, 0, 2])}
    assert torch.equal(call(inputs, reweight="ppl").loss, call(renamed, reweight="ppl").loss)


def test_probabilities_above_one_count_as_one():
    """Rounding elsewhere may leave old_logp a little above 0."""
    inputs = without_extras(make_inputs())
    above = inputs | {"old_logp": inputs["old_logp"].abs() * 1e-3}
    for reweight, alpha in (("low_prob", 5.0), ("dominate", 1.0)):
        weight = call(above, reweight=reweight, alpha=alpha).metrics[PolicyMetrics._fields.index("mean_weight")]
        assert weight == 1.0


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
@pytest.mark.parametrize("loss_type", reference_policy.LOSS_TYPES)
@pytest.mark.parametrize("far", fewer([1e4, 60.0, torch.inf], [1e4]))
def test_ratios_that_would_overflow(accuracy, loss_type, importance, far):
    """Beyond ± 20 a log-ratio is cut and has no gradient; nothing becomes infinite that the definition keeps finite."""
    inputs = make_inputs(2, 8)
    inputs["mask"][:] = True
    inputs["old_logp"][0, :3] = -far
    inputs["old_logp"][1] = -far
    inputs["ref_logp"][0, 4] = inputs["ref_logp"][0, 4] + far
    options = {"loss_type": loss_type, "importance": importance, "dual_clip": 10.0, **ALL_EXTRAS}
    actual, expected = call(inputs, **options), truth(inputs, **options)
    assert actual.loss.isfinite() == expected.loss.isfinite()
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=1e-5, atol=0.0)
    for name, grad in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name].double(), grad, rtol=1e-5, atol=1e-3 * grad.abs().max())
    if loss_type != "cispo" and importance == "token":
        assert (call(inputs, **(options | {"kl_beta": 0.0})).gradients["logp"][1] == 0).all()


def test_an_impossible_token_under_the_policy(accuracy):
    """logp = −inf where it counts: r = e⁻²⁰, without a gradient."""
    inputs = without_extras(make_inputs(2, 8))
    inputs["logp"][0, 0] = -torch.inf
    inputs["mask"][0, 0] = True
    result = call(inputs)
    assert result.loss.isfinite() and result.gradients["logp"].isfinite().all()
    assert result.gradients["logp"][0, 0] == 0


def test_an_infinite_reference_divergence_without_weight():
    """The metric says so; the loss does not care."""
    inputs = without_extras(make_inputs())
    expected = call(inputs)
    inputs["ref_logp"] = torch.full_like(inputs["logp"], -torch.inf)
    actual = call(inputs)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.gradients["logp"], expected.gradients["logp"])
    assert actual.metrics[PolicyMetrics._fields.index("ref_kl")] == torch.inf


def test_layouts(accuracy):
    """Slices, transposes, expanded tensors, masks of any 0/1 dtype."""
    wide = make_inputs(5, 80)
    for view in (lambda x: x[:, 3:40], lambda x: x[:, ::2]):
        check_against_truth(accuracy, {n: view(x) if x.dim() == 2 else x for n, x in wide.items()}, **ALL_EXTRAS)
    turned = {n: x.t().contiguous().t() if x.dim() == 2 else x for n, x in make_inputs().items()}
    check_against_truth(accuracy, turned, **ALL_EXTRAS)
    inputs = make_inputs()
    inputs |= {"advantage": inputs["advantage"][:1].expand(5), "token_weight": inputs["token_weight"][:1].expand(5, 37)}
    check_against_truth(accuracy, inputs, **ALL_EXTRAS)
    strided = pack({n: x.repeat_interleave(2, -1) if x.dim() == 2 else x for n, x in wide.items()}, [80] * 5)
    strided = {n: x[::2] if x.shape == (400,) else x for n, x in strided.items()}
    check_against_truth(accuracy, strided | {"offsets": torch.arange(6) * 40}, **ALL_EXTRAS)
    expected = call(make_inputs())
    for dtype in (torch.uint8, torch.int64, FP32):
        inputs = make_inputs()
        assert torch.equal(call(inputs | {"mask": inputs["mask"].to(dtype)}).loss, expected.loss)


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
def test_the_same_bits_in_every_run(importance):
    inputs = make_inputs(fewer(33, 5), fewer(700, 90))
    options = {"importance": importance, "reweight": "ppl", **ALL_EXTRAS}
    results = [call(inputs, **options) for _ in range(2)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        results.append(call(inputs, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.loss, results[0].loss) and torch.equal(other.metrics, results[0].metrics)
        for name, grad in other.gradients.items():
            assert torch.equal(grad, results[0].gradients[name])


def test_repeated_backward_and_no_second_derivative():
    inputs = {name: x.to(cases.DEVICE) for name, x in make_inputs().items()}
    logp = inputs["logp"].requires_grad_()
    loss = dlogp_kernels.policy_loss(**inputs).loss
    first = torch.autograd.grad(loss, logp, retain_graph=True)[0]
    second = torch.autograd.grad(3.0 * loss, logp, retain_graph=True, create_graph=True)[0]
    torch.testing.assert_close(second, 3.0 * first)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(second.sum(), logp)


def test_what_needs_a_gradient_gets_one_and_nothing_else():
    inputs = {name: x.to(cases.DEVICE) for name, x in make_inputs().items()}
    loss, metrics = dlogp_kernels.policy_loss(**inputs, **ALL_EXTRAS)
    assert not loss.requires_grad and not any(x.requires_grad for x in metrics)
    inputs["entropy"].requires_grad_()
    loss, metrics = dlogp_kernels.policy_loss(**inputs, **ALL_EXTRAS)
    assert loss.requires_grad and not any(x.requires_grad for x in metrics)
    loss.backward()
    mask = inputs["mask"]
    torch.testing.assert_close(inputs["entropy"].grad, -0.2 * mask / mask.sum())
    assert inputs["logp"].grad is None
    with torch.no_grad():
        assert not dlogp_kernels.policy_loss(**inputs, **ALL_EXTRAS).loss.requires_grad


def test_without_gradients_none_is_formed():
    arguments = _arguments(FP32, "ref_logp")
    for with_gradient, shape in ((True, (5, 7)), (False, (0,))):
        result = torch.ops.dlogp.policy_loss_fwd(*arguments[:-1], with_gradient)
        assert result[2].shape == shape


@pytest.mark.parametrize("importance", ["token", "sequence"])  # of sequence_token the gradient is not that of the value
@pytest.mark.parametrize("loss_type", reference_policy.LOSS_TYPES)
@pytest.mark.served_by("cpu", "reference")
@pytest.mark.cpu_only
def test_gradcheck(loss_type, importance):
    inputs = make_inputs(3, 6, dtype=FP64, seed=3)
    logp, entropy = inputs.pop("logp").requires_grad_(), inputs.pop("entropy").requires_grad_()
    options = {"loss_type": loss_type, "importance": importance, "dual_clip": 1.5, **ALL_EXTRAS}
    if loss_type == "cispo":  # whose ratio has no gradient: where it is bounded, there is none to miss
        options["clip_high"] = 0.0

    def loss(logp, entropy):
        return dlogp_kernels.policy_loss(logp, entropy=entropy, **inputs, **options).loss

    assert torch.autograd.gradcheck(loss, (logp, entropy))


def _arguments(dtype: torch.dtype, present: str | None, packed: bool = False) -> list:
    """Every argument of policy_loss_fwd in order, on the device under test.

    Optional ones are None, or given, with the divergence `present`, "ref_logp" or "kl".
    """
    inputs = make_inputs(5, 7, dtype=dtype)
    inputs = with_kl(inputs) if present == "kl" else inputs
    if packed:
        inputs = pack(inputs, [7, 4, 0, 1, 2])
    inputs = {name: x.to(cases.DEVICE) for name, x in inputs.items()}
    kept = inputs if present else without_extras(inputs)
    names = ("logp", "old_logp", "advantage", "mask", "offsets", "group", "ref_logp", "entropy", "kl", "token_weight")
    tokens = [kept.get(name) for name in names]
    out_dtype = FP64 if dtype == FP64 else FP32
    tokens.append(torch.tensor(9.0, dtype=out_dtype, device=cases.DEVICE) if present else None)
    extras = (0.3, 0.2) if present else (0.0, 0.0)
    choices, numbers = ["dapo", "ppl", "positive", "sequence"], [0.4, 0.2, 0.28, 3.0, *extras, 1.0, 1.05]
    return [*tokens, choices, numbers, 11 if present else None, True]


@pytest.mark.parametrize("present", ["ref_logp", "kl", None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", fewer([BF16, FP32, FP64], [BF16]), ids=str)
def test_opcheck_forward(dtype, packed, present):
    arguments = _arguments(dtype, present, packed)
    arguments = [x.requires_grad_() if i in (0, 7, 8) and x is not None else x for i, x in enumerate(arguments)]
    torch.library.opcheck(torch.ops.dlogp.policy_loss_fwd.default, arguments)


@pytest.mark.parametrize("mask", fewer(list(itertools.product([True, False], repeat=3)), [(True,) * 3, (False,) * 3]))
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_backward(packed, mask):
    arguments = _arguments(FP32, "kl", packed)
    _, _, coefficient, scale = torch.ops.dlogp.policy_loss_fwd(*arguments)
    grad_loss = torch.tensor(2.0, device=cases.DEVICE)
    given = [grad_loss, coefficient, scale, arguments[3], arguments[4], 0.2, 0.3, list(mask)]
    torch.library.opcheck(torch.ops.dlogp.policy_loss_bwd.default, given)


@pytest.mark.around_launchers
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole_and_not_again_for_other_shapes(packed, counter):
    def run(inputs):
        loss, metrics = dlogp_kernels.policy_loss(**inputs, **ALL_EXTRAS)
        return loss, metrics.mean_ratio

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for b, t in ((3, 5), (4, 9), (5, 17), (7, 40), (6, 3)):
        inputs = make_inputs(b, t)
        inputs = pack(inputs, [t] * b) if packed else inputs
        inputs = {name: x.to(cases.DEVICE) for name, x in inputs.items()}
        leaves = [inputs[name].requires_grad_() for name in ("logp", "entropy")]
        loss, ratio = compiled(inputs)
        expected, expected_ratio = run(inputs)
        assert counter.frame_count <= 2, f"compiled again for {b} × {t}"
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ratio, expected_ratio)
        for value, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(value, other)


def test_inputs_are_not_modified():
    inputs = make_inputs()
    before = {name: x.clone() for name, x in inputs.items()}
    call(inputs, reweight="ppl", importance="sequence", **ALL_EXTRAS)
    for name, x in before.items():
        assert torch.equal(inputs[name], x)


@pytest.mark.parametrize("value", fewer([torch.nan, torch.inf, -torch.inf], [torch.nan, torch.inf]))
@pytest.mark.parametrize("loss_type", fewer(["dapo", "cispo"], ["dapo"]))
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("name", ["ref_logp", "kl", "entropy"])
def test_what_has_no_part_in_the_loss_may_be_anything(name, importance, loss_type, value):
    """A score that could not be had, where its coefficient is 0: the loss and the gradients are those without it."""
    inputs = make_inputs()
    options = {"importance": importance, "loss_type": loss_type}
    expected = call(without_extras(inputs), **options)
    given = without_extras(inputs) | {name: torch.full_like(inputs["logp"], value)}
    actual = call(given, **options)
    assert_same_policy(actual, expected)
    for other in actual.gradients.values():
        assert other.isfinite().all()


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_a_token_of_weight_0_has_no_part_in_the_term_of_the_ratio(importance, loss_type):
    inputs = without_extras(make_inputs())
    weight = inputs["mask"].new_ones(inputs["logp"].shape, dtype=torch.float32)
    weight[0, :5] = 0.0
    options = {"importance": importance, "loss_type": loss_type, "reweight": "none"}
    clean = call(inputs | {"token_weight": weight}, **options)
    advantage = inputs["advantage"][:, None].expand_as(weight).clone()
    advantage[0, :5] = torch.nan
    actual = call(inputs | {"token_weight": weight, "advantage": advantage}, **options)
    assert_same_policy(actual, clean)


@pytest.mark.parametrize("value", [-3.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("loss_type", fewer(["dapo", "cispo", "grpo", "dr_grpo"], ["dapo", "grpo"]))
def test_an_impossible_denominator_that_nobody_looked_at_gives_nan(backend, loss_type, value, monkeypatch):
    """As on a GPU, where to look would be to wait; the kernels of the CPU look."""
    monkeypatch.setattr(policy_checks, "has_values", lambda x: False)
    inputs = without_extras(make_inputs())
    name = "num_tokens" if loss_type in reference_policy.BY_TOKENS else "num_sequences"
    options = {"loss_type": loss_type, name: torch.tensor(value, device=cases.DEVICE)}
    if backend == "cpu":
        with pytest.raises(ValueError, match="denominator is"):
            call(inputs, **options)
        return
    result = call(inputs, **options)
    assert result.loss.isnan() and result.gradients["logp"][inputs["mask"]].isnan().all()
