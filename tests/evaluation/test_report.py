from html.parser import HTMLParser

import pytest
from PIL import Image

from icl_moe.evaluation.report import (
    Cell,
    Gallery,
    Section,
    line_chart,
    summary,
    table,
    write_report,
)

VOID = {"br", "meta", "img", "path", "polyline"}
ROW = {
    "name": "1 example",
    "prediction": "model",
    "copy_rate": 0.25,
    "truth_copy_rate": 0.0,
    "queries_per_second": 2.0,
    "episodes": 4,
}
CAPTION_SCORES = {
    "bleu": [0.4, 0.3, 0.2, 0.1],
    "rouge_l": 0.6,
    "cider": 0.869,
    "meteor": None,
    "tokenizer": "T",
}
CAPTION_SCORES |= {"meteor_note": "not computed: why"}
METRICS = {
    "model": "aaaa",
    "shards": "bbbb",
    "limit": None,
    "batch_size": 8,
    "decoding": "greedy",
    "versions": {"torch": "2"},
    "model_folder": "<model>",
    "shards_folder": "shards",
    "tasks": {
        "segmentation": {
            "rows": [
                {
                    **ROW,
                    "miou": 0.5,
                    "mean_iou": 0.25,
                    "mae": 0.125,
                    "class_iou": {"cat": 0.75},
                    "class_episodes": {"cat": 4},
                }
            ],
            "held_out": {
                "targets": 10,
                "loss": 1.0,
                "unigram_entropy": 2.0,
                "pair_loss": [1.25, 0.75],
            },
            "classes": {"evaluated": ["cat", "dog"], "seen_in_training": ["cat"]},
        },
        "captioning": {
            "rows": [{**ROW, **CAPTION_SCORES}],
            "held_out": {"targets": 10, "loss": 1.0, "unigram_entropy": 1.0, "pair_loss": [1.0]},
            "classes": {"evaluated": ["cat"], "seen_in_training": None},
        },
    },
}


class Page(HTMLParser):
    """The page's texts; every tag that is opened must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.open, self.images = [], [], []
        self.feed(text)
        assert self.open == ["html"], self.open

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
        [Section("Training", chart + table(["expert"], [["<3>"]]))],
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
    assert "2 classes, of which 1 were seen in training: cat" in everything
    assert "does not say which ones it was trained on" in everything


def test_the_summary_has_the_same_numbers_in_columns():
    lines = summary(METRICS).splitlines()
    head, row = lines[1:3]
    assert row.startswith("1 example")
    assert head.index("mIoU") + len("mIoU") == row.index("50.0") + len("50.0")


def test_a_chart_of_a_single_point_is_drawn():
    assert "polyline" in line_chart({"loss": ([1], [2.0])}, "step", "nats")
