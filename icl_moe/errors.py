"""Exceptions that are not bugs in this code, so that the command line can tell the two apart: the
input is wrong, or a result could not be saved.
"""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """The user's input cannot be used.

    The message is one sentence that names the file, key or line and says what would be right. The
    command line prints it alone and exits with code 2. Every other exception but `UnsavedError`
    and `StoppedError` keeps its traceback.
    """


class RankError(InputError):
    """An input error that only one rank can detect; that rank prints it, even if it is not rank
    0.
    """


class SampleError(RankError):
    """A sample cannot be read, which only the rank that reads it can detect."""


class UnsavedError(Exception):
    """A run ended and its last steps are in no checkpoint, although the input was right.

    The message is one sentence that says what is lost. The command line prints it alone and exits
    with code 1. All ranks raise it together.
    """


class StoppedError(Exception):
    """A signal asked a sequence of stages to stop, and its stage has ended. number: of the signal.

    The message is one sentence. The command line prints it alone and exits with 128 + `number`.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown name: " (did you mean 'NAME'?)", or an empty string if
    no known name is similar.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{prefix}{matches[0]}'?)" if matches else ""


_short = reprlib.Repr()
_short.maxstring, _short.maxother, _short.maxlong = 120, 120, 40


def shown(value: Any) -> str:
    """A value from the user as a message shows it, shortened if it is long."""
    return _short.repr(value)
