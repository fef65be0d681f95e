"""The drawn world of classes follows COCO's format, agrees with its pictures, varies, and is a
function of the seed.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizer
from PIL import Image

from icl_moe.data.shards import Manifest, ShardSet
from icl_moe.errors import InputError
from icl_moe.rle import decode_rle
from icl_moe.settings import load_recipe
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe, SyntheticScenes
from preprocessing.verify import verify_shards
from preprocessing.world import (
    HELD_OUT,
    ClassPool,
    ClassScene,
    all_classes,
    classes_of_split,
    draw_class_scene,
    write_dataset,
)

SIDE = 64
SMALL = ["synthetic.images=60", "synthetic.classes=20", "examples=2", "samples=160"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_tokenizer.save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def build(tokenizer: Path, out: Path, *settings: str, workers: int = 0) -> Manifest:
    overrides = [*SMALL, *toy_tokenizer.recipe_settings(tokenizer), *settings]
    recipe = load_recipe(DataRecipe, "modern_world", overrides, package="preprocessing")
    return build_shards(recipe, out, workers)


@pytest.fixture(scope="module")
def shards(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "shards"
    build(tokenizer, out)
    return out


@pytest.fixture(scope="module")
def pool() -> ClassPool:
    return ClassPool([drawn for _, drawn in classes_of_split("train", 2000)])


@pytest.fixture(scope="module")
def scenes(pool: ClassPool) -> list[ClassScene]:
    return [draw_class_scene(pool, SIDE, 0, "train", index, 0.5) for index in range(150)]


def files(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def test_equal_seeds_give_equal_bytes_whatever_the_workers(
    tokenizer: Path, shards: Path, tmp_path: Path
) -> None:
    build(tokenizer, tmp_path / "again", workers=3)
    assert files(tmp_path / "again") == files(shards)
    write_dataset(tmp_path, SyntheticScenes(images=1, seed=1, classes=20), SIDE, workers=0)
    assert files(tmp_path)["images/1.png"] != files(shards)["synthetic/images/1.png"]


def test_a_scene_does_not_depend_on_how_many_follow(pool: ClassPool, shards: Path) -> None:
    pool = ClassPool([drawn for _, drawn in classes_of_split("train", 20)])
    for index in (0, 41):
        scene = draw_class_scene(pool, SIDE, 0, "train", index, 0.5)
        with Image.open(shards / f"synthetic/images/{index + 1}.png") as written:
            assert np.array_equal(np.asarray(written), np.asarray(scene.image))


def test_the_masks_of_the_samples_are_the_visible_pixels(shards: Path) -> None:
    verify_shards(shards)
    pool = ClassPool([drawn for _, drawn in classes_of_split("train", 20)])
    shard_set = ShardSet(shards)
    for number in range(0, shard_set.manifest.samples["segmentation"], 7):
        meta = shard_set.sample("segmentation", number).meta
        assert len({source["image"] for source in meta["sources"]}) == 3
        for source, mask in zip(meta["sources"], meta["masks"], strict=True):
            index = int(Path(source["image"]).stem) - 1
            scene = draw_class_scene(pool, SIDE, 0, "train", index, 0.5)
            (true,) = [o for o in scene.objects if pool[o.number].name == meta["class"]]
            assert source["crop"] == [0, 0, SIDE, SIDE]
            assert np.array_equal(decode_rle(mask), true.mask_HW)


def test_scenes_hold_two_to_four_objects_of_different_classes_that_can_be_seen(
    scenes: list[ClassScene],
) -> None:
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == {2, 3, 4}
    for scene in scenes:
        assert len({o.number for o in scene.objects}) == len(scene.objects)
        assert np.sum([o.mask_HW for o in scene.objects], axis=0).max() == 1
        for o in scene.objects:
            left, top, right, bottom = o.box
            assert o.mask_HW[top:bottom, left:right].sum() == o.mask_HW.sum() >= 30
    centres = np.array(
        [(o.box[0] + o.box[2], o.box[1] + o.box[3]) for s in scenes for o in s.objects]
    )
    quarters = Counter(map(tuple, (centres // SIDE).tolist()))
    assert min(quarters.values()) > 0.15 * len(centres)


def test_colours_and_patterns_are_those_of_the_class(
    pool: ClassPool, scenes: list[ClassScene]
) -> None:
    """Measured on pixels: the strongest channel of plain objects, the spread of patterned ones."""
    strongest, seen = {"red": 0, "green": 1, "blue": 2}, 0
    spreads: dict[bool, list[float]] = {True: [], False: []}
    for scene in scenes:
        pixels_HW3 = np.asarray(scene.image, dtype=float)
        for o in scene.objects:
            drawn, pixels_N3 = pool[o.number], pixels_HW3[o.mask_HW]
            if drawn.part is None and drawn.outline != "ring":
                spreads[drawn.pattern == "plain"].append(float(pixels_N3.std(axis=0).max()))
            if drawn.pattern == "plain" and drawn.part is None and drawn.colour in strongest:
                assert pixels_N3.mean(axis=0).argmax() == strongest[drawn.colour]
                seen += 1
    assert np.median(spreads[False]) > 50
    assert all(spread < 50 for spread in spreads[True])


def style_of(text: str) -> str:
    if re.search(r"\b(ground|background|backdrop)\b", text):
        return "colour"
    return "relation" if re.search(RELATION_WORDS, text) else "place"


RELATION_WORDS = r"\b(left of|right of|above|over|below|under|higher|lower)\b"


def test_captions_are_of_the_style_of_their_episode_in_varied_words(shards: Path) -> None:
    shard_set = ShardSet(shards)
    texts: dict[str, set[str]] = {"place": set(), "colour": set(), "relation": set()}
    for number in range(shard_set.manifest.samples["captioning"]):
        meta = shard_set.sample("captioning", number).meta
        captions = [*meta["captions"], *meta["references"][0]]
        assert {style_of(text) for text in captions} == {meta["style"]}
        assert meta["captions"][-1] in meta["references"][0]
        assert len(meta["references"][0]) == 2
        texts[meta["style"]].update(captions)
    assert all(len(of_style) > 60 for of_style in texts.values())
    content = json.loads((shards / "synthetic/captions_train.json").read_text())
    styles: dict[int, set[str]] = {}
    for record in content["annotations"]:
        styles.setdefault(record["instance_id"], set()).add(record["style"])
    in_every_style = [of_instance for of_instance in styles.values() if len(of_instance) == 3]
    assert len(in_every_style) > 0.8 * len(styles)


def test_captions_are_true_of_their_pictures(shards: Path) -> None:
    """Parse the captions and compare them with boxes, classes and grounds."""
    pool = ClassPool([drawn for _, drawn in classes_of_split("train", 20)])
    content = json.loads((shards / "synthetic/captions_train.json").read_text())
    instances = json.loads((shards / "synthetic/instances_train.json").read_text())
    annotations = {record["id"]: record for record in instances["annotations"]}
    names = {record["id"]: record["name"] for record in instances["categories"]}
    colours = {colour for drawn in pool.classes for colour in (drawn.colour, drawn.second)}
    for record in content["annotations"]:
        words, index = record["caption"].replace(",", "").split(), record["image_id"] - 1
        annotation = annotations[record["instance_id"]]
        x, y = (
            (start + length / 2) / SIDE
            for start, length in zip(annotation["bbox"][:2], annotation["bbox"][2:], strict=True)
        )
        (drawn,) = [c for c in pool.classes if c.name == names[annotation["category_id"]]]
        if record["style"] == "place":
            assert ("left" in words, "right" in words) == (x < 1 / 3, x > 2 / 3), record
            assert ("top" in words, "bottom" in words) == (y < 1 / 3, y > 2 / 3), record
        elif record["style"] == "colour":
            scene = draw_class_scene(pool, SIDE, 0, "train", index, 0.5)
            ground = words.pop() if words[-1] == scene.ground else words.pop(-2)
            assert ground == scene.ground
            assert colours.intersection(words) == {drawn.colour, drawn.second} - {None}
        else:
            others = [
                other["bbox"]
                for other in instances["annotations"]
                if other["image_id"] == record["image_id"] and other is not annotation
            ]
            assert any(holds(record["caption"], annotation["bbox"], box) for box in others), record


def holds(text: str, subject: list[int], other: list[int]) -> bool:
    """Whether a text of style relation is true for the boxes of its subject and another object."""
    way = re.search(RELATION_WORDS, text)
    assert way is not None
    axis, sign = {"left": (0, -1), "right": (0, 1)}.get(
        way[0].split()[0], (1, -1 if way[0] in ("above", "over", "higher") else 1)
    )
    if text.endswith(" it"):
        sign = -sign
    centres = [box[axis] + box[axis + 2] / 2 for box in (subject, other)]
    return sign * (centres[0] - centres[1]) > 0


def test_every_class_is_seen_and_hard_neighbours_come_in_their_share(pool: ClassPool) -> None:
    few = ClassPool(pool.classes[:40])
    scenes = [draw_class_scene(few, SIDE, 3, "train", index, 0.0) for index in range(40)]
    assert {o.number for scene in scenes for o in scene.objects} == set(range(40))

    def alike(scene: ClassScene) -> bool:
        drawn = [pool[o.number] for o in scene.objects]
        pairs = [(a, b) for a in drawn for b in drawn if a is not b]
        return any(a.outline == b.outline or a.colour == b.colour for a, b in pairs)

    shares = [
        np.mean([alike(draw_class_scene(pool, SIDE, 3, "train", i, share)) for i in range(60)])
        for share in (0.0, 1.0)
    ]
    assert shares[0] < 0.7 and shares[1] == 1.0


def test_held_out_classes_are_never_drawn_in_training(
    tokenizer: Path, shards: Path, tmp_path: Path
) -> None:
    names = [drawn.name for _, drawn in all_classes()]
    assert len(set(names)) == len(names) >= HELD_OUT + 100_000
    assert HELD_OUT >= 100
    held_out = {drawn.name for _, drawn in classes_of_split("val", 20)}
    assert held_out == {drawn.name for _, drawn in classes_of_split("val", 2000)}
    assert held_out.isdisjoint(drawn.name for _, drawn in classes_of_split("train", 100_000))
    # The choice must never change, since models are compared on these classes.
    assert names[0] == "orange and pink banded drop with a hat"
    build(
        tokenizer,
        tmp_path / "val",
        "synthetic.split=val",
        "samples=20",
        "examples=0",
        "class_prompt=true",
    )
    for folder, split in ((shards, "train"), (tmp_path / "val", "val")):
        content = json.loads((folder / f"synthetic/instances_{split}.json").read_text())
        classes = {record["id"]: record["name"] for record in content["categories"]}
        drawn = {classes[annotation["category_id"]] for annotation in content["annotations"]}
        assert drawn <= held_out if split == "val" else drawn.isdisjoint(held_out)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("captioning.styles=[]", r"captioning.styles must name at least one style, or be null"),
        (
            "captioning.styles=[plac]",
            r"styles names 'plac' \(did you mean 'place'\?\); the styles in",
        ),
        (
            "synthetic.world=shapes synthetic.classes=2000 captioning.styles=[place]",
            r"styles needs captions that have styles",
        ),
        ("synthetic.world=shapes", r"synthetic.classes needs synthetic.world=classes"),
        ("synthetic.world=classs", r"'synthetic.world' must be one of shapes \| classes"),
        ("synthetic.classes=3", r"synthetic.classes must lie in 4..100000, not 3"),
        ("synthetic.hard_neighbours=1.5", r"synthetic.hard_neighbours must lie in 0..1, not 1.5"),
        ("image_size=16", r"image_size must be at least 32 where synthetic.world=classes, not 16"),
    ],
)
def test_wrong_settings_are_refused(
    tokenizer: Path, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(tokenizer, tmp_path / "out", *setting.split())
