"""Sessions: examples that are read once, for one query or many, of one class or several."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from icl_moe import InContextModel
from icl_moe.errors import InputError
from icl_moe.images import to_square_pixels
from icl_moe.inference.decode import Sampling
from icl_moe.inference.edges import follow_edges
from icl_moe.inference.retrieval import describe
from icl_moe.inference.session import Query
from icl_moe.sequence import Episode
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.drawn_mask import DrawnClasses, DrawnMask
from icl_moe.tasks.segmentation import SegmentationPair
from preprocessing.synthetic import draw_scene

SIZES = [(160, 128), (100, 140), (64, 64), (300, 200), (128, 128)]


@pytest.fixture(scope="module")
def model() -> InContextModel:
    """The shipped one, which has learned to segment, so that its masks depend on the examples."""
    return InContextModel.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def scenes() -> list:
    rng = np.random.default_rng(5)
    return [draw_scene(rng, size) for size in SIZES]


def example(scene):
    """The scene, and the mask of its nearest object."""
    return scene.image, scene.objects[-1].mask_HW


def one_request(model, example, query):
    """A request to complete `query` after one example, which has the model's size already."""
    image, mask_HW = example
    codes = model.encode([to_square_pixels(picture, 64) for picture in (image, query)])
    (mask_codes,) = model.encode_masks([mask_HW])
    return Episode(SEGMENTATION, "", (SegmentationPair(codes[0], mask_codes),)), codes[1]


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive", "mirrored"])
def test_a_session_equals_one_call_for_each_query(model, scenes, decoding):
    scene, queries = scenes[4], [scenes[number].image for number in (1, 2)]
    session = model.session([example(scene)])
    masks = session.segment(queries, decoding=decoding, batch=2)
    for query, mask_HW in zip(queries, masks, strict=True):
        assert mask_HW.dtype == np.bool_ and mask_HW.shape == query.size[::-1]
        alone_HW = model.segment([example(scene)], query, decoding=decoding)
        np.testing.assert_array_equal(mask_HW, alone_HW)
    other = model.draw_mask([example(scenes[2])], queries[0], decoding=decoding)
    own = session.draw(queries[0], decoding=decoding)
    assert own.score() != other.score(), "the mask depends on the example"


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive", "mirrored"])
@torch.inference_mode()
def test_a_session_equals_the_whole_sequence_read_at_a_time(model, scenes, decoding):
    """The whole sequence is read without the keys and values that a session keeps."""
    query = scenes[4].image
    request = one_request(model, example(scenes[2]), query)
    (whole,) = SEGMENTATION.draw(model, model.complete([request], decoding=decoding))
    whole = follow_edges(whole, query, model.edges)
    drawn = model.session([example(scenes[2])]).draw(query, decoding=decoding)
    np.testing.assert_allclose(drawn.brightness_HW, whole.brightness_HW, atol=1e-3)
    assert np.mean(drawn.mask_HW != whole.mask_HW) < 1e-3


def test_without_edges_masks_are_as_coarse_as_the_model_draws_them(scenes):
    model = InContextModel.from_pretrained("demo", device="cpu")
    examples, query = [example(scenes[2])], scenes[2].image
    along = model.draw_mask(examples, query)
    model.edges = None
    (pair,) = model.complete([one_request(model, examples[0], query)])
    (as_drawn,) = SEGMENTATION.draw(model, [pair])
    coarse = model.draw_mask(examples, query)
    np.testing.assert_allclose(coarse.brightness_HW, as_drawn.brightness_HW, atol=1e-4)
    assert np.abs(along.brightness_HW - coarse.brightness_HW).max() > 0.1


def test_the_edges_of_a_large_image_are_followed_at_a_bounded_size(model, scenes):
    large = scenes[4].image.resize((2600, 1300))
    query = Query.load(large, model.image_size)
    assert query.guide.size == (1024, 512) and query.size == (2600, 1300)
    drawn = model.draw_mask([example(scenes[2])], large)
    assert drawn.mask_HW.shape == (1300, 2600)


@pytest.mark.parametrize("options", [{}, {"windows": True}, {"shifts": True}])
def test_an_image_of_one_line_has_a_mask_of_one_line(model, scenes, options):
    line = np.zeros((1, 2400, 3), np.uint8)
    assert Query.load(line, model.image_size).guide.size == (1024, 1)
    found_HW = model.segment([example(scenes[2])], line, **options)
    assert found_HW.shape == (1, 2400)


def test_a_mask_comes_with_the_models_confidence(model, scenes):
    session = model.session([example(scenes[0])])
    query = scenes[4].image
    drawn = session.draw(query)
    assert drawn.confidence_HW.shape == drawn.mask_HW.shape == query.size[::-1]
    assert drawn.confidence_HW.min() >= 0.5 and drawn.confidence_HW.max() <= 1
    p_HW, mask_HW = np.clip((drawn.brightness_HW + 1) / 2, 0, 1), drawn.mask_HW
    assert mask_HW.any()
    expected = p_HW[mask_HW].sum() / (mask_HW.sum() + p_HW[~mask_HW].sum())
    assert drawn.score() == pytest.approx(expected, rel=1e-4)
    left_HW = mask_HW & (np.arange(mask_HW.shape[1]) < np.nonzero(mask_HW)[1].mean())
    parts = (left_HW, mask_HW & ~left_HW)
    in_parts = [drawn.score_of_part(part, mask_HW) * part.sum() for part in parts]
    assert sum(in_parts) == pytest.approx(drawn.score() * mask_HW.sum(), rel=1e-4)
    in_turn = session.draw(query, decoding="autoregressive")
    assert in_turn.confidence_HW is None
    assert 0 < in_turn.score() < 1


def test_the_confidence_of_an_empty_mask_is_that_of_its_most_doubtful_pixel():
    brightness_HW = np.full((2, 3), -1.0, np.float32)
    assert DrawnMask(brightness_HW, at_once=True).score() == 1.0
    brightness_HW[1, 2] = -0.5  # a quarter of the way from black to white
    drawn = DrawnMask(brightness_HW, at_once=True, threshold=0.5)
    assert not drawn.mask_HW.any() and drawn.expected_iou == 0.25
    assert drawn.score() == pytest.approx(0.875)


def test_queries_are_taken_as_they_are_needed(model, scenes):
    taken = []

    def queries():
        for number in range(100):
            taken.append(number)
            yield scenes[number % len(scenes)].image

    masks = model.session([example(scenes[0])]).segment(queries(), batch=4)
    assert not taken
    assert next(masks).shape == SIZES[0][::-1] and len(taken) == 4
    assert next(masks).shape == SIZES[1][::-1] and len(taken) == 4
    masks.close()


def test_several_classes_share_the_encoding_of_a_query(model, scenes, monkeypatch):
    examples = {"one": [example(scenes[0])], "another": [example(scenes[1])]}
    session = model.session(examples)
    encoded = []
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    )
    queries = [scenes[2].image, scenes[3].image, scenes[4].image]
    found = session.draw(queries, batch=4)
    assert encoded == [2, 1], "two queries of two classes each make a batch of four"
    assert session.classes == ("one", "another")
    for number, classes in enumerate(found):
        assert classes.names == ("one", "another")
        for name, pairs in examples.items():
            alone = model.session(pairs).draw(queries[number])
            np.testing.assert_array_equal(classes.masks[name].mask_HW, alone.mask_HW)
        assert classes.labels_HW.dtype == np.uint8
        np.testing.assert_array_equal(
            classes.labels_HW > 0, np.any([m.mask_HW for m in classes.masks.values()], axis=0)
        )
        np.testing.assert_array_equal(session.segment(queries[number]), classes.labels_HW)


def test_a_pixel_of_several_masks_gets_the_class_of_the_greatest_confidence():
    first_HW = np.array([[0.2, 0.9, -1.0, 0.5]], np.float32)
    second_HW = np.array([[0.9, 0.2, -1.0, 0.5]], np.float32)
    at_once = DrawnClasses({"a": DrawnMask(first_HW, True), "b": DrawnMask(second_HW, True)})
    assert at_once.labels_HW.tolist() == [[2, 1, 0, 1]]
    in_turn = DrawnClasses(
        {
            "a": DrawnMask(first_HW, log_probability=-2.0),
            "b": DrawnMask(second_HW, log_probability=-1.0),
        }
    )
    assert in_turn.labels_HW.tolist() == [[2, 2, 0, 2]]
    many = DrawnClasses({str(n): DrawnMask(second_HW, True) for n in range(300)})
    assert many.labels_HW.dtype == np.uint16


def test_the_nearest_examples_are_those_whose_images_are_most_alike(model, scenes):
    """There may be more of them than the model can read."""
    examples = [example(scene) for scene in scenes]
    session = model.session(examples, nearest=1)
    queries = [scene.image for scene in scenes]
    for number, mask_HW in enumerate(session.segment(queries)):
        alone_HW = model.segment([examples[number]], queries[number])
        np.testing.assert_array_equal(mask_HW, alone_HW)
    with pytest.raises(InputError, match=r"5 examples are more than this model can read.*nearest"):
        model.session(examples).segment(queries[0], decoding="autoregressive")


class Watched(torch.Tensor):
    """Knows how many numbers the largest tensor had that came from it."""

    largest = 0

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        result = super().__torch_function__(function, types, arguments, options or {})
        if isinstance(result, torch.Tensor):
            cls.largest = max(cls.largest, result.numel())
        return result


def test_many_examples_are_described_in_the_memory_of_a_few():
    rng = np.random.default_rng(0)
    vectors_KC = torch.from_numpy(rng.random((8, 5), dtype=np.float32)).as_subclass(Watched)
    features = SimpleNamespace(device="cpu", vectors=lambda codes: vectors_KC[codes])
    tokenizers = SimpleNamespace(features=features)
    codes_BN = rng.integers(0, 8, (500, 64))
    points_BD = describe(tokenizers, codes_BN)
    assert Watched.largest <= 16 * 64 * 5
    for place in (0, 250, 499):
        alone_D = vectors_KC.numpy()[codes_BN[place]].mean(axis=0)
        np.testing.assert_allclose(points_BD[place], alone_D / np.linalg.norm(alone_D), rtol=1e-5)


def test_windows_read_again_what_was_found(model, scenes):
    """Each pixel has the mean brightness of all readings that contain it."""
    session, query = model.session([example(scenes[4])]), scenes[4].image
    whole = session.draw(query)
    found = session.draw(query, windows=True)
    boxes = [(x, y, x + 64, y + 64) for y in (0, 32, 64) for x in (0, 32, 64)]
    boxes = [box for box in boxes if np.asarray(whole.mask_HW)[cut(box)].mean() >= 0.01]
    assert found.windows == len(boxes) > 0 == whole.windows
    total_HW, count_HW = whole.brightness_HW.copy(), np.ones((128, 128))
    for box in boxes:
        total_HW[cut(box)] += session.draw(query.crop(box)).brightness_HW
        count_HW[cut(box)] += 1
    np.testing.assert_allclose(found.brightness_HW, total_HW / count_HW, atol=1e-4)
    assert (found.mask_HW != whole.mask_HW).any()
    one_shot = model.segment([example(scenes[4])], query, windows=True)
    np.testing.assert_array_equal(one_shot, found.mask_HW)
    empty = scenes[0].image  # Nothing of it is found: there are no windows.
    np.testing.assert_array_equal(
        *(session.draw(empty, windows=each).brightness_HW for each in (False, True))
    )
    by_class = model.session({"a": [example(scenes[4])], "b": [example(scenes[1])]})
    labels = by_class.segment([query, empty], windows=True)
    assert [each.shape for each in labels] == [(128, 128), (128, 160)] and labels[0].any()


def test_with_windows_each_query_draws_its_own_samples(model, scenes):
    session, query = model.session([example(scenes[4])]), scenes[4].image
    sampling = Sampling(temperature=1.0, seed=3)
    first, second = session.draw([query, query], sampling, windows=True)
    (alone,) = session.draw([query], sampling, windows=True)
    np.testing.assert_array_equal(first.brightness_HW, alone.brightness_HW)
    assert (first.brightness_HW != second.brightness_HW).any()


def cut(box: tuple[int, int, int, int]) -> tuple[slice, slice]:
    left, top, right, bottom = box
    return slice(top, bottom), slice(left, right)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, e: m.session([]), "needs at least one example"),
        (lambda m, e: m.session({}), "at least one class"),
        (lambda m, e: m.session({"": [e]}), "names that are text"),
        (lambda m, e: m.session({"dog": [e], "cat": []}), "The class 'cat' has no examples"),
        (lambda m, e: m.session({"cat": [e]}, category="cat"), "leave category out"),
        (lambda m, e: m.session([e], nearest=0), "nearest must be a whole number of at least 1"),
        (lambda m, e: m.session([e]).segment(e[0], batch=0), "batch must be a whole number"),
        (lambda m, e: m.session([e]).segment(e[0], "x"), "sampling must be a Sampling, not 'x'"),
        (lambda m, e: m.session([e]).segment(7), "The query must be a path, .* not int"),
        (lambda m, e: m.session([e]).segment([e[0], b"x"]), "Query 2 must be a path"),
        (lambda m, e: m.session([e]).caption(e[0]), "have masks; captioning needs regions"),
        (lambda m, e: m.session({"cat": [(e[0], e[1][:-1])]}), "The mask of example 1 of cat is"),
        (lambda m, e: m.session([(e[0], e[1] & False)]), "The mask of example 1 marks nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(model, scenes, use, message):
    with pytest.raises(InputError, match=message):
        use(model, example(scenes[0]))


def test_a_mirrored_mask_is_the_mean_of_the_image_and_its_mirror_image(model, scenes):
    image, mask_HW = example(scenes[2])  # It has the model's size already.
    example_codes, query_codes = model.encode(
        [to_square_pixels(square, 64) for square in (image, scenes[4].image)]
    )
    (mask,) = model.encode_masks([mask_HW])
    written_HW = model.decode_masks(mask[None])[0].numpy() > 0
    (mirrored_mask,) = model.encode_masks([np.ascontiguousarray(written_HW[:, ::-1])])

    def brightness(example_N: np.ndarray, mask_N: np.ndarray, query_N: np.ndarray) -> np.ndarray:
        episode = Episode(SEGMENTATION, "", (SegmentationPair(example_N, mask_N),))
        (pair,) = model.complete([(episode, query_N)], decoding="parallel")
        return pair.drawn.brightness_HW

    def mirror(codes_N: np.ndarray) -> np.ndarray:
        return codes_N.reshape(8, 8)[:, ::-1].ravel()

    there = brightness(example_codes, mask, query_codes)
    back = brightness(mirror(example_codes), mirrored_mask, mirror(query_codes))[:, ::-1]
    assert not np.allclose(there, back, atol=0.1)
    episode = Episode(SEGMENTATION, "", (SegmentationPair(example_codes, mask),))
    (pair,) = model.complete([(episode, query_codes)])
    np.testing.assert_allclose(pair.drawn.brightness_HW, (there + back) / 2, atol=1e-5)
    (again,) = model.complete([(episode, query_codes)], read=[model.read_examples(episode)])
    np.testing.assert_allclose(again.drawn.brightness_HW, (there + back) / 2, atol=1e-5)


@pytest.mark.parametrize("query", [torch.zeros(3, 8, 8), {"image": "1.png"}, io.BytesIO(b"1")])
def test_what_is_neither_an_image_nor_several_is_refused_at_once(model, scenes, query):
    session = model.session([example(scenes[0])])
    with pytest.raises(InputError, match="The query must be a path, a Pillow image or a NumPy"):
        session.segment(query)
