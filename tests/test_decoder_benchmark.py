"""The decoder's benchmark runs and writes every figure and goal; its results at toy size have no
meaning.
"""

import json
import sys

import pytest

KINDS = (
    "stock / ours, mix",
    "stock / ours, segmentation",
    "gpt2 / ours, mix",
    "gpt2 / ours, segmentation",
    "floor / ours, mix",
)


def run_quickly(run_command, folder, *options):
    """The figures that the benchmark writes at toy size, and its output."""
    file = folder / "figures.json"
    command = [sys.executable, "benchmarks/decoder.py", "--quick", "--repeat", "1"]
    result = run_command([*command, *options, "--json", file])
    assert result.returncode == 0, result.stdout
    return json.loads(file.read_text()), result.stdout


@pytest.mark.slow
def test_the_decoder_benchmark_writes_every_ratio_with_its_goal(run_command, tmp_path):
    content, printed = run_quickly(run_command, tmp_path, "--precision", "bf16")
    goals = {goal["name"]: goal for goal in content["goals"]}
    assert goals.keys() == {
        f"bf16, {kind}"
        for kind in (*KINDS, "peak memory above weights and gradients, ours / stock")
    }
    # The memory above weights and gradients may be 0 at toy size.
    assert all(goal["value"] >= 0 and goal["met"] in (True, False) for goal in goals.values())
    for system in ("ours", "stock", "gpt2"):
        for task in ("segmentation", "captioning", "mix"):
            assert content["figures"][f"bf16, {system}, {task}: s per episode"] > 0
    assert "goals missed" in printed


@pytest.mark.slow
def test_the_decoder_benchmark_undoes_each_step(run_command, tmp_path):
    content, _ = run_quickly(run_command, tmp_path, "--precision", "fp32", "--steps")
    figures = content["figures"]
    assert sum(name.endswith("time on the mix") for name in figures) == 6
