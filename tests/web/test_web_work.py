"""What the page of `icl-moe web` computes, without Gradio: from what a browser sends to results."""

import base64
import io
import json
import re
import struct
import zipfile
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from icl_moe.errors import InputError
from icl_moe.inference.region import Region
from icl_moe.rle import decode_rle
from icl_moe.web import cards, work


def png_of(levels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    return content.getvalue()


def url(levels):
    return "data:image/png;base64," + base64.b64encode(png_of(levels)).decode()


def huge_png() -> bytes:
    """A PNG file of 400 million pixels, whose data are missing."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def marked(picture, mask=None, **values):
    """What the marker sends. mask: boolean (H, W), or a data URL."""
    drawn = url(mask.astype(np.uint8) * 255) if isinstance(mask, np.ndarray) else mask
    return json.dumps(
        {
            "name": "scene.png",
            "picture": url(np.asarray(Image.open(picture))),
            "mask": drawn,
            **values,
        }
    )


@pytest.fixture(scope="module")
def example(scenes):
    folder, masks = scenes
    return work.marked_example(marked(folder / "0.png", masks[0]))


def test_a_marked_example_is_the_picture_and_the_mask_that_were_drawn(scenes, example):
    folder, masks = scenes
    assert (example.mask_HW == masks[0]).all()
    assert (np.asarray(example.picture) == np.asarray(Image.open(folder / "0.png"))).all()


def test_an_uploaded_mask_is_read_as_segment_reads_it(scenes, tmp_path):
    folder, masks = scenes
    Image.fromarray(masks[0].astype(np.uint8)).save(tmp_path / "mask.png")  # levels 0 and 1
    example = work.uploaded_example(str(folder / "0.png"), str(tmp_path / "mask.png"))
    assert (example.mask_HW == masks[0]).all() and example.name == "0.png"


def test_what_is_wrong_with_an_example_is_said_in_one_sentence_without_folders(scenes, tmp_path):
    folder, masks = scenes
    image = str(folder / "0.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "small.png")
    Image.new("L", (160, 160)).save(tmp_path / "black.png")
    (tmp_path / "no.png").write_text("no image")
    Image.new("RGB", (160, 160)).save(tmp_path / "script.png", "EPS")
    script = str(tmp_path / "script.png")
    empty = np.zeros_like(masks[0])
    cut = "data:image/png;base64," + base64.b64encode(png_of(empty)[:-40]).decode()
    bomb = "data:image/png;base64," + base64.b64encode(huge_png()).decode()
    for told, make in (
        ("no photograph to mark", lambda: work.marked_example("")),
        ("no photograph to mark", lambda: work.marked_example(None)),
        ("damaged", lambda: work.marked_example("{")),
        ("damaged", lambda: work.marked_example("[1]")),
        ("damaged", lambda: work.marked_example('{"picture": "file:///etc/passwd"}')),
        ("not an image", lambda: work.marked_example('{"picture": "data:image/png;base64,eA=="}')),
        ("Nothing is marked in scene.png", lambda: work.marked_example(marked(image))),
        ("Nothing is marked in scene.png", lambda: work.marked_example(marked(image, empty))),
        ("another size", lambda: work.marked_example(marked(image, empty[1:] + 1))),
        ("mask of scene.png cannot", lambda: work.marked_example(marked(image, mask=cut))),
        ("50 million pixels", lambda: work.marked_example(marked(image, mask=bomb))),
        ("script.png is PostScript", lambda: work.uploaded_example(script, image)),
        ("script.png is PostScript", lambda: work.uploaded_example(image, script)),
        ("script.png is PostScript", lambda: work.open_photograph(script)),
        ("caption of scene.png is empty", lambda: work.marked_example(marked(image), " ")),
        ("outside", lambda: work.marked_example(marked(image, box=[900, 9, 5, 5]), "a thing")),
        ("damaged", lambda: work.marked_example(marked(image, box=[1, "x"]), "a thing")),
        ("The mask is missing", lambda: work.uploaded_example(image, None)),
        ("photograph is missing", lambda: work.uploaded_example(None, image)),
        ("9 x 9 pixels", lambda: work.uploaded_example(image, str(tmp_path / "small.png"))),
        ("marks nothing", lambda: work.uploaded_example(image, str(tmp_path / "black.png"))),
        ("no.png", lambda: work.uploaded_example(str(tmp_path / "no.png"), image)),
    ):
        with pytest.raises(InputError) as error:
            make()
        sentence = str(error.value)
        assert told in sentence and sentence.endswith(".") and "\n" not in sentence
        assert str(tmp_path) not in sentence and str(folder) not in sentence


def test_only_uploaded_files_are_taken_wherever_they_are_in_an_input(tmp_path, monkeypatch):
    uploads, outside = tmp_path / "uploads", tmp_path / "outside.png"
    (uploads / "some").mkdir(parents=True)
    uploaded = uploads / "some" / "in.png"
    for path in (uploaded, outside):
        path.touch()
    (uploads / "some" / "out.png").symlink_to(outside)
    (uploads / "round.png").symlink_to(uploads / "round.png")
    taken = {"path": str(uploaded), "meta": {"_type": "gradio.FileData"}}
    monkeypatch.chdir(uploads / "some")

    def file(path, **others):
        return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **others}

    for path in (uploaded, "in.png", uploads / "some" / ".." / "some" / "in.png"):
        sent = file(path, url="http://127.0.0.1/x", orig_name="in.png", is_stream=True)
        inputs = ["text", None, [sent], {"background": sent, "layers": [[sent]]}]
        expected = ["text", None, [taken], {"background": taken, "layers": [[taken]]}]
        assert work.only_uploaded(inputs, uploads) == expected
    monkeypatch.chdir(tmp_path)
    for wrong in (
        file(outside),
        file(outside.name),
        file(uploads / ".." / outside.name),
        file(uploads / "some" / "out.png"),
        file(uploads / "round.png"),
        file(uploads),
        file(f"{uploads}-other/in.png"),
        file(""),
        file("in\0.png"),
        file("\ud800"),
        file("http://127.0.0.1/x.png"),
        file(f"file://{uploaded}"),
        {"path": str(outside)},
        {"path": [str(uploaded)]},
        {"url": "http://127.0.0.1/x.png", "meta": {"_type": "gradio.FileData"}},
    ):
        for value in (wrong, [wrong], [[taken, wrong]], {"layers": [taken], "composite": wrong}):
            with pytest.raises(InputError, match="not uploaded to this page"):
                work.only_uploaded([None, value], uploads)


def test_an_uploaded_example_and_a_marked_one_are_not_confused(scenes, tmp_path):
    folder, masks = scenes
    image, mask = str(folder / "0.png"), str(tmp_path / "mask.png")
    Image.fromarray(masks[0]).save(mask)
    chosen_only = marked(folder / "1.png")
    assert work.example_of(chosen_only, image, mask).name == "0.png"
    assert work.example_of("", image, mask).name == "0.png"
    assert work.example_of(marked(folder / "1.png", masks[1]), None, None).name == "scene.png"
    with pytest.raises(InputError, match="a marked one and an uploaded one"):
        work.example_of(marked(folder / "1.png", masks[1]), image, mask)


def test_captions_are_written_without_an_example_if_the_model_reads_names(scenes):
    folder, _ = scenes
    written = Region("a thing", "star", (1, 2, 3, 4))
    session = SimpleNamespace(caption=lambda queries: (written for _ in queries))
    model = SimpleNamespace(
        format=SimpleNamespace(class_prompt=True), session=lambda pairs, category: session
    )
    (found,) = work.find(model, (), [str(folder / "1.png")], "star", captions=True)
    assert found.region is written


def test_masks_are_those_of_segment_and_a_bad_photograph_is_left_out_by_name(
    demo, scenes, example, tmp_path
):
    folder, masks = scenes
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    bad = [str(tmp_path / "huge.png"), str(tmp_path / "moving.gif"), str(tmp_path / "gone.png")]
    paths = [bad[0], *(str(folder / f"{n}.png") for n in range(1, 5)), *bad[1:]]
    results = list(work.find(demo, (example,), paths))
    errors = [str(result) for result in results if isinstance(result, InputError)]
    assert "huge.png has 100 million pixels" in errors[0]
    assert "moving.gif is animated" in errors[1] and "gone.png does not exist" in errors[2]
    found = [result for result in results if isinstance(result, work.Found)]
    assert [result.name for result in found] == [f"{n}.png" for n in range(1, 5)]
    ious = []
    for result, truth in zip(found, masks[1:], strict=True):
        single = demo.segment([example.pair], folder / result.name)
        assert np.mean(result.drawn.mask_HW == single) > 0.999
        ious.append((single & truth).sum() / (single | truth).sum())
    assert max(ious) > 0.5


def test_a_closer_look_is_that_of_a_session(demo, scenes, example):
    folder, _ = scenes
    path = str(folder / "2.png")
    (found,) = work.find(demo, (example,), [path], closer=True)
    truth = demo.session([example.pair]).draw(path, windows=True)
    assert found.drawn.windows == truth.windows
    assert (found.drawn.mask_HW == truth.mask_HW).all()


def test_downloads_are_the_masks_and_a_coco_file_that_pycocotools_opens(
    demo, scenes, example, tmp_path
):
    folder, _ = scenes
    (tmp_path / "twin").mkdir()
    twin = tmp_path / "twin" / "1.png"
    twin.write_bytes((folder / "2.png").read_bytes())
    paths = [str(folder / "1.png"), str(twin)]
    kept = work.Kept("gear")
    found = list(work.find(demo, (example,), paths))
    for result in found:
        kept.add(result)
    archive = zipfile.ZipFile(io.BytesIO(kept.masks_zip()))
    assert archive.namelist() == ["1_mask.png", "1_2_mask.png"]
    for name, result in zip(archive.namelist(), found, strict=True):
        levels = np.asarray(Image.open(io.BytesIO(archive.read(name))))
        assert set(np.unique(levels)) <= {0, 255}
        assert ((levels == 255) == result.drawn.mask_HW).all()
    (tmp_path / "instances.json").write_text(json.dumps(kept.coco()))
    coco = COCO(tmp_path / "instances.json")
    assert [each["file_name"] for each in coco.dataset["images"]] == ["1.png", "1_2.png"]
    assert coco.cats[1]["name"] == "gear"
    assert coco.dataset["licenses"] == []
    for annotation in coco.dataset["annotations"]:
        mask_HW = found[annotation["image_id"] - 1].drawn.mask_HW
        assert (decode_rle(annotation["segmentation"]) == mask_HW).all()
        assert annotation["area"] == mask_HW.sum() and 0.5 <= annotation["score"] <= 1
        rows, columns = np.nonzero(mask_HW)
        x, y, width, height = annotation["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)


def test_photographs_of_equal_names_are_told_apart_in_all_downloads(demo, scenes, example):
    folder, _ = scenes
    picture = work.open_photograph(folder / "1.png")
    drawn = demo.draw_mask([example.pair], picture)
    kept = work.Kept()
    for name in ("x.jpg", "x.jpg", "x.png", "x_2.jpg", "x.jpg"):
        kept.add(work.Found(name, picture, drawn))
        kept.add(work.Found(name, picture, region=Region("a thing")))
    names = ["x.jpg", "x_2.jpg", "x.png", "x_2_2.jpg", "x_3.jpg"]
    assert [each["file_name"] for each in kept.coco()["images"]] == names
    assert [each["file_name"] for each in kept.regions] == names
    masks = ["x_mask.png", "x_2_mask.png", "x_mask_2.png", "x_2_2_mask.png", "x_3_mask.png"]
    assert list(kept.masks) == masks


def test_captions_come_with_the_box_in_the_photograph(both_tasks, scenes):
    folder, _ = scenes
    text = marked(folder / "0.png", box=[10, 20, 60, 50])
    category = both_tasks.codec.format.category != "none"
    example = work.marked_example(text, "a thing", "star" if category else "")
    assert example.region.box == (10, 20, 60, 50)
    path = str(folder / "1.png")
    (found,) = work.find(both_tasks, (example,), [path], "star" if category else "", captions=True)
    single = both_tasks.caption([example.pair], path, "star" if category else None)
    assert found.region == single
    kept = work.Kept()
    kept.add(found)
    page = cards.results_page([cards.card_of(found)], kept, 1, captions=True)
    assert "captions.json" in page and "icl-box" in page


def test_a_model_that_was_not_trained_for_captions_offers_none(demo, monkeypatch):
    assert work.can_segment(demo) and work.can_caption(demo)
    monkeypatch.setattr(demo.decoder.config, "classes", {"segmentation": ["star"]})
    assert work.can_segment(demo) and not work.can_caption(demo)


def test_examples_are_as_many_as_the_model_reads(demo, both_tasks, example, monkeypatch):
    assert work.capacity(demo) == work.MOST_EXAMPLES, "it reads them in groups"
    assert work.capacity(both_tasks) < work.MOST_EXAMPLES, "it writes captions word by word"
    examples = ()
    for _ in range(work.capacity(both_tasks)):
        examples = work.with_example(both_tasks, examples, example)
    with pytest.raises(InputError, match="remove one first"):
        work.with_example(both_tasks, examples, example)
    monkeypatch.setattr(work, "capacity", lambda model: 1)
    (kept,) = work.with_example(demo, (object(),), example)
    assert kept is example


def test_a_mask_that_the_search_would_refuse_is_refused_when_it_is_added(demo, scenes):
    folder, masks = scenes
    path, dot = folder / "0.png", np.zeros_like(masks[0])
    dot[80, 80] = True
    with pytest.raises(InputError) as of_search:
        demo.session([(path, dot)])
    with pytest.raises(InputError) as of_adding:
        work.with_example(demo, (), work.marked_example(marked(path, dot)))
    assert "is so small that nothing of it remains" in str(of_adding.value)
    assert str(of_adding.value) == str(of_search.value).replace("example 1", "scene.png")
    dot[78:83, 78:83] = True
    assert len(work.with_example(demo, (), work.marked_example(marked(path, dot)))) == 1
    demo.session([(path, dot)])


@pytest.mark.parametrize(
    ("paths", "told"), [(None, "no photographs"), ([], "no photographs"), (["x.png"] * 51, "50")]
)
def test_too_few_and_too_many_photographs_are_refused(demo, example, paths, told):
    with pytest.raises(InputError, match=told):
        next(work.find(demo, (example,), paths))


def test_photographs_without_an_example_are_refused(demo):
    with pytest.raises(InputError, match="no example yet"):
        next(work.find(demo, (), ["x.png"]))


def test_names_and_captions_cannot_write_html(demo, scenes, example):
    folder, _ = scenes
    picture = work.open_photograph(folder / "1.png")
    drawn = demo.draw_mask([example.pair], picture)
    evil = '<img src=x onerror=alert(1)>"'
    page = cards.results_page(
        [cards.card_of(work.Found(evil, picture, drawn)), InputError(evil)], work.Kept(), 2
    )
    assert "<img src=x" not in page and "&lt;img src=x" in page
    assert "<img src=x" not in cards.message(evil) + cards.examples_page((example,), evil)


def test_the_number_below_a_picture_is_named_for_what_it_is(demo, scenes, example):
    folder, _ = scenes
    path = folder / "1.png"
    drawn = demo.draw_mask([example.pair], path)
    empty = replace(drawn, brightness_HW=np.full_like(drawn.brightness_HW, -1))
    by_code = replace(drawn, at_once=False, log_probability=np.log(0.25))
    unknown = replace(by_code, log_probability=None)
    assert drawn.mask_HW.any() and by_code.mask_HW.any() and not empty.mask_HW.any()
    for each, said in (
        (drawn, f"marked · expected overlap {100 * drawn.score():.0f}%"),
        (empty, "nothing found"),
        (replace(by_code, brightness_HW=empty.brightness_HW), "nothing found"),
        (by_code, "marked · confidence 25%, look twice"),
        (unknown, "marked"),
    ):
        card = cards.card_of(work.Found("1.png", work.open_photograph(path), each))
        page = cards.results_page([card], work.Kept(), 1)
        caption = page.partition("<figcaption>")[2].partition("<a ")[0]
        text = " ".join(re.sub("<[^>]*>", "", caption).split())
        assert text.removeprefix("1.png ").removeprefix(f"{each.mask_HW.mean():.1%} ") == said


def test_a_large_photograph_is_shown_small_and_its_mask_has_its_size(demo, example, tmp_path):
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "wide.png")
    (found,) = work.find(demo, (example,), [str(tmp_path / "wide.png")])
    card = cards.card_of(found)
    photo = Image.open(io.BytesIO(base64.b64decode(card.photo.partition(",")[2])))
    mask = Image.open(io.BytesIO(base64.b64decode(card.download.partition(",")[2])))
    assert photo.size == (720, 360) and mask.size == (3000, 1500)
