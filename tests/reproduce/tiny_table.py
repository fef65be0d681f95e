"""Reproduces one tiny row with the command's own stages: python tiny_table.py OUT."""

import sys
from pathlib import Path

from icl_moe.reproduce import pipeline
from icl_moe.reproduce.tables import SEGMENTATION, PaperTable, Row, Run, Score, Shards

_SCENES = ("synthetic.images=40", "synthetic.classes=8", "captioning=null", "samples=16")


def tiny_table(scale):
    trained = Shards("masks", "modern_demo", _SCENES, "train")
    held_out = ("synthetic.split=val", "synthetic.seed=1", "synthetic.images=60", "samples=4")
    evaluated = Shards("masks_val", "modern_demo", (*_SCENES, *held_out), "val")
    settings = (
        "training.steps=6",
        "training.save_every=2",
        "training.task_weights=null",
        "training.global_batch=4",
        "training.micro_batch=2",
        "training.dry_run=false",
    )
    run = Run("tiny", trained, evaluated, "modern_demo", settings, ("--batch", "4"))
    return PaperTable("table1", scale, (Row("any", (Score(run, SEGMENTATION),)),), ())


if __name__ == "__main__":
    pipeline.TABLES = {"table1": tiny_table}
    print(pipeline.reproduce("table1", "demo", Path(sys.argv[1])))
