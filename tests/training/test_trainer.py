"""The trainer from Python: a run can be started, inspected and resumed."""

import json
import sys
from typing import Any

from small_run import RANK_VARIABLES, SETTINGS
from torch import distributed as dist

from icl_moe.training.distributed import process_group

PROGRAM = """
import json, os, sys
from icl_moe.errors import InputError
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.training.trainer import Trainer

shards, output, *settings = sys.argv[1:]
settings += [f"data.shards={shards}", f"training.output={output}", "training.steps=2"]
try:
    Trainer(load_recipe(TrainingRecipe, "demo", [*settings, "training.global_batch=3000"]))
except InputError as error:
    refusal = str(error)
trainer = Trainer(load_recipe(TrainingRecipe, "demo", [*settings, "training.stop_after=1"]))
began = trainer.state.step
first = trainer.fit().step
print(json.dumps([refusal, began, first, trainer.state.skipped, list(os.environ)]))
"""


def test_a_trainer_runs_from_python_and_knows_its_state(command, shards, tmp_path):
    done = command(sys.executable, "-c", PROGRAM, shards, tmp_path / "run", *SETTINGS)
    assert done.returncode == 0, done.stdout
    refusal, began, first, skipped, variables = json.loads(done.stdout.splitlines()[-1])
    assert "training.global_batch" in refusal
    assert (began, first, skipped) == (0, 1, 0)
    assert (tmp_path / "run/checkpoints/step-00000001/complete.json").is_file()
    # A command that the program starts now must not act as a rank of the run.
    assert not set(variables) & set(RANK_VARIABLES)


def join_again(place: Any) -> None:
    with process_group() as again:
        assert again == place
    assert dist.is_initialized()


def test_a_group_that_the_process_is_in_already_is_used_and_stays(rank_group):
    rank_group(2).run(join_again)
