"""Several workers draw and grade: the file of responses is that of one process, whoever is killed at any moment."""

import contextlib
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")
pytest.importorskip("psutil")

import psutil
from hf_models import one_thread  # noqa: F401
from pair_files import WORDS, write_lines
from safetensors.torch import load_file, save_file
from workers import (
    TWO_PROCESSES,
    kill_workers_after_the_first,
    killed_run,
    workers_below,
)

from dlogp_kernels.jobs import decoding, drawing
from dlogp_kernels.jobs.decoding import run_generate, run_sweep
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.inputs.models import ModelPlace
from dlogp_kernels.jobs.options import Decoding
from dlogp_kernels.jobs.resume.response_file import ResponseFile
from dlogp_kernels.jobs.workers.drawer import DrawingDuty
from dlogp_kernels.report.responses import RL, Setting

NUM_PROBLEMS = 7
OPTIONS = {"samples": 2, "max_new_tokens": 7, "batch_size": 3, "chunk_size": 4, "dtype": "fp32", "device": "cpu"}
#: Four chunks each, of which the last has one problem.
SETTINGS = [Setting("delta_logp", -3.0), Setting("kl", 4.0, 0.5)]
ROWS_OF_A_CHUNK = [4, 4, 4, 2] * 2
#: In the current directory.
GRADER = """
def grade(response, problem):
    if problem["id"] == "problem 3":
        raise RuntimeError("can not grade this")
    return response.count("2") % 2
"""
# A run that kills itself when so many chunks are written, and waits until it may.
KILLED_RUN = """
import json, os, signal, sys
import torch
from dlogp_kernels.jobs.decoding import run_sweep
from dlogp_kernels.jobs.options import Decoding
from dlogp_kernels.jobs.resume.response_file import ResponseFile
from dlogp_kernels.report.responses import Setting

torch.set_num_threads(1)
places, settings, options, working, most = json.loads(sys.argv[1])
append, written = ResponseFile.append, []

def watched(self, responses):
    append(self, responses)
    written.append(None)
    if len(written) == most:
        print("written", flush=True)
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGKILL)

ResponseFile.append = watched
settings = [Setting(*setting) for setting in settings]
run_sweep(*places, settings=settings, decoding=Decoding(**options), grader="my_grader:grade", progress=False, **working)
"""

pytestmark = pytest.mark.usefixtures("one_thread", "in_directory")


class Files(NamedTuple):
    rl: Path
    base: Path
    data: Path


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where the grader is."""
    directory = tmp_path_factory.mktemp("directory")
    (directory / "my_grader.py").write_text(GRADER)
    return directory


@pytest.fixture
def in_directory(directory, monkeypatch) -> None:
    monkeypatch.chdir(directory)


@pytest.fixture(scope="module")
def files(pair, directory) -> Files:
    rows = [
        {"id": f"problem {index}", "prompt": " ".join(WORDS[index : 2 * index + 1]), "answer": WORDS[index]}
        for index in range(NUM_PROBLEMS)
    ]
    return Files(pair.rl, pair.base, write_lines(directory / "problems.jsonl", rows))


def sweep(files: Files, out: Path, **more) -> dict:
    options = {"settings": SETTINGS, "decoding": Decoding(**OPTIONS), "grader": "my_grader:grade", "progress": False}
    return run_sweep(*files, out, **options | more)


@pytest.fixture(scope="module")
def whole(files, directory, tmp_path_factory) -> Path:
    """What one process of one thread writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with contextlib.chdir(directory):
        sweep(files, out)
    return out


def summary_of(out: Path) -> dict:
    summary = json.loads((out / "summary.json").read_text())
    assert summary.pop("seconds") > 0 and summary.pop("tokens_per_second") > 0
    return summary


def assert_same_files(out: Path, whole: Path) -> None:
    assert (out / "responses.jsonl").read_bytes() == (whole / "responses.jsonl").read_bytes()
    assert summary_of(out) == summary_of(whole)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "responses.jsonl", "summary.json"]


def test_what_one_process_writes_is_something_to_compare_with(whole):
    summary = summary_of(whole)
    assert summary["responses"] == sum(ROWS_OF_A_CHUNK) and summary["grader_errors"] == 2 * len(SETTINGS)
    assert all(0 < of["accuracy"] < 1 and 0 < of["replaced_share"] < 1 for of in summary["settings"])


def test_processes_that_are_killed_in_the_middle(files, whole, tmp_path, monkeypatch):
    """The same for actors is in test_workers."""
    kill_workers_after_the_first(monkeypatch, ResponseFile, "append")
    with pytest.warns(UserWarning, match="a worker was lost: .*; another one goes on with what it had"):
        sweep(files, tmp_path / "out", **TWO_PROCESSES)
    assert_same_files(tmp_path / "out", whole)
    assert not workers_below(psutil.Process())


def damage(out: Path) -> None:
    """Another byte in the first chunk."""
    file = out / "responses.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])


def test_the_run_itself_is_killed_and_others_go_on_and_mend(files, whole, tmp_path, request):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    killed_run(KILLED_RUN, [list(map(str, (*files, out))), SETTINGS, OPTIONS, TWO_PROCESSES, 2])
    written = (out / "responses.jsonl").read_bytes()
    assert written and (whole / "responses.jsonl").read_bytes().startswith(written)
    assert not (out / "summary.json").exists()
    shutil.copytree(out, tmp_path / "alone")
    sweep(files, tmp_path / "alone", resume=True)
    assert_same_files(tmp_path / "alone", whole)
    damage(out)
    request.getfixturevalue("ray_here")
    with pytest.warns(UserWarning, match=r"responses\.jsonl is damaged: what is lost is drawn again"):
        sweep(files, out, resume=True, engine="ray")
    assert_same_files(out, whole)


class Elsewhere:
    """A team as a worker elsewhere would be one, whose tasks come in any order."""

    greeting = None

    def __init__(self, duty: DrawingDuty, here: object) -> None:
        self._computing = pickle.loads(pickle.dumps(duty)).load()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def results(self, tasks):
        found = [(task, self._computing(task.payload)) for task in tasks]
        random.shuffle(found)
        yield from found


@pytest.fixture
def elsewhere(monkeypatch) -> None:
    """Workers are `Elsewhere`."""
    monkeypatch.setattr(decoding, "engine_of", lambda *_: contextlib.nullcontext(Elsewhere))


def test_chunks_in_any_order(files, whole, tmp_path, elsewhere):
    for seed in range(2):
        random.seed(seed)
        out = tmp_path / str(seed)
        sweep(files, out)
        assert_same_files(out, whole)
        # All chunks but the last two: what is lost comes in any order, too.
        content = (out / "responses.jsonl").read_bytes()
        cut = len(b"".join(content.splitlines(keepends=True)[: sum(ROWS_OF_A_CHUNK[:6])]))
        (out / "responses.jsonl").write_bytes(bytes(cut // 2) + content[cut // 2 : cut])
        with pytest.warns(UserWarning, match="is damaged: what is lost is drawn again"):
            sweep(files, out)
        assert_same_files(out, whole)


def test_progress_of_workers_is_by_chunk(files, tmp_path, elsewhere, monkeypatch):
    said = []

    def say(shown, text, done=0):
        # What draws elsewhere has a bar that is not shown.
        if not shown.disable:
            said.append((done, shown.desc, text))

    monkeypatch.setattr(drawing, "say", say)
    summary = sweep(files, tmp_path / "out", progress=True)
    names = [str(setting) for setting in SETTINGS for _ in range(4)]
    assert [one[:2] for one in said] == list(zip(ROWS_OF_A_CHUNK, names, strict=True))
    for of, (_, _, text) in zip(summary["settings"], said[3::4], strict=True):
        assert text.endswith(f"replaced {of['replaced_share']:.1%}, accuracy {of['accuracy']:.3f}")
        assert not text.startswith("0 tokens/s")


def test_an_error_in_a_worker_is_that_of_one_process(files, tmp_path):
    broken = tmp_path / "rl"
    shutil.copytree(files.rl, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    messages = []
    for working in ({}, {"devices": "1"}):
        with pytest.raises(JobError) as caught:
            run_generate(
                *files._replace(rl=broken), tmp_path / "out", setting=RL, decoding=Decoding(**OPTIONS), progress=False,
                **working,
            )  # fmt: skip
        messages.append(str(caught.value))
    assert messages[0].startswith("the responses can not be drawn: ")
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("# Another.", r"the worker on \S+ has sha256 \w+, this run is of \w+: all machines need the same grader"),
        ("import nothing_at_all", r"the module .*nothing_at_all.*so says the worker on "),
    ],
)
def test_a_grader_that_differs_on_a_worker_is_refused(files, tmp_path, elsewhere, monkeypatch, there, said):
    other = tmp_path / "my_other_grader.py"
    other.write_text(GRADER)
    monkeypatch.chdir(tmp_path)
    load_grader = decoding.load_grader

    def loaded_here(name, *, timeout):
        grader = load_grader(name, timeout=timeout)
        other.write_text(there + GRADER)
        return grader

    monkeypatch.setattr(decoding, "load_grader", loaded_here)
    with pytest.raises(JobError, match=f"^--grader my_other_grader:grade: {said}"):
        sweep(files, tmp_path / "out", grader="my_other_grader:grade")


def test_a_duty_elsewhere_has_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ModelPlace("--base", "base", Path("base"), False)
    adapter = ModelPlace("--rl", "rl", Path("rl"), False, base)
    duty = DrawingDuty(Decoding(), adapter, base, "exact", {}, None, {}).absolute()
    assert [place.directory for place in (duty.rl, duty.rl.base, duty.base)] == [
        tmp_path / name for name in ("rl", "base", "base")
    ]
    assert duty.on("cuda:1").decoding.device == "cuda:1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "abacus"}, "--devices has 'abacus', expected all, a number, or a list"),
        ({"devices": "cuda:0"}, "--devices is 'cuda:0' beside --device cpu, expected devices of that kind"),
        ({"engine": "spark"}, "--engine is 'spark', expected one of local, ray"),
    ],
)
def test_options_that_do_not_fit(files, tmp_path, options, message):
    with pytest.raises(JobError, match=message):
        sweep(files, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_worker_stops_graders_that_take_too_long_and_leaves_nothing_of_them(files, tmp_path):
    children = tmp_path / "children"
    Path("my_slow_grader.py").write_text(f"""
import subprocess, time
with open({str(children)!r}, "a") as file:
    print(subprocess.Popen(["sleep", "300"]).pid, file=file)

def grade(response, problem):
    time.sleep(30 if problem["id"] == "problem 1" else 0)
    return 1
""")
    decoding = Decoding(**OPTIONS | {"samples": 1, "grader_timeout": 0.5})
    found = sweep(
        files, tmp_path / "out", settings=SETTINGS[:1], decoding=decoding, grader="my_slow_grader:grade", devices="cpu"
    )
    assert found["grader_errors"] == 1
    (error,) = [response.error for response in ResponseFile(tmp_path / "out" / "responses.jsonl", None).responses()
                if response.error is not None]  # fmt: skip
    assert error == "TimeoutError: the grader took more than 0.5 s"
    # The one of this process, and two of the worker's, of which the first was stopped.
    numbers = [int(number) for number in children.read_text().split()]
    assert len(numbers) == 3
    assert not any(map(is_running, numbers))


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
