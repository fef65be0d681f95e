"""Training as a program: `python -m icl_moe.training [RECIPE] [key=value ...]`, alone or under a
launcher.

Importing this module runs it: the Python half of launch_scripts/pretrain.sh is bare imports.
"""

import sys

from icl_moe.cli import main
from icl_moe.signals import listen

# To the very end: the launcher's signal may come when this rank has saved and is about to end.
listen()
# The launcher puts --local_rank=i first; ranks read their number from the environment.
_arguments = [
    argument
    for argument in sys.argv[1:]
    if not argument.startswith(("--local_rank", "--local-rank"))
]
if not _arguments or "=" in _arguments[0]:
    _arguments.insert(0, "paper_256")
sys.exit(main(["train", *_arguments]))
