"""Boxes become bins of a thousandth, are clipped to the image, and overlap like rectangles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icl_moe.boxes import (
    Box,
    bins_to_box,
    box_iou,
    box_to_bins,
    brightest_box,
    normalise_box,
)
from icl_moe.errors import InputError

bins = st.tuples(*[st.integers(0, 1000)] * 4)
fractions = st.floats(0, 1)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    x1, x2 = sorted((draw(fractions), draw(fractions)))
    y1, y2 = sorted((draw(fractions), draw(fractions)))
    return x1, y1, x2, y2


@given(bins)
def test_bins_come_back_exactly(four: tuple[int, int, int, int]) -> None:
    assert box_to_bins(bins_to_box(four)) == four


@given(boxes())
def test_a_box_moves_by_at_most_half_a_thousandth(box: Box) -> None:
    for before, after in zip(box, bins_to_box(box_to_bins(box)), strict=True):
        assert abs(before - after) <= 0.0005 + 1e-12


@pytest.mark.parametrize(
    "box",
    [(0.0, 0.0, 1.0, 1.001), (-0.1, 0.0, 1.0, 1.0), (0.0, 0.0, float("nan"), 1.0), (0.0, 0.0, 1.0)],
)
def test_what_is_no_box_in_the_unit_square_is_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="four fractions"):
        box_to_bins(box)


def test_pixels_are_normalised_by_width_and_height() -> None:
    assert normalise_box(64, 120, 128, 240, image_width=640, image_height=480) == (
        0.1,
        0.25,
        0.3,
        0.75,
    )


@given(*[st.floats(-100, 1000)] * 2, *[st.floats(0, 1000)] * 2)
def test_a_normalised_box_always_has_bins(x: float, y: float, width: float, height: float) -> None:
    box = normalise_box(x, y, width, height, image_width=640, image_height=480)
    assert len(box_to_bins(box)) == 4
    assert box[0] <= box[2]
    assert box[1] <= box[3]


def test_overlap_of_known_rectangles() -> None:
    left, right = (0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0)
    assert box_iou(left, right) == pytest.approx(1 / 3)
    assert box_iou(left, (0.5, 0.0, 1.0, 1.0)) == 0.0
    assert box_iou((0.0, 0.0, 0.2, 0.2), (0.8, 0.8, 1.0, 1.0)) == 0.0
    assert box_iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0.0


@given(boxes(), boxes())
def test_overlap_is_symmetric_and_a_fraction(a: Box, b: Box) -> None:
    assert box_iou(a, b) == pytest.approx(box_iou(b, a))
    assert 0.0 <= box_iou(a, b) <= 1.0 + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_the_brightest_box_is_that_of_the_largest_sum_of_all_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 7, 2).tolist()
    levels_HW = rng.normal(size=(height, width)) - 0.5 * seed  # Also where all are negative.
    corners = [
        (left, top, right, bottom)
        for top in range(height)
        for bottom in range(top + 1, height + 1)
        for left in range(width)
        for right in range(left + 1, width + 1)
    ]
    left, top, right, bottom = max(corners, key=lambda c: levels_HW[c[1] : c[3], c[0] : c[2]].sum())
    expected = (left / width, top / height, right / width, bottom / height)
    assert brightest_box(levels_HW) == pytest.approx(expected)
