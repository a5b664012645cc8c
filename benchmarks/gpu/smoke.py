"""Does every family of kernels start, and is it right? Small inputs against float64, one process a family.

Each case is one call on inputs of one kind; the plain one in bfloat16 comes first. What a launcher allocates is filled
with NaN before, so that a number that is never written is seen.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends, reference, reference_policy

from ..harness import NotMeasuredError, WrongResultError, relative_error
from ..shapes import DTYPES
from .child import Case, Entry, Session
from .draws import check_draws

Inputs = dict[str, Tensor]
IGNORE_INDEX = -100
#: Largest error of a statistic, per max(1, |value|), and relative error of a gradient. Tensor cores truncate their
#: sums, and gradients by logits are rounded to the inputs' dtype: a wrong kernel is further off.
_STATISTIC = {"bfloat16": 1e-3, "float16": 1e-3, "float32": 5e-5}
_GRADIENT = {"bfloat16": 0.02, "float16": 0.01, "float32": 1e-4}


class Kind(NamedTuple):
    """Inputs of one kind: rows, hidden size, vocabulary, candidates a row, and which options are on."""

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
#: The interpreter computes bfloat16 wrongly, and slowly.
_TINY_KINDS = {
    "aligned": Kind(24, 16, 300, dtypes=("float32", "float16")),
    "options": Kind(7, 13, 97, k=2, options=True, ignored=3, dtypes=("float32",)),
}


def linear(session: Session) -> list[Case]:
    return _statistics(session, "triton", "linear_logp")


def pair(session: Session) -> list[Case]:
    return _statistics(session, "triton", "linear_delta_logp")


def gemm(session: Session) -> list[Case]:
    return _statistics(session, "gemm", "linear_logp", "linear_delta_logp")


def backward(session: Session) -> list[Case]:
    return _statistics(session, "triton", "linear_logp", "linear_delta_logp", training=True)


def logits(session: Session) -> list[Case]:
    return _statistics(session, "triton", "logp", "delta_logp", training=True)


def _statistics(session: Session, backend: str, *ops: str, training: bool = False) -> list[Case]:
    kinds = _TINY_KINDS if session.tiny else _KINDS
    found = [
        Case(f"{op} {dtype} {name}", partial(_statistic, session, backend, op, kind, dtype, training))
        for dtype in _STATISTIC
        for name, kind in kinds.items()
        if dtype in kind.dtypes
        for op in ops
    ]
    streams: list[Case] = []
    first = next(iter(kinds.values()))
    for op in ops if not training or "logp" in ops else ():
        inputs = partial(_head_inputs, op, first, first.dtypes[0], session.device)
        streams += _on_streams(session, backend, op, f"{op}_fwd", inputs, partial(_call, op))
    return [*found[: len(ops)], *streams, *found[len(ops) :]]


def _statistic(session: Session, backend: str, op: str, kind: Kind, dtype: str, training: bool) -> Iterable[Entry]:
    _require(session, backend, f"{op}_fwd")
    inputs = _head_inputs(op, kind, dtype, session.device)
    options = _options(op, kind)
    function = getattr(dlogp_kernels, op)
    truth = getattr(reference, op)
    return [_compared(backend, function, truth, inputs, dtype, training, options)]


def _head_inputs(op: str, kind: Kind, dtype: str, device: torch.device) -> Inputs:
    """Logits of standard deviation 3, a base that is near, targets of which some are ignored."""
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


def _options(op: str, kind: Kind) -> dict[str, float]:
    if not kind.options:
        return {}
    chosen = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3}
    return chosen | ({"base_softcap": 9.0, "base_logit_scale": 0.8} if "delta" in op else {})


def _call(op: str, inputs: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    return getattr(dlogp_kernels, op)(**inputs, **options)


def _compared(
    backend: str,
    function: Callable[..., Any],
    definition: Callable[..., Any],
    inputs: Inputs,
    dtype: str,
    training: bool,
    options: dict[str, Any],
    definition_options: dict[str, Any] | None = None,
    leaves: Iterable[str] | None = None,
) -> Entry:
    """Outputs and gradients of `function` beside float64; raises WrongResultError where they are too far apart."""
    names = [name for name, x in inputs.items() if x.is_floating_point()] if leaves is None else [*leaves]
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected, truths = _outcome(
        definition, exact, names if training else [], options if definition_options is None else definition_options
    )
    with backends.use_backend(backend), _nan_in_allocations():
        found, gradients = _outcome(function, inputs, names if training else [], options)
    errors = {name: _error(found[name], truth) for name, truth in expected.items()}
    errors |= {f"d {name}": relative_error(gradients[name], truth) for name, truth in truths.items()}
    for name, error in errors.items():
        limit = _GRADIENT[dtype] if name.startswith("d ") else _STATISTIC[dtype]
        if not error <= limit:
            raise WrongResultError(f"{name} is off by {error:.2e}, expected at most {limit:.0e}; all: {_brief(errors)}")
    return {"error_of": errors, "largest": max(errors.values(), default=0.0)}


def _brief(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _outcome(
    function: Callable[..., Any], inputs: Inputs, leaves: list[str], options: dict[str, Any]
) -> tuple[Inputs, Inputs]:
    """Outputs, and gradients of a fixed random sum of those that have one, by name."""
    given = {name: x.detach().requires_grad_() if name in leaves else x for name, x in inputs.items()}
    outputs = dict(_named(function(**given, **options)))
    if not leaves:
        return {name: x.detach() for name, x in outputs.items()}, {}
    total = torch.zeros((), dtype=torch.float64, device=next(iter(outputs.values())).device)
    generator = torch.Generator().manual_seed(1)
    for x in outputs.values():
        upstream = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)
        if x.requires_grad:
            total = total + (x * upstream.to(x.dtype)).sum().double()
    gradients = torch.autograd.grad(total, [given[name] for name in leaves])
    return {name: x.detach() for name, x in outputs.items()}, dict(zip(leaves, gradients, strict=True))


def _named(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in outputs._asdict().items():
        if isinstance(value, Tensor):
            yield name, value
        else:
            yield from _named(value)


def _error(value: Tensor, truth: Tensor) -> float:
    """Largest |value − truth| / max(1, |truth|); NaN and infinities have to be where the truth has them."""
    value = value.double()
    finite = truth.isfinite()
    if value.shape != truth.shape or not torch.equal(*(x[~finite].nan_to_num(nan=0.5) for x in (value, truth))):
        return math.inf
    if not finite.any():
        return 0.0
    error = ((value - truth).abs() / truth.abs().clamp_min(1.0))[finite].max().item()
    return math.inf if math.isnan(error) else error


def _require(session: Session, backend: str, op: str) -> None:
    problem = backends.unavailable(backend, op, session.device)
    if problem is not None:
        raise NotMeasuredError(f"backend {backend}: {problem}")


@contextlib.contextmanager
def _nan_in_allocations() -> Iterator[None]:
    """Within this context what the launchers allocate is NaN, −1 in integers, before it is written."""
    owners = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))
    previous = [getattr(owner, name) for owner, name in owners]
    for (owner, name), allocate in zip(owners, previous, strict=True):
        setattr(owner, name, _filled(allocate))
    try:
        yield
    finally:
        for (owner, name), allocate in zip(owners, previous, strict=True):
            setattr(owner, name, allocate)


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def allocate_and_fill(*arguments: Any, **options: Any) -> Tensor:
        x = allocate(*arguments, **options)
        return x.detach().fill_(torch.nan if x.is_floating_point() else (-1 if x.dtype.is_signed else 1))

    return allocate_and_fill


def _on_streams(
    session: Session,
    backend: str,
    op: str,
    schema: str,
    inputs: Callable[[], Inputs],
    call: Callable[[Inputs], tuple[Tensor, ...]],
) -> list[Case]:
    """On a GPU, the op on a stream that is not the default one, and captured as a CUDA graph."""
    if not session.on_gpu:
        return []
    return [
        Case(f"{op} {name}", partial(check, session, backend, schema, inputs, call))
        for name, check in (("other stream", _other_stream), ("CUDA graph", _graph))
    ]


def _other_stream(
    session: Session,
    backend: str,
    schema: str,
    inputs: Callable[[], Inputs],
    call: Callable[[Inputs], tuple[Tensor, ...]],
) -> Iterable[Entry]:
    """Inputs that a stream still computes are waited for on that stream."""
    _require(session, backend, schema)
    with backends.use_backend(backend):
        ready = inputs()
        expected = call(ready)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = {name: x.clone() for name, x in ready.items()}
            found = call(late)
        stream.synchronize()
    _require_same(found, expected)
    return [{}]


def _graph(
    session: Session,
    backend: str,
    schema: str,
    inputs: Callable[[], Inputs],
    call: Callable[[Inputs], tuple[Tensor, ...]],
) -> Iterable[Entry]:
    """A replay with other inputs gives what a call gives."""
    _require(session, backend, schema)
    with backends.use_backend(backend):
        given = inputs()
        others = {name: x.flip(0).clone() for name, x in given.items()}
        expected = call(others)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(given)
        for name, x in given.items():
            x.copy_(others[name])
        graph.replay()
        torch.cuda.synchronize()
    _require_same(found, expected)
    return [{}]


def _require_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, value, other in zip(expected._fields, found, expected, strict=True):  # type: ignore[attr-defined]
        if not torch.equal(value.nan_to_num(nan=0.5), other.nan_to_num(nan=0.5)):
            error = (value.double() - other.double()).abs().max().item()
            raise WrongResultError(f"{name} is not that of a plain call, by {error:.2e}")


_POLICIES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "dapo, dual clip, k3": {"dual_clip": 3.0, "kl_beta": 0.3},
    "grpo, ppl": {"loss_type": "grpo", "reweight": "ppl"},
    "grpo, sequence": {"loss_type": "grpo", "importance": "sequence"},
    "cispo": {"loss_type": "cispo", "clip_high": 5.0},
    "sapo, dominate": {"loss_type": "sapo", "reweight": "dominate"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_length": 400, "reweight_sign": "negative"},
}


def policy_loss(session: Session) -> list[Case]:
    b, t = (3, 16) if session.tiny else (9, 700)
    layouts = ("padded", "packed") if not session.tiny else ("padded",)
    found = [
        Case(f"policy_loss {dtype} {layout} {name}", partial(_policy, session, b, t, dtype, layout, options))
        for dtype in ("float32", "bfloat16")[: 1 + session.on_gpu]
        for name, options in _POLICIES.items()
        for layout in layouts
    ]
    inputs = partial(_policy_inputs, b, t, "float32", session.device, {})
    return [found[0], *_on_streams(session, "triton", "policy_loss", "policy_loss_fwd", inputs, _scalars), *found[1:]]


class _Loss(NamedTuple):
    loss: Tensor
    clip_low: Tensor
    mean_ratio: Tensor


def _scalars(inputs: Mapping[str, Any]) -> _Loss:
    outcome = dlogp_kernels.policy_loss(**inputs)
    return _Loss(outcome.loss, outcome.metrics.clip_low, outcome.metrics.mean_ratio)


def _policy(session: Session, b: int, t: int, dtype: str, layout: str, options: dict[str, Any]) -> Iterable[Entry]:
    _require(session, "triton", "policy_loss_fwd")
    inputs = _policy_inputs(b, t, dtype, session.device, options)
    if layout == "packed":
        inputs = _packed(inputs)
    definition_options = {"options": reference_policy.PolicyOptions(**options)}
    return [
        _compared(
            "triton", dlogp_kernels.policy_loss, reference_policy.policy_loss, inputs, dtype, True, options,
            definition_options, leaves=("logp",),
        )
    ]  # fmt: skip


def _policy_inputs(b: int, t: int, dtype: str, device: torch.device, options: dict[str, Any]) -> Inputs:
    """Ratios near 1, some of them clipped; a response without tokens."""
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
    if options.get("reweight") == "ppl":
        inputs["group"] = torch.arange(b, device=device) // 3
    return inputs


def _packed(inputs: Inputs) -> Inputs:
    """Responses of different lengths one after another."""
    b, t = inputs["mask"].shape
    lengths = [1 + (t - 1) * (i + 1) // b for i in range(b)]
    packed = {
        name: torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)]) if x.dim() == 2 else x
        for name, x in inputs.items()
    }
    return packed | {"offsets": torch.tensor([0, *lengths], device=inputs["mask"].device).cumsum(0)}


_LINEAR_POLICIES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "entropy": {"loss_type": "grpo", "entropy_coef": 0.1},
    "sequence": {"loss_type": "grpo", "importance": "sequence"},
}


def linear_policy_loss(session: Session) -> list[Case]:
    sizes = {"aligned": (8, 80, 128, 4096), "odd D and V": (3, 31, 45, 1187), "large": (4, 300, 1024, 20_011)}
    if session.tiny:
        sizes = {"aligned": (2, 8, 16, 97)}
    return [
        Case(f"linear_policy_loss {dtype} {name} {kind}", partial(_linear_policy, session, size, dtype, options))
        for dtype in (_STATISTIC if session.on_gpu else ("float32",))
        for name, size in sizes.items()
        for kind, options in _LINEAR_POLICIES.items()
        if name != "large" or (dtype, kind) == ("bfloat16", "dapo")
    ]


def _linear_policy(session: Session, size: tuple[int, ...], dtype: str, options: dict[str, Any]) -> Iterable[Entry]:
    _require(session, "triton", "linear_policy_loss_fwd")
    b, t, d, v = size
    head = _head_inputs("linear_logp", Kind(b * t, d, v), dtype, session.device)
    exact: dict[str, Any] = {name: x.double() if x.is_floating_point() else x for name, x in head.items()}
    tokens = _policy_inputs(b, t, "float32", session.device, options)
    log_ratio = tokens["logp"] - tokens["old_logp"]
    inputs = {
        "hidden": head["hidden"].view(b, t, d),
        "weight": head["weight"],
        "target": head["target"].view(b, t),
        "old_logp": (reference.linear_logp(**exact).logp.view(b, t) - log_ratio).float(),
        "advantage": tokens["advantage"],
        "mask": tokens["mask"],
    }
    definition_options = {"options": reference_policy.PolicyOptions(**options), "heads": {}}
    return [
        _compared(
            "triton", dlogp_kernels.linear_policy_loss, reference_policy.linear_policy_loss, inputs, dtype, True,
            options, definition_options, leaves=("hidden", "weight"),
        )
    ]  # fmt: skip


_SAMPLERS: dict[str, dict[str, Any]] = {
    "no filter": {"gamma": 0.5},
    "top-p": {"top_p": 0.7},
    "top-k, min-p, by Δlog p": {"top_k": 20, "min_p": 0.02, "criterion": "delta_logp", "threshold": -0.3, "gamma": 0.3},
    "by entropy, draft of rl, T 0.7": {"criterion": "entropy", "threshold": 5.0, "draft": "rl", "temperature": 0.7},
    "greedy": {"temperature": 0.0},
}


def sampling_triton(session: Session) -> list[Case]:
    return _samplers(session, "triton", "extrapolated_sample")


def sampling_cuda(session: Session) -> list[Case]:
    return _samplers(session, "cuda", "extrapolated_sample")


def linear_sampling(session: Session) -> list[Case]:
    return _samplers(session, "triton", "linear_extrapolated_sample")


def _samplers(session: Session, backend: str, op: str) -> list[Case]:
    sizes = {"": Kind(5, 128, 4096), "odd, ": Kind(9, 45, 1187), "large, ": Kind(3, 512, 151_936)}
    if session.tiny:
        sizes = {"": Kind(3, 16, 97)}
    dtypes = [*_STATISTIC] if session.on_gpu else ["float32"]
    found = [
        Case(f"{op} {dtype} {size}{name}", partial(_sample, session, backend, op, kind, dtype, options))
        for dtype in dtypes
        for size, kind in sizes.items()
        for name, options in _SAMPLERS.items()
        if not session.tiny or name in ("no filter", "top-p")
    ]
    first = next(iter(sizes.values()))
    inputs = partial(_head_inputs, op, first, dtypes[0], session.device)
    call = partial(_call, op, seed=7, top_p=0.9, gamma=0.5)
    return [found[0], *_on_streams(session, backend, op, op, inputs, call), *found[1:]]


def _sample(
    session: Session, backend: str, op: str, kind: Kind, dtype: str, options: dict[str, Any]
) -> Iterable[Entry]:
    _require(session, backend, op)
    inputs = _head_inputs(op, kind, dtype, session.device)
    with backends.use_backend(backend), _nan_in_allocations():
        drawn = _call(op, inputs, seed=7, step=3, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    if op.startswith("linear"):
        z, base_z = (exact[f"{prefix}hidden"] @ exact[f"{prefix}weight"].t() for prefix in ("", "base_"))
    else:
        z, base_z = exact["logits"], exact["base_logits"]
    ties, error = check_draws(drawn, z, base_z, seed=7, step=3, slack=_STATISTIC[dtype], options=options)
    return [{"largest": error, "ties": ties}]
