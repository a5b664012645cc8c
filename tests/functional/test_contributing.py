"""CONTRIBUTING.md: what it says stands somewhere stands there, and the files and commands that it names exist."""

import re

import pytest
from paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: `path:from-to` and, behind it in the same line, the text that stands there.
PLACE = re.compile(r"`([^`\s:]+):(\d+)-(\d+)`[^`\n]*`([^`\n]+)`")
#: A path below one of the repository's folders, also one with a pattern.
PATH = re.compile(r"`((?:benchmarks|csrc|dlogp_kernels|python_bindings|tests)/[^`\s:]*)[`:]")
#: What a statistic consists of: CONTRIBUTING.md shows where each stands for `kl`.
PARTS = ("formula", "op", "kernel", "test")


@pytest.mark.parametrize(("path", "first", "last", "text"), PLACE.findall(TEXT))
def test_what_is_said_to_stand_somewhere_stands_there(path, first, last, text):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    now = [number for number, line in enumerate(lines, 1) if text in line]
    assert now, f"{path} has no line with {text}"
    assert text in lines[int(first) - 1], f"{text} stands in line {now[0]} of {path}, CONTRIBUTING.md says {first}"
    assert int(first) <= int(last) <= len(lines), f"{path} has {len(lines)} lines, CONTRIBUTING.md says {first}-{last}"
    assert lines[int(last) - 1].strip(), f"line {last} of {path} is empty"


def test_it_shows_where_each_part_of_kl_stands():
    rows = [line for line in TEXT.splitlines() if PLACE.search(line)]
    for part in PARTS:
        assert any(row.startswith(f"| {part}") for row in rows), f"no place for the {part} of kl"


def test_paths_exist():
    missing = [path for path in sorted(set(PATH.findall(TEXT))) if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing


def test_targets_of_make_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake (\w+)", TEXT))
    assert named, "no command of make is named"
    assert named <= targets, f"the Makefile has no {', '.join(sorted(named - targets))}"
