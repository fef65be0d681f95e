"""Outlines of masks that follow the edges of their image, against the definition of the guided
filter.
"""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from icl_moe.inference.edges import EdgeFilter, follow_edges
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tasks.mask_scores import mask_iou


def by_the_definition(brightness_HW, colours_HW3, radius: int, epsilon: float) -> np.ndarray:
    """The guided filter window by window: least squares with a penalty of n epsilon |a|^2 for a
    window of n pixels, and for each pixel the mean of the lines of all windows that contain it.
    """
    side = len(brightness_HW)
    total_HW4, count_HW1 = np.zeros((side, side, 4)), np.zeros((side, side, 1))
    for y in range(side):
        for x in range(side):
            rows = slice(max(0, y - radius), y + radius + 1)
            columns = slice(max(0, x - radius), x + radius + 1)
            colours_N3 = colours_HW3[rows, columns].reshape(-1, 3)
            brightness_N = brightness_HW[rows, columns].ravel()
            penalty = np.sqrt(len(brightness_N) * epsilon) * np.eye(3, 4)
            known = np.vstack([np.column_stack([colours_N3, np.ones(len(colours_N3))]), penalty])
            wanted = np.concatenate([brightness_N, np.zeros(3)])
            line_4, *_ = np.linalg.lstsq(known, wanted, rcond=None)
            total_HW4[rows, columns] += line_4
            count_HW1[rows, columns] += 1
    line_HW4 = total_HW4 / count_HW1
    return (line_HW4[..., :3] * colours_HW3).sum(axis=-1) + line_HW4[..., 3]


@pytest.mark.parametrize(("radius", "epsilon"), [(1, 1e-3), (3, 1e-2), (16, 1e-4)])
def test_the_filter_is_the_published_one(radius, epsilon):
    random = np.random.default_rng(0)
    levels_HW3 = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    brightness_HW = random.uniform(-0.9, 0.9, (16, 16)).astype(np.float32)
    drawn = DrawnMask(brightness_HW, at_once=True)
    edges = EdgeFilter(radius / 16, epsilon)
    found_HW = follow_edges(drawn, Image.fromarray(levels_HW3), edges).brightness_HW
    wanted_HW = by_the_definition(brightness_HW, levels_HW3 / 255, radius, epsilon)
    assert found_HW.dtype == np.float32
    np.testing.assert_allclose(found_HW, wanted_HW.clip(-0.9998, 0.9998), atol=1e-5)


def test_the_logistic_curve_acts_on_the_log_odds():
    levels_HW3 = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    drawn = DrawnMask(np.linspace(-0.9, 0.9, 256, dtype=np.float32).reshape(16, 16), at_once=True)
    picture, plain = Image.fromarray(levels_HW3), EdgeFilter(0.2, 1e-3)
    before_HW = (follow_edges(drawn, picture, plain).brightness_HW.astype(np.float64) + 1) / 2
    curved = follow_edges(drawn, picture, replace(plain, slope=2.0, offset=0.5))
    log_odds_HW = 2.0 * np.log(before_HW / (1 - before_HW)) + 0.5
    np.testing.assert_allclose(
        (curved.brightness_HW + 1) / 2, 1 / (1 + np.exp(-log_odds_HW)), atol=1e-4
    )


def disc(side: int, squared_radius: float = 0.08) -> np.ndarray:
    y, x = np.mgrid[:side, :side] / side
    return (x - 0.52) ** 2 + (y - 0.45) ** 2 < squared_radius


def picture_of_a_disc(side: int) -> Image.Image:
    ground, object = np.array([60, 120, 60]), np.array([220, 90, 40])
    levels_HW3 = np.where(disc(side)[..., None], object, ground)
    noise = np.random.default_rng(0).integers(-8, 9, levels_HW3.shape)
    return Image.fromarray((levels_HW3 + noise).astype(np.uint8))


def drawn_in_cells(side: int, cell: int) -> DrawnMask:
    """A disc as a model draws it that decides cell by cell: each has its share of the disc."""
    shares = disc(side).reshape(side // cell, cell, -1, cell).mean(axis=(1, 3))
    brightness_HW = np.kron(2 * shares - 1, np.ones((cell, cell)))
    return DrawnMask(brightness_HW.astype(np.float32), at_once=True)


@pytest.mark.parametrize("size", [(64, 64), (300, 300), (400, 200)])
def test_a_mask_of_coarse_cells_gets_the_outline_of_the_object(size):
    drawn, picture = drawn_in_cells(64, cell=8), picture_of_a_disc(300).resize(size)
    true_HW = np.asarray(Image.fromarray(disc(300)).resize(size))
    width, height = size
    coarse = mask_iou(drawn.resized(height, width).mask_HW, true_HW)
    found = follow_edges(drawn, picture, EdgeFilter(1 / 8, 1e-3))
    assert found.brightness_HW.shape == (height, width)
    assert coarse < 0.92 and mask_iou(found.mask_HW, true_HW) > 0.98


def test_noise_of_a_large_image_leaves_no_holes():
    drawn, picture = drawn_in_cells(64, cell=8), picture_of_a_disc(300)
    levels_HW3 = np.array(picture)
    rows, columns = np.random.default_rng(0).integers(0, 300, (2, 500))
    levels_HW3[rows, columns] = 255 - levels_HW3[rows, columns]
    found = follow_edges(drawn, Image.fromarray(levels_HW3), EdgeFilter(1 / 8, 1e-3))
    assert mask_iou(found.mask_HW, disc(300)) > 0.98
    assert np.mean(~found.mask_HW[disc(300, 0.06)]) < 1e-3


def test_a_picture_without_edges_leaves_the_mask_where_it_is():
    drawn = drawn_in_cells(64, cell=8)
    found = follow_edges(drawn, Image.new("RGB", (64, 64), "grey"), EdgeFilter(1 / 16, 1e-3))
    assert mask_iou(found.mask_HW, drawn.mask_HW) > 0.8


def test_what_the_model_takes_to_be_absent_stays_so():
    drawn = replace(drawn_in_cells(64, cell=8), threshold=0.95)
    assert not drawn.mask_HW.any()
    found = follow_edges(drawn, picture_of_a_disc(64), EdgeFilter(1 / 8, 1e-3))
    assert not found.mask_HW.any()
    np.testing.assert_array_equal(found.brightness_HW, drawn.brightness_HW)


def test_a_mask_that_was_decoded_code_by_code_is_only_resized():
    drawn = replace(drawn_in_cells(64, cell=8), at_once=False, log_probability=-0.5)
    found = follow_edges(drawn, picture_of_a_disc(128), EdgeFilter(1 / 8, 1e-3))
    np.testing.assert_array_equal(found.brightness_HW, drawn.resized(128, 128).brightness_HW)
    assert found.score() == drawn.score()
