"""Workers of a process that was killed before they could ask to end with it."""

import signal
import subprocess
import sys
import time

_PARENT = """
import multiprocessing, os, pathlib, signal, sys, time
from icl_moe.signals import end_with_parent

def late(parent):
    while os.getppid() == parent:
        time.sleep(0.01)
    end_with_parent()
    pathlib.Path(sys.argv[1]).touch()

fork = multiprocessing.get_context("fork")
fork.Process(target=late, args=(os.getpid(),)).start()
fork.Process(target=time.sleep, args=(5,)).start()  # It holds the pipes of the first.
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_that_asks_when_its_parent_is_gone(tmp_path):
    survived = tmp_path / "survived"
    parent = subprocess.run([sys.executable, "-c", _PARENT, survived], check=False)
    assert parent.returncode == -signal.SIGKILL
    time.sleep(1)
    assert not survived.exists()
