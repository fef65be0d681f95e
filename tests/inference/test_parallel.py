"""Masks decoded in one pass: the probabilities of each cell and the resulting pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_export
import toy_tokenizer

from icl_moe.attributes import attribute_class
from icl_moe.boxes import brightest_box
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.images import box_to_mask
from icl_moe.inference.decode import Request, decode_at_once, decode_batch, read_examples
from icl_moe.inference.model import InContextModel
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import ModelSettings
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat
from icl_moe.settings import load_recipe, to_dict
from icl_moe.tasks import CAPTIONING, SEGMENTATION
from icl_moe.tasks.captioning import box_of
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.tokenizers.vqgan import VQGAN
from icl_moe.vocabulary import Vocabulary
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe

VOCABULARY = Vocabulary(text_merges=1000, image_codes=32, mask=True)
CODES = 16
FORMAT = SequenceFormat(VOCABULARY, CODES, class_prompt=True, prompt_length=16)


def decoder_of(link: bool) -> InContextDecoder:
    settings = ModelSettings(
        layers=2,
        width=32,
        heads=2,
        positions=FORMAT.length(3),
        layers_with_experts=(1,),
        experts=4,
        link=link,
        initialisation="fan_in",
    )
    config = DecoderConfig(
        model=to_dict(settings), vocabulary=to_dict(VOCABULARY), format=to_dict(FORMAT)
    )
    decoder = InContextDecoder(config)
    initialise(decoder, seed=0)
    return decoder.eval()


def plainly(decoder: InContextDecoder, episode: Episode, image: np.ndarray) -> torch.Tensor:
    """One query without batch or padding, with sequence and links constructed explicitly."""
    start = VOCABULARY.image_range.start
    task = SEGMENTATION
    visual_in, visual_out, text_in = (
        attribute_class(task.outputs(FORMAT), *kind, class_prompt=True)
        for kind in (("image", False), ("image", True), ("text", False))
    )
    prompt = SequenceCodec(FORMAT, TextTokenizer(merges=1000)).encode_prompt(
        Episode(task, episode.category, ()), image
    )
    name = prompt.tokens_L[: int((prompt.attributes() == text_in).sum())].tolist()
    tokens, positions = list(name), list(range(len(name)))
    attributes, links = [text_in] * len(name), [(-1, -1)] * len(name)
    pairs = [(pair.image, pair.mask) for pair in episode.pairs]
    position = FORMAT.prompt_length
    for codes, mask in [*pairs, (image, None)]:
        seen = [start + code for code in codes.tolist()]
        hidden = [VOCABULARY.mask_token] * (CODES - 1)
        drawn = hidden if mask is None else [start + code for code in mask.tolist()]
        new = [VOCABULARY.boi, *seen, VOCABULARY.boi, *drawn]
        of_new = [(-1, -1)] * (1 + CODES)
        of_new += [
            (seen[cell + 1] if cell + 1 < CODES else -1, seen[cell] if cell >= 0 else -1)
            for cell in range(-1, len(drawn))
        ]
        if mask is not None:
            new.append(VOCABULARY.eoc)
            of_new.append((-1, -1))
        tokens += new
        links += of_new
        attributes += [visual_in] * (1 + CODES) + [visual_out] * (len(new) - 1 - CODES)
        positions += range(position, position + len(new))
        position += FORMAT.pair_length
    rows = (torch.tensor([row]) for row in (tokens, positions, attributes, links))
    logits_LV = decoder.forward_logits(*rows)[0]
    return logits_LV[-CODES:, start : start + VOCABULARY.image_codes].softmax(dim=-1)


@pytest.mark.parametrize("link", [False, True])
@torch.inference_mode()
def test_each_cells_probabilities_are_those_of_the_episode_with_its_mask_hidden(link):
    """In one batch of queries with prompts of different lengths."""
    rng = np.random.default_rng(0)
    decoder, codec = decoder_of(link), SequenceCodec(FORMAT, TextTokenizer(merges=1000))

    def codes() -> np.ndarray:
        return rng.integers(0, VOCABULARY.image_codes, CODES)

    requests = [
        (
            Episode(
                SEGMENTATION,
                category,
                tuple(SegmentationPair(codes(), codes()) for _ in range(shots)),
            ),
            codes(),
        )
        for shots, category in ((1, "cat"), (0, "a zebra"), (2, "dog"))
    ]
    found_BNK = decode_at_once(decoder, codec, requests)
    assert found_BNK.shape == (3, CODES, VOCABULARY.image_codes)
    for found_NK, (episode, image) in zip(found_BNK, requests, strict=True):
        torch.testing.assert_close(found_NK, plainly(decoder, episode, image), atol=1e-5, rtol=1e-4)
    read = [read_examples(decoder, codec, episode) for episode, _ in requests]
    after_BNK = decode_at_once(decoder, codec, requests, read=read)
    torch.testing.assert_close(after_BNK, found_BNK, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("together", "groups"), [(1, [[0], [1], [2]]), (2, [[0, 2], [1]])])
@torch.inference_mode()
def test_examples_are_read_in_groups_whose_probabilities_are_averaged(together, groups):
    """Each group counts as much as it has examples; queries may have different numbers of them."""
    rng = np.random.default_rng(1)
    decoder, codec = decoder_of(link=True), SequenceCodec(FORMAT, TextTokenizer(merges=1000))
    codes = rng.integers(0, VOCABULARY.image_codes, (8, CODES))
    examples = tuple(SegmentationPair(*pair) for pair in codes[:6].reshape(3, 2, CODES))
    many, one = (Episode(SEGMENTATION, "cat", pairs) for pairs in (examples, examples[:1]))
    none = Episode(SEGMENTATION, "dog", ())
    requests = [(many, codes[6]), (one, codes[7]), (none, codes[7])]
    found_BNK = decode_at_once(decoder, codec, requests, together)
    parts = [replace(many, pairs=tuple(examples[number] for number in group)) for group in groups]
    mean_NK = sum(len(part.pairs) / 3 * plainly(decoder, part, codes[6]) for part in parts)
    right = [mean_NK, *(plainly(decoder, episode, codes[7]) for episode in (one, none))]
    torch.testing.assert_close(found_BNK, torch.stack(right), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_query_without_examples_may_stand_beside_one_with_several_groups():
    """Code by code; a decoder that was trained with a class prompt."""
    rng = np.random.default_rng(1)
    decoder, codec = decoder_of(link=True), SequenceCodec(FORMAT, TextTokenizer(merges=1000))
    codes = rng.integers(0, VOCABULARY.image_codes, (6, CODES))
    examples = tuple(SegmentationPair(*pair) for pair in codes[:4].reshape(2, 2, CODES))
    many, none = Episode(SEGMENTATION, "cat", examples), Episode(SEGMENTATION, "dog", ())
    requests = [(many, codes[4]), (none, codes[5])]
    both = decode_batch(decoder, codec, requests, together=1)
    for written, request in zip(both, requests, strict=True):
        (alone,) = decode_batch(decoder, codec, [request], together=1)
        assert written.tokens == alone.tokens
        assert np.isfinite([each for each in written.log_probabilities if each is not None]).all()


@torch.inference_mode()
def test_examples_that_all_queries_share_change_no_probability():
    rng = np.random.default_rng(1)
    decoder, codec = decoder_of(True), SequenceCodec(FORMAT, TextTokenizer(merges=1000))
    codes = rng.integers(0, VOCABULARY.image_codes, (7, CODES))
    episode = Episode(
        SEGMENTATION, "cat", (SegmentationPair(*codes[:2]), SegmentationPair(*codes[2:4]))
    )
    found_BNK = decode_at_once(decoder, codec, [(episode, image) for image in codes[4:]])
    for found_NK, image in zip(found_BNK, codes[4:], strict=True):
        expected_NK = plainly(decoder, episode, image)
        torch.testing.assert_close(found_NK, expected_NK, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """A model with random weights that draws boxes, as one that was trained with corruption, and
    shards for it.
    """
    folder = tmp_path_factory.mktemp("drawing")
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    settings = ["synthetic.images=20", "samples=6", "segmentation=null", "caption.box=image"]
    settings += ["caption.category=none", "vocabulary.mask=true"]
    settings += toy_tokenizer.recipe_settings(tokenizer)
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    toy_export.save_toy_model(folder / "model", folder / "shards", mask_corruption=True)
    return InContextModel.from_pretrained(folder / "model"), ShardSet(folder / "shards")


def check_text(model: InContextModel, groups: list[Request], tokens: list[int]) -> None:
    """Each token of the text is the likeliest one after all before it, without a cache, by the mean
    of the probabilities after each group of examples.
    """
    vocabulary = model.format.vocabulary
    found = []
    for group in groups:
        prompt = model.codec.encode_prompt(*group).unpadded()
        last = int(prompt.positions_L[-1])
        columns = (
            [*prompt.tokens_L.tolist(), *tokens],
            [*prompt.positions_L.tolist(), *range(last + 1, last + 1 + len(tokens))],
            [
                *prompt.attributes().tolist(),
                *(CAPTIONING.output_attributes(model.format, token) for token in tokens),
            ],
        )
        logits_LV = model.decoder.forward_logits(*(torch.tensor([each]) for each in columns))[0]
        found.append(logits_LV[len(prompt) - 1 :].softmax(dim=1))
    mean_LV = torch.stack(found).mean(dim=0)
    fixed = model.format.codes_per_image + 1 + len(model.codec.text.encode("Caption:"))
    assert len(tokens) > fixed + 2
    full_stop = model.codec.text.encode(".")[0]
    for place in range(fixed, len(tokens) - 2):  # The last two may be forced, for want of room.
        text = mean_LV[place, : vocabulary.text_size]
        if tokens[place - 1] != full_stop:
            assert tokens[place] == int(text.argmax())


@torch.inference_mode()
def test_a_box_is_drawn_in_one_pass_and_the_caption_is_written_after_it(drawing):
    model, shards = drawing
    episodes = EpisodeSet(shards, model.codec, "captioning")
    queries = [episodes[number] for number in range(4)]
    requests = [(Episode(CAPTIONING, "", e.pairs[:1]), e.query.image) for e in queries]
    pairs = model.complete(requests)
    probabilities_BNK = decode_at_once(model.decoder, model.codec, requests)
    brightness_BHW = model.tokenizers.mask_writer.decode_expected(probabilities_BNK).numpy()
    for pair, brightness_HW in zip(pairs, brightness_BHW, strict=True):
        box = brightest_box(1 / 3 - brightness_HW)
        drawn = ~box_to_mask(box, 64)
        np.testing.assert_array_equal(pair.box_image, model.encode_masks([drawn])[0])
        assert box_of(pair, model) == pytest.approx(box)
    openings = [model.format.vocabulary.from_codes(pair.box_image).tolist() for pair in pairs]
    outputs = decode_batch(model.decoder, model.codec, requests, openings=openings)
    for pair, opening, (tokens, _), request in zip(pairs, openings, outputs, requests, strict=True):
        assert tokens[: len(opening)] == opening
        assert CAPTIONING.read_output(model.codec, request[1], tokens).caption == pair.caption
        check_text(model, [request], tokens)
    # What the model is sure of is not asked for where boxes are written code by code.
    in_turn = model.complete(requests, decoding="autoregressive")
    assert any((a.box_image != b.box_image).any() for a, b in zip(pairs, in_turn, strict=True))


@torch.inference_mode()
def test_more_examples_than_in_training_are_read_in_groups(drawing):
    """The box and the caption come from the mean of all groups. Where boxes are written code by
    code, so many examples do not fit into the positions.
    """
    model, shards = drawing
    episodes = EpisodeSet(shards, model.codec, "captioning")
    examples = tuple(pair for number in range(3) for pair in episodes[number].pairs[:-1])
    query, groups = episodes[3].query.image, len(examples) // shards.manifest.examples
    assert groups == 3
    parts = [Episode(CAPTIONING, "", examples[group::groups]) for group in range(groups)]
    (pair,) = model.complete([(Episode(CAPTIONING, "", examples), query)])
    found_BNK = decode_at_once(model.decoder, model.codec, [(part, query) for part in parts])
    brightness_HW = model.tokenizers.mask_writer.decode_expected(found_BNK.mean(0, keepdim=True))[0]
    assert box_of(pair, model) == pytest.approx(brightest_box(1 / 3 - brightness_HW.numpy()))
    opening = model.format.vocabulary.from_codes(pair.box_image).tolist()
    (written,) = decode_batch(
        model.decoder,
        model.codec,
        [(Episode(CAPTIONING, "", examples), query)],
        openings=[opening],
        together=shards.manifest.examples,
    )
    assert CAPTIONING.read_output(model.codec, query, written.tokens).caption == pair.caption
    check_text(model, [(part, query) for part in parts], written.tokens)
    model.check_examples(len(examples), CAPTIONING)
    with pytest.raises(InputError, match="more than this model can read"):
        model.check_examples(len(examples), CAPTIONING, "autoregressive")


def test_expected_pixels_are_those_of_the_mean_code_vectors(tmp_path):
    tokenizer = VQGAN.from_pretrained(toy_tokenizer.save_toy_tokenizer(tmp_path))
    generator = torch.Generator().manual_seed(0)
    codes_BN = torch.randint(0, toy_tokenizer.CODES, (2, 64), generator=generator)
    sure_BNK = torch.nn.functional.one_hot(codes_BN, toy_tokenizer.CODES).float()
    torch.testing.assert_close(
        tokenizer.decode_expected(sure_BNK), tokenizer.decode(codes_BN), atol=1e-5, rtol=1e-4
    )
    unsure_BNK = torch.rand(2, 64, toy_tokenizer.CODES, generator=generator).softmax(dim=-1)
    vectors_KC = tokenizer.quantize.embedding.weight
    grid_BChw = torch.einsum("bnk,kc->bcn", unsure_BNK, vectors_KC).unflatten(2, (8, 8))
    with torch.no_grad():
        expected = tokenizer.pixels(grid_BChw)
    torch.testing.assert_close(
        tokenizer.decode_expected(unsure_BNK), expected, atol=1e-5, rtol=1e-4
    )


def test_confidence_is_a_half_on_the_level_and_one_at_black_and_white():
    brightness_HW = np.array([[-1.2, -1.0, -0.75], [-0.5, 0.25, 1.1]], dtype=np.float32)
    written = DrawnMask(brightness_HW, at_once=True)
    assert written.level == 0.4375  # halfway between the levels of the second and the third pixel
    assert written.mask_HW.tolist() == [[False, False, False], [False, True, True]]
    np.testing.assert_allclose(
        written.confidence_HW, [[1.0, 1.0, 6 / 7], [5 / 7, 2 / 3, 1.0]], atol=1e-6
    )
    assert DrawnMask(brightness_HW).confidence_HW is None


@pytest.mark.parametrize("highest", [0.3, 0.6, 1.0])
def test_a_masks_level_gives_the_greatest_expected_iou(highest: float) -> None:
    p_HW = highest * np.random.default_rng(0).random((7, 9)) ** 3

    def expected_iou(mask_HW: np.ndarray) -> float:
        intersection = sum(p for p, inside in zip(p_HW.flat, mask_HW.flat, strict=True) if inside)
        union = sum(1.0 if m else p for p, m in zip(p_HW.flat, mask_HW.flat, strict=True))
        return intersection / union

    best = max(expected_iou(p_HW >= level) for level in p_HW.flat)
    drawn = DrawnMask((2 * p_HW - 1).astype(np.float32), at_once=True)
    assert expected_iou(drawn.mask_HW) == pytest.approx(best, rel=1e-5)
    assert drawn.score() == pytest.approx(best, rel=1e-5)
    # The best level is known in closed form, from the IoU that it reaches.
    closed = best / (1 + best)
    assert np.array_equal(drawn.mask_HW, p_HW > closed)


def test_nothing_is_marked_where_the_expected_iou_is_less_than_the_threshold() -> None:
    brightness_HW = np.full((4, 4), -0.5, np.float32)  # An IoU of 0.25, if all is marked.
    assert DrawnMask(brightness_HW, at_once=True, threshold=0.25).mask_HW.all()
    brighter_than_white_HW = np.where(np.eye(4) > 0, 1.1, brightness_HW)
    for levels_HW in (brightness_HW, brighter_than_white_HW.astype(np.float32)):
        assert not DrawnMask(levels_HW, at_once=True, threshold=0.9).mask_HW.any()


def test_the_level_of_a_large_mask_is_that_of_the_mask_before_it_was_enlarged() -> None:
    rows, columns = np.mgrid[0:64, 0:64] / 63
    brightness_HW = (2 * np.exp(-8 * ((rows - 0.4) ** 2 + (columns - 0.6) ** 2)) - 1).astype("f")
    drawn = DrawnMask(brightness_HW, at_once=True)
    assert drawn.resized(1500, 2000).level == pytest.approx(drawn.level, abs=0.01)
