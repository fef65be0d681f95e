"""Inference needs neither the training engine nor modules that only Linux has."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import toy_export
from PIL import Image

ABSENT = (
    "accelerate",
    "deepspeed",
    "fsspec",
    "megatron",
    "ninja",
    "pycocoevalcap",
    "pycocotools",
    "tensorboard",
    "torchmetrics",
    "webdataset",
)

PROGRAM = """
import sys

sys.modules["fcntl"] = None  # This module is missing on Windows.
from icl_moe.cli import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory, repository):
    """The installed packages, without those that inference must not need."""
    folder = tmp_path_factory.mktemp("site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        name = entry.name.lower().replace("-", "_")
        if not name.startswith((*ABSENT, "__editable__", "icl_moe")) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return f"{folder}{os.pathsep}{repository}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lean")
    toy_export.build_toy_line(folder)
    Image.new("RGB", (80, 64), "red").save(folder / "image.png")
    mask = np.zeros((64, 80), dtype=np.uint8)
    mask[10:40, 10:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    for part, file in (("images", "image.png"), ("masks", "mask.png")):
        (folder / "examples" / part).mkdir(parents=True)
        (folder / "examples" / part / "image.png").write_bytes((folder / file).read_bytes())
    (folder / "region.json").write_text(
        '{"caption": "a red thing", "category": "thing", "box": [1, 2, 30, 40]}'
    )
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            "segment model --example image.png mask.png --query image.png --out out.png",
            marks=pytest.mark.slow,  # What it loads, `label` loads too.
        ),
        "caption model --example image.png region.json --query image.png",
        "label model --examples examples --images examples/images --out labels.json "
        "--review page.html",
    ],
    ids=["segment", "caption", "label"],
)
def test_inference_runs_without_the_packages_of_training(folder, packages, arguments):
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, *arguments.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
