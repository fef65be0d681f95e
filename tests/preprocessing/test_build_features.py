"""`icl-moe shards build` with two tokenizers, one for input images and one for drawings; and a
model trained on such shards reads a user's images in the same way.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_export
import toy_features
import toy_tokenizer
from PIL import Image

from icl_moe import InContextModel
from icl_moe.batch import collate
from icl_moe.data.shards import Manifest, ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.protocol import evaluate
from icl_moe.images import crop_and_resize, load_image, mask_to_pixels, to_pixels
from icl_moe.rle import decode_rle
from icl_moe.settings import load_recipe
from icl_moe.tasks import TASKS
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.features import FeaturesTokenizer
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing.build import build_shards
from preprocessing.preview import write_preview
from preprocessing.recipe import DataRecipe
from preprocessing.tokenizers.masks import learn_patches
from preprocessing.verify import open_codec, verify_shards

Build = Callable[..., Manifest]


@pytest.fixture(scope="module", params=[1, 2], ids="{} stages".format)
def stages(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory, stages) -> Path:
    folder = tmp_path_factory.mktemp("two")
    toy_tokenizer.save_toy_tokenizer(folder / "vqgan")
    toy_features.make_toy_features(folder, stages=stages).save_pretrained(folder / "reader")
    return folder


@pytest.fixture(scope="module")
def build(place, stages) -> Build:
    def build(out: Path, *settings: str, workers: int = 0) -> Manifest:
        overrides = [
            *("synthetic.images=30", "samples=6", "examples=1", "caption.box=image"),
            *toy_tokenizer.recipe_settings(place / "vqgan"),
            *toy_features.recipe_settings(place / "reader", stages),
            *settings,
        ]
        recipe = load_recipe(DataRecipe, "demo", overrides, package="preprocessing")
        return build_shards(recipe, out, workers)

    return build


@pytest.fixture(scope="module")
def folder(place, build) -> Path:
    build(place / "shards")
    return place / "shards"


@pytest.fixture(scope="module")
def exported(place, folder) -> Path:
    return toy_export.save_toy_model(place / "model", folder)


def test_images_are_the_readers_codes_and_drawings_the_drawers(place, folder):
    shards = ShardSet(folder)
    codec, vocabulary = open_codec(shards), shards.manifest.format.vocabulary
    reader = FeaturesTokenizer.from_pretrained(place / "reader")
    drawer = VQGAN.from_pretrained(place / "vqgan")
    for task in shards.manifest.samples:
        sample = shards.sample(task, 2)
        pairs = codec.decode(sample.sequence, TASKS[task]).pairs
        for number, pair in enumerate(pairs):
            source = sample.meta["sources"][number]
            image = load_image(folder / "synthetic" / "images" / source["image"])
            pixels = to_pixels(crop_and_resize(image, tuple(source["crop"]), 64))[None]
            np.testing.assert_array_equal(pair.image, reader.encode(pixels)[0])
            if isinstance(pair, SegmentationPair):
                mask_HW = decode_rle(sample.meta["masks"][number]).astype(bool)
                drawn = drawer.encode(mask_to_pixels(mask_HW)[None])[0]
                np.testing.assert_array_equal(pair.mask, drawn)
            else:
                assert isinstance(pair, CaptionPair) and pair.box_image is not None
        for span in sample.sequence.spans:
            tokens = sample.sequence.tokens_L[span.start : span.stop]
            if span.role == "input":
                assert np.isin(tokens, vocabulary.feature_range).all()


def test_the_folder_names_and_holds_both_tokenizers(place, folder):
    manifest = Manifest.read(folder)
    reader = FeaturesTokenizer.from_pretrained(folder / "features_tokenizer")
    assert manifest.features_tokenizer == reader.fingerprint
    assert manifest.image_tokenizer == VQGAN.from_pretrained(folder / "image_tokenizer").fingerprint
    assert {info.file.split("/")[0] for info in manifest.files} >= {
        "image_tokenizer",
        "features_tokenizer",
    }
    assert manifest.format.vocabulary.features == toy_features.CODES


def test_such_shards_verify_are_built_anew_byte_by_byte_and_can_be_looked_at(
    build, folder, tmp_path
):
    assert verify_shards(folder).samples == {"segmentation": 6, "captioning": 6}
    again = build(tmp_path / "again", workers=2)
    assert again.shards == Manifest.read(folder).shards
    write_preview(folder, tmp_path / "page.html")
    assert "data:image/png" in (tmp_path / "page.html").read_text()


def test_without_the_key_nothing_of_it_is_there(build, tmp_path):
    plain = ("features_tokenizer=null", "vocabulary.features=0", "vocabulary.feature_stages=1")
    manifest = build(tmp_path / "plain", *plain)
    assert manifest.features_tokenizer is None
    assert not (tmp_path / "plain" / "features_tokenizer").exists()
    assert "features" not in {info.file.split("_")[0] for info in manifest.files}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["vocabulary.features=7"],
            r"vocabulary.features is 7, and that of the features tokenizer is 24; set it to that",
        ),
        (
            ["vocabulary.feature_stages=3"],
            "vocabulary.feature_stages is 3, and that of the features tokenizer is [12]; set it",
        ),
        (
            ["features_tokenizer=null", "vocabulary.feature_stages=1"],
            "the recipe names no features_tokenizer; set it to 0",
        ),
        (["features_tokenizer=nowhere"], "There is no tokenizer folder nowhere"),
        (["tokenizer=null"], "tokenizer may be null only where mask_tokenizer and"),
    ],
)
def test_a_recipe_that_does_not_fit_its_reader_is_refused(build, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path / "out", *settings)


def test_grids_of_other_sizes_are_refused(place, build, tmp_path):
    toy_features.make_toy_features(tmp_path, downsampling=16).save_pretrained(tmp_path / "coarse")
    with pytest.raises(InputError, match="features tokenizer has cells of 16 pixels, but"):
        build(tmp_path / "out", f"features_tokenizer={tmp_path / 'coarse'}")


def test_an_exported_model_reads_a_users_images_with_it(exported, monkeypatch):
    model = InContextModel.from_pretrained(exported, device="cpu")
    pictures = [Image.effect_noise((90, 60), 80).convert("RGB") for _ in range(2)]
    read = []
    reader = model.tokenizers.features
    encode = reader.encode
    monkeypatch.setattr(reader, "encode", lambda pixels: read.append(encode(pixels)) or read[-1])
    mask_HW = np.zeros((60, 90), dtype=bool)
    mask_HW[10:30, 10:40] = True
    drawn = model.segment([(pictures[0], mask_HW)], query=pictures[1])
    assert drawn.shape == (60, 90) and drawn.dtype == bool
    assert [codes_BN.shape for codes_BN in read] == [(1, 64), (1, 64)]


def test_training_counts_input_codes_as_visual_targets(folder):
    shards = ShardSet(folder)
    sequence = shards.sample("captioning", 0).sequence
    batch = collate([sequence], shards.manifest.format.vocabulary, "captioning", input_weight=0.5)
    assert int(batch.visual_P.sum()) == 2 * 64 + 2 * 64  # the images and drawn boxes of both pairs
    assert torch.isin(batch.weights_P, torch.tensor([0.5, 1.0])).all()


def test_evaluation_shows_input_images_by_their_mean_colours(
    exported, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # METEOR's Java takes seconds.
    metrics = evaluate(exported, folder, tmp_path, shots=[1], limit=2)
    assert metrics.tasks["segmentation"].rows
    assert "data:image/png" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("missing", "it lacks features_tokenizer"), ("other", "but the model was trained with")],
)
def test_a_model_with_another_reader_than_it_was_trained_with_is_refused(
    place, exported, tmp_path, kind, message
):
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    shutil.rmtree(model / "features_tokenizer")
    if kind == "other":
        toy_features.make_toy_features(tmp_path, dimensions=5).save_pretrained(
            model / "features_tokenizer"
        )
    with pytest.raises(InputError, match=message):
        InContextModel.from_pretrained(model)


def test_where_others_read_and_draw_no_image_tokenizer_is_needed(place, build, tmp_path):
    masks_BHW = np.random.default_rng(0).random((20, 64, 64)) < 0.5
    learn_patches(masks_BHW, side=8, codes=16).save_pretrained(tmp_path / "masks")
    settings = (f"mask_tokenizer={tmp_path / 'masks'}", "tokenizer=null", "captioning=null")
    manifest = build(tmp_path / "shards", *settings, "vocabulary.image_codes=16")
    assert manifest.image_tokenizer is None
    assert not (tmp_path / "shards" / "image_tokenizer").exists()
    verify_shards(tmp_path / "shards")
    write_preview(tmp_path / "shards", tmp_path / "page.html")
    exported = toy_export.save_toy_model(tmp_path / "model", tmp_path / "shards")
    model = InContextModel.from_pretrained(exported, device="cpu")
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    assert model.segment([(picture, np.eye(60, 90) > 0)], query=picture).shape == (60, 90)
    shutil.rmtree(exported / "mask_tokenizer")
    with pytest.raises(InputError, match="it lacks mask_tokenizer"):
        InContextModel.from_pretrained(exported)
