"""What no implementation can do without: the products of a linear op, a pass over given logits, a copy of its bytes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import Workload
from .timing import Candidate


class Cost(NamedTuple):
    """Operations, unit "tflops", or bytes, "gb_per_s", that forward and backward need."""

    unit: str
    forward: float
    backward: float = 0.0

    @property
    def both(self) -> float:
        return self.forward + self.backward


def cost(work: Workload) -> Cost:
    n, v, size = float(work.n), work.shape.v, work.element_size
    if work.op == "policy_loss":
        # float32: reads logp, old_logp, mask and writes the gradient unscaled; backward reads that and scales it.
        return Cost("gb_per_s", 13 * n, 8 * n)
    if "sample" in work.op:
        return Cost("gb_per_s", 2 * size * v * (work.shape.d if work.linear else n))
    if not work.linear:
        # Backward reads the logits again and writes a gradient.
        return Cost("gb_per_s", n * v * size * (1 + work.pair), n * v * size * (2 + work.pair))
    # Products of N·V·D: one a model, in backward once more (unless logits are kept) and two for the gradients.
    one, again = 2 * n * v * work.shape.d, 0 if "policy" in work.op else 1 + work.pair
    return Cost("tflops", one * (1 + work.pair), one * (2 + again) * work.training)


def bare_products(
    models: Sequence[tuple[Tensor, Tensor]], training: bool, logits_kept: bool = False
) -> list[Candidate]:
    """The multiplications alone, into buffers that exist; the first (hidden, weight) of `models` is trained.

    "matmul" is hidden · weightᵀ of each model, as often as a step needs products of N·V·D: one forward, and in backward
    the logits again (unless they are kept) and two for the gradients. "matmul, real" has in backward the products of
    the gradients themselves, dlogits · weight and dlogitsᵀ · hidden, which are a bit slower.
    """
    models = [(hidden.detach(), weight.detach()) for hidden, weight in models]
    hidden, weight = models[0]
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)

    def products(models: Sequence[tuple[Tensor, Tensor]] = models) -> None:
        for x, w in models:
            torch.mm(x, w.t(), out=logits)

    if not training:
        return [Candidate("matmul", products)]
    d_hidden, d_weight, again = torch.empty_like(hidden), torch.empty_like(weight), [] if logits_kept else models

    def real_backward(_: object) -> None:
        products(again)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    backward = lambda _: products([*again, *2 * models[:1]])  # noqa: E731
    return [Candidate("matmul", products, backward), Candidate("matmul, real", products, real_backward)]


def bare_reads(models: Sequence[Tensor], training: bool) -> list[Candidate]:
    """One pass over the logits of each model ("read"); backward writes as much as the gradient of the first as well."""
    models = [logits.detach() for logits in models]

    def read() -> None:
        for logits in models:
            torch.amax(logits, -1)

    if not training:
        return [Candidate("read", read)]
    gradient = torch.empty_like(models[0])

    def backward(_: object) -> None:
        read()
        gradient.copy_(models[0])

    return [Candidate("read", read, backward)]


def bare_copy(device: torch.device, forward: float, backward: float | None = None) -> Candidate:
    """Moves so many bytes: reads half as many, and writes them."""

    def copy(size: float) -> Callable[..., Tensor]:
        source = torch.zeros(max(16, int(size) // 2), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda *_: target.copy_(source)

    return Candidate("copy", copy(forward), None if backward is None else copy(backward))
