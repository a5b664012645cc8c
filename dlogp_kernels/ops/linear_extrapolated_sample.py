"""`linear_extrapolated_sample`: the same from hidden states and the last layers' weights in one pass."""

from typing import Any

from torch import Tensor

from ..inputs import Head, SampleOptions, rebuilt
from ..reference.statistics import accumulation_dtype
from . import library


def fake(*flat: Any) -> tuple[Tensor, ...]:
    head, base = rebuilt((Head, Head), iter(flat))
    return library.fake_sample(head.hidden, accumulation_dtype(*head[:3], *base[:3]))


def _truncates(hidden: Tensor, weight: Tensor, *rest: Any) -> bool:
    return SampleOptions._make(rest[-len(SampleOptions._fields) :]).truncate(weight.shape[0])


library.register("linear_extrapolated_sample", fake, in_blocks=_truncates)
