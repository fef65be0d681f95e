"""Runs a command as the leader of its process group, and kills the whole group if the process that
started it is killed: `python -m icl_moe.guard PID COMMAND ...`, PID being that process.

Only children can ask to be told of their parent's death, and a command such as a launcher does not
ask; therefore this process stands between. Requests to stop are for the command, which receives
them as a member of the group; this process waits for its end, and ends with its exit code.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from icl_moe.signals import STOPPING, signal_at_death_of

_ABANDONED = signal.SIGUSR1


def _guard(parent: int, words: Sequence[str]) -> int:
    # Handlers, since the command would inherit that a signal is ignored.
    for number in STOPPING:
        signal.signal(number, _leave_to_the_command)
    signal.signal(_ABANDONED, _kill_group)
    signal_at_death_of(parent, _ABANDONED)
    code = subprocess.run(words, check=False).returncode
    return code if code >= 0 else 128 - code


def _leave_to_the_command(number: int, _: FrameType | None) -> None:
    pass


def _kill_group(number: int, _: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), sys.argv[2:]))
