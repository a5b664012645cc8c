"""Runs that are killed, run out of disk or are interrupted by errors, and then go on."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")

import pyarrow.parquet as pq
from hf_models import one_thread  # noqa: F401
from pair_files import Pair, contents

from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.metrics import run_metrics
from dlogp_kernels.report import files

SETTINGS = {"dtype": "fp32", "batch_tokens": 8, "device": "cpu", "progress": False}

# One interpreter for all the attempts of all runs: importing the libraries takes longer than a run. It has one thread,
# so that its copies may go on after fork, and tqdm's lock is one of a process: its own is shared by the copies, and one
# that is killed while it holds the lock would stop all after it. Prints how each attempt ended: −9 killed, 0 finished.
ATTEMPTS = """
import json, os, random, signal, sys, threading, time
import torch
from tqdm.std import tqdm
torch.set_num_threads(1)
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())
from dlogp_kernels.hf.tiny import load_local
from dlogp_kernels.jobs.metrics import run_metrics

runs = json.loads(sys.argv[1])
load_local(runs[0][0][0])  # what is imported here need not be imported in each attempt
rng = random.Random(7)


def kill_at_moment(moment):
    # Moments 0, 2, 4, …: just before a file gets its name; 1, 3, 5, …: just after.
    replace, passed = os.replace, []
    def pass_moment():
        if len(passed) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        passed.append(None)
    def watched(source, target):
        pass_moment()
        replace(source, target)
        pass_moment()
    os.replace = watched


def attempt(arguments, settings, kind, value):
    child = os.fork()
    if child == 0:
        if kind == "moment":
            kill_at_moment(value)
        run_metrics(*arguments, **settings)
        os._exit(0)
    if kind == "seconds":
        time.sleep(rng.uniform(0, value))
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


for arguments, settings, plan in runs:
    ends = []
    for step in plan:
        code = attempt(arguments, settings, *step)
        parts = sorted(os.listdir(arguments[3] + "/tokens")) if os.path.isdir(arguments[3] + "/tokens") else []
        ends.append([code, len([name for name in parts if not name.startswith(".")])])
    print(json.dumps(ends), flush=True)
"""


@pytest.fixture(scope="module")
def uninterrupted(pair, tmp_path_factory) -> dict[bool, Path]:
    directories = {}
    for sequential in (False, True):
        out = tmp_path_factory.mktemp("whole") / "out"
        run_metrics(*pair, out, sequential=sequential, **SETTINGS)
        directories[sequential] = out
    return directories


def attempts(pair: Pair, plans: dict[Path, tuple[bool, list]]) -> list[list[list[int]]]:
    """How the attempts ended in each directory, and how many parts there were then; a plan is sequential or not."""
    runs = [
        [list(map(str, (*pair, out))), SETTINGS | {"sequential": sequential}, plan]
        for out, (sequential, plan) in plans.items()
    ]
    result = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "damaged" not in result.stderr, "what was not finished is taken for damaged"
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_same_result(out: Path, whole: Path) -> None:
    for name in ("tokens", "responses"):
        assert contents(out / name) == contents(whole / name)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "responses", "summary.json", "tokens"]
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (out, whole)]
    for summary in summaries:
        assert summary.pop("seconds") > 0
        del summary["tokens_per_second"], summary["response_tokens_per_second"]
    assert summaries[0] == summaries[1]


PREPARATION, BASE, PARTS_OF_RL = [0, 1, 2, 3, 4, 5], [0, 1, 20, 21, 16, 17], [*range(8), 5, 7]
MOMENTS = {False: PREPARATION + PARTS_OF_RL, True: PREPARATION + BASE + PARTS_OF_RL}
#: Sequential or not, and how each attempt is to end, of each run.
PLANS = {
    "joint": (False, [*(["moment", moment] for moment in MOMENTS[False]), ["run", 0]]),
    "sequential": (True, [*(["moment", moment] for moment in MOMENTS[True]), ["run", 0]]),
    # The first is over before any run is.
    "random": (False, [*(["seconds", longest] for longest in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)), ["run", 0]]),
    # Two files of the preparation, the manifest, two of a part, and one of the next.
    "left": (False, [["moment", 11]]),
}


@pytest.fixture(scope="module")
def killed(pair, tmp_path_factory) -> dict[str, tuple[Path, list[list[int]]]]:
    """Of each of PLANS the directory, and how its attempts ended."""
    directories = {name: tmp_path_factory.mktemp("killed") / name for name in PLANS}
    ends = attempts(pair, {directories[name]: plan for name, plan in PLANS.items()})
    return dict(zip(PLANS, zip(directories.values(), ends, strict=True), strict=True))


def test_killed_again_and_again_and_resumed(killed, uninterrupted):
    """Just before or just after a file appears, a little further on in each attempt; and at random moments."""
    for name in ("joint", "sequential"):
        sequential, ends = PLANS[name][0], killed[name][1]
        assert [code for code, _ in ends] == [-9] * len(MOMENTS[sequential]) + [0]
        parts = [count for _, count in ends]
        assert parts == sorted(parts), "a part that was there is gone"
        assert len(set(parts)) > 3
    assert killed["random"][1][0][0] == -9
    for name in ("joint", "sequential", "random"):
        assert_same_result(killed[name][0], uninterrupted[PLANS[name][0]])


def test_what_a_killed_run_left_is_whole_and_belongs_to_it(pair, killed, uninterrupted):
    out, [[code, num_parts]] = killed["left"]
    assert code == -9 and 0 < num_parts < len(contents(uninterrupted[False] / "tokens"))
    whole = contents(uninterrupted[False] / "tokens")
    for name, content in contents(out / "tokens").items():
        assert name.startswith(".") or content == whole[name]
    assert not (out / "summary.json").exists()
    before = contents(out)
    with pytest.raises(JobError, match="batch_tokens: 8 there, 30 now"):
        run_metrics(*pair, out, **SETTINGS | {"batch_tokens": 30})
    assert contents(out) == before
    # The half-written file is not a row too many for who reads the directory before the run goes on.
    assert pq.read_table(out / "tokens").num_rows > 0
    run_metrics(*pair, out, resume=True, **SETTINGS)
    assert_same_result(out, uninterrupted[False])


def test_a_second_process_is_kept_out(pair, tmp_path):
    out = tmp_path / "out"
    holder = (
        "import fcntl, os, sys; d = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(d, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(JobError, match="another process is writing there"):
            run_metrics(*pair, out, **SETTINGS)
        assert contents(out) == {}
        process.stdin.close()
    run_metrics(*pair, out, **SETTINGS)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_full_disk_is_a_message_and_what_is_finished_stays(pair, uninterrupted, tmp_path, monkeypatch, sequential):
    out = tmp_path / "out"
    synced = []
    fsync = os.fsync

    def full_after_a_while(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_after_a_while)
        with pytest.raises(JobError, match=r"the disk is full; what is finished stays.*start again"):
            run_metrics(*pair, out, sequential=sequential, **SETTINGS)
    assert not list(out.rglob("*.tmp"))
    if not sequential:
        assert contents(out / "tokens").items() <= contents(uninterrupted[False] / "tokens").items()
        assert contents(out / "tokens")
    run_metrics(*pair, out, sequential=sequential, **SETTINGS)
    assert_same_result(out, uninterrupted[sequential])


@pytest.fixture
def small_file_system(tmp_path):
    """A directory on a file system of 256 KiB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_really_full_disk(pair, uninterrupted, small_file_system, sequential):
    ballast = small_file_system / "ballast"
    ballast.write_bytes(bytes(210 * 1024))
    out = small_file_system / "out"
    with pytest.raises(JobError, match="the disk is full"):
        run_metrics(*pair, out, sequential=sequential, **SETTINGS)
    assert not list(out.rglob("*.tmp"))
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_file_system)], check=True)
    run_metrics(*pair, out, sequential=sequential, **SETTINGS)
    assert_same_result(out, uninterrupted[sequential])


def test_a_read_only_directory(pair, small_file_system):
    subprocess.run(["mount", "-o", "remount,ro", str(small_file_system)], check=True)
    with pytest.raises(JobError, match="the file system is read-only"):
        run_metrics(*pair, small_file_system / "out", **SETTINGS)


def test_directories_that_are_not_a_run(pair, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(JobError, match=r"it holds other files \(holiday.jpg\)"):
        run_metrics(*pair, tmp_path, **SETTINGS)
    with pytest.raises(JobError, match="it is a file"):
        run_metrics(*pair, tmp_path / "holiday.jpg", **SETTINGS)
    assert contents(tmp_path) == {"holiday.jpg": b"x"}


def test_a_damaged_part_is_computed_again(pair, tmp_path):
    out = tmp_path / "out"
    run_metrics(*pair, out, **SETTINGS)
    (out / "summary.json").unlink()
    part = out / "tokens" / "part-00001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-10])
    with pytest.warns(UserWarning, match=r"part-00001.parquet is damaged or gone: it is computed again"):
        run_metrics(*pair, out, **SETTINGS)
    assert part.read_bytes() == whole
