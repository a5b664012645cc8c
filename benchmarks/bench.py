"""A benchmark: one op, what it is compared with, and how exact each has to be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dlogp_kernels import backends

from .harness import Candidate
from .problem import Function, Problem

#: Wrong, rather than inexact, from here on: absolute for an output, relative for a gradient. What is reached is
#: recorded; bfloat16 logits of |z| about 15 are rounded by up to 0.03 before a baseline's softmax sees them.
OURS = {"output": 1e-4, "gradient": 0.02}
BASELINE = {"output": 0.2, "gradient": 0.1}


@dataclass(frozen=True)
class Bench:
    """`ours`, `eager` and `chunked` take the inputs by name; `floor` is what no implementation can do without."""

    op: str
    ours: Function
    eager: Function
    chunked: Function
    floor: Callable[[Problem], list[Candidate]]

    def function(self, name: str) -> Function:
        """The candidate `name` that computes statistics."""
        if name == "compiled":
            # One shape, one graph, whatever was compiled before.
            torch.compiler.reset()
            return torch.compile(self.eager, dynamic=False)
        return {"ours": self.ours, "eager": self.eager, "chunked": self.chunked}[name]

    def backend(self, device: torch.device) -> str:
        """What serves the op's forward and backward here."""
        served = {backends.select(f"{self.op}_{step}", device): None for step in ("fwd", "bwd")}
        return "+".join(served)


def tolerances(name: str, errors: Mapping[str, float]) -> dict[str, float]:
    return by_kind(OURS if name.startswith("ours") else BASELINE, errors)


def by_kind(limits: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
    """The limit of each error, by whether it is that of an output or of a gradient (`d_<input>`)."""
    return {name: limits["gradient" if name.startswith("d_") else "output"] for name in errors}
