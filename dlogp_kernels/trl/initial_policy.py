"""The policy at the start of training, kept as a copy of the parameters that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .fsdp import reshard


class InitialPolicy:
    """The trained parameters of a model as they are now; all others do not change.

    They take as much memory as the trained parameters themselves, little with adapters; of those that FSDP2 shards each
    process keeps its shards.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        reshard(model)
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

    @torch.no_grad()
    def _exchange(self) -> None:
        # Gathered ones would stay what they are.
        reshard(self._model)
        for parameter, kept in self._pairs:
            now = parameter.to(kept.device, copy=True)
            # In place: whoever shards parameters knows them by their storage.
            parameter.copy_(kept)
            kept.copy_(now)
