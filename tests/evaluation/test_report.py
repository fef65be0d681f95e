from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from icl_moe.evaluation.held_out import HeldOutLoss
from icl_moe.evaluation.panels import systems_panel
from icl_moe.evaluation.report import Section, summary, write_report
from icl_moe.evaluation.results import Asked, Classes, Metrics, Row, TaskResult
from icl_moe.pages.chart import Curve, line_chart, score_chart
from icl_moe.pictures import Cell, Gallery
from icl_moe.tables import Table
from icl_moe.tasks.caption_scores import CaptionScores
from icl_moe.tasks.mask_scores import SegmentationScores

VOID = {"br", "meta", "img", "path", "polyline", "circle"}
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
        self.captions, self.headings = [], []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        if tag == "th":
            self.headings.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open[-1:] == ["caption"]:
            self.captions.append(data)
        if self.open[-1:] == ["th"]:
            self.headings[-1]["text"] = data


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
        "25.0",
        "0.500",
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
    assert "2 classes, of which 1 were seen in training: cat." in everything
    assert "mIoU The mean over classes of the intersection over union" in everything
    assert "does not record which ones it was trained on" in everything


def test_every_table_says_what_it_is_and_every_heading_of_what(page, tmp_path):
    text = (tmp_path / "report.html").read_text()
    assert len(page.captions) == text.count("<table") >= 6
    assert {"Held-out loss", "Training"} < set(page.captions)
    named = [heading for heading in page.headings if "text" in heading]
    assert {heading.get("scope") for heading in named} == {"col", "colgroup", "row"}
    assert "task" in {each["text"] for each in named if each["scope"] == "col"}
    assert "<3>" in {each["text"] for each in named if each["scope"] == "row"}


def test_a_benchmark_of_which_a_part_was_evaluated_says_so_beside_its_score(tmp_path):
    scores = replace(MASKS, standard="coco20i", standard_miou=0.5, standard_fb_iou=0.6)
    result = replace(
        METRICS.tasks["segmentation"], rows=(Row("1 example", "model", scores, ASKED),)
    )
    standard = {"name": "coco20i", "episodes": 4000, "sha256": "", "protocol": "", "score": ""}
    every = replace(METRICS, tasks={"segmentation": result}, standard=standard)
    part, told = replace(every, limit=400), "coco20i mIoU (the first 400 of its 4,000 queries)"
    for metrics in (part, every):
        write_report(tmp_path / "report.html", metrics, [])
        page = (tmp_path / "report.html").read_text()
        assert "coco20i mIoU" in page and page.count(told) == (2 if metrics is part else 0)
        assert (told in summary(metrics)) == (metrics is part)
    assert told.replace("mIoU", "FB-IoU") in summary(part)
    assert told not in summary(replace(part, limit=4000))


@pytest.mark.parametrize(
    ("told", "saw"),
    [
        (
            (),
            "saw the examples and the query alone, and wrote each answer freely, without any part",
        ),
        (
            ("captioning",),
            "saw the examples, the name of the class (in captioning) and the query, and wrote each "
            "answer freely, without any other part",
        ),
        (
            ("segmentation", "captioning"),
            "saw the examples, the name of the class and the query, and wrote each answer freely, "
            "without any other part",
        ),
    ],
)
def test_the_report_says_what_the_model_saw(tmp_path, told, saw):
    write_report(tmp_path / "report.html", METRICS, [], told=told)
    assert saw in (tmp_path / "report.html").read_text()


def test_the_summary_has_the_same_numbers_in_columns():
    lines = summary(METRICS).splitlines()
    head, row = lines[1:3]
    assert row.startswith("1 example")
    assert head.index("mIoU") + len("mIoU") == row.index("50.0") + len("50.0")


def test_a_chart_of_a_single_point_is_drawn():
    (line,) = line_chart({"loss": ([1], [2.0])}, "step", "nats").lines
    assert line.points == "360.0,150.0"


def _scored(
    name: str, source: str, miou: float, half: float, mae: float = 0.1, shots: int | None = None
) -> Row:
    scores = replace(
        MASKS,
        miou=miou,
        mae=mae,
        intervals={"miou": (miou - half, miou + half), "mae": (mae - 0.02, mae + 0.02)},
    )
    asked = replace(ASKED, shots=shots) if source == "model" and shots is not None else None
    return Row(name, source, scores, asked)


def _bold(rows: list[Row], heading: str) -> list[str]:
    """The names of the rows whose entry in a column of the main table is bold."""
    result = replace(METRICS.tasks["segmentation"], rows=tuple(rows))
    panel = systems_panel(replace(METRICS, model_folder="ours", tasks={"segmentation": result}))
    column = [each.split("\N{NO-BREAK SPACE}")[0] for each in panel.columns].index(heading) - 1
    return [line.name for line in panel.lines if line.entries[column].is_best]


def test_only_what_the_intervals_allow_is_bold():
    ours = _scored("1 example", "model", 0.6, 0.05, mae=0.2, shots=1)
    copy = _scored("a copy", "first example", 0.4, 0.05, mae=0.3)
    near = _scored("SANSA, 1 example", "predictions", 0.5, 0.06, mae=0.1)
    oracle = _scored("an oracle", "every object", 0.9, 0.01, mae=0.01)
    assert _bold([ours, copy, oracle], "mIoU") == ["ours, 1 example"]
    assert _bold([ours, copy, near, oracle], "mIoU") == []
    assert _bold([ours, copy, near, oracle], "MAE") == ["SANSA, 1 example"]
    assert _bold([ours, oracle], "mIoU") == [], "there is nothing to compare with"


def test_the_main_table_has_the_papers_columns_and_one_row_for_each_system():
    tasks = {name: replace(result) for name, result in METRICS.tasks.items()}
    more = Row("2 examples", "model", MASKS, replace(ASKED, shots=2))
    other = Row("1 example of another class", "model", MASKS, replace(ASKED, control="shuffled"))
    segmentation = tasks["segmentation"]
    tasks["segmentation"] = replace(segmentation, rows=(*segmentation.rows, more, other))
    panel = systems_panel(replace(METRICS, tasks=tasks))
    assert [line.name for line in panel.lines] == ["<model>, 1 example"]
    headings = [each.split("\N{NO-BREAK SPACE}")[0] for each in panel.columns]
    assert headings == ["", "mIoU", "MAE", "B@4", "CIDEr"]
    assert [group.columns for group in panel.groups] == [1, 2, 2]


def test_a_chart_of_scores_begins_at_0_and_has_a_bar_for_each_interval():
    curve = Curve("ours", [1, 2], [0.3, 0.4], [(0.25, 0.35), None])
    chart = score_chart("IoU", [curve], "examples")
    (line,) = chart.lines
    assert line.bars.count("M") == 1 and len(line.dots) == 2
    assert {"0", "40", "1", "2", "ours", "IoU", "examples"} <= {
        label.text for label in chart.labels
    }
