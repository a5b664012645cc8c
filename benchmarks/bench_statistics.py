"""`logp`, `delta_logp` and the same from hidden states, beside plain PyTorch: eager, compiled and in blocks of rows."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, log_softmax
from torch.utils.checkpoint import checkpoint

import dlogp_kernels

from . import problem
from .floors import bare_products, bare_reads
from .problem import Problem
from .timing import BASELINE, OURS, Candidate

OPS = ("linear_logp", "linear_delta_logp", "logp", "delta_logp")
#: A variant: every second target, at random, is to be ignored, beside all of them.
HALF_IGNORED = "half ignored"
#: Rows of a block, of logits that are given and of logits that are multiplied first.
_LOGITS_ROWS, _LINEAR_ROWS = 8, 128
#: Of products on tensor cores: their sums are truncated.
_ON_TENSOR_CORES = OURS | {"output": 1e-3}

build = problem.build


class SingleStats(NamedTuple):
    """What plain PyTorch returns of one model; None: what another library does not give."""

    logp: Tensor
    entropy: Tensor | None = None


class PairStats(NamedTuple):
    """What plain PyTorch returns of a pair."""

    delta_logp: Tensor
    logp: Tensor
    base_logp: Tensor
    entropy: Tensor
    base_entropy: Tensor
    kl: Tensor
    reverse_kl: Tensor


def logp(logits: Tensor, target: Tensor, softcap: float | None = None) -> SingleStats:
    """As it is written today."""
    logp_all = log_softmax(_capped(logits, softcap).float(), dim=-1)
    return SingleStats(
        logp=logp_all.gather(-1, target[:, None]).squeeze(-1),
        entropy=-(logp_all.exp() * logp_all).sum(-1),
    )


def delta_logp(
    logits: Tensor, base_logits: Tensor, target: Tensor, softcap: float | None = None, base_softcap: float | None = None
) -> PairStats:
    logp_all = log_softmax(_capped(logits, softcap).float(), dim=-1)
    base_logp_all = log_softmax(_capped(base_logits, base_softcap).float(), dim=-1)
    logp = logp_all.gather(-1, target[:, None]).squeeze(-1)
    base_logp = base_logp_all.gather(-1, target[:, None]).squeeze(-1)
    p, q = logp_all.exp(), base_logp_all.exp()
    return PairStats(
        delta_logp=logp - base_logp,
        logp=logp,
        base_logp=base_logp,
        entropy=-(p * logp_all).sum(-1),
        base_entropy=-(q * base_logp_all).sum(-1),
        kl=(p * (logp_all - base_logp_all)).sum(-1),
        reverse_kl=(q * (base_logp_all - logp_all)).sum(-1),
    )


def linear_logp(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> SingleStats:
    return logp(hidden @ weight.t(), target, softcap)


def linear_delta_logp(
    hidden: Tensor, weight: Tensor, base_hidden: Tensor, base_weight: Tensor, target: Tensor, **softcaps: float
) -> PairStats:
    return delta_logp(hidden @ weight.t(), base_hidden @ base_weight.t(), target, **softcaps)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


EAGER: Mapping[str, Callable[..., NamedTuple]] = {
    "logp": logp, "delta_logp": delta_logp, "linear_logp": linear_logp, "linear_delta_logp": linear_delta_logp,
}  # fmt: skip


def chunked(op: str, **inputs: Any) -> NamedTuple:
    """The same in blocks of rows: of a product, then its softmax in smaller ones; in training a block is recomputed."""
    rows = {name: x for name, x in inputs.items() if name == "target" or name.endswith(("hidden", "logits"))}
    rest = {name: x for name, x in inputs.items() if name not in rows}
    block: Callable[..., NamedTuple] = partial(EAGER[op], **rest)
    if torch.is_grad_enabled():
        block = partial(checkpoint, block, use_reentrant=False)
    elif op.startswith("linear"):
        block = partial(_chunked_after_product, op.removeprefix("linear_"), rest)
    parts = zip(*(x.split(_LINEAR_ROWS if "hidden" in inputs else _LOGITS_ROWS) for x in rows.values()), strict=True)
    stats: list[Any] = [block(**dict(zip(rows, part, strict=True))) for part in parts]
    return type(stats[0])(*map(torch.cat, zip(*stats, strict=True)))


def _chunked_after_product(op: str, rest: Mapping[str, Any], target: Tensor, **hidden: Tensor) -> NamedTuple:
    softcaps = {name: value for name, value in rest.items() if "softcap" in name}
    logits = {
        name.replace("hidden", "logits"): x @ rest[name.replace("hidden", "weight")].t() for name, x in hidden.items()
    }
    return chunked(op, **logits, target=target, **softcaps)


def functions(op: str) -> dict[str, Callable[..., NamedTuple]]:
    """The candidates; of `compiled` one shape is one graph, whatever was compiled before."""

    @cache
    def compiled() -> Callable[..., NamedTuple]:
        # At the first call: the compiler alone takes seconds to import, which the others need not.
        torch.compiler.reset()
        return torch.compile(EAGER[op], dynamic=False)

    return {
        "ours": getattr(dlogp_kernels, op),
        "eager": EAGER[op],
        "compiled": lambda **inputs: compiled()(**inputs),
        "chunked": partial(chunked, op),
    }


def candidates(problem: Problem) -> list[Candidate]:
    if problem.work.variant == HALF_IGNORED:
        ours = getattr(dlogp_kernels, problem.work.op)
        half = problem.half_ignored()
        return [problem.candidate("ours", ours, OURS), half.candidate(f"ours, {HALF_IGNORED}", ours, OURS)]
    on_tensor_cores = problem.work.linear and problem.inputs["target"].is_cuda
    limits = {"ours": _ON_TENSOR_CORES if on_tensor_cores else OURS}
    found = functions(problem.work.op).items()
    return [problem.candidate(name, function, limits.get(name, BASELINE)) for name, function in found]


def floor(problem: Problem) -> list[Candidate]:
    inputs, training = problem.inputs, problem.work.training
    prefixes = ("", "base_")[: 1 + problem.work.pair]
    if problem.work.linear:
        return bare_products([(inputs[f"{x}hidden"], inputs[f"{x}weight"]) for x in prefixes], training)
    return bare_reads([inputs[f"{x}logits"] for x in prefixes], training)
