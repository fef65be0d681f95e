"""Faults injected into real runs of two ranks: what is lost, what is reported, and how the next
start resumes.
"""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import arguments, two_ranks, wait_for
from small_run import FAULTY, REPOSITORY, losses


def test_after_a_killed_rank_all_end_and_the_next_start_repeats_nothing_else(
    train, undisturbed, tmp_path
):
    started = time.monotonic()
    printed = train(
        tmp_path,
        "training.steps=6",
        "training.save_every=2",
        script=FAULTY,
        FAULT="kill:1:4",
        expect=None,
    )
    # This includes the start; the launcher ends the other ranks within a second or two.
    assert time.monotonic() - started < 90
    assert "step 3/6" in printed
    assert "icl-moe: rank 0 has lost the connection to another rank and ends (" in printed
    assert "Traceback" not in printed
    train(tmp_path, "training.steps=6", "training.save_every=2")
    for name, rows in losses(undisturbed).items():
        again = losses(tmp_path)[name]
        # Step 3 was logged before the fault; everything after the checkpoint of step 2 repeats.
        assert again[3:] == rows[2:], name


@pytest.mark.slow
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before_whole(
    train, undisturbed, tmp_path
):
    train(
        tmp_path,
        "training.steps=6",
        "training.save_every=2",
        script=FAULTY,
        FAULT="kill-in-save:0:4",
        expect=None,
    )
    assert (tmp_path / "checkpoints/step-00000004").is_dir()
    assert not (tmp_path / "checkpoints/step-00000004/complete.json").exists()
    train(tmp_path, "training.steps=6", "training.save_every=2")
    assert losses(tmp_path)["image_loss"][4:] == losses(undisturbed)["image_loss"][2:]


def test_a_terminated_rank_makes_all_save_and_end_well(train, undisturbed, tmp_path):
    printed = train(tmp_path, "training.steps=6", script=FAULTY, FAULT="terminate:1:3")
    assert "stopped by a signal after step 3" in printed
    train(tmp_path, "training.steps=6")
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_named_and_its_step_left_out(train, tmp_path):
    printed = train(tmp_path / "run", "training.steps=4", script=FAULTY, FAULT="nan:1:2")
    assert "step 2: the loss is not finite on rank 1 in " in printed
    assert ".tar:" in printed
    assert "step 2 is skipped, its loss is not finite (1 of at most 5)" in printed
    assert "step 4/4" in printed
    assert "nan" not in json.dumps(losses(tmp_path / "run")["image_loss"][2:])


@pytest.mark.slow
def test_too_many_losses_that_are_not_finite_end_the_run_cleanly(train, tmp_path):
    printed = train(
        tmp_path / "run",
        "training.steps=4",
        "training.skipped_steps=0",
        script=FAULTY,
        FAULT="nan:1:2",
        expect=2,
    )
    assert "training.skipped_steps: 1 step(s) were skipped, the last of them step 2" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param("overwrite", "its checksum differs from the index", marks=pytest.mark.slow),
        ("truncate", "it is cut off; the shard is truncated"),
    ],
)
def test_a_shard_that_turns_corrupt_in_a_run_is_named_with_the_sample(
    train, shards, tmp_path, fault, reason
):
    """The rank that reads it reports it in one sentence, even though it is not rank 0, and the
    whole run ends.
    """
    copy = shutil.copytree(shards, tmp_path / "shards", ignore=shutil.ignore_patterns("synthetic"))
    settings = (f"data.shards={copy}", "training.steps=60")
    printed = train(
        tmp_path / "run",
        *settings,
        script=FAULTY,
        FAULT=f"{fault}:1:2",
        FAULT_SHARDS=str(copy),
        expect=None,
    )
    assert "step 2/60" in printed
    assert "step 60/60" not in printed
    messages = [
        line
        for line in printed.splitlines()
        if line.startswith("icl-moe: ") and "cannot be read" in line
    ]
    assert messages, printed
    for line in messages:
        assert re.fullmatch(
            rf"icl-moe: {copy}/(\w+)-\d{{6}}\.tar: sample \1-\d{{8}} cannot be read: {reason}\.",
            line,
        )
    assert "Traceback" not in printed


def test_a_rank_that_hangs_is_named_with_its_step(train, tmp_path):
    printed = train(
        tmp_path / "run",
        "training.steps=6",
        "training.hang_seconds=8",
        script=FAULTY,
        FAULT="hang:1:3",
        expect=1,
    )
    assert "rank 1 hangs at step 3, computing; no progress for 8 s" in printed


@pytest.mark.slow
def test_a_rank_that_hangs_before_its_first_beat_is_named(shards, tmp_path):
    command = arguments(
        shards, tmp_path / "run", "training.dry_run=false", "training.hang_seconds=4"
    )
    with two_ranks(tmp_path, Path(FAULTY[0]), *command, FAULT="hang-before:1:0") as ranks:
        assert [rank.wait() for rank in ranks] == [1, 1]
    assert (
        printed(tmp_path).count(
            "rank 1 hangs before the first step; no progress for 4 s, so the run ends."
        )
        == 1
    )
    assert "Traceback" not in printed(tmp_path)


@pytest.mark.parametrize(
    ("fault", "to_rank_0"),
    [
        pytest.param("slow:0:2", signal.SIGSTOP, marks=pytest.mark.slow),
        ("hang:1:2", signal.SIGKILL),
    ],
)
def test_a_hang_ends_though_rank_0_does_not_answer(shards, tmp_path, fault, to_rank_0):
    """Rank 0 holds the store that records which rank hangs."""
    command = arguments(shards, tmp_path / "run", "training.hang_seconds=4")
    with two_ranks(tmp_path, Path(FAULTY[0]), *command, FAULT=fault) as (main, other):
        wait_for(lambda: "the fault begins" in printed(tmp_path), lambda: printed(tmp_path))
        main.send_signal(to_rank_0)
        assert other.wait(timeout=120) == 1
    messages = (tmp_path / "rank-1.log").read_text()
    assert "rank 1 hangs at step 2, " in messages
    assert (
        ", and rank 0, which holds the store of all ranks, does not answer; no progress for 4 s"
        in messages
    )


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_fault_that_one_rank_finds_is_said_once(shards, undisturbed, tmp_path, rank):
    shutil.copytree(undisturbed, tmp_path / "run")
    damaged = tmp_path / f"run/checkpoints/step-00000006/exp_avg-0000{rank}.safetensors"
    damaged.write_bytes(b"?" * damaged.stat().st_size)
    command = arguments(shards, tmp_path / "run", "training.steps=8")
    with two_ranks(tmp_path, REPOSITORY / "launch_scripts/pretrain.sh", *command) as ranks:
        codes = [process.wait() for process in ranks]
    messages = [line for line in printed(tmp_path).splitlines() if line.startswith("icl-moe: ")]
    assert codes[rank] == 2
    assert sum(f"The checkpoint file {damaged} cannot be read (" in line for line in messages) == 1
    assert "Traceback" not in printed(tmp_path)


def printed(folder: Path) -> str:
    """The output of two ranks without a launcher."""
    return "".join((folder / f"rank-{rank}.log").read_text() for rank in (0, 1))


@pytest.mark.slow
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(train, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    damaged = tmp_path / "run/checkpoints/step-00000006/exp_avg-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    printed = train(tmp_path / "run", "training.steps=6", "training.save_every=2")
    assert (
        "step-00000006 is damaged: its file exp_avg-00000.safetensors has 1000 bytes of" in printed
    )
    assert "step-00000004 is used" in printed
    assert losses(tmp_path / "run")["image_loss"][6:] == losses(undisturbed)["image_loss"][4:]


def test_a_run_whose_last_step_cannot_be_saved_says_what_is_lost_and_fails(train, small_disk):
    with small_disk(4) as disk:
        printed = train(disk / "run", "training.steps=4", "training.save_every=2", expect=1)
        assert printed.count("no checkpoint is saved in") == 2
        assert "step 4/4" in printed
        assert not list((disk / "run/checkpoints").glob("step-*"))
    (last,) = (line for line in printed.splitlines() if "is lost" in line)
    assert last == (
        "icl-moe: training.output: the run ended after step 4, of which no checkpoint could be "
        "saved, for the reason above, so all that it computed is lost; once "
        f"{disk / 'run'} can be written, the same command starts from the beginning."
    )
    assert "Traceback" not in printed
