"""Token text that is safe to show, the data set on disk, and the figures and tables made of it."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import matplotlib.image
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from dataset_files import token_rows, write_dataset
from rich.console import Console

from dlogp_kernels.cli.tables import top_token_table
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
from dlogp_kernels.report.figures import _PANELS, draw_histograms, histograms, plot, top_tokens
from dlogp_kernels.report.text import escape_markdown, quoted, visible

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


def write_random(directory: Path, sources=("rl", "base"), count=4000) -> Path:
    rng = np.random.default_rng(0)
    parts = []
    for index, source in enumerate(sources):
        kl = rng.gamma(0.5, 1.0, count)
        delta = rng.laplace(0.3 if source == "rl" else -0.3, 0.5, count)
        ids = rng.integers(0, 30, count)
        texts = [f"t{token}" for token in ids]
        parts.append(
            [token_rows(source, ids, texts, index + 1, entropy=rng.gamma(0.4, 1, count), kl=kl, delta_logp=delta)]
        )
    return write_dataset(directory, *parts)


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
    assert dataset.means_by_token(["logp"]).drop_columns("count").to_pylist() == [
        {"token_id": 5, "text": " a", "logp": 0.0},
        {"token_id": 6, "text": "b", "logp": 0.0},
        {"token_id": 7, "text": "\x00", "logp": -3.0},
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
    with pytest.raises(DatasetError, match="holds no tokens"):
        plot(write_dataset(tmp_path / "empty", []))


def test_histograms_are_densities_over_all_tokens(tmp_path):
    dataset = TokenDataset(write_random(tmp_path))
    for panel_index, name in enumerate(("entropy", "kl", "delta_logp")):
        for histogram in histograms(dataset, _PANELS[panel_index]):
            values = dataset.column(name, histogram.source)
            mass = (histogram.density * np.diff(histogram.edges)).sum()
            assert mass == pytest.approx(1 - histogram.num_beyond / len(values))
            assert histogram.num_beyond <= 5
            low, high = histogram.edges[10], histogram.edges[15]
            share = ((values >= low) & (values < high)).mean()
            assert (histogram.density * np.diff(histogram.edges))[10:15].sum() == pytest.approx(share, abs=1e-6)
            if name == "delta_logp":
                # No bin ends at 0, next to which most tokens lie on one side by rounding alone.
                width = histogram.edges[1] - histogram.edges[0]
                assert np.abs(histogram.edges).min() == pytest.approx(width / 2)


def ink(png: Path) -> np.ndarray:
    """The colours of a picture that are neither white nor grey, as rows of (red, green, blue) in 0…1."""
    pixels = matplotlib.image.imread(png)[..., :3].reshape(-1, 3)
    return pixels[np.ptp(pixels, axis=1) > 0.3]


def test_plot_draws_both_sources_and_writes_the_tables(tmp_path):
    directory = write_random(tmp_path / "run")
    result = plot(directory)
    assert [file.name for file in result.files] == [
        "histograms.png",
        "histograms.svg",
        "top_tokens.md",
        "top_tokens.csv",
    ]
    assert {file.parent for file in result.files} == {directory / "figures"} and not result.complete
    colours = ink(result.files[0])
    blue, vermilion = (
        np.abs(colours - np.array(rgb) / 255).max(axis=1) < 0.02 for rgb in ((0, 114, 178), (213, 94, 0))
    )
    assert blue.sum() > 1000 and vermilion.sum() > 1000
    root = ElementTree.parse(result.files[1]).getroot()
    assert root.tag.endswith("svg") and len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 50
    again = plot(directory, tmp_path / "again")
    assert [file.read_bytes() for file in again.files] == [file.read_bytes() for file in result.files]


def test_plot_of_one_source_without_a_name(tmp_path):
    result = plot(write_random(tmp_path, sources=(None,)))
    colours = ink(result.files[0])
    assert len(colours) > 1000
    assert (np.abs(colours - np.array((213, 94, 0)) / 255).max(axis=1) < 0.02).sum() == 0


def test_labels_take_names_of_sources_as_they_are(tmp_path):
    figure = draw_histograms(TokenDataset(write_random(tmp_path, sources=("rl", "base", "_$x$ \n", None))))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "RL responses (4,000 tokens)",
        "base responses (4,000 tokens)",
        "“_$x$␣\\n” responses (4,000 tokens)",
        "responses (4,000 tokens)",
    ]
    with pytest.raises(DatasetError, match="names 13 sources"):
        plot(write_random(tmp_path / "many", sources=[str(index) for index in range(13)], count=5))


@pytest.mark.parametrize("values", [[0.0] * 20, [np.inf] * 20, [np.nan, 1.0] * 10, [-5.0] * 20, [1e-9] * 20])
def test_plot_of_odd_values(tmp_path, values):
    rows = token_rows("rl", [1] * 20, ["x"] * 20, entropy=np.abs(values), kl=np.abs(values), delta_logp=values)
    assert plot(write_dataset(tmp_path, [rows])).files[0].stat().st_size > 5000


def test_top_tokens_are_ranked_by_their_mean_over_all_parts(tmp_path):
    parts = [
        [token_rows("rl", [3, 9, 9, 3], ["c", "i", "i", "c"], 1, delta_logp=[1, 4, 4, 0], logp=[-1, -2, -2, -3])],
        [
            token_rows(
                "base", [9, 3, 20, 7], ["i", "c", "z", "g"], 2, delta_logp=[-2, 2, 50, np.nan], logp=[-5, -2, 0, 0]
            )
        ],
    ]
    dataset = TokenDataset(write_dataset(tmp_path, *parts))
    ranked = top_tokens(dataset, min_count=1)
    assert [(token.token_id, token.text, token.occurrences, token.delta_logp) for token in ranked] == [
        (20, "z", 1, 50.0),
        (9, "i", 3, 2.0),
        (3, "c", 3, 1.0),
    ]
    assert [token.logp for token in ranked] == [0.0, -3.0, -2.0]
    assert [token.token_id for token in top_tokens(dataset, min_count=2)] == [9, 3]
    assert [token.token_id for token in top_tokens(dataset, min_count=1, limit=1)] == [20]
    with pytest.raises(DatasetError, match="min_count is 0"):
        plot(tmp_path, min_count=0)


def test_tables_show_hostile_tokens_as_text(tmp_path):
    texts = ["|", "<script>alert(1)</script>", "[red]x[/red]", "\x1b[2J", "=1+1", ' "q"', "\n", "&lt;", "\u202e"]
    rows = token_rows("rl", range(len(texts)), texts, delta_logp=np.arange(len(texts), 0, -1))
    result = plot(write_dataset(tmp_path, [rows]), min_count=1)
    assert [token.text for token in result.top_tokens] == texts

    markdown = result.files[2].read_text()
    cells = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| ") and "rank" not in line]
    assert [len(row) for row in cells] == [7] * len(texts)
    shown = [row[1] for row in cells]
    assert shown[0] == r"\|" and shown[1] == r"\<script\>alert\(1\)\<\/script\>" and shown[7] == r"\&lt\;"
    assert not any(character in markdown for character in "\x1b\u202e")

    with open(result.files[3], newline="") as file:
        table = list(csv.DictReader(file))
    assert [json.loads(row["token"]) for row in table] == texts
    assert all(
        row["token"] == quoted(text) and row["token"].startswith('"') for row, text in zip(table, texts, strict=True)
    )
    assert [float(row["mean_delta_logp"]) for row in table] == list(range(len(texts), 0, -1))

    console = Console(width=120, force_terminal=True, color_system=None, record=True, file=io.StringIO())
    console.print(top_token_table(result.top_tokens, 1))
    printed = console.export_text(styles=False)
    for text in texts:
        assert visible(text) in printed
    assert "\x1b[2J" not in printed
