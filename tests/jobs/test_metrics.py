"""The metrics job against full logits, its forms of data, and what must not change its numbers."""

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pair_files import Pair, contents, random_rows, token_ids, write_lines, write_pair
from safetensors.torch import load_file

from dlogp_kernels.hf.tiny import load_local, save_local
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.metrics import run_metrics
from dlogp_kernels.jobs.resume.plan import BATCHES_PER_PART, cut_batches, cut_parts
from dlogp_kernels.report.dataset import SCHEMA, STATISTICS

# float32 of the whole model against float64 of its logits: a few roundings of logits of a size of about 10.
ROUNDING = 2e-5
NUMBERS = [field.name for field in SCHEMA if pa.types.is_floating(field.type) and field.name != "correct"]
KEYS = [name for name in SCHEMA.names if name not in NUMBERS]


def run(pair: Pair, out, data=None, **options) -> pa.Table:
    settings = {"dtype": "fp32", "batch_tokens": 100, "device": "cpu", "progress": False} | options
    run_metrics(pair.rl, pair.base, data or pair.data, out, **settings)
    return pq.read_table(out / "tokens")


@pytest.fixture(scope="module")
def table(pair, tmp_path_factory) -> pa.Table:
    return run(pair, tmp_path_factory.mktemp("joint") / "out")


def largest_difference(one: pa.Table, other: pa.Table) -> float:
    assert one.select(KEYS).equals(other.select(KEYS))
    return max(np.abs(one[name].to_numpy() - other[name].to_numpy()).max() for name in NUMBERS)


def expected_rows(pair: Pair, temperature: float = 1.0) -> dict[str, list]:
    """Every column, by log_softmax of the full logits of each sample alone."""
    (rl, _), (base, _) = load_local(pair.rl), load_local(pair.base)
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    for line, row in enumerate(map(json.loads, pair.data.read_text().splitlines()), 1):
        prompt, response = token_ids(row["prompt"]), token_ids(row["response"])
        input_ids = torch.tensor([prompt + response])
        with torch.no_grad():
            z, z_base = (
                model(input_ids).logits[0, len(prompt) - 1 : -1].double() / temperature for model in (rl, base)
            )
        p, q = z.log_softmax(-1), z_base.log_softmax(-1)
        taken = torch.arange(len(response)), torch.tensor(response)
        values = {
            "delta_logp": p[taken] - q[taken],
            "logp": p[taken],
            "base_logp": q[taken],
            "entropy": -(p.exp() * p).sum(-1),
            "base_entropy": -(q.exp() * q).sum(-1),
            "kl": (p.exp() * (p - q)).sum(-1),
            "reverse_kl": (q.exp() * (q - p)).sum(-1),
            "lse": z.logsumexp(-1),
            "base_lse": z_base.logsumexp(-1),
            "top_token": z.argmax(-1),
            "top_logp": p.amax(-1),
            "base_top_token": z_base.argmax(-1),
            "base_top_logp": q.amax(-1),
            "sample_id": [row["id"]] * len(response),
            "line": [line] * len(response),
            "source": [row["source"]] * len(response),
            "position": range(len(response)),
            "token_id": response,
            "token_text": row["response"].split(),
            **dict.fromkeys(("correct", "finished", "draft_id", "draft_text"), [None] * len(response)),
        }
        for name, column in columns.items():
            column += values[name].tolist() if torch.is_tensor(values[name]) else list(values[name])
    return columns


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_row_is_that_of_log_softmax_of_full_logits(pair, tmp_path, temperature):
    found = run(pair, tmp_path / "out", temperature=temperature)
    assert found.schema.equals(SCHEMA)
    expected = expected_rows(pair, temperature)
    for name in KEYS:
        assert found[name].to_pylist() == expected[name], name
    for name in NUMBERS:
        error = np.abs(found[name].to_numpy() - np.array(expected[name])).max()
        assert error < ROUNDING, (name, error)
    # The pair is such that a mistake would show.
    assert np.abs(found["delta_logp"].to_numpy()).max() > 1


def test_batch_tokens_and_memory_limit_change_rounding_only(pair, table, tmp_path):
    for name, options in {"one": {"batch_tokens": 1}, "all": {"batch_tokens": 10**6}}.items():
        assert largest_difference(table, run(pair, tmp_path / name, **options)) < ROUNDING
    limited = run(pair, tmp_path / "limited", memory_limit="60MiB", batch_tokens=1000)
    assert largest_difference(table, limited) < ROUNDING


def test_sequential_gives_the_same_numbers_and_leaves_nothing_behind(pair, table, tmp_path):
    out = tmp_path / "out"
    assert largest_difference(table, run(pair, out, sequential=True)) == 0
    assert not (out / ".work").exists()
    limited = run(pair, tmp_path / "limited", sequential=True, memory_limit="60MiB")
    assert largest_difference(table, limited) < ROUNDING


def test_forms_of_data_agree(pair, table, tmp_path):
    rows = [json.loads(line) for line in pair.data.read_text().splitlines()]
    ids = [
        {
            "id": row["id"],
            "source": row["source"],
            "prompt_ids": token_ids(row["prompt"]),
            "response_ids": token_ids(row["response"]),
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "text.parquet")
    pq.write_table(pa.Table.from_pylist(ids), tmp_path / "ids.parquet", row_group_size=7)
    marked = b"\xef\xbb\xbf" + json.dumps(rows[0]).encode() + b"\r"
    files = {
        "ids": write_lines(tmp_path / "ids.jsonl", ids),
        "parquet": tmp_path / "text.parquet",
        "ids_parquet": tmp_path / "ids.parquet",
        "byte_order_mark": write_lines(tmp_path / "bom.jsonl", [marked, *rows[1:]]),
    }
    for name, file in files.items():
        assert run(pair, tmp_path / name, file).equals(table), name


def test_messages_are_rendered_by_the_chat_template(pair, tmp_path):
    rows = [json.loads(line) for line in pair.data.read_text().splitlines()][:6]
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}] for row in rows
    ]
    bos, eos, separator = 1, 2, 3
    ids = [
        {
            "prompt_ids": [bos, *token_ids(row["prompt"]), separator],
            # What the template puts behind the end of the turn was not written by the model.
            "response_ids": [*token_ids(row["response"]), eos],
        }
        for row in rows
    ]
    expected = run(pair, tmp_path / "ids", write_lines(tmp_path / "ids.jsonl", ids))
    jsonl = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    assert run(pair, tmp_path / "jsonl", jsonl).equals(expected)
    pq.write_table(pa.table({"messages": chats}), tmp_path / "chats.parquet")
    assert run(pair, tmp_path / "parquet", tmp_path / "chats.parquet").equals(expected)
    assert expected["sample_id"].to_pylist()[0] == "1" and expected["source"].null_count == len(expected)


def test_each_model_is_computed_in_the_dtype_of_its_files(pair, table, tmp_path):
    run_metrics(*pair, tmp_path / "default", batch_tokens=100, device="cpu", progress=False)
    assert largest_difference(table, pq.read_table(tmp_path / "default" / "tokens")) == 0
    rounded, tokenizer = load_local(pair.base)
    save_local(rounded.bfloat16(), tokenizer, tmp_path / "base")
    mixed = pair._replace(base=tmp_path / "base")
    numbers = run(mixed, tmp_path / "mixed", dtype="auto")
    assert np.abs(numbers["logp"].to_numpy() - table["logp"].to_numpy()).max() < ROUNDING
    # The weights are the same, what is computed of them is rounded to bfloat16.
    exact = run(mixed, tmp_path / "fp32")["base_logp"].to_numpy()
    assert ROUNDING < np.abs(numbers["base_logp"].to_numpy() - exact).max() < 1
    assert largest_difference(numbers, run(mixed, tmp_path / "sequential", dtype="auto", sequential=True)) == 0


def nearby_pair(pair: Pair, directory: Path, step: float) -> Pair:
    """A pair whose RL model is its base, each weight moved by up to `step`, as reinforcement learning does."""
    model, tokenizer = load_local(pair.base)
    save_local(model, tokenizer, directory / "base")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += step * (2 * torch.rand(parameter.shape, generator=generator) - 1)
    save_local(model, tokenizer, directory / "rl")
    return pair._replace(rl=directory / "rl", base=directory / "base")


def test_a_rounding_that_drowns_the_update_is_told(pair, tmp_path):
    near = nearby_pair(pair, tmp_path, step=1e-5)
    weights = [load_file(place / "model.safetensors") for place in (near.rl, near.base)]
    norms = []
    for names in (weights[0].keys(), ["lm_head.weight"]):
        update = torch.cat([(weights[0][name] - weights[1][name]).flatten() for name in names])
        kept = torch.cat(
            [(weights[0][name].bfloat16().float() - weights[1][name].bfloat16()).flatten() for name in names]
        )
        norms += [float((kept - update).norm()), float(update.norm())]
    expected = "{:.3g} beside {:.3g} in all weights, {:.3g} beside {:.3g} in the last layer".format(*norms)
    assert norms[0] > norms[1]
    with pytest.warns(
        UserWarning, match="--dtype bf16 rounds away some of what --rl .* and --base .* differ by"
    ) as told:
        run(near, tmp_path / "bf16", dtype="bf16")
    assert len(told) == 1 and expected in str(told[0].message)


@pytest.mark.parametrize(("step", "option"), [(1e-5, "auto"), (1e-5, "fp32"), (0.0, "bf16")])
def test_a_rounding_that_changes_nothing_is_not_told(pair, tmp_path, step, option):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(nearby_pair(pair, tmp_path, step), tmp_path / "out", dtype=option)


def test_an_old_run_in_another_dtype_says_how_to_go_on(pair, tmp_path):
    run(pair, tmp_path / "out", dtype="bf16")
    with pytest.raises(JobError, match='arguments dtype: "bf16" there, "auto" now'):
        run(pair, tmp_path / "out", dtype="auto")


def test_summary_counts_and_describes_the_rows(pair, table, tmp_path):
    out = tmp_path / "out"
    run(pair, out)
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in pair.data.read_text().splitlines()]
    assert summary["responses"] == len(rows)
    assert summary["response_tokens"] == len(table)
    assert summary["tokens"] == len(table) + sum(len(row["prompt"].split()) for row in rows)
    assert summary["broken_lines"] == [] and summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert summary["arguments"]["rl"] == str(pair.rl) and summary["arguments"]["batch_tokens"] == 100
    assert summary["versions"]["torch"] == torch.__version__
    assert set(summary["sources"]) == {"base", "rl"}
    frame = table.to_pandas()
    for source, described in summary["sources"].items():
        part = frame[frame["source"] == source]
        assert described["response_tokens"] == len(part)
        assert described["delta_logp_tails"]["below -1"] == pytest.approx((part["delta_logp"] < -1).mean())
        assert described["delta_logp_tails"]["above 0.25"] == pytest.approx((part["delta_logp"] > 0.25).mean())
        for name in STATISTICS:
            found = described["statistics"][name]
            assert found["mean"] == pytest.approx(part[name].astype("float64").mean())
            assert found["std"] == pytest.approx(part[name].astype("float64").std(ddof=0))
            assert found["quantiles"]["0.5"] == pytest.approx(part[name].median(), rel=1e-6)
            assert found["quantiles"]["max"] == part[name].max()
            assert found["nan"] == found["infinite"] == 0


def test_parts_and_batches_cover_all_samples_once_within_their_budget():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 1000)
    parts = cut_parts(lengths, 500)
    assert parts[0][0] == 0 and parts[-1][1] == 1000
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(parts))
    for begin, end in parts[:-1]:
        tokens = lengths[begin:end].sum()
        assert BATCHES_PER_PART * 500 <= tokens < BATCHES_PER_PART * 500 + 300
    batches = cut_batches([700, *lengths[:50]], 500)
    assert sorted(index for batch in batches for index in batch) == list(range(51))
    assert batches[0] == [0]
    padded = [len(batch) * max([700, *lengths[:50]][index] for index in batch) for batch in batches]
    assert max(padded[1:]) <= 500
    assert cut_parts([], 500) == []


def test_a_finished_run_is_not_computed_again(pair, tmp_path):
    out = tmp_path / "out"
    run(pair, out)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(pair, out).num_rows > 0
    run(pair, out, resume=True)
    assert contents(out) == before
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_other_arguments_data_or_models_are_refused_and_nothing_is_touched(pair, tmp_path):
    out = tmp_path / "out"
    run(pair, out)
    before = contents(out)
    other_data = write_lines(tmp_path / "other.jsonl", random_rows(40, seed=1))
    other_pair = write_pair(tmp_path / "other")
    weights = other_pair.rl / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused = {
        "batch_tokens: 100 there, 101 now": lambda: run(pair, out, batch_tokens=101),
        "sequential: false there, true now": lambda: run(pair, out, sequential=True),
        "temperature: 1.0 there, 0.5 now": lambda: run(pair, out, temperature=0.5),
        "data sha256": lambda: run(pair, out, other_data),
        "rl model.safetensors sha256": lambda: run(pair._replace(rl=other_pair.rl), out),
    }
    for message, start in refused.items():
        with pytest.raises(JobError, match="other arguments or data") as caught:
            start()
        assert message in str(caught.value)
        assert contents(out) == before


def test_resume_needs_a_run_to_go_on_with(pair, tmp_path):
    with pytest.raises(JobError, match="no run to go on with"):
        run(pair, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
