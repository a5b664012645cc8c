"""Cases of `benchmarks.gpu` that go wrong in every way that the visits have to survive."""

import os
import time
from collections.abc import Iterator

import torch

from benchmarks.floors import Cost
from benchmarks.gpu.processes import Case, Entry, Session
from benchmarks.gpu.timing import measured
from benchmarks.timing import Candidate, NotMeasuredError, absolute_error


def cases(session: Session) -> list[Case]:
    return [
        Case("raises", _raises),
        *hangs(session),
        Case("crashes", lambda: os.abort()),  # type: ignore[arg-type,return-value]
        Case("is missing", _is_missing),
        Case("passes", lambda: [{}]),
    ]


def hangs(session: Session) -> list[Case]:
    return [Case("hangs", lambda: time.sleep(600) or [])]


def candidates(session: Session) -> list[Case]:
    return [Case("candidates", lambda: _candidates(session)), Case("passes", lambda: [{}])]


def _raises() -> Iterator[Entry]:
    yield {"candidate": "first"}
    raise ValueError("the first line\nthe second")


def _is_missing() -> Iterator[Entry]:
    raise NotMeasuredError("not installed")
    yield


def _candidates(session: Session) -> Iterator[Entry]:
    def nan() -> dict[str, float]:
        return {"logp": absolute_error(torch.full((3,), torch.nan), torch.zeros(3))}

    found = [
        Candidate("right", lambda: torch.ones(3), check=lambda: {"logp": 0.0}, limits={"output": 1.0}),
        Candidate("nan", lambda: torch.ones(3), check=nan, limits={"output": 1.0}),
        Candidate("hanging", lambda: time.sleep(600)),
        Candidate("crashing", lambda: os.abort()),
    ]
    yield from measured(session, found, Cost("tflops", 1.0))
