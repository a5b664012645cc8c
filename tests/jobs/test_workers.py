"""Several workers, processes or actors of Ray: the data set is that of one process, whoever is killed at any moment."""

import json
import platform
import random
import resource
import socket
from collections import deque
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")
pytest.importorskip("psutil")

import psutil
import torch
from hf_models import one_thread  # noqa: F401
from pair_files import contents
from safetensors.torch import load_file, save_file
from workers import (
    TWO_ACTORS,
    kill_workers_after_the_first,
    killed_run,
    workers_below,
)

from dlogp_kernels.jobs import metrics
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.inputs.records import Example
from dlogp_kernels.jobs.metrics import run_metrics
from dlogp_kernels.jobs.workers import engines, ray_actors
from dlogp_kernels.jobs.workers.duty import Reply, Task, answered
from dlogp_kernels.jobs.workers.freed_memory import keep_freed_memory
from dlogp_kernels.jobs.workers.measurer import batch_task
from dlogp_kernels.jobs.workers.pool import Pool, WorkerLost

SETTINGS = {"dtype": "fp32", "batch_tokens": 8, "device": "cpu", "progress": False}

# A run that kills itself when so many parts are written, and waits until it may.
KILLED_RUN = """
import json, os, signal, sys
import torch
from dlogp_kernels.jobs import metrics

torch.set_num_threads(1)
arguments, settings, most = json.loads(sys.argv[1])
write_part, written = metrics.write_part, []

def watched(*part):
    found = write_part(*part)
    written.append(found)
    if len(written) == most:
        print("written", flush=True)
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGKILL)
    return found

metrics.write_part = watched
metrics.run_metrics(*arguments, **settings)
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> Path:
    """What one process of one thread writes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    run_metrics(*pair, out, **SETTINGS)
    torch.set_num_threads(threads)
    return out


def assert_same_files(out: Path, whole: Path) -> None:
    for name in ("tokens", "responses"):
        assert contents(out / name) == contents(whole / name)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "responses", "summary.json", "tokens"]
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (out, whole)]
    for summary in summaries:
        assert summary.pop("seconds") > 0
        del summary["tokens_per_second"], summary["response_tokens_per_second"], summary["arguments"]["sequential"]
    assert summaries[0] == summaries[1]


def test_both_models_one_after_the_other_in_a_process(pair, whole, tmp_path):
    run_metrics(*pair, tmp_path / "out", sequential=True, devices="1", **SETTINGS)
    assert_same_files(tmp_path / "out", whole)
    assert not workers_below(psutil.Process())


def test_actors_that_are_killed_in_the_middle(pair, whole, tmp_path, monkeypatch, ray_here):
    """The same for processes is in test_drawing_workers."""
    kill_workers_after_the_first(monkeypatch, metrics, "write_part")
    with pytest.warns(UserWarning, match="a worker was lost: .*; another one goes on with what it had"):
        run_metrics(*pair, tmp_path / "out", sequential=True, **TWO_ACTORS, **SETTINGS)
    assert_same_files(tmp_path / "out", whole)


def test_the_run_itself_is_killed_and_others_go_on(pair, whole, tmp_path):
    """With actors, and then in one process; with processes it is in test_drawing_workers."""
    pytest.importorskip("ray")
    out = tmp_path / "out"
    killed_run(KILLED_RUN, [list(map(str, (*pair, out))), SETTINGS | TWO_ACTORS, 2])
    # The part that was written last is not known to be whole: it was not recorded.
    assert contents(out / "tokens").items() <= contents(whole / "tokens").items()
    assert not (out / "summary.json").exists()
    run_metrics(*pair, out, resume=True, **SETTINGS)
    assert_same_files(out, whole)


def test_an_error_in_a_worker_is_that_of_one_process(pair, tmp_path):
    broken = tmp_path / "rl"
    broken.mkdir()
    for file in pair.rl.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(pair.rl / "model.safetensors")
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    messages = []
    for working in ({}, {"devices": "1"}):
        with pytest.raises(JobError) as caught:
            run_metrics(*pair._replace(rl=broken), tmp_path / "out", **working, **SETTINGS)
        messages.append(str(caught.value))
    assert messages[0].startswith("the statistics can not be computed: ")
    assert messages[0] == messages[1]


def tasks(number: int) -> list[Task]:
    """Three batches a part, of two samples each."""
    samples = [Example(line, str(line), None, (), ()) for line in range(1, 2 * number + 1)]
    return [batch_task(index // 3, index % 3, samples[2 * index : 2 * index + 2]) for index in range(number)]


class Fallible:
    """A worker that gives the lines of a task, unless it ends."""

    def __init__(self, ends) -> None:
        self._ends = ends
        self.said: deque = deque([(None, Reply())])

    def give(self, task: Task) -> None:
        self.said.append((task, Reply([sample.line for sample in task.payload])))

    def take(self) -> Reply:
        task, reply = self.said.popleft()
        if self._ends(task):
            raise WorkerLost("it ended")
        return reply

    def stop(self) -> None:
        self.said.clear()


def pool(number: int, ends, rng: random.Random) -> Pool:
    def some(workers):
        speaking = [worker for worker in workers if worker.said]
        return rng.sample(speaking, rng.randint(1, len(speaking)))

    return Pool(lambda place: Fallible(ends), number, some)


@pytest.mark.filterwarnings("ignore:a worker was lost")
@pytest.mark.parametrize("number", [1, 2, 5])
def test_each_batch_comes_once_whatever_workers_are_lost(number):
    given = tasks(40)
    for seed in range(20):
        rng = random.Random(seed)
        lost = []

        def ends(task, rng=rng, lost=lost) -> bool:
            # Not three times in a row, which is no accident.
            key = None if task is None else task.key
            if lost.count(key) >= (2 if key else 1) or rng.random() > 0.3:
                return False
            lost.append(key)
            return True

        with pool(number, ends, rng) as team:
            found = list(team.results(iter(given)))
        assert len(lost) > 3
        assert sorted(task.key for task, _ in found) == [task.key for task in given]
        assert all(value == [sample.line for sample in task.payload] for task, value in found)


@pytest.mark.filterwarnings("ignore:a worker was lost")
def test_a_batch_that_no_worker_survives_is_named():
    rng = random.Random(0)
    expected = r"part 1 \(lines 9 to 10 of --data\): 3 workers ended while they computed it: it ended"
    given = tasks(9)
    with (
        pool(2, lambda task: task is given[4], rng) as team,
        pytest.raises(JobError, match=expected),
    ):
        list(team.results(given))
    expected = "workers end before they have the models in memory: it ended"
    with pytest.raises(JobError, match=expected), pool(2, lambda task: task is None, rng):
        pass


def test_what_a_worker_warns_of_and_raises_is_told():
    def raises(error):
        raise error

    for error in (JobError("no"), MemoryError(), FileNotFoundError(2, "gone", "model.safetensors")):
        found = answered(raises, error).error
        assert type(found) is type(error) and str(found) == str(error)
    fault = answered(raises, KeyError("fault")).error
    assert type(fault) is RuntimeError and "KeyError: 'fault'" in str(fault) and "in raises" in str(fault)
    assert answered(__import__("warnings").warn, "odd").warnings == ["odd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "--engine is 'spark', expected one of local, ray"),
        ({"address": "auto"}, "--address is 'auto' without --engine ray"),
        ({"engine": "ray", "address": "ray://host:1"}, "--address is 'ray://host:1', expected auto or the host:port"),
        ({"engine": "ray", "devices": "cpu,cpu"}, "Ray chooses the devices: expected all or a number"),
        ({"engine": "ray", "devices": "0"}, r"--devices is 0, expected all, a number in \[1, "),
        ({"devices": "abacus"}, "--devices has 'abacus', expected all, a number, or a list"),
        ({"devices": ""}, "--devices has ''"),
        ({"devices": "0"}, r"--devices is 0, expected all, a number in \[1, "),
        ({"devices": "cpu,cuda:0"}, "expected devices of one kind"),
        ({"devices": "cuda:0"}, "--devices is 'cuda:0' beside --device cpu, expected devices of that kind"),
        ({"devices": "2", "device": "cuda:1"}, "--device is 'cuda:1', one alone: expected cpu or cuda beside"),
    ],
)
def test_options_that_do_not_fit(pair, tmp_path, options, message):
    with pytest.raises(JobError, match=message):
        run_metrics(*pair, tmp_path / "out", **SETTINGS | options)
    assert not (tmp_path / "out").exists()


def test_gpus_of_a_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    expected = {"all": [0, 1], "1": [0], "cuda:1,cuda:0": [1, 0], "cuda": [0]}
    for devices, numbers in expected.items():
        assert engines.local_devices(devices, "cuda") == [f"cuda:{number}" for number in numbers]
    for devices, message in {
        "3": "'3', but there is no cuda:2: this machine has 2 GPUs",
        "cuda:0,cuda:2": "'cuda:0,cuda:2', but there is no cuda:2: this machine has 2 GPUs",
        "cuda:1,cuda:1": "which names a GPU twice",
        "cuda,cuda:0": "which names a GPU twice",
    }.items():
        with pytest.raises(JobError, match=message):
            engines.local_devices(devices, "cuda")
    assert engines.local_devices("all", "cpu") == ["cpu"] and engines.local_devices("3", "cpu") == ["cpu"] * 3


def test_no_ray(pair, tmp_path, monkeypatch):
    find_spec = engines.importlib.util.find_spec
    monkeypatch.setattr(
        engines.importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find_spec(name, *rest)
    )
    with pytest.raises(JobError, match=r"--engine is 'ray', which can not be imported.*pip install .*\[ray\]"):
        run_metrics(*pair, tmp_path / "out", engine="ray", **SETTINGS)


def test_no_cluster(pair, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_actors, "_SECONDS_TO_CONNECT", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(JobError, match=f"^--address {address}: no cluster of Ray answered within 2 s; start"):
            run_metrics(*pair, tmp_path / "out", engine="ray", address=address, **SETTINGS)
    with pytest.raises(JobError, match=f"^--address {address}: no cluster of Ray can be reached .*refused"):
        run_metrics(*pair, tmp_path / "out", engine="ray", address=address, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_more_workers_than_a_cluster_has_room_for(pair, tmp_path, ray_here):
    with pytest.raises(JobError, match=r"--devices: Ray has room for 2 workers of 1 CPUs \(--threads\) each"):
        run_metrics(*pair, tmp_path / "out", engine="ray", devices="3", **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they please")
def test_what_one_batch_frees_the_next_one_takes():
    def batch() -> None:
        assert all(len(block) for block in [torch.ones(2**20) for _ in range(32)])

    keep_freed_memory()
    # Where the blocks of the first ones lie depends on what else is there.
    for _ in range(5):
        batch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        batch()
    pages_of_a_batch = 32 * 2**22 // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages_of_a_batch / 10
