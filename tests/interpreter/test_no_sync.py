"""Launch code never waits for the GPU: it reads no tensor's values. Under the interpreter, where the same code runs."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linear_policy_cases
import policy_cases
import pytest
import torch
from cases import ALL_OPTIONS, OPS, call, gradients, make_inputs, options_for, upstream_of
from torch.utils._python_dispatch import TorchDispatchMode

import dlogp_kernels.triton
from dlogp_kernels import backends, policy_checks

#: ATen ops whose result, or its shape, is known to the host only when the GPU is done.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique_dim",
    "unique_consecutive", "_unique", "_unique2", "repeat_interleave", "bincount",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
METHODS = {"item", "tolist", "cpu", "cuda", "nonzero", "synchronize", "numpy"}


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name in INDEXING and any(_is_mask(x) for x in args[1])):
            raise AssertionError(f"{func} waits for the GPU")
        device = (kwargs or {}).get("device")
        if name == "_to_copy" and device not in (None, args[0].device):
            raise AssertionError(f"{func} from {args[0].device} to {device} waits for the GPU")
        return func(*args, **(kwargs or {}))


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _watched(launcher: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with _NoWaiting():
            return launcher(*arguments)

    return run


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, str]]:
    """(backend, op) of each launcher that ran, within a mode that refuses to wait."""
    launched: list[tuple[str, str]] = []
    find = backends._launcher

    def find_and_watch(backend: str, op: str) -> Callable[..., Any]:
        launched.append((backend, op))
        return _watched(find(backend, op))

    monkeypatch.setattr(backends, "_launcher", find_and_watch)
    return launched


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1.0).index_put_((x > 0,), torch.zeros(())),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.to("meta"),
    ],
    ids=["item", "bool", "mask", "assignment to a mask", "nonzero", "equal", "unique", "other device"],
)
def test_waiting_is_noticed(wait):
    with pytest.raises(AssertionError, match="waits for the GPU"):
        _watched(wait)(torch.randn(5))


@pytest.mark.gemm_interpreted
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.bfloat16, {}), (torch.float16, ALL_OPTIONS)], ids=["defaults", "all, scaled"]
)
@pytest.mark.parametrize("op", OPS)
def test_launchers_do_not_wait(launches, backend, op, dtype, options):
    """float16 has gradients scaled by the largest upstream one, which is known to the GPU alone."""
    inputs = make_inputs(
        op, 33 if op.startswith("linear") else 5, v=61, d=8, k=2 if options else None, dtype=dtype, bias=bool(options)
    )
    inputs["target"][3] = -100
    options = options_for(op, options)
    gradients(op, inputs, upstream_of(call(op, inputs, **options)), **options)
    forward = backend if op.startswith("linear") else "triton"
    assert launches == [(forward, f"{op}_fwd")] * 2 + [("triton", f"{op}_bwd")]


@pytest.mark.parametrize("options", [{}, {"reweight": "ppl", "importance": "sequence", "num_tokens": 9}])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.served_by("triton")
def test_the_policy_loss_does_not_wait(launches, backend, packed, options):
    inputs = policy_cases.make_inputs(3, 7)
    policy_cases.call(policy_cases.pack(inputs, [7, 2, 0]) if packed else inputs, **options, **policy_cases.ALL_EXTRAS)
    assert launches == [("triton", "policy_loss_fwd"), ("triton", "policy_loss_bwd")]


@pytest.mark.served_by("triton")
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_linear_policy_loss_does_not_wait(launches, backend, packed, base, monkeypatch):
    """The whole call, not its launchers alone, as on a GPU, where the values of the inputs are not looked at."""
    monkeypatch.setattr(policy_checks, "has_values", lambda x: False)
    inputs = linear_policy_cases.make_inputs(3, 7, v=61, d=8, dtype=torch.float16, base=base)
    inputs = linear_policy_cases.flat(inputs, [7, 2, 0]) if packed else inputs
    with _NoWaiting():
        linear_policy_cases.call(inputs, reweight="ppl", **policy_cases.ALL_EXTRAS)
    assert launches == [("triton", "linear_policy_loss_fwd"), ("triton", "linear_policy_loss_bwd")]


def test_launchers_in_small_blocks_do_not_wait(launches, backend):
    inputs = make_inputs("linear_delta_logp", 40, v=150, d=1_600)
    with backends.workspace_limit(2**20):
        gradients("linear_delta_logp", inputs, upstream_of(call("linear_delta_logp", inputs)))
    assert launches[-1] == ("triton", "linear_delta_logp_bwd")


@pytest.mark.parametrize("extras", [{}, {"top_p": 0.9}], ids=str)
def test_sampling_from_hidden_states_does_not_wait(launches, extras):
    inputs = make_inputs("linear_delta_logp", 5, v=61, d=8)
    del inputs["target"]
    with backends.use_backend("triton"):
        dlogp_kernels.linear_extrapolated_sample(
            **inputs, seed=torch.tensor([1]), step=torch.arange(5), row_id=torch.arange(5), gamma=0.1, **extras
        )
    ops = ["extrapolated_sample"] if extras else []
    assert launches == [("reference" if extras else "triton", "linear_extrapolated_sample")] + [
        ("triton", op) for op in ops
    ]


@pytest.mark.parametrize("path", sorted(Path(dlogp_kernels.triton.__file__).parent.glob("*.py")), ids=lambda x: x.name)
def test_source_calls_nothing_that_waits(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in METHODS, f"{path.name}:{node.lineno} calls .{node.func.attr}()"
