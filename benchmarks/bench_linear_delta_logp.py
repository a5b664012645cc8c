"""`linear_delta_logp`: Δlog p, both entropies and both KLs from the hidden states and last layers of two models."""

from torch import Tensor, is_grad_enabled

from dlogp_kernels import linear_delta_logp

from . import bench_delta_logp
from .baselines import LINEAR_ROWS, bare_matmuls, in_row_blocks
from .bench import Bench
from .problem import PairStats


def eager(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    softcap: float | None = None,
    base_softcap: float | None = None,
) -> PairStats:
    """As it is written today."""
    logits, base_logits = hidden @ weight.t(), base_hidden @ base_weight.t()
    return bench_delta_logp.eager(logits, base_logits, target, softcap, base_softcap)


def chunked(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    softcap: float | None = None,
    base_softcap: float | None = None,
) -> PairStats:
    """The same in row blocks: two matmuls, then the softmax in smaller blocks; in training each block as a whole."""
    of_logits = bench_delta_logp.eager if is_grad_enabled() else bench_delta_logp.chunked

    def block(x: Tensor, base_x: Tensor, t: Tensor) -> PairStats:
        return of_logits(x @ weight.t(), base_x @ base_weight.t(), t, softcap, base_softcap)

    return PairStats(*in_row_blocks(block, LINEAR_ROWS, hidden, base_hidden, target))


BENCH = Bench(op="linear_delta_logp", ours=linear_delta_logp, eager=eager, chunked=chunked, floor=bare_matmuls)
