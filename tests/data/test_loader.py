"""What the ranks read together does not depend on the number of ranks and readers, and readers need
little memory.
"""

import multiprocessing
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from damage import overwrite

from benchmarks.random_shards import write_shards
from icl_moe.batch import TokenBatch
from icl_moe.data.loader import MicroBatches, micro_batches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.errors import SampleError
from icl_moe.sequence import SequenceFormat
from icl_moe.vocabulary import Vocabulary

GLOBAL_BATCH, STEPS, INPUT_WEIGHT = 8, 6, 0.5


def read(
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    sampling: str = "unmixed",
    start: int = 0,
    **options: object,
) -> list[TokenBatch]:
    shards, part = ShardSet(folder), RankSlice.of(rank, ranks, GLOBAL_BATCH, 2)
    schedule = Schedule(shards.manifest.samples, GLOBAL_BATCH, seed=3, sampling=sampling)
    dataset = MicroBatches(shards, schedule, part, "packed", INPUT_WEIGHT, **options)
    return list(micro_batches(dataset, part.micro_steps, start, STEPS, workers))


def global_batches(
    folder: Path, ranks: int, workers: int, sampling: str, **options: object
) -> list[list[tuple]]:
    """For each step, all samples that the ranks read: name, tokens and loss weight, ordered by
    name.
    """
    micro_steps = GLOBAL_BATCH // (2 * ranks)
    steps: list[list[tuple]] = [[] for _ in range(STEPS)]
    for rank in range(ranks):
        for number, batch in enumerate(read(folder, rank, ranks, workers, sampling, **options)):
            ends = np.cumsum(batch.lengths)
            tokens = np.split(batch.tokens_T.numpy(), ends[:-1])
            steps[number // micro_steps] += [
                (name, part.tobytes()) for name, part in zip(batch.sources, tokens, strict=True)
            ]
    return [sorted(step) for step in steps]


@pytest.mark.parametrize("sampling", ["unmixed", "mixed"])
def test_global_batches_are_equal_for_any_number_of_ranks_and_readers(folder, sampling):
    expected = global_batches(folder, ranks=1, workers=0, sampling=sampling)
    assert [len(step) for step in expected] == [GLOBAL_BATCH] * STEPS
    for ranks, workers in ((1, 3), (2, 0), (2, 1), (4, 2)):
        assert global_batches(folder, ranks, workers, sampling) == expected, (ranks, workers)


@pytest.mark.parametrize("loss_on", ["all", "query"])
@pytest.mark.parametrize("sampling", ["unmixed", "mixed"])
def test_the_mean_losses_of_inputs_and_outputs_are_weighed_against_each_other(
    folder, sampling, loss_on
):
    """The loss of a step, worked out from its targets, where each is read as a loss of its own."""
    options = {"sampling": sampling, "loss_on": loss_on}
    plain = read(folder, input_loss="tokens", **options)
    found = read(folder, input_loss="mean", **options)
    micro_steps = GLOBAL_BATCH // 2
    for start in range(0, len(found), micro_steps):
        both = [batches[start : start + micro_steps] for batches in (plain, found)]
        (of_tokens, weights), (same, weighed) = (
            [
                torch.cat([getattr(batch, name) for batch in batches]).double()
                for name in ("labels_P", "weights_P")
            ]
            for batches in both
        )
        assert torch.equal(of_tokens, same)
        losses = of_tokens.cos()
        is_input = weights == INPUT_WEIGHT
        expected = losses[~is_input].mean() + INPUT_WEIGHT * losses[is_input].mean()
        scale = both[1][0].loss_scale / micro_steps
        assert (losses * weighed).sum() * scale == pytest.approx(float(expected), rel=1e-6)


@pytest.fixture(params=["forkserver", "spawn"])
def start_method(request) -> Iterator[str]:
    """The start method of readers in the test; forkserver is the default since Python 3.14."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_readers_may_be_started_in_any_way_even_under_a_signal_to_the_whole_job(
    folder, start_method
):
    """These readers receive the data set pickled, even if this process has already read from it."""
    shards, part = ShardSet(folder), RankSlice.of(0, 1, GLOBAL_BATCH, 2)
    schedule = Schedule(shards.manifest.samples, GLOBAL_BATCH, seed=3)
    dataset = MicroBatches(shards, schedule, part, "packed", 0.0)
    here = [dataset[index] for index in range(2 * part.micro_steps)]
    earlier = set(psutil.Process().children(recursive=True))
    batches = micro_batches(dataset, part.micro_steps, 0, 2, workers=1)
    started = set(psutil.Process().children(recursive=True)) - earlier
    # The signal must not come from this process, since a reader ends when its own rank tells it to.
    subprocess.run(
        ["sh", "-c", f"kill -TERM {' '.join(str(process.pid) for process in started)}"], check=True
    )
    for ours, theirs in zip(here, batches, strict=True):
        assert ours.sources == theirs.sources
        assert torch.equal(ours.tokens_T, theirs.tokens_T)


def test_a_run_that_goes_on_reads_what_it_would_have_read(folder):
    whole, rest = read(folder), read(folder, workers=1, start=4)
    assert [batch.sources for batch in rest] == [batch.sources for batch in whole[4 * 4 :]]


@pytest.fixture(scope="module")
def with_mask(tmp_path_factory) -> Path:
    """Shards of random episodes with [MASK] in their vocabulary, two examples each."""
    folder = tmp_path_factory.mktemp("with_mask") / "shards"
    vocabulary = Vocabulary(text_merges=1000, image_codes=64, mask=True)
    write_shards(folder, SequenceFormat(vocabulary, codes_per_image=64), 40, 40, examples=2)
    return folder


@pytest.mark.parametrize("sampling", ["unmixed", "mixed"])
def test_what_corruption_hides_does_not_depend_on_ranks_and_readers(with_mask, sampling):
    options = {"sampling": sampling, "mask_corruption": True}
    expected = global_batches(with_mask, ranks=1, workers=0, **options)
    assert expected != global_batches(with_mask, ranks=1, workers=0, sampling=sampling)
    for ranks, workers in ((1, 1), (2, 0), (4, 1)):
        assert global_batches(with_mask, ranks, workers, **options) == expected, (ranks, workers)


def test_corruption_hides_boxes_that_are_drawn_before_a_caption(tmp_path):
    """The codes of the query's drawn box are hidden like the codes of masks; no text is hidden."""
    vocabulary = Vocabulary(text_merges=1000, image_codes=64, mask=True)
    format = SequenceFormat(vocabulary, codes_per_image=64, box="image")
    write_shards(tmp_path / "drawn", format, 40, 40, examples=2)
    shards = ShardSet(tmp_path / "drawn")
    schedule, part = Schedule(shards.manifest.samples, 40, seed=3), RankSlice.of(0, 1, 40, 40)
    plain, hiding = (
        MicroBatches(shards, schedule, part, "packed", 0.0, mask_corruption=hides)
        for hides in (False, True)
    )
    start = 2 * format.pair_length + 1 + 64 + 1  # The query's image, and both markers.
    shares = []
    for step in range(3):
        before, after = plain[step], hiding[step]
        assert torch.equal(before.labels_P, after.labels_P)
        changed = before.tokens_T != after.tokens_T
        drawn = (before.positions_T >= start) & (before.positions_T < start + 64)
        assert (after.tokens_T[changed] == vocabulary.mask_token).all()
        assert not changed[~drawn].any()
        shares += changed[drawn].view(40, 64).float().mean(dim=1).tolist()
    assert min(shares) == 0 and max(shares) == 1


def test_corruption_hides_codes_of_the_querys_mask_and_nothing_else(with_mask):
    """A quarter of all episodes is unchanged, a quarter completely hidden; the targets are the same
    as without corruption.
    """
    shards = ShardSet(with_mask)
    schedule = Schedule(shards.manifest.samples, 40, seed=3)
    part = RankSlice.of(0, 1, 40, 40)
    plain, hiding = (
        MicroBatches(shards, schedule, part, "packed", 0.0, mask_corruption=hides)
        for hides in (False, True)
    )
    rates = []
    for step in range(30):
        before, after = plain[step], hiding[step]
        assert torch.equal(before.labels_P, after.labels_P)
        assert torch.equal(before.predictors_P, after.predictors_P)
        changed = before.tokens_T != after.tokens_T
        assert (after.tokens_T[changed] == shards.manifest.format.vocabulary.mask_token).all()
        if schedule.task(step) == "captioning":
            assert not changed.any()
            continue
        rows = changed.unflatten(0, (40, -1))
        assert not rows[:, : 2 * 131 + 66].any(), "examples, the query's image or its marker"
        assert not rows[:, -1].any(), "the mask's [EOC]"
        rates += rows[:, -65:-1].float().mean(dim=1).tolist()
    rates = np.array(rates)
    assert len(rates) > 400
    assert np.mean(rates == 0) == pytest.approx(0.25, abs=0.06)
    assert np.mean(rates == 1) == pytest.approx(0.25, abs=0.06)
    between = rates[(rates > 0) & (rates < 1)]
    assert np.histogram(between, 4, (0, 1))[0] / len(between) == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("sampling", ["unmixed", "mixed"])
@pytest.mark.parametrize("loss_on", ["all", "query"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_scaled_by_the_batches_are_means_over_the_global_batch(
    folder, ranks, loss_on, sampling
):
    """The engine averages over ranks and micro-steps; with the scale, every target of a global
    batch has the same weight.
    """
    by_rank = [
        read(folder, rank, ranks, sampling=sampling, loss_on=loss_on) for rank in range(ranks)
    ]
    micro_steps = GLOBAL_BATCH // (2 * ranks)
    for step in range(STEPS):
        batches = [
            batch
            for batches in by_rank
            for batch in batches[step * micro_steps : (step + 1) * micro_steps]
        ]
        mean = sum(float(batch.weights_P.sum()) * batch.loss_scale for batch in batches) / len(
            batches
        )
        assert mean == pytest.approx(1.0)


def test_a_batch_from_a_reader_is_the_batch(folder):
    for mine, theirs in zip(read(folder), read(folder, workers=1), strict=True):
        assert (mine.lengths, mine.loss_scale, mine.task, mine.sources) == (
            theirs.lengths,
            theirs.loss_scale,
            theirs.task,
            theirs.sources,
        )
        assert (mine.routing.classes, mine.routing.segments) == (
            theirs.routing.classes,
            theirs.routing.segments,
        )
        assert torch.equal(mine.routing.shares_BC, theirs.routing.shares_BC)
        for name in (
            "tokens_T",
            "positions_T",
            "predictors_P",
            "labels_P",
            "weights_P",
            "visual_P",
            "links_T2",
        ):
            one, other = getattr(mine, name), getattr(theirs, name)
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name


def test_a_reader_says_in_one_sentence_which_sample_it_cannot_read(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for task in ("segmentation", "captioning"):
        for index in range(25):
            overwrite(copy, task, index, "tokens", lambda raw: bytes(len(raw)))
    others = set(multiprocessing.active_children())
    with pytest.raises(
        SampleError,
        match=(
            r"^\S+\.tar: sample \w+-\d{8} cannot be read: its checksum differs from the "
            r"index\.$"
        ),
    ) as error:
        read(copy, workers=1)
    assert set(multiprocessing.active_children()) == others, f"a reader outlives {error.value}"


def begun(folder: Path) -> tuple[Generator[TokenBatch], set[BaseProcess]]:
    """Micro-batches of which the first one has been read, and the two readers that read ahead."""
    shards, part = ShardSet(folder), RankSlice.of(0, 1, GLOBAL_BATCH, 2)
    dataset = MicroBatches(
        shards, Schedule(shards.manifest.samples, GLOBAL_BATCH, 0), part, "packed", 0.0
    )
    others = set(multiprocessing.active_children())
    batches = micro_batches(dataset, part.micro_steps, 0, 1000, workers=2)
    next(batches)
    readers = set(multiprocessing.active_children()) - others
    assert len(readers) == 2
    return batches, readers


def test_a_rank_that_terminates_its_readers_does_not_wait_for_them(folder):
    """A program that ends in an error terminates its children in this way."""
    batches, readers = begun(folder)
    for reader in readers:
        reader.terminate()
    for reader in readers:
        reader.join(5)
    assert [reader.exitcode for reader in readers] == [0, 0]
    batches.close()


MEASURE = """
import sys
from icl_moe.data.loader import MicroBatches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet

def peak():
    status = open("/proc/self/status")
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

before = peak()
shards = ShardSet(sys.argv[1])
part = RankSlice.of(0, 1, 8, 8)
batches = MicroBatches(shards, Schedule(shards.manifest.samples, 8, 0), part, "packed", 0.0)
for step in range(100):
    batches[step]
print(peak() - before)
"""


def test_a_reader_holds_little_memory_however_large_the_shards_are(tmp_path):
    format = SequenceFormat(Vocabulary(text_merges=100), codes_per_image=64)
    manifest = write_shards(
        tmp_path / "shards", format, samples=200, shard_size=200, mask_bytes=200_000
    )
    assert max(shard.bytes for shard in manifest.shards) > 150e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "shards"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 64


READERS = """
import multiprocessing, sys
from icl_moe.data.loader import MicroBatches, micro_batches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet

shards, part = ShardSet(sys.argv[1]), RankSlice.of(0, 1, 8, 2)
dataset = MicroBatches(shards, Schedule(shards.manifest.samples, 8, 0), part, "packed", 0.0)
batches = micro_batches(dataset, part.micro_steps, 0, 1000, workers=2)
print(*(reader.pid for reader in multiprocessing.active_children()), flush=True)
for line in sys.stdin:
    for _ in range(20):
        next(batches)
    print("read", flush=True)
"""


def test_readers_outlive_every_signal_but_the_death_of_their_rank(folder):
    with subprocess.Popen(
        [sys.executable, "-c", READERS, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as rank:
        assert rank.stdin is not None and rank.stdout is not None
        readers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        assert len(readers) == 2
        rank.stdin.write("read until the readers have begun\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "read\n"
        for reader in readers:
            reader.send_signal(signal.SIGINT)
            reader.send_signal(signal.SIGTERM)
        rank.stdin.write("go on\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "read\n"
        rank.kill()
        assert psutil.wait_procs(readers, timeout=3)[1] == []


def test_readers_end_when_the_batches_are_closed(folder):
    batches, readers = begun(folder)
    batches.close()
    assert not any(reader.is_alive() for reader in readers)
