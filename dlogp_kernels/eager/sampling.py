"""The sampling ops in plain PyTorch: the definition, in blocks of rows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..inputs import Head, NoiseInputs, SampleOptions
from ..reference import sampling as reference_sample
from ..reference.statistics import accumulation_dtype, transform_logits
from ._blocks import forward_blocks, rows_of, tiled_logits

#: Of 8 bytes, while sampling: the noise is computed in 64-bit integers.
_SAMPLE_TEMPORARIES = 24
#: Both models' logits, transformed and not.
_PAIR_OF_LOGITS = 4
#: Of 8 bytes, of a row's products with the weight of a token.
_PRODUCT_TEMPORARIES = 4
#: Rows of a product of 16-bit numbers on a GPU, whose library sums in another order for another number: missing ones
#: are zeros, so that a row's bits do not depend on the others or on the workspace.
_PRODUCT_ROWS = 32
#: What sampling takes of the workspace; of hidden states, logits and tiles of the weights take half of the rest each.
_SHARE = 2


def extrapolated_sample(
    logits: Tensor,
    base_logits: Tensor,
    noise: NoiseInputs,
    options: SampleOptions,
    workspace: int,
) -> tuple[Tensor, ...]:
    dtype, device = accumulation_dtype(logits, base_logits), logits.device
    n, v = logits.shape[:-1].numel(), logits.shape[-1]
    row_id, seed, steps = counters_of(noise, n, device)
    blocks = []
    for rows in torch.arange(n, device=device).split(max(1, workspace // _SHARE // (v * 8 * _SAMPLE_TEMPORARIES))):
        z, base_z = (rows_of(x, rows).to(dtype) for x in (logits, base_logits))
        block = reference_sample.extrapolated_sample(
            z, base_z, row_id[rows], seed, steps[rows], *options, noise.first_token
        )
        blocks.append(block)
    return tuple(torch.cat(values) for values in zip(*blocks, strict=True))


def counters_of(noise: NoiseInputs, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """row_id (rows,), seed (1,) and step (rows,) as tensors."""
    row_id = torch.arange(rows, device=device) if noise.row_id is None else noise.row_id
    seed = torch.full((1,), noise.seed, device=device) if noise.seed_tensor is None else noise.seed_tensor
    steps = torch.full((1,), noise.step, device=device) if noise.step_tensor is None else noise.step_tensor
    return row_id, seed, steps.expand(rows)


def linear_extrapolated_sample(
    head: Head,
    base_head: Head,
    noise: NoiseInputs,
    options: SampleOptions,
    workspace: int,
    vocabulary: int | None = None,
    whole: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> tuple[Tensor, ...]:
    """Logits of a block of rows, then the op `extrapolated_sample`, by whatever backend serves that one.

    So it also serves what needs a whole row of logits, the filters, on every backend but "cpu". Where the weights are
    those of a part of the vocabulary, `whole` makes rows of all its logits of theirs.
    """
    dtype, device = accumulation_dtype(*head[:3], *base_head[:3]), head.hidden.device
    n, v = head.hidden.shape[:-1].numel(), head.weight.shape[0] if vocabulary is None else vocabulary
    row_id = torch.arange(n, device=device) if noise.row_id is None else noise.row_id
    steps = noise.step_tensor
    heads = (head, base_head)
    if all(_multiplies_as_it_is(one, dtype) for one in heads):
        size, logits_of = _PRODUCT_ROWS, _product
    else:
        size = workspace // 4 // (v * dtype.itemsize * _PAIR_OF_LOGITS)
        logits_of = partial(tiled_logits, dtype=dtype, tile=forward_blocks(heads, dtype, workspace).tile)
    blocks = []
    for rows in torch.arange(n, device=device).split(max(1, size)):
        z, base_z = (whole(transform_logits(logits_of(x, rows), *x.transform)) for x in heads)
        own_steps = steps[rows] if steps is not None and steps.numel() > 1 else steps
        own = noise._replace(row_id=row_id[rows], step_tensor=own_steps)
        blocks.append(torch.ops.dlogp.extrapolated_sample(z, base_z, *own, *options))
    return tuple(torch.cat(values) for values in zip(*blocks, strict=True))


def logits_at(head: Head, token: Tensor, workspace: int) -> Tensor:
    """z of some tokens of each row, (N, K), in float64, of a head without a bias.

    A row's bits do not depend on the other rows.
    """
    n, width = token.shape[0], head.weight.shape[1]
    size = max(1, workspace // (token.shape[1] * width * 8 * _PRODUCT_TEMPORARIES))
    blocks = []
    for rows in torch.arange(n, device=token.device).split(size):
        products = rows_of(head.hidden, rows).double()[:, None] * head.weight[token[rows]].double()
        blocks.append(_sum_by_halves(products))
    return transform_logits(torch.cat(blocks), *head.transform)


def _sum_by_halves(x: Tensor) -> Tensor:
    """Over the last dimension, in an order that does not depend on the others, as a library's does."""
    half = 1 << (x.shape[-1] - 1).bit_length() >> 1
    x = pad(x, (0, 2 * half - x.shape[-1])) if half else x
    while half:
        x, half = x[..., :half] + x[..., half:], half // 2
    return x[..., 0]


def _multiplies_as_it_is(head: Head, dtype: torch.dtype) -> bool:
    """Whether the device multiplies the weight without a converted copy, and adds in float32."""
    kinds = {head.hidden.dtype, head.weight.dtype}
    on_gpu = head.hidden.is_cuda and torch.version.hip is None
    return on_gpu and dtype == torch.float32 and len(kinds) == 1 and kinds <= {torch.bfloat16, torch.float16}


def _product(head: Head, rows: Tensor) -> Tensor:
    """Logits of at most _PRODUCT_ROWS rows."""
    hidden = pad(rows_of(head.hidden, rows), (0, 0, 0, _PRODUCT_ROWS - rows.shape[0]))
    raw = torch.mm(hidden, head.weight.t(), out_dtype=torch.float32)[: rows.shape[0]]
    return raw if head.bias is None else raw.add_(head.bias)
