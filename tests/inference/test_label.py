"""`icl-moe label`: a folder of images after a few examples."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_export
from PIL import Image
from pycocotools.coco import COCO

from icl_moe import InContextModel
from icl_moe.cli import main
from icl_moe.errors import InputError
from icl_moe.labelling import run as labelling_run
from icl_moe.labelling.components import components
from icl_moe.labelling.folders import find_examples
from icl_moe.labelling.journal import Journal
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.tasks.drawn_mask import DrawnClasses, DrawnMask
from preprocessing.synthetic import draw_scene

SCENES = 12


def save_example(folder: Path, name: str, image: Image.Image, mask_HW: np.ndarray) -> None:
    for part, picture in (("images", image), ("masks", Image.fromarray(mask_HW))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        picture.save(folder / part / f"{name}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Drawn images, one of them in a folder within; examples of one class, and of two."""
    root = tmp_path_factory.mktemp("label")
    rng = np.random.default_rng(5)
    scenes = [draw_scene(rng, (100 + 4 * number, 96)) for number in range(SCENES)]
    (root / "images/more").mkdir(parents=True)
    for number, scene in enumerate(scenes):
        scene.image.save(root / "images" / ("more" if number == 3 else "") / f"{number:02}.png")
    for number, name in ((1, "one"), (4, "two")):
        example = scenes[number].image, scenes[number].objects[-1].mask_HW
        save_example(root / "by_class" / name, "shown", *example)
        if name == "one":
            save_example(root / "flat", "shown", *example)
    return root


def run(folder: Path, out: str | Path, *options: str, examples: str = "flat") -> int:
    where = ["--examples", folder / examples, "--images", folder / "images"]
    arguments = ["label", "demo", *where, "--out", folder / out, "--device", "cpu", *options]
    return main(list(map(str, arguments)))


def test_pycocotools_opens_the_labels_and_they_are_those_of_a_session(folder, capsys):
    assert run(folder, "one.json", "--category", "thing") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    coco = COCO(folder / "one.json")
    assert coco.loadCats(coco.getCatIds()) == [{"id": 1, "name": "thing", "supercategory": ""}]
    assert len(coco.imgs) == SCENES and {"more/03.png"} < {
        image["file_name"] for image in coco.imgs.values()
    }
    example = tuple(folder / "flat" / part / "shown.png" for part in ("images", "masks"))
    session = InContextModel.from_pretrained("demo", "cpu").session([example])
    marked = 0
    for number, image in coco.imgs.items():
        drawn = session.draw(folder / "images" / image["file_name"])
        assert (image["height"], image["width"]) == drawn.mask_HW.shape
        annotations = coco.imgToAnns[number]
        assert len(annotations) == drawn.mask_HW.any()
        for annotation in annotations:
            np.testing.assert_array_equal(coco.annToMask(annotation), drawn.mask_HW)
            rows, columns = np.nonzero(drawn.mask_HW)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == drawn.mask_HW.sum() and annotation["iscrowd"] == 0
            assert annotation["score"] == pytest.approx(drawn.score(), abs=1e-3)
        marked += len(annotations)
    assert 0 < marked < SCENES, "there are images with an instance, and without"
    assert last == f"{folder / 'one.json'}: {marked} instances in {SCENES} images"
    assert not (folder / "one.json.journal").exists()


def test_several_classes_do_not_overlap_and_parts_may_be_instances(folder):
    whole, split = folder / "two.json", folder / "split.json"
    assert run(folder, whole.name, examples="by_class") == 0
    assert run(folder, split.name, "--split", examples="by_class") == 0
    coco, parts = COCO(whole), COCO(split)
    assert [each["name"] for each in coco.loadCats(coco.getCatIds())] == ["one", "two"]
    assert len(parts.anns) >= len(coco.anns) > 0
    for number in coco.imgs:
        masks = [coco.annToMask(each) for each in coco.imgToAnns[number]]
        assert not masks or np.sum(masks, axis=0).max() == 1
        for category in (1, 2):
            one, several = (
                [c.annToMask(a) for a in c.imgToAnns[number] if a["category_id"] == category]
                for c in (coco, parts)
            )
            assert len(one) <= 1 and bool(one) == bool(several)
            if one:
                np.testing.assert_array_equal(np.sum(several, axis=0), one[0])


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(folder, repository, capsys):
    assert run(folder, "undisturbed.json", "--batch", "2") == 0
    arguments = [
        *("label", "demo", "--examples", "flat", "--images", "images"),
        *("--out", "killed.json", "--device", "cpu", "--batch", "2"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "icl_moe", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    journal = folder / "killed.json.journal"
    deadline = time.monotonic() + 200
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed.json").exists()
    kept = journal.read_bytes()
    assert 3 <= kept.count(b"\n") <= SCENES // 2, "it was killed in the middle"
    # As if the last line had been cut.
    journal.write_bytes(kept + b'[{"file": "05.png", "wid')
    assert run(folder, "killed.json", "--batch", "2", "--split") == 2
    assert "was begun with other settings (different: split)" in capsys.readouterr().err
    assert journal.read_bytes().startswith(kept)
    assert run(folder, "killed.json", "--batch", "2") == 0
    assert (folder / "killed.json").read_bytes() == (folder / "undisturbed.json").read_bytes()
    assert not journal.exists()


def test_a_killed_run_goes_on_with_other_images_and_another_batch(
    folder, tmp_path, monkeypatch, capsys
):
    """What is finished is kept; images that are gone are left out, and new ones, those that were
    changed, and those that could not be read are labelled.
    """
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    (images / "02.png").write_bytes(b"no image yet")
    (images / "04.png").write_bytes(b"no image ever")
    arguments = ["label", "demo", "--examples", folder / "flat", "--images", images]
    arguments += ["--out", tmp_path / "out.json", "--device", "cpu", "--batch"]
    whole = Journal.add

    def killed(journal: Journal, entries: list) -> None:
        whole(journal, entries)
        if "05.png" in journal:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", killed)
    assert main([*map(str, arguments), "2"]) == 130
    monkeypatch.setattr(Journal, "add", whole)
    (images / "00.png").unlink()
    shutil.copy(folder / "images/01.png", images / "00a.png")
    shutil.copy(folder / "images/02.png", images / "02.png")
    Image.new("RGB", (40, 30)).save(images / "more/03.png")  # Sorted last: not labelled yet.
    Image.new("RGB", (50, 20)).save(images / "05.png")
    capsys.readouterr()
    labelled = []
    monkeypatch.setattr(
        Journal, "add", lambda journal, new: (labelled.extend(new), whole(journal, new))
    )
    assert main([*map(str, arguments), "3"]) == 0
    assert {"00a.png", "02.png", "04.png", "05.png", "11.png"} < {e["file"] for e in labelled}
    assert "01.png" not in {entry["file"] for entry in labelled}
    said = capsys.readouterr().out
    assert said.count("skipped: ") == 1 and f"skipped: The image {images / '04.png'}" in said
    found = {image["file_name"]: image for image in COCO(tmp_path / "out.json").imgs.values()}
    there = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    assert list(found) == [name for name in there if name != "04.png"]
    assert (found["05.png"]["width"], found["05.png"]["height"]) == (50, 20)


def test_a_run_that_ended_between_its_outputs_goes_on(folder, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    out, page = tmp_path / "out.json", tmp_path / "page.html"
    with monkeypatch.context() as patch:
        patch.setattr(labelling_run, "_write_coco", interrupted)
        assert run(folder, out, "--review", str(page)) == 130
    assert page.exists() and not out.exists()
    assert run(folder, out, "--review", str(page)) == 0
    assert len(COCO(out).imgs) == SCENES
    assert run(folder, out, "--review", str(page)) == 2


def test_an_output_that_exists_is_replaced_only_if_asked(folder, tmp_path, capsys):
    out = tmp_path / "corrected.json"
    out.write_text("corrected by hand")
    assert run(folder, out) == 2
    assert (
        f"{out} exists, and may have been corrected by hand; --overwrite" in capsys.readouterr().err
    )
    assert out.read_text() == "corrected by hand"
    assert run(folder, out, "--overwrite") == 0
    assert len(COCO(out).imgs) == SCENES


def test_small_and_unsure_instances_are_left_out(folder, tmp_path):
    found = {}
    for name, options in (
        ("all", ["--least-area", "0"]),
        ("large", ["--least-area", "2"]),
        ("sure", ["--least-area", "0", "--least-score", "0.8"]),
    ):
        assert run(folder, tmp_path / f"{name}.json", "--split", *options, examples="by_class") == 0
        coco = COCO(tmp_path / f"{name}.json")
        assert len(coco.imgs) == SCENES
        found[name] = [
            (
                each["area"] / (coco.imgs[each["image_id"]]["width"] * 96),
                each["score"],
                each["counts"],
            )
            for each in ({**a, "counts": a["segmentation"]["counts"]} for a in coco.anns.values())
        ]
    assert found["large"] == [each for each in found["all"] if each[0] >= 0.02]
    assert found["sure"] == [each for each in found["all"] if each[1] >= 0.8]
    assert 0 < len(found["large"]) < len(found["all"]) > len(found["sure"]) > 0


def test_what_is_too_small_does_not_count_as_sure():
    """The page for review shows an image as sure of nothing, not of the speck that is left out."""
    brightness_HW = np.full((50, 50), -1.0, np.float32)
    brightness_HW[20, 20] = 0.9
    drawn = DrawnClasses({"object": DrawnMask(brightness_HW, at_once=True)})
    labelling = labelling_run.Labelling({}, Path(), [], least_area=0.001)
    entry = labelling_run._describe(drawn, labelling)
    assert entry["instances"] == [] and entry["sure"] < 0.1


def test_what_another_class_leaves_of_a_mask_has_a_low_score():
    """The score is that of the pixels that are left, not of the mask before overlaps."""
    weak_HW, strong_HW = np.full((2, 20, 20), -1.0, np.float32)
    weak_HW[5:15, 5:15], strong_HW[5:15, 5:14] = 0.4, 0.9
    drawn = DrawnClasses(
        {"weak": DrawnMask(weak_HW, at_once=True), "strong": DrawnMask(strong_HW, at_once=True)}
    )
    (weak, left_HW), (strong, whole_HW) = drawn.disjoint()
    assert left_HW.sum() == 10 and whole_HW.sum() == 90
    assert weak.score() > 0.6
    assert weak.score(left_HW) == pytest.approx(10 * 0.7 / (10 + 90 * 0.7))
    assert strong.score(whole_HW) == pytest.approx(strong.score())
    assert weak.score(np.zeros((20, 20), bool)) == pytest.approx(1 - weak.score())


def save_pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255).save(folder / name)


def test_examples_may_lie_as_data_sets_do(tmp_path):
    """Masks in a folder for each class beside one folder of images, as `shards build` reads them,
    with or without a suffix.
    """
    save_pictures(tmp_path, "images/1.jpg", "images/2.jpg", "masks/cat/1.png", "masks/dog/1.png")
    save_pictures(tmp_path, "masks/dog/2_mask.png")
    names = {
        category: [(image.name, mask.name) for image, mask in pairs]
        for category, pairs in find_examples(tmp_path).items()
    }
    assert names == {
        "cat": [("1.jpg", "1.png")],
        "dog": [("1.jpg", "1.png"), ("2.jpg", "2_mask.png")],
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["masks/cat/1.png", "masks/2.png"], "has folders for classes, such as cat, but 2.png is"),
        (["masks/cat/1.png", "images/2.png"], "images/2.png has no mask in any folder of"),
        (["masks/cat/2.png"], "masks/cat/2.png has no image"),
        (["masks/cat/1.png", "masks/dog/1.txt.png"], "masks/dog/1.txt.png has no image"),
        (["masks/1.png", "masks/1_mask.png"], "1.png and .*1_mask.png are both masks of"),
        (["masks/1.png", "cat/images/1.png", "cat/masks/1.png"], "keep one of the two forms"),
    ],
)
def test_examples_in_two_forms_are_refused(tmp_path, names, message):
    save_pictures(tmp_path, "images/1.png", *names)
    with pytest.raises(InputError, match=message):
        find_examples(tmp_path)


def test_links_are_followed_and_what_is_left_out_is_said(folder, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "linked").symlink_to(folder / "images")
    (images / "again").symlink_to(images)
    (images / "dead.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("raw.CR2", "drawing.svg", "without"):
        (images / name).write_bytes(b"0")
    out = tmp_path / "out.json"
    arguments = ["label", "demo", "--examples", folder / "flat", "--images", images]
    assert main([*map(str, arguments), "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "left out (1 of .cr2, 1 of .svg, 1 of no ending)" in said
    assert f"The image {images / 'dead.jpg'} does not exist" in said
    assert "1 file that cannot be read" in said
    names = {image["file_name"] for image in COCO(out).imgs.values()}
    assert len(names) == SCENES and "linked/more/03.png" in names


@pytest.mark.parametrize("more", [[], ["--windows"]])
def test_files_that_are_no_images_are_named_counted_and_left_out(folder, tmp_path, capsys, more):
    images = tmp_path / "images"
    images.mkdir()
    Image.open(folder / "images/00.png").save(images / "good.png")
    (images / "broken.jpg").write_bytes(b"nothing")
    (images / "phone.HEIC").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(40))
    (images / "notes.txt").write_text("not for us")
    colours = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    colours[0].save(images / "moving.gif", save_all=True, append_images=colours[1:])
    common = ["label", "demo", "--examples", str(folder / "flat"), "--device", "cpu", *more]
    common += ["--images"]
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    assert main([*common, str(images), "--out", str(out), "--review", str(page)]) == 0
    printed = capsys.readouterr().out
    assert f"skipped: The image {images / 'moving.gif'} is animated" in printed
    assert f"skipped: The image {images / 'broken.jpg'} cannot be read" in printed
    assert f"skipped: The image {images / 'phone.HEIC'} is in the format HEIC" in printed
    assert "in 1 image" in printed and "left out: 3 files that cannot be read" in printed
    assert [image["file_name"] for image in json.loads(out.read_text())["images"]] == ["good.png"]
    assert "good.png" in page.read_text() and "data:image/jpeg;base64," in page.read_text()
    assert "http" not in page.read_text()
    (images / "good.png").unlink()
    assert main([*common, str(images), "--out", str(tmp_path / "none.json")]) == 2
    assert "None of the images can be read" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_names_may_hold_bytes_of_any_kind(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")  # Latin-1, which is no UTF-8.
    (tmp_path / "images").mkdir()
    Image.open(folder / "images/00.png").save(tmp_path / "images" / name)
    arguments = ["--examples", folder / "flat", "--images", tmp_path / "images"]
    outputs = ["--out", tmp_path / "out.json", "--review", tmp_path / "page.html"]
    assert main(["label", "demo", *map(str, arguments + outputs), "--device", "cpu"]) == 0
    (image,) = json.loads((tmp_path / "out.json").read_text())["images"]
    assert (tmp_path / "images" / image["file_name"]).is_file()
    assert "<b>caf\ufffd.png</b>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_masks_of_examples_within_the_images_are_not_labelled(folder, tmp_path):
    shutil.copytree(folder / "flat", tmp_path / "all/examples")
    Image.open(folder / "images/00.png").save(tmp_path / "all/00.png")
    where = ["--examples", tmp_path / "all/examples", "--images", tmp_path / "all"]
    arguments = [*map(str, where), "--out", str(tmp_path / "out.json"), "--device", "cpu"]
    assert main(["label", "demo", *arguments]) == 0
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert [each["file_name"] for each in images] == ["00.png", "examples/images/shown.png"]


def test_a_full_disk_is_named_and_nothing_that_is_finished_is_lost(folder, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert run(folder, "full.json", "--batch", "2") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal = folder / "full.json.journal"
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed == f"icl-moe: Writing {journal} failed: File too large."
    assert run(folder, "full.json", "--batch", "2") == 0
    assert len(COCO(folder / "full.json").imgs) == SCENES


def test_a_model_that_reads_the_names_of_classes_is_not_given_another_name(
    folder, tmp_path, capsys
):
    model = toy_export.build_toy_line(tmp_path, 12, 2, "class_prompt=true")
    (tmp_path / "images").mkdir()
    Image.open(folder / "images/00.png").save(tmp_path / "images/00.png")
    where = ["--examples", folder / "flat", "--images", tmp_path / "images"]
    arguments = ["label", model, *where, "--out", tmp_path / "out.json", "--device", "cpu"]
    assert main(list(map(str, arguments))) == 2
    assert "needs the class's name: set the category" in capsys.readouterr().err
    assert main([*map(str, arguments), "--category", "thing"]) == 0


def test_the_page_shows_the_least_sure_first(folder):
    assert run(folder, "sorted.json", "--review", str(folder / "sorted.html")) == 0
    page = (folder / "sorted.html").read_text()
    coco = COCO(folder / "sorted.json")
    scores = {
        coco.imgs[number]["file_name"]: [each["score"] for each in coco.imgToAnns[number]]
        for number in coco.imgs
    }
    names = sorted(scores, key=lambda name: page.index(f"<b>{name}</b>"))
    ordered = [score for name in names for score in scores[name]]
    assert len(ordered) > 1 and ordered == sorted(ordered)


def test_windows_are_a_setting_with_its_cost(folder, capsys):
    assert run(folder, "close.json", "--windows") == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    windows = int(printed.split(" windows")[0].split()[-1])
    assert windows > 0 and f"read once whole and in {windows} windows" in printed
    assert run(folder, "whole.json") == 0
    assert (folder / "close.json").read_bytes() != (folder / "whole.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "masks/shown.png").unlink(), "shown.png has no mask: "),
        (lambda root: (root / "images/shown.png").unlink(), "shown.png has no image: "),
        (
            lambda root: Image.new("L", (9, 9), 255).save(root / "masks/shown.png"),
            "shown.png is 9 x 9 pixels, but its image is 104 x 96",
        ),
        (
            lambda root: Image.new("L", (104, 96)).save(root / "masks/shown.png"),
            "shown.png marks nothing",
        ),
        (
            lambda root: Image.new("RGB", (9, 9)).save(root / "images/shown.bmp"),
            "have equal names but for the ending",
        ),
        (lambda root: (root / "masks").rename(root / "mask"), "lacks the folder masks"),
    ],
    ids=["no mask", "no image", "size", "empty", "twice", "no folder"],
)
def test_examples_that_do_not_fit_are_refused_by_name(folder, tmp_path, capsys, change, message):
    for part in ("images", "masks"):
        (tmp_path / "examples" / part).mkdir(parents=True)
        (tmp_path / "examples" / part / "shown.png").write_bytes(
            (folder / "flat" / part / "shown.png").read_bytes()
        )
    change(tmp_path / "examples")
    arguments = ["--examples", str(tmp_path / "examples"), "--images", str(folder / "images")]
    assert main(["label", "demo", *arguments, "--out", str(tmp_path / "out.json")]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("icl-moe: ") and message in printed
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--images {images} --out {out}.json", "There is nothing to go by: set --examples, or"),
        ("--images {images} --category cat --out {out}.json", "needs at least one example"),
        ("--examples {flat} --images {images} --category= --out {out}.json", "--category is blank"),
        ("--examples {flat} --images {images} --out {images}/labels.json", "lies in the folder of"),
        (
            "--examples {flat} --images {images} --out {out}.json --review {images}/page.html",
            "lies in the folder of images",
        ),
        ("--examples {flat} --images {images} --out {out}.txt", "must end in .json."),
        ("--examples {flat} --images {flat}/absent --out {out}.json", "does not exist"),
        ("--examples {flat}/absent --images {images} --out {out}.json", "does not exist"),
        ("--examples {images}/more --images {images} --out {out}.json", "holds no examples"),
        (
            "--examples {by_class} --category cat --images {images} --out {out}.json",
            "leave --category out",
        ),
        (
            "--examples {flat} --images {images} --out {out}.json --device cuda:99",
            "There is no device cuda:99 here",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(folder, tmp_path, capsys, options, message):
    places = {name: folder / name for name in ("images", "flat", "by_class")}
    arguments = options.format(**places, out=tmp_path / "out").split()
    assert main(["label", "demo", *arguments]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("icl-moe: ") and message in printed
    assert not list(tmp_path.iterdir()) and not list((folder / "images").glob("*.json*"))


def test_components_are_those_of_a_flood(tmp_path):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.4, 0.6, 1.0):
        mask_HW = rng.random((17, 23)) < share
        found = list(components(mask_HW))
        rest_HW = mask_HW.copy()
        for part_HW in found:
            start = np.argwhere(rest_HW)[0]
            assert part_HW[tuple(start)], "the next one in rows"
            np.testing.assert_array_equal(part_HW, flooded(mask_HW, *start))
            rest_HW &= ~part_HW
        assert not rest_HW.any()


def flooded(mask_HW: np.ndarray, row: int, column: int) -> np.ndarray:
    reached_HW = np.zeros_like(mask_HW)
    todo = [(row, column)]
    while todo:
        y, x = todo.pop()
        is_within = 0 <= y < len(mask_HW) and 0 <= x < len(mask_HW[0])
        if is_within and mask_HW[y, x] and not reached_HW[y, x]:
            reached_HW[y, x] = True
            todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return reached_HW


def test_run_lengths_are_those_of_pycocotools():
    from pycocotools import mask as tools

    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        for _ in range(20):
            mask_HW = rng.random(rng.integers(1, 90, 2)) < share
            rle = encode_rle(mask_HW)
            theirs = tools.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
            assert rle["counts"] == theirs["counts"].decode()
            np.testing.assert_array_equal(decode_rle(rle), mask_HW)


@pytest.mark.slow
def test_an_image_of_100_megapixels_takes_bounded_memory(folder, tmp_path, run_command):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (11000, 9100), "green").save(tmp_path / "images" / f"{name}.jpg")
    program = (
        "import resource, sys; from icl_moe.cli import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); sys.exit(code)"
    )
    arguments = ["label", "demo", "--examples", folder / "flat", "--images", tmp_path / "images"]
    done = run_command([sys.executable, "-c", program, *arguments, "--out", tmp_path / "out.json"])
    assert done.returncode == 0, done.stdout
    assert "in 2 images" in done.stdout
    assert int(done.stdout.split()[-1]) < 2048, "MiB"
