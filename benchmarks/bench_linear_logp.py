"""`linear_logp`: log p and entropy from hidden states and the last layer."""

from torch import Tensor, is_grad_enabled

from dlogp_kernels import linear_logp

from . import bench_logp
from .baselines import LINEAR_ROWS, bare_matmuls, in_row_blocks
from .bench import Bench
from .problem import SingleStats


def eager(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> SingleStats:
    """As it is written today."""
    return bench_logp.eager(hidden @ weight.t(), target, softcap)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> SingleStats:
    """The same in row blocks: one matmul, then its softmax in smaller blocks; in training each block as a whole."""
    of_logits = bench_logp.eager if is_grad_enabled() else bench_logp.chunked

    def block(x: Tensor, t: Tensor) -> SingleStats:
        return of_logits(x @ weight.t(), t, softcap)

    return SingleStats(*in_row_blocks(block, LINEAR_ROWS, hidden, target))


BENCH = Bench(op="linear_logp", ours=linear_logp, eager=eager, chunked=chunked, floor=bare_matmuls)
