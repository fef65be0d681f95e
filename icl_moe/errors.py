"""The one exception that means "the input is wrong", so that the command line can tell it from a
bug of ours.
"""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one sentence that names the file, key or line and says what would be right. The
    command line prints it alone and exits with code 2; every other exception keeps its traceback.
    """


class RankError(InputError):
    """What one rank alone may find, so that rank says it, whichever it is."""


class SampleError(RankError):
    """A sample cannot be read: only the rank whose turn it is finds that."""
