"""The command line: arguments reach the jobs, errors are one message on stderr, and `doctor` tells what there is."""

import inspect
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("typer")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

import pyarrow.parquet as pq
import torch
from hf_models import one_thread  # noqa: F401
from pair_files import Pair, contents, write_lines, write_pair
from tqdm import tqdm

import dlogp_kernels
from dlogp_kernels import backends, cli
from dlogp_kernels.cli import app
from dlogp_kernels.demo import curves as demo_curves
from dlogp_kernels.demo import memory, task
from dlogp_kernels.demo import run as demo_run
from dlogp_kernels.demo.generate import PAIR_DIRECTORY
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.inputs.records import line_limit
from dlogp_kernels.jobs.metrics import run_metrics
from dlogp_kernels.jobs.options import Comparing, Decoding, Training
from dlogp_kernels.report.responses import RL, Setting, collect, read_responses


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_defaults_are_those_of_the_jobs():
    jobs = {app.generate: Decoding(), app.sweep: Decoding(), app.train: Training(), app.compare: Comparing()}
    for command, job in jobs.items():
        parameters = inspect.signature(command).parameters
        shared = [name for name in parameters if hasattr(job, name)]
        assert {"dtype", "max_line_size", "grader_timeout"} <= set(shared)
        for name in shared:
            default = parameters[name].default
            default = line_limit(default) if name == "max_line_size" else getattr(default, "value", default)
            assert default == getattr(job, name), name


def metrics_arguments(pair: Pair, out: Path) -> list[object]:
    return ["metrics", "--rl", pair.rl, "--base", pair.base, "--data", pair.data, "--out", out, "--device", "cpu"]


def test_metrics_then_plot(pair, dlogp, tmp_path):
    out = tmp_path / "out"
    status, printed, errors = dlogp(*metrics_arguments(pair, out), "--dtype", "fp32", "--batch-tokens", 100)
    assert status == 0, errors
    assert "tokens/s" in errors and "Traceback" not in errors
    summary = json.loads((out / "summary.json").read_text())
    assert f"{summary['responses']} responses" in printed
    assert " ".join(summary["words"].split()) in " ".join(printed.split())
    assert str(out) in printed.replace("\n", "")
    run_metrics(*pair, tmp_path / "library", dtype="fp32", batch_tokens=100, device="cpu", progress=False)
    assert contents(out / "tokens") == contents(tmp_path / "library" / "tokens")
    classes = tmp_path / "classes.json"
    classes.write_text('{"odd words": ["w[0-9]*[13579]"]}')
    status, printed, errors = dlogp("plot", out, "--out", tmp_path / "figures", "--min-count", 3, "--classes", classes)
    assert status == 0, errors
    names = ("all_histograms", "gradient_mass", "histograms", "positions", "probabilities", "token_classes")
    pictures = [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert sorted(contents(tmp_path / "figures")) == [*pictures, "top_tokens.csv", "top_tokens.md"]
    assert "at least 3 times" in printed and "odd words" in printed and "not complete" not in printed
    status, _, errors = dlogp("plot", tmp_path / "figures", "--classes", classes)
    assert status == 1 and "only what `dlogp metrics` wrote has classes" in errors


def test_every_option_reaches_the_job(pair, dlogp, tmp_path, monkeypatch):
    received = {}

    def record(*arguments, **options):
        received.update(options, arguments=arguments, threads=torch.get_num_threads())
        return run_metrics(*pair, tmp_path / "out", device="cpu", progress=False)

    monkeypatch.setattr("dlogp_kernels.jobs.metrics.run_metrics", record)
    options = ["--memory-limit", "4GiB", "--batch-tokens", 77, "--dtype", "fp16", "--sequential", "--resume"]
    options += ["--on-error", "skip", "--temperature", 0.7, "--trust-remote-code", "--max-line-size", "1MiB"]
    options += ["--engine", "ray", "--address", "auto", "--devices", "2"]
    threads = torch.get_num_threads()
    status, _, errors = dlogp(*metrics_arguments(pair, tmp_path / "out"), *options, "--threads", threads + 1)
    torch.set_num_threads(threads)
    assert status == 0, errors
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["arguments"]["batch_tokens"] == 1024
    assert received == {
        "arguments": (str(pair.rl), str(pair.base), pair.data, tmp_path / "out"),
        "threads": threads + 1,
        "memory_limit": "4GiB",
        "batch_tokens": 77,
        "dtype": "fp16",
        "device": "cpu",
        "sequential": True,
        "resume": True,
        "on_error": "skip",
        "temperature": 0.7,
        "trust_remote_code": True,
        "max_line_size": "1MiB",
        "engine": "ray",
        "address": "auto",
        "devices": "2",
    }


def test_compare_prints_accuracies_numbers_and_where_the_page_is(pair, dlogp, tmp_path):
    problems = [{"id": name, "prompt": f"{name} w3", "answer": "w4"} for name in ("w1", "w2")]
    problems = write_lines(tmp_path / "problems.jsonl", problems)
    options = ["--data", problems, "--out", tmp_path / "out", "--max-new-tokens", 5, "--device", "cpu"]
    status, printed, errors = dlogp("compare", "--rl", pair.rl, "--base", pair.base, *options)
    assert status == 0, errors
    for said in ("Accuracy and replaced tokens", "Response tokens: means", "histograms.png", "view.html"):
        assert said in printed
    assert (tmp_path / "out" / "view.html").exists()
    status, _, errors = dlogp("compare", "--rl", pair.rl, "--base", pair.base, "--out", tmp_path / "none")
    assert status == 1 and errors.startswith("error: --data, --responses: expected one of them")


def test_errors_are_one_message_on_stderr(pair, dlogp, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "w1", "response": "w2"}, b"[red]no JSON[/red]"])
    broken = metrics_arguments(pair._replace(data=data), tmp_path / "out")
    (tmp_path / "a file").touch()
    cases = [
        (broken, 1, "error: --data: line 2: not JSON"),
        (metrics_arguments(pair._replace(data=tmp_path / "absent"), tmp_path / "out"), 1, "there is no such file"),
        ([*metrics_arguments(pair, tmp_path / "out"), "--resume"], 1, "there is no run to go on with"),
        (["plot", tmp_path], 1, "holds no token statistics"),
        (metrics_arguments(pair, tmp_path / "a file" / "out"), 1, "writing failed (Not a directory)"),
        ([*metrics_arguments(pair, tmp_path / "out"), "--dtype", "int3"], 2, "'int3'"),
        (["metrics", "--rl", pair.rl], 2, "--base"),
        (["measure"], 2, "measure"),
        (["demo", "--problems", 0, "--out", tmp_path / "out"], 1, "--problems is 0, expected at least 1"),
        (["demo", "--llm", "--problems", 0, "--out", tmp_path / "out"], 1, "--problems is 0, expected at least 1"),
        (["demo", "--llm", "--curves"], 2, "--llm and --curves are given together, expected one of them"),
    ]
    for arguments, expected_status, message in cases:
        status, printed, errors = dlogp(*arguments)
        assert status == expected_status, errors
        assert message in errors and "Traceback" not in errors and printed == ""
    assert not (tmp_path / "out").exists()


#: What comes in place of a file: how it is made, and what is said of it.
NO_FILES = {
    "a directory": (Path.mkdir, "it is a directory, expected a file"),
    "a pipe": (os.mkfifo, "it is a pipe or a device, expected a file that can be read again"),
    "nothing": (lambda path: None, "there is no such file"),
    "below a file": (lambda path: path.parent.with_suffix(".jsonl").touch(), "there is no such file"),
    "a name too long": (lambda path: None, "it can not be read (File name too long)"),
    "Parquet": (lambda path: path.write_bytes(b"PAR1"), "it is a Parquet file, expected JSONL"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_of_data_is_named_with_its_option(pair, dlogp, tmp_path, kind):
    make, said = NO_FILES[kind]
    path = tmp_path / ("x" * 300 if kind == "a name too long" else "data.jsonl")
    make(path)
    good = write_problems(tmp_path / "good.jsonl", 2)
    models = ["--rl", pair.rl, "--base", pair.base, "--out", tmp_path / "out", "--device", "cpu"]
    commands = [
        ("--data", ["generate", *models, "--data", path, "--threshold", "-1"]),
        ("--data", ["train", *models[2:], "--data", path]),
        ("--eval-data", ["train", *models[2:], "--data", good, "--eval-data", path]),
    ]
    # These it takes, a directory with the right files.
    if kind not in ("Parquet", "a directory"):
        commands.append(("--data", ["metrics", *models, "--data", path]))
    for option, arguments in commands:
        status, _, errors = dlogp(*arguments)
        assert status == 1 and errors.startswith(f"error: {option} {path}: {said}") and errors.count("\n") == 1


#: Options that the demo pair is drawn from with, and what is said.
BAD_OPTIONS = {
    "generate --threshold=-inf": "--threshold is -inf, expected a number within the range of float32",
    "generate --threshold=1e39": "--threshold is 1e+39, expected a number within the range of float32",
    "generate --threshold=-1 --gamma=1e39": "--gamma is 1e+39, expected a size of at most 1e+30",
    "generate --threshold=2 --criterion=random": "--threshold is 2.0, expected a number in [0, 1], a probability",
    "generate --threshold=-1 --device=meta": "--device is 'meta', which can not be used here: expected cpu or cuda",
    "generate --threshold=-1 --device=hpu": "--device is 'hpu', which can not be used here: expected cpu or cuda",
    "generate --threshold=-1 --device=cpu:-1": "--device is 'cpu:-1', which can not be used here",
    "sweep --criterion=kl:inf": "--threshold is inf, expected a number within the range of float32",
    "sweep --criterion=kl:nan": "--threshold is nan, expected a number within the range of float32",
    "sweep --criterion=random:-0.1": "--threshold is -0.1, expected a number in [0, 1], a probability",
    "sweep --criterion=kl:1,1": "--criterion kl is '1,1', in which a number is given twice, expected each once",
    "sweep --criterion=all --gamma=0,0.0": "--gamma is '0,0.0', in which a number is given twice",
    "metrics --device=mps": "--device is 'mps', which can not be used here: expected cpu or cuda",
    "train --seed=4294967296": "--seed is 4294967296, expected an integer in [0, 2**32)",
    f"train --steps=1{400 * '0'}": f"--steps is 1{400 * '0'}, expected an integer ≥ 1, below 2**31",
    "train --samples=2147483648": "--samples is 2147483648, expected an integer ≥ 2, below 2**31",
    "train --eval-every=0": "--eval-every is 0, expected an integer ≥ 1",
}


@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_values_that_can_not_be_are_one_message(dlogp, tmp_path, line):
    command, *options = line.split()
    models = ["--base", PAIR_DIRECTORY / "base", *(["--rl", PAIR_DIRECTORY / "rl"] if command != "train" else [])]
    data = write_problems(tmp_path / "problems.jsonl", 2)
    status, _, errors = dlogp(command, *models, "--data", data, "--out", tmp_path / "out", *options)
    assert status == 1 and errors.startswith(f"error: {BAD_OPTIONS[line]}") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_option_is_given_once_and_in_unicode(dlogp):
    status, _, errors = dlogp("generate", "--rl", "a", "--base", "b", "--rl", "c")
    assert status == 2 and "--rl is given 2 times, expected once" in errors
    status, _, errors = dlogp("metrics", "--rl", os.fsdecode(b"\xff"))
    assert status == 2 and "\\udcff is not UTF-8" in errors


def test_characters_that_a_terminal_lacks_are_spelt_out(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "argv", ["dlogp", "train", "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    sys.stdout.flush()
    assert not end.value.code and b"\\u03b1" in written.getvalue()


@pytest.mark.parametrize("command", ["metrics", "sweep"])
def test_progress_is_shown_while_the_first_prompts_run(dlogp, tmp_path, command):
    data = write_problems(tmp_path / "problems.jsonl", 2)
    data.write_text(data.read_text().replace("}", ', "response": "so a"}'))
    models = ["--rl", PAIR_DIRECTORY / "rl", "--base", PAIR_DIRECTORY / "base", "--dtype", "fp32", "--device", "cpu"]
    options = ["--criterion", "kl:0.1", "--no-baselines", "--max-new-tokens", 2] if command == "sweep" else []
    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqdm, "set_postfix_str", lambda self, text, refresh=True: heard.append((self.n, text)))
        status, _, errors = dlogp(command, *models, "--data", data, "--out", tmp_path / "out", *options)
    assert status == 0, errors
    assert heard[:6] == [(0, f"layer {number}/6") for number in range(1, 7)]
    # Once a step is done, there is more to tell than layers.
    of_layers = ["layer" in text for _, text in heard]
    assert of_layers == sorted(of_layers, reverse=True) and of_layers[-1] == (command == "metrics")


def write_problems(path: Path, count: int) -> Path:
    problems = task.generate_problems(count, 9)
    return write_lines(path, [{"prompt": problem.prompt, "answer": str(problem.answer)} for problem in problems])


def on_demo_pair(command: str, data: Path, out: Path, *options: object) -> list[object]:
    models = ["--rl", PAIR_DIRECTORY / "rl", "--base", PAIR_DIRECTORY / "base"]
    shared = ["--data", data, "--out", out, "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", 45]
    return [command, *models, *shared, *options]


def test_generate_sweep_and_plot_on_the_demo_pair(dlogp, tmp_path):
    data = write_problems(tmp_path / "problems.jsonl", 12)
    status, printed, errors = dlogp(
        *on_demo_pair("generate", data, tmp_path / "one", "--threshold", -0.5, "--gamma", 0.5, "--seed", 3)
    )
    assert status == 0, errors
    assert "tokens/s" in errors and "replaced" in errors and "accuracy" in errors
    rows = list(read_responses(tmp_path / "one"))
    assert [row.problem for row in rows] == list(range(12))
    accuracy = sum(row.score for row in rows) / 12
    assert accuracy > 0.6 and f"{accuracy:.3f} ± " in printed and "Δlog p < -0.5, γ = 0.5" in printed
    for row, line in zip(rows, data.read_text().splitlines(), strict=True):
        assert row.text.endswith(f"# {json.loads(line)['answer']}") == bool(row.score)
        assert row.draft_texts.count("jump") == sum(row.draft_ids[i] == 19 for i in range(len(row.draft_ids)))

    grid = ["--criterion", "delta_logp:-1,-0.5", "--criterion", "random:0.1", "--gamma", "0,0.5", "--seed", "3,4"]
    status, printed, errors = dlogp(*on_demo_pair("sweep", data, tmp_path / "grid", *grid))
    assert status == 0, errors
    assert "everywhere" in printed and "u < 0.1, γ = 0.5" in printed
    found = list(read_responses(tmp_path / "grid"))
    assert len(found) == (2 + 4 + 2) * 2 * 12
    # The same setting, seed and problem: the same response, in another run of another batch.
    mine = [row for row in found if row.setting == rows[0].setting and row.seed == 3]
    assert [row.token_ids for row in mine] == [row.token_ids for row in rows]
    status, printed, errors = dlogp("plot", tmp_path / "grid", "--out", tmp_path / "figures")
    assert status == 0, errors
    assert len(contents(tmp_path / "figures")) == 8 and "jump" in printed
    assert "<code>jump</code>" in (tmp_path / "figures" / "replaced_tokens.html").read_text()
    status, _, errors = dlogp(*on_demo_pair("sweep", data, tmp_path / "grid", *grid, "--resume"))
    assert status == 0, errors


def test_every_option_of_generate_and_sweep_reaches_the_job(dlogp, tmp_path, monkeypatch):
    received = {}

    def record(*arguments, **options):
        received.update(options, arguments=arguments)
        raise JobError("enough")

    monkeypatch.setattr("dlogp_kernels.jobs.decoding.run_generate", record)
    monkeypatch.setattr("dlogp_kernels.jobs.decoding.run_sweep", record)
    common = ["--rl", "R", "--base", "B", "--data", "D", "--out", tmp_path, "--draft", "rl", "--grader", "m:f"]
    common += ["--temperature", 0.6, "--top-k", 5, "--top-p", 0.7, "--min-p", 0.01, "--samples", 4]
    common += ["--max-new-tokens", 77, "--stop-token-id", 3, "--stop-token-id", 4, "--batch-size", 9]
    common += ["--chunk-size", 18, "--dtype", "fp16", "--device", "cpu", "--resume", "--trust-remote-code"]
    common += ["--engine", "ray", "--address", "auto", "--devices", "2"]
    shared = {
        "arguments": ("R", "B", Path("D"), tmp_path),
        "decoding": Decoding(0.6, 5, 0.7, 0.01, 4, 77, [3, 4], 9, 18, "fp16", "cpu", True),
        "grader": "m:f",
        "resume": True,
        "engine": "ray",
        "address": "auto",
        "devices": "2",
    }
    dlogp("generate", "--criterion", "kl", "--threshold", 0.2, "--gamma", 0.1, "--seed", 5, *common)
    assert received == shared | {"setting": Setting("kl", 0.2, 0.1, "rl"), "seed": 5}
    received.clear()
    dlogp("sweep", "--criterion", "kl:0.2,0.3", "--gamma", "0.1", "--seed", "5,6", "--no-baselines", *common)
    settings = [Setting("kl", threshold, 0.1, "rl") for threshold in (0.2, 0.3)]
    assert received == shared | {"settings": settings, "seeds": [5, 6]}


def test_errors_and_warnings_of_generate_and_sweep(pair, dlogp, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "w1", "answer": "w2"}])
    models = ["--rl", pair.rl, "--base", pair.base, "--data", data, "--out", tmp_path / "out", "--device", "cpu"]
    long = ["--threshold", "-1", "--max-new-tokens", 64]
    cases = [
        (["generate", *models], 1, "error: --threshold is missing: the criterion delta_logp compares with it"),
        (["generate", *models, *long], 1, "error: --data: line 1: the prompt has 1 tokens and --max-new-tokens is 64"),
        (["generate", *models, "--criterion", "all", "--top-p", 1.5], 1, "error: --top-p is 1.5, expected a number in"),
        (["generate", *models, "--criterion", "all", "--gamma", "-1"], 1, "error: --gamma is -1"),
        (["generate", *models, "--criterion", "all", "--grader", "math"], 1, "error: --grader is 'math', expected"),
        (["generate", *models, "--draft", "both"], 2, "--draft"),
        (["sweep", *models], 2, "--criterion"),
        (["sweep", *models, "--criterion", "kl"], 1, "error: --criterion kl: the threshold is missing, expected kl:τ"),
        (["sweep", *models, "--criterion", "all", "--gamma", "a"], 1, "error: --gamma is 'a', expected numbers"),
    ]
    for arguments, expected_status, message in cases:
        status, printed, errors = dlogp(*arguments)
        assert status == expected_status, errors
        assert message in errors and "Traceback" not in errors and printed == ""
    assert not (tmp_path / "out").exists()
    status, _, errors = dlogp("generate", *models, "--threshold", 0.5, "--max-new-tokens", 4)
    assert status == 0
    assert errors.count("warning: --threshold is 0.5 for the criterion delta_logp: one that is not below 0") == 1
    assert ".py" not in errors


def test_demo_curves(dlogp, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_curves, "CALIBRATION_PROBLEMS", 60)
    arguments = ["demo", "--curves", "--problems", 10, "--out", tmp_path]
    status, printed, errors = dlogp(*arguments)
    assert status == 0, errors
    directory = tmp_path / "curves-10-problems"
    results = collect(read_responses(directory / "sweep")).results()
    by_criterion = Counter(result.setting.criterion for result in results)
    # Six shares of each; three γ at four of the thresholds of Δlog p, and everywhere.
    assert by_criterion == {"none": 1, "all": 4, "delta_logp": 18, "kl": 6, "entropy": 6, "random": 6}
    # Thresholds are quantiles of what base responses have: comparable shares come out.
    for criterion in ("delta_logp", "kl", "entropy", "random"):
        chosen = [r for r in results if r.setting.criterion == criterion and r.setting.gamma == 0]
        shares = sorted(result.replaced_share.mean for result in chosen)
        assert all(
            share / 3 - 0.02 < found < share * 3 for share, found in zip(demo_curves.SHARES, shares, strict=True)
        )
    figures = sorted(path.name for path in (directory / "sweep" / "figures").glob("*.png"))
    assert figures == ["accuracy_by_share.png", "extrapolation.png", "threshold_gamma.png"]
    summary = (directory / "summary.md").read_text()
    rl = next(result for result in results if result.setting == RL)
    assert f"RL model: {rl.accuracy}" in summary and "minus" in printed
    before = contents(directory / "sweep")
    (directory / "sweep" / "summary.json").unlink()
    status, _, errors = dlogp(*arguments)
    assert status == 0, errors
    after = contents(directory / "sweep")
    assert after["responses.jsonl"] == before["responses.jsonl"] and after.keys() == before.keys()


def test_a_missing_package_is_named_with_its_extra(dlogp, monkeypatch):
    monkeypatch.setattr(cli, "_NEEDED", ("rich", "no_such_package"))
    status, _, _ = dlogp("doctor")
    assert "no_such_package can not be imported" in status and 'pip install --no-build-isolation -e ".[cli]"' in status


def test_module_can_be_run_and_imports_nothing_heavy_for_help():
    code = "import sys; sys.argv = ['dlogp', '--help']\nfrom dlogp_kernels import cli\ntry:\n    cli.main()\n"
    code += "finally:\n    assert not {'transformers', 'matplotlib', 'pandas'} & set(sys.modules), 'heavy import'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    for command in ("metrics", "generate", "sweep", "plot", "doctor", "demo"):
        assert command in result.stdout
    result = subprocess.run(
        [sys.executable, "-m", "dlogp_kernels.cli", "plot", "/nowhere"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: /nowhere holds no token statistics") and result.stderr.count("\n") == 1


def test_doctor_json(dlogp):
    status, printed, _ = dlogp("doctor", "--json")
    report = json.loads(printed)
    assert status == 0
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["versions"]["dlogp_kernels"] == dlogp_kernels.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["processor"]["cores"] == os.cpu_count()
    assert report["processor"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["backends"] == [choice._asdict() for choice in backends.report()]


def test_doctor_says_why_not_another_backend(dlogp, monkeypatch):
    monkeypatch.setitem(backends._extension_problems, "cpu", "the compiled extension fell overboard")
    status, printed, _ = dlogp("doctor")
    assert status == 0
    assert "linear_delta_logp_fwd" in printed and "reference" in printed
    assert "fell overboard" in " ".join(printed.replace("│", " ").split())
    assert torch.__version__ in printed


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.11.0+cu130", "torch 2.11.0+cu130: tried on an H100"),
        ("2.14.1", "torch 2.14.1: tried without a GPU"),
        (
            "2.15.0",
            "torch 2.15.0: not tried; tried: 2.11 (on an H100), 2.13 (without a GPU), 2.14 (without a GPU)",
        ),
    ],
)
def test_doctor_says_whether_this_torch_was_tried(dlogp, monkeypatch, version, said):
    monkeypatch.setattr(torch, "__version__", version)
    status, printed, _ = dlogp("doctor")
    assert status == 0 and said in printed.splitlines()


def test_demo_runs_on_the_pair_that_comes_along(dlogp, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_run, "measure_in_subprocess", lambda tokens: memory.Measurement(tokens, 1.5, 2**29, 2**23))
    out = tmp_path / "demo"
    status, printed, errors = dlogp("demo", "--problems", 24, "--out", out)
    assert status == 0, errors
    out = out / "24-problems"
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == ["base"] * 24 + ["rl"] * 24
    for source in ("base", "rl"):
        mean = sum(row["correct"] for row in rows if row["source"] == source) / 24
        assert f"{mean:.3f} ± {(mean * (1 - mean) / 24) ** 0.5:.3f}" in printed
    table = pq.read_table(out / "metrics" / "tokens").to_pandas()
    assert " ".join(table[table["sample_id"] == "rl-00003"]["token_text"]) == rows[24 + 3]["response"]
    assert (out / "metrics" / "figures" / "histograms.png").stat().st_size > 20_000
    words = " ".join(printed.split())
    assert "8 MiB over inputs (512 MiB)" in words
    # Twice 8192 × 151 936 × 4 bytes, and twice that.
    assert "would take 9.3 GiB, 18.5 GiB with a log-softmax" in words


def test_demo_does_not_train_over_a_pair(dlogp, tmp_path):
    (tmp_path / "pair").mkdir()
    status, _, errors = dlogp("demo", "--retrain", "--out", tmp_path)
    assert status == 1 and "it holds a pair already" in errors


def test_memory_is_measured_over_inputs_and_outputs():
    found = memory.measure_in_subprocess(64)
    inputs = 2 * (64 + memory.VOCABULARY) * memory.HIDDEN_SIZE * 2 + 64 * 8
    assert (found.num_tokens, found.input_bytes) == (64, inputs)
    # Neither the weights nor a buffer of full float32 weights is in it.
    assert 0 <= found.extra_bytes < 400 * 2**20 and found.seconds > 0
    assert found.logits_bytes == 2 * 64 * 151_936 * 4
