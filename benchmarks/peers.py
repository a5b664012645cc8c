"""Other libraries' kernels for the same work, each behind one function that takes our arguments.

`function(hidden, weight, target)` for `linear_logp`; `function(inputs of linear_policy_loss)` returns the loss; a
sampler is `function(logits, top_p)`. Nothing of a library is imported before `load()`. Written from the source of
liger-kernel 0.8.5, trl 1.16.0, quack-kernels 0.6.5 and of flashinfer-python (ba1f206).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Single(NamedTuple):
    """None: the library does not give it."""

    logp: Tensor
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """`op` is what one call computes; `gives` are the outputs that a gradient can flow into; `note`: what differs."""

    name: str
    op: str
    load: Callable[[], Callable[..., Any]]
    gives: tuple[str, ...] = ()
    note: str | None = None


def _liger_flce() -> Callable[..., Single]:
    """liger_kernel/transformers/fused_linear_cross_entropy.py: the weight comes first; "none" gives float32 NLL."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    of_tokens = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, target: Single(-of_tokens(weight, hidden, target))


def _liger_sm90() -> Callable[..., Single]:
    """liger_kernel/ops/fused_linear_scaled_cross_entropy.py: NLL in float32, entropy in bfloat16."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Single:
        # Input, weight, target, temperature, ignore_index, m_tiles_per_cluster (has no effect), return_entropy.
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0, -100, 1, True)
        return Single(-nll, entropy.float())

    return function


def _liger_grpo() -> Callable[..., Tensor]:
    """liger_kernel/chunked_loss/grpo_loss.py, with its defaults: one response at a time, the loss compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options = {"beta": 0.0, "use_ref_model": False, "epsilon_low": 0.2, "epsilon_high": 0.28, "loss_type": "dapo"}
    of_batch = LigerFusedLinearGRPOLoss(**options)
    # Input, weight, selected_token_ids, attention_mask, advantages; returns the loss and metrics.
    return lambda hidden, weight, target, old_logp, advantage, mask: of_batch(
        hidden, weight, target, mask, advantage, old_per_token_logps=old_logp
    )[0]


def _trl_linear() -> Callable[..., Single]:
    """trl/kernels/chunked_logprob.py: log p, and of the optional outputs only the entropy."""
    from trl.kernels import ChunkedLogProbFunction

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Single:
        # Hidden, weight, bias, targets, temperature, chunk_size (TRL's), softcap, logit_scale, outputs.
        arguments = (hidden, weight, None, target, 1.0, 32768, None, 1.0, ("entropy",))
        return Single(*ChunkedLogProbFunction.apply(*arguments)[:2])

    return function


def _quack_linear() -> Callable[..., Single]:
    """quack/epilogue/library.py: `lse_target_epi`, as quack/linear_cross_entropy.py calls it without gradients."""
    from quack.epilogue.library import lse_target_epi

    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Single:
        outputs = lse_target_epi(hidden, weight.mT, store_d=False, target=target, tuned=False)
        return Single(outputs["target_logit"] - outputs["lse"])

    return function


def _flashinfer() -> Callable[[Tensor, float], Tensor]:
    """flashinfer/sampling.py: top-p by rejection from probabilities in float32."""
    from flashinfer.sampling import softmax, top_p_sampling_from_probs

    return lambda logits, top_p: top_p_sampling_from_probs(softmax(logits), top_p)


def _itself(compiled: bool) -> Callable[..., Any]:
    """PyTorch as it is written today, eager or compiled."""
    from .bench_linear_logp import eager

    return torch.compile(eager, dynamic=False) if compiled else eager


_ROUNDED = "logits are rounded to the inputs' dtype"
_BOTH = ("logp", "entropy")
#: By the process that measures them.
PEERS = {
    "eager": (Peer("eager", "linear_logp", partial(_itself, False), _BOTH, _ROUNDED),),
    "compiled": (Peer("compiled", "linear_logp", partial(_itself, True), _BOTH, _ROUNDED),),
    "liger": (
        Peer("liger sm90", "linear_logp", _liger_sm90, _BOTH, "logits pass through float16, entropy is bfloat16"),
        Peer("liger flce", "linear_logp", _liger_flce, ("logp",), f"{_ROUNDED}; no entropy"),
        Peer("liger grpo", "linear_policy_loss", _liger_grpo, note=f"{_ROUNDED}; no reweighting"),
    ),
    "quack": (Peer("quack", "linear_logp", _quack_linear, note="no entropy, no gradient"),),
    "trl": (Peer("trl", "linear_logp", _trl_linear, _BOTH, _ROUNDED),),
    "flashinfer": (Peer("flashinfer", "extrapolated_sample", _flashinfer, note="one model, a token, no log p"),),
}
