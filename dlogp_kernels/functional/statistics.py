"""`linear_logp`, `linear_delta_logp`, `logp` and `delta_logp`: shapes and what z is, as the package says."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..results import DeltaLogpStats, LogpStats, stats_of
from ..sharding import VocabShard
from . import sharded
from .dtensors import takes_dtensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@takes_dtensors
def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
    group: "ProcessGroup | VocabShard | None" = None,
) -> LogpStats:
    """`z.log_softmax(-1).gather(-1, target)` with z = `hidden @ weight.T + bias`, and the entropy, without the logits.

    Args:
        hidden: (…, D), hidden states before the last layer. bfloat16, float16, float32 or float64.
        weight: (V, D), the last layer. Its dtype may differ from that of `hidden`; the wider one computes.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        bias: (V,), optional.
        temperature: > 0; logits are divided by it, after the softcap.
        softcap: > 0 or None; z = softcap · tanh(z / softcap) (Gemma).
        logit_scale: > 0; logits are multiplied by it, before the softcap (Cohere, Granite).
        ignore_index: where the target is this, outputs are 0, without gradient, and a row whose targets are all
            ignored is not read and costs nothing.
        top: also give the most likely token, the first of several, and its log p; of up to 2²⁴ tokens.
        group: a `torch.distributed` process group over whose ranks the vocabulary is sharded. weight and bias are then
            those of this rank's tokens, which follow on those of the rank before it; any number of them, also none.
            hidden and target are the same on all ranks, and so are the results, bit for bit. VocabShard says more, of
            padding for example.

    Returns:
        LogpStats: `logp` (the shape of `target`), `entropy` and `lse` = log Σ exp z (…), in nats, float32 (float64 if
        any input is); with `top`, `top_token` (int64, −1 for an ignored row) and `top_logp` (…), else None.

    Gradients: of every output but those of `top` with respect to `hidden`, `weight` and `bias`, in the dtype of each;
    only those that are required are computed, from logits recomputed in blocks. Second derivatives raise RuntimeError.

    Memory over inputs and outputs is bounded (`backends.workspace_limit`), whatever the number of tokens and V. Results
    are the same bit for bit in every run; with the compiled kernels a row's do not depend on the other rows. Within
    `torch.autocast`, 32-bit inputs are converted to the autocast dtype, as in `torch.nn.functional.linear`.

    With `group` each rank sends 20 bytes a token in forward (float32; 4 more for each further candidate, 8 for `top`).
    In backward the weight's gradient stays on its rank, and that of hidden is added over ranks, in their order: twice
    its size is sent. All ranks make the same calls in the same order. They compare how they were called, and an error
    of one is an error on all: at every call where they talk on the CPU, by NCCL alone and compiled at the first one of
    a kind. Numbers of hidden states are not compared. A rank that stops is an error after the group's time-out.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option that does not fit, by name.
        IndexError: a target outside [0, V), by position (on CUDA the row's outputs are NaN instead, unless
            `DLOGP_CHECK=1` is set).

    Source: entropy and log-probability of "On the Direction of RLVR Updates for LLM Reasoning", arXiv 2603.22117.
    """
    if group is not None:
        options = (temperature, softcap, logit_scale)
        return sharded.linear_logp(group, (hidden, weight, bias), target, options, ignore_index, top)
    head = checks.check_head(hidden, weight, bias)
    targets = checks.check_target(target, "hidden", hidden, ignore_index, weight.shape[0])
    transform = checks.check_transform(temperature, softcap, logit_scale)
    checks.check_top(top, weight.shape[0])
    outputs = torch.ops.dlogp.linear_logp_fwd(*head, transform, targets, ignore_index, top)
    return stats_of(LogpStats, outputs, hidden, target, top)


@takes_dtensors
def linear_delta_logp(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    base_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    base_softcap: float | None = None,
    logit_scale: float = 1.0,
    base_logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
    group: "ProcessGroup | VocabShard | None" = None,
) -> DeltaLogpStats:
    """Δlog p = log π(target) − log π_base(target) of two models in one pass without logits; entropies and KLs too.

    Equivalent to `linear_logp` of each model, a subtraction, and with p = softmax(z), q = softmax(z_base):
    `kl = (p * (p.log() - q.log())).sum(-1)` and `reverse_kl = (q * (q.log() - p.log())).sum(-1)`.

    Args:
        hidden, base_hidden: (…, D) and (…, D_base); the same leading shape.
        weight, base_weight: (V, D) and (V, D_base); one vocabulary.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        bias, base_bias: (V,), optional.
        temperature: > 0, for both models.
        softcap, base_softcap, logit_scale, base_logit_scale: of each model, as in `linear_logp`.
        ignore_index, top: as in `linear_logp`.
        group: as in `linear_logp`, for both models. One of both weights may be parted over the ranks in another way, or
            be whole on each: its rows are then sent to where the other's are, or taken from the whole.

    Returns:
        DeltaLogpStats: `delta_logp`, `logp`, `base_logp` (the shape of `target`); `entropy`, `base_entropy`,
        `kl` = KL(π ‖ π_base), `reverse_kl`, `lse`, `base_lse` (…); nats, float32 (float64 if any input is). Both KLs
        are ≥ 0; a token with p = 0 contributes 0, one with p > 0 and q = 0 makes KL +inf. With `top`: `top_token`,
        `top_logp`, `base_top_token`, `base_top_logp` (…), as in `linear_logp`.

    Gradients, memory, autocast, Raises: as in `linear_logp`, for both models' inputs.

    Source: arXiv 2603.22117, Eq. 1 and Sec. 2.
    """
    if group is not None:
        models = (hidden, weight, bias), (base_hidden, base_weight, base_bias)
        options = (temperature, softcap, base_softcap, logit_scale, base_logit_scale)
        return sharded.linear_delta_logp(group, *models, target, options, ignore_index, top)
    head = checks.check_head(hidden, weight, bias)
    base = checks.check_base_head(hidden, weight, base_hidden, base_weight, base_bias)
    targets = checks.check_target(target, "hidden", hidden, ignore_index, weight.shape[0])
    transforms = checks.check_transforms(temperature, softcap, base_softcap, logit_scale, base_logit_scale)
    checks.check_top(top, weight.shape[0])
    heads = *head, transforms[0], *base, transforms[1]
    outputs = torch.ops.dlogp.linear_delta_logp_fwd(*heads, targets, ignore_index, top)
    return stats_of(DeltaLogpStats, outputs, hidden, target, top)


def logp(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
) -> LogpStats:
    """`logits.log_softmax(-1).gather(-1, target)` and the entropy, each logit read once.

    Args:
        logits: (…, V), raw logits: scale, softcap and temperature are applied here. Any strides.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        temperature, softcap, logit_scale, ignore_index, top: as in `linear_logp`.

    Returns:
        LogpStats: as in `linear_logp`.

    Gradients: of every output with respect to `logits`. Second derivatives raise RuntimeError.

    Raises: as in `linear_logp`.
    """
    checks.check_logits("logits", logits)
    targets = checks.check_target(target, "logits", logits, ignore_index, logits.shape[-1])
    transform = checks.check_transform(temperature, softcap, logit_scale)
    checks.check_top(top, logits.shape[-1])
    outputs = torch.ops.dlogp.logp_fwd(checks.as_rows(logits), transform, targets, ignore_index, top)
    return stats_of(LogpStats, outputs, logits, target, top)


def delta_logp(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    base_softcap: float | None = None,
    logit_scale: float = 1.0,
    base_logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
) -> DeltaLogpStats:
    """Δlog p, both entropies and both KLs of two tensors of logits, each logit read once.

    Args:
        logits, base_logits: (…, V) of the model and of the base; the same shape, any strides.
        target: (…) or (…, K), token ids in [0, V), or `ignore_index`.
        temperature and the other options: as in `linear_delta_logp`.

    Returns:
        DeltaLogpStats: as in `linear_delta_logp`.

    Gradients: of every output with respect to both logits. Second derivatives raise RuntimeError.

    Raises: as in `linear_logp`.

    Source: arXiv 2603.22117, Eq. 1 and Sec. 2.
    """
    checks.check_pair_of_logits(logits, base_logits)
    targets = checks.check_target(target, "logits", logits, ignore_index, logits.shape[-1])
    transforms = checks.check_transforms(temperature, softcap, base_softcap, logit_scale, base_logit_scale)
    checks.check_top(top, logits.shape[-1])
    models = checks.as_rows(logits), transforms[0], checks.as_rows(base_logits), transforms[1]
    outputs = torch.ops.dlogp.delta_logp_fwd(*models, targets, ignore_index, top)
    return stats_of(DeltaLogpStats, outputs, logits, target, top)
