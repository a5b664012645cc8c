"""`python -m benchmarks gpu`: the tests, then every case until time runs out, then a short table.

The JSON and CSV in the output folder are complete after every case.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..peers import PEERS, Peer
from ..records import RESULTS, Record, Run, environment
from . import checks, table
from .cases import REAL, TINY, Case, plan, tuning_plan
from .session import OUT_OF_TIME
from .worker import HANG_SECONDS, Worker

#: The tests' part of the time, and at most so many seconds of it.
_TESTS_SHARE, _TESTS_SECONDS = 0.35, 180.0
#: Kept for the table.
_RESERVE_SECONDS = 8.0
_QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,utilization.gpu,ecc.mode.current"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder for the results, four files")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it, the tests included (default 9)")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose description contains this, e.g. 'peers'")
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    parser.add_argument("--tune", action="store_true", help="instead time the tile configurations of the kernels")
    parser.add_argument("--commit", metavar="SHA", help="what is measured, where there is no git repository")
    # To try all of it where there is no GPU.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)


def command(options: argparse.Namespace) -> None:
    run = measure(options)
    print(table.report(run))
    if any(entry.wrong and entry.candidate.startswith("ours") for entry in run.records):
        raise SystemExit("wrong results of ours, not timed: see above")


def measure(
    options: argparse.Namespace,
    peers: Sequence[Peer] = PEERS,
    test_files: Sequence[Path] | None = None,
    hang_seconds: float = HANG_SECONDS,
) -> Run:
    start = time.monotonic()
    deadline = start + 60 * options.minutes - _RESERVE_SECONDS
    device = _device(options.device)
    run = Run(_environment(device, options.commit, peers), _settings(options))
    _write(run, options.out)
    if not options.skip_tests:
        _progress("tests")
        seconds = min(_TESTS_SECONDS, _TESTS_SHARE * 60 * options.minutes)
        log = options.out / f"{run.name}_tests.log"
        run.tests = checks.run_tests(device.type, seconds, log, test_files)
        _write(run, options.out)
        for line in checks.summary(run.tests):
            _progress(line)
    worker = Worker(device, peers, deadline, hang_seconds)
    try:
        _run_cases(run, _cases(options), worker.run, options.out, start)
    finally:
        worker.close()
    # After the load: a throttled clock would show.
    run.environment["gpu_at_end"] = _gpu_state() if device.type == "cuda" else None
    _write(run, options.out)
    return run


def _cases(options: argparse.Namespace) -> list[Case]:
    sizes = TINY if options.tiny else REAL
    cases = tuning_plan(sizes) if options.tune else plan(sizes)
    return [case for case in cases if options.only is None or options.only in case.label]


def _run_cases(
    run: Run, cases: Sequence[Case], measured: Callable[[Case], list[Record]], out: Path, start: float
) -> None:
    for number, case in enumerate(cases, 1):
        begin = time.monotonic()
        records = measured(case)
        run.records += records
        _write(run, out)
        out_of_time = all(entry.skipped == OUT_OF_TIME for entry in records)
        took = OUT_OF_TIME if out_of_time else f"took {time.monotonic() - begin:.0f} s"
        _progress(f"[{number}/{len(cases)}] {case.label}: {took}, {time.monotonic() - start:.0f} s in all")
        for line in () if out_of_time else map(_summary, records):
            _progress(f"    {line}")


def _summary(entry: Record) -> str:
    if entry.skipped is not None:
        return f"{entry.candidate}: skipped, {entry.skipped}"
    parts = [f"{entry.candidate} {entry.phase}: {entry.median_ms:.3f} ms"]
    parts += [f"{value:.0f} {unit}" for value, unit in ((entry.tflops, "TFLOP/s"), (entry.gb_per_s, "GB/s")) if value]
    parts += [f"{entry.ratio_to(other):.3f} × {other}" for other in ("matmul", "copy", "ours") if other in entry.ratios]
    if entry.host_us is not None:
        parts.append(f"host {entry.host_us:.0f} µs")
    if entry.peak_mib is not None:
        parts.append(f"{entry.peak_mib:.0f} MiB")
    parts += [f"{value:.0f} {name}" for name, value in entry.statistics.items()]
    parts += [f"{name} error {entry.errors[name]:.1e}" for name in ("logp", "entropy", "loss") if name in entry.errors]
    return ", ".join(parts)


def _write(run: Run, out: Path) -> None:
    path = run.write(out)
    path.with_suffix(".txt").write_text(table.report(run) + "\n")


def _device(name: str) -> torch.device:
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu: no CUDA device is available")
    return torch.device("cuda", torch.cuda.current_device())


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    asked = {name: getattr(options, name) for name in ("only", "minutes", "skip_tests", "tune", "tiny")}
    return {"mode": "gpu", "case": None, **asked}


def _environment(device: torch.device, commit: str | None, peers: Sequence[Peer]) -> dict[str, Any]:
    found = environment(device)
    found["commit"] = found["commit"] or commit
    found["gpu"] = _gpu_state() if device.type == "cuda" else None
    found["libraries"] = {name: _version(name) for name in sorted({peer.distribution for peer in peers})}
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_state() -> dict[str, str] | None:
    """What nvidia-smi says; it is only asked."""
    query = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names, values = _QUERY.split(","), [value.strip() for value in output.splitlines()[0].split(",")]
    return dict(zip(names, values, strict=False))


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
