"""What the functions return. `base_` marks the base model; the unmarked one is the RL model or the policy."""

from typing import NamedTuple

from torch import Tensor


class LogpStats(NamedTuple):
    """Statistics of one model's next-token distribution, in nats.

    `logp` has the shape of the target; `entropy` and `lse` have its leading shape (without candidates).
    """

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class DeltaLogpStats(NamedTuple):
    """Statistics of a pair of models at the same positions, in nats.

    `delta_logp`, `logp` and `base_logp` have the shape of the target; the rest have its leading shape.
    `kl` is KL(model ‖ base), `reverse_kl` is KL(base ‖ model).
    """

    delta_logp: Tensor
    logp: Tensor
    base_logp: Tensor
    entropy: Tensor
    base_entropy: Tensor
    kl: Tensor
    reverse_kl: Tensor
    lse: Tensor
    base_lse: Tensor
