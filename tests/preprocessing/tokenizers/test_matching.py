"""The matcher follows its formula, its threshold is fitted on the examples, and its figures equal a
plain count.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from icl_moe.evaluation.matcher import THRESHOLDS, cell_shares, match, score_pixels
from preprocessing.tokenizers.matching import (
    Photographs,
    cell_scores,
    draw_examples,
    evaluate_matcher,
    iou_curves,
)

GRID, SIZE, D = 4, 32, 5


class Centroids:
    """A minimal tokenizer for the matcher: codes are the numbers of fixed vectors."""

    def __init__(self, vectors_KD: torch.Tensor) -> None:
        self._vectors_KD = vectors_KD

    def vectors(self, codes_BN: torch.Tensor) -> torch.Tensor:
        return self._vectors_KD[codes_BN]


def photographs(seed: int, images: int = 6, noise: float = 0.2) -> Photographs:
    """Each picture shows class 0 in its left and class 1 in its right quarter; cells of a class
    have similar features.
    """
    generator = torch.Generator().manual_seed(seed)
    looks_KD = torch.eye(3, D)
    kinds_N = torch.tensor([0, 2, 2, 1]).repeat(GRID)
    features_IND = looks_KD[kinds_N].repeat(images, 1, 1)
    features_IND += noise * torch.randn(features_IND.shape, generator=generator)
    masks = torch.zeros(2 * images, SIZE, SIZE, dtype=torch.bool)
    masks[0::2, :, : SIZE // GRID], masks[1::2, :, -SIZE // GRID :] = True, True
    return Photographs(
        F.normalize(features_IND, dim=-1),
        kinds_N.repeat(images, 1),
        masks,
        np.repeat(np.arange(images), 2),
        np.tile([0, 1], images),
    )


def test_a_score_is_the_difference_of_two_cosines():
    rng = np.random.default_rng(0)
    query, examples = rng.normal(size=(16, D)), rng.normal(size=(3, 16, D))
    shares = rng.random((3, 16))
    inside = np.einsum("en,end->d", shares, examples)
    outside = examples.sum((0, 1)) - inside

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected = [cosine(cell, inside) - cosine(cell, outside) for cell in query]
    scores_N = match(*(torch.from_numpy(values) for values in (query, examples, shares)))
    np.testing.assert_allclose(scores_N.numpy(), expected, atol=1e-12)


def test_cells_take_the_share_of_their_area_and_pixels_the_bilinear_score():
    mask_HW = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask_HW[0, :4, :12] = True
    assert cell_shares(mask_HW, GRID)[0].view(GRID, GRID)[0].tolist() == [0.5, 0.25, 0.0, 0.0]
    scores = torch.arange(16.0)[None]
    pixels = score_pixels(scores, SIZE)
    assert pixels.shape == (1, SIZE, SIZE)
    assert pixels[0, 0, 0] == 0.0 and pixels[0, -1, -1] == 15.0
    assert pixels[0, 16, 3:5].mean() == pytest.approx(float(scores[0, [4, 8]].mean()), abs=0.5)


def test_curves_are_a_plain_count_of_pixels_over_each_threshold():
    queries, examples = photographs(0), photographs(1)
    drawn = draw_examples(queries, examples, 1, seed=0)
    tokenizer = Centroids(torch.eye(3, D))
    scores_RN = cell_scores(tokenizer, queries, examples, drawn, "features")
    curves_RT = iou_curves(scores_RN, queries, drawn)
    for row in (0, 3):
        (example,) = drawn[row]
        scores_N = match(
            queries.features_IND[queries.image_R[row]],
            examples.features_IND[examples.image_R[[example]]],
            cell_shares(examples.masks_RHW[[example]], GRID),
        )
        pixels_HW = score_pixels(scores_N[None], SIZE)[0].numpy()
        mask_HW = queries.masks_RHW[row].numpy()
        for column in range(0, len(THRESHOLDS), 17):
            answer_HW = pixels_HW > THRESHOLDS[column].astype(np.float32)
            expected = (answer_HW & mask_HW).sum() / (answer_HW | mask_HW).sum()
            assert curves_RT[row, column] == pytest.approx(expected)


def test_examples_are_of_the_class_and_never_of_the_querys_own_photograph():
    photos = photographs(0)
    for number, numbers in enumerate(draw_examples(photos, photos, 3, seed=0)):
        assert len(set(numbers)) == 3
        assert (photos.category_R[numbers] == photos.category_R[number]).all()
        assert (photos.image_R[numbers] != photos.image_R[number]).all()
    other = photographs(1)
    other.category_R[:] = 7
    assert all(len(numbers) == 0 for numbers in draw_examples(other, photos, 1, seed=0))


def test_the_object_that_the_examples_show_is_found_and_another_with_other_examples():
    queries, examples = photographs(0), photographs(1)
    report = evaluate_matcher(Centroids(torch.eye(3, D)), queries, examples, shots=(1, 3))
    assert report["masks"] == 12 and report["classes"] == 2
    for name in ("features_1", "features_3", "codes_1", "codes_3"):
        assert report[name]["miou"] > 0.7 and report[name]["flips"] == 1.0
        assert report[name]["miou_at_best"] >= report[name]["miou"]
    assert report["copy"] == 1.0  # here the classes are always in the same place
    assert report["whole"] == 0.25 and report["objects"] == 0.5
    assert report["retention_1"] == pytest.approx(
        report["codes_1"]["miou"] / report["features_1"]["miou"]
    )


def test_without_a_class_in_common_nothing_is_answered():
    queries, examples = photographs(0), photographs(1)
    queries.category_R[:] = 7
    report = evaluate_matcher(Centroids(torch.eye(3, D)), queries, examples, shots=(1,))
    assert report["features_1"]["miou"] == 0.0 and report["copy"] == 0.0
