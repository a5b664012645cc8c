"""What reaches a terminal, a table and a picture is text: escapes spelt out, markup as it stands, nothing cropped."""

import io
import json
import logging
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

import pyarrow as pa
import pyarrow.parquet as pq
from dataset_files import token_rows, write_dataset
from pair_files import write_pair
from rich.console import Console
from training_files import write_run

from dlogp_kernels import backends
from dlogp_kernels.cli import app
from dlogp_kernels.jobs.progress import note
from dlogp_kernels.report.pictures import render
from dlogp_kernels.report.responses import Response, Setting, to_line
from dlogp_kernels.report.terminal import Terminal, TextTable
from dlogp_kernels.report.text import csv_cell, escape_markdown, printable
from dlogp_kernels.report.training_curves import draw_training, grouped, read_run

#: Clears the screen, turns the direction of writing, and means something to Rich, Markdown, HTML and matplotlib.
HOSTILE = "\x1b[2J\x9b31m\u202e[red]x[/red]:smile:|<b>*$\\frac$"
SPELT = "\\x1b[2J\\x9b31m\\u202e[red]x[/red]:smile:|<b>*$\\frac$"
UNSHOWN = "\x1b\x9b\u202e"


def assert_harmless(text: str) -> None:
    found = [character for character in UNSHOWN if character in text]
    assert not found, f"{found} in {text!r}"


def test_control_characters_are_spelt_out_and_all_else_stays():
    assert printable(HOSTILE) == SPELT
    assert printable("a b\u00a0c\n数学🙂 é") == "a b\u00a0c\n数学🙂 é"
    assert printable("\udcff\t\r\u2028") == "\\udcff\\x09\\x0d\\u2028"
    for text, expected in (("=1+1", "'=1+1"), ("@x\x1b", "'@x\\x1b"), ("-1\n=2", "'-1\\n=2"), ("kl", "kl")):
        assert csv_cell(text) == expected
    assert escape_markdown("low-probability tokens, α = 0.2") == "low-probability tokens, α = 0.2"
    assert escape_markdown("www.x.y") == r"www\.x\.y" and escape_markdown("a\n|") == r"a\\n\|"


@pytest.mark.parametrize("width", [24, 60, 80, 120])
def test_a_table_loses_nothing_at_any_width(width):
    rows = [("a name of some words, a-very-long-word-in-it", "12,345,678", "-0.1234 ± 0.5678"), (HOSTILE, "1", "–")]
    console = Console(width=width, file=io.StringIO())
    console.print(TextTable("A title", ("source", "tokens", "mean Δlog p"), rows))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    squeezed = "".join("".join(lines).replace("│", "").split())
    for text in ("12,345,678", "-0.1234±0.5678", "source", "tokens"):
        assert text in squeezed and "…" not in squeezed
    for part in ("a name of some words, a-very-long-word-in-it", SPELT):
        # Folded cells are mixed with those beside them; each character is there.
        assert all(squeezed.count(character) >= part.count(character) for character in set(part) - {" "})


def test_strings_are_text_on_a_terminal():
    console = Terminal(width=200, force_terminal=True, color_system=None, file=io.StringIO())
    console.print(HOSTILE)
    console.print(TextTable(HOSTILE, ("", HOSTILE), [(HOSTILE, HOSTILE)]))
    printed = console.file.getvalue()
    assert_harmless(printed)
    assert printed.count(SPELT) == 5


def hostile_responses(directory: Path) -> Path:
    directory.mkdir()
    rows = [
        Response(
            HOSTILE, number, 0, Setting(HOSTILE, threshold, gamma, HOSTILE), 0, HOSTILE, [2], [1], True, 1.0, None, [0],
            [-1.0], [1], [HOSTILE], [HOSTILE],
        )
        for number in range(2)
        for threshold, gamma in ((-1.0, 0.0), (-2.0, 0.5))
    ]  # fmt: skip
    (directory / "responses.jsonl").write_bytes(b"".join(map(to_line, rows)))
    return directory


def test_files_of_others_are_plotted_as_text(dlogp, tmp_path):
    status, printed, errors = dlogp("plot", hostile_responses(tmp_path / f"a{HOSTILE.replace('/', '')}"))
    assert status == 0, errors
    assert_harmless(printed + errors)
    (written,) = tmp_path.glob("a*/figures")
    for name in ("results.md", "results.csv", "replaced_tokens.md", "replaced_tokens.csv", "replaced_tokens.html"):
        text = (written / name).read_text()
        assert_harmless(text)
        assert "\\x1b" in text.replace("\\\\", "\\") or "\\u001b" in text
    assert "<b>" not in (written / "replaced_tokens.html").read_text()
    assert r"\|\<b\>" in (written / "results.md").read_text()


def test_runs_and_sources_of_others_are_drawn_as_text(dlogp, tmp_path):
    runs = [write_run(tmp_path / "one", 0, note=HOSTILE), write_run(tmp_path / "two", 0, HOSTILE, note="=1")]
    status, _, errors = dlogp("plot", *runs)
    assert status == 0, errors
    assert_harmless((tmp_path / "one" / "figures" / "training.md").read_text())
    picture = render(draw_training(grouped([read_run(run) for run in runs])), "svg").decode()
    assert_harmless(picture)
    ElementTree.fromstring(picture)
    data = write_dataset(tmp_path / "data", [token_rows(HOSTILE, [3], [HOSTILE])])
    status, printed, errors = dlogp("plot", data, "--min-count", 1)
    assert status == 0, errors
    for text in (
        printed,
        errors,
        *((data / "figures" / name).read_text() for name in ("histograms.svg", "top_tokens.md")),
    ):
        assert_harmless(text)


def broken(line: dict[str, object], **values: object) -> bytes:
    return json.dumps(line | values).encode() + b"\n"


def test_a_broken_file_of_another_is_one_line(dlogp, tmp_path):
    directory = hostile_responses(tmp_path / "run")
    file = directory / "responses.jsonl"
    line = json.loads(file.read_bytes().splitlines()[0])
    infinite = float("inf")
    kinds = [{"criterion": ["kl"]}, {"gamma": "1"}, {"gamma": infinite}, {"threshold": {}}, {"token_ids": 3}]
    kinds += [{"selected": [0, 1]}, {"draft_texts": [3]}, {"correct": "1"}, {"text": None}, {"seed": None}]
    for values in kinds:
        file.write_bytes(broken(line, **values))
        status, printed, errors = dlogp("plot", directory)
        assert (status, printed) == (1, "") and errors.startswith("error: ") and errors.count("\n") == 1
        assert "responses.jsonl: line 1: not a response" in errors
    run = write_run(tmp_path / "training", 0)
    for name, text in (
        ("log.jsonl", '{"step": 1, "entropy": "\x1b"}'),
        ("log.jsonl", '{"step": 1e999}'),
        ("manifest.json", '{"identity": {"training": []}}'),
        ("manifest.json", "[" * 100_000),
        ("manifest.json", '{"identity": {"training": {"reweight": ["\x1b"], "alpha": 1}}}'),
        ("manifest.json", '{"identity": {"training": {"reweight": "ppl", "alpha": "much"}}}'),
    ):
        before = (run / name).read_text()
        (run / name).write_text(f"{text}\n")
        status, _, errors = dlogp("plot", run)
        assert status == 1 and errors.startswith("error: ") and errors.count("\n") == 1
        assert_harmless(errors)
        (run / name).write_text(before)


def test_names_in_data_and_models_reach_errors_and_logs_as_text(dlogp, tmp_path):
    pair = write_pair(tmp_path / "pair")
    data = tmp_path / f"d{HOSTILE.replace('/', '')}.parquet"
    pq.write_table(pa.table({HOSTILE: ["x"]}), data)
    arguments = ["metrics", "--base", pair.base, "--out", tmp_path / "out", "--device", "cpu"]
    status, _, errors = dlogp(*arguments, "--rl", pair.rl, "--data", data)
    assert status == 1 and errors.count(SPELT) == 1 and "error: --data" in errors
    assert_harmless(errors)
    config = pair.rl / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": HOSTILE}))
    status, _, errors = dlogp(*arguments, "--rl", pair.rl, "--data", pair.data)
    assert status == 1 and errors.count("error: --rl") == 1
    assert_harmless(errors)


def test_warnings_logs_and_notes_are_text(dlogp, monkeypatch, capsys):
    logger = logging.getLogger("a library")
    said = io.StringIO()
    logger.addHandler(logging.StreamHandler(said))

    def tell() -> None:
        warnings.warn(f"of a user {HOSTILE}", stacklevel=1)
        warnings.warn(f"of a library {HOSTILE}", FutureWarning, stacklevel=1)
        logger.warning("of a file %s", HOSTILE)
        note(HOSTILE)

    monkeypatch.setattr("dlogp_kernels.jobs.doctor.examine", tell)
    monkeypatch.setattr("dlogp_kernels.cli.tables.print_report", lambda console, report: console.print(HOSTILE))
    status, printed, errors = dlogp("doctor")
    assert status == 0
    assert_harmless(printed + errors + said.getvalue())
    assert f"warning: of a user {SPELT}\n" in errors and f"FutureWarning: of a library {SPELT}" in errors
    assert said.getvalue() == f"of a file {SPELT}\n" and printed == f"{SPELT}\n"
    monkeypatch.setattr("dlogp_kernels.jobs.doctor.examine", lambda: 1 // 0)
    monkeypatch.setattr(sys, "argv", ["dlogp", "doctor"])
    with pytest.raises(ZeroDivisionError):
        app.run()
    sys.excepthook(ValueError, ValueError(HOSTILE), None)
    assert_harmless(capsys.readouterr().err)


def test_doctor_says_each_reason_once(dlogp, monkeypatch):
    monkeypatch.setitem(backends._extension_problems, "cpu", "the compiled extension fell overboard")
    monkeypatch.setenv("COLUMNS", "80")
    status, printed, _ = dlogp("doctor")
    assert status == 0 and printed.count("the compiled extension fell overboard") == 1
    assert printed.count("it has linear forward ops only") == 1 and "all 14 ops" in printed
