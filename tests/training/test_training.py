"""Training as a user starts it, on small real shards: results, resuming, exports and refusals."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from processes import arguments, session, wait_for
from safetensors.torch import load_file
from small_run import SETTINGS, losses
from training import training_on_ranks

from icl_moe.cli import main
from icl_moe.data.loader import MicroBatches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.inference.model import InContextModel


@pytest.fixture(scope="module")
def whole_run(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with only its last checkpoint."""
    earlier = shutil.ignore_patterns("step-00000002", "step-00000004")
    output = tmp_path_factory.mktemp("whole") / "run"
    return Path(shutil.copytree(undisturbed, output, ignore=earlier))


def export(command: Callable, output: Path, to: Path) -> dict[str, torch.Tensor]:
    done = command(sys.executable, "-m", "icl_moe", "export", output, "--out", to)
    assert done.returncode == 0, done.stdout
    return load_file(to / "model.safetensors")


def test_an_interrupted_run_ends_as_the_whole_one_bit_for_bit(train, command, whole_run, tmp_path):
    output = tmp_path / "run"
    train(output, "training.steps=6", "training.stop_after=3")
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000003"]
    train(output, "training.steps=6")
    assert losses(output) == losses(whole_run)
    resumed, whole = (
        export(command, output, tmp_path / "a"),
        export(command, whole_run, tmp_path / "b"),
    )
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_any_number_of_ranks_reads_the_same_global_batches(shards):
    shard_set = ShardSet(shards)
    schedule = Schedule(shard_set.manifest.samples, global_batch=8, seed=5)

    def global_batch(step: int, ranks: int) -> tuple[list[bytes], float]:
        parts = [RankSlice.of(rank, ranks, 8, 2) for rank in range(ranks)]
        datasets = [MicroBatches(shard_set, schedule, part, "packed", 0.5) for part in parts]
        micro_steps = parts[0].micro_steps
        batches = [
            dataset[step * micro_steps + m] for dataset in datasets for m in range(micro_steps)
        ]
        episodes = [
            e.numpy().tobytes()
            for batch in batches
            for e in batch.tokens_T.split(list(batch.lengths))
        ]
        # The engine averages over ranks and micro-steps; then the weights of the global batch sum
        # to 1.
        return sorted(episodes), sum(
            float(b.weights_P.sum()) * b.loss_scale for b in batches
        ) / len(batches)

    for step in (0, 1, 7):
        one = global_batch(step, 1)
        assert one[1] == pytest.approx(1.0, rel=1e-5)
        for ranks in (2, 4):
            assert global_batch(step, ranks) == (one[0], pytest.approx(1.0, rel=1e-5))


def test_an_export_is_complete_and_as_large_as_its_weights(command, whole_run, tmp_path):
    weights = export(command, whole_run, tmp_path / "model")
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    assert size <= (tmp_path / "model/model.safetensors").stat().st_size < size * 1.05 + 20_000
    for name in ("config.json", "image_tokenizer/model.safetensors", "text_tokenizer/merges.txt"):
        assert (tmp_path / "model" / name).is_file()


def test_files_of_checkpoints_and_exports_have_the_mode_that_new_files_have(
    command, whole_run, tmp_path
):
    """safetensors itself would leave files that only their owner can read."""
    export(command, whole_run, tmp_path / "model")
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    files = [*whole_run.rglob("*"), *(tmp_path / "model").rglob("*")]
    assert {path.name for path in files if path.is_file() and path.stat().st_mode != usual} == set()


@pytest.mark.parametrize(
    "files",
    [
        {"precious.txt": "keep"},
        {"config.json": '{"model_type": "icl_moe_decoder"}', "precious.txt": "keep"},
        {"config.json": '{"kind": "taming_vqgan"}', "model.safetensors": "a tokenizer's"},
        {"model.safetensors": "weights of something"},
    ],
    ids=lambda files: " ".join(files),
)
def test_export_into_a_folder_of_other_files_is_refused(whole_run, tmp_path, capsys, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(["export", str(whole_run), "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_export_into_the_runs_own_folder_is_refused(whole_run, capsys):
    before = sorted(whole_run.rglob("*"))
    assert main(["export", str(whole_run), "--out", str(whole_run / "model")]) == 2
    assert "is a part of the run" in capsys.readouterr().err
    assert sorted(whole_run.rglob("*")) == before


def test_an_export_replaces_an_earlier_one_in_the_folder_itself(whole_run, tmp_path, monkeypatch):
    """The folder may be a mount point, or the one in which the command runs; a link to it stays a
    link.
    """
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    folder = (tmp_path / "here").stat()
    for out in (".", str(tmp_path / "link")):
        (tmp_path / "here/model-00002-of-00002.safetensors").write_bytes(b"")
        (tmp_path / "here/config.json").write_text('{"model_type": "icl_moe_decoder"}')
        assert main(["export", str(whole_run), "--out", out]) == 0
        InContextModel.from_pretrained(tmp_path / "here", "cpu")
        names = {path.name for path in Path().iterdir()}
        assert "model.safetensors" in names
        assert not names & {".partial", "model-00002-of-00002.safetensors"}
    assert os.path.samestat(folder, (tmp_path / "here").stat())
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"here", "link"}


def test_a_truncated_checkpoint_file_is_named(command, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000006/weight-00001.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    done = command(
        sys.executable, "-m", "icl_moe", "export", tmp_path / "run", "--out", tmp_path / "model"
    )
    assert done.returncode == 2
    assert path.name in done.stdout
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["vocabulary.text_merges=900"], "was built for a vocabulary of"),
        (["model.positions=200"], "model.positions is 200, but the sequences"),
        (
            ["training.global_batch=1000000", "training.micro_batch=8"],
            "fewer than training.global_batch",
        ),
        (["training.micro_batch=3"], "must be a multiple of training.micro_batch"),
        (["parallel.ep_size=2"], r"parallel.ep_size (2) must divide"),
        (["engine=nonsense"], "ds_configs/nonsense.json"),
        (["model.layers_with_experts=[9]"], "names layer 9"),
        (["training.stepz=3"], "did you mean 'training.steps'"),
        (
            ["training.task_weights={segmentatoin: 1}"],
            "names the task segmentatoin (did you mean 'segmentation'?)",
        ),
        (
            ["training.task_weights={segmentation: 0}"],
            "training.task_weights.segmentation must be a positive number, not 0",
        ),
        (
            [
                "training.task_weights={segmentation: 1}",
                "training.sampling=mixed",
                "optimizer.name=adamw",
            ],
            "draws no tasks",
        ),
        (
            ["optimizer.task_weights={segmentation: 2}", "optimizer.name=adamw"],
            "only mt_adamw weighs tasks",
        ),
        (["data.shards=/nowhere"], "data.shards: there are no shards in /nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(capsys, shards, tmp_path, settings, sentence):
    arguments = [
        f"data.shards={shards}",
        f"training.output={tmp_path / 'run'}",
        *SETTINGS,
        *settings,
    ]
    assert main(["train", "demo", *arguments]) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_of_two_ranks_goes_on_alone(command, shards, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    arguments = [
        f"data.shards={shards}",
        f"training.output={tmp_path / 'run'}",
        *SETTINGS,
        "training.steps=8",
    ]
    done = command(sys.executable, "-m", "icl_moe", "train", "demo", *arguments)
    assert done.returncode == 0, done.stdout
    assert "step 7/8" in done.stdout and "step 8/8" in done.stdout and "step 6/8" not in done.stdout


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(train, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    printed = train(tmp_path / "run", "training.steps=8", "model.width=64", expect=2)
    assert "has another model than the recipe" in printed
    assert json.loads((tmp_path / "run/model/config.json").read_text())["model"]["width"] == 32


def goes_on(shards: Path, output: Path, *settings: str) -> list[str]:
    """The command that resumes a run with these settings for two more steps."""
    return ["train", *arguments(shards, output, "training.steps=8", *settings)]


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        (["training.seed=1"], "training.seed is 0 there and 1 here"),
        (
            ["training.global_batch=8"],
            "training.global_batch is 4 there and 8 here",
        ),
        (
            ["training.task_weights={captioning: 1}"],
            "training.task_weights is None there and {'captioning': 1.0} here",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_samples_in_silence(
    capsys, shards, whole_run, settings, difference
):
    before = (whole_run / "run.json").read_text()
    assert main(goes_on(shards, whole_run, *settings)) == 2
    printed = capsys.readouterr().err
    assert f"training.output: {whole_run} holds another run ({difference});" in printed
    assert "training.accept_changes=true to continue anyway" in printed
    assert len(printed.strip().splitlines()) == 1
    assert (whole_run / "run.json").read_text() == before


def other_shards(shards: Path, folder: Path) -> Path:
    """The same samples under a manifest with other bytes."""
    folder.mkdir()
    for file in shards.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text((shards / "manifest.json").read_text() + "\n")
    return folder


def test_a_run_goes_on_with_other_shards_only_where_that_is_asked_for(
    capsys, rank_group, shards, tmp_path
):
    """run.json then records what each stretch of the run was computed with."""
    output, other = tmp_path / "run", other_shards(shards, tmp_path / "shards")
    quick = ("data.workers=0", "training.dry_run=false", "training.micro_batch=2")

    def train_on(folder: Path, *settings: str) -> str:
        ended = {
            rank["ended"]
            for rank in rank_group(2).run(
                training_on_ranks.run, folder, output, (*quick, *settings)
            )
        }
        return ended.pop() if len(ended) == 1 else str(ended)

    assert train_on(shards, "training.steps=1") == "well"
    assert main(goes_on(other, output)) == 2
    printed = capsys.readouterr().err
    assert "the sha256 of the shards' manifest is " in printed
    changed = (*quick, "training.accept_changes=true", "training.seed=7")
    assert train_on(other, "training.steps=2", *changed) == "well"
    assert train_on(other, "training.steps=3", *changed) == "well"
    assert train_on(other, "training.steps=3", *changed) == "well"  # There is nothing left to do.
    shutil.rmtree(output / "checkpoints/step-00000003")
    assert train_on(other, "training.steps=3", *changed) == "well"  # The same stretch once more.

    last = json.loads((output / "run.json").read_text())
    stretches = [*last["earlier"], last]
    assert [stretch["from_step"] for stretch in stretches] == [0, 1, 2]
    assert [stretch["recipe"]["training"]["seed"] for stretch in stretches] == [0, 7, 7]
    digests = [stretch["shards"]["manifest_sha256"] for stretch in stretches]
    assert digests == [ShardSet(folder).fingerprint for folder in (shards, other, other)]
    assert all("earlier" not in stretch for stretch in last["earlier"])


def test_a_run_json_that_cannot_be_read_is_named(capsys, shards, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{")
    assert main(goes_on(shards, tmp_path / "run")) == 2
    assert f"{tmp_path / 'run/run.json'} cannot be read" in capsys.readouterr().err


WITHOUT_METADATA = """
from importlib import metadata

def hide(cls, name, found=metadata.Distribution.from_name.__func__):
    if name == "icl-moe":
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)

metadata.Distribution.from_name = classmethod(hide)
"""


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(shards, tmp_path):
    """One of two runs that start together is refused. The other, without its package's metadata,
    trains, and saves and ends at a signal.
    """
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_METADATA)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    output, hidden = tmp_path / "run", {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "icl_moe", "train"]
    command += arguments(shards, output, "training.steps=500")
    with (
        session(tmp_path / "first", *command, **hidden) as first,
        session(tmp_path / "second", *command, **hidden) as second,
    ):
        both = (first, second)
        wait_for(lambda: any("step 1/500" in run.log for run in both), lambda: second.log)
        first, second = both if "step 1/500" in first.log else reversed(both)
        assert second.wait_for_end() == 2
        printed = second.log.splitlines()[-1]
        assert printed.startswith(f"icl-moe: training.output: process {first.leader.pid} on ")
        assert printed.endswith(
            f"is writing to {output}; wait until it has ended, or choose another folder."
        )
        first.signal(signal.SIGTERM)
        assert first.wait_for_end() == 0
    assert "stopped by a signal after step" in first.log
    assert "Traceback" not in first.log + second.log
    assert not (output / ".lock").exists()
    versions = json.loads((output / "run.json").read_text())["versions"]
    assert versions["icl-moe"] is None and versions["torch"] == version("torch")
