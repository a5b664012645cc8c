"""Triton kernels and their launchers: the backends "triton" and "gemm" of ops/backends.py."""

from .delta_logp import delta_logp_bwd, delta_logp_fwd
from .extrapolated_sample import extrapolated_sample
from .linear_backward import linear_delta_logp_bwd, linear_logp_bwd
from .linear_delta_logp import linear_delta_logp_fwd
from .linear_extrapolated_sample import linear_extrapolated_sample
from .linear_logp import linear_logp_fwd
from .linear_policy_loss import linear_policy_loss_bwd, linear_policy_loss_fwd
from .logp import logp_bwd, logp_fwd
from .policy_loss import policy_loss_bwd, policy_loss_fwd

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
