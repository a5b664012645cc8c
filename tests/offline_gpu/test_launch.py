"""Every launcher of the Triton backends, launched by Triton itself: what arrives at the driver is what was passed.

And what was compiled for it fits the GPU and uses the instructions that it is for, as in test_compile.py.
The launchers run on small tensors of the CPU as on a Hopper; the driver is stub_libcuda/libcuda.c; nothing computes.
"""

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import linear_policy_cases
import policy_cases
import pytest
import torch
from cases import ALL_OPTIONS, call, gradients, make_inputs, options_for, upstream_of
from fake_gpu import GPUS, Launch, TensorMap, assert_fits, assert_uses, kernels, launch_code_sees, pretend
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import dlogp_kernels
import dlogp_kernels.triton
from dlogp_kernels import backends
from dlogp_kernels.ops.schemas import SCHEMAS
from dlogp_kernels.triton import _launch

GPU = GPUS["sm_90"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VOCABULARY = 50_000  # many splits to merge
#: Of "cuda" (tests/interpreter/test_hopper_launchers.py) the Triton kernels are those that "triton" launches too.
TRITON_BACKENDS = ("triton", "gemm")


class Variant(NamedTuple):
    """A call, the numbers of a first one and of others that may compile nothing new, and the launchers it reaches."""

    call: Callable[..., None]
    launchers: tuple[tuple[str, str], ...]
    first: dict[str, Any]
    others: list[dict[str, Any]]


def _statistics(
    op: str,
    n: int,
    options: dict[str, Any] | None = None,
    workspace: int = backends.DEFAULT_WORKSPACE,
    wanted: list[str] | None = None,
    **case: Any,
) -> None:
    options = options_for(op, options or {})
    inputs = make_inputs(op, n, **{"v": 1187, "d": 64, "dtype": BF16, "bias": False} | case)
    with backends.workspace_limit(workspace):
        stats = call(op, inputs, **options)
        gradients(op, inputs, upstream_of(stats), wanted=wanted, **options)


def _variants_of_statistics() -> Iterator[tuple[str, Variant]]:
    #: More than a tile of rows, which are gathered; then odd, and divisible by 16.
    many, few = ({"n": 300}, [{"n": 131}, {"n": 272}]), ({"n": 5}, [{"n": 1}, {"n": 16}, {"n": 7}])
    passes = {"n": 2000}, [{"n": 2001}, {"n": 2016}]
    every = {"k": 3, "options": ALL_OPTIONS}
    for op in ("linear_logp", "linear_delta_logp"):
        triton = (("triton", f"{op}_fwd"), ("triton", f"{op}_bwd"))
        for name, numbers, case in (
            ("aligned", many, {"v": VOCABULARY + 3, "wanted": ["hidden"]}),
            ("whole tiles, few rows", few, {"v": 2048, "d": 256}),
            ("passes", passes, {"workspace": 2**20}),
            ("float32", many, {"dtype": FP32}),
            ("float16", many, {"dtype": FP16}),
            ("mixed", many, {"dtype": {"hidden": BF16}}),
            ("unaligned, float32", many, {"d": 45, "dtype": FP32}),
            ("unaligned, every option", many, {"d": 45, "bias": True, **every}),
            ("aligned, every option", few, {"bias": True, **every}),
        ):
            yield f"{op}, {name}", Variant(partial(_statistics, op, **case), triton, *numbers)
        gemm = (("gemm", f"{op}_fwd"), ("triton", f"{op}_bwd"))
        for name, numbers, case in (
            ("", many, {"v": 9_001}),
            (", every option", few, {"d": 45, "bias": True, **every}),
        ):
            yield f"{op} by gemm{name}", Variant(partial(_statistics, op, **case), gemm, *numbers)
    for op in ("logp", "delta_logp"):
        triton = (("triton", f"{op}_fwd"), ("triton", f"{op}_bwd"))
        for name, numbers, case in (
            ("aligned", few, {"v": VOCABULARY}),
            ("passes", ({"n": 8200}, [{"n": 8201}, {"n": 8208}]), {"workspace": 2**20, "v": 128}),
            ("every option", few, {"dtype": FP32, **every}),
        ):
            yield f"{op}, {name}", Variant(partial(_statistics, op, **case), triton, *numbers)


def _one_weight(n: int) -> None:
    inputs = make_inputs("linear_delta_logp", n, v=1187, d=64, dtype=BF16, bias=False)
    inputs["base_weight"], inputs["base_hidden"] = inputs["weight"], inputs["hidden"].clone()
    call("linear_delta_logp", inputs)


def _sample(n: int, seed: Any, step: Any, v: int = VOCABULARY, dtype: torch.dtype = BF16, **options: Any) -> None:
    logits = torch.randn(n, v, dtype=dtype)
    dlogp_kernels.extrapolated_sample(logits, logits.clone(), seed=seed, step=step, **options)


def _linear_sample(
    n: int,
    seed: Any,
    step: Any,
    case: dict[str, Any],
    workspace: int = backends.DEFAULT_WORKSPACE,
    one_weight: bool = False,
    **options: Any,
) -> None:
    inputs = make_inputs("linear_delta_logp", n, **{"v": 1187, "d": 64, "dtype": BF16, "bias": False} | case)
    del inputs["target"]
    if one_weight:
        inputs["base_weight"], inputs["base_hidden"] = inputs["weight"], inputs["hidden"].clone()
    with backends.workspace_limit(workspace):
        dlogp_kernels.linear_extrapolated_sample(**inputs, seed=seed, step=step, **options)


def _variants_of_sampling() -> Iterator[tuple[str, Variant]]:
    numbers = (
        {"n": 3, "seed": 7, "step": 0},
        [
            {"n": 4, "seed": 1, "step": 1},
            {"n": 16, "seed": 16, "step": 16},
            {"n": 1, "seed": 2**40, "step": 2**31},
            {"n": 5, "seed": 2**64 - 1, "step": 2**32 - 1},
        ],
    )
    tensors = (
        {"n": 3, "seed": torch.tensor([3]), "step": torch.arange(3)},
        [{"n": 16, "seed": torch.tensor([1]), "step": torch.arange(16)}],
    )
    shared = {"n": 3, "seed": 7, "step": torch.tensor([5])}, [{"n": 5, "seed": 1, "step": torch.tensor([16])}]
    avg_kl = {"criterion": "avg_kl", "threshold": 0.3, "gamma": 0.1}
    own = (("triton", "extrapolated_sample"),)
    for name, of, options in (
        ("defaults", numbers, {}),
        ("greedy", numbers, {"temperature": 0.0, "draft": "rl", "criterion": "none", "v": 1187}),
        ("filters", numbers, {"top_k": 50, "top_p": 0.7, "min_p": 0.1, "temperature": 0.8}),
        ("divergence, tensors", tensors, {**avg_kl, "top_p": 0.7}),
        ("chance, one step", shared, {"criterion": "random", "threshold": 0.5, "dtype": FP32, "v": VOCABULARY + 3}),
    ):
        yield f"extrapolated_sample, {name}", Variant(partial(_sample, **options), own, *of)
    linear = (("triton", "linear_extrapolated_sample"),)
    in_passes = numbers[0], [*numbers[1], {"n": 1000, "seed": 1, "step": 1, "workspace": 2**20}]
    for name, of, options in (
        ("delta", in_passes, {"case": {}, "criterion": "delta_logp", "threshold": -0.3, "gamma": 0.1}),
        ("greedy", numbers, {"case": {"v": 2048}, "temperature": 0.0, "criterion": "none"}),
        ("divergence, tensors", tensors, {"case": {"dtype": FP32}, **avg_kl}),
        ("divergence", tensors, {"case": {"v": 4096, "d": 256}, "criterion": "kl", "threshold": 0.1, "gamma": 0.1}),
        ("one weight", shared, {"case": {"v": 4096}, "one_weight": True, "criterion": "all", "gamma": 0.1}),
        ("one step", shared, {"case": {}, "criterion": "random", "threshold": 0.5}),
        ("unaligned, bias", numbers, {"case": {"d": 45, "bias": True}, **avg_kl, "softcap": 5.0, "draft": "rl"}),
    ):
        yield f"linear_extrapolated_sample, {name}", Variant(partial(_linear_sample, **options), linear, *of)
    filtered = (("reference", "linear_extrapolated_sample"), *own)
    options = {"case": {}, "top_p": 0.9}
    yield "linear_extrapolated_sample, filters", Variant(partial(_linear_sample, **options), filtered, *numbers)


def _policy(b: int, t: int, packed: bool = False, dtype: torch.dtype = FP32, kl: bool = False, **options: Any) -> None:
    inputs = policy_cases.make_inputs(b, t, dtype=dtype)
    inputs = policy_cases.with_kl(inputs) if kl else inputs
    inputs = policy_cases.pack(inputs, [t - i for i in range(b)]) if packed else inputs
    policy_cases.call(inputs, **options)


def _linear_policy(b: int, t: int, case: dict[str, Any], packed: bool = False, **options: Any) -> None:
    inputs = linear_policy_cases.make_inputs(b, t, **{"v": 1187, "d": 64, "dtype": BF16} | case)
    inputs = linear_policy_cases.flat(inputs, [t - i for i in range(b)]) if packed else inputs
    linear_policy_cases.call(inputs, **options)


def _variants_of_policies() -> Iterator[tuple[str, Variant]]:
    numbers = {"b": 3, "t": 37}, [{"b": 5, "t": 41}, {"b": 1, "t": 33}, {"b": 16, "t": 63}]
    aligned = {"b": 3, "t": 48}, [{"b": 5, "t": 64}, {"b": 1, "t": 80}, {"b": 16, "t": 16}]
    one_tile = {"b": 3, "t": 37}, [{"b": 2, "t": 41}, {"b": 1, "t": 48}]
    extras = policy_cases.ALL_EXTRAS
    own = (("triton", "policy_loss_fwd"), ("triton", "policy_loss_bwd"))
    for name, of, options in (
        ("defaults", numbers, {}),
        ("aligned", aligned, extras),
        ("packed", numbers, {"packed": True, **extras}),
        ("ppl", numbers, {"reweight": "ppl", "dual_clip": 3.0, "kl": True, **extras}),
        ("ppl, packed", numbers, {"reweight": "ppl", "packed": True, "num_tokens": 9}),
        ("sequence", aligned, {"importance": "sequence", "loss_type": "grpo", "dtype": BF16, **extras}),
        ("sequence, packed", numbers, {"importance": "sequence", "packed": True, "dtype": FP16, **extras}),
        ("sapo", numbers, {"loss_type": "sapo", "reweight": "dominate", "alpha": 0.5, "dtype": BF16}),
        ("cispo", numbers, {"loss_type": "cispo", "reweight": "none", **extras}),
        ("dr_grpo", aligned, {"loss_type": "dr_grpo", "max_length": 100, **extras}),
    ):
        yield f"policy_loss, {name}", Variant(partial(_policy, **options), own, *of)
    forward = ("triton", "linear_policy_loss_fwd")
    both = (forward, ("triton", "linear_policy_loss_bwd"))
    for name, options in {
        "defaults": {"case": {"bias": False}},
        "packed, ppl": {"case": {}, "packed": True, "reweight": "ppl", **extras},
        "float16": {"case": {"dtype": FP16}, "loss_type": "cispo", "kl_beta": 0.3},
        "pair": {"case": {"base": True}, "dual_clip": 3.0, **extras},
        "weight alone": {"case": {}, "loss_type": "sapo", "wanted": ("weight",)},
    }.items():
        yield f"linear_policy_loss, {name}", Variant(partial(_linear_policy, **options), both, *numbers)
    for name, options in {
        "no gradient": {"case": {}, "wanted": ()},
        "no gradient, pair": {"case": {"base": True}, "wanted": (), "kl_beta": 0.3},
    }.items():
        yield f"linear_policy_loss, {name}", Variant(partial(_linear_policy, **options), (forward,), *one_tile)


ONE_WEIGHT = Variant(_one_weight, (("triton", "linear_delta_logp_fwd"),), {"n": 300}, [{"n": 131}])
VARIANTS = {
    **dict(_variants_of_statistics()),
    "linear_delta_logp, one weight": ONE_WEIGHT,
    **dict(_variants_of_sampling()),
    **dict(_variants_of_policies()),
}


def test_every_launcher_is_launched():
    launchers = {(backend, op) for backend in TRITON_BACKENDS for op in SCHEMAS if backends.has(backend, op)}
    covered = {launcher for variant in VARIANTS.values() for launcher in variant.launchers}
    assert launchers == {(backend, op) for backend, op in covered if backend in TRITON_BACKENDS}


@pytest.fixture
def reached(monkeypatch) -> list[tuple[str, str]]:
    """(backend, op) of each launcher that was called."""
    launchers: list[tuple[str, str]] = []
    find = backends._launcher

    def find_and_note(backend: str, op: str) -> Callable[..., Any]:
        launchers.append((backend, op))
        return find(backend, op)

    monkeypatch.setattr(backends, "_launcher", find_and_note)
    return launchers


@pytest.mark.parametrize("name", VARIANTS)
def test_what_arrives_is_what_was_passed(name, reached, record_property):
    variant = VARIANTS[name]
    backend = "gemm" if "gemm" in name else "triton"
    with pretend(GPU) as launched, launch_code_sees(GPU), backends.use_backend(backend):
        variant.call(**variant.first)
        first = len(launched)
        for numbers in [*variant.others, variant.first]:
            variant.call(**numbers)
    assert first > 0 and set(reached) == set(variant.launchers)
    for launch in launched:
        check(launch)
    for kernel in kernels(launched):
        record_property(f"{kernel.name} registers, spilled, shared memory", kernel[3:])
        assert_fits("sm_90", kernel)
        assert_uses("sm_90", kernel, "unaligned" not in name)
    known = {id(launch.compiled) for launch in launched[:first]}
    assert not [launch for launch in launched[first:] if id(launch.compiled) not in known], "another compilation"


def check(launch: Launch) -> None:
    """That the driver was told what the kernel was called with, as the machine code takes it."""
    compiled, arrived = launch.compiled, launch.arrived
    assert arrived is not None
    assert arrived.grid == (*launch.grid, 1, 1)[:3]
    assert arrived.block == (32 * compiled.metadata.num_warps, 1, 1)
    assert arrived.shared_memory == compiled.metadata.shared
    assert arrived.function == compiled.function
    *parameters, scratch, profile = arrived.parameters
    assert scratch == profile == bytes(8)
    expected = list(_passed(launch))
    assert len(parameters) == len(expected), f"{compiled.name} has other parameters than {expected}"
    for (label, value), arriving in zip(expected, parameters, strict=True):
        _check_parameter(f"{compiled.name} {label}", value, arriving)


def _passed(launch: Launch) -> Iterator[tuple[str, Any]]:
    """(name, value) of what is no constant of the compiled code, in order."""
    source = launch.compiled.src
    for i, name in enumerate(source.fn.arg_names):
        yield from _of_argument(name, launch.arguments[name], source.signature[name], source.constants, (i,))


def _of_argument(
    label: str, value: Any, signature: Any, constants: dict[tuple[int, ...], Any], path: tuple[int, ...]
) -> Iterator[tuple[str, Any]]:
    if signature == "constexpr":
        assert constants[path] == value, f"{label} was compiled as {constants[path]}"
    elif isinstance(value, tuple):
        assert len(path) == 1, f"{label}: Triton's versions do not agree on tuples within tuples"
        names = getattr(value, "_fields", range(len(value)))
        for i, (name, member, kind) in enumerate(zip(names, value, signature, strict=True)):
            assert not isinstance(member, TensorDescriptor), f"{label}.{name}: Triton can not launch it within a tuple"
            yield from _of_argument(f"{label}.{name}", member, kind, constants, (*path, i))
    else:
        yield label, value
        if isinstance(value, TensorDescriptor):
            yield from ((f"{label}.shape", size) for size in value.shape)
            yield from ((f"{label}.strides", stride) for stride in value.strides)


def _check_parameter(label: str, value: Any, arrived: bytes) -> None:
    if isinstance(value, TensorDescriptor):
        _check_tensor_map(label, value, arrived)
    elif isinstance(value, float):
        assert arrived == struct.pack({4: "<f", 8: "<d"}[len(arrived)], value), label
    else:
        number = value.data_ptr() if isinstance(value, Tensor) else value
        assert arrived == number.to_bytes(len(arrived), "little", signed=number < 0), label


#: In cuda.h.
_ELEMENT = {FP16: 6, FP32: 7, BF16: 9}
_SWIZZLE = {32: 1, 64: 2, 128: 3}


def _check_tensor_map(label: str, descriptor: TensorDescriptor, arrived: bytes) -> None:
    """A row of a box is as wide as the swizzled part of shared memory, at most 128 bytes: a tile takes several."""
    found, base = TensorMap.from_buffer_copy(arrived), descriptor.base
    rows, columns = descriptor.block_shape
    swizzled = min(128, columns * base.itemsize)
    assert found.address == base.data_ptr(), label
    assert (found.type, found.rank) == (_ELEMENT[base.dtype], 2), label
    assert list(found.dimensions[:2]) == [*reversed(descriptor.shape)] == [*reversed(base.shape)], label
    assert found.strides[0] == descriptor.strides[0] * base.itemsize == base.stride(0) * base.itemsize, label
    assert list(found.box[:2]) == [swizzled // base.itemsize, rows], label
    assert list(found.element_strides[:2]) == [1, 1], label
    assert (found.interleave, found.swizzle, found.fill) == (0, _SWIZZLE[swizzled], 0), label


def _at(offset: int) -> Tensor:
    """Logits (3, 256) so many elements behind 16 bytes."""
    return torch.randn(3 * 256 + offset, dtype=BF16)[offset:].view(3, 256)


def test_kept_kernels_are_for_addresses_as_aligned():
    target = torch.zeros(3, dtype=torch.int64)
    with pretend(GPU) as launched, launch_code_sees(GPU), backends.use_backend("triton"):
        for offset in (0, 1, 8, 3, 0):
            dlogp_kernels.logp(_at(offset), target)
    for launch in launched:
        check(launch)
    folds = [launch.compiled.hash for launch in launched if launch.compiled.name == "_logp_fwd_kernel"]
    assert folds[0] == folds[2] == folds[4] != folds[1] == folds[3]


def test_a_kernel_that_was_kept_for_other_arguments_is_noticed(monkeypatch):
    monkeypatch.setattr(_launch, "_kind_of", lambda x: x.shape if isinstance(x, Tensor) else x)
    monkeypatch.setattr(_launch, "_calls", {})
    target = torch.zeros(3, dtype=torch.int64)
    with pretend(GPU), launch_code_sees(GPU), backends.use_backend("triton"):
        dlogp_kernels.logp(_at(0), target)
        with pytest.raises(AssertionError, match="kept for other arguments"):
            dlogp_kernels.logp(_at(1), target)
