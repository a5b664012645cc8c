"""How far log p and entropy are from float64, beside cuBLAS with float32 output on the same inputs."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends

from ..harness import WrongResultError
from ..problem import Problem, SingleStats, build
from ..shapes import Shape, Workload
from .child import Case, Entry, Session, failure

_ROWS = 512
_QUANTILES = {"median": 0.5, "99.9 %": 0.999, "max": 1.0}
#: Never more than this; and of the median and 99.9 %, no more than this many times what cuBLAS has.
LARGEST, TIMES_CUBLAS = 1e-3, 2.0


def cases(session: Session) -> list[Case]:
    work = Workload("linear_delta_logp", Shape("D 4096", 4096, 151_936), 4096)
    if session.tiny:
        work = Workload("linear_delta_logp", Shape("tiny", 16, 300), 24, "float32")
    return [Case(str(work), partial(_errors, session, work))]


def _errors(session: Session, work: Workload) -> Iterator[Entry]:
    problem = build(work, session.device)
    weight, exact = problem.inputs["weight"].t(), problem.inputs["weight"].double().t()
    truth = _of_blocks(problem, lambda hidden: hidden.double() @ exact)

    def cublas(hidden: Tensor) -> Tensor:
        if hidden.is_cuda:
            return torch.mm(hidden, weight, out_dtype=torch.float32)
        return hidden.float() @ weight.float()

    candidates = {
        "cuBLAS, float32 out": partial(_of_blocks, problem, cublas),
        "linear_logp triton": partial(_ours, problem, "linear_logp", "triton"),
        "linear_logp gemm": partial(_ours, problem, "linear_logp", "gemm"),
        "linear_delta_logp triton": partial(_ours, problem, "linear_delta_logp", "triton"),
    }
    of_cublas: dict[str, float] = {}
    for name, call in candidates.items():
        session.watch(name)
        entry: Entry = {"candidate": name}
        try:
            found = call()
            entry["error_of"] = errors = {
                f"{output} {label}": (getattr(found, output).double() - getattr(truth, output)).abs().quantile(q).item()
                for output in ("logp", "entropy")
                for label, q in _QUANTILES.items()
            }
            of_cublas = of_cublas or errors
            for label, error in errors.items():
                most = LARGEST if label.endswith("max") else TIMES_CUBLAS * of_cublas[label] + 1e-7
                if not error <= min(most, LARGEST):
                    raise WrongResultError(f"{label} is {error:.1e}, expected at most {min(most, LARGEST):.1e}")
        except Exception as error:
            entry |= failure(error)
        yield entry


def _ours(problem: Problem, op: str, backend: str) -> SingleStats:
    names = ("hidden", "weight", "target") if op == "linear_logp" else problem.inputs.keys()
    with backends.use_backend(backend), torch.no_grad():
        stats = getattr(dlogp_kernels, op)(**{name: problem.inputs[name] for name in names})
    return SingleStats(stats.logp, stats.entropy)


def _of_blocks(problem: Problem, logits: Callable[[Tensor], Tensor]) -> SingleStats:
    blocks = []
    for hidden, target in zip(*(problem.inputs[name].split(_ROWS) for name in ("hidden", "target")), strict=True):
        logp = logits(hidden).log_softmax(-1)
        blocks.append(SingleStats(logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)))
    return SingleStats(*(torch.cat(values) for values in zip(*blocks, strict=True)))
