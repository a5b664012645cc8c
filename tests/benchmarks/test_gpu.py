"""`python -m benchmarks gpu` without a GPU: both visits as a whole, tiny, and what goes wrong in them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from typing import Any

import pytest
import torch
from paths import ROOT

from benchmarks.__main__ import main
from benchmarks.gpu import checks, command, processes, profile, table
from benchmarks.gpu.processes import Session, run_sessions
from benchmarks.gpu.smoke import FAMILIES
from benchmarks.peers import PEERS

pytestmark = pytest.mark.cpu_only

_FAULTS = "tests.helpers.gpu_faults"
_ARGUMENTS = ("--tiny", "--device", "cpu", "--commit", "0123abc")


@pytest.fixture(scope="module", autouse=True)
def interpreting_server():
    """The server that forks the processes of all visits here, with what visits set in their environment.

    What torch compiles is that of `python -m benchmarks shape`, too, and not compiled here.
    """
    pytest.importorskip("triton")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"):
            patch.setenv(name, "1")
        forkserver._forkserver._stop()
        yield
        forkserver._forkserver._stop()
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("number", "parts"), [(1, "machine smoke timing ncu"), (2, "machine smoke tests headline")], ids=["1", "2"]
)
def test_a_visit_of_each_kind_goes_through_all_of_it(tmp_path, monkeypatch, capsys, number, parts):
    if number == 2:  # the smoke is that of visit 1
        monkeypatch.setattr(command, "FAMILIES", ("triton logp",))
    main(["gpu", "--visit", str(number), "--out", str(tmp_path), *_ARGUMENTS])
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / f"cpu_visit{number}.json").read_text())
    assert document["stopped"] is None and [*document["parts"]] == parts.split()
    assert document["environment"]["commit"] == "0123abc"
    failed = [entry for entry in document["entries"] if entry["status"] == "failed"]
    assert not failed, failed
    assert printed == (tmp_path / f"cpu_visit{number}.txt").read_text()
    assert len(printed.splitlines()) <= table.MOST_LINES
    timed = [entry for entry in document["entries"] if "ms" in entry]
    assert {"linear_logp D 16", "policy_loss", "delta_logp"} <= {entry["case"] for entry in timed}
    jobs = {entry["job"] for entry in document["entries"]}
    assert len(list(tmp_path.iterdir())) == number + 1
    if number == 1:
        assert {*FAMILIES} <= jobs and "best, linear_delta_logp D 16: Config(" in printed
        assert document["ncu"]["status"] in ("passed", "skipped", "failed")
    else:
        assert {*PEERS} <= jobs and document["tests"]["counts"] == {"passed": 4} and document["tests"]["whole"]


def test_a_visit_that_is_ended_prints_what_it_has(tmp_path):
    arguments = [sys.executable, "-m", "benchmarks", "gpu", "--visit", "1", "--out", str(tmp_path), *_ARGUMENTS]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    path = tmp_path / "cpu_visit1.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and '"served"' in path.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "NOT WHOLE: KeyboardInterrupt" in printed and "backends: " in printed
    assert printed == (tmp_path / "cpu_visit1.txt").read_text()
    assert json.loads(path.read_text())["stopped"].startswith("KeyboardInterrupt")


def test_a_visit_ends_within_its_time(tmp_path, capsys):
    main(["gpu", "--visit", "1", "--out", str(tmp_path), "--seconds", "5", *_ARGUMENTS])
    assert json.loads((tmp_path / "cpu_visit1.json").read_text())["seconds"] <= 5
    assert "cut off: " in capsys.readouterr().out


def _entries(*cases: str, hang: float = 45.0) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    sessions = [Session(name, name, torch.device("cpu"), tiny=True, hang=hang) for name in cases]
    deadline, stop = time.monotonic() + 150, threading.Event()
    run_sessions(sessions, deadline, lambda name, entry: entries.append(entry), stop, 2)
    return entries


def test_faults_are_named_and_the_rest_goes_on():
    # Both wait for what hangs at the same time.
    entries = _entries(f"{_FAULTS}:cases", f"{_FAULTS}:candidates", hang=3.0)
    by_name = {(entry["case"], entry.get("candidate")): entry for entry in entries}
    hanging, aborted = (
        ("failed", "no progress for 3 s, its process was ended"),
        ("failed", f"its process ended with exit status {-signal.SIGABRT}"),
    )
    reasons = {
        ("raises", None): ("failed", "ValueError: the first line"),
        ("hangs", None): hanging,
        ("crashes", None): aborted,
        ("is missing", None): ("skipped", "not installed"),
        ("candidates", "nan"): ("failed", "WrongResultError: nan: logp is off by nan, expected at most 1.00e+00"),
        ("candidates", "hanging"): hanging,
        ("candidates", "crashing"): aborted,
    }
    for where, reason in reasons.items():
        assert (by_name[where]["status"], by_name[where]["error"]) == reason
    assert "ms" in by_name["candidates", "right"]
    assert [entry["status"] for entry in entries if entry["case"] == "passes"] == ["passed", "passed"]
    assert "_raises" in by_name["raises", None]["traceback"]


def test_a_process_that_does_not_start_is_named():
    entries = _entries("benchmarks.gpu.nothing:cases", f"{_FAULTS}:nothing")
    assert [entry["status"] for entry in entries] == ["failed", "failed"]
    assert any("No module named 'benchmarks.gpu.nothing'" in entry["log"] for entry in entries)


def test_a_process_that_can_not_be_ended_is_left_alone(monkeypatch):
    """As one that waits for a lost GPU: the visit does not wait for it, and nothing that it holds keeps the visit."""
    left: list[ForkServerProcess] = []
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(processes, "end_group", lambda leader: None)
    monkeypatch.setattr(ForkServerProcess, "kill", lambda process: left.append(process))
    assert [entry["status"] for entry in _entries(f"{_FAULTS}:hangs", hang=2.0)] == ["failed"]
    hanging = left[0].pid
    try:
        assert not multiprocessing.active_children()
        held = {os.readlink(f"/proc/{hanging}/fd/{fd}") for fd in os.listdir(f"/proc/{hanging}/fd")}
        kept = (forkserver._forkserver._forkserver_alive_fd, resource_tracker._resource_tracker._fd)
        assert not held & {os.readlink(f"/proc/self/fd/{fd}") for fd in kept}
    finally:
        os.kill(hanging, signal.SIGKILL)


def test_ncu_that_is_missing_fails_or_hangs(tmp_path, monkeypatch):
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "")
    assert profile.run(1.0, True, "cpu") == {"status": "skipped", "error": "ncu is not on PATH"}
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho '==ERROR== no permission'\nexit 1\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    found = profile.run(20.0, True, "cpu")
    assert (found["status"], found["error"]) == ("failed", "ncu ended with exit status 1 ==ERROR== no permission")
    ncu.write_text("#!/bin/sh\nsleep 60\n")
    found = profile.run(1.0, True, "cpu")
    assert found["error"] == "ncu was ended: out of time"


def test_metrics_of_ncu():
    output = """==PROF== Connected
"ID","Kernel Name","sm__throughput.avg.pct_of_peak_sustained_elapsed","launch__registers_per_thread",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
"","","%","register/thread","inst","inst"
"0","_linear_logp_fwd_kernel","81.5","248","1.25","2.5"
"1","_linear_delta_logp_fwd_kernel","62.0","255","3.5","0.5"
"""
    found = dict(profile.read(output))
    assert [*found] == ["1 _linear_logp_fwd_kernel", "2 _linear_delta_logp_fwd_kernel"]
    summary = profile.summary(found["1 _linear_logp_fwd_kernel"])
    assert summary == {"SM %": "81.5", "registers": "248", "stalls": "barrier 2.50, wait 1.25"}


def test_tests_that_are_cut_off_count(tmp_path, monkeypatch):
    test = tmp_path / "test_slow.py"
    test.write_text(
        "import time\ndef test_a(record_property): record_property('error', ['logp', 1e-5, 2e-5])\n"
        "def test_b(): assert 1 == 2\ndef test_c(): time.sleep(60)\n"
    )
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    monkeypatch.setattr(checks, "_TINY_FILES", (test,))
    found = checks.run("cpu", True, 5.0, tmp_path / "outcomes")
    assert found["counts"] == {"passed": 1, "failed": 1} and not found["whole"]
    assert [failure["test"].split("::")[1] for failure in found["failures"]] == ["test_b"]
    assert found["failures"][0]["message"].startswith("assert 1 == 2")
    outcomes = [json.loads(line) for line in (tmp_path / "outcomes").read_text().splitlines()]
    assert [outcome["measured"] for outcome in outcomes] == [[["logp", 1e-5, 2e-5]], []]
