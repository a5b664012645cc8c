"""Does every family of kernels start, and is it right? Small inputs against float64, one process a family.

Each case is one call on inputs of one kind; the plain one in bfloat16 comes first. What a launcher allocates is filled
with NaN before, so that a number that is never written is seen.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

import dlogp_kernels
from dlogp_kernels import backends

from .. import bench_policy
from ..bench_sampling import check_draws
from ..problem import IGNORE_INDEX, Problem, build, definition, named
from ..shapes import DTYPES, Shape, Workload
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


class Kind(NamedTuple):
    """Rows, hidden size, vocabulary, candidates a row; whether options are on; every so many rows one is ignored.

    Of given log-probabilities: responses, and tokens of each for the vocabulary.
    """

    n: int
    d: int
    v: int
    k: int = 1
    options: bool = False
    ignored: int = 0
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")


_KINDS = {
    "aligned": Kind(200, 128, 4096),
    "odd D and V": Kind(133, 45, 1187),
    "large": Kind(700, 1024, 20_011, dtypes=("bfloat16",)),
    "options": Kind(150, 128, 1187, k=2, options=True, ignored=3),
    "options, odd D": Kind(77, 45, 301, k=2, options=True, ignored=5, dtypes=("bfloat16", "float32")),
    "half ignored": Kind(600, 256, 4096, ignored=2, dtypes=("bfloat16",)),
}
#: Triton's interpreter computes bfloat16 wrongly.
_TINY_KINDS = {
    "aligned": Kind(9, 16, 97, dtypes=("float32", "float16")),
    "options": Kind(7, 13, 61, k=2, options=True, ignored=3, dtypes=("float32",)),
}
_DRAWN = {"aligned": Kind(5, 128, 4096), "odd": Kind(9, 45, 1187), "large": Kind(3, 512, 151_936)}
_STEPS = {
    "aligned": Kind(640, 128, 4096),
    "odd D and V": Kind(96, 45, 1187),
    "large": Kind(1200, 1024, 20_011, dtypes=("bfloat16",)),
}
_TINY = {"aligned": Kind(8, 16, 45, dtypes=("float32",))}
_RESPONSES = {name: Kind(9, 0, 700, dtypes=("float32", "bfloat16")) for name in ("padded", "packed")}
_TINY_RESPONSES = {"padded": Kind(3, 0, 16, dtypes=("float32",))}
_POLICIES: dict[str, Options] = {
    "dapo": {},
    "dapo, dual clip, k3": {"dual_clip": 3.0, "kl_beta": 0.3},
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
#: Backend, ops, and whether gradients are compared too (a policy's are), of each process; those that take long first.
FAMILIES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "linear sampling": ("triton", ("linear_extrapolated_sample",), False),
    "linear": ("triton", ("linear_logp",), False),
    "pair": ("triton", ("linear_delta_logp",), False),
    "sampling cuda": ("cuda", ("extrapolated_sample",), False),
    "sampling triton": ("triton", ("extrapolated_sample",), False),
    "policy_loss": ("triton", ("policy_loss",), True),
    "backward": ("triton", ("linear_logp", "linear_delta_logp"), True),
    "linear_policy_loss": ("triton", ("linear_policy_loss",), True),
    "logits": ("triton", ("logp", "delta_logp"), True),
    "gemm": ("gemm", ("linear_logp", "linear_delta_logp"), False),
}


def cases(session: Session) -> list[Case]:
    """Of the request's family: the plain case of each op first; on a GPU then another stream and a CUDA graph."""
    backend, ops, training = FAMILIES[session.group]
    found = []
    for op in ops:
        for number, (name, make) in enumerate(_problems(session, op, training)):
            given = partial(_required, backend, op, session.device, make)
            found.append(Case(f"{op} {name}", partial(_compared, backend, given)))
            if number == 0 and session.on_gpu:
                found.append(Case(f"{op} on another stream", partial(_on_another_stream, backend, given)))
                found.append(Case(f"{op} as a CUDA graph", partial(_as_a_graph, backend, given)))
    return found


def _problems(session: Session, op: str, training: bool) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """By name, a case for each dtype, kind of inputs, and options; made when its turn comes."""
    draws = "sample" in op
    if op == "policy_loss":
        kinds, table = _TINY_RESPONSES if session.tiny else _RESPONSES, _POLICIES
    elif draws or "policy" in op:
        kinds, table = _TINY if session.tiny else _DRAWN if draws else _STEPS, _SAMPLERS if draws else _LINEAR_POLICIES
    else:
        kinds, table = _TINY_KINDS if session.tiny else _KINDS, {"": {}}
    for dtype in DTYPES:
        for size, kind in kinds.items():
            for name, options in table.items() if dtype in kind.dtypes else ():
                make = partial(_problem, Workload(op, Shape(size, kind.d, kind.v), kind.n, dtype), kind, options)
                yield f"{dtype} {size} {name}".strip(), partial(make, training, session.device)


def _problem(work: Workload, kind: Kind, options: Options, training: bool, device: torch.device) -> Problem:
    """With a fixed random gradient of every output that has one."""
    leaves: tuple[str, ...]
    if work.op == "policy_loss":
        inputs, leaves = _tokens(work, options, device), ("logp",)
    elif work.op == "linear_policy_loss":
        inputs, leaves = {**bench_policy.build_linear(work, device).inputs}, bench_policy.LEAVES
        inputs["mask"][-1] = False
    else:
        inputs, options = _head_inputs(work, kind, device), {**options, **_head_options(work, kind)}
        leaves = tuple(name for name, x in inputs.items() if training and x.is_floating_point())
    inputs = {name: x.detach().requires_grad_(name in leaves) for name, x in inputs.items()}
    problem = Problem(work, inputs, options, leaves)
    if not leaves:
        return problem
    generator, outputs = torch.Generator(device).manual_seed(1), named(definition(work.op, inputs, options))
    upstream = {
        name: torch.randn(x.shape, generator=generator, device=device) for name, x in outputs if x.requires_grad
    }
    return replace(problem, upstream=upstream)


def _head_options(work: Workload, kind: Kind) -> Options:
    if not kind.options:
        return {}
    base = {"base_softcap": 9.0, "base_logit_scale": 0.8} if work.pair else {}
    return {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3, **base}


def _head_inputs(work: Workload, kind: Kind, device: torch.device) -> Inputs:
    """Of one model, or of two with hidden sizes of their own; of targets some are ignored. What samples has none."""
    inputs = {**build(work, device).inputs}
    target = inputs.pop("target")
    for name in [name for name in inputs if name in ("base_hidden", "base_weight")]:
        inputs[name] = pad(inputs[name], (0, 8), value=0.1)
    if kind.options:
        inputs |= {name.replace("weight", "bias"): x[:, 0] + 0 for name, x in inputs.items() if "weight" in name}
    if "sample" in work.op:
        return inputs
    if kind.ignored:
        target[:: kind.ignored] = IGNORE_INDEX
    return inputs | {"target": target if kind.k == 1 else torch.stack([target.roll(k) for k in range(kind.k)], 1)}


def _tokens(work: Workload, options: Options, device: torch.device) -> Inputs:
    """Ratios near 1, some of them clipped; the last response has no tokens."""
    batch = bench_policy.build_batch(work.n, work.shape.v, device)
    mask = batch["mask"]
    mask[-1] = False
    inputs = {name: x.to(DTYPES[work.dtype]) if x.is_floating_point() else x for name, x in batch.items()}
    if not options.get("kl_beta"):
        del inputs["ref_logp"]
    if work.shape.name == "packed":
        inputs = {name: x[mask] if x.dim() == 2 else x for name, x in inputs.items()}
        inputs["offsets"] = pad(mask.sum(-1).cumsum(0), (1, 0))
    return inputs | ({"group": torch.arange(work.n, device=device) // 3} if options.get("reweight") == "ppl" else {})


def _required(backend: str, op: str, device: torch.device, make: Callable[[], Problem]) -> Problem:
    """The inputs, if the backend can take them."""
    reason = backends.unavailable(backend, op if "sample" in op else f"{op}_fwd", device)
    if reason is not None:
        raise NotMeasuredError(f"backend {backend}: {reason}")
    return make()


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


def _on_another_stream(backend: str, given: Callable[[], Problem]) -> Iterator[Entry]:
    """Inputs that a stream still computes are waited for on that stream."""
    ready, call = _detached(given())
    with backends.use_backend(backend):
        expected = call(ready)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            found = call({name: x.clone() for name, x in ready.items()})
        stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    yield {}


def _as_a_graph(backend: str, given: Callable[[], Problem]) -> Iterator[Entry]:
    """A replay with other inputs gives what a call gives."""
    inputs, call = _detached(given())
    with backends.use_backend(backend):
        others = {name: x.flip(0).clone() for name, x in inputs.items()}
        expected = call(others)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            call(inputs)
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(inputs)
        for name, x in inputs.items():
            x.copy_(others[name])
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    yield {}


def _detached(problem: Problem) -> tuple[Inputs, Callable[[Mapping[str, Tensor]], Inputs]]:
    """Inputs that need no gradient, and the op of such inputs."""
    function = getattr(dlogp_kernels, problem.work.op)
    inputs = {name: x.detach() for name, x in problem.inputs.items()}
    return inputs, lambda given: dict(named(function(**given, **problem.options)))


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
