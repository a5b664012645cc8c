"""Other libraries' kernels for the same work, each behind one function that takes our arguments.

Of one model: `function(hidden, weight, target, softcap)` or `function(logits, target, softcap)`; of a sampler
`function(logits, top_p)`; of a policy loss `function(hidden, weight, target, old_logp, advantage, mask)`, which returns
the loss. Nothing of a library is imported before `load()`. Written from the source of liger-kernel 0.8.5, trl 1.16.0,
cut-cross-entropy 25.1.1, quack-kernels 0.6.5, verl 0.9.1 and of flashinfer-python (ba1f206). What differs from our ops
in kind, not in speed, is in the peer's `note`.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import policy
from .problem import Function
from .shapes import Workload

#: How the reason begins where a library is not there.
MISSING = "not installed"


class Single(NamedTuple):
    """None: the library does not give it."""

    logp: Tensor
    entropy: Tensor | None = None


class Pair(NamedTuple):
    delta_logp: Tensor
    logp: Tensor
    base_logp: Tensor
    entropy: Tensor | None = None
    base_entropy: Tensor | None = None
    kl: Tensor | None = None


class Summed(NamedTuple):
    """−Σ log p of all tokens: of libraries whose gradient is that of a sum, not of each token's log p."""

    nll: Tensor


@dataclass(frozen=True)
class Peer:
    """`op` is what one call computes. `gives` are the outputs that a gradient can flow into."""

    name: str
    op: str
    distribution: str
    modules: tuple[str, ...]
    load: Callable[[], Callable[..., Any]]
    gives: tuple[str, ...]
    softcap: bool = False
    forward: bool = True
    trains: bool = True
    summed: bool = False
    hopper: bool = False
    note: str | None = None

    def unavailable(self, work: Workload, device: torch.device) -> str | None:
        """Why it can not do this work here; None if it may."""
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            return f"{MISSING}: {', '.join(missing)}"
        if self.hopper and (device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0)):
            return "its kernel is for compute capability 9.0"
        if work.shape.softcap is not None and not self.softcap:
            return "it has no softcap"
        return None


def peers_for(work: Workload, peers: Sequence[Peer]) -> list[Peer]:
    """Those for a workload; for a pair also those of one model, which are called twice."""
    of_one = work.op.replace("delta_", "")
    found = [peer for peer in peers if peer.op == work.op]
    if of_one != work.op:
        found += [_for_a_pair(peer) for peer in peers if peer.op == of_one and not peer.summed]
    return [peer for peer in found if (peer.trains if work.training else peer.forward)]


def _for_a_pair(peer: Peer) -> Peer:
    return replace(
        peer,
        op=peer.op.replace("logp", "delta_logp"),
        load=lambda: _twice(peer.load()),
        gives=("delta_logp",) if peer.trains else (),
        note="; ".join(filter(None, ("two calls, no KL", peer.note))),
    )


def _twice(of_one: Function) -> Function:
    def of_pair(
        target: Tensor, softcap: float | None = None, base_softcap: float | None = None, **inputs: Tensor
    ) -> Pair:
        own = {name: x for name, x in inputs.items() if not name.startswith("base_")}
        stats = of_one(**own, target=target, softcap=softcap)
        base = of_one(**{name: inputs[f"base_{name}"] for name in own}, target=target, softcap=base_softcap)
        assert isinstance(stats, Single) and isinstance(base, Single)
        return Pair(stats.logp - base.logp, stats.logp, base.logp, stats.entropy, base.entropy)

    return of_pair


def _liger_sm90(entropy: bool) -> Function:
    """liger_kernel/ops/fused_linear_scaled_cross_entropy.py: NLL in float32, entropy in bfloat16."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    # Its check of the targets waits for the GPU; its own switch for that, so that it is timed at its best.
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")

    def function(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        assert softcap is None
        # Input, weight, target, temperature, ignore_index, m_tiles_per_cluster (has no effect), return_entropy.
        outputs = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0, -100, 1, entropy)
        return Single(-outputs[0], outputs[1].float()) if entropy else Single(-outputs)

    return function


def _liger_flce(reduction: str) -> Function:
    """liger_kernel/transformers/fused_linear_cross_entropy.py: the weight comes first; "none" gives float32 NLL."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    def function(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> NamedTuple:
        loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction, softcap=softcap)(weight, hidden, target)
        return Summed(loss) if reduction == "sum" else Single(-loss)

    return function


def _liger_chunked() -> Function:
    """liger_kernel/chunked_loss/fused_linear_ppo.py, what its GRPO loss takes log p from."""
    from liger_kernel.chunked_loss.fused_linear_ppo import _selective_logprob_forward

    def function(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        assert softcap is None
        logp, _ = _selective_logprob_forward(hidden, weight, target)
        return Single(logp)

    return function


def with_trl_loss(of_tokens: Function) -> Callable[..., Tensor]:
    """TRL's eager loss of the log p that a library gives: of one that has no loss of its own."""

    def function(
        hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor
    ) -> Tensor:
        stats = of_tokens(hidden=hidden.flatten(0, 1), weight=weight, target=target.flatten())
        assert isinstance(stats, Single)
        logp = stats.logp.reshape(target.shape)
        return policy.trl_loss(policy.Batch(logp, old_logp, advantage, mask, logp), policy.DAPO)

    return function


def _liger_sm90_loss() -> Callable[..., Tensor]:
    return with_trl_loss(_liger_sm90(entropy=False))


def _liger_grpo() -> Callable[..., Tensor]:
    """liger_kernel/chunked_loss/grpo_loss.py, with its defaults: one response at a time, the loss compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    of_batch = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo"
    )

    def function(
        hidden: Tensor, weight: Tensor, target: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor
    ) -> Tensor:
        # Input, weight, selected_token_ids, attention_mask, advantages; returns the loss and metrics.
        loss, _ = of_batch(hidden, weight, target, mask, advantage, old_per_token_logps=old_logp)
        return loss

    return function


def _liger_ce() -> Function:
    """liger_kernel/transformers/cross_entropy.py: the loss has the dtype of the logits."""
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss

    def function(logits: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        return Single(-LigerCrossEntropyLoss(reduction="none", softcap=softcap)(logits, target))

    return function


#: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, columns of the vocabulary at a time.
_TRL_CHUNK = 32768


def _trl_linear() -> Function:
    """trl/kernels/chunked_logprob.py: log p, and of the optional outputs only the entropy."""
    from trl.kernels import ChunkedLogProbFunction

    def function(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        # Hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs.
        outputs = ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, _TRL_CHUNK, softcap, 1.0, ("entropy",)
        )
        return Single(outputs[0], outputs[1])

    return function


def _trl_pair() -> Function:
    """The same twice, and trl/kernels/chunked_divergence.py: beta 1 is KL(student ‖ teacher), our `kl`."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    twice = _twice(_trl_linear())

    def function(
        hidden: Tensor,
        weight: Tensor,
        base_hidden: Tensor,
        base_weight: Tensor,
        target: Tensor,
        softcap: float | None = None,
        base_softcap: float | None = None,
    ) -> Pair:
        models = {"hidden": hidden, "weight": weight, "base_hidden": base_hidden, "base_weight": base_weight}
        stats = twice(**models, target=target, softcap=softcap, base_softcap=base_softcap)
        assert isinstance(stats, Pair)
        # Of each model hidden, weight, bias; beta, temperature; of each model logit_scale, softcap.
        kl, _ = ChunkedDivergenceFunction.apply(
            hidden, weight, None, base_hidden, base_weight, None, 1.0, 1.0, 1.0, softcap, 1.0, base_softcap
        )
        return stats._replace(kl=kl)

    return function


def _trl_logits() -> Function:
    """trl/kernels/logprob_entropy.py."""
    from trl.kernels import selective_log_softmax_and_entropy

    def function(logits: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        assert softcap is None
        return Single(*selective_log_softmax_and_entropy(logits, target))

    return function


def _cce() -> Function:
    """cut_cross_entropy/linear_cross_entropy.py, with its default filter of small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        return Single(-linear_cross_entropy(hidden, weight, target, softcap=softcap, reduction="none"))

    return function


def _quack_linear() -> Function:
    """quack/epilogue/library.py: `lse_target_epi`, as quack/linear_cross_entropy.py calls it without gradients."""
    from quack.epilogue.library import lse_target_epi

    def function(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        assert softcap is None
        outputs = lse_target_epi(hidden, weight.mT, store_d=False, target=target, tuned=False)
        return Single(outputs["target_logit"] - outputs["lse"])

    return function


def _quack_summed() -> Function:
    """quack/linear_cross_entropy.py: gradients are formed in forward, for a sum over all tokens."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> Summed:
        assert softcap is None
        return Summed(chunked_linear_cross_entropy(hidden, weight, target, reduction="sum", tuned=False))

    return function


def _quack_logits() -> Function:
    """quack/cross_entropy.py."""
    from quack.cross_entropy import cross_entropy

    def function(logits: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        assert softcap is None
        return Single(-cross_entropy(logits, target, reduction="none"))

    return function


def _verl() -> Function:
    """verl/utils/kernel/linear_cross_entropy.py: log p and entropy."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def function(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> Single:
        assert softcap is None
        return Single(*linear_cross_entropy(hidden, weight, target, 1.0, "none"))

    return function


def _flashinfer() -> Callable[[Tensor, float], Tensor]:
    """flashinfer/sampling.py: top-p by rejection from probabilities in float32; without a filter from the logits."""
    from flashinfer.sampling import sampling_from_logits, softmax, top_p_sampling_from_probs

    def function(logits: Tensor, top_p: float = 1.0) -> Tensor:
        if top_p == 1.0:
            return sampling_from_logits(logits)
        return top_p_sampling_from_probs(softmax(logits), top_p)

    return function


_SUM_ONLY = "one gradient for the sum of all tokens, formed in forward: 6·N·V·D operations"

#: In the order in which a run takes them: when time runs out, the last ones are missing.
PEERS = (
    Peer(
        "liger sm90",
        "linear_logp",
        "liger-kernel",
        ("liger_kernel", "cutlass"),
        partial(_liger_sm90, entropy=True),
        ("logp", "entropy"),
        hopper=True,
        note="logits pass through float16, entropy is bfloat16",
    ),
    Peer(
        "quack",
        "linear_logp",
        "quack-kernels",
        ("quack", "cutlass"),
        _quack_linear,
        (),
        trains=False,
        note="no entropy",
    ),
    Peer(
        "quack, sum",
        "linear_logp",
        "quack-kernels",
        ("quack", "cutlass"),
        _quack_summed,
        (),
        forward=False,
        summed=True,
        note=_SUM_ONLY,
    ),
    Peer(
        "trl",
        "linear_logp",
        "trl",
        ("trl",),
        _trl_linear,
        ("logp", "entropy"),
        softcap=True,
        note="logits are rounded to the inputs' dtype",
    ),
    Peer(
        "cce",
        "linear_logp",
        "cut-cross-entropy",
        ("cut_cross_entropy",),
        _cce,
        ("logp",),
        softcap=True,
        note="no entropy; small gradients are left out",
    ),
    Peer(
        "liger flce",
        "linear_logp",
        "liger-kernel",
        ("liger_kernel",),
        partial(_liger_flce, "none"),
        ("logp",),
        softcap=True,
        note="logits are rounded to the inputs' dtype; no entropy",
    ),
    Peer(
        "liger flce, sum",
        "linear_logp",
        "liger-kernel",
        ("liger_kernel",),
        partial(_liger_flce, "sum"),
        (),
        softcap=True,
        forward=False,
        summed=True,
        note=_SUM_ONLY,
    ),
    Peer("verl", "linear_logp", "verl", ("verl",), _verl, ("logp", "entropy")),
    Peer(
        "liger chunked",
        "linear_logp",
        "liger-kernel",
        ("liger_kernel",),
        _liger_chunked,
        (),
        trains=False,
        note="logits are rounded to the inputs' dtype; no entropy; backward, in float32, is not timed",
    ),
    Peer(
        "liger sm90, log p",
        "linear_logp",
        "liger-kernel",
        ("liger_kernel", "cutlass"),
        partial(_liger_sm90, entropy=False),
        ("logp",),
        hopper=True,
        note="logits pass through float16; no entropy",
    ),
    Peer(
        "trl, with kl",
        "linear_delta_logp",
        "trl",
        ("trl",),
        _trl_pair,
        ("delta_logp", "kl"),
        softcap=True,
        note="two calls for log p and one for KL",
    ),
    Peer("trl", "logp", "trl", ("trl",), _trl_logits, ("logp", "entropy")),
    Peer("quack", "logp", "quack-kernels", ("quack", "cutlass"), _quack_logits, ("logp",), note="no entropy"),
    Peer(
        "liger ce",
        "logp",
        "liger-kernel",
        ("liger_kernel",),
        _liger_ce,
        (),
        softcap=True,
        trains=False,
        note="no entropy; the loss has the logits' dtype; in training it overwrites the logits, so it is not timed",
    ),
    Peer(
        "liger sm90, loss",
        "linear_policy_loss",
        "liger-kernel",
        ("liger_kernel", "cutlass"),
        _liger_sm90_loss,
        (),
        hopper=True,
        note="logits pass through float16; the loss of its log p is TRL's, eager",
    ),
    Peer(
        "liger grpo",
        "linear_policy_loss",
        "liger-kernel",
        ("liger_kernel",),
        _liger_grpo,
        (),
        note="logits are rounded to the inputs' dtype; no reweighting; gradients are formed in forward, in float32",
    ),
    Peer(
        "flashinfer",
        "extrapolated_sample",
        "flashinfer-python",
        ("flashinfer",),
        _flashinfer,
        (),
        trains=False,
        note="one model's logits; a token and no log-probabilities",
    ),
)
