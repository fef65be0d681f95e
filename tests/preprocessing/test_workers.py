"""Work on several processes comes back in order, stays bounded, and ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icl_moe.errors import InputError
from preprocessing.workers import ordered_map


def scaled(factor: int, number: int) -> int:
    time.sleep(0.02 if number % 3 == 0 else 0.0)
    return factor * number


def refuse_seven(_: None, number: int) -> int:
    if number == 7:
        raise InputError("Seven is not wanted.")
    return number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(workers):
    assert list(ordered_map(scaled, 10, range(20), workers)) == [
        10 * number for number in range(20)
    ]


@pytest.mark.parametrize("workers", [0, 3])
def test_an_exception_reaches_the_caller_as_it_was(workers):
    with pytest.raises(InputError, match=r"^Seven is not wanted\.$"):
        list(ordered_map(refuse_seven, None, range(1000), workers))


def test_items_are_taken_only_a_little_ahead_of_the_results():
    taken = []
    results = ordered_map(scaled, 1, (taken.append(n) or n for n in range(100)), workers=2)
    next(results)
    assert len(taken) <= 6
    results.close()


def test_a_killed_parent_leaves_no_worker(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from preprocessing.workers import ordered_map\n"
        "def work(_, n):\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())  # one write, so that lines do not mix\n"
        "    time.sleep(60)\n"
        "list(ordered_map(work, None, range(2), 2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
