from collections import Counter

import pytest

from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.errors import InputError

COUNTS = {"segmentation": 400, "captioning": 100}


def test_tasks_are_drawn_by_the_square_root_of_their_size():
    schedule = Schedule(COUNTS, global_batch=4, seed=0)
    assert schedule.probabilities == pytest.approx({"segmentation": 2 / 3, "captioning": 1 / 3})
    drawn = Counter(schedule.task(step) for step in range(9000))
    # Three standard deviations of a binomial with p = 2/3 and n = 9000.
    assert drawn["segmentation"] / 9000 == pytest.approx(2 / 3, abs=3 * (2 / 9 / 9000) ** 0.5)


def test_tasks_are_drawn_by_given_weights():
    schedule = Schedule(
        COUNTS, global_batch=4, seed=0, weights={"segmentation": 1, "captioning": 4}
    )
    assert schedule.probabilities == pytest.approx({"segmentation": 0.2, "captioning": 0.8})
    drawn = Counter(schedule.task(step) for step in range(9000))
    assert drawn["captioning"] / 9000 == pytest.approx(0.8, abs=3 * (0.16 / 9000) ** 0.5)


def test_a_task_without_a_weight_is_never_drawn_and_may_be_small():
    schedule = Schedule(COUNTS, global_batch=128, seed=0, weights={"segmentation": 0.5})
    assert {task for step in range(20) for task, _ in schedule.samples(step)} == {"segmentation"}


def test_a_global_batch_is_of_one_task():
    schedule = Schedule(COUNTS, global_batch=8, seed=1)
    for step in range(50):
        assert {task for task, _ in schedule.samples(step)} == {schedule.task(step)}


@pytest.mark.parametrize("sampling", ["unmixed", "mixed"])
def test_every_sample_comes_once_an_epoch_and_epochs_differ(sampling):
    schedule = Schedule(COUNTS, global_batch=7, seed=2, sampling=sampling)
    seen = {"segmentation": [], "captioning": []}
    for step in range(400):
        for task, index in schedule.samples(step):
            seen[task].append(index)
    if sampling == "mixed":
        pairs = [pair for step in range(80) for pair in schedule.samples(step)]
        assert sorted(pairs[:500]) == sorted(
            (task, i) for task, n in COUNTS.items() for i in range(n)
        )
        return
    for task, count in COUNTS.items():
        first, second = seen[task][:count], seen[task][count : 2 * count]
        assert sorted(first) == list(range(count)) == sorted(second)
        assert first != second


def test_order_depends_on_seed_and_step_alone():
    ordered, jumping = (Schedule(COUNTS, global_batch=4, seed=3) for _ in range(2))
    for step in range(10_000):
        ordered.task(step)
    assert [ordered.samples(step) for step in (9999, 5000, 3)] == [
        jumping.samples(step) for step in (9999, 5000, 3)
    ]
    assert ordered.samples(3) != Schedule(COUNTS, global_batch=4, seed=4).samples(3)


def test_ranks_split_every_global_batch_whatever_their_number():
    for ranks in (1, 2, 4):
        parts = [RankSlice.of(rank, ranks, global_batch=16, micro_batch=2) for rank in range(ranks)]
        taken = [
            (m * ranks + part.rank) * part.micro_batch + i
            for part in parts
            for m in range(part.micro_steps)
            for i in range(part.micro_batch)
        ]
        assert sorted(taken) == list(range(16))


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(
        InputError, match=r"100 captioning samples, fewer than training\.global_batch \(128\)"
    ):
        Schedule(COUNTS, global_batch=128, seed=0)
    with pytest.raises(
        InputError,
        match=(
            r"training\.task_weights names captioning, of which data\.shards has no samples; it "
            r"has segmentation"
        ),
    ):
        Schedule({"segmentation": 400}, global_batch=4, seed=0, weights={"captioning": 1})
    with pytest.raises(
        InputError,
        match=r"must be a multiple of training\.micro_batch x data-parallel ranks \(2 x 3\)",
    ):
        RankSlice.of(0, 3, global_batch=16, micro_batch=2)
