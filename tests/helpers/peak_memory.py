"""Peak memory of ops, each measured in a process of its own: for a line of JSON in, a line with a list of MiB out.

A line in is that of `MEASURED` in test_memory.py; the meter is `peak_over`. The processes are forks of this one, which
has imported torch already and computes nothing itself.
"""

import json
import os
import sys
from typing import Any

import torch
from cases import call, floating, make_inputs

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.demo.memory import peak_over


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
            x = torch.empty(shape, dtype=dtype)
            # Random numbers for all rows of logits take longer than the op.
            inputs[name] = x.copy_(x[0].normal_(std=0.1).clone()) if "logits" in name else x.normal_(std=0.1)
    if case.get("view") == "all but the last":
        inputs["logits"] = inputs["logits"].view(8, -1, case["v"])[:, :-1]
        inputs["target"] = inputs["target"].view(8, -1)[:, 1:]
    return inputs


def measure(case: dict) -> list[float]:
    """MiB over inputs and results, of forward and, if gradients are wanted, of backward alone."""
    wanted = case.get("wanted") or []
    options = case.get("options", {})
    warm = _inputs(case["op"], 70, v=700, d=case["d"], dtype=getattr(torch, case["dtype"]))
    for name in wanted:
        warm[name].requires_grad_()
    stats = call(case["op"], warm, **options)
    if wanted:
        sum(x.sum() for x in stats).backward()

    inputs = _big_inputs(case)
    for name in wanted:
        inputs[name] = inputs[name].detach().requires_grad_()
    assert wanted or not any(inputs[name].requires_grad for name in floating(inputs))
    stats: list[torch.Tensor] = []

    def forward() -> list[torch.Tensor]:
        stats.extend(call(case["op"], inputs, **options))
        return stats

    measured = [peak_over(forward)]
    if wanted:
        upstream = [torch.ones_like(x) for x in stats]
        measured.append(peak_over(lambda: torch.autograd.grad(stats, [inputs[name] for name in wanted], upstream)))
    return [peak.extra / 2**20 for peak in measured]


def measure_policy(case: dict) -> list[float]:
    """Of forward and backward of a policy loss; what waits for backward in between counts."""
    op = getattr(dlogp_kernels, case["op"])
    differentiable = ("hidden", "weight") if case["op"] == "linear_policy_loss" else ("logp",)

    def step(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss = op(**inputs, **case.get("options", {})).loss
        return torch.autograd.grad(loss, [inputs[name] for name in differentiable])

    step(_policy_inputs(case | {"n": 64, "v": 700}))
    inputs = _policy_inputs(case)
    return [peak_over(lambda: step(inputs)).extra / 2**20]


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
    limit = backends.workspace_limit(case.get("workspace", backends.DEFAULT_WORKSPACE))
    with backends.use_backend(case["backend"]), limit:
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
