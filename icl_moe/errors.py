"""The one exception that means "the input is wrong", so that the command line can tell it from a
bug of ours.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one sentence that names the file, key or line and says what would be right. The
    command line prints it alone and exits with code 2; every other exception keeps its traceback.
    """


class RankError(InputError):
    """An input error that only one rank can detect; that rank prints it, even if it is not rank
    0.
    """


class SampleError(RankError):
    """A sample cannot be read: only the rank whose turn it is finds that."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown name: " (did you mean 'NAME'?)", or nothing where no
    known name is near.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{prefix}{matches[0]}'?)" if matches else ""
