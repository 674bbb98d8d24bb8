"""The page of a report: nothing in a record gets out of its place, and it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import recorded

from coconut_ds.analysis import report_page
from coconut_ds.analysis.report import named
from coconut_ds.commands import report
from coconut_ds.runs.predictions import read_predictions
from coconut_ds.runs.read_run import read_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>{{ 7 * 7 }} & <b>bold</b>"


def page_of(*folders) -> str:
    """The page of run folders, without the pictures, which take the time."""
    runs = named([read_run(folder) for folder in folders])
    colours = [report_page.RunColour("#000000", "#ffffff")] * len(runs)
    return report_page.render(runs, colours, {"thoughts": [], "curves": []}, made="today")


def full_page(tmp_path, folder) -> str:
    """The page that the command writes."""
    assert report.main([str(folder), "--out", str(tmp_path / "report")]) == 0
    return (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def embedded(page: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


class Tags(HTMLParser):
    """Counts start tags, and collects whatever the page would fetch."""

    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "srcset", "href") and value]


def test_text_of_a_record_is_never_markup(tmp_path):
    rows = [recorded.prediction(0, False, question=HOSTILE, given=HOSTILE, thoughts=[[[HOSTILE, 0.5]]])]
    folder = recorded.write_run(tmp_path, name="a", epochs=1, project=HOSTILE)
    recorded.write_predictions(folder, "epoch_0001", rows)
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    page = page_of(folder)
    assert "<script>window.hit" not in page
    tags = Tags(page).names
    assert (tags.count("script"), tags.count("img"), tags.count("b")) == (2, 0, 0)
    assert embedded(page)["rows"][0]["question"] == HOSTILE
    assert embedded(page)["rows"][0]["thoughts"] == [[[HOSTILE, 0.5]]]
    assert "{{ 7 * 7 }}" in page


def test_the_page_names_no_other_file_and_forbids_requests(tmp_path):
    page = full_page(tmp_path, recorded.write_run(tmp_path))
    addresses = Tags(page).addresses
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_rows_beyond_the_limit_are_left_out_right_ones_first(tmp_path):
    folder = recorded.write_run(tmp_path, n_questions=0)
    rows = [recorded.prediction(index, correct=index % 4 != 3) for index in range(12)]
    predictions = read_predictions(recorded.write_predictions(folder, "epoch_0003", rows))
    assert [row.index for row in report_page.chosen(predictions, limit=5)] == [0, 1, 3, 7, 11]
    assert [row.index for row in report_page.chosen(predictions, limit=2)] == [3, 7]
    assert [row.index for row in report_page.chosen(predictions, limit=99)] == list(range(12))


def test_a_page_says_which_rows_it_does_not_have(tmp_path):
    folder = recorded.write_run(tmp_path, n_questions=report_page.ROWS_PER_FILE + 1)
    page = page_of(folder)
    assert len(embedded(page)["rows"]) == 1000
    assert "a, epoch_0003: 1,000 of 1,001, wrong ones first" in page


def test_answers_of_several_runs_to_one_question_stand_together(tmp_path):
    runs = [recorded.write_run(tmp_path, "a", epochs=2), recorded.write_run(tmp_path, "b", epochs=3)]
    recorded.write_predictions(runs[0], "eval_test", [recorded.prediction(0, True)])
    data = embedded(page_of(*runs))
    assert data["files"] == ["epoch_0002", "eval_test", "epoch_0003"]
    places = [(row["file"], row["index"], row["run"]) for row in data["rows"]]
    assert places == [(2 * run, index, run) for index in range(6) for run in (0, 1)] + [(1, 0, 0)]


def test_a_probability_that_is_no_number_does_not_break_the_data(tmp_path):
    folder = recorded.write_run(tmp_path, epochs=1)
    recorded.write_predictions(folder, "epoch_0001", [recorded.prediction(0, True, thoughts=[[["x", float("nan")]]])])
    assert embedded(page_of(folder))["rows"][0]["thoughts"] == [[["x", None]]]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # The page is our own, and root, as in a container, gets no sandbox.
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page; whatever the browser complains of, or fetches beside the page, fails the test."""
    complaints: list[str] = []
    fetched: list[str] = []
    contexts = []
    file = tmp_path / "page.html"

    def open_page(text: str, width: int = 1280, scheme: str = "light", javascript: bool = True):
        file.write_text(text, encoding="utf-8")
        size = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=javascript))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in fetched if not url.startswith("data:")] == [file.as_uri()] * len(contexts)


def test_a_browser_shows_all_pictures_light_and_dark(visit, tmp_path):
    text = full_page(tmp_path, recorded.write_run(tmp_path))
    sources = []
    for scheme in ("light", "dark"):
        page = visit(text, scheme=scheme)
        images = page.locator("figure img")
        images.first.wait_for()
        assert page.evaluate("Promise.all([...document.images].map(image => image.decode())).then(() => true)")
        assert images.evaluate_all("images => images.map(image => image.naturalWidth)") == [960] * 6
        sources.append(images.evaluate_all("images => images.map(image => image.currentSrc)"))
    assert not set(sources[0]) & set(sources[1])
    assert page.inner_text("h1") == "a finished"


def test_the_filter_finds_what_is_asked_for(visit, tmp_path):
    page = visit(page_of(recorded.write_run(tmp_path, n_questions=60)))
    assert page.inner_text("#count") == "60 of 60 examples: 40 right, 20 wrong"
    assert page.locator("#rows tr").count() == 50
    page.click("#more")
    assert page.locator("#rows tr").count() == 60
    assert not page.is_visible("#more")
    page.select_option("#verdict", "wrong")
    assert page.inner_text("#count") == "20 of 60 examples: 0 right, 20 wrong"
    assert page.locator("#rows tr.right").count() == 0
    page.fill("#text", "QUESTION 1")
    # 12, 15 and 18, wrong as every third one.
    assert page.inner_text("#count") == "3 of 60 examples: 0 right, 3 wrong"
    page.select_option("#steps", "3")
    assert page.locator("#rows td:first-child").all_inner_texts() == ["15"]
    page.fill("#text", "nowhere")
    assert page.inner_text("#count") == "0 of 60 examples: 0 right, 0 wrong"
    page.fill("#text", "")
    page.select_option("#verdict", "right")
    assert page.inner_text("#count") == "20 of 60 examples: 20 right, 0 wrong"


def test_several_runs_are_told_apart_in_the_filter(visit, tmp_path):
    page = visit(page_of(recorded.write_run(tmp_path, "a"), recorded.write_run(tmp_path, "b", epochs=2)))
    assert page.locator("#rows tr").count() == 12
    page.select_option("#run", label="b")
    assert page.inner_text("#count").startswith("6 of 12 examples")
    assert set(page.locator("#rows .of-run").all_inner_texts()) == {"b"}
    page.select_option("#file", label="epoch_0003")
    assert page.inner_text("#count").startswith("0 of 12 examples")


def test_what_every_run_has_alike_is_not_offered_as_a_filter(visit, tmp_path):
    page = visit(page_of(recorded.write_run(tmp_path)))
    assert [page.is_visible(field) for field in ("#text", "#verdict", "#steps", "#run", "#file")] == [True] * 3 + [
        False
    ] * 2


def test_an_opened_question_shows_what_the_model_wrote_and_thought(visit, tmp_path):
    folder = recorded.write_run(tmp_path, epochs=1)
    rows = [
        recorded.prediction(0, True, text=f"n3 n7\n### {HOSTILE}", question=HOSTILE),
        recorded.prediction(1, True, thoughts=[], n_thoughts=4),
    ]
    recorded.write_predictions(folder, "epoch_0001", rows)
    page = visit(page_of(folder))
    thoughts = page.locator("#rows .of-thoughts").all_inner_texts()
    assert thoughts[0].split() == ["n3>n7", "91%", "n7>n5", "62%"]
    assert thoughts[1] == "4"
    page.click("#rows details >> nth=0")
    opened = page.locator("#rows details").first
    assert opened.locator("pre").inner_text() == f"n3 n7\n### {HOSTILE}"
    assert opened.locator("summary").inner_text() == HOSTILE
    assert opened.locator(".alternatives").count() == 2
    assert opened.locator(".alternatives .token").count() == 6
    assert page.evaluate("window.hit") is None


def test_one_of_a_kind_is_in_the_singular(visit, tmp_path):
    folder = recorded.write_run(tmp_path, epochs=1)
    rows = [
        recorded.prediction(0, True, n_new_tokens=1, n_thoughts=2),
        recorded.prediction(1, True, n_new_tokens=3, n_thoughts=1),
    ]
    recorded.write_predictions(folder, "epoch_0001", rows)
    page = visit(page_of(folder))
    page.evaluate("document.querySelectorAll('.question').forEach(each => { each.open = true; })")
    page.locator(".question pre").nth(1).wait_for()
    titles = page.locator(".question h4:first-of-type").all_inner_texts()
    assert titles == ["The model wrote 1 token after 2 thoughts", "The model wrote 3 tokens after 1 thought"]


CONTRAST = """field => {
    const luminance = (colour) => {
        const parts = colour.match(/\\d+/g).map(Number).map(each => each / 255)
            .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05;
    };
    const border = luminance(getComputedStyle(field).borderTopColor);
    return [getComputedStyle(field).backgroundColor, getComputedStyle(document.body).backgroundColor]
        .map(luminance).map(ground => Math.max(border, ground) / Math.min(border, ground));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_borders_of_fields_can_be_seen(scheme, visit, tmp_path):
    page = visit(page_of(recorded.write_run(tmp_path)), scheme=scheme)
    for field in ("#text", "#verdict"):
        # Against what is in the field and what is around it; 3 is what WCAG 2.1 asks of the edge of a control.
        assert min(page.locator(field).evaluate(CONTRAST)) >= 3


def test_boxes_that_scroll_can_be_reached_and_have_a_name(visit, tmp_path):
    runs = [recorded.write_run(tmp_path, name) for name in ("a", "b")]
    recorded.write_predictions(runs[0], "eval_test", [recorded.prediction(0, True)])
    page = visit(page_of(*runs))
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    names = ["Runs", "Accuracy by stage", "Other sets"]
    names += ["Configuration: Differs between the runs", "Configuration: The same in all runs"]
    names += ["Environment: The same in all runs"]
    for name in names:
        page.get_by_role("region", name=name, exact=True).focus()
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == name
    assert page.locator(".scroll").count() == len(names)


def test_a_question_that_opens_has_a_mark_that_turns(visit, tmp_path):
    page = visit(page_of(recorded.write_run(tmp_path)))
    mark = "summary => ['content', 'width', 'rotate'].map(key => getComputedStyle(summary, '::before')[key])"
    question = page.locator(".question summary").first
    content, width, closed = question.evaluate(mark)
    assert content == '""'
    assert float(width.removesuffix("px")) > 0
    question.click()
    assert (closed, question.evaluate(mark)[2]) == ("none", "90deg")


def test_without_javascript_there_is_no_dead_form(visit, tmp_path):
    text = page_of(recorded.write_run(tmp_path))
    parts = ("filter", "table", "unscripted")
    shown = {use: [visit(text, javascript=use).is_visible(f"#{part}") for part in parts] for use in (True, False)}
    assert shown == {True: [True, True, False], False: [False, False, True]}


def test_a_phone_does_not_scroll_sideways(visit, tmp_path):
    long = "a_run_with_a_very_long_name_that_has_no_place_to_break_in_it_at_all_seed12"
    folders = [recorded.write_run(tmp_path, name, n_questions=2) for name in ("a", long)]
    rows = [recorded.prediction(0, False, question="x" * 400, given="y" * 200)]
    recorded.write_predictions(folders[0], "eval_" + "z" * 90, rows)
    (folders[0] / "environment.json").write_text(json.dumps({"command": ["w" * 300]}))
    page = visit(page_of(*folders), width=390)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]") == [390, 390]
    assert page.is_visible("#filter")
    # A table that does not fit scrolls in its own box.
    assert page.locator(".scroll").first.evaluate("box => box.scrollWidth > box.clientWidth")


def test_a_run_that_has_only_begun_has_a_page_that_says_what_is_missing(visit, tmp_path):
    folder = recorded.write_run(tmp_path, epochs=0, finished=False, num_epochs=9)
    page = visit(full_page(tmp_path, folder))
    assert page.inner_text("h1") == "a not finished"
    assert page.locator("figure .empty").count() == 6
    assert "No predictions to show" in page.inner_text("#examples")
    assert page.locator("figure img").count() == 0
