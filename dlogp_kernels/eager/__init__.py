"""The backend "reference": every op in plain PyTorch, in blocks that the workspace bounds, for any device.

Launchers with the arguments of the op's schema plus the workspace in bytes.
"""

from .policy import linear_policy_loss_bwd, linear_policy_loss_fwd, policy_loss_bwd, policy_loss_fwd
from .sampling import extrapolated_sample, linear_extrapolated_sample
from .statistics import (
    delta_logp_bwd,
    delta_logp_fwd,
    linear_delta_logp_bwd,
    linear_delta_logp_fwd,
    linear_logp_bwd,
    linear_logp_fwd,
    logp_bwd,
    logp_fwd,
)

__all__ = [
    "delta_logp_bwd",
    "delta_logp_fwd",
    "extrapolated_sample",
    "linear_delta_logp_bwd",
    "linear_delta_logp_fwd",
    "linear_extrapolated_sample",
    "linear_logp_bwd",
    "linear_logp_fwd",
    "linear_policy_loss_bwd",
    "linear_policy_loss_fwd",
    "logp_bwd",
    "logp_fwd",
    "policy_loss_bwd",
    "policy_loss_fwd",
]
