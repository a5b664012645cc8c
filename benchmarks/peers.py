"""Other libraries' kernels for the same work, each behind one function that takes our arguments.

`function(hidden, weight, target)` for `linear_logp`; of the inputs of `linear_policy_loss` the loss. Nothing of a
library is imported before `load()`. Written from the source of liger-kernel 0.8.5 and trl 1.16.0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bench_policy import Loss
from .bench_statistics import SingleStats, linear_logp


@dataclass(frozen=True)
class Peer:
    """`op` is what one call computes; `gives` are the outputs that a gradient can flow into; `note`: what differs."""

    name: str
    op: str
    load: Callable[[], Callable[..., Any]]
    gives: tuple[str, ...] = ()
    note: str | None = None


def _liger_flce() -> Callable[..., SingleStats]:
    """liger_kernel/transformers/fused_linear_cross_entropy.py: the weight comes first; "none" gives float32 NLL."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    of_tokens = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, target: SingleStats(-of_tokens(weight, hidden, target))


def _liger_sm90() -> Callable[..., SingleStats]:
    """liger_kernel/ops/fused_linear_scaled_cross_entropy.py: NLL in float32, entropy in bfloat16."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> SingleStats:
        # Input, weight, target, temperature, ignore_index, m_tiles_per_cluster (has no effect), return_entropy.
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0, -100, 1, True)
        return SingleStats(-nll, entropy.float())

    return function


def _liger_grpo() -> Callable[..., Loss]:
    """liger_kernel/chunked_loss/grpo_loss.py, with its defaults: one response at a time, the loss compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options = {"beta": 0.0, "use_ref_model": False, "epsilon_low": 0.2, "epsilon_high": 0.28, "loss_type": "dapo"}
    of_batch = LigerFusedLinearGRPOLoss(**options)

    def function(hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor, advantage: Tensor, **rest: Any) -> Loss:
        # Input, weight, selected_token_ids, attention_mask, advantages; returns the loss and metrics.
        return Loss(of_batch(hidden, weight, target, mask, advantage, old_per_token_logps=rest["old_logp"])[0])

    return function


def _trl_linear() -> Callable[..., SingleStats]:
    """trl/kernels/chunked_logprob.py: log p, and of the optional outputs only the entropy."""
    from trl.kernels import ChunkedLogProbFunction

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> SingleStats:
        # Hidden, weight, bias, targets, temperature, chunk_size (TRL's), softcap, logit_scale, outputs.
        arguments = (hidden, weight, None, target, 1.0, 32768, None, 1.0, ("entropy",))
        return SingleStats(*ChunkedLogProbFunction.apply(*arguments)[:2])

    return function


_ROUNDED = "logits are rounded to the inputs' dtype"
_BOTH = ("logp", "entropy")
#: By the process that measures them.
PEERS = {
    "eager": (Peer("eager", "linear_logp", lambda: linear_logp, _BOTH, _ROUNDED),),
    "compiled": (Peer("compiled", "linear_logp", lambda: torch.compile(linear_logp, dynamic=False), _BOTH, _ROUNDED),),
    "liger": (
        Peer("liger sm90", "linear_logp", _liger_sm90, _BOTH, "logits pass through float16, entropy is bfloat16"),
        Peer("liger flce", "linear_logp", _liger_flce, ("logp",), f"{_ROUNDED}; no entropy"),
        Peer("liger grpo", "linear_policy_loss", _liger_grpo, note=f"{_ROUNDED}; no reweighting"),
    ),
    "trl": (Peer("trl", "linear_logp", _trl_linear, _BOTH, _ROUNDED),),
}
