"""The public interface, with a tokenizer that is lossless on pictures of flat 8 x 8 squares, and a
decoder that copies.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_export
from PIL import Image

from icl_moe import InContextModel
from icl_moe.errors import InputError
from icl_moe.inference import model as model_module
from icl_moe.inference.decode import Sampling, decode_batch
from icl_moe.inference.model import Region
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import ModelSettings
from icl_moe.sequence import Episode, SequenceFormat
from icl_moe.settings import to_dict
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

SIDE, SQUARE, CODES = 64, 8, 64
VOCABULARY = Vocabulary(text_merges=1000, image_codes=256)


class FlatSquares(torch.nn.Module):
    """A code is the mean level of an 8 x 8 square."""

    downsampling, fingerprint = SQUARE, "flat squares"

    def __init__(self):
        super().__init__()
        self.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))

    def encode(self, pixels_B3HW):
        levels = torch.nn.functional.avg_pool2d(pixels_B3HW.mean(1, keepdim=True), SQUARE)
        return ((levels + 1) * 127.5).round().long().flatten(1)

    def decode(self, codes_BN):
        levels = (codes_BN.float() / 127.5 - 1).unflatten(1, (1, SIDE // SQUARE, SIDE // SQUARE))
        return torch.nn.functional.interpolate(levels, scale_factor=SQUARE).expand(-1, 3, -1, -1)


def make_model(small_text: TextTokenizer, **settings) -> InContextModel:
    format = SequenceFormat(VOCABULARY, CODES, **settings)
    shape = ModelSettings(
        layers=1,
        width=16,
        heads=1,
        positions=format.length(3),
        feed_forward="dense",
        layers_with_experts=(),
    )
    config = DecoderConfig(
        model=to_dict(shape),
        vocabulary=to_dict(VOCABULARY),
        format=to_dict(format),
        image_size=SIDE,
        examples=2,
    )
    decoder = InContextDecoder(config)
    initialise(decoder, seed=0)
    return InContextModel(decoder, ImageTokenizers(FlatSquares()), small_text)


@pytest.fixture
def copying(monkeypatch):
    """Makes the decoder write the output of the last example."""

    class Copy:
        device = torch.device("cpu")

        def __init__(self, tokens):
            self.tokens, self.read = tokens, 0

        def next_logits(self, tokens_BL, positions_BL, attributes_BL, cache=None, links_BL2=None):
            self.read += tokens_BL.shape[1]
            return torch.nn.functional.one_hot(
                torch.tensor([self.tokens[self.read]]), VOCABULARY.size
            ).float()

    def decode(decoder, codec, requests, *rest):
        ((episode, query),) = requests
        prompt = len(codec.encode_prompt(episode, query).unpadded())
        output = (
            codec.encode(episode)
            .unpadded()
            .tokens_L[len(codec.encode_prompt(_without_last(episode), query).unpadded()) :]
        )
        return decode_batch(Copy([0] * prompt + output.tolist()), codec, requests)

    monkeypatch.setattr(model_module, "decode_batch", decode)


def _without_last(episode: Episode) -> Episode:
    return Episode(episode.task, episode.category, episode.pairs[:-1])


def picture(seed: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks(width: int, height: int) -> np.ndarray:
    """A mask of whole squares, for an image whose size is a multiple of the model's."""
    grid = np.random.default_rng(9).integers(0, 2, (SIDE // SQUARE, SIDE // SQUARE), dtype=np.uint8)
    return np.kron(
        grid, np.ones((height * SQUARE // SIDE, width * SQUARE // SIDE), np.uint8)
    ).astype(bool)


def test_a_copied_mask_comes_back_at_the_querys_size(small_text, copying):
    """The query has another size than the example. Squares of the mask stay squares, up to a pixel
    at their borders.
    """
    model = make_model(small_text)
    mask = model.segment([(picture(0, 128, 64), blocks(128, 64))], query=picture(1, 192, 256))
    assert mask.dtype == np.bool_
    assert mask.shape == (256, 192)
    assert np.mean(mask == blocks(192, 256)) > 0.9
    exact = model.segment([(picture(0, 128, 64), blocks(128, 64))], query=picture(1))
    assert np.array_equal(exact, blocks(SIDE, SIDE))


@pytest.mark.parametrize("levels", [1, 255])
def test_files_arrays_and_pictures_are_read_alike(small_text, copying, tmp_path, levels):
    """A mask file may hold 0 and 1 or 0 and 255."""
    Image.fromarray(picture(0)).save(tmp_path / "image.png")
    Image.fromarray(blocks(SIDE, SIDE).astype(np.uint8) * levels).save(tmp_path / "mask.png")
    model = make_model(small_text)
    files = model.segment(
        [(tmp_path / "image.png", str(tmp_path / "mask.png"))], query=str(tmp_path / "image.png")
    )
    image = Image.open(tmp_path / "image.png")
    assert np.array_equal(files, blocks(SIDE, SIDE))
    assert np.array_equal(
        files, model.segment([(image, Image.open(tmp_path / "mask.png"))], query=image)
    )


BOX = (32.0, 16.0, 64.0, 32.0)


@pytest.mark.parametrize("box", ["text", "image", "none"])
@pytest.mark.parametrize("category", ["written", "given", "none"])
def test_a_copied_caption_has_its_box_in_the_querys_pixels(small_text, copying, box, category):
    model = make_model(small_text, box=box, category=category)
    region = model.caption(
        [(picture(0, 128, 64), Region("a dog. on grass", "dog", BOX))], query=picture(1, 256, 192)
    )
    assert region.caption == "a dog. on grass"
    assert region.category == (None if category == "none" else "dog")
    expected = None if box == "none" else pytest.approx((64, 48, 128, 96), abs=2)
    assert region.box == expected


def test_a_class_prompt_makes_examples_dispensable_but_not_the_class(small_text):
    model = make_model(small_text, class_prompt=True)
    assert model.segment([], query=picture(0), category="dog").shape == (SIDE, SIDE)
    with pytest.raises(InputError, match="set the category"):
        model.segment([], query=picture(0))


REGION = Region("a dog", "dog", BOX)


@pytest.mark.parametrize(
    ("settings", "examples", "message"),
    [
        ({}, [], "needs at least one example"),
        (
            {},
            [REGION] * 3,
            "3 examples are more than this model can read: its 393 positions hold 2",
        ),
        ({}, [Region("a dog", None, BOX)], "Example 1 lacks the category"),
        ({}, [REGION, Region("a dog", "dog")], "Example 2 lacks the box"),
        ({"category": "given"}, [REGION, Region("a cat", "cat", BOX)], "set the category"),
        ({}, [Region("dog " * 300, "dog", BOX)], "there is room for 64"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(small_text, settings, examples, message):
    with pytest.raises(InputError, match=message):
        make_model(small_text, **settings).caption(
            [(picture(n), region) for n, region in enumerate(examples)], query=picture(9)
        )


def test_a_mask_of_another_size_than_its_image_is_refused(small_text):
    with pytest.raises(
        InputError, match="The mask of example 1 is 32 x 64 pixels, but its image is 64 x 64"
    ):
        make_model(small_text).segment([(picture(0), blocks(32, 64))], query=picture(0))


def test_the_model_sees_the_same_pixels_whichever_way_an_image_comes(
    small_text, tmp_path, monkeypatch
):
    """A photograph with EXIF rotation, as a file and in the forms that web services use."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(3, 128, 64)).save(tmp_path / "side.png", exif=exif)
    marks = np.zeros((64, 128), np.uint8)
    marks[10:40, 20:90] = 1
    Image.fromarray(marks).save(tmp_path / "mask.png", exif=exif)
    model, seen = make_model(small_text), []

    def encode(pixels):
        seen.append(torch.stack([torch.as_tensor(each) for each in pixels]))
        return [np.zeros(CODES, np.int64)] * len(pixels)

    monkeypatch.setattr(model, "encode", encode)
    monkeypatch.setattr(model, "encode_masks", encode)
    upright = Image.fromarray(np.rot90(picture(3, 128, 64), -1))
    ways = [
        (tmp_path / "side.png", tmp_path / "mask.png"),
        (Image.open(tmp_path / "side.png"), Image.open(tmp_path / "mask.png")),
        (np.asarray(upright), np.rot90(marks, -1)),
        (upright.convert("RGBA"), np.rot90(marks, -1) > 0),
    ]
    for image, mask in ways:
        assert model.segment([(image, mask)], query=image).shape == (128, 64)
    for image, mask, query in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert torch.equal(image, seen[0]) and torch.equal(query, seen[0])
        assert torch.equal(mask, seen[1])
    assert seen[0].std() > 0.1 and seen[1].unique().tolist() == [False, True]


def test_examples_may_come_from_any_iterable(small_text, copying):
    model = make_model(small_text)
    pairs = [(picture(0), blocks(SIDE, SIDE)), [picture(2), blocks(SIDE, SIDE)]]
    whole = model.segment(pairs, query=picture(1))
    assert np.array_equal(whole, model.segment((pair for pair in pairs), query=picture(1)))
    regions = [(picture(0), REGION)]
    assert model.caption(iter(regions), query=picture(1)).caption == "a dog"


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (None, "Example 1 must be a pair .image, mask. in a list of examples, not NoneType"),
        ("dog.jpg", "Example 1 must be a pair .image, mask. in a list of examples, not str"),
        ([picture(0)], "Example 1 must be a pair"),
        (picture(0), "Example 1 must be a pair"),
        ([(picture(0), blocks(64, 64)), (picture(0),)], "Example 2 must be a pair"),
        ([("absent.jpg", blocks(64, 64))], "The image absent.jpg does not exist"),
        ([(picture(0), "absent.png")], "The mask absent.png does not exist"),
        ([(picture(0), blocks(64, 64) & False)], "The mask of example 1 marks nothing"),
        ([(None, blocks(64, 64))], "The image of example 1 must be a path"),
    ],
)
def test_examples_that_are_none_are_refused(small_text, examples, message):
    with pytest.raises(InputError, match=message):
        make_model(small_text).segment(examples, query=picture(0))


def test_a_mark_that_vanishes_at_the_models_size_is_refused(small_text, tmp_path):
    marks = np.zeros((640, 640), np.uint8)
    marks[3:5, 300:303] = 255
    Image.fromarray(marks).save(tmp_path / "dot.png")
    for mask, name in ((tmp_path / "dot.png", "dot.png"), (marks, "The mask of example 1")):
        with pytest.raises(InputError, match=f"{name} is so small that nothing"):
            make_model(small_text).segment([(picture(0, 640, 640), mask)], query=picture(0))


@pytest.mark.parametrize("category", [3, b"dog", ["dog"]])
def test_a_category_that_is_no_text_is_refused(small_text, category):
    with pytest.raises(InputError, match="The category must be text"):
        make_model(small_text).segment(
            [(picture(0), blocks(64, 64))], query=picture(0), category=category
        )


def test_a_category_that_the_model_does_not_read_is_refused(small_text):
    with pytest.raises(InputError, match="reads no class names, only examples"):
        make_model(small_text).segment(
            [(picture(0), blocks(64, 64))], query=picture(0), category="dog"
        )


def test_half_a_character_is_refused_wherever_a_text_is_given(small_text):
    model = make_model(small_text, category="given")
    with pytest.raises(InputError, match="half of a character"):
        model.caption([(picture(0), REGION)], query=picture(1), category="do\udc67")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_k": 2.5},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_sampling_of_no_sense_is_refused(settings):
    (name,) = settings
    with pytest.raises(InputError, match=name):
        Sampling(**settings)


def test_an_almost_cold_draw_is_the_most_probable_one(small_text):
    model = make_model(small_text)
    examples = [(picture(0), blocks(SIDE, SIDE))]
    greedy = model.segment(examples, query=picture(1))
    cold = model.segment(examples, query=picture(1), sampling=Sampling(temperature=1e-300))
    assert np.array_equal(greedy, cold)


def test_an_array_that_is_no_image_is_refused(small_text):
    with pytest.raises(InputError, match="must be uint8"):
        make_model(small_text).segment([(np.zeros((4, 4, 3)), blocks(64, 64))], query=picture(0))


def test_a_region_file_is_read(tmp_path):
    (tmp_path / "region.json").write_text(
        '{"caption": "a dog", "category": "dog", "box": [32, 16, 64, 32]}'
    )
    assert Region.load(tmp_path / "region.json") == REGION
    (tmp_path / "short.json").write_text('\ufeff{"caption": "a dog", "box": null}')
    assert Region.load(tmp_path / "short.json") == Region("a dog")


def test_a_regions_file_may_stand_for_the_region(small_text, copying, tmp_path):
    (tmp_path / "region.json").write_text(
        '{"caption": "a dog", "category": "dog", "box": [32, 16, 64, 32]}'
    )
    model = make_model(small_text)
    for region in (REGION, tmp_path / "region.json", str(tmp_path / "region.json")):
        assert model.caption([(picture(0), region)], query=picture(1)).caption == "a dog"
    with pytest.raises(InputError, match="Example 1 must have a Region, or the path of its file"):
        model.caption([(picture(0), {"caption": "a dog"})], query=picture(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ('{"caption": ', "is not valid JSON"),
        ('["a dog"]', "must hold"),
        ('{"category": "dog"}', "must hold"),
        ('{"caption": "a dog", "bbox": [1, 2, 3, 4]}', "must hold"),
        ('{"caption": "a dog", "box": [1, 2, 3]}', "the box must be"),
        ('{"caption": "a dog", "box": [1, 2, 3, "4"]}', "the box must be"),
        ('{"caption": "a dog", "box": [1, 2, 3, true]}', "the box must be"),
        ('{"caption": "a dog", "box": {"x": 1}}', "the box must be"),
        ('{"caption": "a dog", "box": [51, 52, -40, -40]}', "a width and a height above 0"),
        ('{"caption": "a dog", "box": [51, 12, -40, 40]}', "a width and a height above 0"),
        ('{"caption": "a dog", "box": [5, 5, 0, 0]}', "a width and a height above 0"),
        ('{"caption": "a dog", "box": [NaN, 1, 2, 3]}', "finite numbers"),
        ('{"caption": "a dog", "box": [0, 0, Infinity, 3]}', "finite numbers"),
        ('{"caption": "a dog", "box": [0, 0, 1e999, 3]}', "finite numbers"),
        (f'{{"caption": "a dog", "box": [0, 0, {"9" * 400}, 3]}}', "finite numbers"),
        (f'{{"caption": "a dog", "box": [0, 0, {"9" * 5000}, 3]}}', "is not valid JSON"),
        ('{"caption": null}', "the caption must be text"),
        ('{"caption": 5}', "the caption must be text"),
        ('{"caption": " "}', "the caption must be text"),
        ('{"caption": "a dog", "category": 7}', "the category must be text"),
        ('{"caption": "a dog \\ud83d"}', "the caption must be text"),
        ('{"caption": "a dog", "category": "\\udc67"}', "the category must be text"),
        ('{"caption": "a dog", "caption": "a cat"}', "a key occurs twice"),
        ("[" * 100_000, "is not valid JSON"),
        ("", "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
    ],
)
def test_a_file_that_is_no_region_is_refused_by_name(tmp_path, content, message):
    if content is not None:
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / "region.json").write_bytes(raw)
    with pytest.raises(InputError, match=message) as caught:
        Region.load(tmp_path / "region.json")
    assert "region.json" in str(caught.value)


@pytest.mark.parametrize("box", ["text", "image", "none"])
def test_a_box_outside_of_its_image_is_refused_by_the_regions_name(small_text, tmp_path, box):
    (tmp_path / "away.json").write_text(
        '{"caption": "a dog", "category": "dog", "box": [500, 500, 10, 10]}'
    )
    model = make_model(small_text, box=box)
    for region, name in (
        (tmp_path / "away.json", str(tmp_path / "away.json")),
        (Region("a dog", "dog", (-20, 5, 20, 9)), "Example 1"),
    ):
        with pytest.raises(InputError) as caught:
            model.caption([(picture(0), region)], query=picture(1))
        assert str(caught.value).startswith(f"{name}: the box [")
        assert "lies outside its image, which is 64 x 64 pixels" in str(caught.value)


def test_a_region_of_no_sense_is_refused_in_python_too(small_text):
    for region, message in (
        (Region("a dog", "dog", (5, 5, -3, 4)), "Example 1: the box must be"),
        (Region("a dog", "dog", (1, 2, 3)), "Example 1: the box must be"),
        (Region("a dog", "dog", "abcd"), "Example 1: the box must be"),
        (Region(None, "dog", BOX), "Example 1: the caption must be text"),
    ):
        with pytest.raises(InputError, match=message):
            make_model(small_text).caption([(picture(0), region)], query=picture(1))
    numbers = Region("a dog", "dog", tuple(np.array(BOX, np.float32)))
    numbers.check("Numbers of NumPy's are numbers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return toy_export.build_toy_line(tmp_path_factory.mktemp("exported"), images=30, samples=1)


def test_an_exported_folder_is_all_that_is_needed(exported):
    model = InContextModel.from_pretrained(exported, device="cpu")
    assert len(model.fingerprint) == 16
    assert model.segment([(picture(0), blocks(SIDE, SIDE))], query=picture(1, 100, 50)).shape == (
        50,
        100,
    )
    assert model.caption([(picture(0), REGION)], query=picture(1)).category


def test_a_session_captions_as_one_call_does(exported):
    """Region by region, in batches; with how probable the model found its text."""
    model = InContextModel.from_pretrained(exported, device="cpu")
    examples = [(picture(0), REGION)]
    queries = [picture(1), picture(2, 100, 50), picture(3)]
    session = model.session(examples)
    found = session.caption(queries, batch=2)
    alone = [model.caption(examples, query) for query in queries]
    assert found == alone
    assert len({region.log_probability for region in alone}) > 1, "they depend on the query"
    for region, same in zip(found, alone, strict=True):
        assert -20 < region.log_probability < 0
        assert region.log_probability == pytest.approx(same.log_probability, abs=1e-4)
    named = model.session({"dog": examples, "cat": [(picture(4), REGION)]}).caption(queries[0])
    assert named["dog"] == found[0] and set(named) == {"dog", "cat"}
    with pytest.raises(InputError, match="have regions; segmentation needs masks"):
        session.segment(picture(1))


@pytest.mark.parametrize(
    "missing", ["config.json", "model.safetensors", "image_tokenizer", "text_tokenizer"]
)
def test_an_incomplete_folder_is_refused_by_what_it_lacks(exported, tmp_path, missing):
    shutil.copytree(exported, tmp_path / "model")
    path = tmp_path / "model" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=f"lacks {missing}"):
        InContextModel.from_pretrained(tmp_path / "model")


def test_a_file_that_may_not_be_read_is_called_that(
    exported, run_command, without_privileges, tmp_path
):
    path = shutil.copytree(exported, tmp_path / "model") / "text_tokenizer/vocab.json"
    path.chmod(0)
    Image.fromarray(picture(0)).save(tmp_path / "image.png")
    done = run_command(
        [
            *without_privileges,
            *(sys.executable, "-m", "icl_moe", "segment", tmp_path / "model"),
            *("--example", tmp_path / "image.png", tmp_path / "image.png"),
            *("--query", tmp_path / "image.png", "--out", tmp_path / "mask.png"),
        ]
    )
    assert done.returncode == 2
    assert done.stdout == f"icl-moe: {path} cannot be read (Permission denied).\n"


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _set(**values):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def _state_the_vocabulary_again(**values):
    """In the format, as in earlier exports."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["format"]["vocabulary"] = {**config["vocabulary"], **values}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def test_the_vocabulary_stands_once_in_an_exported_configuration(exported, tmp_path):
    config = json.loads((exported / "config.json").read_text())
    assert config["vocabulary"] and "vocabulary" not in config["format"]
    shutil.copytree(exported, tmp_path / "older")
    _state_the_vocabulary_again()(tmp_path / "older")
    older = InContextModel.from_pretrained(tmp_path / "older")
    assert older.format == InContextModel.from_pretrained(exported).format
    older.decoder.config.save_pretrained(tmp_path / "again")
    assert "vocabulary" not in json.loads((tmp_path / "again/config.json").read_text())["format"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cannot be read"),
        (_set(image_tokenizer="0123"), "the model was trained with 0123"),
        (_set(image_size=128), "does not encode the model's images of 128 pixels as 64 codes"),
        (
            _state_the_vocabulary_again(text_merges=2000),
            "format.vocabulary differs from the vocabulary",
        ),
    ],
    ids=["truncated weights", "another tokenizer", "another size", "another vocabulary"],
)
def test_a_folder_whose_parts_disagree_is_refused(exported, tmp_path, damage, message):
    shutil.copytree(exported, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        InContextModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:9"}, "There is no device cuda:9 here; this machine has cpu"),
        ({"device": "gpu"}, "There is no device gpu here"),
        ({"dtype": "float16"}, "A dtype must be float32 or bfloat16, not float16"),
    ],
)
def test_a_device_or_precision_that_is_not_there_is_refused(exported, options, message):
    with pytest.raises(InputError, match=message):
        InContextModel.from_pretrained(exported, **options)


def test_a_decoder_computes_in_the_precision_that_is_asked_for(exported):
    for same in ("bfloat16", torch.bfloat16):
        model = InContextModel.from_pretrained(exported, device="cpu", dtype=same)
        assert model.decoder.dtype is torch.bfloat16
    kinds = {name: weight.dtype for name, weight in model.decoder.named_parameters()}
    assert kinds["token_embedding.weight"] == torch.bfloat16
    assert all(kind == torch.float32 for name, kind in kinds.items() if ".gate." in name)
