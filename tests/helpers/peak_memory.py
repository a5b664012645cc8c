"""Peak memory of ops, each measured in a process of its own: for a line of JSON in, MiB as a line of JSON out.

A line in is that of `MEASURED` in test_ops_memory.py. The measure is the growth of the resident set over what there was
before the call, less the size of the results. The processes are forks of this one, which has imported torch already and
computes nothing itself.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from cases import call, floating, make_inputs

import dlogp_kernels
from dlogp_kernels import backends


def _resident_kib(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def _inputs(op: str, *size: Any, **changes: Any) -> dict[str, Any]:
    if op != "linear_extrapolated_sample":
        return make_inputs(op, *size, **changes)
    inputs = make_inputs("linear_delta_logp", *size, **changes)
    del inputs["target"]
    return inputs


def _big_inputs(case: dict) -> dict[str, torch.Tensor]:
    """Inputs of the asked size, filled in place: a temporary copy would leave free memory to hide in."""
    dtype = getattr(torch, case["dtype"])
    small = _inputs(case["op"], 2, v=8, d=case["d"], dtype=dtype, bias=case.get("bias", True))
    sizes = {2: case["n"], 8: case["v"]}
    inputs: dict[str, torch.Tensor] = {}
    for name, x in small.items():
        shape = tuple(sizes.get(size, size) for size in x.shape)
        if name == "target":
            inputs[name] = torch.randint(case["v"], shape)
        else:
            inputs[name] = torch.empty(shape, dtype=dtype).normal_(std=0.1)
    if case.get("view") == "all but the last":
        inputs["logits"] = inputs["logits"].view(8, -1, case["v"])[:, :-1]
        inputs["target"] = inputs["target"].view(8, -1)[:, 1:]
    return inputs


def measure(case: dict) -> dict[str, float]:
    wanted = case.get("wanted") or []
    warm = _inputs(case["op"], 70, v=700, d=case["d"], dtype=getattr(torch, case["dtype"]))
    for name in wanted:
        warm[name].requires_grad_()
    options = case.get("options", {})
    stats = call(case["op"], warm, **options)
    if wanted:
        sum(x.sum() for x in stats).backward()

    inputs = _big_inputs(case)
    for name in wanted:
        inputs[name] = inputs[name].detach().requires_grad_()
    results: list[torch.Tensor]
    if case["pass"] == "backward":
        stats = call(case["op"], inputs, **options)
        upstream = [torch.ones_like(x) for x in stats]
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_kib("VmRSS")
    if case["pass"] == "forward":
        results = list(call(case["op"], inputs, **options))
    else:
        results = list(torch.autograd.grad(stats, [inputs[name] for name in wanted], upstream))
    growth = (_resident_kib("VmHWM") - before) / 1024
    size = sum(x.numel() * x.element_size() for x in results) / 2**20
    assert wanted or not any(inputs[name].requires_grad for name in floating(inputs))
    return {"growth": growth, "results": size, "workspace": growth - size}


def measure_policy(case: dict) -> dict[str, float]:
    """Of forward and backward of a policy loss; what waits for backward in between counts."""
    op = getattr(dlogp_kernels, case["op"])
    differentiable = ("hidden", "weight") if case["op"] == "linear_policy_loss" else ("logp",)

    def step(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss = op(**inputs, **case.get("options", {})).loss
        return torch.autograd.grad(loss, [inputs[name] for name in differentiable])

    step(_policy_inputs(case | {"n": 64, "v": 700}))
    inputs = _policy_inputs(case)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_kib("VmRSS")
    gradients = step(inputs)
    growth = (_resident_kib("VmHWM") - before) / 1024
    size = sum(x.nbytes for x in gradients) / 2**20
    return {"growth": growth, "results": size, "workspace": growth - size}


def _policy_inputs(case: dict) -> dict[str, torch.Tensor]:
    """Eight responses."""
    shape, dtype = (8, case["n"] // 8), getattr(torch, case["dtype"])
    old_logp = torch.empty(shape).uniform_(-3, 0)
    inputs = {"old_logp": old_logp, "advantage": torch.randn(8), "mask": torch.ones(shape, dtype=torch.bool)}
    if case["op"] == "policy_loss":
        return inputs | {"logp": old_logp.clone().requires_grad_()}
    hidden = torch.empty(*shape, case["d"], dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(case["v"], case["d"], dtype=dtype).normal_(std=0.1).requires_grad_()
    return inputs | {"hidden": hidden, "weight": weight, "target": torch.randint(case["v"], shape)}


def answer(line: str) -> None:
    case = json.loads(line)
    with backends.use_backend(case["backend"]):
        measured = measure_policy(case) if "policy" in case["op"] else measure(case)
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            answer(line)
            break
        if os.waitpid(process, 0)[1] != 0:
            print("failed", flush=True)
