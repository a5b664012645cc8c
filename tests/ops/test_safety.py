"""Inputs that must not end the process: storages that are too small, odd addresses, other numbers of threads."""

import subprocess
import sys
from typing import Any

import cases
import linear_policy_cases
import policy_cases
import pytest
import torch
from cases import OPS
from paths import HELPERS
from same_bits import assert_same_gradients, assert_same_statistics
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import backends

EVERY_OP = (*OPS, "extrapolated_sample", "linear_extrapolated_sample", "policy_loss", "linear_policy_loss")


def _arguments(op: str) -> dict[str, Any]:
    """Every tensor argument of a public function, on the device under test, and the options that make each count."""
    if op in OPS:
        return cases.make_inputs(op, (2, 3), v=40, d=16)
    if op == "policy_loss":
        inputs = policy_cases.make_inputs(3, 5)
        return inputs | policy_cases.ALL_EXTRAS | {"reweight": "ppl", "num_tokens": torch.tensor(7.0)}
    if op == "linear_policy_loss":
        return linear_policy_cases.make_inputs(3, 5, v=40, d=16) | policy_cases.ALL_EXTRAS | {"reweight": "ppl"}
    pair = cases.make_inputs("linear_delta_logp" if op.startswith("linear") else "delta_logp", (2, 3), v=40, d=16)
    del pair["target"]
    return pair | {"seed": torch.tensor([5]), "row_id": torch.arange(6).view(2, 3), "step": torch.arange(6).view(2, 3)}


def _on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(cases.DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}


_EVERY_TENSOR = [(op, name) for op in EVERY_OP for name, x in _arguments(op).items() if isinstance(x, Tensor)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("op", "name"), _EVERY_TENSOR)
def test_a_storage_that_was_taken_away_is_refused_by_name(op, name):
    arguments = _on_device(_arguments(op))
    held = torch.cat([arguments[name].flatten()] * 2)
    arguments[name] = held[1 : 1 + arguments[name].numel()].view(arguments[name].shape)
    for size in (0, arguments[name].nbytes):  # of which the view begins one element further on
        held.untyped_storage().resize_(size)
        with pytest.raises(ValueError, match=rf"^{name} has a storage of {size} bytes, expected the \d+ of its shape"):
            getattr(dlogp_kernels, op)(**arguments)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("linear_logp", "weight"),
        ("linear_delta_logp", "base_weight"),
        ("logp", "logits"),
        ("delta_logp", "base_logits"),
        ("policy_loss", "mask"),
    ],
)
def test_a_storage_that_was_taken_away_before_backward_is_refused_by_name(op, name):
    """As FSDP does where it shards weights again after forward."""
    arguments = _on_device(_arguments(op))
    leaf = arguments[{"policy_loss": "logp"}.get(op, cases.op_rows(op))].requires_grad_()
    if op == "policy_loss":
        arguments["entropy"].requires_grad_()
        loss = dlogp_kernels.policy_loss(**arguments).loss
    else:
        loss = sum(x.sum() for x in cases.asked_for(getattr(dlogp_kernels, op)(**arguments)))
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{name} has a storage of 0 bytes"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.usefixtures("backend")
def test_views_that_share_a_storage_or_repeat_it_are_whole(accuracy):
    whole = torch.randn(40 + 40 * 16, device=cases.DEVICE)
    weight, bias, hidden = whole[40:].view(40, 16), whole[:40], torch.randn(1, 16, device=cases.DEVICE).expand(6, 16)
    target = torch.arange(6, device=cases.DEVICE)
    stats = cases.asked_for(dlogp_kernels.linear_logp(hidden, weight, target, bias=bias))
    alone = cases.asked_for(dlogp_kernels.linear_logp(hidden.clone(), weight.clone(), target, bias=bias.clone()))
    inputs = {"hidden": hidden, "weight": weight, "bias": bias, "target": target}
    given = {name: x.cpu() for name, x in inputs.items()}
    on_cpu = (type(x)(*(value.cpu() for value in x)) for x in (stats, alone))
    assert_same_statistics(accuracy, "linear_logp", given, *on_cpu)
    empty = whole[:0].view(0, 16)
    assert dlogp_kernels.linear_logp(empty, weight, target[:0]).logp.shape == (0,)


@pytest.mark.cpu_only
@pytest.mark.not_interpreted("the same without it")
def test_tensors_without_memory_are_not_asked_for_it():
    meta = dlogp_kernels.linear_logp(*(x.to("meta") for x in cases.make_inputs("linear_logp", 6, bias=False).values()))
    assert meta.logp.shape == (6,)
    with torch._subclasses.FakeTensorMode() as mode:
        inputs = {name: mode.from_tensor(x) for name, x in cases.make_inputs("linear_logp", 6).items()}
        assert dlogp_kernels.linear_logp(**inputs).logp.shape == (6,)


@pytest.mark.cpu_only
@pytest.mark.not_interpreted("the same without it")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_an_address_within_an_element_is_refused_by_name(dtype):
    if backends.unavailable("cpu", "linear_logp_fwd", "cpu"):
        pytest.skip("plain PyTorch reads it")
    inputs = cases.make_inputs("linear_logp", 4, v=40, d=16, dtype=dtype)
    data = bytearray(inputs["weight"].nbytes + 1)
    odd = torch.frombuffer(data, dtype=dtype, offset=1).view(40, 16)
    with pytest.raises(ValueError, match=r"^weight begins at an address that is no multiple of its elements' \d bytes"):
        dlogp_kernels.linear_logp(**(inputs | {"weight": odd}))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op", ["linear_logp", "linear_delta_logp"])
def test_bfloat16_views_that_begin_at_an_odd_element(accuracy, op):
    """Pairs of them are read together, at addresses that must be multiples of four bytes (UBSan)."""
    inputs = cases.make_inputs(op, 9, v=96, d=40, dtype=torch.bfloat16)
    shifted = {}
    for name, x in inputs.items():
        held = torch.empty(x.numel() + 1, dtype=x.dtype)
        shifted[name] = held[1:].view(x.shape).copy_(x)
    stats = cases.call(op, inputs)
    assert_same_statistics(accuracy, op, inputs, cases.call(op, shifted), stats)
    upstream = cases.upstream_of(stats)
    expected, found = (cases.gradients(op, given, upstream) for given in (inputs, shifted))
    assert_same_gradients(accuracy, op, inputs, upstream, found, expected)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("backend")
def test_a_mask_of_other_bytes_than_0_and_1():
    inputs = policy_cases.make_inputs(3, 7)
    padded = torch.zeros(3, 14, dtype=torch.uint8)
    padded[:, ::2] = inputs["mask"].to(torch.uint8) * 2
    mask = padded.view(torch.bool)[:, ::2]
    assert torch.equal(policy_cases.call(inputs | {"mask": mask}).loss, policy_cases.call(inputs).loss)


_THREADS = """
import threading, torch, dlogp_kernels
from cases import make_inputs, gradients, upstream_of, call
torch.set_num_threads(1)
ready, raised = threading.Barrier(3), threading.Event()

def work(op):
    torch.ones(100_000).sum()  # now this thread has a number of threads
    ready.wait()
    raised.wait()
    inputs = make_inputs(op, 3, v=5000, d=8)
    gradients(op, inputs, upstream_of(call(op, inputs)))
    if op == "linear_delta_logp":
        pair = {name: x for name, x in inputs.items() if name != "target"}
        dlogp_kernels.linear_extrapolated_sample(**pair, seed=1)
    else:
        one, mask = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
        inputs["hidden"], inputs["target"] = inputs["hidden"][None], inputs["target"][None]
        inputs["hidden"].requires_grad_()
        dlogp_kernels.linear_policy_loss(**inputs, old_logp=-one, advantage=one, mask=mask).loss.backward()

threads = [threading.Thread(target=work, args=(op,)) for op in ("linear_logp", "linear_delta_logp")]
for thread in threads:
    thread.start()
ready.wait()
torch.set_num_threads(64)
raised.set()
for thread in threads:
    thread.join()
"""


@pytest.mark.cpu_only
@pytest.mark.not_interpreted("the same without it")
def test_a_number_of_threads_that_another_thread_raised():
    """In a process of its own, which a write beyond the threads' scratch ends."""
    found = subprocess.run([sys.executable, "-c", _THREADS], cwd=HELPERS, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
