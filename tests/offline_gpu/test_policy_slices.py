"""How `linear_policy_loss` cuts rows on a GPU: what lies in one buffer must not overlap."""

import itertools

import pytest
import torch

from dlogp_kernels.inputs import Head, Transform
from dlogp_kernels.triton import linear_policy_loss

MIB = 2**20


def heads_of(models: int, vocabulary: int, dtype: torch.dtype) -> list[Head]:
    hidden, weight = (torch.empty(rows, 64, dtype=dtype, device="meta") for rows in (8192, vocabulary))
    return models * [Head(hidden, weight, None, Transform(1.0, None, 1.0))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("vocabulary", [7, 3_001, 151_936])
def test_gradients_of_slices_end_before_their_logits_begin(models, vocabulary, dtype):
    heads = heads_of(models, vocabulary, dtype)
    for rows, workspace in itertools.product((1, 16, 100, 2048, 2049, 8192, 100_000), (MIB, 16 * MIB, 256 * MIB)):
        tiling = linear_policy_loss._tiling(heads, rows, workspace)
        assert sum(tiling.slices) == tiling.block >= min(rows, 16) and min(tiling.slices) > 0
        assert tiling.slices == sorted(tiling.slices, reverse=True)
        buffer, begin = linear_policy_loss._Buffer(heads, tiling), 0
        for count in tiling.slices:
            gradients, logits = buffer.gradients(begin, count), buffer.logits(count)
            assert logits.shape == (models, count, vocabulary) and gradients.shape == (count, vocabulary)
            end = (gradients.storage_offset() + count * gradients.stride(0)) * dtype.itemsize
            assert end <= 4 * logits.storage_offset() and logits.storage_offset() % 128 == 0
            assert 4 * (logits.storage_offset() + models * logits.stride(0)) <= tiling.bytes
            begin += count
        if tiling.slices[-1] > 16:  # else the least that there is may be more
            assert tiling.bytes + tiling.block * models * 64 * dtype.itemsize <= 3 * workspace


def test_a_large_vocabulary_leaves_room_for_blocks_of_2048_rows():
    """With a first slice of 768, where a buffer of their own would take 222 MiB for 384 rows of logits."""
    tiling = linear_policy_loss._tiling(heads_of(1, 151_936, torch.bfloat16), 8192, 256 * MIB)
    assert tiling.block == 2048 and tiling.slices[0] >= 768
