"""What a worker does with a chunk of responses: it has both models and the grader, draws and grades."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...report.responses import Response
from ..drawing import Chunk, Drawing
from ..errors import JobError
from ..graders import Grader, load_grader
from ..inputs.models import ModelPlace, read_pair
from ..options import Decoding
from ..resume.fingerprint import Fingerprints, versions
from .duty import Task, check_versions, load_model, worker_here


def drawing_versions(device: str) -> dict[str, str]:
    """What the responses come from."""
    return versions(device, "extrapolated_sample")


class DrawingDuty(NamedTuple):
    """To draw chunks of responses and grade them; `grader` is what identifies the one of that name."""

    decoding: Decoding
    rl: ModelPlace
    base: ModelPlace
    grader_name: str
    grader: Mapping[str, Any]
    fingerprints: Fingerprints
    versions: Mapping[str, str]

    def on(self, device: str) -> "DrawingDuty":
        """See `Duty`."""
        return self._replace(decoding=replace(self.decoding, device=device))

    def absolute(self) -> "DrawingDuty":
        """See `Duty`."""
        return self._replace(rl=self.rl.absolute(), base=self.base.absolute())

    def load(self, here: Drawing | None = None) -> "Drawer":
        """See `Duty`; the process of the run has the grader and the tokenizer already."""
        assert self.decoding.device is not None, "options are checked, which names a default"
        device = torch.device(self.decoding.device)
        check_versions(self.versions, drawing_versions(self.decoding.device))
        grader = self._grader() if here is None else here.grader
        models = self._models(device)
        if here is None:
            here = Drawing(grader, read_pair(self.rl, self.base).tokenizer, self.decoding, device)
        return Drawer(here, models)

    def _models(self, device: torch.device) -> tuple[Any, Any]:
        rl = load_model(self.rl, self.fingerprints, self.decoding.dtype, device)
        if self.rl.directory == self.base.directory:
            # One that is both is run once.
            return rl, rl
        return rl, load_model(self.base, self.fingerprints, self.decoding.dtype, device)

    def _grader(self) -> Grader:
        try:
            grader = load_grader(self.grader_name, timeout=self.decoding.grader_timeout)
        except JobError as error:
            raise JobError(f"{error}; so says {worker_here()}") from error
        for name, value in self.grader.items():
            found = grader.identity.get(name)
            if found != value:
                raise JobError(
                    f"--grader {self.grader_name}: {worker_here()} has {name} {found}, this run is of {value}: all "
                    "machines need the same grader"
                )
        return grader


def chunk_task(index: int, chunk: Chunk) -> Task:
    """A chunk, by its place in the file."""
    first, last = chunk.problems[0].number, chunk.problems[-1].number
    return Task((index,), chunk, f"problems {first} to {last} under {chunk.setting}, seed {chunk.seed}")


class Drawer:
    """Has both models in memory, and draws with them."""

    greeting = None

    def __init__(self, drawing: Drawing, models: Sequence[Any]) -> None:
        self._drawing = drawing
        self._models = models

    def __call__(self, chunk: Chunk) -> list[Response]:
        """Its responses, see `Drawing`."""
        return self._drawing(self._models, chunk)
