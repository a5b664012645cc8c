"""`python -m benchmarks.bench_linear_extrapolated_sample`: one step of selective replacement from hidden states.

Rounds and ratios as in `harness`; nothing is truncated. Beside it:

- matmuls: hidden · weightᵀ of both models alone, in the dtype of the inputs, into a buffer that exists;
- logits: the same products, made float32, then `extrapolated_sample`;
- eager: logits, log-softmax, Gumbel noise and the criterion in PyTorch, with noise of its own.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlogp_kernels import Sample, backends, extrapolated_sample, linear_extrapolated_sample
from dlogp_kernels.reference import sampling as reference_sample
from dlogp_kernels.reference import statistics as reference

from .harness import Budget, Candidate, Clock, Timings, WrongResultError, measure
from .problem import build
from .shapes import DTYPES, Shape, Workload

_GAMMA, _THRESHOLD = 0.1, -0.3
_OPTIONS: Mapping[str, Any] = {"gamma": _GAMMA, "criterion": "delta_logp", "threshold": _THRESHOLD, "seed": 1}
#: Of log p.
_ERROR = 1e-4

#: Tensors by the names of the function's arguments.
Inputs = Mapping[str, Any]


def inputs_of(rows: int, shape: Shape, dtype: str, device: torch.device) -> Inputs:
    """Logits of standard deviation 3, and a base model near the other one."""
    problem = build(Workload("linear_delta_logp", shape, rows, dtype), device)
    return {name: x for name, x in problem.inputs.items() if name != "target"}


def products(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs["hidden"] @ inputs["weight"].t(), inputs["base_hidden"] @ inputs["base_weight"].t()


def matmuls(inputs: Inputs, buffer: Tensor) -> None:
    torch.mm(inputs["hidden"], inputs["weight"].t(), out=buffer)
    torch.mm(inputs["base_hidden"], inputs["base_weight"].t(), out=buffer)


def ours(inputs: Inputs) -> Sample:
    return linear_extrapolated_sample(**inputs, **_OPTIONS)


def from_logits(inputs: Inputs) -> Sample:
    logits, base_logits = products(inputs)
    return extrapolated_sample(logits.float(), base_logits.float(), **_OPTIONS)


def eager(inputs: Inputs) -> Tensor:
    logp, base_logp = (logits.float().log_softmax(-1) for logits in products(inputs))
    draft = _draw(base_logp)
    delta_logp = (logp - base_logp).gather(-1, draft)
    replacement = _draw((1 + _GAMMA) * logp - _GAMMA * base_logp)
    return torch.where(delta_logp < _THRESHOLD, replacement, draft)


def _draw(scores: Tensor) -> Tensor:
    return (scores - torch.empty_like(scores).exponential_().log_()).argmax(-1, keepdim=True)


def verify(inputs: Inputs) -> None:
    """The first row against the definition in float64. Rounding could only change a token at a tie."""
    one = {name: x if "weight" in name else x[:1] for name, x in inputs.items()}
    drawn = ours(one)
    z, base_z = (
        reference.linear_logits(one[f"{prefix}hidden"], one[f"{prefix}weight"], None, torch.float64)
        for prefix in ("", "base_")
    )
    zero, seed = (torch.tensor([x], device=z.device) for x in (0, 1))
    truth = reference_sample.extrapolated_sample(
        z, base_z, zero, seed, zero, _GAMMA, "delta_logp", _THRESHOLD, "base", 1.0, 0, 1.0, 0.0
    )
    error = (drawn.logp - truth.logp).abs().item()
    if not (torch.equal(drawn.token, truth.token) and error <= _ERROR):
        raise WrongResultError(f"token {drawn.token}, expected {truth.token}; log p is off by {error:.1e}")


def candidates(inputs: Inputs) -> list[Candidate]:
    shape = inputs["hidden"].shape[0], inputs["weight"].shape[0]
    buffer = torch.empty(shape, dtype=inputs["hidden"].dtype, device=inputs["hidden"].device)
    return [
        Candidate("ours", partial(ours, inputs)),
        Candidate("matmuls", partial(matmuls, inputs, buffer)),
        Candidate("logits", partial(from_logits, inputs)),
        Candidate("eager", partial(eager, inputs)),
    ]


def line(rows: int, dtype: str, timings: Timings) -> str:
    milliseconds = 1e3 * timings.quantiles("ours", "forward").median
    ratios = [timings.ratio("ours", other, "forward").median for other in ("matmuls", "logits", "eager")]
    return f"| {dtype} | {rows} | {milliseconds:.1f} ms | " + " | ".join(f"{ratio:.2f} ×" for ratio in ratios) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_linear_extrapolated_sample", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each number of rows and dtype")
    parser.add_argument("--device", default="cpu", type=torch.device)
    options = parser.parse_args()
    backend = backends.select("linear_extrapolated_sample", options.device)
    print(
        f"D {options.hidden_size}, V {options.vocabulary}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, backend `{backend}`; time of ours, and as a part of that of the others\n"
    )
    print("| dtype | rows | ours | matmuls | logits | eager |\n|---|---|---|---|---|---|")
    shape = Shape("sampling", options.hidden_size, options.vocabulary)
    for dtype in options.dtypes:
        for rows in options.rows:
            inputs = inputs_of(rows, shape, dtype, options.device)
            verify(inputs)
            timings = measure(candidates(inputs), Budget(seconds=options.seconds), Clock(options.device))
            print(line(rows, dtype, timings), flush=True)


if __name__ == "__main__":
    main()
