"""Mask scores compared with plain loops over pixels and with cases computed by hand."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from icl_moe.bootstrap import DRAWS, SEED
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.tasks.constant_masks import fitted_disc
from icl_moe.tasks.mask_scores import MaskPair, Standard, mask_iou, score_masks

MASKS = arrays.arrays(bool, (3, 4))
TRIPLES = st.lists(
    st.tuples(st.sampled_from(["cat", "dog", "bus"]), MASKS, MASKS), min_size=1, max_size=6
)


def by_loops(triples) -> tuple[float, float, float]:
    """mIoU, mean IoU and MAE, pixel by pixel. The mIoU is over the classes that have something to
    mark, or over all where none has.
    """
    marked = [name for name, _, true in triples if any(true.flat)]
    total = {name: [0, 0] for name, _, _ in triples}
    ious, errors = [], []
    for name, predicted, true in triples:
        both = either = wrong = 0
        for p, t in zip(predicted.flat, true.flat, strict=True):
            both += p and t
            either += p or t
            wrong += p != t
        total[name][0] += both
        total[name][1] += either
        ious.append(both / either if either else 1.0)
        errors.append(wrong / predicted.size)
    classes = [
        both / either if either else 1.0
        for name, (both, either) in total.items()
        if name in marked or not marked
    ]
    return sum(classes) / len(classes), sum(ious) / len(ious), sum(errors) / len(errors)


NOTHING, SOMETHING = np.zeros((3, 4), bool), np.eye(3, 4, dtype=bool)


@given(TRIPLES)
@example([("cat", NOTHING, SOMETHING), ("dog", NOTHING, NOTHING), ("bus", SOMETHING, NOTHING)])
@example([("cat", NOTHING, NOTHING), ("dog", SOMETHING, NOTHING)])
@settings(max_examples=60)
def test_scores_equal_plain_loops(triples):
    scores = score_masks(triples)
    assert (scores.miou, scores.mean_iou, scores.mae) == pytest.approx(by_loops(triples))
    assert scores.episodes == len(triples) == sum(scores.class_episodes.values())


FOLDED = st.lists(
    st.tuples(st.sampled_from(["0cat", "0dog", "1bus", "1car", "3bed"]), MASKS, MASKS),
    min_size=1,
    max_size=8,
)


@given(FOLDED)
@settings(max_examples=25)
def test_the_miou_of_a_benchmark_equals_its_authors_buffers(triples):
    """As HSNet's AverageMeter: pixels of intersections and unions are added up class by class, and
    the mean is over the classes of a fold, then over folds.
    """
    folds = tuple(int(name[0]) for name, _, _ in triples)
    scores = score_masks(triples, standard=Standard("coco20i", folds))
    of_folds = {}
    for fold in sorted(set(folds)):
        inter, union = {}, {}
        for name, predicted, true in triples:
            if int(name[0]) == fold:
                area_inter = sum(p and t for p, t in zip(predicted.flat, true.flat, strict=True))
                area = sum(predicted.flat) + sum(true.flat) - area_inter
                inter[name] = inter.get(name, 0) + area_inter
                union[name] = union.get(name, 0) + area
        of_folds[str(fold)] = sum(inter[n] / max(union[n], 1) for n in inter) / len(inter)
    assert scores.fold_miou == pytest.approx(of_folds)
    assert scores.standard_miou == pytest.approx(sum(of_folds.values()) / len(of_folds))
    assert sum(scores.fold_episodes.values()) == len(triples)
    fb_ious = []
    for fold in sorted(set(folds)):
        areas = np.zeros((2, 2))  # Of background and foreground, intersection and union.
        for name, predicted, true in triples:
            if int(name[0]) == fold:
                for level in (False, True):
                    p, t = predicted == level, true == level
                    areas[int(level)] += np.sum(p & t), np.sum(p | t)
        fb_ious.append(np.mean(areas[:, 0] / np.maximum(areas[:, 1], 1)))
    assert scores.standard_fb_iou == pytest.approx(np.mean(fb_ious))


def test_a_class_counts_once_and_its_large_objects_count_more():
    """Dog: 8 of 8 pixels and 0 of 2, so 8/10 together; cat: 1 of 2. The mean over episodes
    differs.
    """
    big, small, half = np.zeros((3, 4), bool), np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    big[:2], small[2, :2], half[2, :1] = True, True, True
    scores = score_masks([("dog", big, big), ("dog", ~small & False, small), ("cat", half, small)])
    assert scores.class_iou == {"cat": 0.5, "dog": 0.8}
    assert scores.miou == pytest.approx(0.65)
    assert scores.mean_iou == pytest.approx((1 + 0 + 0.5) / 3)
    assert scores.mae == pytest.approx((0 + 2 + 1) / 12 / 3)


def test_sizes_are_shares_of_the_picture():
    """Of 100 pixels: 2 are small, 3 and 19 are medium, 20 and all are large."""
    small, least, most, large, whole = (
        np.arange(100).reshape(10, 10) < pixels for pixels in (2, 3, 19, 20, 100)
    )
    wrong = np.zeros((10, 10), bool)
    pairs = [(wrong, small), (least, least), (wrong, most), (large, large), (wrong, whole)]
    scores = score_masks(("cat", predicted, true) for predicted, true in pairs)
    assert scores.size_episodes == {"under 3 %": 1, "3 to 20 %": 2, "over 20 %": 2}
    assert scores.size_iou == {"under 3 %": 0.0, "3 to 20 %": 0.5, "over 20 %": 0.5}


def test_queries_without_a_pixel_do_not_move_the_intervals():
    """150 classes of one query with an IoU of 1/4, each beside some absent ones that are right."""
    true, predicted, nothing = np.eye(4, dtype=bool), np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    predicted[0, 0] = True
    for absent in (0, 1, 2):
        pairs = [
            (f"c{number}", *masks)
            for number in range(150)
            for masks in [(predicted, true), *[(nothing, nothing)] * absent]
        ]
        scores = score_masks(pairs, with_intervals=True)
        assert scores.miou == 0.25 and scores.intervals["miou"] == (0.25, 0.25)
        for low, high in scores.class_intervals.values():
            assert (low, high) == (0.25, 0.25)
    (empty,) = [score_masks([("cat", nothing, nothing)] * 2, with_intervals=True)]
    assert empty.miou == 1.0 and empty.intervals["miou"] == (1.0, 1.0)


def test_a_class_of_absent_queries_alone_is_not_in_the_mean():
    true, nothing = np.eye(4, dtype=bool), np.zeros((4, 4), bool)
    pairs = [("cat", nothing, true), ("dog", nothing, nothing), ("owl", true, nothing)]
    scores = score_masks(pairs, with_intervals=True)
    assert scores.miou == 0.0 and scores.intervals["miou"] == (0.0, 0.0)
    assert scores.class_iou == {"cat": 0.0, "dog": 1.0, "owl": 0.0}


def test_absent_objects_are_a_size_of_their_own_whose_score_is_the_share_left_unmarked():
    nothing, something = np.zeros((10, 10), bool), np.eye(10, dtype=bool)
    pairs = [(nothing, nothing), (something, nothing), (nothing, nothing), (something, something)]
    scores = score_masks(("cat", predicted, true) for predicted, true in pairs)
    assert scores.size_episodes == {"nothing to mark": 3, "3 to 20 %": 1}
    assert scores.size_iou == {"nothing to mark": pytest.approx(2 / 3), "3 to 20 %": 1.0}


@given(TRIPLES, MASKS)
@settings(max_examples=25)
def test_ignored_pixels_count_in_no_score(triples, ignored):
    """Scores are the same as if pictures consisted only of the other pixels."""
    if ignored.all():
        return
    cut = [(name, predicted[~ignored], true[~ignored]) for name, predicted, true in triples]
    found = score_masks(
        (MaskPair(*triple, ignored) for triple in triples), standard=Standard("s", (0,) * len(cut))
    )
    expected = score_masks(cut, standard=Standard("s", (0,) * len(cut)))
    for name in ("miou", "mean_iou", "mae", "standard_miou", "standard_fb_iou"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))


def test_empty_masks_agree():
    empty = np.zeros((2, 2), bool)
    assert mask_iou(empty, empty) == 1.0
    assert mask_iou(empty, ~empty) == 0.0


@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=50)
def test_run_lengths_read_back(mask):
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)


def test_intervals_are_those_of_scores_of_plain_draws():
    rng = np.random.default_rng(3)
    triples = [
        (str(rng.choice(["cat", "dog", "bus"])), *(rng.random((2, 4, 4)) < 0.5)) for _ in range(7)
    ]
    draws = np.random.default_rng(SEED)
    scores = [score_masks([triples[n] for n in draws.integers(7, size=7)]) for _ in range(DRAWS)]

    def middle(values) -> tuple[float, float]:
        return tuple(np.percentile(values, [2.5, 97.5]).tolist())

    found = score_masks(triples, with_intervals=True, standard=Standard("one", (0,) * 7))
    assert found.intervals["standard_miou"] == pytest.approx(found.intervals["miou"])
    whole = found.class_episodes

    def miou_of(draw) -> float:
        """A class weighs as much as the share of its queries that was drawn."""
        weights = {name: count / whole[name] for name, count in draw.class_episodes.items()}
        ious = sum(weights[name] * draw.class_iou[name] for name in weights)
        return ious / sum(weights.values())

    assert found.intervals["miou"] == pytest.approx(middle([miou_of(draw) for draw in scores]))
    for name in ("mean_iou", "mae"):
        assert found.intervals[name] == pytest.approx(middle([getattr(s, name) for s in scores]))
    several = {name for name, count in whole.items() if count > 1}
    assert found.class_intervals.keys() == several < found.class_iou.keys()
    for name, interval in found.class_intervals.items():
        drawn = [s.class_iou[name] for s in scores if name in s.class_iou]
        assert interval == pytest.approx(middle(drawn))
    assert found.size_intervals.keys() == found.size_iou.keys()
    for name, interval in found.size_intervals.items():
        drawn = [s.size_iou[name] for s in scores if name in s.size_iou]
        assert interval == pytest.approx(middle(drawn))
    assert found.intervals["miou"][0] <= found.miou <= found.intervals["miou"][1]


def test_the_interval_of_the_miou_of_classes_of_one_query_is_that_of_the_mean_iou():
    """The two are the same number, and a draw without a class is no evidence about the others."""
    rng = np.random.default_rng(5)
    triples = [(str(number), *(rng.random((2, 4, 4)) < 0.5)) for number in range(20)]
    found = score_masks(triples, with_intervals=True, standard=Standard("one", (0,) * 20))
    assert found.miou == pytest.approx(found.mean_iou)
    for name in ("miou", "standard_miou"):
        assert found.intervals[name] == pytest.approx(found.intervals["mean_iou"])
    assert not found.class_intervals


def test_intervals_are_over_queries_whose_masks_are_drawn_together():
    """Queries that have each of their masks twice have the intervals of those with one: the second
    mask tells nothing new.
    """
    rng = np.random.default_rng(4)
    triples = [(str(rng.choice(["cat", "dog"])), *(rng.random((2, 4, 4)) < 0.5)) for _ in range(9)]
    alone = score_masks(triples, with_intervals=True)
    twice = [triple for triple in triples for _ in range(2)]
    queries = [number for number in range(9) for _ in range(2)]
    together = score_masks(twice, with_intervals=True, queries=queries)
    for name in ("intervals", "class_intervals", "size_intervals"):
        found, expected = getattr(together, name), getattr(alone, name)
        assert found.keys() == expected.keys()
        for key, interval in expected.items():
            assert found[key] == pytest.approx(interval)
    apart = score_masks(twice, with_intervals=True)
    assert np.ptp(apart.intervals["mean_iou"]) < 0.9 * np.ptp(alone.intervals["mean_iou"])


def test_a_disc_in_the_middle_is_fitted_to_masks_of_any_class():
    rows, columns = np.mgrid[:40, :40] - 19.5
    circle = rows**2 + columns**2 <= 12**2
    square = np.zeros((40, 40), bool)
    square[8:32, 8:32] = True
    found = fitted_disc([("cat", circle)] * 3 + [("dog", square)])
    assert mask_iou(found, circle) == 1.0
    assert not np.array_equal(fitted_disc([("cat", ~circle)]), found)
    assert fitted_disc([("cat", circle)] * 5000).shape == (40, 40)
