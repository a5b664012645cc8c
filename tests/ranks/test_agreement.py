"""What ranks that share a vocabulary tell each other before they compute: an error of one is an error on all."""

import time

import pytest
import sharded_cases
import torch
from cases import LINEAR_OPS, call, make_inputs
from linear_policy_cases import make_inputs as make_policy_inputs
from ranks import TIMEOUT_SECONDS, Ranks, received
from sharded_cases import alike

import dlogp_kernels
from dlogp_kernels import VocabShard
from dlogp_kernels.sharding import Layout, Message, layout_of

V = 301
STARTS = (0, 100, 100, 297, V)


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def told(*rows, base_rows=None, starts=(), **fields):
    """The messages of ranks with so many rows."""
    changed = {rank: {"start": start} for rank, start in enumerate(starts)}
    if base_rows is not None:
        changed = {rank: {"base_rows": count} for rank, count in enumerate(base_rows)}
    return [Message(rows=count, **fields, **changed.get(rank, {})) for rank, count in enumerate(rows)]


def test_shards_follow_on_each_other():
    assert layout_of(told(3, 0, 4)) == Layout((0, 3, 3, 7), (0, 3, 3, 7), None)
    assert layout_of(told(3, 0, 4, starts=(0, 3, 3))).starts == (0, 3, 3, 7)
    assert layout_of(told(3, 3, 3, vocab_size=5)).starts == (0, 3, 5, 5)


def test_the_other_model_lies_alike_or_otherwise_or_is_whole():
    model = (0, 3, 7)
    assert layout_of(told(3, 4, base_rows=(3, 4))) == Layout(model, model, model)
    assert layout_of(told(3, 4, base_rows=(0, 7))) == Layout(model, model, (0, 0, 7))
    assert layout_of(told(3, 4, base_rows=(7, 7))) == Layout(model, model, None)
    assert layout_of(told(7, 7, base_rows=(3, 4))) == Layout(model, None, model)
    assert layout_of(told(7, base_rows=(7,))) == Layout((0, 7), (0, 7), (0, 7))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (told(3, 4, starts=(0, 2)), r"^start is 2 on rank 1 of the group, expected 3, where .* 0 ends: they overlap"),
        (told(3, 4, starts=(0, 5)), r"^start is 5 on rank 1 of the group, expected 3.*between them is a gap"),
        (told(3, 4, starts=(1, 4)), r"^start is 1 on rank 0 of the group, expected 0, the first token"),
        (
            told(3, 4, base_rows=(3, 5)),
            r"^base_weight has \[3, 5\] rows.*expected 7 in all, as weight has, or 7 on each",
        ),
        (told(3, 4, base_rows=(7, 3)), r"^base_weight has \[7, 3\] rows"),
        (told(3, 4, vocab_size=8), r"^vocab_size of VocabShard is 8, expected at least 1 and at most 7"),
        (told(3, 4, vocab_size=0), r"^vocab_size of VocabShard is 0"),
        (told(0, 0), r"^weight has no rows"),
        ([Message(rows=1), Message(problem="ValueError: bias")], r"^group: on its rank 1 .* refused: ValueError: bias"),
        ([Message(same=(("top", "1"),)), Message()], r"^top is 1 on rank 0 of the group and None on rank 1"),
        ([Message(rows=3), Message(rows=3, vocab_size=5)], r"^vocab_size of VocabShard is None on rank 0.*5 on rank 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(messages, words):
    with pytest.raises(ValueError, match=words):
        layout_of(messages)


DELTA = make_inputs("linear_delta_logp", 6)
#: What of a call is otherwise on which rank, and the error on all of them.
DIFFERENT = {
    "ignore_index": ({2: {"ignore_index": 5}}, "ignore_index is -100 on rank 0 of the group and 5 on rank 2"),
    "top": ({1: {"top": True}}, "top is False on rank 0 of the group and True on rank 1"),
    "temperature": ({3: {"temperature": 2.0}}, r"transforms is .*1\.0.* on rank 0 of the group and .*2\.0.* on rank 3"),
    "dtype of a shard": (
        {1: {"weight": torch.zeros(0, 24, dtype=torch.bfloat16)}},
        r"the dtype of weight is torch\.float32 on rank 0 of the group and torch\.bfloat16 on rank 1",
    ),
    "a bias": ({2: {"bias": None}}, r"the dtype of bias is torch\.float32 on rank 0 .* and None on rank 2"),
    "a gradient": (
        {0: {"hidden": DELTA["hidden"].clone().requires_grad_()}},
        "requires_grad of hidden is True on rank 0 of the group and False on rank 1",
    ),
    "tokens": (
        {1: {name: x[:3] for name, x in DELTA.items() if x.shape[0] == 6}},
        r"the shape of hidden is \(6, 24\) on rank 0 of the group and \(3, 24\) on rank 1",
    ),
    "targets": (
        {3: {"target": DELTA["target"].flip(0)}},
        r"target \(a digest\) is \d+ on rank 0 of the group and \d+ on rank 3",
    ),
    "a weight's gradient": (
        {1: {"base_weight": make_inputs("linear_delta_logp", 6)["base_weight"][:0].requires_grad_()}},
        "requires_grad of base_weight is False on rank 0 of the group and True on rank 1",
    ),
    "workspace": ({3: {"workspace": 2**20}}, "workspace_limit is 268435456 on rank 0 .* and 1048576 on rank 3"),
    "a gap": ({1: {"shard": (103,)}, 0: {"shard": (0,)}}, "start is 103 on rank 1 .* expected 100.*a gap"),
    "an overlap": ({3: {"shard": (290,)}}, "start is 290 on rank 3 .* expected 297.*they overlap"),
}


@pytest.mark.parametrize(("changes", "words"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_ranks_that_are_called_otherwise(ranks, changes, words):
    """At the first call and later, and calls that are right go on in between."""
    for first, right, later in ranks.values(sharded_cases.misused, "linear_delta_logp", DELTA, alike(STARTS), changes):
        assert right is None
        for error in (first, later):
            assert isinstance(error, ValueError), error
            with pytest.raises(ValueError, match=words):
                raise error


#: Of one rank: what is wrong, the error there, and what the others have of it.
WRONG = {
    "shape": ({"weight": torch.zeros(3, 7)}, ValueError, r"weight has shape \(3, 7\)"),
    "type": ({"weight": torch.zeros(197, 24, dtype=torch.int64)}, TypeError, r"weight has dtype torch\.int64"),
    "bias": ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\), expected \(197,\)"),
    "option": ({"softcap": -1.0}, ValueError, r"softcap is -1\.0"),
    "target": ({"target": torch.zeros(3, 11)}, TypeError, r"target has dtype torch\.float32"),
    "shard": ({"shard": ("0",)}, TypeError, r"start of VocabShard is '0', expected an integer or None"),
}
#: Of one function alone.
WRONG_TOKENS = {
    "linear_policy_loss": ({"advantage": torch.zeros(5)}, ValueError, r"advantage has shape \(5,\)"),
    "linear_extrapolated_sample": ({"seed": -1}, ValueError, r"seed is -1"),
}


@pytest.mark.parametrize("op", ["linear_delta_logp", "linear_policy_loss"])
@pytest.mark.parametrize(("change", "kind", "words"), WRONG.values(), ids=WRONG.keys())
def test_an_error_of_one_rank_is_told_to_all(ranks, op, change, kind, words):
    inputs = DELTA if op == "linear_delta_logp" else make_policy_inputs()
    check_all_are_told(ranks, op, inputs, change, kind, words)


@pytest.mark.parametrize(("op", "wrong"), WRONG_TOKENS.items(), ids=WRONG_TOKENS.keys())
def test_an_error_in_other_inputs_of_one_rank_is_told_to_all(ranks, op, wrong):
    inputs = make_policy_inputs() if op == "linear_policy_loss" else DELTA | {"seed": 3}
    check_all_are_told(ranks, op, inputs, *wrong)


def test_draws_with_other_seeds_are_refused(ranks):
    inputs, changes = DELTA | {"seed": 3}, {1: {"seed": 4}}
    results = ranks.values(sharded_cases.misused, "linear_extrapolated_sample", inputs, alike(STARTS), changes)
    for first, right, later in results:
        assert right is None
        assert str(first) == str(later) == "seed is 3 on rank 0 of the group and 4 on rank 1, expected the same on all"


def check_all_are_told(ranks, op, inputs, change, kind, words):
    """On rank 2 the error, on the others what it is; at the first call and later."""
    results = ranks.values(sharded_cases.misused, op, inputs, alike(STARTS), {2: change})
    for rank, (first, right, later) in enumerate(results):
        assert right is None
        for error in (first, later):
            if rank == 2:
                with pytest.raises(kind, match=rf"^{words}"):
                    raise error
                continue
            told = rf"^group: on its rank 2 the call is refused: {kind.__name__}: {words}"
            with pytest.raises(ValueError, match=told):
                raise error


def test_one_group_has_several_vocabularies(ranks):
    """Also such of which a rank has as many tokens of each."""
    cuts = [(0, 6, 8, 9, 11), (0, 6, 8, 9, 12), (0, 6, 8, 9, 11), (0, 5, 8, 9, 12)]
    batches = [(make_inputs("linear_logp", v=starts[-1]), alike(starts)) for starts in cuts]
    for found in ranks.values(sharded_cases.vocabularies, "linear_logp", batches):
        for (inputs, _), stats in zip(batches, found, strict=True):
            for value, expected in zip(stats, call("linear_logp", inputs), strict=True):
                torch.testing.assert_close(value, expected)


def test_a_target_outside_of_the_vocabulary_is_the_error_of_one_device(ranks):
    inputs = DELTA | {"target": DELTA["target"].clone()}
    inputs["target"][4] = V
    for errors in ranks.values(sharded_cases.misused, "linear_delta_logp", inputs, alike(STARTS), {}):
        for error in errors:
            assert isinstance(error, IndexError)
            assert str(error).startswith(f"target[4] is {V}, expected a token in [0, {V})")


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_what_is_no_group_is_refused(op):
    inputs = make_inputs(op)
    with pytest.raises(TypeError, match=r"^group is str, expected a process group of torch.distributed"):
        getattr(dlogp_kernels, op)(**inputs, group="default")
    with pytest.raises(TypeError, match=r"^group is NoneType, expected a process group"):
        getattr(dlogp_kernels, op)(**inputs, group=VocabShard(None))


def test_a_rank_that_dies_is_an_error_of_the_others_within_the_time_out():
    ranks = Ranks(3)
    try:
        began = time.monotonic()
        pipes = ranks.send(sharded_cases.rank_that_dies, "linear_logp", make_inputs("linear_logp"), alike((0, 9, 9, V)))
        for pipe in pipes[:2]:
            error = received(pipe)
            assert isinstance(error, RuntimeError), error
        assert time.monotonic() - began < TIMEOUT_SECONDS + 15
    finally:
        ranks.close()
