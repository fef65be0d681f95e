"""The one exception that means "the input is wrong", so that the command line can tell it from a
bug of ours.
"""

import reprlib
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one sentence that names the file, key or line and says what would be right. The
    command line prints it alone and exits with code 2; every other exception keeps its traceback.
    """


class RankError(InputError):
    """What one rank alone may find, so that rank says it, whichever it is."""


class SampleError(RankError):
    """A sample cannot be read: only the rank whose turn it is finds that."""


_short = reprlib.Repr()
_short.maxstring, _short.maxother, _short.maxlong = 120, 120, 40


def shown(value: Any) -> str:
    """A value of the user's as a message shows it: cut where it is long."""
    return _short.repr(value)
