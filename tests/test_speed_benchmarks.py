"""The benchmarks of decoding and of scoring run at toy size and write every goal."""

import json
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "goals"),
    [
        (
            "inference",
            {
                "generate / ours, batch 1",
                "generate / ours, shared examples",
                "code by code / parallel",
                "MoE / dense",
            },
        ),
        pytest.param(
            "evaluation",
            {
                "scoring / decoding, segmentation",
                "scoring / decoding, captioning",
                "CIDEr of 50 captions: s",
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_benchmark_writes_every_goal(run_command, tmp_path, name, goals):
    extra = ["--repeats", "1"] if name == "inference" else []
    file = tmp_path / "figures.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", *extra, "--json", file]
    result = run_command(command)
    assert result.returncode == 0, result.stdout
    content = json.loads(file.read_text())
    assert {goal["name"] for goal in content["goals"]} == goals
    assert all(goal["value"] > 0 for goal in content["goals"])


@pytest.mark.slow
def test_the_benchmark_of_encoding_compares_two_processes_with_one(run_command, tmp_path):
    file = tmp_path / "figures.json"
    small = ["--tokenizer", "demo", "--size", "64", "--pictures", "64", "--repeats", "1"]
    result = run_command([sys.executable, "benchmarks/encoding.py", *small, "--json", file])
    assert result.returncode == 0, result.stdout
    content = json.loads(file.read_text())
    assert {goal["name"] for goal in content["goals"]} == {
        "2 processes / 1, pictures/s",
        "share neither encoding nor waiting for pictures",
    }
    assert content["figures"]["days for 665,000 pictures, 2 processes"] > 0
