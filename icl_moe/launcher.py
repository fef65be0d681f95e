"""What a process is told by its launcher (DeepSpeed's, torchrun or accelerate), in the variables
that torch.distributed defines; and a port for a launcher. Imports nothing that takes time.
"""

import os
import socket


def launched_ranks() -> int:
    """How many ranks the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_of_this_machine() -> int:
    """How many of them it started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
