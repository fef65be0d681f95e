"""An image that is damaged or differs from its record stops a build at its start, or is left out,
counted and listed.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizer
import yaml
from PIL import Image, ImageDraw, ImageOps

from icl_moe.cli import main
from icl_moe.data.shards import Manifest, ShardSet
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from preprocessing import build as build_module
from preprocessing import image_check
from preprocessing.image_check import open_image
from preprocessing.pool import ImageFile

Build = Callable[..., int]

IMAGES = 12
SIZE = (96, 80)


def picture(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A blue picture with a red square of 40 x 40 in its upper left part."""
    image = Image.new("RGB", size, (20, 20 * number % 250, 120))
    ImageDraw.Draw(image).rectangle([4 + number, 6, 43 + number, 45], fill=(220, 40, 30))
    return image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A COCO folder of twelve pictures of a dog and its captions, with two recipes."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    images, annotations, captions = [], [], []
    for number in range(1, IMAGES + 1):
        picture(number).save(folder / "images" / f"{number}.jpg", quality=95)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 96, "height": 80})
        x = 4 + number
        outline = [x, 6, x + 40, 6, x + 40, 46, x, 46]
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [x, 6, 40, 40],
                "segmentation": [outline],
            }
        )
        captions.append({"id": number, "image_id": number, "caption": "a dog on blue"})
    categories = [{"id": 1, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    source = {"images": str(folder / "images"), "annotations": str(folder / "instances.json")}
    captioning = {
        **source,
        "source": "coco_captions",
        "annotations": str(folder / "captions.json"),
        "instances": str(folder / "instances.json"),
        "min_descriptions": 0,
    }
    recipe = {
        "tokenizer": str(toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")),
        "image_size": 64,
        "examples": 1,
        "shard_size": 5,
        "vocabulary": {"text_merges": 1000, "image_codes": toy_tokenizer.CODES},
        "segmentation": {"source": "coco", **source},
        "captioning": captioning,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def build(data: Path) -> Build:
    def build(out: Path, *settings: str, workers: int = 0) -> int:
        command = ["shards", "build", str(data / "recipe.yaml"), *settings]
        return main([*command, "--out", str(out), "--workers", str(workers)])

    return build


def edit(data: Path, number: int, **values: object) -> None:
    for name in ("instances.json", "captions.json"):
        content = json.loads((data / name).read_text())
        content["images"][number - 1].update(values)
        (data / name).write_text(json.dumps(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def save_turned(path: Path, image: Image.Image, orientation: int) -> None:
    """Write `image` as a rotated camera does, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    image.transpose(undo).save(path, exif=exif, quality=95)


def spoil(data: Path) -> None:
    """Make six of the images unusable."""
    images = data / "images"
    truncate(images / "2.jpg")
    (images / "4.jpg").write_bytes(b"<!DOCTYPE html>")
    (images / "5.jpg").write_bytes(b"")
    picture(7, (95, 80)).save(images / "7.jpg")
    picture(9).save(images / "9.gif", save_all=True, append_images=[picture(10)])
    (images / "9.gif").rename(images / "9.jpg")
    edit(data, 11, width=80, height=96)  # width and height exchanged in the record


REASONS = {
    "images_truncated": 1,
    "images_unreadable": 2,
    "images_of_another_size": 2,
    "images_animated": 1,
}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda path: truncate(path), "3.jpg cannot be read; it is damaged or not an image"),
        (lambda path: path.write_bytes(b""), "3.jpg cannot be read; it is damaged or not an image"),
        (
            lambda path: picture(3, (97, 80)).save(path),
            "3.jpg has 97 x 80 pixels, but its record says 96 x 80",
        ),
        (
            lambda path: picture(3, (80, 96)).save(path),
            "3.jpg has 80 x 96 pixels, but its record says 96 x 80",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_before_anything_is_encoded(
    data, build, tmp_path, capsys, monkeypatch, fault, message, workers
):
    fault(data / "images" / "3.jpg")
    truncate(data / "images" / "8.jpg")
    monkeypatch.setattr(build_module, "quantize", None)
    assert build(tmp_path / "out", workers=workers) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert message in printed
    assert "and 1 more of 12 annotated images cannot be used" in printed
    assert printed.endswith("replace it, or set bad_images=skip.")


def test_bad_images_are_left_out_counted_and_listed_on_demand(data, build, tmp_path, capsys):
    spoil(data)
    out = tmp_path / "out"
    assert build(out, "bad_images=skip") == 0
    manifest = Manifest.read(out)
    assert manifest.samples == {"segmentation": IMAGES - 6, "captioning": IMAGES - 6}
    assert manifest.skipped == {
        f"{task}.{reason}": count
        for task in ("segmentation", "captioning")
        for reason, count in REASONS.items()
    }
    listed = manifest.bad_images["segmentation"]
    assert sorted(listed) == ["11.jpg", "2.jpg", "4.jpg", "5.jpg", "7.jpg", "9.jpg"]
    assert manifest.bad_images["captioning"] == listed
    assert "has 95 x 80 pixels, but its record says 96 x 80" in listed["7.jpg"]
    shards = ShardSet(out)
    seen = {
        source["image"]
        for task, count in manifest.samples.items()
        for index in range(count)
        for source in shards.sample(task, index).meta["sources"]
    }
    assert seen == {f"{number}.jpg" for number in (1, 3, 6, 8, 10, 12)}
    capsys.readouterr()
    assert main(["shards", "verify", str(out)]) == 0
    assert main(["shards", "stats", str(out)]) == 0
    text = capsys.readouterr().out
    assert "segmentation.images_truncated" in text and "7.jpg: The image" in text


def test_the_shards_are_those_of_the_data_without_the_bad_images(data, build, tmp_path):
    """This holds for any number of workers and for a resumed build."""
    spoil(data)
    assert build(tmp_path / "out", "bad_images=skip") == 0
    assert build(tmp_path / "workers", "bad_images=skip", workers=3) == 0
    assert hashes(tmp_path / "workers") == hashes(tmp_path / "out")
    for name in ("instances.json", "captions.json"):
        content = json.loads((data / name).read_text())
        bad = {2, 4, 5, 7, 9, 11}
        content["images"] = [r for r in content["images"] if r["id"] not in bad]
        content["annotations"] = [r for r in content["annotations"] if r["image_id"] not in bad]
        (data / name).write_text(json.dumps(content))
    assert build(tmp_path / "clean", "bad_images=skip") == 0
    differing = {
        name
        for name, value in hashes(tmp_path / "clean").items()
        if value != hashes(tmp_path / "out")[name]
    }
    assert differing == {"manifest.json"}


@pytest.mark.parametrize("stage", ["checking", "encoding", "packing"])
def test_a_build_that_leaves_bad_images_out_goes_on_where_it_was_interrupted(
    data, build, tmp_path, monkeypatch, stage
):
    spoil(data)
    assert build(tmp_path / "whole", "bad_images=skip") == 0
    monkeypatch.setattr(image_check, "CHUNK", 4)
    read: list[Path] = []

    def count(file, real=image_check.open_image):
        read.append(file.path)
        if stage == "checking" and len(read) == 7:
            raise KeyboardInterrupt
        return real(file)

    monkeypatch.setattr(image_check, "open_image", count)
    with monkeypatch.context() as patch:
        if stage == "encoding":
            patch.setattr(ImageTokenizers, "encode", _interrupt)
        if stage == "packing":
            patch.setattr(build_module, "pack_shard", _interrupt)
        assert build(tmp_path / "out", "bad_images=skip") == 130
    assert not (tmp_path / "out" / "manifest.json").exists()
    noted, stage = read[:4], "over"
    read.clear()
    assert build(tmp_path / "out", "bad_images=skip") == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not set(noted) & set(read), "images that were checked are not read again"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_leaving_them_out_after_a_refusal_reads_no_image_twice(data, build, tmp_path, monkeypatch):
    spoil(data)
    assert build(tmp_path / "out") == 2
    monkeypatch.setattr(image_check, "open_image", None)
    assert build(tmp_path / "out", "bad_images=skip") == 0
    assert len(Manifest.read(tmp_path / "out").bad_images["segmentation"]) == 6


def test_an_image_that_was_mended_after_a_refusal_is_read_again(data, build, tmp_path, capsys):
    out, image = tmp_path / "out", data / "images" / "3.jpg"
    kept = image.read_bytes()
    truncate(image)
    assert build(out) == 2
    image.write_bytes(kept)
    assert build(out) == 0
    assert Manifest.read(out).skipped == {}


def test_an_image_that_is_damaged_while_a_build_stands_still_is_not_left_out_in_silence(
    data, build, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "pack_shard", _interrupt)
        assert build(out, "bad_images=skip") == 130
    truncate(data / "images" / "3.jpg")
    assert build(out, "bad_images=skip") == 2
    assert "sources have changed since the build" in capsys.readouterr().err


def test_a_picture_that_exif_turns_is_shown_as_its_record_has_it(data, build, tmp_path):
    """Annotations are made on the upright picture or on the stored one; the recorded size
    decides.
    """
    assert build(tmp_path / "plain") == 0
    stored = picture(3)
    path = data / "images" / "3.jpg"
    # The record describes the stored picture, which the tag would rotate to 80 x 96.
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(path, exif=exif, quality=95)
    assert build(tmp_path / "stored") == 0
    assert hashes(tmp_path / "stored") == hashes(tmp_path / "plain")
    # The record describes the upright picture.
    save_turned(path, stored, 6)
    assert Image.open(path).size == (80, 96)
    assert build(tmp_path / "upright") == 0
    assert Manifest.read(tmp_path / "upright").skipped == {}
    codes = {name: _codes_of(tmp_path / name, "3.jpg") for name in ("plain", "upright")}
    assert (codes["plain"] == codes["upright"]).mean() > 0.9, "equal except for JPEG's rounding"


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_whatever_exif_asks_for_the_stored_picture_is_taken_where_its_size_is_recorded(
    tmp_path, orientation
):
    path, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = orientation
    stored = picture(3)
    stored.save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for expected in (upright, stored):
        if expected is upright or expected.size != upright.size:
            record = ImageFile(path, path.name, *expected.size)
            np.testing.assert_array_equal(np.asarray(open_image(record)), np.asarray(expected))


def _codes_of(folder: Path, image: str) -> np.ndarray:
    shards = ShardSet(folder)
    for index in range(shards.count("segmentation")):
        sample = shards.sample("segmentation", index)
        if sample.meta["sources"][-1]["image"] == image:
            spans = [span for span in sample.sequence.spans if span.role == "input"]
            return sample.sequence.tokens_L[spans[-1].start : spans[-1].stop]
    raise AssertionError(image)


@pytest.mark.slow
def test_two_launched_processes_leave_out_the_same_images(data, build, tmp_path, run_command):
    spoil(data)
    assert build(tmp_path / "one", "bad_images=skip") == 0
    launch = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "icl_moe"]
    command = [*launch, "shards", "build", data / "recipe.yaml"]
    out = ["--out", tmp_path / "two", "--workers", "1"]
    ended = run_command([*command, *out])
    assert ended.returncode != 0
    assert ended.stdout.count("icl-moe: The image") == 1
    ended = run_command([*command, "bad_images=skip", *out])
    assert ended.returncode == 0, ended.stdout
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
