"""`delta_logp`: Δlog p, both entropies and both KLs of two tensors of logits."""

from torch import Tensor, log_softmax

from dlogp_kernels import delta_logp

from .baselines import LOGITS_ROWS, bare_reads, capped, in_row_blocks
from .bench import Bench
from .problem import PairStats


def eager(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    softcap: float | None = None,
    base_softcap: float | None = None,
) -> PairStats:
    """As it is written today."""
    logp_all = log_softmax(capped(logits, softcap).float(), dim=-1)
    base_logp_all = log_softmax(capped(base_logits, base_softcap).float(), dim=-1)
    logp = logp_all.gather(-1, target[:, None]).squeeze(-1)
    base_logp = base_logp_all.gather(-1, target[:, None]).squeeze(-1)
    p, q = logp_all.exp(), base_logp_all.exp()
    return PairStats(
        delta_logp=logp - base_logp,
        logp=logp,
        base_logp=base_logp,
        entropy=-(p * logp_all).sum(-1),
        base_entropy=-(q * base_logp_all).sum(-1),
        kl=(p * (logp_all - base_logp_all)).sum(-1),
        reverse_kl=(q * (base_logp_all - logp_all)).sum(-1),
    )


def chunked(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    softcap: float | None = None,
    base_softcap: float | None = None,
) -> PairStats:
    """The same in row blocks."""

    def block(z: Tensor, base_z: Tensor, t: Tensor) -> PairStats:
        return eager(z, base_z, t, softcap, base_softcap)

    return PairStats(*in_row_blocks(block, LOGITS_ROWS, logits, base_logits, target))


BENCH = Bench(op="delta_logp", ours=delta_logp, eager=eager, chunked=chunked, floor=bare_reads)
