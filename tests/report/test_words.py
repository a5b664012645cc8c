"""The tokens that RL changed, from both ends and in their contexts, and the paragraph that tells of them."""

import csv
import io
import json

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from dataset_files import token_rows, write_dataset
from rich.console import Console

from dlogp_kernels.cli.tables import change_table
from dlogp_kernels.report.dataset import TokenDataset
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.story import measure_spread, tell
from dlogp_kernels.report.text import quoted, visible
from dlogp_kernels.report.words import Selection, changed_tokens, words_csv, words_markdown

RIGHT, WRONG = {"correct": 1.0}, {"correct": 0.0}


def dataset(directory, *parts) -> TokenDataset:
    return TokenDataset(write_dataset(directory, *parts))


def described(tokens):
    return [(token.text, token.occurrences, round(token.total, 6), round(token.share, 6)) for token in tokens]


def test_tokens_are_ranked_from_both_ends_over_all_parts(tmp_path):
    """Σ|Δ| is 20: « a» +1 +4 +4 −2, «b» −5, «c» +1 −1, «d» NaN +2."""
    one = token_rows(
        "rl", [3, 9, 3, 3], [" a", "b", " a", " a"], 1, RIGHT, delta_logp=[1, -5, 4, 4], logp=[-1, -2, -2, -3]
    )
    two = token_rows("base", [3, 5, 7, 5, 7], [" a", "c", "d", "c", "d"], 2, WRONG, delta_logp=[-2, 1, np.nan, -1, 2])
    words = changed_tokens(dataset(tmp_path, [one], [two]), min_count=2)
    everything = words.parts[0]
    assert everything.selection == Selection() and (everything.num_tokens, everything.defined) == (9, 8)
    assert (everything.total, everything.size) == (4, 20)
    rankings = everything.rankings
    assert described(rankings["sum", "raised"]) == [(" a", 4, 7, 0.55), ("d", 2, 2, 0.1)]
    assert described(rankings["sum", "lowered"]) == [("b", 1, -5, 0.25)]
    # «d» is 2 in the only place where it is a number; «b», which occurs once, has too large a share to hide.
    assert [token.text for token in rankings["mean", "raised"]] == ["d", " a"]
    assert [(token.text, token.delta_logp) for token in rankings["mean", "lowered"]] == [("b", -5)]
    assert described(rankings["share", "either"]) == [
        (" a", 4, 7, 0.55), ("b", 1, -5, 0.25), ("c", 2, 0, 0.1), ("d", 2, 2, 0.1)
    ]  # fmt: skip
    assert rankings["sum", "raised"][0].logp == -1.5 and rankings["sum", "raised"][0].base_logp == 0
    parts = {str(part.selection): part for part in words.parts}
    assert list(parts) == [
        "all responses", "right responses", "wrong responses", "RL responses", "right RL responses", "base responses",
        "wrong base responses",
    ]  # fmt: skip
    for name in ("right responses", "RL responses", "right RL responses"):
        assert described(parts[name].rankings["sum", "raised"]) == [(" a", 3, 9, round(9 / 14, 6))]
    assert described(parts["wrong responses"].rankings["sum", "lowered"]) == [(" a", 1, -2, round(2 / 6, 6))]


def test_a_rare_token_is_hidden_from_the_means_by_a_small_share_alone(tmp_path):
    """One token of 200 with a share just below or above a hundredth."""
    for number, (rare, shown) in enumerate(((1.9, False), (2.1, True))):
        texts = ["a"] * 199 + ["b"]
        rows = token_rows("rl", [1] * 199 + [2], texts, delta_logp=[-1.0] * 199 + [rare])
        found = changed_tokens(dataset(tmp_path / str(number), [rows]), min_count=2).parts[0].rankings
        assert [token.text for token in found["mean", "raised"]] == ["b"] * shown
        assert [token.text for token in found["sum", "raised"]] == ["b"]
    with pytest.raises(DatasetError, match="min_count is 0"):
        changed_tokens(dataset(tmp_path / "3", [rows]), min_count=0)


def test_infinite_changes_lead_and_limits_cut_the_other_end(tmp_path):
    rows = token_rows("rl", [4, 5, 6, 7], ["w", "x", "y", "z"], delta_logp=[1, -np.inf, np.inf, 1])
    found = changed_tokens(dataset(tmp_path, [rows]), min_count=1, limit=2).parts[0].rankings
    assert [token.text for token in found["sum", "raised"]] == ["y", "w"]
    assert [token.text for token in found["sum", "lowered"]] == ["x"]


def test_contexts_are_where_a_token_changed_most_in_its_direction(tmp_path):
    """Over the border of a group of rows, from the beginning of a response to its end, and each text once."""
    count = 9000
    deltas, texts = np.zeros(count), [f" {k}" for k in range(count)]
    for place, delta in ((8191, 3.0), (0, 2.0), (8192, 1.0), (8999, 0.5), (4000, -6.0)):
        deltas[place], texts[place] = delta, " so"
    ids = [1 if text == " so" else 2 for text in texts]
    long = token_rows("rl", ids, texts, 1, delta_logp=deltas)
    repeated = [
        token_rows("rl", [3, 1, 4], ["In", " so", " it"], line, delta_logp=[0, 3.5, 0]) for line in range(2, 20)
    ]
    found = changed_tokens(dataset(tmp_path, [long], repeated)).parts[0].rankings["sum", "raised"]
    assert found[0].contexts == (
        "In«␣so» it",
        "8186 8187 8188 8189 8190«␣so» so 8193 8194 8195 8196",
        "«␣so» 1 2 3 4 5",
    )


def test_words_of_a_tokenizer_without_spaces_are_told_apart_in_contexts(tmp_path):
    rows = token_rows("rl", [1, 2, 3], ["so", "a", "="], delta_logp=[0, 1, 0])
    assert changed_tokens(dataset(tmp_path, [rows])).parts[0].rankings["sum", "raised"][0].contexts == ("so «a» =",)


def test_tables_show_hostile_tokens_as_text(tmp_path):
    texts = ["|", "<script>alert(1)</script>", "[red]x[/red]", "\x1b[2J", "=1+1", ' "q"', "\n", "&lt;", "\u202e"]
    changes = np.arange(len(texts), 0, -1)
    data = dataset(tmp_path, [token_rows("|<b>\x1b", range(len(texts)), texts, 1, delta_logp=changes)],
                   [token_rows("=1", range(len(texts)), texts, 2, delta_logp=-2 * changes)])  # fmt: skip
    words = changed_tokens(data, min_count=1)
    markdown, table = words_markdown(words), words_csv(words)
    rows = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| ") and "rank" not in line]
    assert {len(row) for row in rows} == {10} and len(rows) == 9 * len([*words.parts]) * 3
    shown = [row[1] for row in rows]
    assert shown[0] == r"\|" and shown[1] == r"\<script\>alert\(1\)\<\/script\>" and shown[7] == r"\&lt\;"
    for text in (markdown, table, tell(data)):
        assert not any(character in text for character in "\x1b\u202e")
    assert r"## “\|\<b\>\\x1b” responses (9 tokens)" in markdown
    found = list(csv.DictReader(io.StringIO(table)))
    assert not any(cell.startswith(("=", "+", "@")) for row in found for cell in row.values())
    lowered = [
        row
        for row in found
        if (row["order"], row["direction"], row["responses"]) == ("sum", "lowered", "all responses")
    ]
    assert [json.loads(row["token"]) for row in lowered] == texts and lowered[0]["token"] == quoted("|")
    assert [float(row["sum_delta_logp"]) for row in lowered] == (-changes).tolist()
    console = Console(width=120, force_terminal=True, color_system=None, record=True, file=io.StringIO())
    console.print(change_table("", words.parts[0].rankings["sum", "lowered"]))
    printed = console.export_text(styles=False)
    for text in texts:
        assert visible(text) in printed


def test_both_ends_come_first_in_the_csv(tmp_path):
    rows = token_rows("rl", [1, 2, 3, 4], "abcd", delta_logp=[1, 2, -3, -4])
    found = list(csv.DictReader(io.StringIO(words_csv(changed_tokens(dataset(tmp_path, [rows]))))))
    assert [(row["rank"], row["direction"], json.loads(row["token"])) for row in found[:4]] == [
        ("1", "raised", "b"), ("1", "lowered", "d"), ("2", "raised", "a"), ("2", "lowered", "c")
    ]  # fmt: skip


def test_of_many_sources_the_largest_are_told(tmp_path):
    parts = [
        [token_rows(f"s{k}", [1] * (k + 1), ["so"] * (k + 1), k + 1, delta_logp=[k - 5] * (k + 1))] for k in range(14)
    ]
    data = dataset(tmp_path, *parts)
    words = changed_tokens(data)
    assert [part.selection.source for part in words.parts[1:]] == [f"s{k}" for k in (10, 11, 12, 13, *range(2, 10))]
    assert "Sources: the 12 largest of 14 sources." in words_markdown(words)
    assert "goes from −3 over “s2” responses to +8 over “s13” responses" in tell(data)


def test_of_many_sources_both_models_are_told_however_few_their_tokens(tmp_path):
    parts = [[token_rows(f"s{k}", [1, 2], ["so", "x"], k + 1, delta_logp=[1, 1])] for k in range(14)]
    data = dataset(tmp_path, *parts, [token_rows(name, [1], ["so"], 20) for name in ("base", "rl")])
    words = changed_tokens(data)
    assert [part.selection.source for part in words.parts[1:4]] == ["rl", "base", "s0"] and len(words.parts) == 13
    assert words.remark == "the 12 largest of 16 sources, RL and base in any case"


def test_both_infinities_have_no_mean(tmp_path):
    rows = token_rows("rl", [1, 1, 2], ["a", "a", "b"], delta_logp=[np.inf, -np.inf, 1])
    assert "the mean of Δlog p is undefined" in tell(dataset(tmp_path, [rows]))


def test_the_spread_is_that_of_a_plain_loop(tmp_path):
    """Over responses of every length, and batches that end within one."""
    rng = np.random.default_rng(0)
    responses = [rng.laplace(0, 1, length).astype(np.float32) for length in (1, 4, 5, 9, 23, 7000, 9001, 2)]
    responses[3][2] = np.nan
    rows = [token_rows("rl", range(len(x)), ["x"] * len(x), line, delta_logp=x) for line, x in enumerate(responses, 1)]
    spread = measure_spread(dataset(tmp_path, rows[:5], rows[5:]))
    fifths = np.zeros(5)
    for response in responses:
        for place, value in enumerate(response):
            if len(response) >= 5 and np.isfinite(value):
                fifths[int(place / len(response) * 5 + 1e-9)] += abs(value)
    assert spread.fifths == pytest.approx(fifths, rel=1e-6)
    sizes = np.sort(np.abs(np.concatenate(responses)))[::-1].astype(np.float64)
    sizes = sizes[np.isfinite(sizes)]
    assert spread.counts.sum() == len(sizes)
    for share in (0.1, 0.5, 0.9, 1.0):
        exact = int(np.searchsorted(np.cumsum(sizes), share * sizes.sum() * (1 - 1e-12))) + 1
        assert abs(spread.carriers(share) - exact) <= 1


TOLD = {
    "one token": (
        [2.0],
        "Over 1 response token Σ|Δlog p|, the sum of sizes, is 2 nats, and the mean of Δlog p is +2. RL raised most of "
        "all «t0» (+2 nats in 1 place, 100 % of Σ|Δlog p|). It lowered no token.",
    ),
    "one nat": (
        [-1.0],
        "Over 1 response token Σ|Δlog p|, the sum of sizes, is 1 nat, and the mean of Δlog p is −1. RL raised no "
        "token. It lowered most of all «t0» (−1 nat in 1 place, 100 % of Σ|Δlog p|).",
    ),
    "two tokens": (
        [0.5, -1.5],
        "Over 2 response tokens Σ|Δlog p|, the sum of sizes, is 2 nats, and the mean of Δlog p is −0.5. Half of it "
        "lies on 1 token (50 %), nine tenths on 2 tokens (100 %). RL raised most of all «t0» (+0.5 nats in 1 place, 25 "
        "% of Σ|Δlog p|, as in “«t0» t1”). It lowered most of all «t1» (−1.5 nats in 1 place, 75 % of Σ|Δlog p|, as in "
        "“t0 «t1»”).",
    ),
    "equal models": ([0.0, 0.0], "Δlog p is 0 everywhere (2 tokens): there is no change."),
    "equal models, one token": ([0.0], "Δlog p is 0 everywhere (1 token): there is no change."),
    "no numbers": ([np.nan, np.inf], "There is no finite Δlog p in 2 tokens: what RL changed can not be said."),
    "a number": (
        [np.nan, 0.0],
        "Δlog p is 0 everywhere (1 token): there is no change. Not in Σ|Δlog p|: 1 token whose Δlog p is not finite.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("deltas", "told"), TOLD.values(), ids=TOLD)
def test_small_data_are_told_in_plain_words(tmp_path, deltas, told):
    rows = token_rows("rl", range(len(deltas)), [f"t{k}" for k in range(len(deltas))], delta_logp=deltas)
    assert tell(dataset(tmp_path, [rows])) == told


def test_where_and_in_which_responses_is_told(tmp_path):
    """Right responses rise in the first fifth, wrong ones fall by three times as much in the last."""
    texts = ["Nina", " now", " has", " 6", "."]
    right = token_rows("rl", range(5), texts, 1, RIGHT, delta_logp=[1, 0, 0, 0, 0])
    wrong = token_rows("base", range(5), texts, 2, WRONG, delta_logp=[0, 0, 0, 0, -3])
    told = tell(dataset(tmp_path, [right, wrong]))
    assert (
        "25 % of Σ|Δlog p| lies in the first fifth of a response, 0 % in the three fifths in the middle and 75 % in"
        in told
    )
    assert (
        "The mean of Δlog p is +0.2 over RL responses, −0.6 over base responses, +0.2 over right responses and −0.6 "
        "over wrong responses. In right responses RL raised most «Nina» (as in “«Nina» now has 6.”). In wrong "
        "responses RL lowered most «.» (as in “Nina now has 6«.»”)."
    ) in told
