"""Peak memory of one call over its inputs and outputs, in a process that does nothing else.

The meter is `dlogp_kernels.demo.memory.peak_over`. The process is fresh, and warmed up (threads, code that is loaded on
first use) with inputs so small that nothing of the size of the workload stays in a cache.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from dlogp_kernels.demo.memory import Peak, peak_over

from .shapes import Shape, Workload
from .timing import NotMeasuredError

MIB = 2**20
_WARM_UP = Shape("warm-up", 64, 4096)
_WARM_UP_N = 64


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """`function(*arguments)` of a new process; NotMeasuredError if it raises or is killed."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except Exception as error:
        raise NotMeasuredError(f"{type(error).__name__}: {error}") from error


def peak_of(work: Workload, name: str, device: torch.device, threads: int) -> Peak:
    """Of one call of the candidate `name`, in this process, which should be fresh."""
    from .cases import BENCHES  # which measures memory by this module

    torch.set_num_threads(threads)
    bench = BENCHES[work.op]

    def candidate(work: Workload) -> Callable[[], list[torch.Tensor]]:
        return next(c.step for c in bench.candidates(bench.build(work, device)) if c.name == name)

    step = candidate(work)
    # A compiled graph is of one shape: there the compiler's own memory counts unless it ran before.
    (step if name == "compiled" else candidate(replace(work, shape=_WARM_UP, n=_WARM_UP_N)))()
    return peak_over(step, device)
