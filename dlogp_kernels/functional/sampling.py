"""`extrapolated_sample` and `linear_extrapolated_sample`: shapes and what z is, as the package says."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..ops.library import without_gradient
from ..results import Sample, shaped
from ..sharding import VocabShard
from . import sharded
from .dtensors import takes_dtensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def extrapolated_sample(
    logits: Tensor,
    base_logits: Tensor,
    *,
    gamma: float = 0.0,
    criterion: str = "all",
    threshold: float | None = None,
    draft: str = "base",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    step: int | Tensor = 0,
) -> Sample:
    """Selective token replacement with extrapolation (Algorithm 1 and Fig. 4 of the paper), a token a row, in one op.

    Draws a draft token from one model; where the criterion holds, replaces it by a draw from
    softmax(((1 + γ) z_R − γ z_B) / T), which is the RL model where γ = 0. The equivalent in plain PyTorch, line by
    line, is `dlogp_kernels.reference.sampling.extrapolated_sample`.

    Args:
        logits, base_logits: (…, V), of the RL model and of its base at the same positions; the same shape, any strides.
        gamma: ≥ 0, how far to go beyond the RL model.
        criterion: when to replace: `delta_logp` (Δlog p of the draft token < threshold), `kl`, `reverse_kl`, `avg_kl`,
            `entropy` (of the base), `rl_entropy` (> threshold), `random` (with probability threshold), `all`, `none`.
            At temperature 1 over the whole vocabulary; inequalities are strict.
        threshold: τ of the criterion, of `random` in [0, 1]; None for `all` and `none`.
        draft: who draws the draft token, "base" or "rl".
        temperature: ≥ 0; 0 takes the largest logit, the first one if there are several.
        top_k, top_p, min_p: filters of both draws, in this order, as `transformers` defines them, on logits / T. 0, 1
            and 0 switch them off. Tokens of equal logits are kept or dropped together.
        seed: 64 bits. The noise of a token is a function of (seed, row_id, step, token) alone, the same on every
            device, and not of the batch around the row.
        row_id: (…) int64 in [0, 2³²), the identity of each row's noise; 0, 1, … in order by default.
        step: in [0, 2³²): the position of the token in its sequence, for example. For all rows, or as a tensor (…).
            Tensors with other numbers are refused on the CPU; on a GPU the lower 32 bits count.
            seed and step may be int64 tensors of one element on the device of the logits: a captured CUDA graph then
            draws anew at every replay.

    Returns:
        Sample, each field (…). A row with NaN or +inf, or without a finite logit, gives token −1 and NaN.

    A token with z_R = −inf is never a replacement. Where z_B alone is −inf, the row's least finite z_B stands in.

    Gradients: none.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option that does not fit, by name. UserWarning: a threshold of
            `delta_logp` that is not below 0 replaces nearly every token.

    Source: arXiv 2603.22117, Algorithm 1, Sec. 4 (extrapolation).
    """
    checks.check_pair_of_logits(logits, base_logits)
    options = checks.check_sampling(gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    noise = checks.check_noise("logits", logits, seed, row_id, step)
    rows, base_rows = checks.as_rows(logits), checks.as_rows(base_logits)
    drawn = without_gradient(torch.ops.dlogp.extrapolated_sample, rows, base_rows, *noise, *options)
    return Sample(*shaped(drawn, logits))


@takes_dtensors
def linear_extrapolated_sample(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    *,
    bias: Tensor | None = None,
    base_bias: Tensor | None = None,
    softcap: float | None = None,
    base_softcap: float | None = None,
    logit_scale: float = 1.0,
    base_logit_scale: float = 1.0,
    gamma: float = 0.0,
    criterion: str = "all",
    threshold: float | None = None,
    draft: str = "base",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    row_id: Tensor | None = None,
    step: int | Tensor = 0,
    group: "ProcessGroup | VocabShard | None" = None,
) -> Sample:
    """`extrapolated_sample` straight from hidden states, each weight read once, without the logits.

    Equivalent to `extrapolated_sample(z, base_z, …)` with z = softcap_c(logit_scale · (hidden @ weight.T + bias)) in
    float32 (float64 for float64 inputs) and the same of the base: the same noise, and the same tokens but for ties
    within rounding. In one pass over the vocabulary the statistics of each row are folded while the draft and what may
    replace it are drawn; of a tile of logits only the winners stay.

    Args:
        hidden, base_hidden: (…, D) and (…, D_base), of the RL model and of its base at the same positions.
        weight, base_weight: (V, D) and (V, D_base); one vocabulary.
        bias, base_bias: (V,), optional; −inf masks a token.
        softcap, base_softcap, logit_scale, base_logit_scale: of each model, as in `linear_logp`.
        gamma, criterion, threshold, draft: as in `extrapolated_sample`.
        temperature: ≥ 0, of both draws, as in `extrapolated_sample`; the criterion and the outputs are at 1.
        top_k, top_p, min_p: as in `extrapolated_sample`. A filter needs whole rows of logits: with one of them on,
            those of as many rows as the workspace holds exist at a time, on a GPU in 16 bits those of 32.
        seed, row_id, step: as in `extrapolated_sample`.
        group: as in `linear_delta_logp`. Each rank draws from its shard and tells the others of its winners, 64 bytes a
            row; 96 where the criterion is a divergence or an entropy, for which weights are read twice. Three kinds of
            calls gather all logits of a block of rows instead, 8 V bytes a row, and every rank draws from them: with a
            filter, with a bias, which may mask tokens, and where a shard begins with a token that is no multiple of 4.
            In the others logits are taken to be finite (of a row with −inf the token may be −1, or another than over
            the whole), and log p has errors of up to 2e-6, near 0 too. Ranks keep 300 bytes a row meanwhile, besides
            the workspace.

    Returns:
        Sample, each field (…), as from `extrapolated_sample`.

    Gradients: none. Memory over inputs and outputs is bounded (`backends.workspace_limit`), whatever the number of rows
    and V. With the compiled kernels a row's result does not depend on the other rows. Within `torch.autocast`, 32-bit
    inputs are converted to the autocast dtype, as in `torch.nn.functional.linear`.

    Raises:
        ValueError, TypeError, UserWarning: as `extrapolated_sample` and `linear_delta_logp`.

    Source: arXiv 2603.22117, Algorithm 1, Sec. 4 (extrapolation).
    """
    if group is not None:
        models = (hidden, weight, bias), (base_hidden, base_weight, base_bias)
        of_logits = (1.0, softcap, base_softcap, logit_scale, base_logit_scale)
        of_draws = (gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
        return sharded.linear_extrapolated_sample(group, *models, of_logits, of_draws, (seed, row_id, step))
    head = checks.check_head(hidden, weight, bias)
    base = checks.check_base_head(hidden, weight, base_hidden, base_weight, base_bias)
    transforms = checks.check_transforms(1.0, softcap, base_softcap, logit_scale, base_logit_scale)
    options = checks.check_sampling(gamma, criterion, threshold, draft, temperature, top_k, top_p, min_p)
    noise = checks.check_noise("hidden", hidden, seed, row_id, step)
    heads = *head, transforms[0], *base, transforms[1]
    drawn = without_gradient(torch.ops.dlogp.linear_extrapolated_sample, *heads, *noise, *options)
    return Sample(*shaped(drawn, hidden))
