"""A pickle that runs code when it is loaded, to test that loaders refuse such files."""

import os
from typing import Any

MARK = "hostile_was_here"


class Hostile:
    """Unpickling an instance creates the file `MARK` in the current directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)
