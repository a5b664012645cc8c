"""`logp`: log p and entropy of given logits."""

from torch import Tensor, log_softmax

from dlogp_kernels import logp

from .baselines import LOGITS_ROWS, bare_reads, capped, in_row_blocks
from .bench import Bench
from .problem import SingleStats


def eager(logits: Tensor, target: Tensor, softcap: float | None = None) -> SingleStats:
    """As it is written today."""
    logp_all = log_softmax(capped(logits, softcap).float(), dim=-1)
    return SingleStats(
        logp=logp_all.gather(-1, target[:, None]).squeeze(-1),
        entropy=-(logp_all.exp() * logp_all).sum(-1),
    )


def chunked(logits: Tensor, target: Tensor, softcap: float | None = None) -> SingleStats:
    """The same in row blocks."""
    return SingleStats(*in_row_blocks(lambda z, t: eager(z, t, softcap), LOGITS_ROWS, logits, target))


BENCH = Bench(op="logp", ours=logp, eager=eager, chunked=chunked, floor=bare_reads)
