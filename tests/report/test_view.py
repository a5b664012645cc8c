"""The page of `dlogp view`: what is in its data, what it refuses, and that nothing in it is markup of others."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

import pyarrow as pa
import pyarrow.parquet as pq
from dataset_files import token_rows, write_dataset
from hf_models import one_thread  # noqa: F401
from pair_files import WORDS, write_lines, write_pair
from viewed import ENGLISH, PROMPT, awkward_rows, many_rows

from dlogp_kernels.hf.tiny import word_tokenizer
from dlogp_kernels.jobs.decoding import run_generate
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.jobs.metrics import run_metrics
from dlogp_kernels.jobs.options import Decoding
from dlogp_kernels.jobs.view import run_view
from dlogp_kernels.report.dataset import SCHEMA, TokenDataset
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.responses import Setting, read_responses
from dlogp_kernels.report.view.page import render
from dlogp_kernels.report.view.reading import choose


class Page(HTMLParser):
    """The elements of a page as a browser's parser finds them, with the text of scripts, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.links, self.policy, self.style = [], {}, [], "", ""
        self._in = None
        self.feed(text)
        self.data = json.loads(self.scripts["page"])

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        self._in = found.get("id", "") if tag == "script" else tag
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[self._in] = self.scripts.get(self._in, "") + data
        elif self.cdata_elem == "style":
            self.style += data

    def column(self, name: str, kind: type = np.float32) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.scripts[f"column-{name}"]), kind)

    def texts(self) -> list[str]:
        """Of all tokens."""
        return [self.data["vocabulary"]["text"][place] for place in self.column("token", np.uint32)]


def view(directory, **options) -> tuple[Page, list[str]]:
    found = run_view(directory, **options)
    return Page(found.path.read_text(encoding="utf-8")), found.remarks


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_every_number_and_text_is_in_the_page_as_it_is():
    rows = awkward_rows()
    page = Page(render(rows, title="</title><script>", subtitle="", remarks=["<b>remark"], texts={77_777: "jump"}))
    for name in ("delta_logp", "logp", "base_lse", "top_logp"):
        given = np.concatenate([row.statistics[name] for row in rows])
        np.testing.assert_array_equal(page.column(name).view(np.int32), given.view(np.int32))
    assert page.texts()[:6] == ENGLISH[:6] and page.texts()[10:14] == ["\\u2028", "\\u202e", "ðŁĺ", "\\x1b[0m"]
    words = page.data["vocabulary"]
    likely = [words["text"][place] for place in page.column("base_top_token", np.int32)[:14]]
    assert likely == ["jump"] * 14 and words["id"][page.column("top_token", np.int32)[0]] == 13
    drafts = page.column("draft", np.int32)
    assert [words["text"][place] for place in drafts[1:3]] == [" then", " has"]
    assert (np.delete(drafts, [1, 2]) < 0).all()
    floats = {field.name for field in SCHEMA if pa.types.is_floating(field.type)}
    assert {number["name"] for number in page.data["columns"]} == floats - {"correct"}
    responses = page.data["responses"]
    assert responses["group"] == [0, 0, 0, 1, 2, 3] and responses["correct"] == [1, 0, 1, 0.5, None, None]
    assert page.data["prompts"][0] == PROMPT and page.data["sources"] == ["rl", "base"]
    assert responses["finished"][:2] == [True, False] and responses["length"] == [14, 4, 3, 5, 1, 1]


def test_nothing_of_the_data_is_markup_and_nothing_is_loaded():
    plain, awkward = (
        render(rows, title=title, subtitle="", remarks=[title])
        for rows, title in ((awkward_rows()[3:4], "a"), (awkward_rows(), "</title><script>alert(1)</script>"))
    )
    page = Page(awkward)
    # One column more, that of the drafts.
    assert len(page.tags) == len(Page(plain).tags) + 1
    assert page.links == [] and not re.search(r"https?:|url\(|@import", awkward)
    assert not awkward.isascii() and not any("<" in page.scripts[name] for name in page.scripts if name)
    for text, kind in ((page.scripts[""], "script"), (page.style, "style")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none'")


def test_of_many_responses_whole_prompts_are_chosen_the_same_in_every_run():
    prompts, lengths = np.repeat(np.arange(500), 2).tolist(), [10] * 1000
    chosen = choose(prompts, lengths, 600)
    assert chosen == choose(prompts, lengths, 600) and chosen.tokens == 600 and chosen.all_tokens == 10_000
    assert {index // 2 for index in chosen.indices[::2]} == {index // 2 for index in chosen.indices}
    assert max(chosen.indices) > 800 > 200 > min(chosen.indices)
    assert choose([0, 1, 2], [50, 30, 40], 20).indices == [1]
    assert choose(prompts, lengths, 10_000).remark() is None


def test_a_data_set_beyond_the_limit_says_that_it_is_a_sample(tmp_path):
    rows = many_rows(5000, mean_length=40)
    write_dataset(tmp_path / "run", rows[:50], rows[50:])
    page, remarks = view(tmp_path / "run", max_tokens=700)
    assert 600 < len(page.texts()) <= 700 and any("of 5,000 tokens" in remark for remark in remarks)
    by_id = {row.sample_id: row for row in rows}
    shown = [by_id[name] for name in page.data["responses"]["id"]]
    assert page.texts() == [text for row in shown for text in row.token_texts]
    np.testing.assert_array_equal(page.column("kl"), np.concatenate([row.statistics["kl"] for row in shown]))
    assert len(view(tmp_path / "run")[0].texts()) == 5000


def test_data_sets_of_earlier_versions_and_unfinished_runs_are_shown(tmp_path):
    directory = write_dataset(tmp_path / "run", awkward_rows())
    _, remarks = view(directory)
    assert any("not complete" in remark for remark in remarks) and any("--tokenizer" in remark for remark in remarks)
    (directory / "responses/part-00000.parquet").unlink()
    path = directory / "tokens/part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.select(SCHEMA.names[: SCHEMA.names.index("top_token")]).replace_schema_metadata(), path)
    (directory / "summary.json").write_text("{}")
    page, remarks = view(directory, out=tmp_path / "page.html")
    assert remarks == [] and len(page.texts()) == 28 and page.data["prompts"] == []
    assert "column-top_token" not in page.scripts and "column-draft" not in page.scripts
    assert page.data["responses"]["correct"] == [None] * 6


def test_what_can_not_be_shown_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds nothing to show"):
        run_view(tmp_path / "empty")
    with pytest.raises(DatasetError, match="holds no responses"):
        run_view(write_dataset(tmp_path / "none", []))
    with pytest.raises(JobError, match="--max-tokens is 0"):
        run_view(tmp_path, max_tokens=0)
    with pytest.raises(JobError, match=r"--out \S+: it is a directory, expected a file"):
        run_view(tmp_path, out=tmp_path)
    directory = write_dataset(tmp_path / "torn", [token_rows("rl", [1, 2], ["a", "b"])])
    path = directory / "tokens/part-00000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DatasetError, match="not whole"):
        run_view(directory)


def test_the_command_writes_the_page_and_says_so_where_there_is_no_browser(dlogp, monkeypatch, tmp_path):
    directory, opened = write_dataset(tmp_path / "run", awkward_rows()[1:2]), []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)))
    status, printed, errors = dlogp("view", directory, "--open")
    assert status == 0, errors
    assert opened == [(directory / "view.html").as_uri()] and "There is no browser here" in printed
    assert "not complete" in printed and "1 response, 4 tokens" in printed and str(directory / "view.html") in printed
    status, printed, errors = dlogp("view", directory, "--out", tmp_path / "new" / "other.html")
    assert (tmp_path / "new" / "other.html").read_bytes() == (directory / "view.html").read_bytes() and len(opened) == 1
    status, printed, errors = dlogp("view", tmp_path / "nothing")
    assert status == 1 and errors.startswith("error: ") and "holds nothing to show" in errors


def test_runs_of_all_kinds_with_their_own_tokenizer(pair, tmp_path):
    problems = write_lines(tmp_path / "problems.jsonl", [{"prompt": f"w{i} w2", "answer": "w3"} for i in range(3)])
    decoding = Decoding(max_new_tokens=12, samples=2, device="cpu", dtype="fp32")
    drawn, measured = tmp_path / "drawn", tmp_path / "measured"
    setting = Setting("delta_logp", -0.5, 0.0, "base")
    run_generate(pair.rl, pair.base, problems, drawn, setting=setting, decoding=decoding, progress=False)
    page, remarks = view(drawn)
    responses = list(read_responses(drawn))
    assert page.data["responses"]["id"][1] == f"{responses[1].problem_id} #1" and len(remarks) == 1
    assert page.data["responses"]["group"] == [0, 0, 1, 1, 2, 2] and "w0 w2" in page.data["prompts"][0]
    words, begin = page.data["vocabulary"], 0
    for response in responses:
        at = begin + np.array(response.selected, int)
        begin += len(response.token_ids)
        np.testing.assert_array_equal(page.column("delta_logp")[at], np.float32(response.delta_logp))
        assert [words["text"][place] for place in page.column("draft", np.int32)[at]] == list(response.draft_texts)
        assert [page.texts()[place] for place in at] == list(response.new_texts)
    assert sum(len(response.selected) for response in responses) == (page.column("draft", np.int32) >= 0).sum() > 0
    run_metrics(*pair, measured, dtype="fp32", device="cpu", progress=False)
    page, remarks = view(measured)
    assert remarks == [] and None not in page.data["vocabulary"]["text"]
    # The page in the directory of a run is none of its files: the run is as complete and as whole as before.
    assert view(measured)[0].data == page.data and len(TokenDataset(measured)) == len(page.texts())
    run_metrics(*pair, measured, dtype="fp32", device="cpu", progress=False, resume=True)
    (measured / "tokens/part-00009.parquet").write_bytes((measured / "tokens/part-00000.parquet").read_bytes())
    with pytest.raises(DatasetError, match="not a file of the run"):
        run_view(measured)
    # What another tokenizer does not know has no text; without one there is none at all.
    lines = (drawn / "responses.jsonl").read_bytes().splitlines(keepends=True)
    odd = tmp_path / "odd"
    odd.mkdir()
    first = json.loads(lines[0])
    first["token_ids"].append(99_999)
    # The last line is half there, as a killed run leaves it.
    (odd / "responses.jsonl").write_bytes(json.dumps(first).encode() + b"\n" + lines[1] + lines[2][:40])
    with pytest.raises(JobError, match="give --tokenizer DIR"):
        run_view(odd)
    with pytest.raises(JobError, match="can not be loaded"):
        run_view(odd, tokenizer=tmp_path / "nowhere")
    word_tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "other")
    with pytest.raises(JobError, match="other texts than when they were drawn"):
        run_view(drawn, tokenizer=tmp_path / "other")
    page, remarks = view(odd, tokenizer=str(pair.rl))
    assert page.texts()[len(first["token_ids"]) - 1] == "" and len(page.data["responses"]["id"]) == 2
    assert 99_999 in page.data["vocabulary"]["id"] and any("not complete" in remark for remark in remarks)
