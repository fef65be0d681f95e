"""Readers that are started as new programs instead of forked, the default of Python 3.14."""

import os

import pytest


@pytest.mark.slow
def test_the_script_trains_with_readers_that_are_not_forked(train, repository, tmp_path):
    """A reader that is not forked runs the script of its rank again, which must not train a second
    time.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('forkserver')\n"
    )
    folders = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    printed = train(
        tmp_path / "run",
        "training.steps=2",
        "training.dry_run=false",
        script=(str(repository / "launch_scripts/pretrain.sh"),),
        PYTHONPATH=os.pathsep.join(folders),
    )
    assert printed.count("step 2/2") == 1
