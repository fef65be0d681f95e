"""Each notebook of examples/ runs from its first cell to its last one, as plain Python."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    return content["cells"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_stored_without_outputs(notebook: Path) -> None:
    for cell in cells_of(notebook):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def run(notebook: Path) -> dict[str, Any]:
    """Run all cells; returns the names that they defined."""
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells_of(notebook)):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"{notebook.name}, cell {number}", "exec"), names)
    return names


def test_three_images_label_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = run(REPOSITORY / "examples/label_a_folder.ipynb")
    assert len(names["examples"]) == 3
    assert set(names["names"].values()) == set(names["truth"])
    assert np.mean(list(names["ious"].values())) > 0.4
    assert "review" in (names["folder"] / "review.html").name
    assert (names["folder"] / "review.html").stat().st_size > 1000
    assert "mean IoU with the truth" in capsys.readouterr().out
