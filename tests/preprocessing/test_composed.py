"""Compositions of a data set's own objects: correct masks, provenance, balance, and episodes of one
object. The data set has one flat colour per class, so that classes can be recognised in the
pictures.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_tokenizer
import yaml
from PIL import Image

from icl_moe.data.shards import Manifest, ShardSet
from icl_moe.errors import InputError
from icl_moe.rle import decode_rle
from icl_moe.settings import load_recipe
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe
from preprocessing.verify import verify_shards

COLOURS = {1: (200, 40, 40), 2: (40, 170, 40), 3: (40, 40, 200), 4: (210, 200, 40)}
NAMES = {1: "red", 2: "green", 3: "blue", 4: "yellow"}
OBJECTS = ((1, 2), (1, 3), (1, 4), (1,), (1,), (1,), (1,), (2,), (3,), (4,))
"""The classes in each image: red eight times, the others two or three times."""
SIDE = 64


def write_flat_data_set(folder: Path) -> None:
    """Ten grey images of 120 x 90, each with one or two rectangles of 30 x 24 or more."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for place, classes in enumerate(OBJECTS):
        pixels_HW3 = np.full((90, 120, 3), 120, dtype=np.uint8)
        images.append({"id": place, "file_name": f"{place}.png", "width": 120, "height": 90})
        for category, left in zip(classes, (12, 68), strict=False):
            width, height, top = 30 + place, 24 + 2 * place, 20 + place
            pixels_HW3[top : top + height, left : left + width] = COLOURS[category]
            right, bottom = left + width, top + height
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": place,
                    "category_id": category,
                    "iscrowd": 0,
                    "area": width * height,
                    "bbox": [left, top, width, height],
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
        Image.fromarray(pixels_HW3).save(folder / f"images/{place}.png")
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of compositions of the flat data set."""
    folder = tmp_path_factory.mktemp("flat")
    write_flat_data_set(folder)
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    source = {
        "source": "composed",
        "images": str(folder / "images"),
        "annotations": str(folder / "instances.json"),
        "composed": {"images": 60, "same_instance": 0.5},
    }
    settings = {
        "tokenizer": str(tokenizer),
        "image_size": SIDE,
        "examples": 1,
        "samples": 120,
        "vocabulary": {"text_merges": 1000, "image_codes": toy_tokenizer.CODES},
        "segmentation": source,
    }
    path = folder / "composed.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def build(recipe: Path, out: Path, *settings: str, workers: int = 0) -> Manifest:
    return build_shards(load_recipe(DataRecipe, str(recipe), settings), out, workers)


@pytest.fixture(scope="module")
def shards(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("composed") / "shards"
    build(recipe, out)
    return out


def read(shards: Path) -> dict[int, list[dict[str, Any]]]:
    """The annotations of each composition."""
    content = json.loads((shards / "composed/instances.json").read_text())
    of_image: dict[int, list[dict[str, Any]]] = {r["id"]: [] for r in content["images"]}
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    return of_image


def hashes(folder: Path) -> dict[str, str]:
    found = [*folder.glob("*.tar"), *folder.glob("composed/**/*.j*")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_equal_seeds_give_equal_bytes_whatever_the_workers_and_other_seeds_others(
    recipe: Path, shards: Path, tmp_path: Path
) -> None:
    build(recipe, tmp_path / "again", workers=3)
    assert hashes(tmp_path / "again") == hashes(shards)
    build(recipe, tmp_path / "other", "segmentation.composed.seed=1", "samples=1")
    assert hashes(tmp_path / "other")["1.jpg"] != hashes(shards)["1.jpg"]


def test_a_mask_is_where_the_object_is_seen(shards: Path) -> None:
    """The pixels with a class's colour are those of its mask, except at the soft edge."""
    covered = checked = 0
    for number, annotations in read(shards).items():
        with Image.open(shards / f"composed/images/{number}.jpg") as image:
            pixels_HW3 = np.asarray(image, dtype=float)
        masks = [decode_rle(annotation["segmentation"]) for annotation in annotations]
        together_HW = np.sum(masks, axis=0)
        assert together_HW.max() <= 1, "covered pixels belong only to the covering object"
        for annotation, mask_HW in zip(annotations, masks, strict=True):
            inside_N3 = pixels_HW3[_eroded(mask_HW)]
            if len(inside_N3):
                ratio = inside_N3 / COLOURS[annotation["category_id"]]
                spread = ratio.max(axis=1) - ratio.min(axis=1)
                assert np.median(spread) < 0.35, "the three channels have the same lighting"
                checked += 1
            pasted = annotation["provenance"]["pasted"]
            covered += not pasted and mask_HW.sum() < 0.9 * _filled(mask_HW).sum()
        ground_N3 = pixels_HW3[_eroded(together_HW == 0)]
        assert np.median(ground_N3.max(axis=1) - ground_N3.min(axis=1)) < 20, "grey"
    assert checked > 100
    assert covered > 0, "at least one object is behind another"


def _eroded(mask_HW: np.ndarray) -> np.ndarray:
    """The pixels whose neighbours up to two pixels away are also in the mask."""
    padded = np.pad(mask_HW, 2)
    shifts = [(y, x) for y in range(5) for x in range(5)]
    return np.logical_and.reduce([padded[y : y + SIDE, x : x + SIDE] for y, x in shifts])


def _filled(mask_HW: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    filled = np.zeros_like(mask_HW)
    filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return filled


def test_provenance_names_the_source_and_the_place(recipe: Path, shards: Path) -> None:
    source = json.loads((recipe.parent / "instances.json").read_text())
    known = {record["id"]: record for record in source["annotations"]}
    pasted = 0
    for annotations in read(shards).values():
        assert any(annotation["provenance"]["pasted"] for annotation in annotations)
        for annotation in annotations:
            origin = annotation["provenance"]
            true = known[origin["annotation_id"]]
            assert true["category_id"] == annotation["category_id"]
            assert (true["image_id"], f"{true['image_id']}.png") == (
                origin["image_id"],
                origin["image"],
            )
            if origin["pasted"]:
                pasted += 1
                left, top, right, bottom = origin["box"]
                x, y, width, height = annotation["bbox"]
                assert left <= x and top <= y and x + width <= right and y + height <= bottom
                assert abs(origin["turn"]) <= 25 and 0 < origin["scale"] <= 1.5
            else:
                assert origin["crop"][2] - origin["crop"][0] <= 90
    assert pasted > 80


def test_samples_keep_the_provenance_and_a_share_of_episodes_is_of_one_object(
    shards: Path,
) -> None:
    verify_shards(shards)
    shard_set = ShardSet(shards)
    count = shard_set.manifest.samples["segmentation"]
    of_one_object = composed = 0
    for number in range(count):
        sources = shard_set.sample("segmentation", number).meta["sources"]
        assert len({source["image"] for source in sources}) == 2
        origins = []
        for source in sources:
            parts = source.get("provenance", [])
            composed += bool(parts)
            assert len(parts) in (0, len(source["annotations"]))
            origins.append({part["annotation_id"] for part in parts} or set(source["annotations"]))
        of_one_object += origins[0] == origins[1]
    assert 0.4 * count < of_one_object < 0.6 * count
    assert count < composed < 2 * count, "the photographs themselves are included"


def test_episodes_of_a_class_are_of_different_photographs(recipe: Path, tmp_path: Path) -> None:
    build(recipe, tmp_path / "out", "segmentation.composed.same_instance=0", "samples=60")
    shard_set = ShardSet(tmp_path / "out")
    for number in range(60):
        sources = shard_set.sample("segmentation", number).meta["sources"]
        origins = [
            {part["image"] for part in source.get("provenance", [])} or {source["image"]}
            for source in sources
        ]
        if all(len(origin) == 1 for origin in origins):
            assert origins[0] != origins[1]


def test_rare_classes_can_be_balanced(recipe: Path, tmp_path: Path) -> None:
    def pasted(balance: float) -> Counter[str]:
        out = tmp_path / str(balance)
        settings = [f"segmentation.composed.{key}" for key in (f"balance={balance}", "images=200")]
        more = ["segmentation.composed.same_instance=0", "segmentation.composed.photographs=false"]
        build(recipe, out, *settings, *more, "segmentation.composed.pasted=1", "samples=1")
        return Counter(
            NAMES[annotation["category_id"]]
            for annotations in read(out).values()
            for annotation in annotations
            if annotation["provenance"]["pasted"] and not shows_red(annotations)
        )

    def shows_red(annotations: list[dict[str, Any]]) -> bool:
        return any(a["category_id"] == 1 and not a["provenance"]["pasted"] for a in annotations)

    # In a photograph without red, red is chosen by its share of the instances, or as often as each
    # of the other two classes that the photograph lacks.
    plain, balanced = pasted(0.0), pasted(1.0)
    assert plain["red"] > 0.5 * plain.total()
    assert balanced["red"] < 0.5 * balanced.total()


def test_with_nothing_pasted_photographs_are_augmented(recipe: Path, tmp_path: Path) -> None:
    """Each image is a part of one photograph, and the parts, sides and lights differ."""
    settings = ("composed.pasted=0", "composed.same_instance=0", "composed.photographs=false")
    build(recipe, tmp_path / "out", *(f"segmentation.{each}" for each in settings))
    of_image = [
        [annotation["provenance"] for annotation in annotations]
        for annotations in read(tmp_path / "out").values()
        if annotations
    ]
    assert all(not origin["pasted"] for origins in of_image for origin in origins)
    assert all(len({origin["image"] for origin in origins}) == 1 for origins in of_image)
    first = [origins[0] for origins in of_image]
    assert {origin["mirrored"] for origin in first} == {False, True}
    for name in ("crop", "light"):
        assert len({tuple(origin[name]) for origin in first}) > 50


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("composed.pasted=9", r"segmentation.composed.pasted must lie in 0..8, not 9"),
        ("composed.pasted=0", r"composed.same_instance is of pasted objects; set it to 0"),
        ("composed.balance=2", r"segmentation.composed.balance must lie in 0..1, not 2"),
        ("composed.same_instance=-1", r"composed.same_instance must lie in 0..1, not -1"),
        ("least_scale=1.1", r"segmentation.least_scale must lie in 0..1, not 1.1"),
        ("source=coco", r"segmentation.composed.images needs segmentation.source=composed"),
        ("images=null", r"source=composed needs the key 'segmentation.images'"),
        ("classes=[bleu]", r"segmentation.classes names 'bleu', which is not among"),
    ],
)
def test_wrong_settings_are_refused(
    recipe: Path, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(
            recipe,
            tmp_path / "out",
            f"segmentation.{setting}",
            "segmentation.composed.photographs=false",
        )


def test_episodes_of_one_object_need_objects_that_are_seen_often(
    recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"No object appears in the 3 images .*images higher"):
        build(recipe, tmp_path / "out", "segmentation.composed.images=1", "examples=2")


def test_a_data_set_with_nothing_to_cut_out_is_refused(recipe: Path, tmp_path: Path) -> None:
    content = json.loads((recipe.parent / "instances.json").read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 1, 4, 1, 4, 4, 1, 4]]
    (tmp_path / "small.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"small.json has no object .* covers 1% of its image"):
        build(recipe, tmp_path / "out", f"segmentation.annotations={tmp_path / 'small.json'}")


def test_small_masks_can_be_left_out(recipe: Path, tmp_path: Path) -> None:
    settings = ["segmentation.composed.same_instance=0", "samples=1"]
    manifest = build(recipe, tmp_path / "out", *settings, "segmentation.least_scale=0.05")
    assert manifest.skipped["segmentation.masks_of_small_scale"] > 0
    meta = ShardSet(tmp_path / "out").sample("segmentation", 0).meta
    assert min(meta["scale"]) >= 0.05
