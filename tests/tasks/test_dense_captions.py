"""The mean average precision of dense captioning against a slow implementation that takes each
threshold by itself, and against cases computed by hand. tests/real_data has real texts.
"""

from fractions import Fraction
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icl_moe.tasks.caption_scores import score_captions
from icl_moe.tasks.dense_captions import Detection, Region, match, mean_average_precision

METEOR = {"": 0.0, "a dog": 1.0, "a cat": 0.25, "a red bus": 0.12, "grass": 0.05, "nothing": 0.0}
"""A stand-in for METEOR, which depends on the text alone; some values equal a threshold."""

SIDES = st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0])
BOXES = st.tuples(SIDES, SIDES, SIDES, SIDES).map(
    lambda s: (min(s[0], s[2]), min(s[1], s[3]), max(s[0], s[2]), max(s[1], s[3]))
)
TEXTS = st.sampled_from(sorted(METEOR))
IMAGES = st.sampled_from(["1.jpg", "2.jpg", "3.jpg"])
REGIONS = st.lists(st.builds(Region, IMAGES, BOXES, st.tuples(st.just("a dog"))), max_size=6)
DETECTIONS = st.lists(
    st.builds(
        Detection, IMAGES, st.none() | BOXES, TEXTS, st.sampled_from([0.0, -1.5, 0.25, 0.5, 2.0])
    ),
    max_size=8,
)


def score(detections, regions) -> float:
    matched = match(detections, regions)
    return mean_average_precision(matched, [METEOR[each.text] for each in matched.matches])


def overlap(a, b) -> Fraction:
    """Intersection over union of two boxes, exactly."""
    a, b = ([Fraction(side).limit_denominator(10**6) for side in box] for box in (a, b))
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - width * height
    return width * height / either if either else Fraction(0)


def merged(boxes) -> list[tuple]:
    """Again and again, the box that most of those left overlap takes them."""
    left, found = sorted(boxes), []
    while left:
        groups = [[b for b in left if b is a or overlap(a, b) >= Fraction(7, 10)] for a in left]
        group = max(groups, key=len)
        left = [box for box in left if not any(box is taken for taken in group)]
        found.append(tuple(sum(side) / len(group) for side in zip(*group, strict=True)))
    return found


def slowly(detections, regions) -> float:
    """The definition, from scratch for every pair of thresholds, recall and confidence."""
    images = {each.image for each in (*detections, *regions)}
    truth = {i: merged([tuple(r.box) for r in regions if r.image == i]) for i in images}
    wanted = sum(map(len, truth.values()))
    total = []
    for least in (3, 4, 5, 6, 7):
        for more_than in (0, 0.05, 0.1, 0.15, 0.2, 0.25):
            right = []
            for image in images:
                boxes, taken = truth[image], set()
                mine = [d for d in detections if d.image == image]
                ious = {id(d): [overlap(d.box, b) if d.box else 0 for b in boxes] for d in mine}
                for d in sorted(
                    mine, key=lambda d: (-d.confidence, -max(ious[id(d)], default=0), d.text)
                ):
                    best = max(ious[id(d)], default=0)
                    place = ious[id(d)].index(best) if best else None
                    if place is None or place in taken:
                        continue
                    taken.add(place)
                    if best >= Fraction(least, 10) and METEOR[d.text] > more_than:
                        right.append(d.confidence)
            precisions = []
            for recall in range(101):
                best = Fraction(0)
                for confidence in {d.confidence for d in detections}:
                    count = sum(d.confidence >= confidence for d in detections)
                    hits = sum(r >= confidence for r in right)
                    if wanted and Fraction(hits, wanted) >= Fraction(recall, 100):
                        best = max(best, Fraction(hits, count))
                precisions.append(best)
            total.append(sum(precisions) / 101)
    return float(sum(total) / len(total))


@example(  # An IoU of exactly a threshold, which is less than that in floating point.
    [Detection("2.jpg", (0.0, 0.2, 0.8, 0.6), "a cat", 0.0)],
    [Region("2.jpg", (0.0, 0.0, 0.4, 0.6), ("a dog",))],
    Random(0),
)
@given(DETECTIONS, REGIONS, st.randoms())
@settings(max_examples=50)
def test_the_score_equals_the_slow_one_in_any_order(detections, regions, random):
    expected = slowly(detections, regions)
    assert score(detections, regions) == pytest.approx(expected, abs=1e-12)
    random.shuffle(detections)
    random.shuffle(regions)
    assert score(detections, regions) == pytest.approx(expected, abs=1e-12)


BOX, OTHER = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
TWO = [Region("1.jpg", BOX, ("a dog",)), Region("1.jpg", OTHER, ("a dog",))]


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([], 0),
        ([Detection("1.jpg", None, "a dog")], 0),
        ([Detection("1.jpg", BOX, "")], 0),
        ([Detection("2.jpg", BOX, "a dog")], 0),
        ([Detection("1.jpg", BOX, "a dog"), Detection("1.jpg", OTHER, "a dog")], 1),
        # One of two regions: a precision of 1 at the recalls 0 to 0.50.
        ([Detection("1.jpg", BOX, "a dog")], 51 / 101),
        # The second detection of a region is wrong, whatever its confidence.
        ([Detection("1.jpg", BOX, "a dog"), Detection("1.jpg", BOX, "a dog")], 51 / 101 / 2),
        ([Detection("1.jpg", BOX, "a dog", 1), Detection("1.jpg", BOX, "a dog")], 51 / 101),
        # A METEOR of 0.25 exceeds five of the six thresholds.
        ([Detection("1.jpg", BOX, "a cat")], 51 / 101 * 5 / 6),
    ],
)
def test_small_cases(detections, expected):
    assert score(detections, TWO) == pytest.approx(expected)


def test_regions_that_overlap_are_one_with_the_descriptions_of_all():
    near = (0.0, 0.0, 0.5, 0.48)
    regions = [*TWO, Region("1.jpg", near, ("a hound", "a puppy"))]
    matched = match([Detection("1.jpg", BOX, "a dog")], regions)
    assert matched.regions == 2
    (found,) = matched.matches
    assert sorted(found.references) == ["a dog", "a hound", "a puppy"]
    assert found.overlap == pytest.approx(0.49 / 0.5)


def test_regions_with_an_iou_of_exactly_the_threshold_are_one():
    """In floating point it is a little less than 0.7."""
    regions = [
        Region("1.jpg", (0.0, 0.5, 0.6, 1.0), ("a dog",)),
        Region("1.jpg", (0.0, 0.5, 0.6, 0.85), ("a hound",)),
    ]
    assert match([], regions).regions == 1


def test_without_java_it_says_why(no_java):
    (scores,) = score_captions([{"1": "a dog"}], {"1": ["a dog"]}, matched=[match([], TWO)])
    assert (scores.mean_ap, scores.mean_ap_note) == (None, no_java)
    assert f"mAP was {no_java}." in scores.notes()
