"""Models by name: folders, the Hugging Face Hub (a local server with its API), and transformers'
Auto classes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_export
from inference.hub_server import REPOSITORY, REVISION, hub
from PIL import Image

from icl_moe import InContextModel
from icl_moe.cli import parse_arguments
from icl_moe.errors import InputError
from icl_moe.inference.hub import find_model
from icl_moe.inference.model import Region
from icl_moe.inference.model_card import model_card
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe, to_dict

TRAINING = {
    "steps": 7,
    "recipe": to_dict(load_recipe(TrainingRecipe, "demo", [], package="icl_moe")),
    "shards": {"manifest_sha256": "ab" * 32},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = toy_export.build_toy_line(tmp_path_factory.mktemp("hub"))
    (folder / "training.json").write_text(json.dumps(TRAINING))
    return folder


def run(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


THERE_AND_BACK = """
import sys
from icl_moe import InContextModel

fetched = InContextModel.from_pretrained(sys.argv[1])
print(fetched.fingerprint == InContextModel.from_pretrained(sys.argv[2]).fingerprint)
print(fetched.push_to_hub("someone/model", metrics=sys.argv[3], token="secret"))
"""


def test_a_model_is_fetched_from_the_hub_and_uploaded_with_its_card_in_one_commit(model, tmp_path):
    row = {"name": "1 example", "prediction": "model", "shots": 1, "miou": 0.4321}
    without = {"name": "0 examples", "prediction": "model", "shots": 0, "miou": 0.2}
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"tasks": {"segmentation": {"rows": [row, without]}}}))
    uploaded = tmp_path / "uploaded"
    with hub(model, uploaded) as (address, commits):
        done = run(
            THERE_AND_BACK,
            f"{REPOSITORY}@main",
            model,
            metrics,
            HF_ENDPOINT=address,
            HF_HOME=str(tmp_path / "home"),
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True", f"{address}/{REPOSITORY}/commit/{REVISION}"]
    there = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert commits == [there | {"README.md"}]
    for name in there:
        assert (uploaded / name).read_bytes() == (model / name).read_bytes()
    card = (uploaded / "README.md").read_text()
    assert card.startswith("---\n")
    assert "| segmentation | 1 example | 1 | miou | 0.4321 |" in card
    assert "| segmentation | 0 examples | 0 | miou | 0.2 |" in card
    assert "| optimizer steps | 7 |" in card


def test_without_scores_the_folders_own_card_is_uploaded(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "mine"))
    (folder / "README.md").write_text("What I wrote by hand.\n")
    program = """
import sys
from icl_moe import InContextModel
InContextModel.from_pretrained(sys.argv[1]).push_to_hub("someone/model", token="secret")
"""
    with hub(model, tmp_path / "uploaded") as (address, _):
        done = run(program, folder, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "uploaded/README.md").read_text() == "What I wrote by hand.\n"


def test_without_a_network_a_model_of_the_hub_is_refused_in_a_sentence(tmp_path):
    program = (
        "import sys; from icl_moe.cli import main; "
        "sys.exit(main(['segment', 'someone/nothing', '--example', 'a.png', 'b.png', "
        f"'--query', 'c.png', '--out', '{tmp_path}/m.png']))"
    )
    done = run(program, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "There is no model folder someone/nothing, and no model of that name" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path):
    assert find_model(tmp_path) == tmp_path
    for name in ("nothing", "a/b/c", str(tmp_path / "nothing")):
        with pytest.raises(InputError, match=r"There is no model folder .*OWNER/NAME"):
            find_model(name)
    with pytest.raises(InputError, match="A model is a folder or a name, not NoneType"):
        find_model(None)


@pytest.mark.parametrize(
    "command",
    [
        "segment ./demo --query a.png --out b.png",
        "caption ./demo --query a.png",
        "label ./demo --images a --out b.json",
        "evaluate ./demo shards --out report",
        "web ./demo",
    ],
)
def test_a_folder_of_a_shipped_models_name_is_meant_by_its_path(command, tmp_path, monkeypatch):
    """`icl-moe demo` makes a folder demo, and `icl-moe export --out demo` too."""
    monkeypatch.chdir(tmp_path)
    shipped = find_model("demo")
    assert shipped.is_absolute() and find_model(Path("demo")) == shipped
    (tmp_path / "demo").mkdir()
    assert find_model("demo") == shipped
    assert find_model(parse_arguments(command.split()).model) == Path("demo")
    assert find_model(Path("demo")) == Path("demo")


AUTO = """
import sys
import icl_moe

assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import AutoConfig, AutoModel

model = AutoModel.from_pretrained(sys.argv[1])
config = AutoConfig.from_pretrained(sys.argv[1])
assert model.get_input_embeddings().num_embeddings == config.vocab_size
print(type(model).__name__, type(config).__name__)
"""


@pytest.mark.parametrize(
    "before", ["", pytest.param("from transformers import AutoModel", marks=pytest.mark.slow)]
)
def test_the_auto_classes_know_the_decoder(model, before):
    program = AUTO if not before else f"{before}\n{AUTO.replace('assert not', 'not')}"
    done = run(program, model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["InContextDecoder", "DecoderConfig"]


def test_a_card_of_a_model_that_was_not_evaluated_says_so(model):
    config = json.loads((model / "config.json").read_text())
    card = model_card(config, TRAINING)
    assert "No evaluation was given at the export" in card
    assert f"{config['image_size']} x {config['image_size']} pixels" in card


@pytest.mark.parametrize("name", ["demo", "photographs"])
def test_a_model_that_ships_segments_at_once_and_captions_if_it_was_trained_to(name):
    model = InContextModel.from_pretrained(name, device="cpu")
    picture = Image.new("RGB", (64, 64), "grey")
    picture.paste("red", (10, 10, 40, 40))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (10, 10, 40, 40))
    found_HW = model.segment([(picture, mask)], query=picture)
    inside_HW = np.asarray(mask) > 0
    assert found_HW[inside_HW].mean() > found_HW[~inside_HW].mean()
    example = (picture, Region("a red square", "square", (10, 10, 30, 30)))
    if name == "demo":
        found = model.caption([example], picture)
        assert found.caption and found.box is not None
    else:
        with pytest.raises(InputError, match="was trained on segmentation, not captioning"):
            model.caption([example], picture)
