"""Peak memory of one call over its inputs and outputs, in a process that does nothing else.

On CPU it is the kernel's own high-water mark of resident memory (VmHWM), reset just before the call, so memory that is
freed at once counts as well, and an allocation counts whole, whether used or not. What the allocator kept from building
the inputs is given back to the system first; otherwise the call could use it unseen. Hence the fresh process, and a
warm-up (threads, code that is loaded on first use) so small that nothing of the size of the workload stays in a cache.

`python -m benchmarks.memory REQUEST` measures the request (JSON) and prints the answer (JSON) as its last line;
`python -m benchmarks.memory MODULE NAME` prints what the module's `answer(NAME)` returns.
"""

import ctypes
import dataclasses
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .harness import NotMeasuredError
from .problem import Truth, build
from .registry import BENCHES
from .shapes import Shape, Workload

MIB = 2**20
_RESET_PEAK = "5"
_M_PERTURB = -6
_WARM_UP_SHAPE = Shape("warm-up", 64, 4096)
_WARM_UP_N = 32
_ROOT = Path(__file__).resolve().parent.parent


class NoAnswerError(NotMeasuredError):
    """The measuring process did not answer: killed, or the candidate failed."""


@dataclass(frozen=True)
class Request:
    work: Workload
    candidate: str
    device: str = "cpu"
    threads: int = 0
    #: Compare with float64 afterwards.
    check: bool = False


@dataclass(frozen=True)
class Answer:
    """`peak` bytes over inputs and outputs; `seconds` of the one call, which was not warm."""

    peak: int
    outputs: int
    seconds: float
    errors: dict[str, float] = field(default_factory=dict)


def peak_over(call: Callable[[], Iterable[Tensor]], device: torch.device) -> Answer:
    """Peak memory during `call`, less what was in use before and less the tensors that it returns."""
    meter = _CudaMeter(device) if device.type == "cuda" else _ResidentMeter()
    meter.start()
    start = time.perf_counter()
    outputs = list(call())
    peak = meter.peak()
    seconds = time.perf_counter() - start
    size = sum(x.nbytes for x in outputs)
    return Answer(max(0, peak - size), size, seconds)


class _ResidentMeter:
    """Of glibc. While it runs, each allocation is written to at once.

    Otherwise a page is resident only from its first use on, and a workspace that is freed before the last page of an
    output is written would hide behind that output.
    """

    def start(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.malloc_trim(0)
        self._libc.mallopt(_M_PERTURB, 0xA5)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._before = _status_bytes("VmRSS")

    def peak(self) -> int:
        self._libc.mallopt(_M_PERTURB, 0)
        return _status_bytes("VmHWM") - self._before


class _CudaMeter:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def in_fresh_process(request: Request) -> Answer:
    """`request` measured in a process of its own; NoAnswerError if that does not answer."""
    return Answer(**_answer_to([json.dumps(dataclasses.asdict(request))]))


def in_process_of(module: str, name: str) -> dict[str, int]:
    """`module.answer(name)` of a fresh process, for a benchmark whose candidates are its own."""
    return _answer_to([module, name])


def _answer_to(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    child = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise NoAnswerError(f"exit status {child.returncode}: {last}")
    return json.loads(child.stdout.splitlines()[-1])


def answer(request: Request) -> Answer:
    """`request` measured in this process, which should be fresh."""
    if request.threads:
        torch.set_num_threads(request.threads)
    device = torch.device(request.device)
    problem = build(request.work, device)
    function = BENCHES[request.work.op].function(request.candidate)
    # A compiled graph is of one shape: there the compiler's own memory counts unless it ran before.
    small = dataclasses.replace(request.work, shape=_WARM_UP_SHAPE, n=_WARM_UP_N)
    (problem if request.candidate == "compiled" else build(small, device)).step(function)
    measured = peak_over(lambda: problem.step(function), device)
    errors = Truth(problem).errors(function) if request.check else {}
    return dataclasses.replace(measured, errors=errors)


def main(request_json: str) -> None:
    request = json.loads(request_json)
    work = request.pop("work")
    shape = Shape(**work.pop("shape"))
    print(json.dumps(dataclasses.asdict(answer(Request(work=Workload(shape=shape, **work), **request)))))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        print(json.dumps(importlib.import_module(sys.argv[1]).answer(sys.argv[2])))
