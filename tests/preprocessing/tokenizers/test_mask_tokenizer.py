"""A mask tokenizer learned from shards, shards whose masks it encoded, and a model that reads
them.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_export
import toy_tokenizer

from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.protocol import evaluate
from icl_moe.images import box_to_mask
from icl_moe.inference.model import InContextModel
from icl_moe.rle import decode_rle
from icl_moe.sequence import SequenceCodec
from icl_moe.settings import load_recipe
from icl_moe.tasks import TASKS
from icl_moe.tokenizers.masks import PatchTokenizer
from icl_moe.tokenizers.text import TextTokenizer
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe
from preprocessing.tokenizers import masks as learning
from preprocessing.tokenizers.masks import learn_patches
from preprocessing.verify import verify_shards


def build(out: Path, *settings: str) -> Path:
    small = ["synthetic.images=40", "samples=25", "caption.box=image", "vocabulary.image_codes=64"]
    recipe = load_recipe(DataRecipe, "demo", [*small, *settings], package="preprocessing")
    build_shards(recipe, out, workers=0)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Shards of only the image tokenizer, a mask tokenizer learned from them, shards of both
    tokenizers, and a model for the latter.
    """
    root = tmp_path_factory.mktemp("masks")
    image = f"tokenizer={toy_tokenizer.save_toy_tokenizer(root / 'tokenizer')}"
    plain, masks = build(root / "plain", image), root / "masks"
    assert main(["tokenizer", "masks", str(plain), "--codes", "16", "--out", str(masks)]) == 0
    both = build(root / "both", image, f"mask_tokenizer={masks}")
    model = toy_export.save_toy_model(root / "model", both)
    return {"plain": plain, "masks": masks, "both": both, "model": model}


def test_masks_and_boxes_are_written_as_patches_and_images_as_before(folders):
    masks = PatchTokenizer.from_pretrained(folders["masks"])
    assert (masks.codes, masks.side) == (16, 8)
    verify_shards(folders["both"])
    both, plain = ShardSet(folders["both"]), ShardSet(folders["plain"])
    assert both.manifest.mask_tokenizer == masks.fingerprint
    assert plain.manifest.mask_tokenizer is None
    codec = SequenceCodec(both.manifest.format, TextTokenizer(1000))
    for task in both.manifest.samples:
        kind = TASKS[task]
        for index in (0, 24):
            sample = both.sample(task, index)
            pairs = codec.decode(sample.sequence, kind).pairs
            before = codec.decode(plain.sample(task, index).sequence, kind).pairs
            for number, (pair, other) in enumerate(zip(pairs, before, strict=True)):
                assert np.array_equal(pair.image, other.image)
                if task == "segmentation":
                    drawn, codes = decode_rle(sample.meta["masks"][number]), pair.mask
                else:
                    drawn, codes = ~box_to_mask(sample.meta["boxes"][number], 64), pair.box_image
                assert codes.tolist() == masks.encode(drawn[None])[0].tolist()


def test_a_model_reads_and_writes_its_masks_with_them(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # METEOR's Java takes seconds.
    metrics = evaluate(folders["model"], folders["both"], tmp_path / "out", limit=4)
    model = InContextModel.from_pretrained(folders["model"], "cpu")
    masks = PatchTokenizer.from_pretrained(folders["masks"])
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()[1:]
    for line in map(json.loads, lines):
        if line["task"] == "segmentation":
            drawn = masks.decode(np.array([line["codes"]]))[0].numpy() > 0
            assert np.array_equal(decode_rle(line["mask"]), drawn)
    ceiling = metrics.tasks["segmentation"].rows[-1]
    assert ceiling.prediction == "tokenizer"
    assert ceiling.scores.miou > 0.8
    half_HW = np.arange(64)[None] < np.full((64, 1), 32)
    (codes,) = model.encode_masks([half_HW])
    assert codes.tolist() == masks.encode(half_HW[None])[0].tolist()


def test_of_many_episodes_evenly_spaced_ones_are_learned_from(folders, monkeypatch):
    """Every tenth of the numbers 0, 2, 4, 7, ..., 24 is held out, beginning with the first."""
    monkeypatch.setattr(learning, "_PIXELS", 12 * 64**2)
    read = []

    def sample(self, task, index, real=ShardSet.sample):
        read.append(index)
        return real(self, task, index)

    monkeypatch.setattr(ShardSet, "sample", sample)
    _, report = learning.learn_mask_tokenizer(folders["plain"], codes=4)
    assert (len(read), read[0], read[-1], report.masks) == (12, 0, 24, 2)


def test_a_page_shows_the_masks_that_the_patches_draw(folders, tmp_path):
    page = tmp_path / "page.html"
    assert main(["shards", "preview", str(folders["both"]), "--out", str(page)]) == 0
    assert "mask as tokens" in page.read_text()


def test_a_model_without_its_mask_tokenizer_is_refused(folders, tmp_path):
    model = shutil.copytree(folders["model"], tmp_path / "model")
    shutil.rmtree(model / "mask_tokenizer")
    with pytest.raises(InputError, match="is not an exported model: it lacks mask_tokenizer"):
        InContextModel.from_pretrained(model, "cpu")


def test_shards_of_other_masks_are_refused(folders, tmp_path):
    with pytest.raises(InputError, match="The model's mask tokenizer differs from that of"):
        evaluate(folders["model"], folders["plain"], tmp_path / "out")


@pytest.mark.parametrize(
    ("side", "codes", "sentence"),
    [
        (4, 16, "cells of 4 pixels, but the image tokenizer of 8"),
        (8, 80, "has 80 codes, more than"),
    ],
)
def test_a_mask_tokenizer_that_does_not_fit_is_refused(folders, tmp_path, side, codes, sentence):
    masks_BHW = np.random.default_rng(0).random((20, 64, 64)) < 0.5
    learn_patches(masks_BHW, side, codes).save_pretrained(tmp_path / "masks")
    image = f"tokenizer={folders['both'] / 'image_tokenizer'}"
    with pytest.raises(InputError, match=sentence):
        build(tmp_path / "out", image, f"mask_tokenizer={tmp_path / 'masks'}")
    assert not (tmp_path / "out").exists()


def test_patches_are_the_masks_own_where_there_are_few_and_too_many_codes_are_refused():
    cells = np.random.default_rng(0).random((6, 8, 8)) < 0.5
    masks_BHW = np.zeros((30, 16, 16), dtype=bool)
    for number, mask_HW in enumerate(masks_BHW):
        mask_HW[:8, :8] = cells[number % 6]
        mask_HW[8:, 8:] = number % 2
    tokenizer = learn_patches(masks_BHW, 8, 8)
    assert np.array_equal((tokenizer.decode(tokenizer.encode(masks_BHW)) > 0).numpy(), masks_BHW)
    assert not tokenizer.patches_KPP[0].any()
    assert (tokenizer.patches_KPP[1] == 1).all()
    with pytest.raises(InputError, match="have 8 different cells of 8 x 8 pixels, fewer than 9"):
        learn_patches(masks_BHW, 8, 9)
