"""What a command says to the person who runs it, beside its results: lines that begin with the
program's name.
"""

import contextlib
import os
import sys


def say(what: str, machine: str | None = None) -> None:
    """Write a line to standard error. machine: the name of this machine, where the line comes from
    another one than rank 0's. A terminal that is gone is no reason to fail.
    """
    with contextlib.suppress(OSError):
        where = "" if machine is None else f"{machine}: "
        print(f"{where}icl-moe: {what}", file=sys.stderr, flush=True)


def say_on_main(what: str) -> None:
    """`say` on rank 0, or where there is no launcher."""
    if is_main():
        say(what)


def note(what: str) -> None:
    """Write a line to standard output, between the lines of progress and above a progress bar."""
    from tqdm import tqdm  # Imported here: a request to stop must be heard before that is done.

    tqdm.write(f"icl-moe: {what}")


def is_main() -> bool:
    """Whether this process is rank 0 of a launcher, or has none."""
    return os.environ.get("RANK", "0") == "0"
