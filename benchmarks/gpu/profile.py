"""One launch of some kernels under ncu: what they wait for. This module is also what ncu runs."""

import csv
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from .processes import run_command

_SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats", "ComputeWorkloadAnalysis",
    "LaunchStats", "Occupancy",
)  # fmt: skip
#: What the table shows, by a part of the metric's name.
_KEY = {
    "SM %": r"^sm__throughput\.avg\.pct",
    "L2 %": r"^lts__throughput\.avg\.pct",
    "L1 %": r"^l1tex__throughput\.avg\.pct",
    "DRAM %": r"^(gpu__)?dram__?throughput\.\w+\.pct",
    "tensor pipe %": r"pipe_tensor\w*\.(avg|sum)\.pct",
    "registers": r"^launch__registers_per_thread$",
}
_STALL = re.compile(r"issue_stalled_(\w+)_per_issue_active\.ratio")
_LOG_CHARACTERS = 3000
_KERNELS = "(_linear_logp|_linear_delta_logp|_delta_logp)_fwd_kernel|extrapolated_sample_kernel"


def run(seconds: float, tiny: bool, device: str) -> dict[str, Any]:
    """Every metric of each launch by name, or why there is none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"status": "skipped", "error": "ncu is not on PATH"}
    command = [ncu, "--clock-control", "none", "--target-processes", "all", "--csv", "--page", "raw"]
    command += ["-k", f"regex:{_KERNELS}", "-c", "5"]
    command += [argument for section in _SECTIONS for argument in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks.gpu.profile", device, *(["--tiny"] if tiny else [])]
    code, output = run_command(command, seconds)
    kernels = dict(read(output))
    if kernels:
        return {"status": "passed", "kernels": kernels}
    reason = "was ended: out of time" if code is None else f"ended with exit status {code}"
    last = next((line for line in reversed(output.splitlines()) if "rror" in line or "ERROR" in line), "")
    return {"status": "failed", "error": f"ncu {reason} {last}".strip(), "log": output[-_LOG_CHARACTERS:]}


def read(output: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(number and kernel, its metrics) of ncu's raw page: a line of names, one of units, one a launch."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    if lines:
        names, _, *rows = csv.reader(lines)
        for number, row in enumerate(rows, 1):
            metrics = dict(zip(names, row, strict=False))
            found = re.search(r"\w*_kernel", metrics.get("Kernel Name", ""))
            name = f"{number} {found[0] if found else 'kernel'}"
            yield name, {metric: value for metric, value in metrics.items() if value and "__" in metric}


def summary(metrics: dict[str, str]) -> dict[str, str]:
    """The few that say what bounds a kernel."""
    found = {}
    for label, pattern in _KEY.items():
        values = [value for name, value in metrics.items() if re.search(pattern, name)]
        if values:
            found[label] = max(values, key=float)
    stalls = {match[1]: float(value) for name, value in metrics.items() if (match := _STALL.search(name))}
    top = sorted(stalls, key=lambda reason: -stalls[reason])[:3]
    return found | {"stalls": ", ".join(f"{reason} {stalls[reason]:.2f}" for reason in top)}


def _main(device: str, tiny: bool) -> None:
    import torch

    import dlogp_kernels

    from ..problem import build
    from ..shapes import Shape, Workload
    from . import library

    head = Shape("tiny", 16, 300) if tiny else Shape("D 4096", 4096, 151_936)
    dtype = "float32" if tiny else "bfloat16"
    works = Workload("linear_delta_logp", head, 24 if tiny else 2048, dtype), Workload("delta_logp", head, 64, dtype)
    given: list[dict[str, Any]] = [{**build(work, torch.device(device)).inputs} for work in works]
    inputs, logits = given
    with library.fused():
        dlogp_kernels.linear_logp(inputs["hidden"], inputs["weight"], inputs["target"])
        dlogp_kernels.linear_delta_logp(**inputs)
        dlogp_kernels.delta_logp(**logits)
    del logits["target"]
    for top_p in (1.0, 0.7):
        dlogp_kernels.extrapolated_sample(**logits, gamma=0.5, seed=7, top_p=top_p)


if __name__ == "__main__":
    _main(sys.argv[1], "--tiny" in sys.argv)
