"""`extrapolated_sample`: a draft token, a criterion, and a token of the extrapolated distribution, from two logits."""

import math
from typing import Any

import torch
from torch import Tensor

from . import library


def _fake(logits: Tensor, base_logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    rows = math.prod(logits.shape[:-1])  # numel() would fix a symbolic size
    tokens = [logits.new_empty(rows, dtype=torch.int64) for _ in range(2)]
    dtype = library.output_dtype(logits, base_logits)
    values = [logits.new_empty(rows, dtype=dtype) for _ in range(3)]
    return *tokens, logits.new_empty(rows, dtype=torch.bool), *values


library.register("extrapolated_sample", _fake)
