"""Data, models and arguments that can not be used: what is said, and that nothing is half-done."""

import json
import os
import shutil
import tracemalloc

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")

import pyarrow as pa
import pyarrow.parquet as pq
from pair_files import CONTEXT, VOCABULARY, WORDS, Pair, contents, random_rows, write_lines

from dlogp_kernels.hf.tiny import save_local, tiny_qwen3, word_tokenizer
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.inputs.records import read_records
from dlogp_kernels.jobs.metrics import run_metrics

GOOD = {"prompt": "w1 w2", "response": "w3 w4"}
USER = {"role": "user", "content": "w1"}
BROKEN = {
    "bad JSON": (b'{"prompt": "w1"', "not JSON: Expecting ',' delimiter at column 16"),
    "not UTF-8": (b'{"prompt": "w1", "response": "\xff"}', "not UTF-8: byte 0xff at column 31"),
    "not an object": (b"[1, 2]", "a JSON list, expected an object"),
    "deeply nested": (b"[" * 100_000, "not JSON that can be read"),
    "huge number": (b'{"id": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    "missing response": ({"prompt": "w1", "answer": "w2"}, "missing columns: it has 'prompt', 'answer'; expected"),
    "no columns": ({}, "missing columns: it has none"),
    "empty response": ({"prompt": "w1", "response": ""}, "the response is empty"),
    "empty ids": ({"prompt_ids": [5], "response_ids": []}, "the response is empty"),
    "empty prompt": ({"prompt": "", "response": "w1"}, "the prompt has no tokens"),
    "response of another type": ({"prompt": "w1", "response": ["w2"]}, "response is a list, expected a string"),
    "prompt is null": ({"prompt": None, "response": "w2"}, "prompt is a null, expected a string"),
    "half a character": (b'{"prompt": "w1", "response": "\\ud83d"}', "half a surrogate pair at character 1"),
    "id too large": ({"prompt_ids": [5], "response_ids": [6, VOCABULARY]}, f"token 1 of the response is {VOCABULARY},"),
    "id negative": ({"prompt_ids": [-1], "response_ids": [6]}, "token 0 of the prompt is -1, outside the vocabulary"),
    "id is a float": ({"prompt_ids": [5.0], "response_ids": [6]}, "prompt_ids[0] is 5.0, expected an integer"),
    "id is a boolean": ({"prompt_ids": [5], "response_ids": [True]}, "response_ids[0] is True, expected an integer"),
    "id beyond 64 bits": ({"prompt_ids": [5], "response_ids": [2**80]}, "outside the vocabulary"),
    "ids are text": ({"prompt_ids": "5", "response_ids": [6]}, "prompt_ids is a string, expected a list of integers"),
    "sample id is a list": (GOOD | {"id": [1]}, "id is [1], expected a string or an integer"),
    "source is a number": (GOOD | {"source": 3}, "source is a number, expected a string"),
    "unknown word": ({"prompt": "w1", "response": "elephant"}, "the tokenizer refuses it"),
    "a key twice": (
        b'{"prompt": "w1", "response": "w2", "prompt": "w3"}',
        "the key 'prompt' is there 2 times, expected each once",
    ),
    "a key of a message twice": (
        b'{"messages": [{"role": "user", "role": "user"}, {"role": "assistant", "content": "w2"}]}',
        "the key 'role' is there 2 times",
    ),
    "id beyond float": (b'{"prompt_ids": [5], "response_ids": [1e999]}', "response_ids[0] is inf, expected an integer"),
    "sample id is infinite": (b'{"prompt": "w1", "response": "w2", "id": -Infinity}', "id is -inf, expected a string"),
    "text is NaN": (b'{"prompt": "w1", "response": NaN}', "response is a number, expected a string"),
    "nested text": (b'{"prompt": "w1", "response": ' + b"[" * 900 + b"]" * 900 + b"}", "response is a list"),
    "nested call": (
        b'{"messages": [{"role": "user"}, {"role": "assistant", "tool_calls": [{"a": %s}]}]}'
        % (b"[" * 900 + b"]" * 900),
        "the chat template",
    ),
    "no role": ({"messages": [{"content": "w1"}, {"role": "assistant"}]}, "messages role is a null, expected a string"),
    "content is a number": ({"messages": [USER | {"content": 3}, USER]}, "messages content is a number"),
    "half a character in a call": (
        b'{"messages": [{"role": "user"}, {"role": "assistant", "tool_calls": [{"name": "\\ud83d"}]}]}',
        "messages has half a surrogate pair at character",
    ),
    "one message": ({"messages": [USER]}, "messages has 1 entries"),
    "user has the last word": ({"messages": [USER, USER]}, "the last message has the role 'user'"),
    "messages are text": ({"messages": "w1"}, "messages is a string, expected a list of objects"),
    "too long": (
        {"prompt_ids": [5] * 5, "response_ids": [6] * CONTEXT},
        f"prompt (5 tokens) and response ({CONTEXT}) are longer than the context of the models, {CONTEXT} tokens",
    ),
}


def run(pair: Pair, out, data=None, **options):
    settings = {"dtype": "fp32", "device": "cpu", "progress": False} | options
    return run_metrics(pair.rl, pair.base, data or pair.data, out, **settings)


# One that is no JSON, one that has no token ids, and one that is too long; the reasons of all are told below.
@pytest.mark.parametrize("kind", ["bad JSON", "unknown word", "too long"])
def test_a_broken_line_is_fatal_with_its_number_before_anything_is_written(pair, tmp_path, kind):
    broken, reason = BROKEN[kind]
    data = write_lines(tmp_path / "data.jsonl", [GOOD, b"", broken, GOOD])
    with pytest.raises(JobError) as caught:
        run(pair, tmp_path / "out", data)
    assert str(caught.value).startswith("--data: line 3: ")
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_broken_lines_are_skipped_and_listed(pair, tmp_path, capsys):
    rows = random_rows(len(BROKEN))
    good = write_lines(tmp_path / "good.jsonl", rows)
    lines = [line for row, (broken, _) in zip(rows, BROKEN.values(), strict=True) for line in (broken, row)]
    mixed = write_lines(tmp_path / "mixed.jsonl", lines)
    run(pair, tmp_path / "good", good)
    summary = run(pair, tmp_path / "mixed", mixed, on_error="skip", progress=True)
    assert [broken["line"] for broken in summary["broken_lines"]] == list(range(1, 2 * len(BROKEN), 2))
    for broken, (_, reason) in zip(summary["broken_lines"], BROKEN.values(), strict=True):
        assert reason in broken["reason"]
    assert summary == json.loads((tmp_path / "mixed" / "summary.json").read_text())
    found, expected = (pq.read_table(tmp_path / name / "tokens").drop_columns("line") for name in ("mixed", "good"))
    assert found.equals(expected)
    assert "skipped line 1: not JSON" in capsys.readouterr().err


def test_data_files_that_can_not_be_used(pair, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    write_lines(tmp_path / "blank.jsonl", [b"", b" "])
    write_lines(tmp_path / "broken.jsonl", [{"prompt": "w1"}, b"x"])
    pq.write_table(pa.table({"question": ["w1"], "answer": ["w2"]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"prompt": ["w1"], "response": ["w2"]}), tmp_path / "truncated.parquet")
    whole = (tmp_path / "truncated.parquet").read_bytes()
    (tmp_path / "truncated.parquet").write_bytes(whole[:-20])
    expected = {
        "absent.jsonl": "there is no such file",
        "empty.jsonl": "the file is empty",
        "blank.jsonl": "there is no line in it",
        "broken.jsonl": "none of its 2 lines can be used; line 1: missing columns",
        "columns.parquet": "it has the columns answer, question; expected prompt and response",
        "truncated.parquet": "not a readable Parquet file",
    }
    for name, message in expected.items():
        with pytest.raises(JobError) as caught:
            run(pair, tmp_path / "out", tmp_path / name, on_error="skip")
        assert message in str(caught.value), name
        assert not (tmp_path / "out").exists()


def test_a_line_may_have_so_many_bytes(pair, tmp_path):
    long = {"prompt": "w1", "response": "w2", "other": "x" * 1000}
    size = len(json.dumps(long))
    data = write_lines(tmp_path / "data.jsonl", [GOOD, long, long | {"other": "x" * 1001}, GOOD])
    with pytest.raises(JobError, match=f"line 3: longer than {size:,} bytes, the limit that --max-line-size sets"):
        run(pair, tmp_path / "out", data, max_line_size=size)
    summary = run(pair, tmp_path / "skipped", data, max_line_size=f"{size}B", on_error="skip")
    assert summary["responses"] == 3 and [broken["line"] for broken in summary["broken_lines"]] == [3]
    assert run(pair, tmp_path / "whole", data)["responses"] == 4


def test_a_longer_line_is_never_held_in_memory(tmp_path):
    path = tmp_path / "data.jsonl"
    with open(path, "wb") as file:
        file.truncate(200 * 2**20)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"prompt": "w1", "response": "w2"}')
    tracemalloc.start()
    long, good = read_records(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 48 * 2**20
    assert "longer than 16,777,216 bytes" in str(long.columns)
    assert good == (2, {"prompt": "w1", "response": "w2"})


def test_parquet_of_one_type_a_column(pair, tmp_path):
    chats = [
        [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", "tool_calls": None}],
        [
            {"role": "user", "content": "w1"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "w3", "arguments": {"a": 1}}}]},
            {"role": "tool", "tool_calls": [{"function": {"name": "w3", "arguments": {"b": 1}}}]},
        ],
    ]
    table = pa.table({"messages": chats, "id": ["x", "y"]})
    pq.write_table(table, tmp_path / "chats.parquet")
    first, second = (record.columns["messages"] for record in read_records(tmp_path / "chats.parquet"))
    assert first == [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    assert second[1] == chats[1][1]
    pq.write_table(table.append_column("id", table["id"]), tmp_path / "twice.parquet")
    with pytest.raises(JobError, match="it has the column id twice"):
        run(pair, tmp_path / "out", tmp_path / "twice.parquet")


def test_ids_that_are_not_unique_are_told(pair, tmp_path, capsys):
    rows = [GOOD | {"id": "a"}, GOOD | {"id": 4}, GOOD | {"id": "a"}, GOOD, GOOD | {"id": "a"}, GOOD]
    summary = run(pair, tmp_path / "out", write_lines(tmp_path / "data.jsonl", rows), progress=True)
    [remark] = summary["remarks"]
    assert (remark["lines"], remark["first_line"]) == (3, 3)
    assert "such as 'a' of line 1" in remark["text"]
    assert f"line 3 (3 lines in all): {remark['text']}" in capsys.readouterr().err
    tokens = pq.read_table(tmp_path / "out" / "tokens").to_pylist()
    assert {(row["sample_id"], row["line"]) for row in tokens} == {
        ("a", 1), ("4", 2), ("a", 3), ("4", 4), ("a", 5), ("6", 6)
    }  # fmt: skip


def test_a_null_in_parquet_is_a_broken_row(pair, tmp_path):
    pq.write_table(pa.table({"prompt": ["w1", "w1"], "response": ["w2", None]}), tmp_path / "data.parquet")
    with pytest.raises(JobError, match="line 2: response is a null, expected a string"):
        run(pair, tmp_path / "out", tmp_path / "data.parquet")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "has no base_model_name_or_path"),
        ({"base_model_name_or_path": 5}, "has no base_model_name_or_path"),
        ({"base_model_name_or_path": "{itself}"}, "it is itself an adapter, expected a whole model"),
    ],
)
def test_adapters_that_can_not_be_used(pair, tmp_path, config, message):
    pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    shutil.copytree(pair.rl, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config).replace("{itself}", str(adapter)))
    with pytest.raises(JobError, match=f"^--rl {adapter}.*{message}"):
        run(pair._replace(rl=adapter), tmp_path / "out")


def test_models_that_can_not_be_used(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("no_weights", "pickles", "no_config", "truncated", "fewer_weights"):
        shutil.copytree(pair.rl, tmp_path / name)
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    (tmp_path / "pickles" / "model.safetensors").rename(tmp_path / "pickles" / "pytorch_model.bin")
    (tmp_path / "no_config" / "config.json").unlink()
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = json.loads((tmp_path / "fewer_weights" / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    (tmp_path / "fewer_weights" / "config.json").write_text(json.dumps(config))
    expected = {
        tmp_path / "no_weights": "the directory has no weights, expected *.safetensors",
        tmp_path / "pickles": "pytorch_model.bin is a pickle, which is not opened",
        tmp_path / "no_config": "the directory has no config.json",
        tmp_path / "truncated": "the model can not be loaded",
        tmp_path / "fewer_weights": "the model can not be loaded",
        pair.data: "it is a file, expected a directory",
        "someone/something": "there is no such directory, and no model of that name could be had from the Hub",
    }
    for name, message in expected.items():
        for models in (pair._replace(rl=name), pair._replace(base=name)):
            with pytest.raises(JobError) as caught:
                run(models, tmp_path / "out")
            assert message in str(caught.value) and str(name) in str(caught.value), name
            assert not (tmp_path / "out").exists()


def test_tokenizers_that_disagree(pair, tmp_path):
    words = [*WORDS[1:], WORDS[0]]
    tokenizer = word_tokenizer(words)
    save_local(tiny_qwen3(len(tokenizer), hidden_size=32, num_layers=1, head_dim=16), tokenizer, tmp_path / "other")
    with pytest.raises(JobError, match=r"the tokenizers of --rl .* and --base .* disagree"):
        run(pair._replace(base=tmp_path / "other"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_smaller_vocabulary_and_context_count(pair, tmp_path):
    tokenizer = word_tokenizer(WORDS)
    padded = tiny_qwen3(len(tokenizer) + 36, hidden_size=32, num_layers=1, head_dim=16, max_position_embeddings=20)
    save_local(padded, tokenizer, tmp_path / "padded")
    other = pair._replace(rl=tmp_path / "padded")
    for ids, message in (([VOCABULARY], "outside the vocabulary"), ([5] * 20, "longer than the context")):
        data = write_lines(tmp_path / "data.jsonl", [{"prompt_ids": [5], "response_ids": ids}])
        for sequential in (False, True):
            with pytest.raises(JobError, match=message):
                run(other, tmp_path / "out", data, sequential=sequential)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "--batch-tokens is 0, expected at least 1"),
        ({"temperature": 0.0}, "--temperature is 0.0, expected a finite number > 0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": 1e-40}, "--temperature is 1e-40, expected a number in [1e-30, 1e+30]"),
        ({"temperature": 1e39}, "--temperature is 1e+39, expected a number in [1e-30, 1e+30]"),
        ({"dtype": "int8"}, "--dtype is 'int8', expected one of bf16, fp16, fp32"),
        ({"on_error": "ignore"}, "--on-error is 'ignore', expected raise or skip"),
        ({"memory_limit": "much"}, "--memory-limit: "),
        ({"max_line_size": "much"}, "--max-line-size is 'much', expected text such as"),
        ({"max_line_size": 0}, "--max-line-size is 0, expected more than 0 bytes"),
        ({"memory_limit": "1KiB"}, "memory_limit is 1024 bytes, expected at least"),
        ({"device": "abacus"}, "--device is 'abacus', which can not be used here"),
        ({"device": "abacus", "batch_tokens": 2**31}, "--device is 'abacus'"),
    ],
)
def test_arguments_that_do_not_fit(pair, tmp_path, options, message):
    with pytest.raises(JobError) as caught:
        run(pair, tmp_path / "out", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_was_there_stays(pair, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(JobError, match="line 1"):
        run(pair, out, write_lines(tmp_path / "data.jsonl", [b"x"]))
    assert out.is_dir() and contents(out) == {} and not list(out.iterdir())
