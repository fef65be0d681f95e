"""The benchmark for a GPU runs from end to end at toy size on a CPU, keeps what it measured where a
part fails, and prints its table again from the file.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILED = {"training, compiled", "code by code, compiled"}
"""Tracing them takes most of the time."""


def run(folder: Path, *options: str, **environment: str) -> tuple[int, str, dict]:
    file = folder / "gpu.json"
    result = subprocess.run(
        ["benchmarks/gpu.sh", "--quick", "--json", str(file), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )
    assert file.is_file(), result.stderr
    return result.returncode, result.stdout, json.loads(file.read_text())


def check(content: dict, names: set[str]) -> None:
    """Every part has figures and no error, and only what needs a GPU failed."""
    assert content["parts"].keys() == names
    failed = {
        name
        for part, found in content["parts"].items()
        for name, value in found["figures"].items()
        if isinstance(value, str)
    }
    assert all(found["error"] is None and found["figures"] for found in content["parts"].values())
    assert all(
        any(word in name for word in ("varlen", "Flex", "CUDNN", "EFFICIENT")) for name in failed
    )


@pytest.mark.slow
def test_every_part_runs_at_toy_size_and_is_rendered(tmp_path):
    parts = [
        "device",
        "training",
        "attention",
        "cross-entropy",
        "optimizer",
        "parallel decoding",
        "code by code",
        "code by code, CUDA graph",
        "generate",
    ]
    code, printed, content = run(tmp_path, "--parts", *parts)
    assert code == 0, printed
    check(content, set(parts))
    assert content["parts"]["generate"]["figures"]["float32: equal codes, %"] == 100
    again = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "render", tmp_path / "gpu.json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout == printed
    assert "| training | segmentation, best: tokens/s |" in printed


@pytest.mark.slow
def test_the_compiled_parts_run_too(tmp_path):
    code, printed, content = run(tmp_path, "--parts", *sorted(COMPILED))
    assert code == 0, printed
    check(content, COMPILED)


def test_a_part_that_fails_or_hangs_loses_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend("benchmarks")
    gpu = importlib.import_module("gpu")

    def fails(bench):
        bench.record("before", 1.5)
        with bench.variant("a variant"):
            raise RuntimeError("no kernel | for it\nand more")
        raise MemoryError("none left")

    def hangs(bench):
        bench.record("before", 2)
        subprocess.run(["sleep", "1000"], check=True)

    parts = {"fails": (fails, 60), "hangs": (hangs, 2), "device": gpu.PARTS["device"]}
    monkeypatch.setattr(gpu, "PARTS", {**parts, "late": (fails, 60)})
    file = tmp_path / "gpu.json"
    gpu.measure(list(parts), True, 100, file)
    found = json.loads(file.read_text())["parts"]
    assert found["fails"]["figures"] == {
        "before": 1.5,
        "a variant": "failed: RuntimeError: no kernel | for it",
    }
    assert found["fails"]["error"] == "exit code 1: MemoryError: none left"
    assert found["hangs"]["figures"] == {"before": 2}
    assert found["hangs"]["error"] == "stopped after its 2 s"
    assert found["device"]["error"] is None and found["device"]["figures"]
    assert gpu.run_part("late", "cpu", True, 0.5, file)["error"] == "not run: no time was left"
    assert list(tmp_path.iterdir()) == [file]
    rendered = gpu.render(json.loads(file.read_text()))
    assert "| fails | **failed** | exit code 1: MemoryError: none left | |" in rendered
    assert "| fails | a variant | failed: RuntimeError: no kernel / for it |  |" in rendered
