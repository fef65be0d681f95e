"""Requests to stop as signals to all processes of a run: nothing is lost, no process is left, and
the same command resumes.
"""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import arguments, session, two_ranks, wait_for
from small_run import FAULTY, launcher, losses

PRETRAIN = "launch_scripts/pretrain.sh"
STEPS = ("training.steps=6", "training.save_every=2")


def tracebacks_of_ours(log: str) -> int:
    """On Ctrl-C, DeepSpeed's front end always prints one. Other processes print into the same log,
    so only whole lines are counted.
    """
    of_the_front_end = re.findall(r'deepspeed/launcher/runner\.py", line \d+, in <module>', log)
    return log.count("Traceback (most recent call last)") - len(of_the_front_end)


def test_a_run_that_signals_to_its_whole_group_stopped_ends_as_an_undisturbed_one(
    shards, undisturbed, tmp_path
):
    """Before its first step, in a step, and while it saves."""
    output = tmp_path / "run"
    command = arguments(shards, output, *STEPS)

    with session(tmp_path / "early", *launcher(), PRETRAIN, *command) as run:
        run.wait_for(lambda: len(run.ranks()) == 2)
        run.signal(signal.SIGINT)
        run.wait_for_end()
    assert "SIGINT: stopped before the run began." in run.log
    assert "exits with return code" not in run.log
    assert tracebacks_of_ours(run.log) == 0, run.log
    assert not output.exists()

    fault = {"FAULT": "slow:1:3"}
    with session(tmp_path / "in-a-step", *launcher(), *FAULTY, *command, **fault) as run:
        run.wait_for(lambda: "the fault begins" in run.log)
        assert len(run.readers()) == 2
        run.signal(signal.SIGTERM)
        run.wait_for_end()
    assert run.log.count("stopped by a signal after step 3") == 1, run.log
    assert tracebacks_of_ours(run.log) == 0, run.log

    fault = {"FAULT": "slow-save:0:4"}
    with session(tmp_path / "while-saving", *launcher(), *FAULTY, *command, **fault) as run:
        run.wait_for(lambda: "the fault begins" in run.log)
        run.signal(signal.SIGINT)
        run.wait_for_end()
    assert run.log.count("stopped by a signal after step 5") == 1, run.log
    assert tracebacks_of_ours(run.log) == 0, run.log

    with session(tmp_path / "the-rest", *launcher(), PRETRAIN, *command) as run:
        assert run.wait_for_end() == 0, run.log
    assert "step 6/6" in run.log and "step 5/6" not in run.log
    assert losses(output) == losses(undisturbed)
    for file in (undisturbed / "checkpoints/step-00000006").glob("*.safetensors"):
        same = output / "checkpoints/step-00000006" / file.name
        assert same.read_bytes() == file.read_bytes(), file.name


def test_a_second_request_seconds_later_ends_a_run_that_hangs(shards, tmp_path):
    command = arguments(shards, tmp_path / "run", *STEPS)
    with two_ranks(tmp_path, Path(FAULTY[0]), *command, FAULT="hang:1:2") as ranks:
        logs = [tmp_path / f"rank-{rank}.log" for rank in (0, 1)]
        wait_for(lambda: "the fault begins" in logs[1].read_text(), logs[0].read_text)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal_group(ranks[0].pid, number)
        time.sleep(3)
        assert [rank.poll() for rank in ranks] == [None, None]
        signal_group(ranks[0].pid, signal.SIGINT)
        started = time.monotonic()
        assert [rank.wait() for rank in ranks] == [130, 130]
        assert time.monotonic() - started < 5
    assert logs[0].read_text().count("SIGINT: asked to stop") == 1
    assert "Traceback" not in "".join(log.read_text() for log in logs)


def signal_group(leader: int, number: signal.Signals) -> None:
    """Sent from a separate process, since ranks treat signals of their parent as their
    launcher's.
    """
    subprocess.run(["bash", "-c", f"kill -{number} -- -{leader}"], check=True)


@pytest.mark.slow
def test_under_bash_a_run_that_a_signal_stopped_ends_with_0(shards, tmp_path):
    """The script's launcher ignores the signal; only the ranks handle it."""
    command = arguments(shards, tmp_path / "run", "training.steps=500")
    environment = {"NUM_GPUS": "2"}
    with session(tmp_path / "log", "bash", PRETRAIN, *command, **environment) as run:
        run.wait_for(lambda: "step 2/500" in run.log)
        run.leader.terminate()
        assert run.wait_for_end() == 0, run.log
    assert "stopped by a signal after step" in run.log
    assert run.log.count("exits successfully") == 2
    assert "Traceback" not in run.log
    assert list((tmp_path / "run/checkpoints").glob("step-*/complete.json"))


def test_a_run_that_was_suspended_goes_on(shards, tmp_path):
    """As SLURM suspends jobs, for longer than a rank may hang. Its listener survives as well."""
    command = arguments(shards, tmp_path / "run", *STEPS, "training.hang_seconds=6")
    with session(tmp_path / "log", *launcher(), *FAULTY, *command, FAULT="slow:1:3") as run:
        run.wait_for(lambda: "the fault begins" in run.log)
        run.signal(signal.SIGSTOP)
        time.sleep(9)
        run.signal(signal.SIGCONT)
        assert run.wait_for_end() == 0, run.log
    assert "step 6/6" in run.log and "hangs" not in run.log
    assert tracebacks_of_ours(run.log) == 0, run.log
