"""How far log p and entropy are from float64, beside cuBLAS with float32 output on the same inputs."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends

from ..harness import WrongResultError
from ..problem import Problem, build
from ..shapes import Shape, Workload
from .child import Case, Entry, Session, failure

_ROWS = 512
_QUANTILES = {"median": 0.5, "99.9 %": 0.999, "max": 1.0}
#: Never more than this, and no more than this many times what cuBLAS has.
LARGEST, TIMES_CUBLAS = 1e-3, 2.0
CUBLAS = "cuBLAS, float32 out"


class _Stats(NamedTuple):
    logp: Tensor
    entropy: Tensor


def cases(session: Session) -> list[Case]:
    work = Workload("linear_delta_logp", Shape("d4096", 4096, 151_936), 4096)
    if session.tiny:
        work = Workload("linear_delta_logp", Shape("tiny", 16, 300), 24, "float32")
    return [Case(str(work), partial(_errors, session, work))]


def _errors(session: Session, work: Workload) -> Iterable[Entry]:
    problem = build(work, session.device)
    session.watch("float64")
    truth = _truth(problem)
    of_cublas: dict[str, float] = {}
    for name, call in _candidates(problem).items():
        session.watch(name)
        try:
            found = call()
            errors = {
                f"{output} {label}": _quantile((getattr(found, output).double() - expected).abs(), q)
                for output, expected in truth._asdict().items()
                for label, q in _QUANTILES.items()
            }
        except Exception as error:
            yield {**failure(error), "candidate": name}
            continue
        of_cublas = of_cublas or errors
        entry: Entry = {"candidate": name, "error_of": errors, "largest": max(errors.values())}
        yield entry | _verdict(errors, of_cublas)


def _verdict(errors: dict[str, float], of_cublas: dict[str, float]) -> Entry:
    worse = [
        label
        for label, error in errors.items()
        if not error <= LARGEST or not (label.endswith("max") or error <= TIMES_CUBLAS * of_cublas[label] + 1e-7)
    ]
    return failure(WrongResultError(f"too far off: {', '.join(worse)}")) if worse else {}


def _quantile(errors: Tensor, q: float) -> float:
    """NaN where one is: torch.quantile says so."""
    return errors.flatten().quantile(q).item()


def _candidates(problem: Problem) -> dict[str, Callable[[], _Stats]]:
    one: dict[str, Any] = {name: problem.inputs[name] for name in ("hidden", "weight", "target")}
    pair_inputs: dict[str, Any] = {**problem.inputs}

    def single(backend: str) -> _Stats:
        with backends.use_backend(backend), torch.no_grad():
            stats = dlogp_kernels.linear_logp(**one)
        return _Stats(stats.logp, stats.entropy)

    def pair() -> _Stats:
        with backends.use_backend("triton"), torch.no_grad():
            stats = dlogp_kernels.linear_delta_logp(**pair_inputs)
        return _Stats(stats.logp, stats.entropy)

    return {
        CUBLAS: partial(_cublas, problem),
        "linear_logp triton": partial(single, "triton"),
        "linear_logp gemm": partial(single, "gemm"),
        "linear_delta_logp triton": pair,
    }


def _cublas(problem: Problem) -> _Stats:
    weight = problem.inputs["weight"].t()

    def logits(hidden: Tensor) -> Tensor:
        if hidden.is_cuda:
            return torch.mm(hidden, weight, out_dtype=torch.float32)
        return hidden.float() @ weight.float()

    return _of_blocks(problem, logits)


def _truth(problem: Problem) -> _Stats:
    weight = problem.inputs["weight"].double().t()
    return _of_blocks(problem, lambda hidden: hidden.double() @ weight)


def _of_blocks(problem: Problem, logits: Callable[[Tensor], Tensor]) -> _Stats:
    def blocks() -> Iterator[_Stats]:
        pairs = zip(problem.inputs["hidden"].split(_ROWS), problem.inputs["target"].split(_ROWS), strict=True)
        for hidden, target in pairs:
            logp = logits(hidden).log_softmax(-1)
            yield _Stats(logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1))

    return _Stats(*(torch.cat(values) for values in zip(*blocks(), strict=True)))
