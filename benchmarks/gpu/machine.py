"""What a visit runs on: the card, versions, which backend serves what, whether the CUDA library loads."""

import datetime
import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from .child import Case, Entry, Session
from .children import ROOT

_QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,utilization.gpu,ecc.mode.current"
)
_PACKAGES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "quack-kernels", "trl", "flashinfer-python")


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """All that can be said without touching the GPU."""
    smi = None if device == "cpu" else _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "gpu": {} if smi is None else dict(zip(_QUERY.split(","), smi.split(", "), strict=False)),
        "python": platform.python_version(),
        "packages": {x.name: x.version for x in importlib.metadata.distributions() if x.name in _PACKAGES},
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "ncu": shutil.which("ncu"),
    }


def card(found: dict[str, Any]) -> str:
    """h100, for example: the part of the name that tells it from others; cpu where there is none."""
    name = found["gpu"].get("name", found["device"].split(":")[0])
    model = re.search(r"\b([A-Z]+\d+\w*)\b", name)
    return re.sub(r"[^a-z0-9]+", "-", (model.group(1) if model else name).lower())


def cases(session: Session) -> list[Case]:
    return [Case("backends", partial(_backends, session)), Case("CUDA library", partial(_cuda_library, session))]


def _backends(session: Session) -> Iterable[Entry]:
    """Which backend serves which op here, and why not the others, each reason once."""
    from dlogp_kernels import backends

    served: dict[str, list[str]] = {}
    reasons: set[str] = set()
    for choice in backends.report():
        if choice.device == session.device.type:
            served.setdefault(choice.backend, []).append(choice.op)
            reasons |= {f"{name}: {reason}" for name, reason in choice.others.items() if "preferred" not in reason}
    card = str(torch.cuda.get_device_properties(session.device)) if session.on_gpu else None
    return [{"served": served, "not available": sorted(reasons), "cuda": torch.version.cuda, "properties": card}]


def _cuda_library(session: Session) -> Iterable[Entry]:
    from dlogp_kernels import backends

    files = sorted(path.name for path in (ROOT / "dlogp_kernels").glob("_cuda*.so"))
    problem = backends.unavailable("cuda", "extrapolated_sample", session.device)
    status = "passed" if problem is None else "failed" if session.on_gpu else "skipped"
    return [{"files": files, "status": status, "error": problem}]


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where it fails, hangs or is not there."""
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(finished.stdout.splitlines()), None)
