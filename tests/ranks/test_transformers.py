"""Tensor-parallel and FSDP2-sharded models of transformers: numbers and gradients of the whole model."""

import re

import pytest

pytest.importorskip("transformers")

import parallel_models
import torch
from ranks import Ranks

from dlogp_kernels.hf import token_metrics
from dlogp_kernels.hf.tiny import tiny_qwen3

VOCABULARY = 157


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def saved(directory, **options):
    tiny_qwen3(VOCABULARY, num_layers=2, **options).save_pretrained(directory)
    return directory


def tokens(seed):
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("function", [parallel_models.measured, parallel_models.trainers_head])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_token_logp(ranks, tmp_path, kind, tied, function):
    check_token_logp(ranks, saved(tmp_path / "model", tie_word_embeddings=tied), kind, function)


@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_four_processes(four_ranks, tmp_path, kind):
    heads = {"num_heads": 4, "num_key_value_heads": 4}
    path = saved(tmp_path / "model", tie_word_embeddings=True, **heads)
    check_token_logp(four_ranks, path, kind, parallel_models.measured)
    check_pair(four_ranks, path, saved(tmp_path / "base", seed=1, **heads), (kind, kind))


def check_token_logp(ranks, path, kind, function):
    """FSDP's ranks have their own tokens, and the mean of their gradients; tensor-parallel ones share them."""
    size = len(ranks.processes)
    batches = [tokens(0 if kind == "tp" else rank) for rank in range(size)]
    alone = ranks.values(parallel_models.measured, path, "whole", batches)
    found = ranks.values(function, path, kind, batches)
    for rank, result in enumerate(found):
        assert result.head == "DTensor" and alone[rank].head != "DTensor"
        torch.testing.assert_close(result.logp, alone[rank].logp, rtol=0, atol=5e-6)
        torch.testing.assert_close(result.entropy, alone[rank].entropy, rtol=0, atol=5e-6)
        assert result.gradients.keys() == alone[rank].gradients.keys()
        for name, grad in result.gradients.items():
            mean = torch.stack([each.gradients[name] for each in alone]).mean(0)
            assert (grad - mean).abs().max() <= 1e-4 * mean.abs().max(), name


def test_ranks_with_whole_weights_may_run_apart(ranks, tmp_path):
    pytest.importorskip("trl")
    for before, within, after in ranks.values(parallel_models.whole_within, saved(tmp_path / "model")):
        assert before == after and set(before[0]) == {"DTensor"}
        # Of the root and two layers.
        assert before[1] == [False, True, True]
        assert set(within[0]) == {"Parameter"} and not any(within[1])


@pytest.mark.parametrize("targets", [None, ["lm_head"], ["lm_head", "q_proj"]], ids=str)
def test_a_last_layer_is_trained_alone_and_by_adapters(ranks, tmp_path, targets):
    """Of a frozen backbone FSDP has nothing to do in backward, and with that nothing to be told by."""
    if targets is not None:
        pytest.importorskip("peft")
    path, batch = saved(tmp_path / "model", tie_word_embeddings=False), tokens(0)
    alone, _ = ranks.values(parallel_models.last_layer_trained, path, "whole", batch, targets)
    losses, evaluated = alone
    assert losses[2] < losses[0] - 0.1 and losses[1:] == pytest.approx(evaluated[:2], abs=1e-6)
    for found in ranks.values(parallel_models.last_layer_trained, path, "fsdp", batch, targets):
        assert found[0] == pytest.approx(losses, abs=1e-4) and found[1] == pytest.approx(evaluated, abs=1e-4)


@pytest.mark.parametrize("together", [False, True], ids=["", "a last layer with a group of its own"])
def test_mixed_precision_with_outputs_in_float32(ranks, tmp_path, together):
    """The dtype of neither logits nor hidden states tells then how much rounding there is."""
    path = saved(tmp_path / "model", tie_word_embeddings=False)
    for logp, own in ranks.values(parallel_models.mixed, path, tokens(0), together):
        assert logp.dtype == own.dtype == torch.float32
        torch.testing.assert_close(logp, own, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "remedy"), [("fsdp", r"fully_shard\(model.get_base_model\(\)\)"), ("tp", "merge it before")]
)
def test_adapters_that_can_not_be_served(ranks, tmp_path, kind, remedy):
    pytest.importorskip("peft")
    for message in ranks.values(parallel_models.refused, saved(tmp_path / "model"), kind, tokens(0)):
        assert re.search(remedy, message), message


@pytest.mark.parametrize("kinds", [("tp", "tp"), ("tp", "whole"), ("fsdp", "fsdp")], ids=" and ".join)
def test_pairs(ranks, tmp_path, kinds):
    check_pair(ranks, saved(tmp_path / "rl"), saved(tmp_path / "base", seed=1), kinds)


def check_pair(ranks, path, base_path, kinds):
    models = [parallel_models.load(place, "whole", 1) for place in (path, base_path)]
    with torch.no_grad():
        expected = token_metrics(*models, tokens(0))
    for found in ranks.values(parallel_models.pair, path, base_path, kinds, tokens(0)):
        for value, other in zip(found, (x for x in expected if x is not None), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_training_saves_and_resumes(ranks, tmp_path, kind):
    """The losses of the whole model, and after a checkpoint those of a run that went on."""
    path, batch = saved(tmp_path / "model"), tokens(0)
    (alone, _) = ranks.values(parallel_models.trained, path, "whole", batch, 5, tmp_path / "whole", False)
    (uninterrupted, _) = ranks.values(parallel_models.trained, path, kind, batch, 5, tmp_path / "one", False)
    assert uninterrupted == pytest.approx(alone, abs=1e-4) and alone[-1] < alone[0] - 1.0
    checkpoint = tmp_path / "checkpoint"
    (before, _) = ranks.values(parallel_models.trained, path, kind, batch, 3, checkpoint, False)
    (after, _) = ranks.values(parallel_models.trained, path, kind, batch, 2, checkpoint, True)
    assert before + after == uninterrupted
