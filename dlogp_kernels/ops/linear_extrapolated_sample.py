"""`linear_extrapolated_sample`: the same from hidden states and the last layers' weights in one pass."""

from typing import Any

from torch import Tensor

from ..reference.statistics import accumulation_dtype
from . import library


def _fake(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    bias: Tensor | None,
    base_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    return library.fake_sample(hidden, accumulation_dtype(hidden, weight, base_hidden, base_weight, bias, base_bias))


def _truncates(hidden: Tensor, weight: Tensor, *arguments: Any) -> bool:
    """A filter has to see a whole row of logits before a token is drawn; at temperature 0 none changes the token."""
    temperature, top_k, top_p, min_p = arguments[-4:]
    return temperature > 0.0 and (0 < top_k < weight.shape[0] or top_p < 1.0 or min_p > 0.0)


library.register("linear_extrapolated_sample", _fake, in_blocks=_truncates)
