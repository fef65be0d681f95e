"""`icl-moe shards build | verify | stats | preview`, as a user runs them."""

import argparse
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizer
from damage import overwrite
from small_builds import SMALL, hashes

from icl_moe.data.shards import Manifest, ShardSet
from icl_moe.errors import InputError
from icl_moe.images import mask_to_pixels
from icl_moe.locks import LOCK_FILE
from icl_moe.sequence import SequenceCodec
from icl_moe.settings import load_recipe
from icl_moe.tasks import TASKS
from icl_moe.tasks.captioning import BoxPicture
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing import build as build_module
from preprocessing import cli, plan, quantize
from preprocessing.recipe import DataRecipe
from preprocessing.verify import verify_shards


def shards(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return cli.run(parser.parse_args(["shards", *map(str, arguments)]))


@pytest.fixture
def damaged(demo, tmp_path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "copy"))


def test_equal_seeds_give_equal_bytes_whatever_the_number_of_workers_and_other_seeds_others(
    build, demo, tmp_path
):
    build(tmp_path / "again", workers=3)
    assert hashes(tmp_path / "again") == hashes(demo)
    build(tmp_path / "other", "seed=1")
    assert (
        hashes(tmp_path / "other")["captioning-000000.tar"] != hashes(demo)["captioning-000000.tar"]
    )


def test_the_folder_stands_alone_and_nothing_unfinished_is_left(demo):
    names = {path.name for path in demo.iterdir()}
    assert names == {"manifest.json", "image_tokenizer", "text_tokenizer", "synthetic"} | {
        f"{task}.index.npy" for task in ("segmentation", "captioning")
    } | {
        f"{task}-{number:06d}.tar" for task in ("segmentation", "captioning") for number in range(3)
    }
    assert not list(demo.rglob("*.partial"))


@pytest.mark.parametrize("stage", ["encoding", "packing", "manifest"])
def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(
    build, demo, tmp_path, monkeypatch, stage
):
    out = tmp_path / "out"
    monkeypatch.setattr(quantize, "CHUNK", quantize.BATCH)
    calls = 0

    def interrupt_at(number, function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    target, name, at = {
        "encoding": (ImageTokenizers, "encode", 3),
        "packing": (build_module, "pack_shard", 3),
        "manifest": (Manifest, "write", 1),
    }[stage]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, interrupt_at(at, getattr(target, name)))
        with pytest.raises(KeyboardInterrupt):
            build(out)
    assert not (out / "manifest.json").exists()
    kept = {
        path: path.stat().st_mtime_ns
        for pattern in (".build/codes-*.npy", "*.tar")
        for path in out.glob(pattern)
    }
    assert len([path for path in kept if path.suffix == ".npy"]) >= 2
    assert (
        len([path for path in kept if path.suffix == ".tar"])
        == {"encoding": 0, "packing": 2, "manifest": 6}[stage]
    )

    encoded = []
    monkeypatch.setattr(
        ImageTokenizers,
        "encode",
        lambda *args, real=ImageTokenizers.encode: encoded.append(1) or real(*args),
    )
    # The plan is in the folder, so the annotations are not read again.
    monkeypatch.setattr(plan, "read_pools", None)
    build(out)
    assert hashes(out) == hashes(demo)
    assert all(
        path.stat().st_mtime_ns == time for path, time in kept.items() if path.suffix == ".tar"
    )
    assert bool(encoded) == (stage == "encoding"), "encoded chunks are not encoded again"


def test_a_chunk_is_written_while_the_next_one_is_encoded(build, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK", quantize.BATCH)
    second_began, batches = threading.Event(), []

    def encode(*args, real=ImageTokenizers.encode):
        batches.append(1)
        if len(batches) == 2:
            second_began.set()
        return real(*args)

    def write(path, codes, real=quantize._write_chunk):
        assert second_began.wait(10)
        real(path, codes)

    monkeypatch.setattr(ImageTokenizers, "encode", encode)
    monkeypatch.setattr(quantize, "_write_chunk", write)
    build(tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(demo)


def test_a_build_needs_few_open_files_however_many_pictures_it_encodes(
    build, tmp_path, monkeypatch
):
    monkeypatch.setattr(quantize, "BATCH", 1)
    monkeypatch.setattr(quantize, "CHUNK", 1)
    chunks = []

    def write(path, codes, real=quantize._write_chunk):
        chunks.append(path)
        real(path, codes)

    monkeypatch.setattr(quantize, "_write_chunk", write)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (most + 60, hard))
    try:
        build(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(chunks) > 60


def test_a_chunk_that_a_power_failure_cut_off_is_named(build, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK", quantize.BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "join_chunks", None)
        with pytest.raises(TypeError):
            build(tmp_path / "out")
    file = tmp_path / "out/.build/codes-000001.npy"
    for content in (b"", file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"^{file} is damaged; delete it and run the same"):
            build(tmp_path / "out")
    file.unlink()
    build(tmp_path / "out")


@pytest.mark.parametrize("number", [1, 4])
def test_a_chunk_that_cannot_be_written_ends_the_build(build, tmp_path, monkeypatch, number):
    monkeypatch.setattr(quantize, "CHUNK", quantize.BATCH)
    written = []

    def write(path, codes, real=quantize._write_chunk):
        written.append(path)
        if len(written) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, codes)

    monkeypatch.setattr(quantize, "_write_chunk", write)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "out")
    assert len(list((tmp_path / "out").glob(".build/codes-*.npy"))) == number - 1


def test_two_builds_do_not_share_a_folder_and_a_killed_one_does_not_keep_it(
    build, demo, tokenizer, tmp_path
):
    out = tmp_path / "out"
    settings = [*SMALL, *toy_tokenizer.recipe_settings(tokenizer)]
    command = [sys.executable, "-m", "icl_moe", "shards", "build", "demo", *settings]
    with subprocess.Popen([*command, "--out", out, "--workers", "1"]) as first:
        try:
            while not (out / LOCK_FILE).is_file() or not (out / LOCK_FILE).read_text():
                assert first.poll() is None
                time.sleep(0.05)
            first.send_signal(signal.SIGSTOP)
            with pytest.raises(
                InputError, match=rf"^--out: process {first.pid} on \S+ is writing to {out}; wait"
            ):
                build(out)
        finally:
            first.kill()
    build(out)
    assert hashes(out) == hashes(demo)
    assert not (out / LOCK_FILE).exists()


def test_a_finished_build_is_left_alone_and_says_so(build, demo, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.iterdir()}
    assert build(demo).samples == {"segmentation": 25, "captioning": 25}
    assert f"{demo} is complete, so nothing was built; if the" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in demo.iterdir()} == before


def test_a_folder_of_another_recipe_is_refused(build, demo, tmp_path):
    with pytest.raises(
        InputError,
        match=r"holds shards of another recipe \(seed is 0 there, 7 here\); choose another --out",
    ):
        build(demo, "seed=7")
    (tmp_path / "file.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and holds no shards"):
        build(tmp_path)
    assert (tmp_path / "file.txt").read_text() == "precious"


def test_an_unfinished_build_whose_sources_changed_is_refused(
    build, coco_folder, coco_recipe, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(
            build_module, "ordered_map", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", recipe=str(coco_recipe))
    coco_folder.write(
        lambda content: content["annotations"][0].update(segmentation=[[0, 0, 50, 0, 50, 50]])
    )
    with pytest.raises(InputError, match="sources have changed since the build"):
        build(tmp_path / "out", recipe=str(coco_recipe))
    with pytest.raises(
        InputError,
        match=r"holds unfinished shards of another recipe \(examples is 2 there, 1 here\)",
    ):
        build(tmp_path / "out", "examples=1", recipe=str(coco_recipe))


def test_an_unfinished_build_that_another_version_would_plan_otherwise_is_refused(
    build, coco_recipe, tmp_path, monkeypatch
):
    recipe = str(coco_recipe)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "pack_shard", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", recipe=recipe)
    monkeypatch.setattr(plan, "__version__", "0.0.0")
    build(shutil.copytree(tmp_path / "out", tmp_path / "same"), recipe=recipe)
    draw = plan.plan_episodes
    monkeypatch.setattr(plan, "plan_episodes", lambda *args: draw(*args)[::-1])
    with pytest.raises(InputError, match="or another version of icl-moe began it; delete that"):
        build(tmp_path / "out", recipe=recipe)


def test_a_build_that_was_refused_does_not_block_its_folder(
    build, coco_folder, coco_recipe, tmp_path
):
    out, recipe = tmp_path / "out", str(coco_recipe)
    refused = [
        ([f"segmentation.images={tmp_path / 'typo'}"], "typo does not exist"),
        (["examples=200"], "appears in the 201 images"),
        (["segmentation.source=synthetic", "examples=200"], "appears in the 201 images"),
    ]
    for settings, message in refused:
        with pytest.raises(InputError, match=message):
            build(out, *settings, recipe=recipe)
    build(tmp_path / "other", recipe=recipe)
    build(out, recipe=recipe)
    assert hashes(out) == hashes(tmp_path / "other")
    assert not (out / "synthetic").exists()


def test_scenes_that_another_recipe_left_unfinished_do_not_block_the_folder(
    build, demo, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _replace_until("synthetic"))
        with pytest.raises(KeyboardInterrupt):
            build(out, "synthetic.seed=3")
    assert (out / "synthetic.partial").is_dir()
    # Taking the folder over may be interrupted as well.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(out)
    build(out)
    assert hashes(out) == hashes(demo)
    assert not list(out.glob("*.partial"))


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def _replace_until(name):
    """Renames files, and is interrupted at the file of this name."""

    def replace(source, target, real=os.replace):
        if Path(target).name == name:
            raise KeyboardInterrupt
        real(source, target)

    return replace


def test_a_source_that_was_put_right_after_a_refusal_is_read_anew(
    build, coco_folder, coco_recipe, tmp_path
):
    out = tmp_path / "out"
    kept = coco_folder.file.read_text()
    coco_folder.write(lambda content: content["annotations"][0].update(iscrowd="0"))
    with pytest.raises(InputError, match="iscrowd '0'"):
        build(out, recipe=str(coco_recipe))
    coco_folder.file.write_text(kept)
    assert build(out, recipe=str(coco_recipe)).samples["segmentation"] == 25


def test_a_folder_that_was_built_before_a_key_came_to_be_is_left_alone(demo, build, tmp_path):
    out = shutil.copytree(demo, tmp_path / "older")
    values = json.loads((out / "manifest.json").read_text())
    del values["recipe"]["bad_images"], values["bad_images"]
    (out / "manifest.json").write_text(json.dumps(values))
    assert build(out).samples == {"segmentation": 25, "captioning": 25}


def test_coco_and_its_captions_make_both_tasks(build, coco_recipe, tmp_path):
    out = tmp_path / "out"
    manifest = build(out, "samples=null", recipe=str(coco_recipe))
    assert manifest.samples == {"segmentation": 9, "captioning": 16}
    assert manifest.classes == {
        "segmentation": {"cat": 3, "dog": 6},
        "captioning": {"cat": 4, "dog": 12},
    }
    assert manifest.skipped == {
        "segmentation.crowds_alone": 1,
        "captioning.captions_without_a_seen_class": 6,
    }
    assert verify_shards(out) == manifest
    sample = ShardSet(out).sample("captioning", 0)
    assert sample.meta["sources"][-1]["crop"] == [0, 0, 100, 80]
    assert len({source["image"] for source in sample.meta["sources"]}) == 3


def test_each_setting_of_the_caption_builds_and_verifies(build, coco_recipe, tmp_path):
    for number, settings in enumerate(
        (
            ["caption.category=none", "caption.box=none"],
            ["caption.category=given", "caption.box=image"],
            [
                "caption.category=none",
                "caption.box=none",
                "vocabulary.tags=false",
                "captioning=null",
            ],
            ["class_prompt=true", "prompt_length=8", "segmentation=null"],
        )
    ):
        out = tmp_path / str(number)
        build(out, *settings, recipe=str(coco_recipe))
        verify_shards(out)


def test_a_box_as_an_image_is_dark_on_the_object(build, tokenizer, coco_recipe, tmp_path):
    out = tmp_path / "out"
    manifest = build(out, "caption.box=image", "segmentation=null", recipe=str(coco_recipe))
    codec = SequenceCodec(manifest.format, TextTokenizer(1000))
    picture = BoxPicture((0.25, 0.5, 0.75, 1.0)).draw(64)
    assert not picture[32:, 16:48].any()
    assert picture[:32].all() and picture[32:, :16].all() and picture[32:, 48:].all()
    sample = ShardSet(out).sample("captioning", 0)
    box = sample.meta["boxes"][0]
    drawn = BoxPicture(tuple(box)).draw(64)
    expected = VQGAN.from_pretrained(tokenizer).encode(mask_to_pixels(drawn)[None]).numpy()
    np.testing.assert_array_equal(
        codec.decode(sample.sequence, TASKS[sample.task]).pairs[0].box_image, expected[0]
    )


def test_texts_without_room_are_left_out_and_counted(build, coco_folder, coco_recipe, tmp_path):
    captions = json.loads(coco_folder.captions_file.read_text())
    captions["annotations"][0]["caption"] = "a dog " + "and so on " * 40
    coco_folder.captions_file.write_text(json.dumps(captions))
    manifest = build(tmp_path / "out", recipe=str(coco_recipe))
    assert manifest.skipped["captioning.texts_without_room"] == 1


@pytest.mark.parametrize(
    ("settings", "edit", "remedy"),
    [
        (["captioning=null"], {"iscrowd": 1}, "set segmentation.crowds=instances"),
        (
            ["captioning=null"],
            {"segmentation": []},
            r"\(left out: .*\); give the objects outlines, polygons or masks",
        ),
        (["captioning=null", "segmentation.small_objects=false"], {}, "small_objects=true"),
        (["captioning=null", "examples=6"], {}, "provide more data or set examples lower"),
        (["segmentation=null"], {"bbox": [50, 50, -9, -9]}, "correct the boxes"),
        (["segmentation=null", "captioning.classes=[cat]", "examples=3"], {}, "more data or set"),
        (["segmentation=null", "captioning.min_descriptions=99"], {}, "min_descriptions lower"),
    ],
)
def test_where_nothing_is_left_the_sentence_says_what_would_help(
    build, coco_folder, coco_recipe, tmp_path, settings, edit, remedy
):
    def edit_all(content):
        kept = [annotation for annotation in content["annotations"] if annotation["area"] != 10]
        for annotation in kept:
            annotation.update(edit)
        if "segmentation.small_objects=false" in settings:
            kept = [annotation for annotation in kept if annotation["area"] < 1000]
        content["annotations"] = kept

    coco_folder.write(edit_all)
    with pytest.raises(InputError, match=remedy):
        build(tmp_path / "out", *settings, recipe=str(coco_recipe))


def test_missing_images_are_counted_in_the_manifest_on_demand(
    build, coco_folder, coco_recipe, tmp_path
):
    (coco_folder.images / "6.jpg").unlink()
    with pytest.raises(InputError, match="1 of 6 annotated images are missing"):
        build(tmp_path / "out", recipe=str(coco_recipe))
    manifest = build(tmp_path / "skipped", "missing_images=skip", recipe=str(coco_recipe))
    assert manifest.skipped["segmentation.missing_images"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["imagesize=64"], r"unknown key 'imagesize' \(did you mean 'image_size'\?\)"),
        (
            ["segmentation.sorce=coco"],
            r"unknown key 'segmentation.sorce' \(did you mean 'segmentation.source'\?\)",
        ),
        (
            ["segmentation.source=coco"],
            "segmentation.source=coco needs the key 'segmentation.images'",
        ),
        (
            ["captioning.source=visual_genome"],
            "captioning.source=visual_genome needs the key 'captioning.images'",
        ),
        (
            ["captioning.source=coco_captions", "captioning.images=x"],
            "needs the key 'captioning.annotations'",
        ),
        (["segmentation.classes=[]"], "segmentation.classes must name at least one class"),
        (["captioning.classes=[]"], "captioning.classes must name at least one class"),
        (["captioning.split=train"], "captioning.splits and captioning.split go together"),
        (
            ["segmentation=null", "captioning=null"],
            "needs a section 'segmentation', 'captioning' or both",
        ),
        (["examples=-1"], "examples must be at least 0"),
        (["samples=0"], "samples must be null or at least 1"),
        (["vocabulary.tags=false"], "set vocabulary.tags=true"),
        (
            ["vocabulary.image_codes=7"],
            r"vocabulary.image_codes is 7, but the tokenizer .* has 64 codes",
        ),
        (["image_size=65"], r"image_size is 65; the tokenizer .* needs a multiple of 8"),
        (
            ["examples=200"],
            "No class of segmentation appears in the 201 images that an episode needs",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_sentence(build, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path / "out", *settings)


def test_every_shipped_recipe_is_valid():
    folder = Path(cli.__file__).parent / "recipes"
    names = {path.stem for path in folder.glob("*.yaml")}
    assert {"demo", "coco_vg_256", "ablation_128", "coco_captions_128"} <= names
    sizes = {
        name: load_recipe(DataRecipe, name, package="preprocessing").image_size for name in names
    }
    assert sizes["coco_vg_256"] == 256
    paper = load_recipe(DataRecipe, "coco_vg_256", package="preprocessing")
    assert paper.vocabulary.size == 52295
    assert paper.sequence_format(256).length(paper.examples + 1) == 2060


def test_verify_accepts_what_was_built_and_says_so(demo, capsys):
    assert shards("verify", demo) == 0
    assert "6 shards with 50 samples are complete and correct" in capsys.readouterr().out


def test_verify_names_every_damaged_shard(damaged):
    changed, truncated = damaged / "captioning-000001.tar", damaged / "segmentation-000002.tar"
    content = bytearray(changed.read_bytes())
    content[4000] ^= 1
    changed.write_bytes(content)
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    with pytest.raises(
        InputError,
        match=(
            r"2 of 12 files are damaged: .*segmentation-000002.tar is truncated.*; The sha256 of "
            r".*captioning-000001"
        ),
    ):
        shards("verify", damaged)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "captioning",
            lambda raw: re.sub(rb'"captions":\["..', b'"captions":["!?', raw),
            "pair 0 says '.*', its JSON '!\\?",
        ),
        (
            "captioning",
            lambda raw: re.sub(rb'"boxes":\[\[0\.\d', b'"boxes":[[0.9', raw),
            "the box of pair 0 differs from its JSON",
        ),
        (
            "segmentation",
            lambda raw: raw.replace(b'"size":[64,64]', b'"size":[64,63]', 1),
            "a mask that is not RLE of 64 x 64",
        ),
        (
            "segmentation",
            lambda raw: raw.replace(b'"task":"s', b'"task":"S', 1),
            "its JSON names the task 'Segmentation'",
        ),
    ],
)
def test_verify_finds_samples_that_contradict_themselves(damaged, task, change, message):
    overwrite(damaged, task, 0, "json", change, as_packed=True)
    with pytest.raises(
        InputError, match=rf"{task}-000000.tar: sample {task}-00000000 is corrupt: .*{message}"
    ):
        verify_shards(damaged)


def test_stats_lists_tasks_lengths_and_classes(demo, capsys):
    assert shards("stats", demo) == 0
    text = capsys.readouterr().out
    manifest = Manifest.read(demo)
    assert "64 px, 1 examples" in text
    for task in ("segmentation", "captioning"):
        name, count = next(iter(manifest.classes[task].items()))
        assert any(line.split() == [name, str(count)] for line in text.splitlines())


def test_bf16_changes_few_tokens_and_is_on_record(build, demo, tmp_path):
    manifest = build(tmp_path / "bf16", "tokenizer_precision=bf16")
    assert manifest.recipe["tokenizer_precision"] == "bf16"
    exact, fast = (
        np.concatenate(
            [ShardSet(folder).sample("segmentation", n).sequence.tokens_L for n in range(25)]
        )
        for folder in (demo, tmp_path / "bf16")
    )
    assert (exact == fast).mean() > 0.95


def test_preview_is_one_page_with_every_picture_inside(demo, tmp_path):
    page = tmp_path / "new" / "page.html"
    assert shards("preview", demo, "--out", page) == 0
    text = page.read_text()
    assert text.count("data:image/png;base64,") >= 12 * (2 * 3 + 2)
    assert "://" not in text
    caption = ShardSet(demo).sample("captioning", 0).meta["captions"][0]
    assert caption in text


@pytest.mark.parametrize(
    "launch",
    [
        # All options are set, so that the machine's accelerate configuration has no effect. With
        # --cpu it would start one process, whatever the number.
        "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no -m icl_moe",
        pytest.param("torchrun --standalone --nproc_per_node 2 -m icl_moe", marks=pytest.mark.slow),
    ],
)
def test_two_launched_processes_make_the_bytes_of_one(
    demo, tokenizer, tmp_path, run_command, launch
):
    out = tmp_path / "out"
    settings = [*SMALL, *toy_tokenizer.recipe_settings(tokenizer)]
    result = run_command(
        [*launch.split(), "shards", "build", "demo", *settings, "--out", out, "--workers", "1"]
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("25 segmentation samples and 25 captioning samples in 6 shards") == 1
    assert re.search(r"packing samples: 100%\S* 25/25 ", result.stdout), "half of the 50 samples"
    assert result.stdout.count("planning segmentation:   0%") == 1, "one process plans for both"
    assert hashes(out) == hashes(demo)
