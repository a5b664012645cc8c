"""Token log-probabilities, entropy and KL of one model or a pair, straight from hidden states, with no logit tensor."""

from .functional import (
    delta_logp,
    extrapolated_sample,
    linear_delta_logp,
    linear_extrapolated_sample,
    linear_logp,
    linear_policy_loss,
    logp,
    policy_loss,
)
from .modules import DeltaLogp, LinearDeltaLogp, LinearLogp, LinearPolicyLoss, Logp, PolicyLossModule
from .ops import backends
from .results import DeltaLogpStats, LogpStats, PolicyLoss, PolicyMetrics, Sample
from .sharding import VocabShard

__version__ = "0.1.0"

__all__ = [
    "DeltaLogp",
    "DeltaLogpStats",
    "LinearDeltaLogp",
    "LinearLogp",
    "LinearPolicyLoss",
    "Logp",
    "LogpStats",
    "PolicyLoss",
    "PolicyLossModule",
    "PolicyMetrics",
    "Sample",
    "VocabShard",
    "backends",
    "delta_logp",
    "extrapolated_sample",
    "linear_delta_logp",
    "linear_extrapolated_sample",
    "linear_logp",
    "linear_policy_loss",
    "logp",
    "policy_loss",
]
