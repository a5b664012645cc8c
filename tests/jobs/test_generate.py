"""`run_generate` and `run_sweep`: what is drawn, what is written, kills and goings-on, and input that can not be."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")

import torch
from hf_models import one_thread  # noqa: F401
from pair_files import CONTEXT, VOCABULARY, WORDS, contents, token_ids, write_lines

from dlogp_kernels.hf import generate, load_model, load_tokenizer
from dlogp_kernels.hf.tiny import save_local, tiny_qwen3, word_tokenizer
from dlogp_kernels.jobs.decoding import run_generate, run_sweep
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.inputs.models import Reading, find_pair, read_pair
from dlogp_kernels.jobs.inputs.problems import read_problems
from dlogp_kernels.jobs.options import Decoding
from dlogp_kernels.jobs.settings import grid, parse_criteria, parse_numbers
from dlogp_kernels.report.responses import BASE, RL, Setting, read_responses

NUM_PROBLEMS = 11
DECODING = Decoding(
    samples=2, max_new_tokens=9, batch_size=3, chunk_size=4, dtype="fp32", device="cpu", top_p=0.9, temperature=0.8
)
SETTINGS = grid({"delta_logp": [-0.5], "kl": [0.7]}, [0.0, 0.5])
SEEDS = (0, 7)

# One interpreter for all the attempts, as in test_jobs_resume.py. Each is killed at the given moment: 3n is when the
# n-th chunk is about to be written, 3n + 1 when half of it is, 3n + 2 when it is, but not yet synchronised.
ATTEMPTS = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from dlogp_kernels.hf.tiny import load_local
from dlogp_kernels.jobs.resume import response_file
from dlogp_kernels.jobs.options import Decoding
from dlogp_kernels.jobs.decoding import run_sweep
from dlogp_kernels.report.responses import Setting

places, settings, seeds, decoding, moments = json.loads(sys.argv[1])
load_local(places[0])
append = response_file.ResponseFile.append

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at(moment):
    passed = []
    def watched(self, responses):
        begins, point = len(passed) * 3, moment - len(passed) * 3
        passed.append(None)
        if point == 0:
            response_file.open = lambda *_: kill()
        if point == 1:
            data = b"".join(map(response_file.to_line, responses))
            with open(self._path, "ab") as file:
                file.write(data[: len(data) // 2])
            kill()
        if point == 2:
            response_file.os = type("os", (), {"fsync": lambda _: kill()})
        append(self, responses)
    response_file.ResponseFile.append = watched

for moment in moments:
    child = os.fork()
    if child == 0:
        if moment is not None:
            kill_at(moment)
        run_sweep(*places, settings=[Setting(*x) for x in settings], seeds=seeds, decoding=Decoding(**decoding),
                  progress=False)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, os.path.getsize(places[3] + "/responses.jsonl")]), flush=True)
"""


class Files(NamedTuple):
    rl: Path
    base: Path
    data: Path


@pytest.fixture(scope="module")
def files(pair, tmp_path_factory) -> Files:
    rows = [
        {"id": f"problem {index}", "prompt": " ".join(WORDS[index : 2 * index + 1]), "answer": WORDS[index]}
        for index in range(NUM_PROBLEMS)
    ]
    return Files(pair.rl, pair.base, write_lines(tmp_path_factory.mktemp("data") / "problems.jsonl", rows))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run_sweep(*files, out, settings=SETTINGS, seeds=SEEDS, decoding=DECODING, progress=False)
    return out


def summary_of(out: Path) -> dict:
    summary = json.loads((out / "summary.json").read_text())
    assert summary.pop("seconds") > 0
    del summary["tokens_per_second"]
    return summary


def test_grid():
    assert grid({"delta_logp": [-1.0, -0.5], "all": [], "none": []}, [0.0, 0.1]) == [
        BASE,
        RL,
        *(Setting("delta_logp", threshold, gamma) for threshold in (-1.0, -0.5) for gamma in (0.0, 0.1)),
        Setting("all", None, 0.1),
    ]
    assert grid({"random": [0.1]}, draft="rl", baselines=False) == [Setting("random", 0.1, 0.0, "rl")]
    assert parse_criteria(["delta_logp:-1,-0.5", "all"]) == {"delta_logp": [-1.0, -0.5], "all": []}
    assert parse_numbers("--seed", "0,12", int) == [0, 12]


def test_rows_are_those_of_generate(files, whole):
    rl, base = (load_model(place, dtype=torch.float32) for place in (files.rl, files.base))
    tokenizer = load_tokenizer(files.rl)
    problems = [json.loads(line) for line in files.data.read_text().splitlines()]
    rows = list(read_responses(whole))
    expected_order = [
        (setting, seed, problem, sample)
        for setting in SETTINGS
        for seed in SEEDS
        for problem in range(NUM_PROBLEMS)
        for sample in range(2)
    ]
    assert [(row.setting, row.seed, row.problem, row.sample) for row in rows] == expected_order
    drawn = 0
    for row in rows[5::29]:
        ids = torch.tensor([token_ids(problems[row.problem]["prompt"])])
        # One row alone, which is the same whatever batch it was in.
        one = generate(
            rl, base, ids, **row.setting._asdict(), temperature=0.8, top_p=0.9, seed=row.seed, max_new_tokens=9,
            row_id=[row.problem * 2 + row.sample],
        )  # fmt: skip
        assert row.token_ids == one.tokens[0, : one.lengths[0]].tolist()
        assert row.text == tokenizer.decode(row.token_ids, skip_special_tokens=True)
        places = one.selected[0].nonzero().flatten()
        assert row.selected == places.tolist()
        assert row.draft_ids == one.draft_tokens[0, places].tolist()
        assert row.delta_logp == pytest.approx(one.delta_logp[0, places].tolist(), rel=1e-3, abs=1e-4)
        texts = (
            tokenizer.convert_ids_to_tokens(row.draft_ids),
            tokenizer.convert_ids_to_tokens([row.token_ids[place] for place in row.selected]),
        )
        assert (row.draft_texts, row.new_texts) == texts
        assert row.finished == bool(one.finished[0])
        assert row.problem_id == f"problem {row.problem}" and row.error is None
        drawn += len(row.selected)
    assert drawn > 10


def test_summary_says_what_the_rows_say(whole):
    summary = summary_of(whole)
    rows = [json.loads(line) for line in (whole / "responses.jsonl").read_text().splitlines()]
    assert summary["responses"] == len(rows) == len(SETTINGS) * len(SEEDS) * NUM_PROBLEMS * 2
    assert summary["tokens"] == sum(row["length"] for row in rows)
    assert [Setting(*(entry[name] for name in Setting._fields)) for entry in summary["settings"]] == SETTINGS
    for entry in summary["settings"]:
        mine = [row for row in rows if all(row[name] == entry[name] for name in Setting._fields)]
        assert entry["seeds"] == list(SEEDS) and entry["problems"] == NUM_PROBLEMS
        assert entry["accuracy"] == pytest.approx(sum(row["correct"] for row in mine) / len(mine))
        tokens = sum(row["length"] for row in mine)
        assert entry["replaced_share"] == pytest.approx(sum(len(row["selected"]) for row in mine) / tokens)
        assert entry["mean_length"] == pytest.approx(tokens / len(mine))
        assert entry["finished_share"] == pytest.approx(sum(row["finished"] for row in mine) / len(mine))
    shares = {entry["criterion"]: entry["replaced_share"] for entry in summary["settings"]}
    assert shares["none"] == 0 and shares["all"] == 1 and 0 < shares["delta_logp"] < 1
    assert sorted(path.name for path in whole.iterdir()) == ["manifest.json", "responses.jsonl", "summary.json"]


def test_generate_is_a_sweep_of_one_setting(files, whole, tmp_path):
    setting = Setting("delta_logp", -0.5, 0.5)
    run_generate(*files, tmp_path / "out", setting=setting, seed=7, decoding=DECODING, progress=False)
    mine = [row for row in read_responses(whole) if row.setting == setting and row.seed == 7]
    assert list(read_responses(tmp_path / "out")) == mine


def test_killed_and_resumed(files, whole, tmp_path):
    out = tmp_path / "out"
    num_chunks = len(SETTINGS) * len(SEEDS) * 6  # two problems in each
    moments = [0, 4, 2, 19, 8, 1, None]
    arguments = [
        [str(place) for place in (*files, out)],
        SETTINGS,
        SEEDS,
        DECODING.__dict__,
        moments,
    ]
    result = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "damaged" not in result.stderr, "what was not finished is taken for damaged"
    codes, sizes = zip(*map(json.loads, result.stdout.splitlines()), strict=True)
    assert codes == (-9,) * 6 + (0,)
    assert sizes[0] == 0 and 0 < sizes[1] < sizes[3] < sizes[6], "no progress was kept"
    assert (out / "responses.jsonl").read_bytes() == (whole / "responses.jsonl").read_bytes()
    assert summary_of(out) == summary_of(whole)
    assert len((whole / "responses.jsonl").read_bytes().splitlines()) == num_chunks * 4 - 2 * len(SETTINGS) * len(SEEDS)


@pytest.mark.parametrize("place", [0, 1, 700, -1, -400])
def test_goes_on_wherever_the_file_was_cut(files, whole, tmp_path, place):
    out, again = tmp_path / "out", Setting("delta_logp", -0.5, 0.5)
    run_generate(*files, out, setting=again, seed=7, decoding=DECODING, progress=False)
    complete = contents(out)
    (out / "summary.json").unlink()
    responses = complete["responses.jsonl"]
    (out / "responses.jsonl").write_bytes(responses[:place])
    left = (out / "responses.jsonl").read_bytes()
    with pytest.raises(JobError, match=r"seeds: \[7\] there, \[8\] now"):
        run_generate(*files, out, setting=again, seed=8, decoding=DECODING, progress=False)
    assert (out / "responses.jsonl").read_bytes() == left, "another run's directory was touched"
    summary = run_generate(*files, out, setting=again, seed=7, decoding=DECODING, progress=False, resume=True)
    assert (out / "responses.jsonl").read_bytes() == responses
    assert summary["settings"] == json.loads(complete["summary.json"])["settings"]
    # A complete run is left alone.
    written = (out / "responses.jsonl").stat().st_mtime_ns
    assert run_generate(*files, out, setting=again, seed=7, decoding=DECODING, progress=False) == summary
    assert (out / "responses.jsonl").stat().st_mtime_ns == written


def test_damaged_lines_are_drawn_again(files, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    written = (out / "responses.jsonl").read_bytes()
    lines = written.splitlines(keepends=True)
    for damaged in (
        written.replace(lines[2], b'{"id": 3}\n', 1),
        written[:700] + bytes([written[700] ^ 1]) + written[701:],
        written[:-9] + bytes(9),
    ):
        (out / "responses.jsonl").write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"responses\.jsonl is damaged: what is lost is drawn again"):
            run_sweep(*files, out, settings=SETTINGS, seeds=SEEDS, decoding=DECODING, progress=False)
        assert (out / "responses.jsonl").read_bytes() == written
        assert summary_of(out) == summary_of(whole)


GRADER = """
def grade(response, problem):
    if problem["id"] == "problem 3":
        raise RuntimeError("can not grade this")
    if problem["id"] == "problem 4":
        return "perhaps"
    return int(problem["id"].split()[1]) % 2
"""


def test_a_grader_that_raises_is_recorded_and_counted(files, tmp_path, monkeypatch):
    (tmp_path / "some_grader.py").write_text(GRADER)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    summary = run_generate(*files, out, setting=RL, decoding=DECODING, grader="some_grader:grade", progress=False)
    [entry] = summary["settings"]
    assert (summary["grader_errors"], entry["grader_errors"], entry["graded"], entry["responses"]) == (4, 4, 18, 22)
    assert entry["accuracy"] == pytest.approx(4 / 9)  # 1, 5, 7, 9 of those but 3 and 4
    rows = list(read_responses(out))
    assert {row.error for row in rows if row.problem == 3} == {"RuntimeError: can not grade this"}
    assert {row.error for row in rows if row.problem == 4} == {
        "TypeError: the grader returned 'perhaps', expected a bool or a number"
    }
    assert all(row.score is None for row in rows if row.problem in (3, 4))
    # A grader that was edited since is another one.
    (out / "summary.json").unlink()
    (tmp_path / "some_grader.py").write_text(GRADER + "\n")
    with pytest.raises(JobError, match="grader sha256"):
        run_generate(*files, out, setting=RL, decoding=DECODING, grader="some_grader:grade", progress=False)


BAD_DECODING = {
    "--grader-timeout is 0, expected a number > 0": {"grader_timeout": 0},
    "--max-line-size is 0, expected an integer": {"max_line_size": 0},
    "--temperature is -0.1": {"temperature": -0.1},
    "--temperature is nan": {"temperature": float("nan")},
    "--temperature is 1e-40": {"temperature": 1e-40},
    "--top-p is 0.0, expected a number in (0, 1]": {"top_p": 0.0},
    "--top-p is 1.5": {"top_p": 1.5},
    "--min-p is 1.5, expected a number in [0, 1]": {"min_p": 1.5},
    "--top-k is -1": {"top_k": -1},
    "--samples is 0": {"samples": 0},
    "--max-new-tokens is 0": {"max_new_tokens": 0},
    "--batch-size is 0": {"batch_size": 0},
    "--chunk-size is 0": {"chunk_size": 0},
    "--stop-token-id is -4": {"stop_token_ids": [-4]},
    "--dtype is 'int3'": {"dtype": "int3"},
    "--device is 'toaster'": {"device": "toaster"},
}
BAD_SETTINGS = {
    "--threshold is missing: the criterion delta_logp compares with it": Setting("delta_logp"),
    "--threshold is missing: the criterion random": Setting("random"),
    "--threshold is nan": Setting("kl", float("nan")),
    "--threshold is 3, but the criterion all has none": Setting("all", 3.0),
    "--criterion is 'magic', expected one of delta_logp": Setting("magic", 1.0),
    "--gamma is -0.1, expected a number ≥ 0": Setting("all", None, -0.1),
    "--gamma is inf": Setting("all", None, float("inf")),
    "--gamma is 1e+39": Setting("all", None, 1e39),
    "--draft is 'both', expected base or rl": Setting("all", None, 0.0, "both"),
}


@pytest.mark.parametrize("message", BAD_DECODING)
def test_options_out_of_range_are_named(files, tmp_path, message):
    options = {"dtype": "fp32", "device": "cpu"} | BAD_DECODING[message]
    with pytest.raises(JobError) as caught:
        run_generate(*files, tmp_path / "out", setting=RL, decoding=Decoding(**options), progress=False)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_that_can_not_be_are_named(files, tmp_path, message):
    with pytest.raises(JobError) as caught:
        run_sweep(*files, tmp_path / "out", settings=[RL, BAD_SETTINGS[message]], decoding=DECODING, progress=False)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_grids_that_can_not_be():
    cases = [
        (lambda: grid({"kl": []}), r"--criterion kl: the threshold is missing, expected kl:τ"),
        (lambda: parse_criteria(["kl:0.1", "kl:0.2"]), "--criterion kl is given twice"),
        (lambda: parse_criteria(["kl:a"]), "--criterion kl is 'a', expected numbers"),
        (lambda: parse_criteria(["Kl:1"]), "--criterion is 'Kl', expected one of"),
        (lambda: parse_numbers("--gamma", "", float), "--gamma is '', expected numbers"),
        (lambda: parse_numbers("--seed", "0.5", int), "--seed is '0.5', expected numbers"),
    ]
    for call, message in cases:
        with pytest.raises(JobError, match=message):
            call()


@pytest.mark.parametrize(
    ("settings", "seeds", "message"),
    [
        ([], (0,), "there is no setting"),
        ([RL, RL], (0,), "a setting is given twice"),
        ([RL], (), "--seed: there is none"),
        ([RL], (3, 3), "a seed is given twice"),
        ([RL], (-1,), "--seed is -1"),
    ],
)
def test_empty_and_double(files, tmp_path, settings, seeds, message):
    with pytest.raises(JobError, match=message):
        run_sweep(*files, tmp_path / "out", settings=settings, seeds=seeds, decoding=DECODING, progress=False)


def test_a_threshold_of_delta_logp_that_is_not_negative_warns_once(files, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setting = Setting("delta_logp", 0.0)
        run_generate(*files, tmp_path / "out", setting=setting, decoding=DECODING, progress=False)
    said = [str(warning.message) for warning in caught if "replaces nearly every" in str(warning.message)]
    assert len(said) == 1 and said[0].startswith("--threshold is 0 for the criterion delta_logp")


GOOD = {"prompt": "w1 w2", "answer": "w3"}
BROKEN = {
    "bad JSON": (b'{"prompt": "w1"', "not JSON: Expecting ',' delimiter"),
    "no prompt": ({"question": "w1", "answer": "w2"}, "it has 'question', 'answer'; expected prompt, or prompt_ids"),
    "no answer": ({"prompt": "w1"}, "missing columns: it has 'prompt'; expected answer"),
    "answer is a list": (GOOD | {"answer": ["w1"]}, "answer is a list, expected a string or a number"),
    "answer is a boolean": (GOOD | {"answer": True}, "answer is a boolean"),
    "answer is infinite": (b'{"prompt": "w1", "answer": 1e999}', "answer is inf, expected a string or a finite number"),
    "answer is NaN": (b'{"prompt": "w1", "answer": NaN}', "answer is nan, expected a string or a finite number"),
    "a key twice": (b'{"prompt": "w1", "answer": 1, "answer": 2}', "the key 'answer' is there 2 times"),
    "empty prompt": (GOOD | {"prompt": ""}, "the prompt has no tokens"),
    "prompt is a number": (GOOD | {"prompt": 3}, "prompt is a number, expected a string"),
    "unknown word": (GOOD | {"prompt": "elephant"}, "the tokenizer refuses it"),
    "id too large": ({"prompt_ids": [5, VOCABULARY], "answer": "w1"}, f"token 1 of the prompt is {VOCABULARY}"),
    "id is a list": (GOOD | {"id": [1]}, "id is [1], expected a string or an integer"),
    "assistant ends": ({"messages": [{"role": "assistant", "content": "w1"}], "answer": ""}, "that a user ends"),
    "beyond the context": (
        {"prompt_ids": [5] * (CONTEXT - 8), "answer": "w1"},
        f"the prompt has {CONTEXT - 8} tokens and --max-new-tokens is 9: together more than the context of the models, "
        f"{CONTEXT} tokens",
    ),
}


@pytest.fixture(scope="module")
def reading(files) -> Reading:
    return read_pair(*find_pair(files.rl, files.base, trust_remote_code=False))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_named(reading, tmp_path, kind):
    broken, reason = BROKEN[kind]
    data = write_lines(tmp_path / "data.jsonl", [GOOD, b"", broken, GOOD])
    with pytest.raises(JobError) as caught:
        read_problems(data, reading, max_new_tokens=DECODING.max_new_tokens, needs_answer=True)
    assert str(caught.value).startswith("--data: line 3: ") and reason in str(caught.value)


def test_a_broken_line_ends_a_run_before_anything_is_written(files, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [GOOD, b"", *(broken for broken, _ in BROKEN.values())])
    with pytest.raises(JobError, match="--data: line 3: not JSON"):
        run_generate(files.rl, files.base, data, tmp_path / "out", setting=RL, decoding=DECODING, progress=False)
    assert not (tmp_path / "out").exists()


def test_all_forms_of_a_prompt_and_the_longest_that_fits(files, tmp_path):
    rows = [
        {"prompt": "<bos> w1 w2 <sep>", "answer": "w3"},
        {"prompt_ids": [1, 5, 6, 3], "answer": "w3"},
        {"messages": [{"role": "user", "content": "w1 w2"}], "answer": "w3", "prompt_ids": None, "prompt": None},
        {"prompt_ids": [5] * (CONTEXT - 9), "answer": 3},
    ]
    data = write_lines(tmp_path / "data.jsonl", rows)
    decoding = Decoding(temperature=0.0, max_new_tokens=9, dtype="fp32", device="cpu", stop_token_ids=())
    run_generate(files.rl, files.base, data, tmp_path / "out", setting=RL, decoding=decoding, progress=False)
    found = list(read_responses(tmp_path / "out"))
    assert found[0].token_ids == found[1].token_ids == found[2].token_ids
    assert [row.problem_id for row in found] == ["1", "2", "3", "4"]
    assert [len(row.token_ids) for row in found] == [9] * 4


def test_ids_that_are_not_unique_and_lines_that_are_too_long_are_told(files, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [GOOD | {"id": name} for name in ("a", "b", "a", "a")])
    decoding = Decoding(max_new_tokens=1, dtype="fp32", device="cpu")
    with pytest.warns(UserWarning, match="ids that several problems have: 1, such as 'a' of lines 1 and 3"):
        run_generate(files.rl, files.base, data, tmp_path / "out", setting=RL, decoding=decoding, progress=False)
    decoding = replace(decoding, max_line_size=20)
    with pytest.raises(JobError, match="line 1: longer than 20 bytes"):
        run_generate(files.rl, files.base, data, tmp_path / "other", setting=RL, decoding=decoding, progress=False)


def test_files_and_models_that_can_not_be_used(files, tmp_path):
    empty = write_lines(tmp_path / "empty.jsonl", [])
    tokenizer = word_tokenizer([*WORDS[:-1], "other"])
    save_local(tiny_qwen3(len(tokenizer), hidden_size=32, num_layers=1, seed=1), tokenizer, tmp_path / "other")
    cases = [
        (files._replace(data=tmp_path / "absent"), "--data .*absent: there is no such file"),
        (files._replace(data=empty), "there is no line in it, expected one problem a line"),
        (files._replace(rl=tmp_path / "absent/model"), "--rl .*absent/model: there is no such directory"),
        (files._replace(base=tmp_path / "other"), "tokenizers of --rl .* and --base .* disagree: .*'other'"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for arguments, message in cases:
            with pytest.raises(JobError, match=message):
                run_generate(*arguments, tmp_path / "out", setting=RL, decoding=DECODING, progress=False)
    with pytest.raises(JobError, match="there is no run to go on with"):
        run_generate(*files, tmp_path / "out", setting=RL, decoding=DECODING, progress=False, resume=True)
    assert not (tmp_path / "out").exists()
