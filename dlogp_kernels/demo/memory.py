"""The memory story: Δlog p of 8192 tokens at the size of a real model, measured in a process of its own.

`python -m dlogp_kernels.demo.memory` prints a JSON object. Random bfloat16 hidden states and weights of D = 896 and
V = 151 936 (Qwen2.5-0.5B) stand for both models.
"""

import json
import resource
import subprocess
import sys
import time
from typing import NamedTuple

import psutil
import torch

from ..functional import linear_delta_logp

HIDDEN_SIZE = 896
VOCABULARY = 151_936
_MEBIBYTE = 2**20
_FLOAT32_BYTES = 4


class Measurement(NamedTuple):
    """Seconds and bytes of one call; `extra_bytes` is the peak over inputs and outputs."""

    num_tokens: int
    seconds: float
    input_bytes: int
    extra_bytes: int

    @property
    def logits_bytes(self) -> int:
        """Of the float32 logits of both models, which are not formed."""
        return 2 * self.num_tokens * VOCABULARY * _FLOAT32_BYTES

    @property
    def log_softmax_bytes(self) -> int:
        """Of those logits with a log-softmax of each beside them."""
        return 2 * self.logits_bytes


def measure_in_subprocess(num_tokens: int) -> Measurement:
    """Run this module in a fresh process, whose peak memory is that of the call."""
    # This process has warned of what there is to warn of.
    command = [sys.executable, "-W", "ignore::UserWarning", "-m", __name__, str(num_tokens)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(result.stdout))


def measure(num_tokens: int) -> Measurement:
    """Run the op once on random inputs, after a short call that loads what is loaded once."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float) -> torch.Tensor:
        # In place and in the final dtype: a temporary would be part of the peak.
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(0.0, scale, generator=generator)

    hidden, base_hidden = (random(num_tokens, HIDDEN_SIZE, scale=1.0) for _ in range(2))
    weight, base_weight = (random(VOCABULARY, HIDDEN_SIZE, scale=HIDDEN_SIZE**-0.5) for _ in range(2))
    target = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    linear_delta_logp(hidden[:16], weight[:1024], base_hidden[:16], base_weight[:1024], target[:16] % 1024)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    stats = linear_delta_logp(hidden, weight, base_hidden, base_weight, target)
    seconds = time.perf_counter() - started
    output_bytes = sum(field.nbytes for field in stats)
    inputs = (hidden, weight, base_hidden, base_weight, target)
    extra = max(_peak_bytes() - before - output_bytes, 0)
    return Measurement(num_tokens, seconds, sum(tensor.nbytes for tensor in inputs), extra)


def _peak_bytes() -> int:
    """The largest resident set of this process so far; the system counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))._asdict()))
