"""The comparison of frequencies by which the draws of samplers are judged sees a distribution a little wrong."""

from functools import partial

import frequencies
import torch

CPU = torch.device("cpu")


def _multinomial(logits, seed, step, power=1.0):
    generator = torch.Generator().manual_seed(seed + step)
    return [torch.multinomial((power * logits[0]).softmax(-1), len(logits), True, generator=generator)]


def test_frequencies_see_a_wrong_distribution():
    for power, right in ((1.0, True), (1.05, False)):
        draw = partial(_multinomial, power=power)
        assert (frequencies.p_value(draw, 3000, 50_000, 1, CPU) > 1e-4) == right
    found = frequencies.tail(_multinomial, 1e-4, 1000, 5000, 4, 1, CPU)
    assert found.expected == 2000 and abs(found.tokens.numel() - 2000) < 4.5 * 2000**0.5
