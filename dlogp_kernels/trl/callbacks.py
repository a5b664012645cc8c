"""What a caller wants to know while a trainer trains."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from .trainer import ReweightedGRPOTrainer


class _Calls(TrainerCallback):
    def __init__(self, on_log: Callable[[int, Mapping[str, float]], None], on_save: Callable[[], None]) -> None:
        self._on_log = on_log
        self._on_save = on_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        # The last entry of a training is about all of it.
        if logs is not None and "loss" in logs:
            self._on_log(state.global_step, logs)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._on_save()


def report_to(
    trainer: ReweightedGRPOTrainer,
    on_log: Callable[[int, Mapping[str, float]], None],
    on_save: Callable[[], None],
) -> None:
    """Call `on_log(step, metrics)` at each logged step instead of printing, and `on_save()` after each checkpoint."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Calls(on_log, on_save))
