"""Checkpoints that cannot be saved, and which of the saved ones are kept."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from training import training_on_ranks
from training.training_on_ranks import disk_filled, terminated

PLAIN = ("data.workers=0", "training.dry_run=false", "training.save_every=2", "training.steps=6")


@pytest.fixture(scope="module")
def run(rank_group, shards):
    """Trains on two ranks. Returns the output of each."""
    return training_on_ranks.on_two_ranks(rank_group, shards, PLAIN)


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory) -> tuple[Path, list[str]]:
    """A complete run that kept all its checkpoints, and the final state of each rank."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return output, [rank["state"] for rank in run(output, "training.keep_checkpoints=9")]


def steps(output: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-")) for path in (output / "checkpoints").iterdir()
    )


def test_a_run_that_is_stopped_but_cannot_be_saved_does_not_claim_to_go_on_from_there(
    run, small_disk
):
    with small_disk(4) as disk:
        ranks = run(disk / "run", "training.save_every=9", fault=partial(terminated, 3))
    for rank in ranks:
        assert rank["ended"].startswith("training.output: the run ended after step 3, of which no")
        assert "all that it computed is lost" in rank["ended"]
    assert "resumes from there" not in ranks[0]["printed"]
    assert "no checkpoint is saved in" in ranks[0]["said"]


def test_a_disk_that_fills_up_costs_the_steps_after_the_last_checkpoint_and_no_more(
    run, undisturbed, small_disk
):
    """Even with a completely full disk, other files that cannot be written do not end the run."""
    watched = ("training.gradient_report_every=1", "engine=demo")
    with small_disk(24) as disk:
        output, filler = disk / "run", disk / "filler"
        ranks = run(output, *watched, fault=partial(disk_filled, 3, filler))
        assert [rank["ended"] for rank in ranks] == [
            "training.output: the run ended after step 6, of which no checkpoint could be saved, "
            "for the reason above, so what it computed after step 2 is lost; once "
            f"{output} can be written, the same command resumes from there."
        ] * 2
        assert "No space left on device" in ranks[0]["printed"]
        assert "step 6/6" in ranks[0]["printed"]
        assert steps(output) == [2]
        filler.unlink()
        assert [rank["state"] for rank in run(output, *watched)] == undisturbed[1]
        assert steps(output) == [4, 6]


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(run, undisturbed, tmp_path):
    output = shutil.copytree(undisturbed[0], tmp_path / "run")
    damaged = output / "checkpoints/step-00000006/exp_avg-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    shutil.copytree(output / "checkpoints/step-00000004", output / "checkpoints/step-00000004.mine")
    ranks = run(output, "training.keep_checkpoints=1", "training.stop_after=5")
    assert "step-00000006 is damaged" in ranks[0]["said"]
    (output / "checkpoints/step-00000004.mine").rename(tmp_path / "mine")
    assert steps(output) == [5, 6]
    ranks = run(output, "training.keep_checkpoints=1")
    assert "step 6/6" in ranks[0]["printed"] and "step 5/6" not in ranks[0]["printed"]
    assert [rank["state"] for rank in ranks] == undisturbed[1]
    assert steps(output) == [6]


def test_damaged_checkpoints_are_not_kept_in_the_place_of_whole_ones(run, undisturbed, tmp_path):
    output = shutil.copytree(undisturbed[0], tmp_path / "run")
    (output / "checkpoints/step-00000004/index.json").unlink()
    (output / "checkpoints/step-00000006/index.json").unlink()
    run(output, "training.keep_checkpoints=2", "training.stop_after=5", "training.save_every=9")
    assert steps(output) == [2, 5, 6]


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}'])
def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_anew_in_silence(
    run, undisturbed, tmp_path, content
):
    output = tmp_path / "run"
    folder = shutil.copytree(
        undisturbed[0] / "checkpoints/step-00000002", output / "checkpoints/step-00000002"
    )
    (folder / "complete.json").write_text(content)
    ranks = run(output)
    assert [rank["ended"] for rank in ranks] == [
        f"The checkpoint {folder} is damaged: its file complete.json is not valid; "
        "remove it to start from the beginning, or restore the file."
    ] * 2
    assert (folder / "index.json").is_file()
