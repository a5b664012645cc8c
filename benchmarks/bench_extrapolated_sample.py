"""`python -m benchmarks.bench_extrapolated_sample`: one step of selective replacement over a batch of logits.

Rounds and ratios as in `harness`. The others:

- warpers: one draw from the extrapolated logits by the warpers of `transformers`, softmax and `torch.multinomial`; no
  draft, no criterion;
- numpy: the authors' loop over rows, on all log-probabilities instead of the 50 largest: draft, Δlog p, replacement.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlogp_kernels import Sample, backends, extrapolated_sample, reference_sample

from .harness import Budget, Candidate, Clock, Timings, WrongResultError, measure

_STD, _BASE_NOISE = 3.0, 0.3
_GAMMA, _THRESHOLD = 0.1, -0.3
#: Of transformers' defaults and of the paper's evaluation (top-p 0.7).
FILTERS: Mapping[str, dict[str, Any]] = {
    "no truncation": {},
    "top-p 0.7": {"top_p": 0.7},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
}
#: Times as fast, with top-p 0.7.
_REACH = {"warpers": 15, "numpy": 30}


def build(rows: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits of standard deviation 3 of two models that are near one another; float32."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator, device=device) * _STD
    noise = torch.randn(rows, vocabulary, generator=generator, device=device)
    return logits, logits + _STD * _BASE_NOISE * noise


def ours(logits: Tensor, base_logits: Tensor, filters: dict[str, Any], criterion: str = "delta_logp") -> Sample:
    threshold = _THRESHOLD if criterion == "delta_logp" else None
    return extrapolated_sample(
        logits, base_logits, gamma=_GAMMA, criterion=criterion, threshold=threshold, seed=1, **filters
    )


def warpers(logits: Tensor, base_logits: Tensor, filters: dict[str, Any]) -> Tensor:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    scores = (1 + _GAMMA) * logits - _GAMMA * base_logits
    for warper in (TemperatureLogitsWarper(1.0), *(kinds[name](value) for name, value in filters.items())):
        scores = warper(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)


def in_numpy(logits: Tensor, base_logits: Tensor, filters: dict[str, Any]) -> list[int]:
    logp, base_logp = (_log_softmax(x.cpu().numpy()) for x in (logits, base_logits))
    generator = np.random.default_rng(0)
    return [_row_in_numpy(row, base_row, filters, generator) for row, base_row in zip(logp, base_logp, strict=True)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _row_in_numpy(
    logp: np.ndarray, base_logp: np.ndarray, filters: dict[str, Any], generator: np.random.Generator
) -> int:
    token = _draw_in_numpy(base_logp, filters, generator)
    if logp[token] - base_logp[token] < _THRESHOLD:
        token = _draw_in_numpy((1 + _GAMMA) * logp - _GAMMA * base_logp, filters, generator)
    return token


def _draw_in_numpy(scores: np.ndarray, filters: dict[str, Any], generator: np.random.Generator) -> int:
    p = np.exp(scores.astype(np.float64) - scores.max())
    p /= p.sum()
    order = np.argsort(-p)
    ordered = p[order]
    kept = np.ones(len(p), dtype=bool)
    if "top_k" in filters:
        kept[filters["top_k"] :] = False
    if "top_p" in filters:
        kept &= np.cumsum(ordered) - ordered < filters["top_p"]
    if "min_p" in filters:
        kept &= ordered >= filters["min_p"] * ordered[0]
    ordered = np.where(kept, ordered, 0.0)
    return int(order[generator.choice(len(p), p=ordered / ordered.sum())])


def verify(logits: Tensor, base_logits: Tensor, filters: dict[str, Any]) -> None:
    """The first row against the definition in float64. Rounding could only change a token at a tie."""
    drawn = ours(logits[:1], base_logits[:1], filters)
    chosen = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    zero, one = (torch.tensor([x], device=logits.device) for x in (0, 1))
    truth = reference_sample.extrapolated_sample(
        logits[:1].double(), base_logits[:1].double(), zero, one, zero, _GAMMA, "delta_logp", _THRESHOLD, "base", 1.0,
        **chosen,
    )  # fmt: skip
    error = (drawn.logp - truth.logp).abs().item()
    if not (torch.equal(drawn.token, truth.token) and error <= 1e-4):
        raise WrongResultError(f"extrapolated_sample with {filters}: token {drawn.token}, expected {truth.token}")


def candidates(logits: Tensor, base_logits: Tensor, filters: dict[str, Any]) -> list[Candidate]:
    inputs = (logits, base_logits, filters)
    return [
        Candidate("ours", partial(ours, *inputs)),
        Candidate("ours, all replaced", partial(ours, *inputs, criterion="all")),
        Candidate("warpers", partial(warpers, *inputs)),
        Candidate("numpy", partial(in_numpy, *inputs)),
    ]


def lines(label: str, timings: Timings) -> list[str]:
    result = []
    for name in timings.rounds[0]:
        milliseconds = 1e3 * timings.quantiles(name, "forward").median
        line = f"| {label} | {name} | {milliseconds:.2f} ms |"
        if name in _REACH:
            faster = [timings.ratio(name, other, "forward").median for other in ("ours", "ours, all replaced")]
            reach = f"≥ {_REACH[name]}" if label == "top-p 0.7" else ""
            line += f" {faster[0]:.1f} × | {faster[1]:.1f} × | {reach} |"
        else:
            line += " | | |"
        result.append(line)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_extrapolated_sample", description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each filter")
    parser.add_argument("--device", default="cpu", type=torch.device)
    options = parser.parse_args()
    inputs = build(options.rows, options.vocabulary, options.device)
    print(
        f"{options.rows} rows of {options.vocabulary} float32 logits, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, backend `{backends.select('extrapolated_sample', options.device)}`\n"
    )
    print(
        "| filters | what | time | ours is faster | all replaced, ours is faster | reach |\n|---|---|---|---|---|---|"
    )
    for label, filters in FILTERS.items():
        verify(*inputs, filters)
        timings = measure(candidates(*inputs, filters), Budget(seconds=options.seconds), Clock(options.device))
        print("\n".join(lines(label, timings)), flush=True)


if __name__ == "__main__":
    main()
