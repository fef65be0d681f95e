"""Training with a fault: FAULT=kind:rank:step in the environment; launched instead of
icl_moe.training. Before the slow part, `slow`, `slow-save` and `hang` print "the fault begins".

FAULT_SHARDS: the folder whose shards `overwrite` and `truncate` damage.
"""

import icl_moe.hear_signals  # noqa: I001  (as launch_scripts/pretrain.sh does)

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

import icl_moe.training.trainer as trainer
from icl_moe.training import training_state

kind, rank, step = os.environ["FAULT"].split(":")
faults = [kind]
backward, write = trainer.TrainingEngine.backward, training_state.write


def damage(shards):
    """Damage every sample, so that the next one to be read is damaged. The files stay open and keep
    their names, as on a failing disk.
    """
    for path in shards.glob("*.tar"):
        with path.open("r+b") as file:
            if kind == "truncate":
                file.truncate(10)
            else:
                file.write(bytes(path.stat().st_size))


def faulty_backward(engine, batch, noise):
    if faults and noise[1] + 1 == int(step) and os.environ["RANK"] == rank:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind in ("hang", "slow"):
            faults.clear()
            print("the fault begins", flush=True)
            time.sleep(600 if kind == "hang" else 3)
        if kind in ("overwrite", "truncate"):
            damage(Path(os.environ["FAULT_SHARDS"]))
            faults.clear()
        if kind == "nan":
            batch.weights_P.fill_(float("nan"))
        if kind == "terminate":
            # As on a cluster, a process outside the job signals every process of the job, including
            # readers; here only those of this rank, once.
            rank_itself = psutil.Process()
            job = [*rank_itself.children(recursive=True), rank_itself]
            numbers = " ".join(str(process.pid) for process in job)
            subprocess.run(["sh", "-c", f"kill -TERM {numbers}"], check=True)
            faults.clear()
    return backward(engine, batch, noise)


def faulty_write(engine, folder, completed):
    if kind == "slow-save" and completed == int(step) and os.environ["RANK"] == rank:
        print("the fault begins", flush=True)
        time.sleep(3)
    written = write(engine, folder, completed)
    if kind == "kill-in-save" and completed == int(step) and os.environ["RANK"] == rank:
        # This is after the checkpoint's files are written, and before it is complete.
        os.kill(os.getpid(), signal.SIGKILL)
    return written


def hang_before_the_first_step(loop, watchdog):
    if kind == "hang-before" and os.environ["RANK"] == rank:
        time.sleep(600)


trainer._Run._validation = hang_before_the_first_step
trainer.TrainingEngine.backward = faulty_backward
training_state.write = faulty_write

import icl_moe.training.__main__  # noqa: E402, F401
