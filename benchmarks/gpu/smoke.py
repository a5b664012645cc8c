"""Does every family of kernels start, and is it right? Small inputs against float64, one process a family.

Each case is one call on inputs of one kind; the plain one in bfloat16 comes first. What a launcher allocates is filled
with NaN before, so that a number that is never written is seen.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

import dlogp_kernels
from dlogp_kernels import Sample, backends
from dlogp_kernels.reference import policy as reference_policy
from dlogp_kernels.reference import statistics as reference

from .. import bench_policy
from ..bench_sampling import check_draws
from ..problem import IGNORE_INDEX, build
from ..shapes import DTYPES, Shape, Workload
from ..timing import NotMeasuredError, WrongResultError, relative_error, verify
from .child import Case, Entry, Session

Inputs = dict[str, Tensor]
Options = dict[str, Any]
#: Largest error of a statistic, per max(1, |value|), and relative error of a gradient. Tensor cores truncate their
#: sums, and gradients by logits are rounded to the inputs' dtype: a wrong kernel is further off.
_STATISTIC = {"bfloat16": 1e-3, "float16": 1e-3, "float32": 5e-5}
_GRADIENT = {"bfloat16": 0.02, "float16": 0.01, "float32": 1e-4}


class Kind(NamedTuple):
    """Rows, hidden size, vocabulary, candidates a row; whether options are on; every so many rows one is ignored."""

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


@dataclass(frozen=True)
class _Trial:
    """A call of an op by one backend; `leaves` are inputs whose gradients are compared."""

    name: str
    backend: str
    op: str
    dtype: str
    inputs: Callable[[], Inputs]
    options: Options
    leaves: tuple[str, ...] = ()

    def compared(self) -> Iterator[Entry]:
        """Raises WrongResultError where outputs or gradients are too far from float64."""
        inputs = self._required()
        if "sample" in self.op:
            with backends.use_backend(self.backend), _nan_in_allocations():
                drawn = Sample(**self._call(inputs))
            errors = check_draws(drawn, inputs, self.options, _STATISTIC[self.dtype])
        else:
            exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
            expected = _outcome(self._definition, exact, self.leaves)
            with backends.use_backend(self.backend), _nan_in_allocations():
                found = _outcome(self._call, inputs, self.leaves)
            errors = {
                name: relative_error(found[name], truth) if name.startswith("d ") else _error(found[name], truth)
                for name, truth in expected.items()
            }
            limits = {name: (_GRADIENT if name.startswith("d ") else _STATISTIC)[self.dtype] for name in errors}
            verify(", ".join(f"{name} {error:.1e}" for name, error in errors.items()), errors, limits)
        yield {"error_of": errors, "largest": max(errors.values())}

    def on_another_stream(self) -> Iterator[Entry]:
        """Inputs that a stream still computes are waited for on that stream."""
        ready = self._required()
        with backends.use_backend(self.backend):
            expected = self._call(ready)
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
                found = self._call({name: x.clone() for name, x in ready.items()})
            stream.synchronize()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        yield {}

    def as_a_graph(self) -> Iterator[Entry]:
        """A replay with other inputs gives what a call gives."""
        given = self._required()
        with backends.use_backend(self.backend):
            others = {name: x.flip(0).clone() for name, x in given.items()}
            expected = self._call(others)
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                self._call(given)
                torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = self._call(given)
            for name, x in given.items():
                x.copy_(others[name])
            graph.replay()
            torch.cuda.synchronize()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        yield {}

    def _required(self) -> Inputs:
        """The inputs, if the backend can take them."""
        inputs = self.inputs()
        schema = self.op if "sample" in self.op else f"{self.op}_fwd"
        problem = backends.unavailable(self.backend, schema, next(iter(inputs.values())).device)
        if problem is not None:
            raise NotMeasuredError(f"backend {self.backend}: {problem}")
        return inputs

    def _call(self, inputs: Mapping[str, Tensor]) -> Inputs:
        return dict(_named(getattr(dlogp_kernels, self.op)(**inputs, **self.options)))

    def _definition(self, inputs: Mapping[str, Any]) -> Inputs:
        if "policy" not in self.op:
            return dict(_named(getattr(reference, self.op)(**inputs, **self.options)))
        heads: Options = {"heads": {}} if self.op.startswith("linear") else {}
        options = reference_policy.PolicyOptions(**self.options)
        return dict(_named(getattr(reference_policy, self.op)(**inputs, **heads, options=options)))


def cases(session: Session) -> list[Case]:
    """Of the request's family: the plain case of each op first; on a GPU then another stream and a CUDA graph."""
    backend, ops, training = FAMILIES[session.group]
    found = []
    for op in ops:
        if op == "policy_loss":
            make = _policy_losses
        else:
            make = partial(_statistics, training=training) if op.endswith("logp") else _with_options
        first, *rest = make(session, backend, op)
        found.append(Case(f"{op} {first.name}", first.compared))
        if session.on_gpu:
            found.append(Case(f"{op} on another stream", first.on_another_stream))
            found.append(Case(f"{op} as a CUDA graph", first.as_a_graph))
        found += [Case(f"{op} {trial.name}", trial.compared) for trial in rest]
    return found


def _statistics(session: Session, backend: str, op: str, training: bool) -> Iterator[_Trial]:
    names = ("hidden", "weight", "bias") if op.startswith("linear") else ("logits",)
    for dtype in _STATISTIC:
        for name, kind in (_TINY_KINDS if session.tiny else _KINDS).items():
            options: Options = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3} if kind.options else {}
            if options and "delta" in op:
                options |= {"base_softcap": 9.0, "base_logit_scale": 0.8}
            leaves = [x for x in names if training and (kind.options or x != "bias")]
            leaves += [f"base_{x}" for x in leaves if "delta" in op]
            if dtype in kind.dtypes:
                inputs = partial(_head_inputs, op, kind, dtype, session.device)
                yield _Trial(f"{dtype} {name}", backend, op, dtype, inputs, options, tuple(leaves))


def _policy_losses(session: Session, backend: str, op: str) -> Iterator[_Trial]:
    b, t = (3, 16) if session.tiny else (9, 700)
    for dtype in ("float32", "bfloat16")[: 1 + session.on_gpu]:
        for name, options in _POLICIES.items():
            for layout in ("padded", "packed")[: 2 - session.tiny]:
                inputs = partial(_tokens, b, t, dtype, session.device, options, layout == "packed")
                yield _Trial(f"{dtype} {layout} {name}", backend, op, dtype, inputs, options, ("logp",))


def _with_options(session: Session, backend: str, op: str) -> Iterator[_Trial]:
    """Draws, and policy losses from hidden states."""
    draws = "sample" in op
    table, leaves = (_SAMPLERS, ()) if draws else (_LINEAR_POLICIES, bench_policy.LEAVES)
    inputs_of = partial(_head_inputs, op) if draws else _linear_tokens
    kinds = {"aligned": Kind(8, 16, 97)} if session.tiny else _DRAWN if draws else _STEPS
    for dtype in _STATISTIC if session.on_gpu else ("float32",):
        for size, kind in kinds.items():
            for name, options in table.items() if dtype in kind.dtypes else ():
                inputs = partial(inputs_of, kind, dtype, session.device)
                yield _Trial(f"{dtype} {size} {name}", backend, op, dtype, inputs, options, leaves)


def _head_inputs(op: str, kind: Kind, dtype: str, device: torch.device) -> Inputs:
    """Of one model, or of two with hidden sizes of their own; of targets some are ignored. What samples has none."""
    inputs = {**build(Workload(op, Shape("", kind.d, kind.v), kind.n, dtype), device).inputs}
    target = inputs.pop("target")
    for name in [name for name in inputs if name in ("base_hidden", "base_weight")]:
        inputs[name] = pad(inputs[name], (0, 8), value=0.1)
    if kind.options:
        inputs |= {name.replace("weight", "bias"): x[:, 0] + 0 for name, x in inputs.items() if "weight" in name}
    if "sample" in op:
        return inputs
    if kind.ignored:
        target[:: kind.ignored] = IGNORE_INDEX
    return inputs | {"target": target if kind.k == 1 else torch.stack([target.roll(k) for k in range(kind.k)], 1)}


def _tokens(b: int, t: int, dtype: str, device: torch.device, options: Options, packed: bool) -> Inputs:
    """Ratios near 1, some of them clipped; the last response has no tokens."""
    batch = bench_policy.build_batch(b, t, device)
    batch.mask[-1] = False
    inputs = {name: x.detach().to(DTYPES[dtype]) if x.is_floating_point() else x for name, x in batch._asdict().items()}
    if not options.get("kl_beta"):
        del inputs["ref_logp"]
    if packed:
        inputs = {name: x[batch.mask] if x.dim() == 2 else x for name, x in inputs.items()}
        inputs["offsets"] = pad(batch.mask.sum(-1).cumsum(0), (1, 0))
    return inputs | ({"group": torch.arange(b, device=device) // 3} if options.get("reweight") == "ppl" else {})


def _linear_tokens(kind: Kind, dtype: str, device: torch.device) -> Inputs:
    step = bench_policy.build_step(Workload("linear_policy_loss", Shape("", kind.d, kind.v), kind.n, dtype), device)
    inputs = {name: x.detach() for name, x in step.inputs.items()}
    inputs["mask"][-1] = False
    return inputs


def _outcome(function: Callable[[Inputs], Inputs], inputs: Inputs, leaves: tuple[str, ...]) -> Inputs:
    """Outputs by name, and as "d name" the gradients of a fixed random sum of those that have one."""
    given = {name: x.detach().requires_grad_() if name in leaves else x for name, x in inputs.items()}
    outputs = function(given)
    found = {name: x.detach() for name, x in outputs.items()}
    if not leaves:
        return found
    generator = torch.Generator().manual_seed(1)
    differentiable = [x for x in outputs.values() if x.requires_grad]
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, [given[name] for name in leaves], upstream)
    return found | {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _named(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in outputs._asdict().items():
        if isinstance(value, Tensor):
            yield name, value
        elif value is not None:
            yield from _named(value)


def _error(value: Tensor, truth: Tensor) -> float:
    """Largest |value − truth| / max(1, |truth|), infinite where a NaN or an infinity is not where the truth has it."""
    value, finite = value.double(), truth.isfinite()
    if value.shape != truth.shape or not torch.equal(*(x[~finite].nan_to_num(nan=0.5) for x in (value, truth))):
        return math.inf
    error = ((value - truth).abs() / truth.abs().clamp_min(1.0))[finite].nan_to_num(nan=math.inf)
    return error.max().item() if error.numel() else 0.0


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
