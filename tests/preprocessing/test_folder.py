"""Folders of images and masks, in the forms in which people and tools keep them, become the regions
that the same masks make in COCO's format.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icl_moe.errors import InputError
from icl_moe.rle import decode_rle
from preprocessing.folder import load_folder, read_segmentation
from preprocessing.image_check import ImageCheck
from preprocessing.labels import read_labels
from preprocessing.pool import Pool
from preprocessing.recipe import SegmentationSource

SIZE = 40
WIDTH, HEIGHT = 60, 40
CAT, DOG = (slice(5, 25), slice(4, 24)), (slice(10, 30), slice(30, 55))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of 60 x 40 and an empty folder of masks."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.jpg")
    return tmp_path


def ids(cat: int = 1, dog: int = 2, rest: int = 0) -> np.ndarray:
    ids_HW = np.full((HEIGHT, WIDTH), rest, dtype=np.uint8)
    ids_HW[CAT], ids_HW[DOG] = cat, dog
    return ids_HW


def save(folder: Path, name: str, levels: np.ndarray) -> None:
    path = folder / "masks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)


def read(folder: Path, workers: int = 0, **settings: object) -> Pool:
    source = SegmentationSource(
        source="folder", images=str(folder / "images"), masks=str(folder / "masks"), **settings
    )
    check = ImageCheck("stop", "stop", folder / "notes", workers)
    return read_segmentation(source, SIZE, check, workers)


def named(folder: Path, text: str, name: str = "names.txt") -> dict[str, str]:
    (folder / name).write_text(text, encoding="utf-8")
    return {"names": str(folder / name)}


def masks_of(pool: Pool) -> dict[tuple[str, str], np.ndarray]:
    return {
        (region.image.name, region.category): decode_rle(
            {"size": [SIZE, SIZE], "counts": region.target.counts}
        )
        for region in pool.regions
    }


def check_cats_and_dogs(pool: Pool) -> None:
    """Cat and dog of all three images, each cut out by the square around it."""
    found = masks_of(pool)
    assert set(found) == {(f"{n}.jpg", name) for n in range(3) for name in ("cat", "dog")}
    for region in pool.regions:
        left, top, right, bottom = region.crop
        whole = ids() == (1 if region.category == "cat" else 2)
        np.testing.assert_array_equal(
            found[region.image.name, region.category], whole[top:bottom, left:right]
        )


def test_a_white_mask_of_each_image_marks_an_object(folder):
    for number in range(3):
        save(folder, f"{number}.png", 255 * (ids() == 1).astype(np.uint8))
    pool = read(folder)
    assert {region.category for region in pool.regions} == {"object"}
    assert read(folder, workers=2).regions == pool.regions
    assert {region.category for region in read(folder, classes=("cat",)).regions} == {"cat"}
    assert pool.regions[0].annotations == ("0.png",)


@pytest.mark.parametrize("levels", [1, 255])
def test_folders_of_white_masks_name_their_class(folder, levels):
    for number in range(3):
        save(folder, f"cat/{number}.png", levels * (ids() == 1).astype(np.uint8))
        save(folder, f"dog/{number}_mask.png", levels * (ids() == 2).astype(np.uint8))
    check_cats_and_dogs(read(folder))


NAMES = {
    "names.txt": "cat\ndog\n",
    "with_background.txt": "background\ncat\ndog\n",
    "labelme.txt": "__ignore__\n_background_\ncat\ndog\n",
    "numbered.txt": "# classes\n1: cat\n2: dog\n",
    "_classes.csv": "Pixel Value, Class\n0, background\n1, cat\n2, dog\n",
    "list.json": '["cat", "dog"]',
    "ids.json": '{"1": "cat", "2": "dog"}',
    "names.json": '{"background": 0, "cat": 1, "dog": 2}',
    "records.json": '[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "supercategory": "x"}]',
    "ids.yaml": "1: cat\n2: dog\n",
    "data.yaml": "nc: 3\nnames:\n  0: background\n  1: cat\n  2: dog\n",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_ids_holds_several_classes(folder, name):
    for number in range(3):
        save(folder, f"{number}.png", ids())
    check_cats_and_dogs(read(folder, **named(folder, NAMES[name], name)))


def test_palette_images_count_by_their_indices_and_void_borders_belong_to_no_class(folder):
    palette = np.random.default_rng(0).permutation(768).astype(np.uint8).tolist()
    for number in range(3):
        levels = ids()
        levels[0] = 255  # as the void borders of Pascal VOC
        image = Image.fromarray(levels).convert("P")
        image.putdata(levels.ravel().tolist())
        image.putpalette(palette)
        image.save(folder / f"masks/{number}.png")
    check_cats_and_dogs(read(folder, **named(folder, "cat\ndog\n")))


COLOURS = {
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\n"
    "cat:128,0,0::\ndog:0,9,64::\n",
    "camvid.txt": "128 0 0\tcat\n0 9 64\tdog\n",
    "class_dict.csv": "name,r,g,b\ncat,128,0,0\ndog,0,9,64\n",
    "hex.txt": "cat #800000\ndog #000940\n",
    "colours.json": '{"cat": [128, 0, 0], "dog": "#000940"}',
    "records.yaml": "- {name: cat, color: [128, 0, 0]}\n- {name: dog, color: '#000940'}\n",
}


@pytest.mark.parametrize("name", COLOURS)
def test_a_table_of_colours_names_the_classes_of_coloured_masks(folder, name):
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 9, 64]], dtype=np.uint8)
    for number in range(3):
        save(folder, f"{number}.png", colours[ids()])
    check_cats_and_dogs(read(folder, **named(folder, COLOURS[name], name)))


def test_an_export_of_roboflow_has_images_and_masks_in_one_folder(folder):
    for number in range(3):
        (folder / f"images/{number}.jpg").rename(folder / f"masks/{number}.jpg")
        save(folder, f"{number}_mask.png", ids())
    (folder / "images").rmdir()
    (folder / "images").symlink_to(folder / "masks")
    check_cats_and_dogs(read(folder, **named(folder, NAMES["_classes.csv"], "_classes.csv")))


def test_with_one_class_a_mask_of_ids_may_be_white(folder):
    for number in range(3):
        save(folder, f"{number}.png", (1 if number else 255) * (ids() == 1).astype(np.uint8))
    pool = read(folder, **named(folder, "cat\n"))
    assert [region.category for region in pool.regions] == ["cat"] * 3


def test_black_masks_and_images_without_a_mask_are_counted(folder):
    save(folder, "0.png", 255 * (ids() == 1).astype(np.uint8))
    save(folder, "1.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    pool = read(folder)
    assert len(pool.regions) == 1
    assert pool.skipped["masks_that_mark_nothing"] == 1
    assert pool.skipped["images_without_a_mask"] == 1


def photograph_of(folder: Path, number: int) -> Path:
    return folder / f"images/{number}.jpg"


def a_mask_of_another_size(folder: Path) -> None:
    save(folder, "1.png", np.ones((7, 9), dtype=np.uint8))


def two_images_of_one_stem(folder: Path) -> None:
    photograph_of(folder, 1).with_suffix(".png").write_bytes(photograph_of(folder, 1).read_bytes())


def two_masks_of_one_image(folder: Path) -> None:
    save(folder, "1.bmp", ids() // 2)


def a_mask_of_ids(folder: Path) -> None:
    save(folder, "1.png", ids(cat=100, dog=200))


def a_mask_without_its_image(folder: Path) -> None:
    save(folder, "7.png", ids() // 2)


def other_names(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(f"x{path.name}"))


def no_folder(folder: Path) -> None:
    (folder / "masks").rename(folder / "elsewhere")


def a_damaged_mask(folder: Path) -> None:
    (folder / "masks/1.png").write_bytes(b"no image")


def a_name_that_is_not_utf_8(folder: Path) -> None:
    photograph_of(folder, 1).rename(folder / "images" / os.fsdecode(b"\xff.jpg"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            a_mask_of_another_size,
            r"masks/1.png has 9 x 7 pixels, but its image .*1.jpg has 60 x 40",
        ),
        (two_images_of_one_stem, r"1.jpg and 1.png differ only in their ending"),
        (two_masks_of_one_image, r"1.bmp and 1.png are both masks of 1.jpg"),
        (a_mask_of_ids, r"does not have two levels.*segmentation.names"),
        (a_mask_without_its_image, r"1 of 4 annotated images are missing .* the first is 7;"),
        (other_names, r"No mask in .* has the name of an image .*the first mask is x0.png"),
        (no_folder, r"segmentation.masks: the folder .*masks does not exist"),
        (a_damaged_mask, r"masks/1.png cannot be read"),
        (a_name_that_is_not_utf_8, r"has a file whose name is not UTF-8, .*xff"),
    ],
)
def test_what_a_person_must_correct_ends_in_a_sentence(folder, damage, message):
    for number in range(3):
        save(folder, f"{number}.png", (ids() == 2).astype(np.uint8))
    damage(folder)
    with pytest.raises(InputError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("text", "levels", "message"),
    [
        ("cat\n", ids(), r"0.png has the id 2, which .*names.txt does not name"),
        ("cat: 1 2 3\ndog: 4 5 6\n", ids(), r"has the colour \(1, 1, 1\), which .* \(and 1 more\)"),
        ("cat\ndog\n", np.dstack([ids(), ids(), ids() // 2]), "has colours, but .* names ids"),
    ],
)
def test_what_the_names_file_lacks_is_named(folder, text, levels, message):
    save(folder, "0.png", levels)
    with pytest.raises(InputError, match=message):
        read(folder, **named(folder, text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "has an empty name"),
        ("a.txt", "background\n", "names no class but background"),
        ("a.txt", "1: cat\n1: dog\n", "names the id 1 twice"),
        ("a.txt", "cat: 1,2\ndog: 1, 2, 3\n", "the line 'cat: 1,2' is neither a name, nor an id"),
        ("a.txt", "cat: 3\n", "the line 'cat: 3' is neither a name"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "7", "must hold a list of names"),
        ("a.json", "[7]", "has the entry 7; it must be a name"),
        ("a.json", '{"cat": [1, 2]}', r"has the colour \[1, 2\]"),
        ("a.json", '{"cat": [1, 2, 900]}', r"has the colour \[1, 2, 900\]"),
        ("a.json", '["cat", {"id": 1, "name": "dog"}]', "all must be alike"),
        ("a.yaml", "a: b: c", "is not valid YAML"),
        ("a.yaml", "1: cat\n1: dog\n", "the key '1' occurs twice"),
        ("a.txt", "cat\udcff".encode("utf-8", "surrogateescape"), "is not text in UTF-8"),
    ],
)
def test_a_names_file_in_no_known_form_ends_in_a_sentence(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        read_labels(file)


def test_palettes_in_another_order_are_of_the_same_colour(tmp_path):
    folders = [tmp_path / part for part in ("images", "masks")]
    for folder in folders:
        folder.mkdir()
    for name, bright in (("a", 1), ("b", 0)):
        Image.new("RGB", (32, 32), "grey").save(folders[0] / f"{name}.png")
        marked = np.full((32, 32), 1 - bright, dtype=np.uint8)
        marked[8:20, 8:20] = bright
        picture = Image.fromarray(marked, mode="L").convert("P")
        picture.putdata(marked.ravel().tolist())
        picture.putpalette([0, 0, 0, 255, 255, 255] if bright else [255, 255, 255, 0, 0, 0])
        picture.save(folders[1] / f"{name}.png")
    source = SegmentationSource(source="folder", images=str(folders[0]), masks=str(folders[1]))
    records, _ = load_folder(source, workers=0)
    assert len(records.anns) == 2


@pytest.mark.parametrize(
    ("levels", "shown"),
    [((1, 2), "level 1, but b.png with 2"), (((255, 0, 0), (0, 255, 0)), r"\(255, 0, 0\), but")],
)
def test_masks_of_ids_or_colours_without_names_are_not_one_class(tmp_path, levels, shown):
    """Each has two levels, so that none of them alone tells that there are several classes."""
    folders = [tmp_path / part for part in ("images", "masks")]
    for folder in folders:
        folder.mkdir()
    for name, level in zip("ab", levels, strict=True):
        Image.new("RGB", (32, 32), "grey").save(folders[0] / f"{name}.png")
        marked = np.zeros((32, 32, *np.shape(level)), dtype=np.uint8)
        marked[8:20, 8:20] = level
        Image.fromarray(marked).save(folders[1] / f"{name}.png")
    source = SegmentationSource(source="folder", images=str(folders[0]), masks=str(folders[1]))
    with pytest.raises(InputError, match=shown) as refused:
        load_folder(source, workers=0)
    assert "set segmentation.names" in str(refused.value)
