"""Messages of a command to its user, besides its results: lines that begin with the program's
name.
"""

import contextlib
import os
import sys


def say(what: str, machine: str | None = None) -> None:
    """Write a line to standard error. machine: the name of this machine, if it is not that of rank
    0. A closed terminal is not an error.
    """
    with contextlib.suppress(OSError):
        where = "" if machine is None else f"{machine}: "
        print(f"{where}icl-moe: {_printable(what)}", file=sys.stderr, flush=True)


def say_on_main(what: str) -> None:
    """`say` on rank 0, or without a launcher."""
    if is_main():
        say(what)


def note(what: str) -> None:
    """Write a line to standard output, between the lines of progress and above a progress bar."""
    from tqdm import tqdm  # Imported here because signals must be handled before this slow import.

    tqdm.write(f"icl-moe: {_printable(what)}")


def is_main() -> bool:
    """Whether this process is rank 0 of a launcher, or has none."""
    return os.environ.get("RANK", "0") == "0"


def _printable(what: str) -> str:
    """A message whose control characters are escaped, except for the ends of lines: the names of
    files may have any, and a terminal would obey them.
    """
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in what
    )
