"""`icl-moe export --mean-with`: the mean of the weights of several models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from icl_moe.cli import main


@pytest.fixture(scope="module")
def models(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run's own export, and two others whose weights and classes differ."""
    folder = tmp_path_factory.mktemp("mean")
    own = folder / "own"
    assert main(["export", str(undisturbed), "--out", str(own)]) == 0
    found = [own]
    for number, factor in ((1, 3.0), (2, -1.0)):
        other = shutil.copytree(own, folder / f"other {number}")
        weights = load_file(own / "model.safetensors")
        changed = {name: value * factor for name, value in weights.items()}
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        _edit(other, classes={"segmentation": [f"new class {number}"]})
        found.append(other)
    return found


def _edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_each_weight_is_the_mean_of_those_of_all_models(undisturbed, models, tmp_path, capsys):
    out = tmp_path / "out"
    named = [word for other in models[1:] for word in ("--mean-with", str(other))]
    assert main(["export", str(undisturbed), *named, "--out", str(out)]) == 0
    assert "in the mean with 2 other models" in capsys.readouterr().out
    own, mean = (load_file(folder / "model.safetensors") for folder in (models[0], out))
    assert own.keys() == mean.keys()
    for name, value in own.items():
        # 1, 3 and -1 times the own weight.
        np.testing.assert_allclose(mean[name].float(), value.float(), rtol=1e-2, atol=1e-6)
    trained = json.loads((out / "training.json").read_text())
    assert [other["name"] for other in trained["mean_with"]] == ["other 1", "other 2"]
    card = (out / "README.md").read_text()
    assert "weights averaged with those of" in card and "other 2 (sha256" in card
    classes = json.loads((out / "config.json").read_text())["classes"]["segmentation"]
    assert {"new class 1", "new class 2"} < set(classes) and classes == sorted(classes)
    one = tmp_path / "one"
    command = ["export", str(undisturbed), "--mean-with", str(models[1]), "--out", str(one)]
    assert main(command) == 0
    for name, value in load_file(one / "model.safetensors").items():
        np.testing.assert_allclose(value.float(), 2 * own[name].float(), rtol=1e-2, atol=1e-6)


def test_models_that_differ_in_more_than_their_weights_have_no_mean(
    undisturbed, models, tmp_path, capsys
):
    out = tmp_path / "out"
    command = ["export", str(undisturbed), "--out", str(out), "--mean-with"]
    assert main([*command, str(tmp_path / "none")]) == 2
    assert "--mean-with: " in capsys.readouterr().err
    other = shutil.copytree(models[1], tmp_path / "other")
    _edit(other, mask_corruption=True)
    assert main([*command, str(other)]) == 2
    said = capsys.readouterr().err
    assert "--mean-with: mask_corruption of " in said and "is True" in said
    (other / "model.safetensors").write_bytes(b"damaged")
    assert main([*command, str(other)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert not out.exists()
