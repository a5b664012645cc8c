"""Does every family of kernels start, and is it right? Small inputs against float64, one process a family.

Each case is one call on inputs of one kind; the plain one in bfloat16 comes first. What a launcher allocates is filled
with NaN before, so that a number that is never written is seen.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends, reference, reference_policy

from ..harness import NotMeasuredError, WrongResultError, relative_error
from ..shapes import DTYPES
from .child import Case, Entry, Session
from .draws import check_draws

Inputs = dict[str, Tensor]
Options = dict[str, Any]
IGNORE_INDEX = -100
#: Largest error of a statistic, per max(1, |value|), and relative error of a gradient. Tensor cores truncate their
#: sums, and gradients by logits are rounded to the inputs' dtype: a wrong kernel is further off.
_STATISTIC = {"bfloat16": 1e-3, "float16": 1e-3, "float32": 5e-5}
_GRADIENT = {"bfloat16": 0.02, "float16": 0.01, "float32": 1e-4}


class Kind(NamedTuple):
    """Inputs of one kind: rows, hidden size, vocabulary, candidates a row, and whether the options are on."""

    n: int
    d: int
    v: int
    k: int = 1
    options: bool = False
    #: Every so many rows one is ignored.
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
    "aligned": Kind(24, 16, 300, dtypes=("float32", "float16")),
    "options": Kind(7, 13, 97, k=2, options=True, ignored=3, dtypes=("float32",)),
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
    "no filter": {"gamma": 0.5},
    "top-p": {"top_p": 0.7},
    "top-k, min-p, by Δlog p": {"top_k": 20, "min_p": 0.02, "criterion": "delta_logp", "threshold": -0.3, "gamma": 0.3},
    "by entropy, draft of rl, T 0.7": {"criterion": "entropy", "threshold": 5.0, "draft": "rl", "temperature": 0.7},
    "greedy": {"temperature": 0.0},
}


#: Backend, ops, and whether gradients are compared too, of each family of statistics.
_STATISTICS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "linear": ("triton", ("linear_logp",), False),
    "pair": ("triton", ("linear_delta_logp",), False),
    "backward": ("triton", ("linear_logp", "linear_delta_logp"), True),
    "logits": ("triton", ("logp", "delta_logp"), True),
    "gemm": ("gemm", ("linear_logp", "linear_delta_logp"), False),
}
_SAMPLING = {
    "sampling triton": ("triton", "extrapolated_sample"),
    "sampling cuda": ("cuda", "extrapolated_sample"),
    "linear sampling": ("triton", "linear_extrapolated_sample"),
}


@dataclass(frozen=True)
class _Subject:
    """An op, served by one backend."""

    session: Session
    backend: str
    op: str

    def require(self) -> None:
        schema = self.op if "sample" in self.op else f"{self.op}_fwd"
        problem = backends.unavailable(self.backend, schema, self.session.device)
        if problem is not None:
            raise NotMeasuredError(f"backend {self.backend}: {problem}")

    def call(self, inputs: Mapping[str, Tensor], options: Options) -> Inputs:
        """Its outputs by name."""
        return dict(_named(getattr(dlogp_kernels, self.op)(**inputs, **options)))


def cases(session: Session) -> list[Case]:
    """Of the request's family: the plain case first, then streams and graphs, then the others."""
    if session.group in _STATISTICS:
        backend, ops, training = _STATISTICS[session.group]
        return [case for op in ops for case in _statistics(_Subject(session, backend, op), training)]
    if session.group in _SAMPLING:
        return _samplers(_Subject(session, *_SAMPLING[session.group]))
    subject = _Subject(session, "triton", session.group)
    return _policy_losses(subject) if session.group == "policy_loss" else _linear_policy_losses(subject)


def _statistics(subject: _Subject, training: bool) -> list[Case]:
    kinds, op = _TINY_KINDS if subject.session.tiny else _KINDS, subject.op
    found = [
        Case(f"{op} {dtype} {name}", partial(_statistic, subject, kind, dtype, training))
        for dtype in _STATISTIC
        for name, kind in kinds.items()
        if dtype in kind.dtypes
    ]
    first = kinds["aligned"]
    inputs = partial(_head_inputs, op, first, first.dtypes[0], subject.session.device)
    return [found[0], *_elsewhere(subject, inputs, {}), *found[1:]]


def _statistic(subject: _Subject, kind: Kind, dtype: str, training: bool) -> Iterator[Entry]:
    subject.require()
    inputs = _head_inputs(subject.op, kind, dtype, subject.session.device)
    options = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3} if kind.options else {}
    if kind.options and "delta" in subject.op:
        options |= {"base_softcap": 9.0, "base_logit_scale": 0.8}
    leaves = [name for name, x in inputs.items() if x.is_floating_point()] if training else []
    yield _compared(subject, getattr(reference, subject.op), inputs, dtype, leaves, options, options)


def _head_inputs(op: str, kind: Kind, dtype: str, device: torch.device) -> Inputs:
    """Logits of standard deviation 3 of one model or two; targets, of which some are ignored, unless it samples."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * std).to(DTYPES[dtype])

    inputs: Inputs = {}
    for prefix, d in (("", kind.d), ("base_", kind.d + 8))[: 1 + ("delta" in op or "sample" in op)]:
        if op.startswith("linear"):
            inputs |= {f"{prefix}hidden": normal(kind.n, d), f"{prefix}weight": normal(kind.v, d, std=3 / d**0.5)}
            if kind.options:
                inputs[f"{prefix}bias"] = normal(kind.v)
        else:
            inputs[f"{prefix}logits"] = normal(kind.n, kind.v, std=3.0)
    if "sample" in op:
        return inputs
    shape = (kind.n, kind.k)[: 1 + (kind.k > 1)]
    target = torch.randint(kind.v, shape, generator=generator, device=device)
    if kind.ignored:
        target[:: kind.ignored] = IGNORE_INDEX
    return inputs | {"target": target}


def _compared(
    subject: _Subject, definition: Callable[..., Any], inputs: Inputs, dtype: str, leaves: list[str],
    options: Options, definition_options: Options,
) -> Entry:  # fmt: skip
    """Outputs and gradients beside float64; raises WrongResultError where they are too far apart."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = _outcome(lambda given: dict(_named(definition(**given, **definition_options))), exact, leaves)
    with backends.use_backend(subject.backend), _nan_in_allocations():
        found = _outcome(lambda given: subject.call(given, options), inputs, leaves)
    errors = {
        name: relative_error(found[name], truth) if name.startswith("d ") else _error(found[name], truth)
        for name, truth in expected.items()
    }
    for name, error in errors.items():
        limit = _GRADIENT[dtype] if name.startswith("d ") else _STATISTIC[dtype]
        if not error <= limit:
            every = ", ".join(f"{other} {value:.1e}" for other, value in errors.items())
            raise WrongResultError(f"{name} is off by {error:.2e}, expected at most {limit:.0e}; all: {every}")
    return {"error_of": errors, "largest": max(errors.values())}


def _outcome(function: Callable[[Inputs], Inputs], inputs: Inputs, leaves: list[str]) -> Inputs:
    """Outputs by name, and as "d name" the gradients of a fixed random sum of those that have one."""
    given = {name: x.detach().requires_grad_() if name in leaves else x for name, x in inputs.items()}
    outputs = function(given)
    found = {name: x.detach() for name, x in outputs.items()}
    if not leaves:
        return found
    generator = torch.Generator().manual_seed(1)
    upstream = {name: torch.randn(x.shape, generator=generator).to(x) for name, x in outputs.items()}
    total = torch.stack([(x * upstream[name]).sum() for name, x in outputs.items() if x.requires_grad]).sum()
    gradients = torch.autograd.grad(total, [given[name] for name in leaves])
    return found | {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _named(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in outputs._asdict().items():
        if isinstance(value, Tensor):
            yield name, value
        else:
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
        @functools.wraps(allocate)
        def allocate_and_fill(*arguments: Any, **options: Any) -> Tensor:
            x = allocate(*arguments, **options)
            return x.detach().fill_(torch.nan if x.is_floating_point() else (-1 if x.dtype.is_signed else 1))

        return allocate_and_fill

    owners = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))
    with contextlib.ExitStack() as stack:
        for owner, name in owners:
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


def _elsewhere(subject: _Subject, inputs: Callable[[], Inputs], options: Options) -> list[Case]:
    """On a GPU: the op on a stream that is not the default one, and captured as a CUDA graph."""
    if not subject.session.on_gpu:
        return []
    names = {"other stream": _other_stream, "CUDA graph": _graph}
    return [Case(f"{subject.op} {name}", partial(run, subject, inputs, options)) for name, run in names.items()]


def _other_stream(subject: _Subject, inputs: Callable[[], Inputs], options: Options) -> Iterator[Entry]:
    """Inputs that a stream still computes are waited for on that stream."""
    subject.require()
    with backends.use_backend(subject.backend):
        ready = inputs()
        expected = subject.call(ready, options)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            found = subject.call({name: x.clone() for name, x in ready.items()}, options)
        stream.synchronize()
    yield _same(found, expected)


def _graph(subject: _Subject, inputs: Callable[[], Inputs], options: Options) -> Iterator[Entry]:
    """A replay with other inputs gives what a call gives."""
    subject.require()
    with backends.use_backend(subject.backend):
        given = inputs()
        others = {name: x.flip(0).clone() for name, x in given.items()}
        expected = subject.call(others, options)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            subject.call(given, options)
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = subject.call(given, options)
        for name, x in given.items():
            x.copy_(others[name])
        graph.replay()
        torch.cuda.synchronize()
    yield _same(found, expected)


def _same(found: Inputs, expected: Inputs) -> Entry:
    for name, other in expected.items():
        if not torch.equal(found[name].nan_to_num(nan=0.5), other.nan_to_num(nan=0.5)):
            error = (found[name].double() - other.double()).abs().max().item()
            raise WrongResultError(f"{name} is not that of a plain call, by {error:.2e}")
    return {}


def _policy_losses(subject: _Subject) -> list[Case]:
    session = subject.session
    b, t = (3, 16) if session.tiny else (9, 700)
    found = [
        Case(f"policy_loss {dtype} {layout} {name}", partial(_policy, subject, b, t, dtype, layout, options))
        for dtype in ("float32", "bfloat16")[: 1 + session.on_gpu]
        for name, options in _POLICIES.items()
        for layout in ("padded", "packed")[: 2 - session.tiny]
    ]
    return [found[0], *_elsewhere(subject, partial(_tokens, b, t, "float32", session.device, {}), {}), *found[1:]]


def _policy(subject: _Subject, b: int, t: int, dtype: str, layout: str, options: Options) -> Iterator[Entry]:
    subject.require()
    inputs = _tokens(b, t, dtype, subject.session.device, options)
    if layout == "packed":
        inputs = _packed(inputs)
    definition_options = {"options": reference_policy.PolicyOptions(**options)}
    definition = reference_policy.policy_loss
    yield _compared(subject, definition, inputs, dtype, ["logp"], options, definition_options)


def _tokens(b: int, t: int, dtype: str, device: torch.device, options: Options) -> Inputs:
    """Ratios near 1, some of them clipped; the last response has no tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    old_logp = -normal(b, t).abs() * 2.0
    logp = old_logp + 0.3 * normal(b, t)
    mask = torch.rand(b, t, generator=generator, device=device) < 0.7
    mask[-1] = False
    inputs = {"logp": logp, "old_logp": old_logp, "advantage": normal(b)}
    if options.get("kl_beta"):
        inputs["ref_logp"] = logp + 0.2 * normal(b, t)
    inputs = {name: x.to(DTYPES[dtype]) for name, x in inputs.items()} | {"mask": mask}
    return inputs | ({"group": torch.arange(b, device=device) // 3} if options.get("reweight") == "ppl" else {})


def _packed(inputs: Inputs) -> Inputs:
    """Responses of different lengths one after another."""
    b, t = inputs["mask"].shape
    lengths = [1 + (t - 1) * (i + 1) // b for i in range(b)]
    packed = {
        name: torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)]) if x.dim() == 2 else x
        for name, x in inputs.items()
    }
    return packed | {"offsets": torch.tensor([0, *lengths], device=inputs["mask"].device).cumsum(0)}


def _linear_policy_losses(subject: _Subject) -> list[Case]:
    sizes = {"aligned": (8, 80, 128, 4096), "odd D and V": (3, 31, 45, 1187), "large": (4, 300, 1024, 20_011)}
    if subject.session.tiny:
        sizes = {"aligned": (2, 8, 16, 97)}
    return [
        Case(f"linear_policy_loss {dtype} {name} {kind}", partial(_linear_policy, subject, size, dtype, options))
        for dtype in (_STATISTIC if subject.session.on_gpu else ("float32",))
        for name, size in sizes.items()
        for kind, options in _LINEAR_POLICIES.items()
        if name != "large" or (dtype, kind) == ("bfloat16", "dapo")
    ]


def _linear_policy(subject: _Subject, size: tuple[int, ...], dtype: str, options: Options) -> Iterator[Entry]:
    subject.require()
    b, t, d, v = size
    head = _head_inputs("linear_logp", Kind(b * t, d, v), dtype, subject.session.device)
    exact: Options = {name: x.double() if x.is_floating_point() else x for name, x in head.items()}
    tokens = _tokens(b, t, "float32", subject.session.device, options)
    old_logp = reference.linear_logp(**exact).logp.view(b, t) - (tokens["logp"] - tokens["old_logp"])
    inputs = {
        "hidden": head["hidden"].view(b, t, d),
        "weight": head["weight"],
        "target": head["target"].view(b, t),
        "old_logp": old_logp.float(),
        "advantage": tokens["advantage"],
        "mask": tokens["mask"],
    }
    definition = reference_policy.linear_policy_loss
    definition_options = {"options": reference_policy.PolicyOptions(**options), "heads": {}}
    yield _compared(subject, definition, inputs, dtype, ["hidden", "weight"], options, definition_options)


def _samplers(subject: _Subject) -> list[Case]:
    session = subject.session
    sizes = {"aligned": Kind(5, 128, 4096), "odd": Kind(9, 45, 1187), "large": Kind(3, 512, 151_936)}
    if session.tiny:
        sizes = {"aligned": Kind(3, 16, 97)}
    dtypes = [*_STATISTIC] if session.on_gpu else ["float32"]
    found = [
        Case(f"{subject.op} {dtype} {size} {name}", partial(_sample, subject, kind, dtype, options))
        for dtype in dtypes
        for size, kind in sizes.items()
        for name, options in _SAMPLERS.items()
        if not session.tiny or name in ("no filter", "top-p")
    ]
    inputs = partial(_head_inputs, subject.op, sizes["aligned"], dtypes[0], session.device)
    return [found[0], *_elsewhere(subject, inputs, {"seed": 7, "top_p": 0.9, "gamma": 0.5}), *found[1:]]


def _sample(subject: _Subject, kind: Kind, dtype: str, options: Options) -> Iterator[Entry]:
    subject.require()
    inputs = _head_inputs(subject.op, kind, dtype, subject.session.device)
    with backends.use_backend(subject.backend), _nan_in_allocations():
        drawn = getattr(dlogp_kernels, subject.op)(**inputs, seed=7, **options)
    errors = check_draws(drawn, inputs, 7, options, _STATISTIC[dtype])
    yield {"error_of": errors, "largest": max(errors.values())}
