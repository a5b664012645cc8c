"""`run_metrics` of responses that this package, TRL and verl wrote."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")

import pyarrow as pa
import pyarrow.parquet as pq
from hf_models import one_thread  # noqa: F401
from pair_files import WORDS, random_rows, token_ids, write_lines

from dlogp_kernels.jobs.decoding import run_sweep
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.metrics import run_metrics
from dlogp_kernels.jobs.options import Decoding
from dlogp_kernels.report.dataset import TokenDataset
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.responses import BASE, RESPONSES_FILE, RL, Setting, read_responses

REPLACING = Setting("delta_logp", -0.5, 0.5)


@pytest.fixture(scope="module")
def drawn(pair, tmp_path_factory):
    """A directory of `dlogp sweep`: both models alone, and tokens replaced."""
    directory = tmp_path_factory.mktemp("drawn")
    problems = [{"id": f"p{n}", "prompt": " ".join(WORDS[n : n + 3]), "answer": "w1"} for n in range(4)]
    out, data = directory / "out", write_lines(directory / "problems.jsonl", problems)
    decoding = Decoding(samples=2, max_new_tokens=12, dtype="fp32", device="cpu")
    run_sweep(pair.rl, pair.base, data, out, settings=[BASE, RL, REPLACING], decoding=decoding, progress=False)
    return out


def measured(pair, data, out) -> TokenDataset:
    run_metrics(pair.rl, pair.base, data, out, dtype="fp32", device="cpu", batch_tokens=100, progress=False)
    return TokenDataset(out)


def draft_columns(tokens: pa.Table) -> list[list]:
    return [tokens[name].to_pylist() for name in ("draft_id", "draft_text")]


def test_what_was_drawn_is_measured_by_its_ids_with_all_that_is_known_of_it(pair, drawn, tmp_path):
    dataset = measured(pair, drawn, tmp_path / "out")
    responses = list(read_responses(drawn))
    for row, response in zip(dataset.responses().to_pylist(), responses, strict=True):
        tokens = dataset.tokens(["token_id", "delta_logp", "draft_id", "draft_text", "correct"], [row["line"]])
        assert tokens["token_id"].to_pylist() == response.token_ids
        assert row["prompt_ids"] == response.prompt_ids == token_ids(row["prompt"])
        assert (row["sample_id"], row["correct"]) == (response.problem_id, response.score)
        assert (row["finished"], row["num_tokens"]) == (response.finished, len(response.token_ids))
        assert set(tokens["correct"].to_pylist()) == {response.score}
        drafts = [(place, *draft) for place, draft in enumerate(zip(*draft_columns(tokens), strict=True)) if any(draft)]
        of_replaced = zip(response.selected, response.draft_ids, response.draft_texts, strict=True)
        # Where a model alone drew all tokens, none took the place of another.
        assert drafts == ([] if response.setting == RL else list(of_replaced))
    assert sum(len(response.selected) for response in responses if response.setting == REPLACING) > 3
    assert dataset.sources() == ["base", "rl", str(REPLACING)]
    assert dataset.origin().rl == str(pair.rl) and dataset.origin().temperature == 1.0


def test_the_rows_of_trl_and_verl_are_those_of_the_same_text(pair, tmp_path):
    rows = random_rows(8)
    plain = [{"prompt": row["prompt"], "response": row["response"], "correct": n % 2} for n, row in enumerate(rows)]
    expected = measured(pair, write_lines(tmp_path / "plain.jsonl", plain), tmp_path / "plain")

    def check(data, name, with_scores):
        found = measured(pair, data, tmp_path / name)
        columns = [column for column in expected.tokens(["line"]).column_names] + ["token_id", "delta_logp"]
        assert found.tokens(columns).equals(expected.tokens(columns))
        scores = [row["correct"] for row in found.responses().to_pylist()]
        assert scores == ([float(row["correct"]) for row in plain] if with_scores else [None] * 8)

    verl = tmp_path / "verl_steps"
    verl.mkdir()
    for step, begin in ((9, 0), (10, 4)):
        steps = [
            {"input": row["prompt"], "output": row["response"], "score": row["correct"], "step": step, "gts": "w1"}
            for row in plain[begin : begin + 4]
        ]
        write_lines(verl / f"{step}.jsonl", steps)
    check(verl, "verl", with_scores=True)
    trl = tmp_path / "trl_steps"
    trl.mkdir()
    for step, begin in ((9, 0), (10, 4)):
        some = plain[begin : begin + 4]
        columns = {"prompt": [row["prompt"] for row in some], "completion": [row["response"] for row in some]}
        pq.write_table(pa.table(columns | {"advantage": [0.5] * 4}), trl / f"completions_{step:05d}.parquet")
    check(trl, "trl", with_scores=False)


def test_conversations_of_trl_are_read_as_messages(pair, tmp_path):
    asked, said = [{"role": "user", "content": "w5 w6"}], [{"role": "assistant", "content": "w7"}]
    table = pa.table({"prompt": [asked], "completion": [said]})
    pq.write_table(table, tmp_path / "completions_00001.parquet")
    one = measured(pair, tmp_path / "completions_00001.parquet", tmp_path / "one")
    messages = write_lines(tmp_path / "messages.jsonl", [{"messages": asked + said}])
    assert one.responses().equals(measured(pair, messages, tmp_path / "two").responses())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "drawn by an earlier version, which did not keep the prompt"),
        ({"token_ids": "w1"}, "not a response as this version writes it"),
        ({"correct": "yes"}, "not a response as this version writes it"),
        (
            {"selected": [0], "delta_logp": [1], "draft_ids": [5], "draft_texts": ["\ud800"], "new_texts": ["w1"]},
            "draft_texts has half a surrogate pair",
        ),
    ],
)
def test_drawn_responses_that_can_not_be_measured(pair, drawn, tmp_path, change, message):
    line = json.loads((drawn / RESPONSES_FILE).read_text().splitlines()[0]) | change
    with pytest.raises(JobError, match=f"line 1: .*{message}"):
        measured(pair, write_lines(tmp_path / "some.jsonl", [line]), tmp_path / "out")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"correct": "yes"}, "correct is 'yes', expected a number, true or false"),
        ({"correct": 10**400}, "correct is 1000.*, expected a number"),
        ({"finished": 1}, "finished is 1, expected true or false"),
    ],
)
def test_scores_that_are_none(pair, tmp_path, columns, message):
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "w1", "response": "w2", **columns}])
    with pytest.raises(JobError, match=f"line 1: {message}"):
        measured(pair, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ({"prompt": [{"role": "user", "content": "w1"}], "completion": None}, "completion"),
        ({"prompt": None, "completion": "w1"}, "prompt"),
        ({"input": "w1", "output": None}, "output"),
        ({"input": float("nan"), "output": "w1"}, "input"),
    ],
)
def test_rollouts_without_text_are_told(pair, tmp_path, line, name):
    data = write_lines(tmp_path / "data.jsonl", [line])
    pq.write_table(pa.Table.from_pylist([line]), tmp_path / "data.parquet")
    for path in (data, tmp_path / "data.parquet"):
        with pytest.raises(JobError, match=f"line 1: {name} is null, expected text or messages"):
            measured(pair, path, tmp_path / "out")


def test_a_run_that_is_not_complete_is_measured_and_it_is_said(pair, drawn, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    # A kill may leave half a line.
    (begun / RESPONSES_FILE).write_bytes((drawn / RESPONSES_FILE).read_bytes() + b'{"id": "p')
    with pytest.warns(UserWarning, match="begun: the run is not complete: the part that is written is measured"):
        assert len(measured(pair, begun, tmp_path / "out").responses()) == len(list(read_responses(drawn)))


def test_directories_without_responses_and_with_damaged_ones(pair, drawn, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(JobError, match=r"a directory without any responses\.jsonl or completions_\*\.parquet or"):
        measured(pair, tmp_path / "empty", tmp_path / "out")
    file = drawn / RESPONSES_FILE
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"finished": true', b'"finished": null', 1))
    with pytest.raises(DatasetError, match="is damaged"):
        measured(pair, drawn, tmp_path / "out")
    file.write_bytes(whole)
