"""Training with a fault: FAULT=kind:rank:step in the environment; launched in the place of icl_moe.training."""

import os
import signal
import time

import psutil

import icl_moe.training.trainer as trainer
from icl_moe.training import checkpoint

kind, rank, step = os.environ["FAULT"].split(":")
faults = [kind]
backward, save = trainer.TrainingEngine.backward, checkpoint.save


def faulty_backward(engine, batch, noise):
    if faults and noise[1] + 1 == int(step) and os.environ["RANK"] == rank:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(600)
        if kind == "nan":
            batch.weights_P.fill_(float("nan"))
        if kind == "terminate":
            # As a cluster does it: every process of the job, the readers too; here all of this rank, once.
            for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
                process.terminate()
            faults.clear()
    return backward(engine, batch, noise)


def faulty_save(engine, output, completed, keep):
    if kind == "kill-in-save" and completed == int(step) and os.environ["RANK"] == rank:
        # After its files are written, before the checkpoint is whole.
        write = engine.save_checkpoint
        engine.save_checkpoint = lambda *args, **kwargs: (write(*args, **kwargs), os.kill(os.getpid(), signal.SIGKILL))
    return save(engine, output, completed, keep)


trainer.TrainingEngine.backward = faulty_backward
checkpoint.save = faulty_save

import icl_moe.training.__main__  # noqa: E402, F401
