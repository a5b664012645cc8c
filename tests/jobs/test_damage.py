"""What a run has written and a disk has changed since: made again, refused by name, or without effect; never taken."""

import json
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")

import torch
from hf_models import one_thread  # noqa: F401
from pair_files import WORDS, Pair, contents, random_rows, write_lines

from dlogp_kernels.hf import HiddenStore, LmHead
from dlogp_kernels.hf.tiny import save_local, tiny_qwen3, word_tokenizer
from dlogp_kernels.jobs import metrics
from dlogp_kernels.jobs.decoding import run_generate
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.inputs import models
from dlogp_kernels.jobs.metrics import run_metrics
from dlogp_kernels.jobs.options import Decoding
from dlogp_kernels.jobs.resume.run_directory import RunDirectory
from dlogp_kernels.jobs.workers import measurer
from dlogp_kernels.report import files
from dlogp_kernels.report.dataset import TokenDataset
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.responses import RL, read_responses

SETTINGS = {"dtype": "fp32", "batch_tokens": 8, "device": "cpu", "progress": False}
DECODING = Decoding(samples=2, max_new_tokens=6, batch_size=3, chunk_size=4, dtype="fp32", device="cpu")
TIMES = ("seconds", "tokens_per_second", "response_tokens_per_second")


class Killed(BaseException):
    """In place of a kill: the directory stays as it is."""


@pytest.fixture(scope="module")
def pair(pair, tmp_path_factory) -> Pair:
    return pair._replace(data=write_lines(tmp_path_factory.mktemp("data") / "few.jsonl", random_rows(10)))


@pytest.fixture(scope="module")
def problems(pair) -> Path:
    rows = [{"prompt": WORDS[index], "answer": WORDS[index + 1]} for index in range(5)]
    return write_lines(pair.data.with_name("problems.jsonl"), rows)


def measured(pair: Pair, out: Path, *, sequential: bool = True) -> dict:
    return run_metrics(*pair, out, sequential=sequential, **SETTINGS)


def drawn(pair: Pair, problems: Path, out: Path) -> dict:
    return run_generate(pair.rl, pair.base, problems, out, setting=RL, decoding=DECODING, progress=False)


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    measured(pair, out)
    return out


@pytest.fixture(scope="module")
def whole_drawn(pair, problems, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    drawn(pair, problems, out)
    return out


@pytest.fixture(scope="module")
def killed(pair, tmp_path_factory) -> Path:
    """A run that was killed when two parts were there, and all hidden states of the base model."""
    out = tmp_path_factory.mktemp("killed") / "out"
    rows = metrics._Run._rows

    def stop_at_the_third_part(self, sample, statistics):
        if len(list(out.glob("tokens/*.parquet"))) == 2:
            raise Killed
        return rows(self, sample, statistics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics._Run, "_rows", stop_at_the_third_part)
        with pytest.raises(Killed):
            measured(pair, out)
    return out


def flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def result(out: Path) -> dict[str, object]:
    """What a user gets: everything but how long it took, and the manifest, which tells of it."""
    found: dict[str, object] = {name: content for name, content in contents(out).items() if name != "manifest.json"}
    summary = json.loads((out / "summary.json").read_text())
    return found | {"summary.json": {name: value for name, value in summary.items() if name not in TIMES}}


def outcomes(source: Path, out: Path, go_on: Callable[[Path], object], expected: dict, flips: int) -> dict[str, set]:
    """By the name of the file in which a bit was flipped: equal, or refused with the file's name."""
    rng = random.Random(0)
    found: dict[str, set[str]] = {}
    for name in sorted(contents(source)):
        for _ in range(flips):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(source, out)
            if not (out / name).stat().st_size:
                continue
            flipped(out / name, rng)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    go_on(out)
                outcome = "equal" if result(out) == expected else "silent"
            except (JobError, DatasetError) as error:
                outcome = "refused" if str(out / name) in str(error) else str(error)
            found.setdefault(name, set()).add(outcome)
    return found


def test_a_flipped_bit_in_what_a_killed_run_left(pair, whole, killed, tmp_path):
    found = outcomes(killed, tmp_path / "out", lambda out: measured(pair, out), result(whole), 1)
    assert found.pop("manifest.json") == {"refused"}
    assert len(found) > 10 and set.union(*found.values()) == {"equal"}, found


def test_a_flipped_bit_in_a_complete_run(pair, whole, problems, whole_drawn, tmp_path):
    for source, go_on in (
        (whole, lambda out: measured(pair, out)),
        (whole_drawn, lambda out: drawn(pair, problems, out)),
    ):
        found = outcomes(source, tmp_path / "out", go_on, result(source), 2)
        assert found.pop("manifest.json") == {"refused"}
        assert len(found) > 1 and set.union(*found.values()) == {"equal"}, found


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("tokens/part-00000.parquet", "a zeroed tail"),
        (".work/base_hidden/samples/*09.safetensors", "a zeroed tail"),
        (".work/base_hidden/lm_head.safetensors", "nothing left"),
        (".work/samples.arrow", "nothing left"),
        (".work/broken_lines.json", "nothing left"),
        (".work/seconds.json", "nothing left"),
        (".work/base_hidden/lm_head.safetensors", "gone"),
        (".work/base_hidden/samples/*09.safetensors", "gone"),
        ("tokens/part-00001.parquet", "gone"),
    ],
)
def test_what_a_disk_may_do_to_a_file_does_not_show(pair, whole, killed, tmp_path, pattern, what):
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    path = next(iter(out.glob(pattern)), out / pattern)
    if what == "gone":
        path.unlink()
    elif what == "nothing left":
        path.write_bytes(b"")
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-64] + bytes(64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        measured(pair, out)
    assert result(out) == result(whole)


def test_a_kill_while_a_complete_run_is_tidied_changes_nothing(pair, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed_after_one(self, created):
        (self.work / "samples.arrow").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_tidy", killed_after_one)
        with pytest.raises(Killed):
            measured(pair, out)
    assert (out / ".work").exists()
    # Nothing is computed again.
    monkeypatch.setattr(metrics._Run, "compute", lambda self: pytest.fail("it was complete"))
    measured(pair, out)
    assert result(out) == result(whole)


def test_a_damaged_manifest_is_refused_with_what_to_remove(pair, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    manifest = out / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"batch_tokens": 8', b'"batch_tokens": 9'))
    with pytest.raises(JobError, match=r"manifest\.json is damaged .*: remove .*out to begin again"):
        measured(pair, out)


def test_readers_do_not_take_what_is_damaged(whole, whole_drawn, tmp_path):
    for source, read in ((whole, TokenDataset), (whole_drawn, lambda out: list(read_responses(out)))):
        rng = random.Random(1)
        for name in contents(source):
            if name.startswith(("tokens/", "responses")):
                out = tmp_path / "out"
                shutil.copytree(source, out)
                flipped(out / name, rng)
                with pytest.raises(DatasetError, match=f"{name} is damaged: start the run again"):
                    read(out)
                shutil.rmtree(out)
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "tokens" / "part-00001.parquet").unlink()
    with pytest.raises(DatasetError, match=r"part-00001\.parquet is gone"):
        TokenDataset(tmp_path / "out")


def test_no_flipped_bit_of_a_store_is_read(tmp_path):
    store = HiddenStore.create(tmp_path, LmHead(torch.randn(7, 4), torch.randn(7), 3.0, 0.5))
    hidden = torch.randn(3, 4)
    store.write("a", hidden, input_ids=[1, 2, 3])
    rng = random.Random(0)
    for path in tmp_path.rglob("*.safetensors"):
        content = path.read_bytes()
        for _ in range(100):
            flipped(path, rng)
            if path.name == "a.safetensors":
                assert not store.has("a")
                with pytest.raises(ValueError, match=r"a\.safetensors: .*(damaged|truncated)"):
                    store.read("a", input_ids=[1, 2, 3])
            else:
                with pytest.raises(ValueError, match=r"lm_head\.safetensors: .*(damaged|truncated)"):
                    store.head()
            path.write_bytes(content)
    assert torch.equal(store.read("a", input_ids=[1, 2, 3]), hidden)
    # A file that stands where another sample's should is not that one.
    shutil.copy(tmp_path / "samples" / "a.safetensors", tmp_path / "samples" / "b.safetensors")
    assert not store.has("b")


def test_content_is_on_the_disk_before_its_name_and_the_name_before_more_is_written(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        assert events[-1] == Path(source).name, "the content is not on the disk yet"
        events.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    store = HiddenStore.create(tmp_path / "store", LmHead(torch.randn(7, 4), None, None, 1.0))
    store.write("a", torch.randn(3, 4))
    files.write_atomically(tmp_path / "plain", b"x")
    assert [name for name in events if not name.endswith(".tmp")] == [
        "-> lm_head.safetensors", "store", "-> a.safetensors", "samples", "-> plain", tmp_path.name,
    ]  # fmt: skip


# Models


@pytest.fixture(scope="module")
def large_pair(pair, tmp_path_factory) -> Pair:
    """With a base of 2 MiB, of which samples would see a part."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny_qwen3(len(tokenizer), hidden_size=128, num_layers=4, intermediate_size=256, num_heads=2, head_dim=64)
    directory = tmp_path_factory.mktemp("large") / "base"
    save_local(model, tokenizer, directory)
    assert (directory / "model.safetensors").stat().st_size > 2 * 2**20
    return pair._replace(base=directory)


def test_a_byte_that_was_trained_anywhere_is_another_model(large_pair, tmp_path):
    out = tmp_path / "out"
    measured(large_pair, out, sequential=False)
    weights = large_pair.base / "model.safetensors"
    content, times = weights.read_bytes(), weights.stat()
    for place in range(100_000, len(content), 199_999):
        weights.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(JobError, match=r"base model\.safetensors sha256: "):
            measured(large_pair, out, sequential=False)
    # The same bytes at another time are the same model.
    weights.write_bytes(content)
    measured(large_pair, out, sequential=False)


def test_a_model_that_is_replaced_between_two_passes_is_refused(pair, tmp_path, monkeypatch):
    """The run is sequential: the RL model is loaded when the base model has been over all of the data."""
    shutil.copytree(pair.rl, tmp_path / "rl")
    compute = measurer.response_hidden

    def replace_the_other(*arguments):
        weights = tmp_path / "rl" / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        monkeypatch.undo()
        return compute(*arguments)

    monkeypatch.setattr(measurer, "response_hidden", replace_the_other)
    with pytest.raises(JobError, match=r"--rl .*rl: model\.safetensors was changed since the run began"):
        measured(pair._replace(rl=tmp_path / "rl"), tmp_path / "out")


def test_a_model_of_the_hub_is_known_by_its_commit(pair, tmp_path, monkeypatch):
    out, commits = tmp_path / "out", ["0" * 39 + "1", "0" * 39 + "2"]
    for commit in commits:
        shutil.copytree(pair.rl, tmp_path / "snapshots" / commit)
    current = [commits[0]]
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshots" / current[0]))
    named = pair._replace(rl="someone/something")
    measured(named, out, sequential=False)
    identity = json.loads((out / "manifest.json").read_text())["identity"]
    assert identity["rl"] == {"hub_name": "someone/something", "commit": commits[0]}
    measured(named, out, sequential=False)
    current[0] = commits[1]
    with pytest.raises(JobError, match=f'rl commit: "{commits[0]}" there, "{commits[1]}" now'):
        measured(named, out, sequential=False)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_data_set_of_nan_is_an_error(pair, tmp_path, sequential):
    """Below the least float32 there is, a temperature may pass every check of its sign and divide by 0."""
    out = tmp_path / "out"
    with pytest.raises(JobError, match="temperature"):
        run_metrics(*pair, out, temperature=1e-46, sequential=sequential, **SETTINGS)
    assert not (out / "summary.json").exists()


# Copies of the process that writes


FORKING_GRADER = """
import os
def grade(response, problem):
    if problem["answer"] == "w2":
        os.fork()
    return True
"""


def test_a_grader_that_forks_makes_no_second_writer(pair, problems, tmp_path, monkeypatch):
    (tmp_path / "forking.py").write_text(FORKING_GRADER)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        decoding = replace(DECODING, samples=1, chunk_size=1)
        places = pair.rl, pair.base, problems, out
        run_generate(*places, setting=RL, decoding=decoding, grader="forking:grade", progress=False)
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as said:
        # Until no copy holds the other end.
        text = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, text
    assert [row.problem for row in read_responses(out)] == list(range(5))
    # The grader has a process of its own, whose copies end when they come back from it.
    assert "a forked copy" not in text


def test_a_copy_of_the_process_does_not_write(tmp_path, capfd):
    directory = RunDirectory(tmp_path / "out", {})
    with directory.claimed():
        copy = os.fork()
        if copy == 0:
            with directory.writing():
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 1
    assert capfd.readouterr().err.count("a forked copy of the process that writes there ends here") == 1


def test_a_copy_that_lives_on_does_not_keep_the_directory(tmp_path):
    """A run is killed whose grader had started a process of its own, which is left."""
    read, write = os.pipe()
    run = os.fork()
    if run == 0:
        directory = RunDirectory(tmp_path / "out", {})
        with directory.claimed():
            directory.begin()
            if os.fork() == 0:
                os.write(write, f"{os.getpid()}\n".encode())
            signal.pause()
    os.close(write)
    with open(read, encoding="ascii") as said:
        copy = int(said.readline())
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    try:
        with RunDirectory(tmp_path / "out", {}).claimed():
            pass
    finally:
        os.kill(copy, signal.SIGKILL)
