"""A run that starts from the weights of an exported model."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_run import REPOSITORY, SETTINGS

from icl_moe.cli import main
from icl_moe.inference.model import InContextModel

POSITIONS = "position_embedding.weight"


@pytest.fixture(scope="module")
def model(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("initial") / "my model"
    assert main(["export", str(undisturbed), "--out", str(out)]) == 0
    return out


@pytest.fixture
def begin(shards: Path, model: Path, tmp_path: Path, command: Callable) -> Callable:
    """Trains by one process from the model, at a rate that leaves it as it is. Returns the exit
    code and what was printed.
    """

    def run(*settings: str, start: Path | None = None) -> tuple[int, str]:
        arguments = (
            *("train", "demo", *SETTINGS, f"data.shards={shards}", "engine=zero0_fp32"),
            *(f"training.output={tmp_path / 'run'}", "optimizer.name=adamw"),
            *("optimizer.learning_rate=1e-12", "optimizer.weight_decay=0", "training.steps=1"),
            *("training.dry_run=false", f"training.init_from={start or model}", *settings),
        )
        done = command(sys.executable, "-m", "icl_moe", *arguments)
        return done.returncode, done.stdout

    return run


def test_the_weights_are_those_of_the_model_and_positions_may_be_added(begin, model, tmp_path):
    recipe = json.loads((model / "training.json").read_text())["recipe"]
    positions = recipe["model"]["positions"]
    code, printed = begin(f"model.positions={positions + 40}")
    assert code == 0, printed
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    was, now = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert was.keys() == now.keys() and len(now[POSITIONS]) == positions + 40
    for name, value in was.items():
        torch.testing.assert_close(now[name][: len(value)], value, rtol=0, atol=1e-9)
    assert now[POSITIONS][positions:].std() > 0.001


def test_the_record_names_the_model_and_the_run_goes_on_without_it(begin, model, tmp_path):
    moved = Path(shutil.copytree(model, tmp_path / "given"))
    config = json.loads((moved / "config.json").read_text())
    config["classes"]["segmentation"].append("a class of its own")
    (moved / "config.json").write_text(json.dumps(config))
    assert begin(start=moved)[0] == 0
    shutil.rmtree(moved)
    code, printed = begin("training.steps=2", start=moved)
    assert code == 0, printed
    code, printed = begin("training.steps=3", start=model)
    assert code == 2 and f"training.init_from is {moved} there and {model} here" in printed

    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    trained = json.loads((tmp_path / "out/training.json").read_text())
    assert trained["stretches"] == 2 and trained["initial_model"]["name"] == "given"
    assert str(tmp_path) not in (tmp_path / "out/training.json").read_text()
    assert "| started from the weights of | given (sha256 " in (
        (tmp_path / "out/README.md").read_text()
    )
    classes = json.loads((tmp_path / "out/config.json").read_text())["classes"]
    assert "a class of its own" in classes["segmentation"] and len(classes["segmentation"]) > 1


def test_a_model_claims_no_task_that_it_was_not_trained_on_and_no_place_on_this_machine(
    shards, tmp_path, command
):
    engine = shutil.copy(REPOSITORY / "ds_configs/zero0_fp32.json", tmp_path / "mine.json")
    arguments = (
        *("train", "demo", *SETTINGS, f"data.shards={shards}", f"data.cache={tmp_path}"),
        *(f"training.output={tmp_path / 'run'}", "training.task_weights={segmentation: 1}"),
        *("optimizer.name=adamw", "training.steps=1", f"engine={engine}"),
    )
    done = command(sys.executable, "-m", "icl_moe", *arguments)
    assert done.returncode == 0, done.stdout
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert {"segmentation"} == set(
        json.loads((tmp_path / "out/config.json").read_text())["classes"]
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "# An in-context model for segmentation\n" in card and "caption" not in card
    record = (tmp_path / "out/training.json").read_text()
    assert str(tmp_path) not in record and json.loads(record)["recipe"]["engine"] == "mine.json"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["model.width=64"], "model.width of {} is 32, and the recipe's is 64"),
        (["model.feed_forward=dense"], "model.feed_forward of {} is attributes, and the"),
    ],
)
def test_a_model_of_another_kind_is_refused(begin, model, settings, reason):
    code, printed = begin(*settings)
    assert code == 2 and f"training.init_from: {reason.format(model)}" in printed
    assert printed.count("\n") == 1


def _other_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "image_tokenizer": "0123456789abcdef"})
    )


def _one_tensor_less(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_other_tokenizer, "image_tokenizer of {} is 0123456789abcdef, and that of the shards"),
        (_one_tensor_less, "does not fit its config.json: it lacks norm.weight of [32] numbers"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it lacks model.safetensors"),
        (shutil.rmtree, "There is no model folder {}"),
    ],
)
def test_a_damaged_model_is_named(begin, model, tmp_path, damage, reason):
    folder = Path(shutil.copytree(model, tmp_path / "damaged"))
    damage(folder)
    code, printed = begin(start=folder)
    assert code == 2 and "training.init_from: " in printed and reason.format(folder) in printed
    assert len([line for line in printed.splitlines() if line.startswith("icl-moe: train")]) == 1
    assert "Traceback" not in printed and not list((tmp_path / "run").glob("checkpoints/*"))


def draw_horizons(folder: Path, count: int, seed: int) -> None:
    """Pictures of two colours, one above the other, and masks of the upper part."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        above_HW = np.arange(96)[:, None].repeat(96, axis=1) < rng.integers(28, 68)
        colours = rng.integers(30, 226, (2, 3))
        picture = np.where(above_HW[..., None], *colours) + rng.normal(0, 6, (96, 96, 3))
        for kind, pixels in (("images", picture.clip(0, 255)), ("masks", above_HW * 255)):
            Image.fromarray(pixels.astype(np.uint8)).save(folder / kind / f"{number}.png")


def test_twenty_pictures_of_a_new_kind_teach_the_shipped_model(tmp_path, command):
    """What marks are of, here a place and not a colour, is new to it; it is asked about pictures
    that it was not trained on.
    """

    def icl_moe(*arguments: object) -> None:
        done = command(sys.executable, "-m", "icl_moe", *arguments)
        assert done.returncode == 0, done.stdout

    for split, count, samples in (("train", 20, 320), ("held_out", 10, "null")):
        draw_horizons(tmp_path / split, count, seed=count)
        source = ("segmentation.source=folder", f"segmentation.images={tmp_path / split}/images")
        masks = (f"segmentation.masks={tmp_path / split}/masks", "captioning=null")
        out = ("--out", tmp_path / f"shards_{split}")
        build = ("shards", "build", "modern_demo", *source, *masks, f"samples={samples}")
        icl_moe(*build, *out)
    settings = (
        *("training.init_from=demo", f"data.shards={tmp_path / 'shards_train'}"),
        *("training.steps=40", "training.global_batch=8", "training.micro_batch=8"),
        *("training.task_weights=null", f"training.output={tmp_path / 'run'}"),
        *("optimizer.learning_rate=1.0e-3", "optimizer.matrix_learning_rate=0.005"),
        "optimizer.warmup_steps=10",
    )
    icl_moe("train", "modern_64", *settings)
    icl_moe("export", tmp_path / "run", "--out", tmp_path / "mine")

    def mean_iou(model: str | Path) -> float:
        loaded = InContextModel.from_pretrained(model)
        folder, ious = tmp_path / "held_out", []
        for number in range(10):
            other = (number + 1) % 10
            example = (folder / f"images/{other}.png", folder / f"masks/{other}.png")
            mask_HW = loaded.segment([example], folder / f"images/{number}.png")
            true_HW = np.asarray(Image.open(folder / f"masks/{number}.png")) > 0
            ious.append((mask_HW & true_HW).sum() / (mask_HW | true_HW).sum())
        return float(np.mean(ious))

    before, after = mean_iou("demo"), mean_iou(tmp_path / "mine")
    assert before < 0.6 and after > before + 0.25, (before, after)
