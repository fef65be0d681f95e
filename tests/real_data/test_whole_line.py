"""The whole pipeline on real COCO files, with the commands that a user types: tokenizer, shards,
two ranks, export, evaluation, predictions.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icl_moe.launcher import free_port

NETWORK = {
    "image_size": 64,
    "codebook_size": 128,
    "code_channels": 8,
    "latent_channels": 32,
    "channels": 32,
    "channel_multipliers": [1, 1, 1, 1],
    "blocks_per_level": 1,
    "attention_sizes": [],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_images_and_captions_go_through_every_stage(
    real_data: Path, run_command: Callable, tmp_path: Path
) -> None:
    coco = real_data / "coco2017_sample"
    instances, captions = (
        coco / f"annotations/{name}_val2017.json" for name in ("instances", "captions")
    )
    images = coco / "val2017"

    def icl_moe(*arguments: object) -> str:
        done = run_command([sys.executable, "-m", "icl_moe", *arguments])
        assert done.returncode == 0, done.stdout
        return done.stdout

    tokenizer, shards, run, model = (
        tmp_path / name for name in ("tokenizer", "shards", "run", "model")
    )
    network = [f"network.{name}={value}" for name, value in NETWORK.items()]
    icl_moe(
        "tokenizer",
        "train",
        "tokenizer_demo",
        f"data.images={images}",
        f"data.annotations={instances}",
        *network,
        "steps=8",
        "batch_size=8",
        "log_every=4",
        "save_every=8",
        "precision=fp32",
        "--out",
        tokenizer,
    )
    icl_moe(
        "shards",
        "build",
        "coco_captions_128",
        "image_size=64",
        "examples=1",
        f"tokenizer={tokenizer}",
        "vocabulary.image_codes=128",
        f"segmentation.images={images}",
        f"segmentation.annotations={instances}",
        f"captioning.images={images}",
        f"captioning.annotations={captions}",
        f"captioning.instances={instances}",
        "captioning.min_descriptions=5",
        "samples=60",
        "--out",
        shards,
    )
    assert json.loads((shards / "manifest.json").read_text())["samples"] == {
        "segmentation": 60,
        "captioning": 60,
    }
    icl_moe("shards", "verify", shards)

    done = run_command(
        [
            "deepspeed",
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "launch_scripts/pretrain.sh",
            "demo",
            f"data.shards={shards}",
            f"training.output={run}",
            "vocabulary={text_merges: 50000, image_codes: 128}",
            "model.width=32",
            "model.layers=2",
            "model.layers_with_experts=[1]",
            "training.steps=6",
            "training.global_batch=4",
            "training.micro_batch=2",
            "training.log_every=2",
        ]
    )
    assert done.returncode == 0, done.stdout
    assert "step 6/6" in done.stdout
    icl_moe("export", run, "--out", model)

    icl_moe(
        "evaluate", model, shards, "--shots", "1", "--limit", "4", "--out", tmp_path / "evaluation"
    )
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert set(metrics["tasks"]) == {"segmentation", "captioning"}
    assert (tmp_path / "evaluation/report.html").stat().st_size > 10_000

    first, second = sorted(images.glob("*.jpg"))[:2]
    with Image.open(first) as image:
        Image.fromarray(np.full((image.height, image.width), 255, np.uint8)).save(
            tmp_path / "mask.png"
        )
    icl_moe(
        "segment",
        model,
        "--example",
        first,
        tmp_path / "mask.png",
        "--query",
        second,
        "--out",
        tmp_path / "out.png",
    )
    with Image.open(tmp_path / "out.png") as mask, Image.open(second) as query:
        assert mask.size == query.size
    (tmp_path / "region.json").write_text(
        json.dumps({"caption": "a dog on grass", "category": "dog", "box": [10, 10, 50, 60]})
    )
    region = json.loads(
        icl_moe(
            "caption", model, "--example", first, tmp_path / "region.json", "--query", second
        ).splitlines()[-1]
    )
    assert set(region) == {"caption", "category", "box"}
