"""The public functions: documented, validated, in any leading shape.

Shapes: leading dimensions (…) of tokens, V vocabulary, D hidden, K candidates. With z = softcap_c(logit_scale ·
(hidden · weightᵀ + bias)) / temperature and softcap_c(x) = c·tanh(x / c), every statistic is that of softmax(z) over
the whole vocabulary, accumulated in float32 (float64 for float64 inputs), never rounded to a narrower type before. The
tensor cores of a GPU, which multiply bfloat16 and float16 inputs, truncate these sums instead of rounding them: a logit
is then off by as much as from cuBLAS with float32 output (4e-5 in log p at D = 4096); float32 inputs and the CPU round.
"""

from .policy import linear_policy_loss, policy_loss
from .sampling import extrapolated_sample, linear_extrapolated_sample
from .statistics import delta_logp, linear_delta_logp, linear_logp, logp

__all__ = [
    "delta_logp",
    "extrapolated_sample",
    "linear_delta_logp",
    "linear_extrapolated_sample",
    "linear_logp",
    "linear_policy_loss",
    "logp",
    "policy_loss",
]
