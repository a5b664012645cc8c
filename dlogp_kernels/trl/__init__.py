"""Trainers of TRL with the fused ops and the reweighted loss: the only place that imports `trl`."""

from ..installation import how_to_install

try:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dlogp_kernels.trl needs {error.name}: {how_to_install('trl')}", name=error.name
    ) from error

from .callbacks import report_to
from .checkpoints import complete_checkpoints
from .config import ReweightedGRPOConfig
from .offline_trainers import grpo_trainer, sft_trainer
from .trainer import ReweightedGRPOTrainer

__all__ = [
    "ReweightedGRPOConfig",
    "ReweightedGRPOTrainer",
    "complete_checkpoints",
    "grpo_trainer",
    "report_to",
    "sft_trainer",
]
