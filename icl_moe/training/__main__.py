"""Training as a program: `python -m icl_moe.training [RECIPE] [key=value ...]`, alone or under a
launcher.

Importing this module runs it, because the Python half of launch_scripts/pretrain.sh consists of
imports only.
"""

import sys

from icl_moe.cli import main
from icl_moe.signals import is_program, listen


def _run() -> int:
    # The launcher puts --local_rank=i first; ranks read their number from the environment.
    arguments = [
        argument
        for argument in sys.argv[1:]
        if not argument.startswith(("--local_rank", "--local-rank"))
    ]
    if not arguments or "=" in arguments[0]:
        arguments.insert(0, "paper_256")
    return main(["train", *arguments])


if is_program():
    # Until the very end: the launcher's signal may arrive when this rank has saved and is about to
    # end.
    listen()
    sys.exit(_run())
