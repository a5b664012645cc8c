"""Runs with several workers, processes or actors of Ray: for tests that end some of them, or the run itself."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from paths import ROOT

TWO_PROCESSES = {"devices": "cpu,cpu"}
TWO_ACTORS = {"engine": "ray", "devices": "2"}


def workers_below(process: psutil.Process) -> list[psutil.Process]:
    """Processes that compute for it, of all that it and Ray have started."""
    found = []
    for child in process.children(recursive=True):
        # Some of these come and go.
        with contextlib.suppress(psutil.Error):
            command = " ".join(child.cmdline())
            if "process_worker" in command or command.startswith("ray::Actor"):
                found.append(child)
    return found


def both_workers(process: psutil.Process) -> list[psutil.Process]:
    """Its two, of which the second may start when the first has results: an actor has its name only then."""
    end = time.monotonic() + 60
    while len(workers := workers_below(process)) < 2:
        assert time.monotonic() < end, workers
        time.sleep(0.05)
    return workers


def kill_workers_after_the_first(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    """End both workers of this process when it has called a function, what `place` has of this name, for the first
    time."""
    function, killed = getattr(place, name), []

    def watched(*arguments):
        found = function(*arguments)
        if not killed:
            workers = both_workers(psutil.Process())
            # One may not be ready yet, and have nothing to lose.
            for worker in workers:
                worker.kill()
                killed.append(worker)
            psutil.wait_procs(workers, 10)
        return found

    monkeypatch.setattr(place, name, watched)


def killed_run(program: str, arguments: Any) -> None:
    """A program that runs a job, and says "written", waits and kills itself; its two workers end, too."""
    with subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as run:  # fmt: skip
        assert run.stdout.readline() == b"written\n"
        workers = both_workers(psutil.Process(run.pid))
        run.stdin.close()
        assert run.wait(60) == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, 60)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
