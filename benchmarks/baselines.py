"""What the benchmarks of all ops share of their baselines; the baselines themselves are in `bench_<op>.py`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .harness import Candidate
from .problem import Problem

#: Rows of a block of the chunked baselines: of logits that are given, and of logits that are multiplied first.
LOGITS_ROWS = 8
LINEAR_ROWS = 128


def in_row_blocks(function: Callable[..., NamedTuple], rows: int, *inputs: Tensor) -> list[Tensor]:
    """The outputs of `function` of blocks of `rows` rows; in training each block is recomputed in backward."""
    call = partial(checkpoint, function, use_reentrant=False) if torch.is_grad_enabled() else function
    stats = [call(*block) for block in zip(*(x.split(rows) for x in inputs), strict=True)]
    return [torch.cat(values) for values in zip(*stats, strict=True)]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def bare_matmuls(problem: Problem) -> list[Candidate]:
    """The multiplications of a linear op alone, into buffers that exist.

    "matmul" is hidden · weightᵀ of each model, as often as a step needs products of N·V·D: one forward, and in backward
    the logits again and two for the gradients. "matmul, real" has in backward the products of the gradients themselves,
    dlogits · weight and dlogitsᵀ · hidden, which are a bit slower.
    """
    inputs = {name: x.detach() for name, x in problem.inputs.items()}
    hidden, weight = inputs["hidden"], inputs["weight"]
    models = [(hidden, weight)]
    if problem.work.pair:
        models.append((inputs["base_hidden"], inputs["base_weight"]))
    logits = torch.empty(problem.work.n, problem.work.shape.v, dtype=hidden.dtype, device=hidden.device)

    def products() -> None:
        for x, w in models:
            torch.mm(x, w.t(), out=logits)

    if not problem.work.training:
        return [Candidate("matmul", products)]
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def backward(_: object) -> None:
        products()
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)

    def real_backward(_: object) -> None:
        products()
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    return [Candidate("matmul", products, backward), Candidate("matmul, real", products, real_backward)]


def bare_copy(device: torch.device, forward: float, backward: float | None = None) -> Candidate:
    """Moves so many bytes: reads half as many, and writes them."""

    def copy(size: float) -> Callable[..., Tensor]:
        source = torch.zeros(max(16, int(size) // 2), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda *_: target.copy_(source)

    return Candidate("copy", copy(forward), None if backward is None else copy(backward))


def bare_reads(problem: Problem) -> list[Candidate]:
    """One pass over given logits ("read"); backward writes as much as the gradient as well."""
    names = ("logits", "base_logits") if problem.work.pair else ("logits",)
    models = [problem.inputs[name].detach() for name in names]

    def read() -> None:
        for logits in models:
            torch.amax(logits, -1)

    if not problem.work.training:
        return [Candidate("read", read)]
    gradient = torch.empty_like(models[0])

    def backward(_: object) -> None:
        read()
        gradient.copy_(models[0])

    return [Candidate("read", read, backward)]
