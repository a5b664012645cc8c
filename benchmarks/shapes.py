"""The shapes that are measured, what they need in memory, and which of them fit a machine."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .timing import NotMeasuredError

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Shape:
    """The last layer of a model: hidden size D, vocabulary V."""

    name: str
    d: int
    v: int
    softcap: float | None = None


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", 896, 151936),
        Shape("llama-3.2-1b", 2048, 128256),
        Shape("gemma-2-2b", 2304, 256000, softcap=30.0),
        Shape("qwen2.5-7b", 3584, 152064),
        Shape("qwen3-8b", 4096, 151936),
        Shape("qwen2.5-32b", 5120, 152064),
    )
}

#: The shape of the acceptance table, and its number of tokens.
MAIN = SHAPES["qwen2.5-0.5b"]
MAIN_N = 512
#: For memory, beside MAIN: another N, V and D.
OTHER = Shape("v32768", 512, 32768)

#: Tokens of the picture over N.
SWEEP_N = (16, 64, 256, 1024, 4096)
#: A long batch: one pair, 16 responses of 8192 tokens.
LONG_N = 131072
#: So many times the time of float32, and a case of products takes an hour.
_MOST_SLOWER = 20.0


@dataclass(frozen=True)
class Workload:
    """One op on one shape: all that is needed to build its inputs again in another process.

    `variant` names options of the op, where they make another amount of work.
    """

    op: str
    shape: Shape
    n: int
    dtype: str = "bfloat16"
    training: bool = False
    variant: str = ""

    @property
    def pair(self) -> bool:
        return "delta" in self.op or "extrapolated" in self.op

    @property
    def linear(self) -> bool:
        return self.op.startswith("linear")

    @property
    def element_size(self) -> int:
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        width = f" D={self.shape.d}" if self.linear else ""
        steps = "forward+backward" if self.training else "forward"
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.op} {self.shape.name} N={self.n}{width} V={self.shape.v} {self.dtype} {steps}{variant}"


def available_bytes(device: torch.device) -> int:
    """Memory that a new allocation can have without swapping."""
    if device.type == "cuda":
        # What the allocator keeps of freed tensors it will give again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # which no GPU needs

    return psutil.virtual_memory().available


def require_products(work: Workload, device: torch.device) -> None:
    """Raise NotMeasuredError where the processor has no instructions for products of this dtype.

    Those of a gradient then take torch minutes each.
    """
    if device.type != "cpu" or work.dtype == "float32":
        return
    slower = _product_seconds(DTYPES[work.dtype]) / _product_seconds(torch.float32)
    if slower > _MOST_SLOWER:
        raise NotMeasuredError(f"torch's {work.dtype} products are {slower:.0f} times slower than float32 on this CPU")


def _product_seconds(dtype: torch.dtype) -> float:
    from torch.utils.benchmark import Timer  # which no GPU needs

    tensors = {"x": torch.zeros(512, 1024, dtype=dtype), "y": torch.zeros(1024, 896, dtype=dtype)}
    return Timer("x @ y", globals=tensors, num_threads=torch.get_num_threads()).timeit(2).mean


def require_fit(work: Workload, candidate: str, device: torch.device, built: bool = False) -> None:
    """Raise NotMeasuredError if this machine has not the memory for `candidate` now, on the safe side of measured.

    Where inputs, and gradients of the model that is trained, are `built`, the floor beside it still writes logits.
    """
    logits, models, size = work.n * work.shape.v, 1 + work.pair, work.element_size
    weight = work.shape.v * work.shape.d if work.linear else 0
    inputs = work.n * work.shape.d + weight if work.linear else logits
    need = 2**30 + (logits * size if built else inputs * size * (models + work.training) + 8 * work.n)
    # The check against float64 has blocks of logits, and in training the weight and its gradient.
    need += 16 * weight * work.training
    if candidate in ("eager", "compiled"):
        need += logits * models * (size + (32 if work.training else 20))
    elif candidate == "chunked":
        need += 3 * weight * size * work.training
    have = available_bytes(device)
    if need > have:
        raise NotMeasuredError(f"needs about {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are available")
