"""The sampling ops in plain PyTorch: the definition, in blocks of rows."""

import torch
from torch import Tensor

from ..inputs import Head, Transform
from ..reference import sampling as reference_sample
from ..reference.statistics import accumulation_dtype, transform_logits
from ._blocks import forward_blocks, rows_of, tiled_logits

#: Of 8 bytes, while sampling: the noise is computed in 64-bit integers.
_SAMPLE_TEMPORARIES = 24
#: Both models' logits, transformed and not.
_PAIR_OF_LOGITS = 4
#: What sampling takes of the workspace; of hidden states, logits and tiles of the weights take half of the rest each.
_SHARE = 2


def extrapolated_sample(
    logits: Tensor,
    base_logits: Tensor,
    row_id: Tensor | None,
    seed: int,
    step: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    gamma: float,
    criterion: str,
    threshold: float | None,
    draft: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    workspace: int,
) -> tuple[Tensor, ...]:
    dtype, device = accumulation_dtype(logits, base_logits), logits.device
    n, v = logits.shape[:-1].numel(), logits.shape[-1]
    row_id = torch.arange(n, device=device) if row_id is None else row_id
    seed_tensor = torch.full((1,), seed, device=device) if seed_tensor is None else seed_tensor
    steps = torch.full((1,), step, device=device) if step_tensor is None else step_tensor
    steps = steps.expand(n)
    options = (gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    blocks = []
    for rows in torch.arange(n, device=device).split(max(1, workspace // _SHARE // (v * 8 * _SAMPLE_TEMPORARIES))):
        z, base_z = (rows_of(x, rows).to(dtype) for x in (logits, base_logits))
        block = reference_sample.extrapolated_sample(z, base_z, row_id[rows], seed_tensor, steps[rows], *options)
        blocks.append(block)
    return tuple(torch.cat(values) for values in zip(*blocks, strict=True))


def linear_extrapolated_sample(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    bias: Tensor | None,
    base_bias: Tensor | None,
    softcap: float | None,
    base_softcap: float | None,
    logit_scale: float,
    base_logit_scale: float,
    row_id: Tensor | None,
    seed: int,
    step: int,
    seed_tensor: Tensor | None,
    step_tensor: Tensor | None,
    gamma: float,
    criterion: str,
    threshold: float | None,
    draft: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    workspace: int,
) -> tuple[Tensor, ...]:
    """Logits of a block of rows, then the op `extrapolated_sample`, by whatever backend serves that one.

    So it also serves what needs a whole row of logits, the filters, on every backend.
    """
    dtype, device = accumulation_dtype(hidden, weight, bias, base_hidden, base_weight, base_bias), hidden.device
    n, v = hidden.shape[:-1].numel(), weight.shape[0]
    row_id = torch.arange(n, device=device) if row_id is None else row_id
    per_row = step_tensor is not None and step_tensor.numel() > 1
    options = (gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    head = Head(hidden, weight, bias, Transform(1.0, softcap, logit_scale))
    base_head = Head(base_hidden, base_weight, base_bias, Transform(1.0, base_softcap, base_logit_scale))
    tile = forward_blocks((head, base_head), dtype, workspace).tile
    size = workspace // 4 // (v * dtype.itemsize * _PAIR_OF_LOGITS)
    blocks = []
    for rows in torch.arange(n, device=device).split(max(1, size)):
        z, base_z = (transform_logits(tiled_logits(x, rows, dtype, tile), *x.transform) for x in (head, base_head))
        steps = step_tensor[rows] if per_row and step_tensor is not None else step_tensor
        block = torch.ops.dlogp.extrapolated_sample(z, base_z, row_id[rows], seed, step, seed_tensor, steps, *options)
        blocks.append(block)
    return tuple(torch.cat(values) for values in zip(*blocks, strict=True))
