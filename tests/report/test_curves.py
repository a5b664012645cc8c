"""What a sweep's responses come to: estimates with their errors, curves, bars, the map, and the tables."""

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from dlogp_kernels.cli.tables import print_sweep_plot, replaced_token_table
from dlogp_kernels.report import responses
from dlogp_kernels.report.curves import (
    bars,
    compare,
    curves,
    draw_bars,
    draw_curves,
    draw_map,
    plot_sweep,
    results_csv,
)
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.replaced import tokens_csv
from dlogp_kernels.report.responses import (
    BASE,
    RL,
    Response,
    Setting,
    collect,
    estimate,
    from_line,
    read_responses,
    to_line,
)


def response(setting: Setting, problem: int, score: float | None = 1.0, length=10, replaced=0, **fields) -> Response:
    """`length` tokens, the first `replaced` of them replaced."""
    defaults = {
        "problem_id": f"p{problem}",
        "problem": problem,
        "sample": 0,
        "setting": setting,
        "seed": 0,
        "text": "text",
        "token_ids": list(range(length)),
        "finished": True,
        "score": score,
        "error": None if score is not None else "ValueError: no",
        "selected": list(range(replaced)),
        "delta_logp": [-1.5] * replaced,
        "prompt_ids": [3, 4],
        "draft_ids": [7] * replaced,
        "draft_texts": ["jump"] * replaced,
        "new_texts": ["so"] * replaced,
    }
    return Response(**(defaults | fields))


#: Accuracy and replaced share of 20 problems by setting, in tenths.
POINTS = {
    BASE: (2, 0),
    RL: (7, 10),
    Setting("delta_logp", -2.0): (5, 1),
    Setting("delta_logp", -0.5): (8, 2),
    Setting("delta_logp", -1.0): (6, 0),
    Setting("delta_logp", -2.0, 0.1): (6, 1),
    Setting("delta_logp", -0.5, 0.1): (9, 2),
    Setting("random", 0.3): (3, 3),
    Setting("kl", 0.1): (6, 5),
    Setting("kl", 0.4): (4, 2),
    Setting("kl", 0.4, 0.1): (4, 2),
    Setting("delta_logp", -2.0, 0.0, "rl"): (1, 9),
}


@pytest.fixture(scope="module")
def results():
    rows = [
        response(setting, problem, float(problem % 10 < tenths), replaced=share)
        for setting, (tenths, share) in POINTS.items()
        for problem in range(20)
    ]
    return collect(rows).results()


def write(directory: Path, rows, tail: bytes = b"") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "responses.jsonl").write_bytes(b"".join(map(to_line, rows)) + tail)
    return directory


def test_a_line_comes_back_as_it_was():
    row = response(
        RL,
        3,
        None,
        selected=[0, 4],
        delta_logp=[-0.12345678, float("-inf")],
        draft_ids=[1, 2],
        draft_texts=["\u2028\n", "\ud83d"],
        new_texts=["数", "x"],
    )
    line = to_line(row)
    assert line.count(b"\n") == 1 and line.isascii()
    assert json.loads(line)["delta_logp"] == [-0.1234568, "-inf"]
    assert from_line(line) == row._replace(delta_logp=[-0.1234568, float("-inf")])
    for broken in (b"{}", b"[]", b"3", b'{"id": "x"', b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011
            from_line(broken)


def test_standard_errors_are_those_of_problems():
    rng = np.random.default_rng(0)
    # One response a problem: the textbook's.
    scores = rng.random(50) < 0.3
    found = estimate(scores, np.ones(50))
    assert found.mean == scores.mean()
    assert found.standard_error == pytest.approx(scores.std(ddof=1) / 50**0.5)
    # The same response eight times tells no more than once.
    repeated = estimate(8 * scores, np.full(50, 8))
    assert repeated.standard_error == pytest.approx(found.standard_error)
    # A ratio of sums, against many samples of problems.
    counts = rng.integers(5, 50, 40)
    sums = rng.binomial(counts, rng.beta(2, 5, 40))
    picked = rng.integers(0, 40, (4000, 40))
    bootstrap = (sums[picked].sum(1) / counts[picked].sum(1)).std()
    assert estimate(sums, counts).standard_error == pytest.approx(bootstrap, rel=0.1)
    assert estimate(np.array([]), np.array([])) is None
    assert estimate(np.array([0]), np.array([0])) is None
    assert estimate(np.array([3]), np.array([4])) == (0.75, None)


def test_scores_may_add_up_to_more_than_a_float_holds():
    [result] = collect([response(BASE, 0, 1e308), response(BASE, 0, 1e308)]).results()
    assert (result.responses, result.graded, result.accuracy) == (2, 2, (np.inf, None))


def test_differences_are_paired():
    one, other = Setting("delta_logp", -1.0, 0.1), Setting("delta_logp", -1.0)
    rng = np.random.default_rng(1)
    base = rng.random(100) < 0.5
    better = base | (rng.random(100) < 0.1)
    rows = [response(other, problem, float(score)) for problem, score in enumerate(base)]
    rows += [response(one, problem, float(score)) for problem, score in enumerate(better)]
    rows += [response(one, 200, 0.0), response(other, 300, None)]  # without a partner
    found = compare(collect(rows).results(), one, other)
    differences = better.astype(float) - base
    assert found.mean == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / 10)
    assert compare(collect(rows).results(), one, RL) is None


def test_curves_have_the_points_of_their_criterion(results):
    found = {curve.criterion: curve.results for curve in curves(results)}
    assert list(found) == ["delta_logp", "kl", "random"]
    # By share; with γ and drafts of the RL model left out.
    assert [
        (point.setting.threshold, point.replaced_share.mean, point.accuracy.mean) for point in found["delta_logp"]
    ] == [
        (-1.0, 0.0, 0.6),
        (-2.0, 0.1, 0.5),
        (-0.5, 0.2, 0.8),
    ]
    assert [point.setting.threshold for point in found["kl"]] == [0.4, 0.1]

    axes = draw_curves(results).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "Δlog p of the draft",
        "KL(RL ‖ base)",
        "random",
    ]
    drawn = axes.containers[1]  # of KL
    assert drawn[0].get_xdata() == pytest.approx([20, 50]) and drawn[0].get_ydata() == pytest.approx([0.4, 0.6])
    error = (0.4 * 0.6 / 19) ** 0.5
    segment = drawn[2][1].get_segments()[0]  # the vertical bar of the first point
    assert segment[:, 1] == pytest.approx([0.4 - error, 0.4 + error])
    assert {text.get_text(): text.xy[1] for text in axes.texts} == pytest.approx({"base model": 0.2, "RL model": 0.7})


def test_bars_and_map_have_the_thresholds_with_several_gammas(results):
    assert [(group.threshold, [r.accuracy.mean for r in group.results]) for group in bars(results)] == [
        (-2.0, [0.5, 0.6]),
        (-0.5, [0.8, 0.9]),
    ]
    axes = draw_bars(results).axes[0]
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([0.2, 0.7, 0.5, 0.6, 0.8, 0.9])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["base", "RL", "τ = −2\n10.0 % replaced", "τ = −0.5\n20.0 % replaced"]
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert colours[2] == colours[4] != colours[3] == colours[5]

    axes = draw_map(results).axes[0]
    assert axes.images[0].get_array().filled(np.nan) == pytest.approx(np.array([[0.5, 0.8], [0.6, 0.9]]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["−2", "−0.5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "0.1"]
    assert "0.900\n±0.069" in [text.get_text() for text in axes.texts]


def test_plot_writes_what_there_is_to_draw(results, tmp_path):
    rows = [response(setting, problem, float(problem % 2), replaced=1) for setting in POINTS for problem in range(4)]
    directory = write(tmp_path / "run", rows, tail=b'{"id": "half a li')
    plot = plot_sweep(directory)
    tables = ["results.md", "results.csv", "replaced_tokens.md", "replaced_tokens.csv", "replaced_tokens.html"]
    pictures = ["accuracy_by_share.png", "extrapolation.png", "threshold_gamma.png"]
    assert [file.name for file in plot.files] == [*pictures, *tables] and not plot.complete
    assert all(file.stat().st_size > 10_000 for file in plot.files[:3])
    assert plot.results[0].responses == 4
    (directory / "summary.json").write_text("{}")
    again = plot_sweep(directory, tmp_path / "again")
    assert again.complete and [file.read_bytes() for file in again.files] == [file.read_bytes() for file in plot.files]

    one_setting = write(tmp_path / "one", [response(BASE, 0)])
    assert [file.name for file in plot_sweep(one_setting).files] == tables
    ungraded = write(tmp_path / "ungraded", [response(setting, 0, None) for setting in POINTS])
    found = plot_sweep(ungraded)
    assert [file.name for file in found.files] == tables and found.results[0].grader_errors == 1
    one_problem = write(tmp_path / "single", [response(setting, 0, replaced=1) for setting in POINTS])
    assert len(plot_sweep(one_problem).files) == 8


def test_directories_without_responses(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match=r"holds no responses.jsonl"):
        plot_sweep(tmp_path)
    with pytest.raises(DatasetError, match="holds no whole response"):
        plot_sweep(write(tmp_path / "half", [], tail=b'{"id"'))
    with pytest.raises(DatasetError, match="line 2: not a response"):
        list(read_responses(write(tmp_path / "broken", [response(RL, 0)], tail=b"{}\n")))
    long = write(tmp_path / "long", [response(RL, 0), response(RL, 1)])
    monkeypatch.setattr(responses, "MAX_WRITTEN_LINE_BYTES", (long / "responses.jsonl").read_bytes().index(b"\n"))
    assert len(list(read_responses(long))) == 2
    monkeypatch.setattr(responses, "MAX_WRITTEN_LINE_BYTES", 50)
    with pytest.raises(DatasetError, match="line 1 is longer than 50 bytes"):
        list(read_responses(long))
    with pytest.raises(DatasetError, match="min_count is 0"):
        plot_sweep(write(tmp_path / "count", [response(RL, 0)]), min_count=0)


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": [-1]}, {"prompt_ids": [2**31]}, {"token_ids": [True, 3]}, {"draft_ids": [2**40]},
        {"selected": [10]}, {"selected": [-1]}, {"correct": 10**400}, {"threshold": 10**400}, {"delta_logp": [10**400]},
    ],
    ids=str,
)  # fmt: skip
def test_lines_with_numbers_that_can_not_be_are_no_responses(change):
    line = json.loads(to_line(response(RL, 0, replaced=1)))
    with pytest.raises(ValueError, match="not a response"):
        from_line(json.dumps(line | change).encode())


def test_places_in_another_order_are_no_response():
    line = json.loads(to_line(response(RL, 0, replaced=2)))
    for places in ([1, 0], [1, 1]):
        with pytest.raises(ValueError, match=r"selected is .*, expected ascending places"):
            from_line(json.dumps(line | {"selected": places}).encode())


def test_table_of_results(results):
    table = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert len(table) == len(POINTS)
    row = next(row for row in table if row["criterion"] == "kl" and row["threshold"] == "0.1")
    assert float(row["accuracy"]) == pytest.approx(0.6) and float(row["replaced_share"]) == 0.5
    assert float(row["accuracy_standard_error"]) == pytest.approx((0.6 * 0.4 / 19) ** 0.5)
    assert (row["responses"], row["problems"], row["seeds"], row["mean_length"]) == ("20", "20", "0", "10.0")


def test_replaced_tokens_are_counted_by_criterion():
    by_delta, by_kl = Setting("delta_logp", -1.0), Setting("kl", 0.1)

    def row(setting, drafts, news, values):
        return response(
            setting,
            0,
            selected=range(len(drafts)),
            delta_logp=values,
            draft_ids=[ord(text) for text in drafts],
            draft_texts=list(drafts),
            new_texts=list(news),
        )

    rows = [
        row(by_delta, "abab", "xyxz", [-1, -2, -3, -4]),
        row(by_delta._replace(threshold=-2.0), "aac", "xxc", [-2, -2, -5]),
        row(by_kl, "c", "a", [1]),
        row(RL, "cccc", "aaaa", [0] * 4),
    ]
    found = collect(rows).replaced_tokens(limit=5)
    assert [(token.criterion, token.text, token.occurrences, token.share, token.delta_logp) for token in found] == [
        ("delta_logp", "a", 4, 4 / 7, -2.0),
        ("delta_logp", "b", 2, 2 / 7, -3.0),
        ("delta_logp", "c", 1, 1 / 7, -5.0),
        ("kl", "c", 1, 1.0, 1.0),
    ]
    assert [token.replacements for token in found][:2] == [[("x", 4)], [("y", 1), ("z", 1)]]
    [token] = collect(rows).replaced_tokens(limit=1, min_count=2)
    assert token.text == "a" and token.share == 4 / 7, "what is left out of the table counts"
    table = list(csv.DictReader(io.StringIO(tokens_csv(found))))
    assert [(row["token"], row["replaced_by"], row["replaced_by_count"]) for row in table] == [
        ('"a"', '"x"', "4"), ('"b"', '"y"', "1"), ('"b"', '"z"', "1"), ('"c"', '"c"', "1"), ('"c"', '"a"', "1"),
    ]  # fmt: skip
    assert float(table[0]["share"]) == pytest.approx(4 / 7)


class _Page(HTMLParser):
    """The rows of the tables of a page, the text of each cell, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.widths: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "i":
            self.widths.append(dict(attrs)["style"])

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_page_of_replaced_tokens(tmp_path):
    setting = Setting("delta_logp", -1.0)

    def row(text, news, value):
        count = len(news)
        return response(
            setting, 0, selected=range(count), delta_logp=[value] * count, draft_ids=[ord(text)] * count,
            draft_texts=[text] * count, new_texts=list(news),
        )  # fmt: skip

    plot = plot_sweep(write(tmp_path / "run", [row("a", "xxxy", -2.0), row(" ", "z", float("-inf"))]))
    page = _Page(plot.files[-1].read_text())
    assert plot.files[-1].name == "replaced_tokens.html"
    assert [[cell.strip() for cell in row] for row in page.rows[1:]] == [
        ["a", "97", "4", "80 %", "-2.000", "x 3 · 75 %y 1 · 25 %"],
        ["␣", "32", "1", "20 %", "-inf", "z 1 · 100 %"],
    ]
    assert page.widths == ["width:100.0%", "width:25.0%"]
    empty = plot_sweep(write(tmp_path / "empty", [response(RL, 0)])).files[-1].read_text()
    assert "No token was replaced" in empty


def test_tables_show_hostile_tokens_as_text(tmp_path):
    texts = ["|", "<script>alert(1)</script>", "[red]x[/red]", "\x1b[2J", "=1+1", "\n", "&lt;", "\u202e"]
    rows = [
        response(
            Setting("delta_logp", -1.0),
            index,
            selected=[0],
            delta_logp=[-1.0],
            draft_ids=[index],
            draft_texts=[text],
            new_texts=[text],
        )
        for index, text in enumerate(texts)
    ]
    plot = plot_sweep(write(tmp_path / "run", rows))
    markdown = next(file for file in plot.files if file.name == "replaced_tokens.md").read_text()
    cells = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| delta")]
    assert [len(row) for row in cells] == [7] * len(texts)
    assert cells[0][1] == r"\|" and cells[1][1] == r"\<script\>alert\(1\)\<\/script\>"
    assert cells[6][6] == r"\&lt\; (100 %) |"
    assert not any(character in markdown for character in "\x1b\u202e")
    with open(next(file for file in plot.files if file.name == "replaced_tokens.csv"), newline="") as file:
        table = list(csv.DictReader(file))
    assert [json.loads(row["token"]) for row in table] == [json.loads(row["replaced_by"]) for row in table] == texts

    page = next(file for file in plot.files if file.name == "replaced_tokens.html").read_text()
    assert not any(character in page for character in "\x1b\u202e")
    parsed = _Page(page)
    assert not parsed.tags & {"script", "img", "a", "link", "iframe"}, "a tag of a token"
    shown = [row[0] for row in parsed.rows[1:]]
    assert shown[:3] == texts[:3] and shown[6] == "&lt;", "and text stays what it is"

    console = Console(width=140, force_terminal=True, color_system=None, record=True, file=io.StringIO())
    console.print(replaced_token_table(plot.replaced_tokens))
    print_sweep_plot(console, plot)
    printed = console.export_text(styles=False)
    assert "[red]x[/red]" in printed and "\\x1b[2J" in printed and "not complete" in printed
    assert "\x1b[2J" not in printed and "\u202e" not in printed
