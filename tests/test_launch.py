"""The launch scripts work as documented, and report in one sentence what is missing."""

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from icl_moe.errors import InputError
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe, to_dict
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig
from icl_moe.training.preflight import read_engine
from preprocessing import synthetic
from preprocessing.recipe import DataRecipe

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((REPOSITORY / "launch_scripts").iterdir())
ENGINES = sorted((REPOSITORY / "ds_configs").glob("*.json"))

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(run_command: Callable, tmp_path: Path) -> Run:
    """Runs a command in a folder with only the launch scripts. Returns exit code and output."""
    (tmp_path / "launch_scripts").symlink_to(REPOSITORY / "launch_scripts")

    def run_here(*command: str | Path, **environment: str) -> tuple[int, str]:
        done = run_command(["env", "--chdir", tmp_path, *command], **environment)
        return done.returncode, done.stdout

    return run_here


def sentences(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("icl-moe: ")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_can_read_every_script(run_command: Callable, script: Path) -> None:
    done = run_command(["bash", "-n", script])
    assert (done.returncode, done.stdout) == (0, "")
    assert script.suffix == ".slurm" or script.stat().st_mode & stat.S_IXUSR


def test_python_can_read_pretrain_without_a_warning() -> None:
    source = (REPOSITORY / "launch_scripts/pretrain.sh").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(source, "pretrain.sh", "exec")


@pytest.mark.slow
def test_eight_ranks_say_once_that_the_shards_are_missing(run: Run) -> None:
    code, output = run("deepspeed", "--num_gpus", "8", "launch_scripts/pretrain.sh")
    assert code == 2, output
    (sentence,) = sentences(output)
    assert "data.shards" in sentence
    assert load_recipe(TrainingRecipe, "paper_256").data.shards in sentence
    assert "Traceback" not in output


@pytest.mark.slow
def test_bash_starts_the_launcher(run: Run) -> None:
    code, output = run("bash", "launch_scripts/pretrain.sh", "data.shards=nowhere", NUM_GPUS="2")
    assert code == 2, output
    assert "dist_world_size=2" in output
    (sentence,) = sentences(output)
    assert "data.shards: there are no shards in " in sentence and "/nowhere," in sentence


@pytest.mark.slow
def test_rank_0_is_left_the_time_to_say_what_all_ranks_find(run: Run, tmp_path: Path) -> None:
    """The launcher ends rank 0, which starts last here, when another rank ends before it."""
    slow = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(4)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = ("deepspeed", "--num_gpus", "2", "launch_scripts/pretrain.sh", "data.shards=nowhere")
    code, output = run(*command, PYTHONPATH=path.rstrip(os.pathsep))
    assert code == 2, output
    (sentence,) = sentences(output)
    assert "data.shards" in sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no readable file hosts; name one with a line for each machine"),
        ("# none\n\n", "hosts names no machine; write one line per machine"),
        ("one slots=2\ntwo\n", "in hosts the line 'two' is invalid; each machine needs one line"),
        ("one slots=2\none slots=2", "in hosts the line 'one slots=2' is invalid"),
        ("one slots=0\n", "in hosts the line 'one slots=0' is invalid"),
    ],
)
def test_a_hostfile_that_names_no_machines_is_refused(
    run: Run, tmp_path: Path, content: str | None, sentence: str
) -> None:
    """The launcher itself would train on this machine alone, or end with a traceback."""
    if content is not None:
        (tmp_path / "hosts").write_text(content)
    code, output = run("bash", "launch_scripts/pretrain.sh", HOSTFILE="hosts")
    assert code == 2, output
    (printed,) = output.splitlines()
    assert printed.startswith(f"icl-moe: HOSTFILE: {sentence}")


def test_a_wrong_key_is_said_once_with_the_right_one(run: Run) -> None:
    code, output = run(
        "deepspeed",
        "--num_gpus",
        "2",
        "launch_scripts/pretrain.sh",
        "ablation_128",
        "training.stepz=20",
    )
    assert code == 2, output
    (sentence,) = sentences(output)
    assert (
        "ablation_128.yaml: unknown key 'training.stepz' (did you mean 'training.steps'?)"
        in sentence
    )
    assert "Traceback" not in output


def test_a_signal_to_the_script_reaches_every_rank(tmp_path: Path) -> None:
    # A program that reports when it is ready and takes a second to end replaces training in the
    # script.
    script = (REPOSITORY / "launch_scripts/pretrain.sh").read_text()
    (tmp_path / "launch_scripts").mkdir()
    (tmp_path / "launch_scripts/pretrain.sh").write_text(
        script.replace("import icl_moe.training.__main__", "import probe")
    )
    (tmp_path / "probe.py").write_text(
        "import os, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    open(f'saved-{rank}', 'w').close()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open(f'ready-{rank}', 'w').close()\n"
        "time.sleep(60)\n"
    )
    path = f"{REPOSITORY}/.venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    modules = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": modules, "NUM_GPUS": "2"}
    with subprocess.Popen(
        ["bash", "launch_scripts/pretrain.sh"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_slurm_starts_a_launcher_a_machine(run: Run, tmp_path: Path) -> None:
    # Fake versions of SLURM's two commands: a job of two machines, whose tasks both run here, one
    # after the other.
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "scontrol", "#!/bin/sh\nprintf 'localhost\\nother\\n'\n")
    executable(
        tools / "srun",
        '#!/bin/sh\nshift\nSLURM_NODEID=1 "$@"; echo "other machine: $?"\nSLURM_NODEID=0 exec '
        '"$@"\n',
    )
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "deepspeed"):
        executable(
            bin_folder / name, f'#!/bin/sh\nexec {Path(sys.executable).parent / name} "$@"\n'
        )
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "x",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "20007",
    }
    path = f"{tools}:{os.environ['PATH']}"
    code, output = run(
        "env",
        f"PATH={path}",
        "bash",
        "launch_scripts/pretrain.slurm",
        "paper_256",
        "training.output=a b",
        SLURM_GPUS_ON_NODE="3",
        **slurm,
    )
    assert code == 2, output
    assert (tmp_path / "runs/hostfile-20007").read_text() == "localhost slots=3\nother slots=3\n"
    assert output.count("dist_world_size=6") == 2
    assert "nnodes=2, num_local_procs=3, node_rank=1" in output
    assert "nnodes=2, num_local_procs=3, node_rank=0" in output
    assert "--master_addr=localhost --master_port=20007" in output
    assert "'training.output=a b'" in output, "an argument with a space stays whole"
    # Rank 0 is on the first machine; the other machine reports it too, since the problem could be
    # there alone.
    before, after = output.split("other machine: 2")
    assert sentences(before) == []
    assert before.count(f"{platform.node()}: icl-moe: data.shards: ") == 1
    assert len(sentences(after)) == 1


def test_slurm_outside_the_repository_is_said(run: Run, tmp_path: Path) -> None:
    code, output = run("bash", "launch_scripts/pretrain.slurm", SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2
    assert "submit from the repository root" in output


def test_prepare_data_names_what_is_missing_and_where_it_is_published(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    code, output = run("bash", "launch_scripts/prepare_data.sh", COCO="coco")
    assert code == 2
    missing = [line for line in output.splitlines() if line.startswith("missing: ")]
    assert len(missing) == 10
    assert all("published at http" in line for line in missing)
    assert not any("coco/val2017 " in line for line in missing)
    assert "Nothing was built: 10 of 11" in output
    assert not (tmp_path / "shards").exists()


@pytest.mark.slow
def test_the_three_scripts_lead_from_files_to_metrics(run: Run, tmp_path: Path) -> None:
    lay_out_files(tmp_path)
    files = {
        "COCO": "coco",
        "VG": "genome",
        "VQGAN": "vqgan",
        "RECIPE": "./data.yaml",
        "WORKERS": "1",
    }
    code, output = run("bash", "launch_scripts/prepare_data.sh", "shards", "seed=3", **files)
    assert code == 0, output
    settings = [
        "demo",
        "data.shards=shards",
        "training.output=run",
        "training.steps=2",
        "training.global_batch=4",
        "training.micro_batch=1",
    ]
    code, output = run("deepspeed", "--num_gpus", "2", "launch_scripts/pretrain.sh", *settings)
    assert code == 0, output
    code, output = run(
        "bash", "launch_scripts/evaluate.sh", "run", "shards_val", "result", SHOTS="1"
    )
    assert code == 0, output
    metrics = (tmp_path / "result/metrics.json").read_text()
    assert "segmentation" in metrics
    assert "captioning" in metrics
    assert (tmp_path / "result/report.html").is_file()


def lay_out_files(folder: Path) -> None:
    """Write drawn scenes where prepare_data.sh looks for COCO and Visual Genome, an image tokenizer
    with random weights, and a data recipe.
    """
    synthetic.write_dataset(folder / "train", images=24, seed=0, split="train")
    synthetic.write_dataset(folder / "val", images=24, seed=1, split="val")
    coco, genome = folder / "coco", folder / "genome"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(folder / split / "images", coco / f"{split}2017")
        shutil.copy(
            folder / split / f"instances_{split}.json",
            coco / f"annotations/instances_{split}2017.json",
        )
    shutil.copytree(folder / "train" / "images", genome / "VG_100K")
    (genome / "VG_100K_2").mkdir()
    for kind in ("region_descriptions", "objects", "image_data"):
        shutil.copy(folder / "train" / f"{kind}.json", genome)
    images = json.loads((genome / "image_data.json").read_text())
    for image in images:
        image["url"] = f"https://cs.stanford.edu/people/rak248/VG_100K/{image['url']}"
    (genome / "image_data.json").write_text(json.dumps(images))
    ids = [image["image_id"] for image in images]
    (genome / "densecap_splits.json").write_text(
        json.dumps({"train": ids[:12], "val": ids[12:], "test": []})
    )
    recipe = load_recipe(DataRecipe, "demo", package="preprocessing")
    codes = recipe.vocabulary.image_codes
    VQGAN(VQGANConfig(64, codes, 32, 32, 32, (1, 1, 1, 1), 1, ())).save_pretrained(folder / "vqgan")
    assert recipe.captioning is not None
    text = {
        "tokenizer": "vqgan",
        "image_size": 64,
        "examples": 1,
        "samples": 8,
        "vocabulary": to_dict(recipe.vocabulary),
    }
    text |= {"segmentation": {"images": "", "annotations": ""}}
    text |= {
        "captioning": {
            "images": "",
            "regions": "",
            "objects": "",
            "image_data": "",
            "min_descriptions": 0,
            "classes": list(recipe.captioning.classes or ()),
        }
    }
    (folder / "data.yaml").write_text(json.dumps(text))


def test_evaluate_says_how_to_call_it(run: Run) -> None:
    code, output = run("bash", "launch_scripts/evaluate.sh", "model")
    assert code == 2
    assert "usage: bash launch_scripts/evaluate.sh MODEL SHARDS [OUT]" in output


@pytest.mark.parametrize(
    "path", [path for path in ENGINES if path.stem.startswith("zero")], ids=lambda path: path.stem
)
def test_an_engine_file_is_what_its_name_says(path: Path) -> None:
    stage, precision = path.stem.removeprefix("zero").split("_")
    config = DeepSpeedConfig({**read_engine(path.stem), "train_micro_batch_size_per_gpu": 1})
    assert config.zero_optimization_stage == int(stage)
    assert config.zero_config.reduce_scatter
    assert config.bfloat16_config.enabled == (precision == "bf16")
    monitors = config.monitor_config
    assert not any(
        monitor.enabled for monitor in (monitors.tensorboard, monitors.csv_monitor, monitors.wandb)
    )


def test_every_engine_file_is_explained_and_every_recipe_names_one() -> None:
    readme = (REPOSITORY / "ds_configs/README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in ENGINES)
    for recipe in (REPOSITORY / "icl_moe/recipes").glob("*.yaml"):
        if "engine:" in recipe.read_text():
            assert load_recipe(TrainingRecipe, recipe.stem).engine in [
                path.stem for path in ENGINES
            ]


@pytest.mark.parametrize(
    "key",
    [
        "train_batch_size",
        "gradient_clipping",
        "steps_per_print",
        "optimizer",
        "scheduler",
        "gradient_accumulation_steps",
    ],
)
def test_a_key_of_the_recipe_is_refused_in_an_engine_file(tmp_path: Path, key: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: 1}))
    with pytest.raises(InputError, match=rf"mine\.json sets '{key}'"):
        read_engine(str(file))
