"""report.html in headless Chromium: whole, without another file, on a desktop, a phone and A4."""

import re
import shutil

import pytest

from icl_moe.evaluation.protocol import evaluate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
A4_WIDTH = 703
"""The width of an A4 page without its margins, in CSS pixels."""

OUTSIDE = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll") &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""
CUT = """[...document.querySelectorAll(".scroll")].filter(e =>
    e.scrollWidth > document.documentElement.clientWidth).map(e => e.textContent)"""
OVERLAPS = """[...document.querySelectorAll(".charts svg")].flatMap(chart => {
    const boxes = [...chart.querySelectorAll("text")].map(e => e.getBoundingClientRect());
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
        a.left < b.right && b.left < a.right && a.top < b.bottom - 3 && b.top < a.bottom - 3));
})"""


@pytest.fixture(scope="module")
def report(toy_model_folder, toy_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")  # No Java.
        evaluate(toy_model_folder, toy_shards, folder, shots=(0, 1, 2))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, report, width: int):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.errors, page.asked = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url.split(":")[0]))
    page.goto(report.as_uri())
    return page


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_fits_a_desktop_and_a_telephone(browser, report, width):
    page = opened(browser, report, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(OVERLAPS) == []
    pictures = page.evaluate("[...document.images].map(e => e.naturalWidth)")
    assert len(pictures) > 30 and min(pictures) > 0
    assert page.errors == [] and set(page.asked) <= {"file", "data"}
    numbers = page.evaluate(
        '[...document.querySelectorAll("figure")].filter(e => e.querySelector(".number")).length'
    )
    assert numbers >= 8
    best = page.locator(".case", has_text="Best (rank 1 of 11)").first
    assert best.locator("figure").count() == 5  # Two examples, the query, prediction and truth.
    tops = best.locator("img").evaluate_all("all => all.map(e => e.getBoundingClientRect().top)")
    assert len({round(top) for top in tops}) == (1 if width > 1000 else 2)
    page.close()


def test_a_table_is_scrolled_under_the_names_of_its_rows(browser, report):
    page = opened(browser, report, 390)
    table = page.locator(".scroll:has(.panel)").first
    name = table.locator("tbody th").first
    before = name.bounding_box()["x"]
    table.evaluate("e => { e.scrollLeft = 200 }")
    assert table.evaluate("e => e.scrollLeft") > 0
    assert name.bounding_box()["x"] == before
    page.close()


def test_the_report_prints_on_a4(browser, report):
    page = opened(browser, report, A4_WIDTH)
    printed = page.pdf(prefer_css_page_size=True)
    sizes = {
        tuple(map(float, size.split()))
        for size in re.findall(rb"/MediaBox \[0 0 ([^\]]+)\]", printed)
    }
    assert all(size == pytest.approx((595, 842), abs=2) for size in sizes) and sizes
    page.emulate_media(media="print")
    assert page.evaluate(CUT) == [], "tables are cut off at the edge of the paper"
    page.close()
