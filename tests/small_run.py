"""Starts a small training run on two ranks."""

import csv
import sys
from pathlib import Path

from icl_moe.launcher import free_port

REPOSITORY = Path(__file__).resolve().parent.parent

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

FAULTY = (str(Path(__file__).with_name("training") / "faulty_training.py"),)
"""The program to launch for a run with the fault in the variable FAULT."""

SETTINGS = (
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.layers_with_experts=[1]",
    "model.dropout=0.1",
    "vocabulary.image_codes=64",
    "vocabulary.mask=true",
    "training.global_batch=4",
    "training.micro_batch=1",
    "training.log_every=1",
    "training.save_every=100",
    "optimizer.warmup_steps=2",
)


def launcher() -> tuple[str, ...]:
    """The deepspeed launcher with two ranks, on a free port."""
    return (
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    )


def losses(output: Path) -> dict[str, list[list[str]]]:
    found = {}
    for name in ("image_loss", "text_loss", "gradient_norm", "auxiliary_loss"):
        with (output / "csv_monitor" / f"train_{name}.csv").open() as file:
            # A resumed run writes the header again.
            found[name] = [row for row in csv.reader(file) if row[0] != "step"]
    return found
