"""One launch of some kernels under ncu: what they wait for. This module is also what ncu runs."""

import contextlib
import csv
import itertools
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from .checks import run_command

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
_KERNELS = "(_linear_logp|_linear_delta_logp|_delta_logp)_fwd_kernel|(extrapolated_sample|linear)_kernel"
_LAUNCHES = "7"


def run(seconds: float, tiny: bool, device: str) -> dict[str, Any]:
    """Every metric of each launch by name, or why there is none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"status": "skipped", "error": "ncu is not on PATH"}
    command = [ncu, "--clock-control", "none", "--target-processes", "all", "--csv", "--page", "raw"]
    command += ["-k", f"regex:{_KERNELS}", "-c", _LAUNCHES]
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
    rows = csv.DictReader(line for line in output.splitlines() if line.startswith('"'))
    for number, row in enumerate(itertools.islice(rows, 1, None), 1):
        found = re.search(r"\w*_kernel", row.get("Kernel Name") or "")
        metrics = {name: value for name, value in row.items() if value and "__" in name}
        yield f"{number} {found[0] if found else 'kernel'}", metrics


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

    from ..cases import BENCHES
    from ..shapes import Shape, Workload
    from .timing import fused

    head, dtype = (Shape("", 16, 300), "float32") if tiny else (Shape("", 4096, 151_936), "bfloat16")
    rows = {"linear_logp": 2048, "linear_delta_logp": 2048, "delta_logp": 64, "extrapolated_sample": 64}
    for op, n in rows.items():
        for variant in ("", "top-p 0.7") if "sample" in op else ("",):
            work = Workload(op, head, 24 if tiny else n, dtype, variant=variant)
            ours = BENCHES[op].candidates(BENCHES[op].build(work, torch.device(device)))[0]
            for context in (contextlib.nullcontext, fused) if "linear" in op else (contextlib.nullcontext,):
                with context():
                    ours.forward()


if __name__ == "__main__":
    _main(sys.argv[1], "--tiny" in sys.argv)
