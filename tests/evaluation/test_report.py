from html.parser import HTMLParser

import pytest
from PIL import Image

from icl_moe.evaluation.held_out import HeldOutLoss
from icl_moe.evaluation.report import Section, summary, write_report
from icl_moe.evaluation.results import Asked, Classes, Metrics, Row, TaskResult
from icl_moe.pages.chart import line_chart
from icl_moe.pictures import Cell, Gallery
from icl_moe.tables import Table
from icl_moe.tasks.caption_scores import CaptionScores
from icl_moe.tasks.mask_scores import SegmentationScores

VOID = {"br", "meta", "img", "path", "polyline"}
ASKED = Asked(
    1, None, copy_rate=0.25, truth_copy_rate=0.0, queries_per_second=2.0, seconds_a_query=0.5
)
MASKS = SegmentationScores(4, 0.5, 0.25, 0.125, {"cat": 0.75}, {"cat": 4})
CAPTIONS = CaptionScores(4, (0.4, 0.3, 0.2, 0.1), 0.6, 0.869, None, "not computed: why", "T")
METRICS = Metrics(
    model="aaaa",
    shards="bbbb",
    limit=None,
    batch_size=8,
    model_folder="<model>",
    shards_folder="shards",
    decoding="greedy",
    versions={"torch": "2"},
    tasks={
        "segmentation": TaskResult(
            (Row("1 example", "model", MASKS, ASKED),),
            HeldOutLoss(10, 1.0, 2.0, (1.25, 0.75)),
            Classes(["cat", "dog"], ["cat"]),
        ),
        "captioning": TaskResult(
            (Row("1 example", "model", CAPTIONS, ASKED),),
            HeldOutLoss(10, 1.0, 1.0, (1.0,)),
            Classes(["cat"], None),
        ),
    },
)


class Page(HTMLParser):
    """The page's texts. Checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.open, self.images = [], [], []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def page(tmp_path) -> Page:
    picture = Image.new("RGB", (8, 8), "red")
    gallery = Gallery(
        "Pictures",
        (("cat & dog", (Cell("query", picture), Cell("prediction", picture, "IoU <5"))),),
    )
    chart = line_chart({"loss": ([0, 1, 2], [3.0, 2.0, 1.5])}, "step", "nats")
    write_report(
        tmp_path / "report.html",
        METRICS,
        [gallery],
        [Section("Training", (chart,), (Table(["expert"], [["<3>"]]),))],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return Page((tmp_path / "report.html").read_text())


def test_the_page_is_well_formed_and_needs_no_other_file(page):
    assert len(page.images) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.images)


def test_the_page_shows_scores_notes_sections_and_pictures_as_text(page):
    for text in (
        "50.0",
        "0.125",
        "86.9",
        "75.0",
        "25.0 (0.0)",
        "1.250, 0.750",
        "50.0 %",
        "<model> on shards",
        "cat & dog",
        "IoU <5",
        "<3>",
    ):
        assert text in page.texts, text
    everything = " ".join(page.texts)
    assert "METEOR was not computed: why" in everything
    assert "2 classes; seen in training (1): cat" in everything
    assert "does not record which ones it was trained on" in everything


def test_the_summary_has_the_same_numbers_in_columns():
    lines = summary(METRICS).splitlines()
    head, row = lines[1:3]
    assert row.startswith("1 example")
    assert head.index("mIoU") + len("mIoU") == row.index("50.0") + len("50.0")


def test_a_chart_of_a_single_point_is_drawn():
    (line,) = line_chart({"loss": ([1], [2.0])}, "step", "nats").lines
    assert line.points == "360.0,150.0"
