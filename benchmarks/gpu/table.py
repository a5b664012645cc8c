"""The table at the end of a visit, at most 60 lines: what failed first, then figures."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from . import profile

MOST_LINES = 60
#: Of a shorter call the table also says how long its kernels take, both phases together: the host may take longer.
_SHORT_MS = 2.0
_MOST_PROBLEMS = 14
_WIDTH = 500

Entry = dict[str, Any]


def lines(document: dict[str, Any]) -> list[str]:
    entries: list[Entry] = document["entries"]
    found = [*_head(document), *_at_most(_MOST_PROBLEMS, list(_problems(entries))), *_tests(document.get("tests"))]
    figures = [*_timing(entries), *_best(entries), *_ncu(document.get("ncu"))]
    return [line[:_WIDTH] for line in (*found, *_at_most(MOST_LINES - len(found), figures))]


def _at_most(number: int, found: list[str]) -> list[str]:
    more = len(found) - number + 1
    return found if more <= 1 else [*found[: number - 1], f"… and {more} more in the JSON"]


def _head(document: dict[str, Any]) -> Iterator[str]:
    env = document["environment"]
    gpu, packages = env["gpu"], env["packages"]
    card = f"{gpu.get('name', env['device'])}, driver {gpu.get('driver_version')}"
    yield f"Visit {document['visit']} on {card}, torch {packages.get('torch')}, triton {packages.get('triton')}"
    parts = _joined(document["parts"], "{} {:.0f} s")
    yield f"commit {env['commit']}{' with changes' * env['dirty']}; {parts}; in all {document['seconds']:.0f} s"
    if document["stopped"]:
        yield f"NOT WHOLE: {document['stopped']}"
    for entry in document["entries"]:
        if "served" in entry:
            served = "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in entry["served"].items())
            yield f"backends: {served}"
    smoke = [entry for entry in document["entries"] if entry["part"] == "smoke" and "prewarm" not in entry["job"]]
    for status in ("passed", "failed", "skipped", "cut off"):
        count = Counter(entry["job"] for entry in smoke if entry["status"] == status)
        if count:
            yield f"smoke, {status}: {_joined(count)}"


def _problems(entries: Iterable[Entry]) -> Iterator[str]:
    """Each reason once, with the first place and how many more there are."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        where = " ".join(filter(None, (entry["case"], entry.get("candidate"))))
        places.setdefault((entry["status"], entry["job"], str(entry.get("error"))), []).append(where)
    for wanted in ("failed", "cut off", "skipped"):
        for (status, job, error), found in places.items():
            if status == wanted:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                yield f"- {status}: {job}: {found[0]}{more}: {error}"


def _tests(tests: dict[str, Any] | None) -> Iterator[str]:
    if tests is not None:
        yield f"tests: {_joined(tests['counts'], '{1} {0}')}{'' if tests['whole'] else '; cut off'}"
        yield from (f"- {failure['test']}: {failure['message']}" for failure in tests["failures"][:10])


def _joined(found: dict[str, Any], form: str = "{} {}") -> str:
    return ", ".join(form.format(*item) for item in found.items())


def _timing(entries: Iterable[Entry]) -> Iterator[str]:
    """A line a case: its candidates, forward and backward, and the part of the reference's speed."""
    timed = [entry for entry in entries if "ms" in entry or "host_us" in entry]
    cases = dict.fromkeys(entry["case"] for entry in timed)
    for case in cases:
        of_case = [entry for entry in timed if entry["case"] == case]
        by_name = itertools.groupby(of_case, lambda entry: entry["candidate"])
        yield f"{case}: " + "; ".join(f"{name} {' '.join(map(_cell, phases))}".strip() for name, phases in by_name)


def _cell(entry: Entry) -> str:
    if "host_us" in entry:
        return f"{entry['host_us']:.0f} µs"
    ms = entry["ms"]
    time = f"{ms:.2f} ms" if ms >= 1 else f"{1e3 * ms:.0f} µs"
    part = f"{entry['tflops']:.0f} TFLOP/s" if "tflops" in entry else f"{entry.get('gb_per_s', 0.0):.0f} GB/s"
    part = f"{entry['of'][1]:.2f}×" if "of" in entry else part
    cell = f"{'= ' * (entry['phase'] == 'both')}{time} ({part})"
    if ms < _SHORT_MS and "kernels_us" in entry and entry["phase"] == "forward":
        cell += f" [GPU {sum(entry['kernels_us'].values()):.0f} µs]"
    return cell


def _best(entries: Iterable[Entry]) -> Iterator[str]:
    """The fastest configuration of each case, as configs.py takes it."""
    best: dict[tuple[str, bool], Entry] = {}
    for entry in sorted((entry for entry in entries if "config" in entry), key=lambda entry: entry["ms"]):
        best.setdefault((entry["case"], entry["config"].startswith("gemm")), entry)
    for (case, _), entry in sorted(best.items(), key=lambda item: item[0]):
        yield f"best, {case}: {entry['config']},  # {entry['ms']:.2f} ms"


def _ncu(found: dict[str, Any] | None) -> Iterator[str]:
    if found is not None and found["status"] != "passed":
        yield f"- {found['status']}: ncu: {found['error']}"
    for kernel, metrics in (found or {}).get("kernels", {}).items():
        yield f"ncu {kernel}: {_joined(profile.summary(metrics))}"
