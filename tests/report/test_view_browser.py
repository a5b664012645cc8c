"""The page of `dlogp view` in headless Chromium: what a reader sees and does, in both themes, and how fast."""

import re
import shutil
import time

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("playwright", reason="playwright is not installed (pip install playwright)")

from playwright.sync_api import sync_playwright
from viewed import ENGLISH, awkward_rows, many_rows

from dlogp_kernels.jobs.view import View
from dlogp_kernels.report.view.page import OF_DRAFTS, render

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, tmp_path):
    """Opens a page of rows; in the end it has loaded nothing, and nothing went wrong in it."""
    opened = []

    def opening(rows, width=1280, theme="light", within=None, **options):
        path = within or tmp_path / "page.html"
        if within is None:
            path.write_text(render(rows, title="run", subtitle="", **options), encoding="utf-8")
        page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
        complaints, requests = [], []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        opened.append((page, complaints, requests, path))
        page.goto(path.as_uri())
        page.frames[-1].wait_for_selector("html[data-ready]")
        return page

    yield opening
    for page, complaints, requests, path in opened:
        assert complaints == [] and set(requests) <= {path.as_uri(), "about:srcdoc"}
        page.close()


@pytest.fixture
def awkward(show):
    return show(awkward_rows(), texts={77_777: " jump"})


def texts(page, selector) -> list[str]:
    return page.locator(selector).all_text_contents()


def test_text_is_shown_as_text(awkward):
    shown = texts(awkward, "article:first-child .token")[:14]
    assert shown == [*ENGLISH[:5], "↵\n", "⇥\tso", *ENGLISH[7:10], "\\u2028", "\\u202e", "ðŁĺ", "\\x1b[0m"]
    assert texts(awkward, ".unknown") == ["#31"]
    # The end of a line is one, and right-to-left text runs from the right, within its own response.
    tops = [awkward.locator(f"#t{token}").bounding_box()["y"] for token in (4, 6)]
    assert tops[1] > tops[0] + 20
    hebrew = [awkward.locator(f"#t{token}").bounding_box()["x"] for token in range(21, 26)]
    assert hebrew == sorted(hebrew, reverse=True)
    assert awkward.locator(".prompt").first.inner_text().startswith("▸ prompt <|user|> Nina has 4 apples </script>.")
    awkward.locator(".prompt button").first.click()
    opened = awkward.locator(".prompt div").first.inner_text()
    assert opened == "<|user|>\nNina has 4 apples </script>.\nHow many?"


def test_pointer_and_keys_show_all_numbers_of_a_token(awkward):
    details = awkward.locator("#details")
    awkward.locator("#t3").hover()
    shown = details.inner_text()
    for part in ("␣6 #3, token 4 of 14", "Δlog p\t0.125", "log p\t−0.250\t0.000", "p\t0.779\t1.000", "KL(RL ‖ base)"):
        assert part in shown
    assert "most likely token\t\\u2028\t␣jump" in shown
    awkward.locator("#search").hover()
    assert details.is_hidden()
    awkward.locator("#reading").focus()
    awkward.keyboard.press("ArrowRight")
    assert "token 1 of 14" in details.inner_text() and awkward.evaluate("document.activeElement.id") == "t0"
    awkward.keyboard.press("ArrowRight")
    assert "replaced the draft ␣then #50" in details.inner_text()
    awkward.keyboard.press("ArrowRight")
    assert "the same as drafted" in details.inner_text()
    for token, value in ((7, "NaN"), (8, "∞"), (9, "−∞")):
        awkward.locator(f"#t{token}").focus()
        assert f"Δlog p\t{value}" in details.inner_text()
    awkward.keyboard.press("n")
    strong = awkward.locator(".token:focus")
    assert strong.get_attribute("id") == "t14" and "l6" in strong.get_attribute("class")
    awkward.keyboard.press("Escape")
    assert details.is_hidden()
    assert texts(awkward, ".draft") == ["then"] and awkward.locator("#t1").get_attribute("class").endswith("replaced")


LINE = """() => {
  const boxes = [...document.activeElement.getClientRects()];
  const box = boxes.reduce((one, other) => (other.width > one.width ? other : one));
  const article = document.activeElement.closest("article");
  return { id: document.activeElement.id, top: reading.scroller.scrollTop + box.top, x: (box.left + box.right) / 2,
    side: [...article.parentElement.children].indexOf(article), width: article.offsetWidth };
}"""


def press(page, key, times=1) -> list[dict]:
    """The tokens that have the focus one after the other, and where they are."""
    found = []
    for _ in range(times):
        page.keyboard.press(key)
        found.append(page.evaluate(LINE))
    return found


def test_keys_move_by_lines_on_their_side(show):
    page = show(many_rows(3000, mean_length=300))
    aside: list[float] = []
    for token in range(150):
        page.locator(f"#t{token}").focus()
        before = page.evaluate(LINE)
        (below,) = press(page, "ArrowDown")
        assert 20 < below["top"] - before["top"] < 40, token
        aside.append(abs(below["x"] - before["x"]))
        assert press(page, "ArrowUp")[0]["top"] == before["top"]
    # Words are as wide as that; lines that end a paragraph are short.
    assert np.median(aside) < 40
    # Over the ends of rows and of responses, there and back.
    begin = page.evaluate(LINE)
    down, up = press(page, "ArrowDown", 40), press(page, "ArrowUp", 40)
    tops = [place["top"] for place in (begin, *down)]
    assert (np.diff(tops) > 20).all() and len({place["id"] for place in down}) == 40
    assert [place["top"] for place in up] == pytest.approx(tops[-2::-1], abs=2)
    page.locator("#beside").check()
    for side in (0, 1):
        page.locator("#reading").evaluate("pane => (pane.scrollTop = 0)")
        page.locator(f"article:nth-child({side + 1}) .token").first.focus()
        assert {place["side"] for place in press(page, "ArrowDown", 60)} == {side}
    page.locator("#reading").evaluate("pane => (pane.scrollTop = 0)")
    page.locator("#t0").focus()
    page.locator("#reading").evaluate("pane => (pane.scrollTop = 30)")
    press(page, "ArrowUp")
    # Above the first line there is none: the pane scrolls.
    page.wait_for_timeout(500)
    assert page.evaluate("[reading.scroller.scrollTop < 30, document.activeElement.id]") == [True, "t0"]


def test_keys_move_by_lines_over_what_is_not_in_the_document(show):
    rows = many_rows(30_000, mean_length=300)
    values = [np.zeros(len(row.token_ids), np.float32) for row in rows]
    values[0][20], values[-1][5] = -3, 3
    page = show([row._replace(statistics={"delta_logp": value}) for row, value in zip(rows, values, strict=True)])
    page.locator("#only").fill("1")
    page.locator("#t20").focus()
    ids = [int(place["id"][1:]) for place in press(page, "ArrowDown", 4)]
    last = 30_000 - len(rows[-1].token_ids)
    assert ids == sorted(ids) and ids[-1] >= last
    assert int(press(page, "ArrowUp", 4)[-1]["id"][1:]) <= 33


def test_samples_are_sorted_searched_and_chosen(awkward):
    ids = "#list .sample > bdi"
    assert texts(awkward, ids) == [f"s{line}" for line in range(1, 7)]
    shown = awkward.locator("#list .sample").nth(1).inner_text().split("\n")
    assert shown[:6] == ["s2", "✗", "4", "−0.750", "−3.000", "0.000"]
    awkward.locator("#headings button", has_text="min").click()
    awkward.locator("#headings button", has_text="min").click()
    assert texts(awkward, ids)[:2] == ["s1", "s2"]
    awkward.locator("#headings button", has_text="tokens").click()
    assert texts(awkward, ids)[:3] == ["s1", "s4", "s2"]
    awkward.locator("#search").fill("עולם")
    assert texts(awkward, ids) == ["s4"] and texts(awkward, ".head .id") == ["s4"]
    awkward.locator("#search").fill("NOW HAS")
    awkward.locator("#verdict").select_option("wrong")
    assert texts(awkward, ids) == ["s2"] and "1 of 6" in awkward.locator("#count").inner_text()
    awkward.locator("#search").fill("")
    awkward.locator("#verdict").select_option("")
    awkward.locator("#list .sample", has_text="s6").click()
    top = awkward.locator("#reading").bounding_box()["y"]
    assert abs(awkward.locator(".row", has_text="s6").bounding_box()["y"] - top) < 2


def test_responses_to_a_prompt_stand_side_by_side(awkward):
    awkward.locator("#beside").check()
    first = awkward.locator(".row").first
    left, right = (first.locator("article").nth(side).bounding_box() for side in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert first.locator("article .token").count() == 14 + 4
    assert (
        awkward.locator(".row").count() == 4
        and "no response of this source" in awkward.locator(".row").nth(1).inner_text()
    )
    choice = first.locator("select")
    assert [text.split(": ")[1] for text in choice.locator("option").all_text_contents()] == ["s2 ✗", "s3 ✓"]
    choice.select_option(label="2 of 2: s3 ✓")
    assert awkward.locator(".row").first.locator("article").nth(1).locator(".token").count() == 3


def test_on_a_narrow_screen_the_list_lies_above_the_responses(show):
    page = show(many_rows(20_000, mean_length=50), width=700)
    page.locator("#toggle-samples").click()
    page.locator("#list .sample").first.wait_for()
    assert texts(page, "#list .sample > bdi")[0] == "s1"
    assert page.locator("#list").evaluate("list => list.scrollTop") == 0
    page.locator("#list .sample", has_text="s3").click()
    assert page.locator("#samples").is_hidden() and "s3" in texts(page, ".head .id")


def test_only_strong_tokens_and_what_is_around_them(show):
    rows = many_rows(400, mean_length=300)[:1]
    values = np.zeros(len(rows[0].token_ids), np.float32)
    values[[100, 250]] = -3, 2
    page = show([rows[0]._replace(statistics={"delta_logp": values, "kl": np.abs(values)})])
    page.locator("#only").fill("1")
    assert page.locator(".token:not(.dim)").evaluate_all("nodes => nodes.map(node => node.id)") == ["t100", "t250"]
    assert page.locator(".token").count() == 2 * 25
    assert texts(page, ".elided") == ["⋯ 88 tokens", "⋯ 125 tokens", f"⋯ {len(values) - 263} tokens"]
    page.locator("#number").select_option("KL(RL ‖ base)")
    assert page.locator("#t100").get_attribute("class") == "token level amount l8"
    page.locator("#only").fill("")
    assert page.locator(".elided").count() == 0


def test_tokens_that_were_not_measured_have_no_numbers(show):
    rows = awkward_rows()[:2]
    delta_logp = [np.full(len(row.token_ids), np.nan, np.float32) for row in rows]
    delta_logp[0][1:3] = -2, 0.5
    drawn = [row._replace(statistics={"delta_logp": values}) for row, values in zip(rows, delta_logp, strict=True)]
    page = show(drawn, numbers=OF_DRAFTS)
    assert page.locator("article .level, article .nan").evaluate_all("nodes => nodes.map(node => node.id)") == [
        "t1",
        "t2",
    ]
    page.locator("#t1").hover()
    assert "Δlog p of the draft\t−2.000" in page.locator("#details").inner_text()
    page = show(drawn[1:], numbers=OF_DRAFTS)
    page.locator("#t0").hover()
    assert (
        "no numbers" in page.locator("#details").inner_text()
        and page.locator("article .level, article .nan").count() == 0
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_legible_and_told_apart(show, theme):
    page = show(awkward_rows(), theme=theme, width=700)
    assert page.locator("#samples").is_hidden()
    colours = page.evaluate(
        """() => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const rgb = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
          };
          const node = document.querySelector(".token"), found = { ink: rgb(getComputedStyle(node).color) };
          const names = ["up", "down", "amount"].flatMap((hue) => [1, 4, 8].map((level) => `level ${hue} l${level}`));
          for (const name of [...names, "dim"]) {
            node.className = `token ${name}`;
            const style = getComputedStyle(node);
            found[name] = rgb(name === "dim" ? style.color : style.backgroundColor);
          }
          found.paper = rgb(getComputedStyle(document.body).backgroundColor);
          return found;
        }"""
    )
    ink, paper, dim = (colours.pop(name) for name in ("ink", "paper", "dim"))
    assert contrast(dim, paper) >= 4.5
    for name, colour in colours.items():
        assert contrast(ink, colour) >= 4.5, name
    assert (luminance(paper) > 0.5) == (theme == "light")
    # Blue and orange differ by far in the difference that colour-blind readers see, that of yellow and blue.
    up, down = (np.array(colours[f"level {hue} l8"], int) for hue in ("up", "down"))
    assert abs(np.diff([min(colour[:2]) - colour[2] for colour in (up, down)])) > 100
    page.locator("#theme").select_option("dark" if theme == "light" else "light")
    flipped = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance([int(part) for part in re.findall(r"\d+", flipped)[:3]]) > 0.5) == (theme == "dark")


def luminance(colour) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = np.array(colour) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_in_a_notebook_the_page_works_in_a_frame(show, tmp_path):
    show(awkward_rows())
    frame = View(tmp_path / "page.html", "", [])._repr_html_()
    outer = tmp_path / "notebook.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><p>Out[1]</p>{frame}", encoding="utf-8")
    page = show(awkward_rows(), within=outer)
    assert page.frames[1].locator("#t3").text_content() == ENGLISH[3]


def test_200_000_tokens_open_in_3_seconds_and_scroll_at_30_frames_a_second(show, tmp_path):
    rows = many_rows(200_000)
    page = show(rows[:2])
    path = tmp_path / "page.html"
    path.write_text(render(rows, title="run", subtitle=""), encoding="utf-8")
    assert path.stat().st_size <= 40e6
    # Other processes on the machine take their time, too: the best of three.
    seconds, frames = [], []
    for _ in range(3):
        begin = time.perf_counter()
        page.reload()
        page.locator(".token").first.wait_for()
        seconds.append(time.perf_counter() - begin)
        frames.append(page.evaluate(SCROLL))
        assert page.locator("*").count() < 5000
        if seconds[-1] <= 3 and frames[-1] >= 30:
            break
    print(f"opened in {min(seconds):.2f} s, {max(frames):.1f} frames/s, {path.stat().st_size / 1e6:.1f} MB")
    assert min(seconds) <= 3 and max(frames) >= 30
    # What lies at the end of a jump is there.
    page.evaluate("document.querySelector('#reading').scrollTop = 1e9")
    page.locator(f"#t{199_999}").wait_for()


SCROLL = """async () => {
  const pane = document.getElementById("reading"), times = [performance.now()];
  while (times.at(-1) - times[0] < 1500) {
    pane.scrollTop += 100;
    times.push(await new Promise(requestAnimationFrame));
  }
  return (times.length - 1) / (times.at(-1) - times[0]) * 1000;
}"""
