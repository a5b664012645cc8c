"""All that `python -m benchmarks` measures, a plan by name.

An op whose candidates return statistics of rows has a `Bench`, and its cases come from `Planner`. Anything else brings
a `plan(device, mode)` of its own, made of `case.case_of` and `case.timed`, and a line here.
"""

from collections.abc import Iterator

import torch

from . import bench_extrapolated_sample, bench_generate, bench_linear_policy_loss, bench_policy_loss
from .bench import Bench
from .case import Case, Plan
from .cases import Planner
from .registry import BENCHES


def _of_bench(bench: Bench) -> Plan:
    def plan(device: torch.device, mode: str) -> Iterator[Case]:
        return Planner(bench, device, mode).cases()

    return plan


PLANS: dict[str, Plan] = {
    **{op: _of_bench(bench) for op, bench in BENCHES.items()},
    bench_extrapolated_sample.OP: bench_extrapolated_sample.plan,
    bench_generate.OP: bench_generate.plan,
    bench_policy_loss.OP: bench_policy_loss.plan,
    bench_linear_policy_loss.OP: bench_linear_policy_loss.plan,
}
