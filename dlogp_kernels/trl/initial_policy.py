"""The policy at the start of training, kept as a copy of the parameters that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class InitialPolicy:
    """The trained parameters of a model as they are now; all others do not change.

    They take as much memory as the trained parameters themselves: little with adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._pairs = [
            (parameter, parameter.detach().clone()) for parameter in model.parameters() if parameter.requires_grad
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within this context the model is what it was; only for calls without gradients, with no graph in use."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, kept in self._pairs:
            # The model may have been moved to a device since.
            parameter.data, kept.data = kept.to(parameter.device), parameter.data
