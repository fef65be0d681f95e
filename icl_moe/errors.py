"""The exceptions that are no bugs of ours, so that the command line can tell them from those: the
input is wrong, or what was computed could not be kept.
"""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one sentence that names the file, key or line and says what would be right. The
    command line prints it alone and exits with code 2. Every other exception but `UnsavedError`
    keeps its traceback.
    """


class RankError(InputError):
    """What one rank alone may find, so that rank says it, whichever it is."""


class SampleError(RankError):
    """A sample cannot be read: only the rank whose turn it is finds that."""


class UnsavedError(Exception):
    """A run ended, and its last steps are in no checkpoint, though the input was right.

    The message is one sentence that says what is lost. The command line prints it alone and exits
    with code 1. All ranks raise it together.
    """
