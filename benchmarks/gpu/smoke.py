"""Does every family of kernels start, and is it right? Small inputs against float64, one process a family.

Each case is one call on inputs of one kind; the plain one in bfloat16 comes first. What a launcher allocates is filled
with NaN before, so that a number that is never written is seen.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

import dlogp_kernels
from dlogp_kernels import backends

from ..bench_sampling import check_draws
from ..cases import BENCHES
from ..problem import IGNORE_INDEX, Problem, definition, named
from ..shapes import Shape, Workload
from ..timing import NotMeasuredError, WrongResultError, verify
from .processes import Case, Entry, Session

Inputs = dict[str, Tensor]
Options = dict[str, Any]
#: Largest error of a statistic, per max(1, |value|), and relative error of a gradient. Tensor cores truncate their
#: sums, and gradients by logits are rounded to the inputs' dtype: a wrong kernel is further off.
_LIMITS = {
    "bfloat16": {"output": 1e-3, "gradient": 0.02},
    "float16": {"output": 1e-3, "gradient": 0.01},
    "float32": {"output": 5e-5, "gradient": 1e-4},
}


#: Rows of each shape: of draws a few, as rounding changes a token in one of thousands; of given log-probabilities more.
_ROWS, _ROWS_A_DRAW, _TOKENS_A_ROW = {"aligned": 200, "odd": 136, "large": 704, "tiny": 8}, 40, 200
_SHAPES = (Shape("aligned", 128, 4096), Shape("odd", 45, 1187))
#: By dtype; Triton's interpreter computes bfloat16 wrongly.
_REAL = {"bfloat16": (*_SHAPES, Shape("large", 1024, 20_011)), "float16": _SHAPES, "float32": _SHAPES}
_TINY = {"float32": (Shape("tiny", 16, 45),)}
#: Options with a bias, two candidates a row, and every third row ignored.
_HEAD: dict[str, Options] = {
    "": {}, "options": {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3}, "half ignored": {"half_ignored": True},
}  # fmt: skip
_BASE: Options = {"base_softcap": 9.0, "base_logit_scale": 0.8}
_POLICIES: dict[str, Options] = {
    "dapo": {},
    "dapo, dual clip, k3": {"dual_clip": 3.0, "kl_beta": 0.3},
    "dapo, packed": {"packed": True},
    "grpo, ppl": {"loss_type": "grpo", "reweight": "ppl"},
    "grpo, sequence": {"loss_type": "grpo", "importance": "sequence"},
    "cispo": {"loss_type": "cispo", "clip_high": 5.0},
    "sapo, dominate": {"loss_type": "sapo", "reweight": "dominate"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_length": 400, "reweight_sign": "negative"},
}
_LINEAR_POLICIES: dict[str, Options] = {
    "dapo": {},
    "entropy": {"loss_type": "grpo", "entropy_coef": 0.1},
    "sequence": {"loss_type": "grpo", "importance": "sequence"},
}
_SAMPLERS: dict[str, Options] = {
    "top-p": {"seed": 7, "top_p": 0.7, "gamma": 0.5},
    "no filter": {"seed": 7, "gamma": 0.5},
    "top-k, min-p, by Δlog p": {
        "seed": 7, "top_k": 20, "min_p": 0.02, "criterion": "delta_logp", "threshold": -0.3, "gamma": 0.3,
    },
    "by entropy, draft of rl": {
        "seed": 7, "criterion": "entropy", "threshold": 5.0, "draft": "rl", "temperature": 0.7,
    },
    "greedy": {"seed": 7, "temperature": 0.0},
}  # fmt: skip
_OPTIONS: dict[str, dict[str, Options]] = {
    "policy_loss": _POLICIES,
    "linear_policy_loss": _LINEAR_POLICIES,
    "extrapolated_sample": _SAMPLERS,
    "linear_extrapolated_sample": _SAMPLERS,
}
#: What each process looks at, those first that take long: backend and op.
FAMILIES = (
    *(f"triton {op}" for op in (*reversed(_OPTIONS), "linear_logp", "linear_delta_logp", "logp", "delta_logp")),
    *(f"cuda {op}" for op in ("extrapolated_sample", "linear_logp", "linear_delta_logp")),
    "gemm linear_logp", "gemm linear_delta_logp",
)  # fmt: skip


def cases(session: Session) -> list[Case]:
    """Of the request's family: the plain case first; on a GPU then another stream and a CUDA graph."""
    backend, op = session.group.split()
    found = []
    for dtype, shape in [(dtype, shape) for dtype, of in (_TINY if session.tiny else _REAL).items() for shape in of]:
        if backend == "cuda" and "linear" in op and (dtype == "float32" or shape.d % 8) and not session.tiny:
            continue  # it would raise, and say why
        n, variant = _ROWS[shape.name], "DAPO" if op == "policy_loss" else ""
        rows = max(3, n // _ROWS_A_DRAW) if "sample" in op else n * _TOKENS_A_ROW if variant and not session.tiny else n
        work = Workload(op, shape, rows, dtype, backend == "triton", variant)
        for name, options in _OPTIONS.get(op, _HEAD).items():
            if name == "half ignored" and shape.name != "large":  # where whole blocks of rows are left out
                continue
            given = partial(_problem, session, backend, work, options)
            found.append(Case(f"{dtype} {shape.name} {name}".strip(), partial(_compared, backend, given)))
            if len(found) == 1 and session.on_gpu:
                found.append(Case("another stream and a CUDA graph", partial(_elsewhere, backend, given)))
    return found


def _problem(session: Session, backend: str, work: Workload, options: Options) -> Problem:
    """If the backend can take it, with a fixed random gradient of every output that has one."""
    device, op = session.device, work.op
    dtype = getattr(torch, work.dtype)
    reason = backends.unavailable(backend, op if "sample" in op else f"{op}_fwd", device, dtype)
    if reason is not None:
        raise NotMeasuredError(f"backend {backend}: {reason}")
    problem, options = BENCHES[op].build(work, device), {**options}
    inputs = {name: x.detach() for name, x in problem.inputs.items()}
    if "mask" in inputs:
        inputs["mask"][-1] = False  # a response without tokens
    if options.get("kl_beta"):
        inputs["ref_logp"] = inputs["old_logp"] + 0.1
    if options.get("reweight") == "ppl":
        inputs["group"] = torch.arange(len(inputs["mask"]), device=device) // 3
    if options.pop("packed", False):
        mask = inputs["mask"]
        inputs = {name: x[mask] if x.dim() == 2 else x for name, x in inputs.items()}
        inputs["offsets"] = pad(mask.sum(-1).cumsum(0), (1, 0))
    if options.pop("half_ignored", False):
        inputs["target"][::2] = IGNORE_INDEX
    for name in ("base_hidden", "base_weight") if "base_hidden" in inputs else ():
        inputs[name] = pad(inputs[name], (0, 8), value=0.1)  # the base has a hidden size of its own
    if op not in _OPTIONS and options:
        options = options | _BASE if work.pair else options
        inputs |= {name.replace("weight", "bias"): x[:, 0] + 0 for name, x in inputs.items() if "weight" in name}
        inputs["target"][::3] = IGNORE_INDEX
        inputs["target"] = torch.stack([inputs["target"], inputs["target"].roll(1)], 1)
    trained = problem.leaves
    if trained and "policy" not in op:
        trained = tuple(name for name in inputs if name != "target")
    inputs |= {name: inputs[name].requires_grad_() for name in trained}
    generator, upstream = torch.Generator(device).manual_seed(1), {}
    for name, x in named(definition(op, inputs, options)) if trained else ():
        if x.requires_grad:
            upstream[name] = torch.randn(x.shape, generator=generator, device=device)
    return Problem(work, inputs, options, trained, upstream)


def _compared(backend: str, given: Callable[[], Problem]) -> Iterator[Entry]:
    """Raises WrongResultError where outputs or gradients are too far from float64."""
    problem = given()
    work, limits = problem.work, _LIMITS[problem.work.dtype]
    function = getattr(dlogp_kernels, work.op)
    if "sample" in work.op:
        with backends.use_backend(backend), _nan_in_allocations():
            drawn = problem.call(function)
        errors = check_draws(drawn, problem.inputs, {**problem.options}, limits["output"])
    else:
        assert problem.truth  # which is formed before allocations are filled
        with backends.use_backend(backend), _nan_in_allocations():
            errors = problem.errors(function, scaled=True)
        verify(", ".join(f"{name} {error:.1e}" for name, error in errors.items()), errors, limits)
    yield {"error_of": errors, "largest": max(errors.values())}


def _elsewhere(backend: str, given: Callable[[], Problem]) -> Iterator[Entry]:
    """Another stream waits for what it still computes; a graph's replay with other inputs gives what a call gives."""
    problem = given()
    function = getattr(dlogp_kernels, problem.work.op)
    inputs = {name: x.detach() for name, x in problem.inputs.items()}
    others = {name: x.flip(0).clone() for name, x in inputs.items()}

    def call(given: Mapping[str, Tensor]) -> Inputs:
        return dict(named(function(**given, **problem.options)))

    with backends.use_backend(backend):
        expected = call(others)
        torch.cuda.synchronize()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            found = call({name: x.clone() for name, x in others.items()})
        stream.synchronize()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        with torch.cuda.graph(graph):
            found = call(inputs)
        for name, x in inputs.items():
            x.copy_(others[name])
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    yield {}


@contextlib.contextmanager
def _nan_in_allocations() -> Iterator[None]:
    """Within this context what launchers allocate is NaN, −1 in integers, before it is written."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*arguments: Any, **options: Any) -> Tensor:
            x = allocate(*arguments, **options)
            return x.detach().fill_(torch.nan if x.is_floating_point() else (-1 if x.dtype.is_signed else 1))

        return allocate_and_fill

    owners = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))
    with contextlib.ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


def machine(session: Session) -> list[Case]:
    return [Case("backends", partial(_backends, session))]


def _backends(session: Session) -> Iterator[Entry]:
    """Which backend serves which op here, and why not the others, each reason once; the CUDA library has to load."""
    served: dict[str, list[str]] = {}
    reasons: set[str] = set()
    for choice in backends.report():
        if choice.device == session.device.type:
            served.setdefault(choice.backend, []).append(choice.op)
            reasons |= {f"{name}: {reason}" for name, reason in choice.others.items() if "preferred" not in reason}
    card = str(torch.cuda.get_device_properties(session.device)) if session.on_gpu else None
    yield {"served": served, "not available": sorted(reasons), "cuda": torch.version.cuda, "properties": card}
    problem = backends.unavailable("cuda", "extrapolated_sample", session.device)
    if problem is not None:
        raise (WrongResultError if session.on_gpu else NotMeasuredError)(f"CUDA library: {problem}")
