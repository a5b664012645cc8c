"""`extrapolated_sample`: a draft token, a criterion, and a token of the extrapolated distribution, from two logits."""

from typing import Any

from torch import Tensor

from ..reference.statistics import accumulation_dtype
from . import library


def _fake(logits: Tensor, base_logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return library.fake_sample(logits, accumulation_dtype(logits, base_logits))


library.register("extrapolated_sample", _fake)
