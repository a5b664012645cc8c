"""Token text that is safe to show, and the data set on disk."""

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow.dataset as ds
import pyarrow.parquet as pq
from dataset_files import token_rows, write_dataset

from dlogp_kernels.report.dataset import (
    STATISTICS,
    Origin,
    Replaced,
    TokenDataset,
    check_part,
    part_paths,
    to_table,
    write_part,
)
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.text import counted, escape_markdown, percent, visible

# Text, as it is shown.
VISIBLE = {
    "word": "word",
    " the": "␣the",
    "a\n\tb\r": "a\\n\\tb\\r",
    "\\n": "\\\\n",
    "": "∅",
    "\x1b[31mred": "\\x1b[31mred",
    "\x00\x7f\x85": "\\x00\\x7f\\x85",
    "\u200b\u202eabc": "\\u200b\\u202eabc",
    "\u00a0\u3000\u2028": "\\xa0\\u3000\\u2028",
    "\U000e0041": "\\U000e0041",
    "\u0301": "◌\u0301",
    "e\u0301": "e\u0301",
    "数学🙂": "数学🙂",
    "[bold]x[/bold]": "[bold]x[/bold]",
    "<b>&amp;</b>|`$x$`": "<b>&amp;</b>|`$x$`",
}


@pytest.mark.parametrize("text", VISIBLE)
def test_invisible_characters_are_spelt_out(text):
    assert visible(text) == VISIBLE[text]


def test_different_texts_look_different():
    texts = [*VISIBLE, "␣the", "∅", "\\x1b", "\x1b"]
    shown = [visible(text) for text in texts]
    # The signs for a space and for nothing are characters of their own, too; all else is told apart.
    assert len(set(shown)) == len(set(texts)) - 2


def test_markdown_escapes_all_punctuation():
    assert escape_markdown("a|b<i>&amp;*_`[x](y)") == r"a\|b\<i\>\&amp\;\*\_\`\[x\]\(y\)"
    assert escape_markdown("数学 abc") == "数学 abc"


def test_numbers_in_words():
    assert [counted(number, "token") for number in (0, 1, 2, 12_345)] == [
        "0 tokens",
        "1 token",
        "2 tokens",
        "12,345 tokens",
    ]
    shares = (0, 0.0004, 0.009, 0.0123, 0.0996, 1)
    assert [percent(share) for share in shares] == ["0 %", "0.04 %", "0.9 %", "1.2 %", "10 %", "100 %"]


def test_rows_come_back_as_they_were_written(tmp_path):
    one = token_rows("rl", [5, 6], [" a", "b"], 1, delta_logp=[1.5, -2.0], kl=[np.inf, 0.25])
    two = token_rows(None, [7], ["\x00"], 4, logp=[-3.0])
    write_dataset(tmp_path, [one], [two])
    rows = pq.read_table(tmp_path / "tokens").to_pylist()
    assert [(row["sample_id"], row["line"], row["source"], row["position"]) for row in rows] == [
        ("s1", 1, "rl", 0),
        ("s1", 1, "rl", 1),
        ("s4", 4, None, 0),
    ]
    assert [(row["token_id"], row["token_text"]) for row in rows] == [(5, " a"), (6, "b"), (7, "\x00")]
    assert [row["delta_logp"] for row in rows] == [1.5, -2.0, 0.0]
    assert [row["kl"] for row in rows] == [np.inf, 0.25, 0.0] and rows[2]["logp"] == -3.0
    dataset = TokenDataset(tmp_path)
    assert len(dataset) == 3 and dataset.sources() == ["rl", None] and not dataset.complete
    assert dataset.column("delta_logp", "rl").tolist() == [1.5, -2.0]
    assert dataset.column("logp", None).tolist() == [-3.0]
    assert dataset.source_counts == {"rl": 2, None: 1}
    assert dataset.rows(np.array([0, 2]), ["token_id"])["token_id"].to_pylist() == [5, 7]


def test_sums_by_token_leave_nan_out_and_tell_right_from_wrong(tmp_path):
    right, wrong = {"correct": 1.0}, {"correct": 0.0}
    one = token_rows("rl", [5, 5, 6], ["a", "a", "b"], 1, right, delta_logp=[1.5, np.nan, -2.0], logp=[-1, -2, 0])
    two = token_rows("rl", [5, 5], ["a", "a"], 2, wrong, delta_logp=[-1, np.inf], base_logp=[-3, -4])
    three = token_rows(None, [6], ["b"], 3, delta_logp=[-0.25])
    table = TokenDataset(write_dataset(tmp_path, [one, two], [three])).sums_by_token
    assert table.column_names == [
        "source", "right", "token_id", "text", "count", "defined", "delta_logp", "size", "logp", "base_logp"
    ]  # fmt: skip
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("rl", True, 5, "a", 2, 1, 1.5, 1.5, -3.0, 0.0),
        ("rl", True, 6, "b", 1, 1, -2.0, 2.0, 0.0, 0.0),
        ("rl", False, 5, "a", 2, 2, np.inf, 1.0, 0.0, -7.0),
        (None, None, 6, "b", 1, 1, -0.25, 0.25, 0.0, 0.0),
    ]


@pytest.mark.parametrize("first_missing", ["top_token", "correct"])
def test_columns_of_later_versions_come_back_and_are_null_in_an_earlier_data_set(tmp_path, first_missing):
    top = {"top_token": [9, -1], "top_logp": [-0.5, 0.0], "base_top_token": [3, -1], "base_top_logp": [-1.25, 0.0]}
    response = {
        "prompt": "p",
        "prompt_ids": [8],
        "correct": 0.5,
        "finished": True,
        "replaced": Replaced([1], [7], ["c"]),
    }
    rows = token_rows("rl", [5, 6], ["a", "b"], logp=[-1.0, -2.0], response=response, **top)
    write_dataset(tmp_path / "new", [rows])
    table = pq.read_table(tmp_path / "new" / "tokens")
    replaced = {"draft_id": [None, 7], "draft_text": [None, "c"]}
    later = top | {"correct": [0.5, 0.5], "finished": [True, True]} | replaced
    assert {name: table[name].to_pylist() for name in later} == later
    expected = {"sample_id": "s1", "line": 1, "source": "rl", "prompt": "p", "prompt_ids": [8], "num_tokens": 2}
    expected |= {"correct": 0.5, "finished": True}
    assert TokenDataset(tmp_path / "new").responses().to_pylist() == [expected]
    (tmp_path / "old" / "tokens").mkdir(parents=True)
    (part,) = (tmp_path / "new" / "tokens").iterdir()
    missing = table.column_names[table.column_names.index(first_missing) :]
    pq.write_table(table.drop_columns(missing), tmp_path / "old" / "tokens" / part.name)
    earlier = TokenDataset(tmp_path / "old")
    assert earlier.column("logp", "rl").tolist() == [-1.0, -2.0]
    assert len(earlier) == 2 and earlier.sources() == ["rl"] and earlier.origin() is None
    absent = dict.fromkeys(("prompt", "prompt_ids", "correct", "finished"))
    assert earlier.responses().to_pylist() == [expected | absent]
    assert earlier.tokens([first_missing], lines=[1])[first_missing].to_pylist() == [None, None]


def test_files_say_what_was_measured_and_are_small_and_let_readers_skip(tmp_path):
    generator, texts = np.random.default_rng(0), [f" {number}" for number in range(1000)]

    def response(line):
        ids = generator.integers(0, 1000, 1000)
        values = {name: generator.exponential(size=1000) for name in STATISTICS}
        values["delta_logp"] = values["delta_logp"] - 50.0 * (line == 40)
        return token_rows("rl", ids, [texts[number] for number in ids], line, **values)

    directory = write_dataset(tmp_path)
    origin = Origin("1", "rl", "base", None, "0" * 40, "bf16", 0.7)
    write_part(directory, 0, [response(line) for line in range(1, 51)], origin)
    assert TokenDataset(directory).origin() == origin
    path, _ = part_paths(directory, 0)
    assert path.stat().st_size <= 48 * 50_000
    for chosen in (ds.field("sample_id") == "s7", ds.field("delta_logp") < -20.0):
        (fragment,) = ds.dataset(path).get_fragments()
        assert 1 <= sum(len(group.row_groups) for group in fragment.split_by_row_group(chosen)) <= 2
        assert ds.dataset(path).to_table(filter=chosen).num_rows > 0


def test_the_same_rows_give_the_same_bytes_and_no_temporary_file(tmp_path):
    rows = [token_rows("rl", range(100), ["x"] * 100)]
    for name in ("one", "two"):
        write_dataset(tmp_path / name, rows)
    assert [path.read_bytes() for path in part_paths(tmp_path / "one", 0)] == [
        path.read_bytes() for path in part_paths(tmp_path / "two", 0)
    ]
    assert [path.name for path in (tmp_path / "one" / "tokens").iterdir()] == ["part-00000.parquet"]


def test_directories_that_hold_no_data_set(tmp_path):
    with pytest.raises(DatasetError, match="holds no token statistics"):
        TokenDataset(tmp_path)
    directory = write_dataset(tmp_path / "damaged", [token_rows("rl", [1], ["x"])])
    part, _ = part_paths(directory, 0)
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(DatasetError, match="not a readable Parquet file"):
        TokenDataset(directory)
    pq.write_table(to_table([token_rows("rl", [1], ["x"])]).drop_columns("kl"), part)
    with pytest.raises(DatasetError, match="other columns"):
        check_part(part)
    pq.write_table(to_table([token_rows("rl", [1], ["x"])]), part)
    _, responses = part_paths(directory, 0)
    pq.write_table(pq.read_table(responses).drop_columns("num_tokens"), responses)
    with pytest.raises(DatasetError, match=r"responses/part-00000\.parquet has other columns"):
        TokenDataset(directory)
