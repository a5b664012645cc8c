"""`dlogp train`: a checkpoint, a log, going on after a kill; and Fig. 5 of what it logged."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("trl")
pytest.importorskip("typer")

import numpy as np
import peft
import torch
import trl_runs
from hf_models import one_thread  # noqa: F401
from training_files import write_run
from typer.testing import CliRunner

from dlogp_kernels.cli.app import app
from dlogp_kernels.hf import load_model, load_tokenizer
from dlogp_kernels.jobs import train as train_job
from dlogp_kernels.jobs.decoding import run_generate
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.metrics import run_metrics
from dlogp_kernels.jobs.options import Decoding, Training, check_training
from dlogp_kernels.jobs.resume.run_directory import RunDirectory
from dlogp_kernels.jobs.train import run_train
from dlogp_kernels.report.dataset import TokenDataset
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.responses import Setting
from dlogp_kernels.report.training_curves import grouped, line, markdown, plot_training, read_run

TRAINING = Training(
    steps=6, prompts=2, samples=4, minibatches=2, max_new_tokens=8, learning_rate=3e-3, warmup_steps=1, eval_every=3,
    save_every=3, eval_samples=2, overlong_buffer=2, device="cpu",
)  # fmt: skip
GRADER = """
def early(response, problem):
    words = [int(word[1:]) for word in response.split()]
    if problem["answer"] == 3 and len(words) < 3:
        raise LookupError("too short to tell")
    return sum(word < 14 for word in words) / 8
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `run_train` on a tiny model with problems in a directory of its own; options replace those of TRAINING."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tiny_grader.py").write_text(GRADER)
    sys.modules.pop("tiny_grader", None)
    trl_runs.saved_policy(tmp_path / "base")
    for name, prompts in (("train", trl_runs.PROMPTS[:8]), ("held_out", trl_runs.PROMPTS[8:])):
        rows = [{"prompt": prompt, "answer": number} for number, prompt in enumerate(prompts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(out="out", resume=False, grader="tiny_grader:early", data="train.jsonl", **options):
        return run_train(
            tmp_path / "base",
            tmp_path / data,
            tmp_path / out,
            training=replace(TRAINING, **options),
            grader=grader,
            eval_data=tmp_path / "held_out.jsonl",
            resume=resume,
            progress=False,
        )

    return train


def log(path):
    return [json.loads(entry) for entry in (path / "log.jsonl").read_text().splitlines()]


def without_times(entries):
    return [{name: value for name, value in entry.items() if name != "step_seconds"} for entry in entries]


def test_a_training_that_begins_with_rounded_weights_says_so(run):
    with pytest.warns(
        UserWarning, match=r"--dtype bf16 rounds \d+ of the \d+ weights of --base .* before the first step"
    ):
        run(dtype="bf16", steps=1)


def test_a_run_writes_a_checkpoint_and_a_log(run, tmp_path):
    summary = run()
    out = tmp_path / "out"
    written = {path.name for path in out.iterdir()}
    assert written - {"tensorboard"} == {"model", "log.jsonl", "log.csv", "manifest.json", "summary.json"}
    entries = log(out)
    assert [entry["step"] for entry in entries] == list(range(7))
    assert [entry["step"] for entry in entries if "eval_accuracy" in entry] == [0, 3, 6]
    assert [entry["step"] for entry in entries if "accuracy" in entry] == [1, 3, 5]
    assert all(entry["mean_weight"] > 1 and entry["entropy"] > 0 for entry in entries[1:])
    assert (
        summary["first_accuracy"] == entries[1]["accuracy"]
        and summary["last_eval_accuracy"] == entries[6]["eval_accuracy"]
    )
    assert summary["grader_errors"] == sum(entry.get("grader_errors", 0) for entry in entries)
    with open(out / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and float(rows[4]["loss"]) == entries[4]["loss"] and rows[4]["accuracy"] == ""
    model, base = (load_model(path, dtype=torch.float32) for path in (out / "model", tmp_path / "base"))
    assert load_tokenizer(out / "model").get_vocab() == load_tokenizer(tmp_path / "base").get_vocab()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    # Again: it is complete, and nothing is done.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run() == summary and {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(JobError, match=r"alpha: 0\.1 there, 0\.2 now"):
        run(alpha=0.2)


def test_a_killed_run_goes_on(run, tmp_path, monkeypatch):
    """The process is killed between two checkpoints; what it logged after the first is made anew."""
    run("whole")
    arguments = [
        "--base", "base", "--data", "train.jsonl", "--eval-data", "held_out.jsonl", "--out", "killed", "--grader",
        "tiny_grader:early", "--steps", "6", "--prompts", "2", "--samples", "4", "--max-new-tokens", "8",
        "--learning-rate", "3e-3", "--warmup-steps", "1", "--eval-every", "3", "--save-every", "3",
        "--eval-samples", "2", "--overlong-buffer", "2", "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dlogp_kernels.cli", "train", *arguments],
        cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    path = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(path.read_bytes().splitlines()) > 5:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists(), "it was done before it could be killed"
    with pytest.raises(JobError, match="no run to go on with"):
        run("new", resume=True)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", *arguments, "--resume"])
    assert result.exit_code == 0, result.output
    assert "accuracy, held out" in result.output
    assert without_times(log(tmp_path / "killed")) == without_times(log(tmp_path / "whole"))
    weights = [load_model(tmp_path / name / "model", dtype=torch.float32).state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoints_and_logs_are_not_gone_on_from(run, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    with monkeypatch.context() as patch:
        # As if it were killed after the summary, when a part of what the run no longer needs is gone.
        patch.setattr(RunDirectory, "_tidy", lambda self, created: next(self.work.rglob("config.json")).unlink())
        finished = run("whole", save_every=2)
    assert run("whole", save_every=2) == finished and not (whole / ".work").exists()

    with monkeypatch.context() as patch:
        # As if it were killed when all steps are taken, and the model is not written.
        patch.setattr(train_job._Run, "_write_model", lambda self, target: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("stepped", save_every=2)
    run("stepped", save_every=2)
    assert without_times(log(tmp_path / "stepped")) == without_times(log(whole))
    weights = (whole / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "stepped" / "model" / "model.safetensors").read_bytes() == weights

    on_step = train_job._Run._on_step

    def stop_at_the_sixth(self, step, metrics, bar):
        if step == 6:
            raise InterruptedError("as if killed")
        on_step(self, step, metrics, bar)

    with monkeypatch.context() as patch:
        patch.setattr(train_job._Run, "_on_step", stop_at_the_sixth)
        with pytest.raises(JobError, match="as if killed"):
            run(save_every=2)
    checkpoints = out / ".work" / "trainer"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    flip(checkpoints / "checkpoint-4" / "optimizer.pt")
    flip(out / "log.jsonl")
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged: its steps are taken again"):
        run(save_every=2)
    assert without_times(log(out)) == without_times(log(whole))
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    # The summary is made again, from the manifest; the rest would take the whole training.
    summary = (out / "summary.json").read_bytes()
    flip(out / "summary.json")
    with pytest.warns(UserWarning, match=r"summary\.json is damaged: it is made again"):
        run(save_every=2)
    assert (out / "summary.json").read_bytes() == summary
    for name in ("model/model.safetensors", "model/tokenizer.json", "log.jsonl", "log.csv"):
        content = (out / name).read_bytes()
        flip(out / name)
        with pytest.raises(JobError, match=f"{name} is not what the run wrote, .*: put it back, or remove .*out to"):
            run(save_every=2)
        (out / name).write_bytes(content)
    flip(out / "log.jsonl")
    with pytest.raises(DatasetError, match=r"log\.jsonl is damaged"):
        read_run(out)


def test_adapters_are_trained_and_serve_as_a_model_from_the_start(run, tmp_path, monkeypatch):
    base = load_model(tmp_path / "base", dtype=torch.float32)
    run("whole", lora=2, save_every=2)
    on_step, held = train_job._Run._on_step, {}

    def stop_at_the_fourth(self, step, metrics, bar):
        with torch.random.fork_rng():
            held[step] = load_model(tmp_path / "out" / "model").state_dict()
        if step == 4:
            raise InterruptedError("as if killed")
        on_step(self, step, metrics, bar)

    with monkeypatch.context() as patch:
        patch.setattr(train_job._Run, "_on_step", stop_at_the_fourth)
        with pytest.raises(JobError, match="as if killed"):
            run(lora=2, save_every=2)
    weights = [name for name in held[1] if "lora_B" in name]
    assert len(weights) == 14 and all(held[1][name].eq(0).all() for name in weights), "of the start"
    assert all(torch.equal(held[2][name], held[1][name]) for name in weights)
    assert any(not torch.equal(held[3][name], held[2][name]) for name in weights), "those of the checkpoint"
    checkpoint = tmp_path / "out" / ".work" / "trainer" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    run(lora=2, save_every=2)
    adapter, weights = tmp_path / "out" / "model", "adapter_model.safetensors"
    assert (adapter / weights).read_bytes() == (tmp_path / "whole" / "model" / weights).read_bytes()
    assert without_times(log(tmp_path / "out")) == without_times(log(tmp_path / "whole"))
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()

    # As the RL model of the commands, beside its base.
    generated, measured = tmp_path / "generated", tmp_path / "measured"
    decoding = Decoding(max_new_tokens=8, device="cpu")
    options = {"setting": Setting("none", draft="rl"), "grader": "tiny_grader:early", "progress": False}
    data = tmp_path / "held_out.jsonl"
    run_generate(adapter, tmp_path / "base", data, generated, decoding=decoding, **options)
    lines = [json.loads(text) for text in (generated / "responses.jsonl").read_text().splitlines()]
    prompts = [json.loads(text)["prompt"] for text in data.read_text().splitlines()]
    tokenizer = load_tokenizer(adapter)
    rows = [
        {"prompt_ids": tokenizer.encode(prompt), "response_ids": line["token_ids"]}
        for prompt, line in zip(prompts, lines, strict=True)
    ]
    responses = tmp_path / "responses.jsonl"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_metrics(adapter, tmp_path / "base", responses, measured, device="cpu", progress=False)
    logp = TokenDataset(measured).column("logp", every_source=True)
    first = merged(torch.tensor([rows[0]["prompt_ids"] + rows[0]["response_ids"]])).logits.log_softmax(-1)[0]
    start = len(rows[0]["prompt_ids"]) - 1
    expected = [first[start + place, token].item() for place, token in enumerate(rows[0]["response_ids"])]
    assert logp[: len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
    assert np.abs(TokenDataset(measured).column("delta_logp", every_source=True)).max() > 1e-3

    with pytest.raises(JobError, match="model: it is an adapter, expected a whole model"):
        run_train(adapter, tmp_path / "train.jsonl", tmp_path / "next", training=TRAINING)
    # Its model is part of what it is.
    flip(tmp_path / "base" / "model.safetensors")
    with pytest.raises(JobError, match=r"rl base model\.safetensors sha256"):
        run_metrics(adapter, tmp_path / "base", responses, measured, device="cpu", progress=False)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(JobError, match=r"--rl .*model, an adapter of .*base: there is no such directory"):
        run_metrics(adapter, tmp_path / "moved", responses, measured, device="cpu", progress=False)


@pytest.mark.parametrize("targets", ["attention", "lm_head"])
def test_layers_that_can_not_have_adapters(run, targets):
    with pytest.raises(JobError, match=f"--lora-targets is '{targets}', which can not be trained: "):
        run(lora=2, lora_targets=targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "--samples is 1, expected an integer ≥ 2"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0, expected a number > 0"),
        ({"minibatches": 3}, "--minibatches is 3, expected a divisor of the 8 responses"),
        ({"micro_batch_size": 3}, "--micro-batch-size is 3, expected a divisor of the 4 responses"),
        ({"micro_batch_size": 2**31}, "--micro-batch-size is 2147483648, expected a divisor of the 4 responses"),
        ({"reweight": "high"}, "--reweight is 'high', expected one of low_prob"),
        ({"reweight": "dominate", "alpha": 1.5}, "--alpha is 1.5, expected at most 1"),
        ({"overlong_buffer": 9}, "--overlong-buffer is 9, expected at most --max-new-tokens"),
        ({"dual_clip": 1.0}, "--dual-clip is 1.0, expected a number > 1"),
        ({"lora": 0}, "--lora is 0, expected an integer ≥ 1"),
        ({"lora_targets": "q_proj"}, "--lora-targets is 'q_proj' without --lora"),
        ({"dtype": "fp16"}, "--dtype is 'fp16', expected one of fp32, bf16"),
        ({"temperature": 1e-40}, r"--temperature is 1e-40, expected a number in \[1e-30, 1e\+30\]"),
        ({"kl_beta": 1e35}, r"--kl-beta is 1e\+35, expected a size of at most 1e\+30"),
    ],
)
def test_options_that_can_not_be(options, message):
    with pytest.raises(JobError, match=message):
        check_training(replace(TRAINING, **options))


def test_what_can_not_be_used(run, tmp_path):
    with pytest.raises(JobError, match="--prompts is 9, expected at most 8"):
        run(prompts=9)
    with pytest.raises(JobError, match="no such file"):
        run(data="missing.jsonl")
    with pytest.raises(JobError, match="--grader"):
        run(grader="tiny_grader:late")
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_says_so(run, tmp_path):
    with pytest.raises(JobError, match=r"step \d: \w+ is nan, expected a finite number: the training has diverged"):
        run(learning_rate=1e38, warmup_steps=0)


# Fig. 5


def test_seeds_are_one_line_with_its_standard_error(tmp_path):
    directories = [write_run(tmp_path / f"low{seed}", seed) for seed in range(3)]
    directories += [write_run(tmp_path / f"none{seed}", seed, "none") for seed in range(2)]
    groups = grouped([read_run(directory) for directory in directories])
    assert [(group.label, len(group.runs)) for group in groups] == [("low-probability tokens, α = 0.2", 3), ("DAPO", 2)]
    drawn = line(groups[0], "eval_accuracy", smoothed=False)
    assert drawn.steps.tolist() == [0, 10, 20, 30, 40]
    assert drawn.mean[-1] == pytest.approx(1.01) and drawn.standard_error[-1] == pytest.approx(0.01 / np.sqrt(3))
    assert "| low-probability tokens, α = 0.2 | 3 | 40 |" in markdown(groups)
    files = plot_training(directories, tmp_path / "figures")
    assert [file.name for file in files] == ["training.png", "training.md"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    # A run that is under way: its steps are those that all have.
    half = write_run(tmp_path / "half", 7, steps=20)
    manifest = json.loads((half / "manifest.json").read_text())
    manifest["identity"]["training"]["steps"] = 40
    (half / "manifest.json").write_text(json.dumps(manifest))
    with open(half / "log.jsonl", "a") as file:
        file.write('{"step": 21, "entro')
    (group,) = grouped([read_run(half), read_run(directories[0])])
    assert line(group, "entropy").steps.tolist() == list(range(1, 21))


def test_groups_are_named_by_what_differs(tmp_path):
    runs = [
        write_run(tmp_path / "a", 0, learning_rate=1e-3),
        write_run(tmp_path / "b", 0, learning_rate=1e-4),
        write_run(tmp_path / "c", 0, held_out=False, learning_rate=1e-4),
    ]
    groups = grouped([read_run(directory) for directory in runs])
    assert [group.label.rpartition(", ")[2] for group in groups] == ["learning_rate 0.001", "learning_rate 0.0001"]
    assert line(groups[1], "eval_accuracy") is None and line(groups[0], "accuracy").standard_error is None


def test_the_command_draws_runs_and_refuses_others(tmp_path):
    first, second = write_run(tmp_path / "first", 0), write_run(tmp_path / "second", 1, "ppl")
    result = CliRunner().invoke(app, ["plot", str(first), str(second)])
    assert result.exit_code == 0, result.output
    assert (first / "figures" / "training.png").exists() and "training.md" in result.output
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(DatasetError, match=r"other has no log\.jsonl"):
        CliRunner().invoke(app, ["plot", str(first), str(other)], catch_exceptions=False)
    (other / "log.jsonl").write_text("")
    with pytest.raises(DatasetError, match="has no step yet"):
        plot_training([other])
    for log, message in (("[" * 100_000, "line 1 is not an entry"), (" " * 2**24 + "{}", "line 1 is longer than")):
        (other / "log.jsonl").write_text(f"{log}\n")
        with pytest.raises(DatasetError, match=message):
            plot_training([other])
