"""What a worker does with a batch: it has the models in memory, and gives hidden states or statistics for samples.

The process of the run is a worker itself where there are no others; whoever computes a batch, it is computed by this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...hf import HiddenStore, LmHead, lm_head
from ..errors import JobError, explained_computation
from ..inputs.models import ModelPlace
from ..inputs.records import Example
from ..options import Measuring
from ..progress import OnLayer
from ..resume.fingerprint import Fingerprints, versions
from ..token_statistics import Computation, measure, response_hidden
from .duty import Task, check_versions, load_model, worker_here


class MeasuringDuty(NamedTuple):
    """To measure batches of samples.

    Without `rl` workers give the base model's hidden states; with `store`, the directory of a `HiddenStore`, they take
    them from there instead of having the base model.
    """

    arguments: Measuring
    rl: ModelPlace | None
    base: ModelPlace | None
    store: Path | None
    fingerprints: Fingerprints
    versions: Mapping[str, str]

    def on(self, device: str) -> "MeasuringDuty":
        """See `Duty`."""
        return self._replace(arguments=replace(self.arguments, device=device))

    def absolute(self) -> "MeasuringDuty":
        """See `Duty`."""
        rl, base = (None if place is None else place.absolute() for place in (self.rl, self.base))
        return self._replace(rl=rl, base=base, store=None if self.store is None else self.store.absolute())

    def load(self, here: OnLayer | None = None) -> "Measurer":
        """See `Duty`; `here` hears of layers."""
        return Measurer(self, here or (lambda done, total: None))


def batch_task(part: int, batch: int, samples: Sequence[Example]) -> Task:
    """A batch of a part, by its place in the part."""
    lines = [sample.line for sample in samples]
    return Task((part, batch), samples, f"part {part} (lines {min(lines)} to {max(lines)} of --data)")


class Measurer:
    """Has the models of a duty in memory. Raises JobError where they can not be had here, or are others."""

    def __init__(self, duty: MeasuringDuty, on_layer: OnLayer) -> None:
        arguments = duty.arguments
        self._duty = duty
        self._how = Computation(
            torch.device(arguments.device), arguments.temperature, arguments.memory_limit, on_layer
        )  # fmt: skip
        check_versions(duty.versions, versions(arguments.device))
        self._store = None if duty.store is None else _open(duty.store)
        self._rl = None if duty.rl is None else self._load(duty.rl)
        if duty.base is not None:
            self._base = self._load(duty.base)
        else:
            assert self._store is not None, "without the base model its hidden states are asked for"
            self._base = _on_device(self._store.head(), self._how.device)

    @property
    def greeting(self) -> LmHead | None:
        """The last layer of the base model, where it is the only model; on the CPU."""
        return _on_device(lm_head(self._base), torch.device("cpu")) if self._rl is None else None

    def __call__(self, samples: Sequence[Example]) -> list[torch.Tensor] | dict[str, np.ndarray]:
        """For each sample the base model's hidden states, without the RL model; or the statistics, see `measure`."""
        with explained_computation("the statistics can not be computed", "--memory-limit, or fewer --batch-tokens"):
            if self._rl is None:
                # Views would take the whole batch with them to another process.
                return [states.clone() for states in response_hidden(samples, self._base, self._how)]
            hidden = None if self._store is None else [read_hidden(self._store, sample) for sample in samples]
            measured = measure(samples, self._rl, self._base, self._how, hidden)
            _check_numbers(samples, measured)
            return measured

    def _load(self, place: ModelPlace) -> Any:
        return load_model(place, self._duty.fingerprints, self._duty.arguments.dtype, self._how.device)


def key_of(sample: Example) -> str:
    """What the base model's hidden states of a sample are kept under."""
    return f"line {sample.line:012d}"


def read_hidden(store: HiddenStore, sample: Example) -> torch.Tensor:
    """The base model's hidden states of a sample; KeyError or ValueError if they are not there."""
    return store.read(key_of(sample), input_ids=sample.response_ids.tolist())


def _open(store: Path) -> HiddenStore:
    try:
        return HiddenStore.open(store)
    except FileNotFoundError as error:
        raise JobError(
            f"--sequential: {worker_here()} does not see {store}: give an --out that all machines share, or leave "
            "--sequential out"
        ) from error


def _on_device(head: LmHead, device: torch.device) -> LmHead:
    bias = None if head.bias is None else head.bias.to(device)
    return head._replace(weight=head.weight.to(device), bias=bias)


def _check_numbers(samples: Sequence[Example], measured: Mapping[str, np.ndarray]) -> None:
    """ValueError where no Δlog p is a number; single ones that are none are counted in the summary."""
    if not np.isnan(measured["delta_logp"]).all():
        return
    models = [name for name in ("logp", "base_logp") if np.isnan(measured[name]).all()]
    blamed = " and ".join({"logp": "--rl", "base_logp": "--base"}[name] for name in models) or "the pair"
    raise ValueError(
        f"Δlog p of every token is NaN from line {samples[0].line} on: the logits of {blamed} are no numbers; the "
        "weights are damaged, or --dtype or --temperature do not suit them"
    )
