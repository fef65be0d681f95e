"""Draws two tiny figures with the command's own stages: python tiny_figures.py OUT."""

import sys
from pathlib import Path

from icl_moe.reproduce import pipeline
from icl_moe.reproduce.figures import Elsewhere, PaperFigure
from icl_moe.reproduce.tables import OF_SHAPES, SEGMENTATION, Row, Run, Score, Shards

_SCENES = ("synthetic.images=60", "synthetic.classes=8", "samples=16")
_HELD_OUT = ("synthetic.split=val", "synthetic.seed=1", "synthetic.images=60", "samples=4")
_TRAINED = Shards("both", "modern_demo", _SCENES, "train")
_EVALUATED = Shards("both_val", "modern_demo", (*_SCENES, *_HELD_OUT), "val")
_SHAPES = (*OF_SHAPES, "synthetic.images=100", "samples=4")
_SETTINGS = (
    "training.steps=4",
    "training.save_every=2",
    "training.gradient_report_every=2",
    "training.task_weights=null",
    "training.global_batch=4",
    "training.micro_batch=2",
    "training.dry_run=false",
)


def _run(feed_forward: str) -> Run:
    settings = (*_SETTINGS, f"model.feed_forward={feed_forward}")
    name = f"tiny_{feed_forward}"
    return Run(name, _TRAINED, _EVALUATED, "modern_demo", settings, ("--batch", "4"))


def tiny_gradients(scale):
    rows = tuple(
        Row(name, (Score(_run(kind), SEGMENTATION),))
        for name, kind in (("dense_mt", "dense"), ("attributes_mt", "attributes"))
    )
    return PaperFigure("figure6", scale, "Gradients", rows, ("Tiny.",))


def tiny_pictures(scale):
    elsewhere = Elsewhere(Shards("shapes", "modern_demo", _SHAPES, "val"), "of another world")
    rows = (Row("ours", (Score(_run("dense"), SEGMENTATION),)),)
    return PaperFigure(
        "figure7", scale, "Masks", rows, ("Tiny.",), SEGMENTATION, elsewhere=elsewhere
    )


if __name__ == "__main__":
    pipeline.FIGURES = {"figure6": tiny_gradients, "figure7": tiny_pictures}
    for name in pipeline.FIGURES:
        print(pipeline.reproduce(name, "demo", Path(sys.argv[1])))
