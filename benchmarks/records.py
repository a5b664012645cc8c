"""What a run leaves: one JSON and one CSV, complete after every case, with where they came from."""

import csv
import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dlogp_kernels

from .harness import Quantiles, Timings
from .shapes import Workload

RESULTS = Path(__file__).resolve().parent / "results"
_ROOT = RESULTS.parent.parent


@dataclass(frozen=True)
class Record:
    """One candidate in one case; times in milliseconds, memory in MiB over inputs and outputs.

    `case` is "compare", "sweep", "sweep memory", "half ignored", "linearity", "memory", "long", "frequencies", "tail"
    or "workspace". `variant` names options of the op.
    `ratios` holds, for other candidates of the case, the [median, p20, p80] of this one's time over that one's within a
    round.
    `errors` are against float64: largest absolute for an output, relative norm for a gradient. `statistics` are numbers
    about what was drawn, and others that have no field. `skipped` says why there is no figure; `wrong` that it is
    because of the result.
    """

    case: str
    op: str
    shape: str
    n: int
    d: int
    v: int
    dtype: str
    training: bool
    candidate: str
    phase: str
    backend: str | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    ratios: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    peak_mib: float | None = None
    output_mib: float | None = None
    skipped: str | None = None
    wrong: bool = False
    note: str | None = None
    variant: str = ""
    tokens_per_s: float | None = None
    statistics: dict[str, float] = field(default_factory=dict)

    def ratio_to(self, other: str) -> float:
        return self.ratios[other][0]


def record(case: str, work: Workload, candidate: str, phase: str, **measured: Any) -> Record:
    shape = work.shape
    return Record(
        case=case,
        op=work.op,
        shape=shape.name,
        n=measured.pop("n", work.n),
        d=shape.d if work.linear else 0,
        v=shape.v,
        dtype=work.dtype,
        training=work.training,
        candidate=candidate,
        phase=phase,
        variant=work.variant,
        **measured,
    )


def time_fields(timings: Timings, name: str, others: Iterable[str], phase: str) -> dict[str, Any]:
    """The fields of a Record that a candidate's samples give."""
    milliseconds = Quantiles(*(1e3 * seconds for seconds in timings.quantiles(name, phase)))
    return {
        "median_ms": milliseconds.median,
        "p20_ms": milliseconds.p20,
        "p80_ms": milliseconds.p80,
        "rounds": len(timings.rounds),
        "ratios": {other: list(timings.ratio(name, other, phase)) for other in others if other != name},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_at_start": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _triton_version(),
            "cuda": torch.version.cuda,
            "dlogp_kernels": dlogp_kernels.__version__,
            "compiler": _first_line(os.environ.get("CXX", "g++"), "--version"),
        },
        "backends": {f"{choice.op} on {choice.device}": choice.backend for choice in dlogp_kernels.backends.report()},
        "commit": _first_line("git", "rev-parse", "HEAD"),
        "dirty": bool(_first_line("git", "status", "--porcelain", "--untracked-files=no")),
    }


def _cpu_model() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def _triton_version() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return None
    return triton.__version__


def _first_line(*command: str) -> str | None:
    """First line of what a command prints; None where it prints nothing, fails or is not installed."""
    try:
        output = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return output.splitlines()[0] if output else None


@dataclass
class Run:
    """Records of one run and where they came from."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    records: list[Record] = field(default_factory=list)

    @property
    def name(self) -> str:
        """<date>_<machine>_<mode>, e.g. 2026-11-23-1602_amd-epyc-2-cores_default."""
        date = datetime.datetime.fromisoformat(self.environment["date"]).strftime("%Y-%m-%d-%H%M")
        machine = "-".join(self.environment["machine"].lower().replace("/", "-").split())
        cores = f"-{self.environment['cores']}-cores" if self.environment["device"] == "cpu" else ""
        return f"{date}_{machine}{cores}_{self.settings['mode']}"

    def write(self, folder: Path) -> Path:
        """Write JSON and CSV into `folder`, each replaced as a whole; the path of the JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        _replace(path, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")
        self._write_csv(path.with_suffix(".csv"))
        return path

    def _write_csv(self, path: Path) -> None:
        rows = [_flat(entry) for entry in self.records]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        part = path.with_suffix(".part")
        with part.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(path)


def read(path: Path) -> Run:
    content = json.loads(path.read_text())
    # Older runs have fields of their own.
    known = {field.name for field in dataclasses.fields(Record)}
    records = [Record(**{name: entry[name] for name in entry.keys() & known}) for entry in content["records"]]
    return Run(content["environment"], content["settings"], records)


def _flat(entry: Record) -> dict[str, Any]:
    row = dataclasses.asdict(entry)
    ratios, errors, statistics = (row.pop(name) for name in ("ratios", "errors", "statistics"))
    return (
        row
        | {f"time_over_{other}": median for other, (median, _, _) in ratios.items()}
        | {f"error_{output}": error for output, error in errors.items()}
        | {f"statistic_{name}": value for name, value in statistics.items()}
    )


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
