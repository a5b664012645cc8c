"""`run_compare`: both models' answers, their numbers, figures and the page in one go, and goings-on."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from hf_models import one_thread  # noqa: F401
from pair_files import contents, random_rows, write_lines

from dlogp_kernels.jobs import compare as compare_job
from dlogp_kernels.jobs.compare import run_compare
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.options import Comparing
from dlogp_kernels.jobs.view import run_view
from dlogp_kernels.report.dataset import TokenDataset
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.figures import plot
from dlogp_kernels.report.responses import read_responses

OPTIONS = Comparing(samples=2, max_new_tokens=9, temperature=0.0, dtype="fp32", device="cpu", batch_tokens=50)


def test_from_problems_to_page_and_figures_and_again(pair, tmp_path):
    problems = [{"id": f"p{n}", "prompt": row["prompt"], "answer": "w1"} for n, row in enumerate(random_rows(3))]
    data, out = write_lines(tmp_path / "problems.jsonl", problems), tmp_path / "out"

    def compare():
        return run_compare(pair.rl, pair.base, out, data=data, options=OPTIONS, progress=False)

    found = compare()
    drawn, dataset = list(read_responses(out / "responses")), TokenDataset(out / "metrics")
    assert [response.setting.source for response in drawn] == ["base"] * 6 + ["rl"] * 6
    assert [row["source"] for row in dataset.responses().to_pylist()] == ["base"] * 6 + ["rl"] * 6
    assert dataset.tokens(["token_id"])["token_id"].to_pylist() == [i for one in drawn for i in one.token_ids]
    # Measured at temperature 1, however responses are drawn.
    assert dataset.origin().temperature == 1.0 and found.drawn["arguments"]["temperature"] == 0.0
    assert found.measured == json.loads((out / "metrics" / "summary.json").read_text())
    assert {path.parent for path in found.figures.files} == {out / "figures"}
    assert "histograms.png" in {path.name for path in found.figures.files}
    assert found.view.path == out / "view.html" and "12 responses" in found.view.subtitle
    before = contents(out)
    compare()
    assert contents(out) == before
    for look in (plot, run_view):
        with pytest.raises(DatasetError, match=f"; did you mean {out / 'metrics'}\\?$"):
            look(out)


def test_of_responses_that_exist_and_its_look_in_a_notebook(pair, tmp_path, monkeypatch):
    options = Comparing(dtype="fp32", device="cpu")
    found = run_compare(pair.rl, pair.base, tmp_path / "out", responses=pair.data, options=options, progress=False)
    assert found.drawn is None and "40 responses" in found.view.subtitle
    shown = found._repr_html_()
    assert shown.count("<iframe") == 1 and "<script" not in shown and "&lt;script" in shown
    monkeypatch.setattr("dlogp_kernels.jobs.view._MOST_NOTEBOOK_BYTES", 100)
    assert "<iframe" not in found._repr_html_() and "view.html" in found._repr_html_()


@pytest.mark.parametrize("given", [{}, {"data": "a", "responses": "b"}])
def test_problems_or_responses(pair, tmp_path, given):
    with pytest.raises(JobError, match="--data, --responses: expected one of them"):
        run_compare(pair.rl, pair.base, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "given"),
    [("--samples", {"samples": 4}), ("--temperature", {"temperature": 0.5}), ("--grader", {}),
     ("--stop-token-id", {"stop_token_ids": [1]})],
)  # fmt: skip
def test_options_of_drawing_have_no_place_beside_responses(pair, tmp_path, option, given):
    with pytest.raises(JobError, match=f"^{option} is .*, which has no effect on --responses: leave it out"):
        run_compare(
            pair.rl, pair.base, tmp_path / "out", responses=pair.data, grader="exact" if given else "file.py:grade",
            options=Comparing(**given), progress=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_how_to_measure_is_checked_before_anything_is_drawn(pair, tmp_path):
    data = write_lines(tmp_path / "problems.jsonl", [{"prompt": "w1", "answer": "w2"}])
    for options in (Comparing(batch_tokens=0, device="cpu"), Comparing(memory_limit="much", device="cpu")):
        with pytest.raises(JobError, match=r"--batch-tokens|--memory-limit"):
            run_compare(pair.rl, pair.base, tmp_path / "out", data=data, options=options, progress=False)
    assert not (tmp_path / "out").exists()


def test_an_error_names_the_option_of_this_command(pair, tmp_path):
    with pytest.raises(JobError, match=r"^--responses \S+nothing: there is no such file"):
        run_compare(pair.rl, pair.base, tmp_path / "out", responses=tmp_path / "nothing", progress=False)


def test_workers_draw_and_measure(pair, tmp_path, monkeypatch):
    received = {}

    def record(name):
        def job(*arguments, **options):
            received[name] = options
            return {}

        return job

    for name in ("run_sweep", "run_metrics"):
        monkeypatch.setattr(compare_job, name, record(name))
    monkeypatch.setattr(compare_job, "plot", lambda *_: None)
    monkeypatch.setattr(compare_job, "run_view", lambda *_: None)
    working = {"engine": "ray", "devices": "2", "address": "auto"}
    run_compare(pair.rl, pair.base, tmp_path / "out", data=pair.data, options=Comparing(), progress=False, **working)
    for options in received.values():
        assert {name: options[name] for name in working} == working
    # None is given: where there are GPUs, workers on CPUs are not what was meant.
    assert received["run_metrics"]["device"] is None and received["run_sweep"]["decoding"].device is None
    with pytest.raises(JobError, match=r"^--devices has 'abacus', expected all, a number, or a list"):
        run_compare(pair.rl, pair.base, tmp_path / "out", data=pair.data, devices="abacus", progress=False)
