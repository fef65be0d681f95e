"""Builds that share a codes cache encode each picture once, and their bytes do not depend on it."""

import json
import os

import pytest
from conftest import HEIGHT, WIDTH
from PIL import Image
from small_builds import SMALL, hashes

from icl_moe.cli import main
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of pictures in each encoded batch."""
    batches: list[int] = []

    def encode(self, drawn, *others, real=ImageTokenizers.encode):
        batches.append(len(drawn))
        return real(self, drawn, *others)

    monkeypatch.setattr(ImageTokenizers, "encode", encode)
    return batches


def cache_files(cache) -> list[str]:
    return sorted(path.name for path in cache.glob("*/*.npy"))


def test_a_second_build_encodes_only_what_is_new_and_gives_the_same_bytes(
    build, demo, tmp_path, encoded
):
    cache = tmp_path / "cache"
    build(tmp_path / "fewer", "samples=6", codes_cache=cache)
    few = len(encoded)
    build(tmp_path / "out", workers=2, codes_cache=cache)
    assert hashes(tmp_path / "out") == hashes(demo)
    assert set(encoded) == {32}, "batches are filled up, since their size may change a rounding"
    assert few < len(encoded) < 2 * few + 3
    encoded.clear()
    # Other sequences of the same pictures.
    build(tmp_path / "again", "shard_size=25", "caption.box=none", codes_cache=cache)
    assert not encoded
    assert len(cache_files(cache)) == 2


def test_nothing_is_shared_across_tokenizers_precisions_and_sizes(build, tmp_path, encoded):
    cache = tmp_path / "cache"
    settings = ([], ["tokenizer_precision=bf16"], ["image_size=32", "captioning=null"])
    for number, of_build in enumerate(settings):
        encoded.clear()
        build(tmp_path / str(number), "samples=4", *of_build, codes_cache=cache)
        assert encoded
    about = [json.loads(path.read_text()) for path in cache.glob("*/about.json")]
    assert len({each["tokenizer"] for each in about}) == 1
    assert {(each["precision"], each["image_size"]) for each in about} == {
        ("fp32", 64),
        ("bf16", 64),
        ("fp32", 32),
    }


def test_a_picture_counts_by_its_pixels_not_by_its_name_or_time(
    build, coco_folder, coco_recipe, tmp_path, encoded
):
    cache, recipe = tmp_path / "cache", str(coco_recipe)
    build(tmp_path / "first", recipe=recipe, codes_cache=cache)
    image = coco_folder.images / "6.jpg"
    status = image.stat()
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    build(tmp_path / "cached", recipe=recipe, codes_cache=cache)
    build(tmp_path / "anew", recipe=recipe)
    assert hashes(tmp_path / "cached") == hashes(tmp_path / "anew") != hashes(tmp_path / "first")


def test_a_damaged_file_of_the_cache_is_named_and_not_used(build, demo, tmp_path, encoded, capsys):
    cache = tmp_path / "cache"
    build(tmp_path / "first", codes_cache=cache)
    (file,) = cache.glob("*/*.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    encoded.clear()
    build(tmp_path / "out", codes_cache=cache)
    assert hashes(tmp_path / "out") == hashes(demo)
    assert encoded
    assert f"the file {file} of the codes cache is damaged" in capsys.readouterr().err


def test_files_that_vanish_or_were_left_behind_do_no_harm(build, demo, tmp_path):
    cache = tmp_path / "cache"
    build(tmp_path / "first", codes_cache=cache)
    (file,) = cache.glob("*/*.npy")
    # As if it had been deleted between the listing of the folder and the reading.
    file.with_name("0123456789abcdef.npy").symlink_to("nowhere")
    old, new = (file.with_name(f"{name}.npy.host.1.partial") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"cut off")
    os.utime(old, (0, 0))
    build(tmp_path / "out", codes_cache=cache)
    assert hashes(tmp_path / "out") == hashes(demo)
    assert (old.exists(), new.exists()) == (False, True)


def test_the_command_takes_the_folder_and_refuses_one_that_cannot_be_written(
    tokenizer, demo, tmp_path, capsys
):
    import toy_tokenizer

    settings = [*SMALL, *toy_tokenizer.recipe_settings(tokenizer), "--workers", "0"]
    command = ["shards", "build", "demo", *settings, "--out", str(tmp_path / "out")]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main([*command, "--codes-cache", str(tmp_path / "file")])
    assert "--codes-cache" in capsys.readouterr().err
    assert main([*command, "--codes-cache", str(tmp_path / "cache")]) == 0
    assert hashes(tmp_path / "out") == hashes(demo)
    assert cache_files(tmp_path / "cache")
