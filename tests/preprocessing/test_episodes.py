"""Episodes are drawn as a pure function of pool, seed and number; crops show the object."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_builds import regions_of_classes

from icl_moe.tasks.semantic_segmentation import ClassesTarget
from preprocessing.crops import square_crop
from preprocessing.episodes import plan_episodes
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.region_table import RegionTable


def make_pool(images_of: dict[str, list[int]]) -> Pool:
    """Regions of each class on the images with these numbers."""
    regions = []
    for category, images in images_of.items():
        for number in images:
            file = ImageFile(Path(f"{number}.jpg"), f"{number}.jpg", 10, 10)
            regions.append(PoolRegion(file, category, (len(regions),), (0, 0, 10, 10), 0.5, None))
    return Pool("segmentation", regions)


POOL = make_pool({"cat": [1, 1, 1, 2, 3, 4, 5], "dog": list(range(1, 30)), "bird": [7, 8, 9, 10]})


def test_an_episode_is_of_one_class_and_of_different_images():
    for row in plan_episodes(POOL, examples=3, samples=200, seed=5):
        regions = [POOL.regions[number] for number in row]
        assert len({region.category for region in regions}) == 1
        assert len({region.image.name for region in regions}) == 4


def test_each_region_is_the_query_once_in_each_pass():
    episodes = plan_episodes(POOL, examples=1, samples=2 * len(POOL.regions), seed=0)
    first, second = np.split(episodes[:, -1], 2)
    everything = np.arange(len(POOL.regions))
    np.testing.assert_array_equal(np.sort(first), everything)
    np.testing.assert_array_equal(np.sort(second), everything)
    assert (first != second).any()
    np.testing.assert_array_equal(
        plan_episodes(POOL, examples=1, samples=None, seed=0), episodes[: len(everything)]
    )


def test_an_episode_depends_on_seed_and_number_only():
    many, few = (plan_episodes(POOL, examples=2, samples=count, seed=3) for count in (60, 20))
    np.testing.assert_array_equal(many[:20], few)
    assert (plan_episodes(POOL, examples=2, samples=20, seed=4) != few).any()


def test_examples_are_drawn_uniformly_from_the_class():
    pool = make_pool({"dog": list(range(5))})
    drawn = Counter(plan_episodes(pool, examples=1, samples=4000, seed=0)[:, 0].tolist())
    assert all(700 < drawn[number] < 900 for number in range(5))


@pytest.mark.parametrize(("balance", "share"), [(0.5, 2 / 3), (1.0, 0.5)])
def test_a_balance_asks_for_rare_classes_more_often(balance, share):
    """By regions^(1 - balance): 400 dogs and 100 cats are 0.8 and 0.2 of the pool."""
    pool = make_pool({"dog": list(range(400)), "cat": list(range(400, 500))})
    queries = plan_episodes(pool, examples=1, samples=3000, seed=0, balance=balance)[:, -1]
    assert np.mean(queries < 400) == pytest.approx(share, abs=0.03)
    assert len(np.unique(queries)) > 450
    again = plan_episodes(pool, examples=1, samples=30, seed=0, balance=balance)[:, -1]
    np.testing.assert_array_equal(again, queries[:30])


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_regions_in_a_table_give_the_same_episodes(balance):
    """However the table numbers the classes, of which there are several in a mask here."""
    target = ClassesTarget((("cat", b"04"), ("dog", b"4")), ("red", "blue"))
    pool = replace(POOL, regions=[replace(region, target=target) for region in POOL.regions])
    bird = [region for region in pool.regions if region.category == "bird"]
    table = RegionTable.of([*bird, *pool.regions]).select(np.arange(len(pool.regions)) + len(bird))
    assert table == pool.regions
    options = {"examples": 2, "samples": 200, "seed": 1, "balance": balance}
    np.testing.assert_array_equal(
        plan_episodes(replace(pool, regions=table), **options), plan_episodes(pool, **options)
    )


def test_classes_seen_in_too_few_images_are_left_out_and_counted():
    pool = make_pool({"cat": [1, 1, 1, 2], "dog": [1, 2, 3]})
    pool.drop_small_classes(images=3)
    assert list(regions_of_classes(pool)) == ["dog"]
    assert pool.skipped["classes_with_too_few_images"] == 1


@given(
    width=st.integers(8, 700),
    height=st.integers(8, 700),
    place=st.tuples(*[st.floats(0, 1)] * 4),
    scale=st.sampled_from(["any", "large"]),
)
def test_a_crop_is_a_square_within_the_image_that_holds_what_it_can(width, height, place, scale):
    x1, x2 = sorted((place[0] * width, place[2] * width))
    y1, y2 = sorted((place[1] * height, place[3] * height))
    rect = (x1, y1, x2 - x1, y2 - y1)
    left, top, right, bottom = square_crop(scale, rect, rect, width, height, image_size=64)
    side = right - left
    assert side == bottom - top > 0
    assert left >= 0
    assert top >= 0
    assert right <= width
    assert bottom <= height
    for start, stop, low, high in ((x1, x2, left, right), (y1, y2, top, bottom)):
        seen = max(0.0, min(stop, high) - max(start, low))
        assert seen >= min(stop - start, side) - 1.0, (
            "the object fits into or fills the crop, up to rounding to whole pixels"
        )


def test_a_large_crop_is_close_around_the_largest_instance():
    everything, largest = (0, 0, 600, 400), (300, 200, 100, 60)
    assert square_crop("large", everything, largest, 640, 480, image_size=64) == (
        275,
        155,
        425,
        305,
    )
    assert square_crop("any", everything, largest, 640, 480, image_size=64) == (60, 0, 540, 480)
    tiny = square_crop("large", everything, (300, 200, 2, 2), 640, 480, image_size=256)
    assert tiny[2] - tiny[0] == pytest.approx(128)


def test_examples_and_queries_of_two_data_sets_keep_their_places():
    queries = make_pool({"cat": [1, 2], "dog": [1, 3], "emu": [4]}).regions
    examples = make_pool({"cat": [11, 12, 13], "dog": [11], "fox": [12, 13]}).regions
    regions = [
        *(replace(region, role="query") for region in queries),
        *(replace(region, role="example") for region in examples),
    ]
    pool = Pool("segmentation", regions)
    pool.drop_small_classes(images=3)
    assert set(regions_of_classes(pool)) == {"cat"}
    assert pool.skipped["classes_with_too_few_images"] == 3
    episodes = plan_episodes(pool, examples=2, samples=None, seed=0)
    assert sorted(pool.regions[row[-1]].image.name for row in episodes) == ["1.jpg", "2.jpg"]
    for row in episodes:
        assert all(pool.regions[number].role == "example" for number in row[:-1])
