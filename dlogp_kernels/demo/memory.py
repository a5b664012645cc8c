"""The memory story: Δlog p of 8192 tokens at the size of a real model, measured in a process of its own.

`python -m dlogp_kernels.demo.memory` prints a JSON object. Random bfloat16 hidden states and weights of D = 896 and
V = 151 936 (Qwen2.5-0.5B) stand for both models. `peak_over` is the meter of the benchmarks and tests, too.
"""

import ctypes
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import linear_delta_logp

HIDDEN_SIZE = 896
VOCABULARY = 151_936
_PROC = Path("/proc/self")
_RESET_PEAK = "5"
_M_PERTURB = -6
_CPU = torch.device("cpu")


class Peak(NamedTuple):
    """Of a call: peak bytes over inputs and outputs, bytes of the outputs, and seconds, which were not warm."""

    extra: int
    outputs: int
    seconds: float


def peak_over(call: Callable[[], Iterable[Tensor | None]], device: torch.device = _CPU) -> Peak:
    """Peak memory during `call`, less what was in use before and less the tensors that it returns.

    On a GPU it is the allocator's. On the CPU it is the kernel's own high-water mark of resident memory, so that memory
    that is freed at once counts as well, and an allocation counts whole, whether used or not. What the allocator kept
    of freed tensors is given back first; otherwise the call could use it unseen. Call it in a process that does nothing
    else, after a call so small that nothing of the size of this one stays in a cache.
    """
    begin, peak = (_begin_on_cuda, _peak_on_cuda) if device.type == "cuda" else (_begin_on_cpu, _peak_on_cpu)
    before = begin(device)
    started = time.perf_counter()
    outputs = [x for x in call() if x is not None]
    growth, seconds = peak(device) - before, time.perf_counter() - started
    size = sum(x.nbytes for x in outputs)
    return Peak(max(0, growth - size), size, seconds)


def _begin_on_cuda(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_on_cuda(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _begin_on_cpu(_: torch.device) -> int:
    _glibc("malloc_trim", 0)
    try:
        (_PROC / "clear_refs").write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
    except OSError:  # it may not be reset here: in a fresh process there was no higher peak yet
        before = _peak_on_cpu(_)
    # Each allocation is written to at once: otherwise a page is resident only from its first use on, and a workspace
    # that is freed before the last page of an output is written would hide behind that output.
    _glibc("mallopt", _M_PERTURB, 0xA5)
    return before


def _peak_on_cpu(_: torch.device) -> int:
    _glibc("mallopt", _M_PERTURB, 0)
    if (_PROC / "status").exists():
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The system counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(name: str) -> int:
    return int((_PROC / "status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def _glibc(name: str, *arguments: int) -> None:
    """Other C libraries have not all of its functions."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)


class Measurement(NamedTuple):
    """Seconds and bytes of one call; `extra_bytes` is the peak over inputs and outputs."""

    num_tokens: int
    seconds: float
    input_bytes: int
    extra_bytes: int

    @property
    def logits_bytes(self) -> int:
        """Of the float32 logits of both models, which are not formed."""
        return 2 * self.num_tokens * VOCABULARY * torch.float32.itemsize


def measure_in_subprocess(num_tokens: int) -> Measurement:
    """Run this module in a fresh process, whose peak memory is that of the call."""
    # This process has warned of what there is to warn of.
    command = [sys.executable, "-W", "ignore::UserWarning", "-m", __name__, str(num_tokens)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(result.stdout))


def measure(num_tokens: int) -> Measurement:
    """Run the op once on random inputs, after a short call that loads what is loaded once."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float) -> Tensor:
        # In place and in the final dtype: a temporary would be part of the peak.
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(0.0, scale, generator=generator)

    hidden, base_hidden = (random(num_tokens, HIDDEN_SIZE, scale=1.0) for _ in range(2))
    weight, base_weight = (random(VOCABULARY, HIDDEN_SIZE, scale=HIDDEN_SIZE**-0.5) for _ in range(2))
    target = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    linear_delta_logp(hidden[:16], weight[:1024], base_hidden[:16], base_weight[:1024], target[:16] % 1024)
    inputs = (hidden, weight, base_hidden, base_weight, target)
    peak = peak_over(lambda: linear_delta_logp(*inputs))
    return Measurement(num_tokens, peak.seconds, sum(tensor.nbytes for tensor in inputs), peak.extra)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))._asdict()))
