"""`linear_policy_loss` of every backend: every option against float64, and against the composition of the two ops."""

from typing import Any

import cases
import linear_policy_cases
import pytest
import torch
from cases import fewer
from linear_policy_cases import BASE_HEADS, DIFFERENTIABLE, HEADS, call, check_against_truth, flat, make_inputs, near
from torch.utils.checkpoint import checkpoint

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.inputs import flat_transform
from dlogp_kernels.reference import policy as reference_policy

pytestmark = pytest.mark.usefixtures("backend")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EXTRAS = {"kl_beta": 0.3, "entropy_coef": 0.2}


@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
@pytest.mark.parametrize("loss_type", fewer(reference_policy.LOSS_TYPES, ["cispo", "sapo"]))
def test_loss_types(accuracy, loss_type, importance):
    inputs = make_inputs()
    options = {"loss_type": loss_type, "importance": importance, "dual_clip": 1.2}
    check_against_truth(accuracy, inputs, upstream=-2.5, **options, **EXTRAS)


@pytest.mark.parametrize("reweight", reference_policy.REWEIGHTS)
def test_reweights(accuracy, reweight):
    inputs = make_inputs()
    for sign in fewer(reference_policy.REWEIGHT_SIGNS, ["negative"]):
        check_against_truth(accuracy, inputs, reweight=reweight, reweight_sign=sign, alpha=0.7)


@pytest.mark.parametrize("importance", fewer(reference_policy.IMPORTANCES, ["token"]))
@pytest.mark.parametrize("dtype", fewer([BF16, FP32], [BF16]), ids=str)
def test_divergence_of_the_whole_vocabulary(accuracy, dtype, importance):
    inputs = make_inputs(base=True, dtype=dtype)
    result = check_against_truth(accuracy, inputs, importance=importance, loss_type="grpo", **EXTRAS)
    check_against_truth(accuracy, near(inputs, **HEADS), importance=importance, **HEADS, **BASE_HEADS, **EXTRAS)
    looked_at = call(inputs, importance=importance, loss_type="grpo", entropy_coef=0.2)
    assert torch.equal(looked_at.metrics, result.metrics) and not torch.equal(looked_at.loss, result.loss)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_dtypes_and_options_of_the_last_layer(accuracy, dtype, bias):
    if dtype == FP64 and backends.unavailable(
        backends.select("linear_policy_loss_fwd", cases.DEVICE), "linear_policy_loss_fwd", cases.DEVICE, dtype
    ):
        pytest.skip("no float64 kernels")
    inputs = make_inputs(dtype=dtype, bias=bias)
    check_against_truth(accuracy, inputs, **EXTRAS)
    check_against_truth(accuracy, near(inputs, **HEADS), **HEADS, **EXTRAS)


@pytest.mark.parametrize("importance", fewer(reference_policy.IMPORTANCES, ["token"]))
@pytest.mark.parametrize("base", fewer([False, True], [False]))
def test_packed(accuracy, base, importance):
    inputs, lengths = make_inputs(base=base), [11, 0, 6]
    options = {"importance": importance, "loss_type": "grpo", "reweight": "ppl", **EXTRAS}
    result = check_against_truth(accuracy, flat(inputs, lengths), **options)
    inside = torch.arange(11) < torch.tensor(lengths)[:, None]
    padded = call(inputs | {"mask": inputs["mask"] & inside}, **options)
    torch.testing.assert_close(result.loss, padded.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.gradients["weight"], padded.gradients["weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("importance", fewer(reference_policy.IMPORTANCES, ["token"]))
def test_advantages_of_tokens_and_num_tokens(accuracy, importance):
    inputs = make_inputs()
    inputs["advantage"] = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    check_against_truth(accuracy, inputs, importance=importance, **EXTRAS)
    whole, half = (
        call(inputs, importance=importance, num_tokens=inputs["mask"].sum().item()),
        call(inputs, importance=importance, num_tokens=(2 * inputs["mask"].sum()).to(cases.DEVICE)),
    )
    torch.testing.assert_close(half.loss * 2.0, whole.loss)
    torch.testing.assert_close(half.gradients["weight"] * 2.0, whole.gradients["weight"])


@pytest.mark.parametrize("importance", fewer(["token", "sequence_token"], ["token"]))
def test_num_sequences(importance):
    inputs = make_inputs()
    options = {"loss_type": "grpo", "importance": importance}
    whole = call(inputs, **options)
    half = call(inputs, num_sequences=2 * len(inputs["mask"]), **options)
    torch.testing.assert_close(2 * half.loss, whole.loss)
    for name, grad in whole.gradients.items():
        torch.testing.assert_close(2 * half.gradients[name], grad)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("dtype", fewer([BF16, FP32], [BF16]), ids=str)
def test_many_blocks_of_rows(accuracy, monkeypatch, dtype, base):
    """With the smallest workspace, so that rows come block by block."""
    if backends.interpreting():
        from dlogp_kernels.triton import linear_policy_loss

        def in_two_slices(models, num_rows, workspace):
            tiling = divide(models, num_rows, 2**20 // 64 * len(models))
            assert tiling.slices == [16, 16]
            return tiling

        divide = linear_policy_loss._tiling
        monkeypatch.setattr(linear_policy_loss, "_SLICE_ROWS", 16)
        monkeypatch.setattr(linear_policy_loss, "_BLOCK_ROWS", 32)
        monkeypatch.setattr(linear_policy_loss, "_tiling", in_two_slices)
    inputs = make_inputs(4, fewer(90, 15), v=fewer(3_001, 301), dtype=dtype, base=base)
    with backends.workspace_limit(2**20):
        small = check_against_truth(accuracy, inputs, **EXTRAS)
    large = call(inputs, **EXTRAS)
    torch.testing.assert_close(small.loss, large.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wanted",
    [("hidden",), ("weight",), *fewer([("bias",), ("hidden", "weight"), ("weight", "bias")], []), ()],
    ids=str,
)
def test_each_subset_of_gradients(wanted):
    """A frozen input costs no product and no buffer, and the others' gradients are the same bits."""
    inputs = make_inputs()
    every, some = call(inputs, **EXTRAS), call(inputs, wanted=wanted, **EXTRAS)
    if wanted:
        assert torch.equal(some.loss, every.loss)
    else:  # whose statistics may come from other kernels
        torch.testing.assert_close(some.loss, every.loss, rtol=1e-6, atol=1e-6)
    assert set(some.gradients) == set(wanted)
    for name, grad in some.gradients.items():
        assert torch.equal(grad, every.gradients[name])


def test_the_composition_of_both_ops():
    """In the same precision: what a user gets who writes it out."""
    inputs = make_inputs(4, 20, dtype=BF16)
    fused = call(inputs, **EXTRAS)
    moved = {name: x.to(cases.DEVICE) for name, x in inputs.items()}
    leaves = {name: moved[name].requires_grad_() for name in DIFFERENTIABLE}
    stats = dlogp_kernels.linear_logp(
        moved["hidden"], moved["weight"], moved["target"].masked_fill(~moved["mask"], -100), bias=moved["bias"]
    )
    rest = {name: moved[name] for name in ("old_logp", "advantage", "mask", "group", "ref_logp", "token_weight")}
    loss, metrics = dlogp_kernels.policy_loss(stats.logp, entropy=stats.entropy, **rest, **EXTRAS)
    torch.testing.assert_close(fused.loss, loss.detach().cpu(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.metrics, torch.stack(list(metrics)).cpu(), rtol=1e-5, atol=1e-6)
    for (name, x), grad in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        error = (fused.gradients[name].double() - grad.cpu().double()).norm() / grad.cpu().double().norm()
        assert error < torch.finfo(BF16).eps, name
        assert grad.dtype == x.dtype


@pytest.mark.parametrize("poison", fewer([torch.nan, torch.inf], [torch.nan]))
def test_masked_places_are_not_read(poison):
    inputs = make_inputs(base=True)
    clean = call(inputs, reweight="ppl", **EXTRAS)
    masked = ~inputs["mask"]
    poisoned = dict(inputs)
    for name in ("hidden", "base_hidden", "old_logp", "token_weight"):
        where = masked[..., None] if name.endswith("hidden") else masked
        poisoned[name] = inputs[name].masked_fill(where, poison)
    poisoned["target"] = inputs["target"].masked_fill(masked, -7)
    actual = call(poisoned, reweight="ppl", **EXTRAS)
    assert torch.equal(actual.loss, clean.loss) and torch.equal(actual.metrics, clean.metrics)
    for name, grad in actual.gradients.items():
        assert torch.equal(grad, clean.gradients[name])
    assert (actual.gradients["hidden"][masked] == 0).all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gradients_that_nothing_multiplies(dtype):
    """Those of forward, not a copy, where they have their dtype; unless backward may come again."""
    inputs = make_inputs(dtype=dtype, bias=False)
    weight = inputs["weight"].requires_grad_()

    def derived(factor: float, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss = dlogp_kernels.linear_policy_loss(**inputs, **EXTRAS).loss
        (formed,) = (x for x in loss.grad_fn.saved_tensors if x.shape == weight.shape)
        return torch.autograd.grad(factor * loss, weight, **options)[0], formed

    (plain, formed), (doubled, _), (kept, kept_formed) = derived(1.0), derived(2.0), derived(1.0, retain_graph=True)
    assert torch.equal(2.0 * plain, doubled) and torch.equal(plain, kept)
    assert (plain.data_ptr() == formed.data_ptr()) == (dtype == FP32)
    assert kept.data_ptr() != kept_formed.data_ptr() and not plain.requires_grad


@pytest.mark.cpu_only
def test_a_batch_of_upstream_gradients():
    inputs = make_inputs()
    weight = inputs["weight"].requires_grad_()
    loss = dlogp_kernels.linear_policy_loss(**inputs, **EXTRAS).loss
    (grads,) = torch.autograd.grad(loss, weight, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    assert torch.equal(2.0 * grads[0], grads[1])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_within_a_checkpoint(dtype):
    """Which gives what was saved once."""
    inputs = make_inputs(dtype=dtype)
    expected = call(inputs, **EXTRAS).gradients
    moved = cases.on_device(inputs)
    leaves = [moved[name].requires_grad_() for name in expected]
    loss = checkpoint(lambda: dlogp_kernels.linear_policy_loss(**moved, **EXTRAS).loss, use_reentrant=False)
    for value, grad in zip(torch.autograd.grad(loss, leaves), expected.values(), strict=True):
        assert torch.equal(value.cpu(), grad)


@pytest.mark.parametrize("importance", fewer(reference_policy.IMPORTANCES, ["token"]))
@pytest.mark.parametrize("shape", [(3, 11), (0, 5), (3, 0)])
def test_nothing_counts(shape, importance):
    inputs = make_inputs(*shape)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    result = call(inputs, reweight="ppl", importance=importance, **EXTRAS)
    assert result.loss == 0 and (result.metrics == 0).all()
    assert set(result.gradients) == set(DIFFERENTIABLE)
    for name, grad in result.gradients.items():
        assert grad.shape == inputs[name].shape and (grad == 0).all()


def test_a_peaked_distribution_and_a_masked_vocabulary(accuracy):
    inputs = make_inputs(spread=15.0)
    inputs["bias"][5:40] = -torch.inf
    inputs["target"] = inputs["target"].where((inputs["target"] < 5) | (inputs["target"] >= 40), 100)
    result = call(near(inputs), **EXTRAS)
    assert result.loss.isfinite() and all(grad.isfinite().all() for grad in result.gradients.values())
    assert (result.gradients["weight"][5:40] == 0).all()


def test_layouts(accuracy):
    wide = make_inputs(3, 24, d=48)
    sliced = {
        name: x[:, 1:24:2] if name in ("old_logp", "ref_logp", "token_weight", "mask", "target") else x
        for name, x in wide.items()
    }
    sliced |= {"hidden": wide["hidden"][:, 1:24:2, ::2], "weight": wide["weight"][:, ::2]}
    check_against_truth(accuracy, near(sliced), **EXTRAS)
    turned = make_inputs() | {"weight": make_inputs()["weight"].t().contiguous().t()}
    check_against_truth(accuracy, turned, **EXTRAS)


@pytest.mark.cpu_only
@pytest.mark.served_by("cpu", "reference")
def test_a_target_outside_the_vocabulary_is_named():
    inputs = make_inputs()
    inputs["mask"][1, 2] = True
    inputs["target"][1, 2] = 301
    with pytest.raises(IndexError, match=r"target\[1, 2\] is 301, expected a token in \[0, 301\)"):
        call(inputs)


def test_the_same_bits_in_every_run():
    inputs = make_inputs(4, fewer(30, 5), v=fewer(1_187, 301), dtype=BF16, base=True)
    results = [call(inputs, **EXTRAS) for _ in range(2)]
    assert torch.equal(results[0].loss, results[1].loss) and torch.equal(results[0].metrics, results[1].metrics)
    for name, grad in results[0].gradients.items():
        assert torch.equal(grad, results[1].gradients[name])


@pytest.mark.parametrize("importance", fewer(reference_policy.IMPORTANCES, ["token"]))
def test_repeated_backward_and_no_second_derivative(importance):
    """Gradients of the forward pass are multiplied in backward: by accumulation, by AMP's scale."""
    inputs = {name: x.to(cases.DEVICE) for name, x in make_inputs().items()}
    weight = inputs["weight"].requires_grad_()
    loss = dlogp_kernels.linear_policy_loss(**inputs, importance=importance).loss
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    second = torch.autograd.grad(1024.0 * loss, weight, retain_graph=True)[0]
    assert torch.equal(second, 1024.0 * first)
    for _ in range(3):
        (loss / 4.0).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 0.75 * first)
    again = torch.autograd.grad(loss, weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(again.sum(), weight)


def test_small_gradients_of_float16_survive_until_they_are_scaled():
    inputs = make_inputs(dtype=FP16)
    options = {"num_tokens": 1e7}
    actual, expected = call(inputs, upstream=1e7, **options), linear_policy_cases.truth(inputs, upstream=1.0)
    tokens = inputs["mask"].sum()
    for name, grad in actual.gradients.items():
        error = (grad.double() - expected.gradients[name] * tokens).norm() / (expected.gradients[name] * tokens).norm()
        assert error < 2e-3, name


def test_without_gradients_none_is_formed():
    inputs = {name: x.to(cases.DEVICE) for name, x in make_inputs().items()}
    inputs["weight"].requires_grad_()
    with torch.no_grad():
        loss, metrics = dlogp_kernels.linear_policy_loss(**inputs, **EXTRAS)
    assert not loss.requires_grad and not any(x.requires_grad for x in metrics)
    expected = dlogp_kernels.linear_policy_loss(**inputs, **EXTRAS)
    assert expected.loss.requires_grad and not any(x.requires_grad for x in expected.metrics)
    torch.testing.assert_close(loss, expected.loss.detach(), rtol=1e-6, atol=1e-6)


def _arguments(dtype: torch.dtype, present: bool, wanted: bool = True) -> list:
    """Every argument of linear_policy_loss_fwd in order, on the device under test; optional ones given or None."""
    inputs = {n: x.to(cases.DEVICE) for n, x in make_inputs(2, 4, v=31, d=5, dtype=dtype, base=present).items()}
    heads: list[Any] = []
    for prefix, options in (("", (4.0, 1.3)), ("base_", (3.0, 0.6))):
        heads += [inputs.get(f"{prefix}{name}") for name in ("hidden", "weight", "bias")]
        heads.append(flat_transform(0.7, *options) if present else flat_transform(1.0, None, 1.0))
    if not present:
        heads[2] = None
    kind = FP64 if dtype == FP64 else FP32
    rows = [torch.rand(8, dtype=kind, device=cases.DEVICE) - 0.5 for _ in range(6 if present else 3)]
    rows += [None] * (6 - len(rows))
    if present:
        rows[4] = None  # the base model takes its place
    options = reference_policy.PolicyOptions(reweight="ppl" if present else "none", **(EXTRAS if present else {}))
    target = inputs["target"].reshape(-1, 1)
    return [*heads, target, -100, *rows, *options.arguments()[:2], [wanted, wanted, wanted and present]]


@pytest.mark.parametrize("present", [True, False], ids=["every optional argument", "no optional argument"])
@pytest.mark.parametrize("dtype", fewer([BF16, FP32, FP64], [BF16]), ids=str)
def test_opcheck_forward(dtype, present):
    arguments = _arguments(dtype, present)
    arguments = [x.requires_grad_() if i in (0, 1, 2) and x is not None else x for i, x in enumerate(arguments)]
    torch.library.opcheck(torch.ops.dlogp.linear_policy_loss_fwd.default, arguments)
    if not backends.interpreting():
        nothing = _arguments(dtype, present, wanted=False)
        torch.library.opcheck(torch.ops.dlogp.linear_policy_loss_fwd.default, nothing)


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False], [False, False, False]])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_opcheck_backward(dtype, mask):
    gradients = [torch.randn(n, 5, device=cases.DEVICE) for n in (8, 31)] + [torch.randn(31, device=cases.DEVICE)]
    arguments = [torch.tensor(2.0, device=cases.DEVICE), *gradients, dtype, dtype, FP32, mask]
    torch.library.opcheck(torch.ops.dlogp.linear_policy_loss_bwd.default, arguments)


@pytest.mark.served_by("cpu", "reference")
@pytest.mark.cpu_only
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
def test_gradcheck(loss_type, base):
    inputs = make_inputs(2, 3, v=7, d=4, dtype=FP64, base=base)
    leaves = tuple(inputs.pop(name).requires_grad_() for name in DIFFERENTIABLE)

    def loss(hidden, weight, bias):
        options = {"loss_type": loss_type, "dual_clip": 1.5, "softcap": 5.0, **EXTRAS}
        return dlogp_kernels.linear_policy_loss(hidden, weight, bias=bias, **inputs, **options).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.around_launchers
@pytest.mark.parametrize("importance", reference_policy.IMPORTANCES)
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole_and_not_again_for_other_shapes(packed, importance, counter):
    def run(inputs):
        options = {"importance": importance, "reweight": "ppl", **EXTRAS}
        loss, metrics = dlogp_kernels.linear_policy_loss(**inputs, **options)
        return loss, metrics.mean_ratio

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for b, t in ((3, 5), (4, 9), (5, 17), (7, 12)):
        inputs = make_inputs(b, t, v=31)
        inputs = flat(inputs, [t] * b) if packed else inputs
        inputs = {name: x.to(cases.DEVICE) for name, x in inputs.items()}
        leaves = [inputs[name].requires_grad_() for name in DIFFERENTIABLE]
        (loss, ratio), (expected, expected_ratio) = compiled(inputs), run(inputs)
        assert counter.frame_count <= 2, f"compiled again for {b} × {t}"
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ratio, expected_ratio)
        for value, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(value, other)


def test_autocast_converts_as_linear_does():
    inputs = make_inputs()
    leaves = {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE}
    moved = {name: x.to(cases.DEVICE) for name, x in inputs.items()}
    with torch.autocast(cases.DEVICE.type, dtype=BF16):
        loss = dlogp_kernels.linear_policy_loss(**moved, **EXTRAS).loss
    narrow = {name: x.detach().to(BF16) if name in leaves else x for name, x in inputs.items()}
    expected = call(narrow, **EXTRAS)
    assert torch.equal(loss.detach().cpu(), expected.loss)
    for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert grad.dtype == FP32 and torch.equal(grad, expected.gradients[name].float())


@pytest.mark.parametrize("value", fewer([torch.nan, torch.inf, -torch.inf], [torch.nan]))
def test_a_reference_model_without_a_part_in_the_loss_may_be_anything(value):
    inputs = make_inputs()
    given = {name: x for name, x in inputs.items() if name not in ("ref_logp", "token_weight")}
    expected = call(given)
    by_score = call(given | {"ref_logp": torch.full_like(inputs["old_logp"], value)})
    base = make_inputs(base=True)
    base["base_hidden"] = torch.full_like(base["base_hidden"], value)
    by_model = call({name: x for name, x in base.items() if name != "token_weight"})
    for actual in (by_score, by_model):
        assert actual.loss.isfinite()
        assert all(x.isfinite().all() for x in actual.gradients.values())
    assert torch.equal(by_score.loss, expected.loss)
    assert all(torch.equal(by_score.gradients[name], x) for name, x in expected.gradients.items())
