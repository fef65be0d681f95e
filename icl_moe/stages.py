"""The stages of the pipeline as commands that a user would type, each run in processes of its own.

Every stage resumes where it was stopped, and does nothing where it is done already, so a sequence
of them can be run again at any time.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from icl_moe.errors import InputError
from icl_moe.launcher import free_port

ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Variables for several ranks on the cores of one machine: one thread for each rank, since more
would compete for the cores; and the launcher need not look for accelerators.
"""


@dataclass(frozen=True)
class Command:
    """One stage. shown: as a user types it. program: what the interpreter runs; under a launcher
    (`launched`) without the port, which is chosen when it starts, since another run on this machine
    may use the launcher's default. environment: variables that are set unless they are already.
    """

    shown: tuple[str, ...]
    program: tuple[str, ...]
    launched: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.shown)

    def run(self) -> None:
        """Print the command and run it. Raises InputError, which names it, if it fails."""
        print(f"$ {self}", flush=True)
        port = ("--master_port", str(free_port())) if self.launched else ()
        module, *arguments = self.program
        words = [sys.executable, "-m", module, *port, *arguments]
        environment = {**self.environment, **os.environ}
        code = subprocess.run(words, env=environment, check=False).returncode
        if code:
            raise InputError(
                f"`{self}` ended with exit code {code}. Once its cause is mended, the same command "
                "as before resumes from there."
            )


def verb(*arguments: str | Path, environment: Mapping[str, str] = ON_CPU) -> Command:
    """One verb of the command line."""
    words = tuple(map(str, arguments))
    return Command(("icl-moe", *words), ("icl_moe", *words), environment=environment)


def launch(ranks: int | None, *arguments: str, environment: Mapping[str, str] = ON_CPU) -> Command:
    """Training under the deepspeed launcher on `ranks` devices of this machine, or on all that the
    launcher finds (None). arguments: the recipe and its overrides.
    """
    number = () if ranks is None else ("--num_gpus", str(ranks))
    return Command(
        ("deepspeed", *number, "launch_scripts/pretrain.sh", *arguments),
        ("deepspeed.launcher.runner", *number, "--module", "icl_moe.training", *arguments),
        launched=True,
        environment=environment,
    )
