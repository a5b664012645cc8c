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

from .child import Case, Entry, Session
from .children import ROOT

_QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,utilization.gpu,ecc.mode.current"
)
_PACKAGES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "quack-kernels", "trl", "flashinfer-python")


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """All that can be said without touching the GPU."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "gpu": _nvidia_smi() if device != "cpu" else {},
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
    found = [Case("backends", partial(_backends, session))]
    return [*found, Case("CUDA library", _cuda_library)] if session.on_gpu else found


def _backends(session: Session) -> Iterable[Entry]:
    """Which backend serves which op here, and why not the others, each reason once."""
    import torch

    from dlogp_kernels import backends

    served: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for choice in backends.report():
        if choice.device == session.device.type:
            served.setdefault(choice.backend, []).append(choice.op)
            reasons |= {f"{name}: {reason}": "" for name, reason in choice.others.items() if "preferred" not in reason}
    properties = str(torch.cuda.get_device_properties(session.device)) if session.on_gpu else None
    return [{"served": served, "not available": [*reasons], "cuda": torch.version.cuda, "properties": properties}]


def _cuda_library() -> Iterable[Entry]:
    from dlogp_kernels import backends

    files = sorted(path.name for path in (ROOT / "dlogp_kernels").glob("_cuda*.so"))
    problem = backends.unavailable("cuda", "extrapolated_sample", "cuda")
    return [{"files": files} if problem is None else {"files": files, "status": "failed", "error": problem}]


def _nvidia_smi() -> dict[str, str]:
    line = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    return {} if line is None else dict(zip(_QUERY.split(","), (x.strip() for x in line.split(",")), strict=False))


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where it fails, hangs or is not there."""
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(finished.stdout.splitlines()), None)
