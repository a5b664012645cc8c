"""Weights that are DTensors: over a mesh dimension `tp` each rank computes its shard, over others they are gathered."""

import cases
import dtensor_cases
import pytest
import torch
from cases import LINEAR_OPS, make_inputs, upstream_of
from ranks import Ranks
from tolerances import Accuracy


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture
def accuracy():
    return Accuracy(lambda *_: None)


def check(accuracy, op, inputs, upstream, found):
    kind = type(cases.call(op, inputs))
    cases.check_statistics(accuracy, op, inputs, kind(*found.stats))
    cases.check_gradients(accuracy, op, inputs, upstream, found.gradients)


@pytest.mark.parametrize("sharded_hidden", [False, True], ids=["replicated", "sequence-parallel"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_tensor_parallel(accuracy, ranks, op, size, sharded_hidden):
    inputs = make_inputs(op, 18)
    upstream = upstream_of(cases.truth(op, inputs))
    results = ranks.values(dtensor_cases.statistics, op, inputs, upstream, "tp", sharded_hidden, size=size)
    for found, placed in results:
        check(accuracy, op, inputs, upstream, found)
        expected = {name for name in cases.floating(inputs) if sharded_hidden or not name.endswith("hidden")}
        assert placed == dict.fromkeys(expected, "(Shard(dim=0),)")


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_a_group_says_that_a_mesh_without_a_name_is_tensor_parallel(accuracy, ranks, op):
    inputs = make_inputs(op)
    upstream = upstream_of(cases.truth(op, inputs))
    for found, _ in ranks.values(dtensor_cases.statistics, op, inputs, upstream, None, False, True):
        check(accuracy, op, inputs, upstream, found)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_ranks_with_their_own_tokens_gather_the_weight(accuracy, ranks, op, size):
    """As FSDP does: once in forward, again in backward, and the gradient is the mean over ranks, sharded.

    A shard has 151 or 76 rows, of which the workspace of 1 MiB holds 64 or 32 at a time while they are added.
    """
    whole = make_inputs(op, 20, d=512)
    tokens = [name for name in whole if name == "target" or name.endswith("hidden")]
    batches = [whole | {name: whole[name][5 * rank : 5 * rank + 5] for name in tokens} for rank in range(size)]
    upstreams = [upstream_of(cases.truth(op, batch), seed=rank) for rank, batch in enumerate(batches)]
    results = ranks.values(dtensor_cases.own_tokens, op, batches, upstreams, size=size)
    weights = [name for name in cases.floating(whole) if name not in tokens]
    expected = {name: 0.0 for name in weights}
    for batch, upstream in zip(batches, upstreams, strict=True):
        truth = cases.true_gradients(op, batch, upstream)
        expected = {name: value + truth[name] / size for name, value in expected.items()}
    for rank, (found, placed, gathers) in enumerate(results):
        assert placed == dict.fromkeys(weights, "(Shard(dim=0),)")
        of_hidden = {name: x for name, x in found.gradients.items() if name in tokens}
        cases.check_gradients(accuracy, op, batches[rank], upstreams[rank], of_hidden)
        for name, truth in expected.items():
            torch.testing.assert_close(found.gradients[name].double(), truth, rtol=1e-4, atol=1e-5)
        assert len(gathers) == 2 * len(weights)


def batches_of(inputs, parts):
    """The tokens of each of four ranks, in `parts` parts."""
    rows = inputs["target"].shape[0] // parts
    own = [slice(rank * rows, (rank + 1) * rows) for rank in range(parts) for _ in range(4 // parts)]
    return [{"hidden": inputs["hidden"][some], "target": inputs["target"][some]} for some in own]


def test_replicas_of_shards_have_the_mean_gradient_of_all(ranks):
    inputs = make_inputs("linear_logp", 12, bias=False)
    batches = batches_of(inputs, 4)
    upstream = [torch.full((12,), -1.0), torch.zeros(12), torch.zeros(12)]
    mean = cases.true_gradients("linear_logp", inputs, upstream)["weight"] / 4
    found = ranks.values(dtensor_cases.two_dimensions, inputs, batches, "hsdp")
    for rank, (placements, grad) in enumerate(found):
        assert str(placements) == "(Replicate(), Shard(dim=0))"
        torch.testing.assert_close(grad.double(), mean[:151] if rank % 2 == 0 else mean[151:], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_replicas_would_not_share_is_refused(ranks):
    inputs = make_inputs("linear_logp", 12, bias=False)
    for error in ranks(dtensor_cases.two_dimensions, inputs, batches_of(inputs, 2), "tp"):
        with pytest.raises(
            TypeError, match=r"^weight is a DTensor .* dimension 0 of its mesh: pass weight.to_local\(\)"
        ):
            raise error


def test_tokens_that_are_sharded_over_another_dimension_stay_so(ranks):
    inputs = make_inputs("linear_logp", 12, bias=False)
    upstream = [torch.full((12,), -1.0), torch.zeros(12), torch.zeros(12)]
    expected = cases.true_gradients("linear_logp", inputs, upstream)["hidden"]
    for placements, grad in ranks.values(dtensor_cases.two_dimensions, inputs, batches_of(inputs, 2), "hidden"):
        assert str(placements) == "(Shard(dim=0), Replicate())"
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_inference_mode(ranks):
    inputs = make_inputs("linear_logp", bias=False)
    expected = cases.call("linear_logp", inputs)
    for found in ranks.values(dtensor_cases.inference_weight, inputs, size=2):
        assert all(map(torch.equal, found, expected))


def test_whole_weights_of_a_mesh(ranks):
    inputs = make_inputs("linear_delta_logp", bias=False)
    expected = cases.call("linear_delta_logp", inputs)
    for found in ranks.values(dtensor_cases.whole_weight, "linear_delta_logp", inputs, size=2):
        assert all(map(torch.equal, found, expected))


REFUSED = {
    "columns": (
        TypeError,
        r"^weight is a DTensor with placements .*Shard\(dim=1\).*expected Shard\(0\).*full_tensor\(\)",
    ),
    "bias": (TypeError, r"^bias is a DTensor with placements .*Replicate\(\).*expected those of weight"),
    "group": (ValueError, r"^group has the ranks \[0, 1, 2, 3\], expected \[0, 1\], over which weight is sharded"),
    "no group": (TypeError, r"^group is str, expected a process group of torch.distributed"),
    "target": (TypeError, r"^target is a sharded DTensor, expected a whole tensor: pass target\.full_tensor\(\)"),
}


@pytest.mark.parametrize(("how", "expected"), REFUSED.items(), ids=REFUSED.keys())
def test_what_can_not_be_served_names_the_remedy(ranks, how, expected):
    kind, words = expected
    for error in ranks(dtensor_cases.refused, "linear_logp", make_inputs("linear_logp"), how, size=2):
        with pytest.raises(kind, match=words):
            raise error


def test_a_weight_that_was_written_to_before_backward_is_refused(ranks):
    for error in ranks(dtensor_cases.written_between, "linear_logp", make_inputs("linear_logp"), size=2):
        with pytest.raises(RuntimeError, match="written to between forward and backward"):
            raise error


@pytest.mark.parametrize("mesh_name", ["tp", None])
def test_training_goes_as_on_one_device(ranks, mesh_name):
    inputs = make_inputs("linear_logp", 24, bias=False)
    alone = ranks.values(dtensor_cases.optimiser_steps, inputs, None, 8, size=1)[0]
    for losses in ranks.values(dtensor_cases.optimiser_steps, inputs, mesh_name or "fsdp", 8, size=4):
        torch.testing.assert_close(torch.stack(losses), torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert alone[-1] < 0.8 * alone[0]


def test_arguments_are_those_of_the_function(ranks):
    for error in ranks(dtensor_cases.refused, "linear_logp", make_inputs("linear_logp"), "places", size=2):
        assert isinstance(error, TypeError) and "too many positional arguments" in str(error)
