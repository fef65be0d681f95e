"""The offline stage on real COCO and Visual Genome files; every count is compared with the
files.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_tokenizer
import yaml
from pycocotools.coco import COCO
from small_builds import regions_of_classes

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.rle import decode_rle
from icl_moe.settings import from_dict, load_recipe
from preprocessing.build import build_shards
from preprocessing.classes import COCO_CLASSES
from preprocessing.coco import read_segmentation
from preprocessing.composed import compose_images, open_album
from preprocessing.image_check import ImageCheck
from preprocessing.pool import Pool
from preprocessing.recipe import CaptioningSource, ComposedImages, DataRecipe, SegmentationSource
from preprocessing.verify import verify_shards
from preprocessing.visual_genome import read_captioning, read_json_list


class AllUsable:
    """Treats every image as usable, since only Visual Genome's annotations are available."""

    def keep(self, items: Iterable[Any], folder: Path, pool: Pool) -> list[Any]:
        return list(items)


@pytest.fixture(scope="module")
def coco(real_data) -> Path:
    return real_data / "coco2017_sample"


@pytest.fixture(scope="module")
def genome(real_data) -> Path:
    return real_data / "visual_genome_100"


def segmentation(coco: Path, split: str, **settings: object) -> SegmentationSource:
    files = {
        "images": str(coco / f"{split}2017"),
        "annotations": str(coco / f"annotations/instances_{split}2017.json"),
    }
    return SegmentationSource("coco", **files, **settings)


@pytest.mark.parametrize(
    ("split", "images", "annotations", "regions"),
    [("train", 443, 3646, 1460), ("val", 220, 1782, 724)],
)
def test_coco_gives_a_region_for_each_image_and_class(coco, split, images, annotations, regions):
    source = segmentation(coco, split)
    content = json.loads(Path(source.annotations).read_text())
    assert (len(content["images"]), len(content["annotations"])) == (images, annotations)
    pool = read_segmentation(source, 64, AllUsable(), workers=0)
    seen = {
        (record["image_id"], record["category_id"])
        for record in content["annotations"]
        if not record["iscrowd"]
    }
    assert len(pool.regions) == regions == len(seen) - pool.skipped["empty_masks"]
    assert sorted(regions_of_classes(pool)) == sorted(COCO_CLASSES)


def test_a_mask_of_the_whole_image_is_the_union_that_pycocotools_draws(coco):
    """If image_size equals the crop's side, nothing is resized, so all pixels must agree."""
    api = COCO(str(coco / "annotations/instances_val2017.json"))
    names = {record["name"]: number for number, record in api.cats.items()}
    side = 480
    checked = 0
    for region in read_segmentation(
        segmentation(coco, "val"), side, AllUsable(), workers=0
    ).regions:
        if min(region.image.width, region.image.height) != side:
            continue
        image_id = next(
            number
            for number, record in api.imgs.items()
            if record["file_name"] == region.image.name
        )
        numbers = api.getAnnIds(imgIds=[image_id], catIds=[names[region.category]])
        union = np.logical_or.reduce(
            [api.annToMask(annotation).astype(bool) for annotation in api.loadAnns(numbers)]
        )
        left, top, right, bottom = region.crop
        np.testing.assert_array_equal(
            decode_rle({"size": [side, side], "counts": region.target.counts}),
            union[top:bottom, left:right],
        )
        checked += 1
    assert checked > 200


def test_coco_with_its_captions_becomes_shards_that_verify(coco, tmp_path):
    images, annotations = str(coco / "val2017"), coco / "annotations"
    instances, captions = (
        str(annotations / "instances_val2017.json"),
        str(annotations / "captions_val2017.json"),
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "tokenizer": str(toy_tokenizer.save_toy_tokenizer(tmp_path / "tokenizer")),
                "image_size": 64,
                "examples": 3,
                "vocabulary": {"text_merges": 50000, "image_codes": toy_tokenizer.CODES},
                "segmentation": {"source": "coco", "images": images, "annotations": instances},
                "captioning": {
                    "source": "coco_captions",
                    "images": images,
                    "annotations": captions,
                    "instances": instances,
                    "min_descriptions": 5,
                },
            }
        )
    )
    out = tmp_path / "shards"
    manifest = build_shards(load_recipe(DataRecipe, str(recipe)), out, workers=2)
    assert manifest.samples == {"segmentation": 672, "captioning": 1020}
    assert {task: len(classes) for task, classes in manifest.classes.items()} == {
        "segmentation": 57,
        "captioning": 36,
    }
    assert manifest.classes["segmentation"]["person"] == 114
    assert verify_shards(out) == manifest

    true_captions = {
        record["id"]: record["caption"]
        for record in json.loads(Path(captions).read_text())["annotations"]
    }
    shards = ShardSet(out)
    for index in range(0, 1020, 51):
        meta = shards.sample("captioning", index).meta
        for source, caption in zip(meta["sources"], meta["captions"], strict=True):
            assert caption == " ".join(true_captions[source["annotations"][0]].split()).rstrip(" .")


def genome_source(genome: Path, **settings: object) -> CaptioningSource:
    files = {"regions": "region_descriptions", "objects": "objects", "image_data": "image_data"}
    paths = {key: str(genome / f"{name}.json") for key, name in files.items()}
    given = {"images": "no images", **paths, "min_descriptions": 0, **settings}
    return CaptioningSource("visual_genome", **given)


def is_past_the_edge(region: dict, sizes: dict[int, tuple[int, int]]) -> bool:
    width, height = sizes[region["image_id"]]
    return (
        region["x"] < 0
        or region["y"] < 0
        or region["x"] + region["width"] > width
        or region["y"] + region["height"] > height
    )


def test_visual_genomes_files_are_read_whole(genome):
    regions = [
        region
        for record in read_json_list(genome / "region_descriptions.json")
        for region in record["regions"]
    ]
    sizes = {
        record["image_id"]: (record["width"], record["height"])
        for record in read_json_list(genome / "image_data.json")
    }
    assert len(sizes) == 100
    assert len(regions) == 7278
    assert len([region for region in regions if is_past_the_edge(region, sizes)]) == 4
    assert sum(len(record["objects"]) for record in read_json_list(genome / "objects.json")) == 2484


def test_visual_genomes_regions_get_the_classes_of_objects(genome):
    pool = read_captioning(genome_source(genome), AllUsable())
    classes = Counter(region.category for region in pool.regions)
    assert len(pool.regions) == 846
    assert pool.skipped["regions_without_a_class"] == 7278 - 846
    assert classes.most_common(4) == [
        ("person", 287),
        ("chair", 123),
        ("car", 63),
        ("keyboard", 45),
    ]
    assert all(
        0.0 <= low < high <= 1.0
        for region in pool.regions
        for low, high in (region.target.box[::2], region.target.box[1::2])
    )
    red_shirt = next(
        region for region in pool.regions if region.target.caption == "A man in a red shirt"
    )
    assert red_shirt.category == "person"
    # The paper's rule: classes with more than 100 descriptions.
    assert set(
        regions_of_classes(
            read_captioning(genome_source(genome, min_descriptions=100), AllUsable())
        )
    ) == {
        "person",
        "chair",
    }


def test_visual_genomes_boxes_past_the_edge_are_cut(genome, tmp_path):
    """None of the four matches an object of the sample, so an object is added for one of them."""
    records = list(read_json_list(genome / "objects.json"))
    of_image = next(record for record in records if record["image_id"] == 89)
    of_image["objects"].append(
        {"object_id": 1, "names": ["couch"], "synsets": [], "x": -2, "y": 367, "w": 390, "h": 162}
    )
    objects = tmp_path / "objects.json"
    objects.write_text(json.dumps(records))
    pool = read_captioning(genome_source(genome, objects=str(objects)), AllUsable())
    # Its box has x -2 and width 390, in an image of 800 pixels.
    couch = next(region for region in pool.regions if region.annotations == (5517289,))
    assert couch.target.caption == "black tufted leather couch"
    assert couch.target.box == pytest.approx((0.0, 367 / 533, 388 / 800, 529 / 533))


def test_densecaps_split_chooses_visual_genomes_images(genome):
    splits = {"splits": str(genome / "densecap_splits.json")}
    names = {
        split: {
            r.image.name
            for r in read_captioning(
                genome_source(genome, **splits, split=split), AllUsable()
            ).regions
        }
        for split in ("train", "test")
    }
    assert len(names["train"]) <= 28
    assert len(names["test"]) <= 2
    assert names["train"]
    assert not names["train"] & names["test"]


def test_missing_images_of_visual_genome_are_counted(genome, tmp_path):
    source = genome_source(genome, images=str(tmp_path))
    with pytest.raises(
        InputError,
        match=rf"83 of 83 annotated images are missing from {tmp_path}, the first is "
        r"VG_100K/10.jpg",
    ):
        read_captioning(source, ImageCheck("stop", "stop", tmp_path))
    pool = read_captioning(source, ImageCheck("skip", "stop", tmp_path))
    assert pool.regions == []
    assert pool.skipped["missing_images"] == 83


@pytest.mark.parametrize(
    ("key", "file"),
    [("regions", "region_descriptions_v1.json"), ("image_data", "image_data_v1.json")],
)
def test_the_layout_of_visual_genome_1_0_is_refused_in_a_sentence(genome, key, file):
    with pytest.raises(
        InputError, match=rf"{file}.*it must have the layout of Visual Genome 1.2 or 1.4"
    ):
        read_captioning(genome_source(genome, **{key: str(genome / file)}), AllUsable())


def test_compositions_of_real_photographs_are_true_to_their_sources(coco, tmp_path):
    source = segmentation(coco, "train")
    settings = {
        "source": "composed",
        "images": source.images,
        "annotations": source.annotations,
        "composed": {"images": 12},
    }
    album = open_album(from_dict(SegmentationSource, settings, "test"), AllUsable())
    folder = compose_images(album, ComposedImages(images=12), 64, tmp_path / "composed", workers=0)
    true, made = COCO(source.annotations), COCO(str(folder / "instances.json"))
    pasted = 0
    for image_id in made.imgs:
        annotations = made.loadAnns(made.getAnnIds([image_id]))
        masks = [made.annToMask(annotation).astype(bool) for annotation in annotations]
        for annotation, mask_HW in zip(annotations, masks, strict=True):
            origin = annotation["provenance"]
            cut = true.anns[origin["annotation_id"]]
            assert cut["image_id"] == origin["image_id"]
            assert cut["category_id"] == annotation["category_id"]
            assert 0 < mask_HW.sum() == annotation["area"]
            if origin["pasted"]:
                pasted += 1
                others = [other for other in masks if other is not mask_HW]
                assert not any((mask_HW & other).any() for other in others)
    assert pasted >= 12
