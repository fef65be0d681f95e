"""A reproduction that is killed in the middle of its training resumes there, and a finished row is
not done again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("tiny_table.py")


def _start(out: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, PROGRAM, out],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])},
        )


@pytest.mark.slow
def test_a_reproduction_resumes_after_a_kill_and_does_nothing_twice(tmp_path):
    out = tmp_path / "out"
    killed = _start(out, tmp_path / "first.log")
    checkpoints = out / "runs/tiny/run/checkpoints"
    while not list(checkpoints.glob("step-*")) and killed.poll() is None:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    time.sleep(1.0)  # Ranks in a group of their own notice that their launcher has gone.
    assert not (out / "table1").exists()

    again = _start(out, tmp_path / "second.log")
    assert again.wait(timeout=500) == 0, (tmp_path / "second.log").read_text()
    printed = (tmp_path / "second.log").read_text()
    assert "drawing train" not in printed, "the shards were complete"
    assert "step 1/6" not in printed, "training went on where it was"
    (row,) = json.loads((out / "table1/table.json").read_text())["rows"]
    assert row["published"] == {"miou": 33.54, "mae": 0.172}
    assert 0 <= row["measured"]["miou"] <= 100

    before = (out / "runs/tiny/evaluation/metrics.json").stat().st_mtime_ns
    third = _start(out, tmp_path / "third.log")
    assert third.wait(timeout=100) == 0
    printed = (tmp_path / "third.log").read_text()
    assert "runs/tiny is finished." in printed and "$ icl-moe" not in printed
    assert (out / "runs/tiny/evaluation/metrics.json").stat().st_mtime_ns == before
