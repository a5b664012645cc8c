"""`linear_extrapolated_sample`: the same from hidden states and the last layers' weights in one pass."""

from typing import Any

from torch import Tensor

from ..inputs import Head, rebuilt
from ..reference.statistics import accumulation_dtype
from . import library
from .schemas import STRUCTURES


def _fake(*flat: Any) -> tuple[Tensor, ...]:
    head, base = rebuilt((Head, Head), iter(flat))
    return library.fake_sample(head.hidden, accumulation_dtype(*head[:3], *base[:3]))


def _truncates(*flat: Any) -> bool:
    head, _, _, options = rebuilt(STRUCTURES["linear_extrapolated_sample"], iter(flat))
    return options.truncate(head.weight.shape[0])


library.register("linear_extrapolated_sample", _fake, in_blocks=_truncates)
