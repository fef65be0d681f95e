"""Writing files whole: under a temporary name, then renamed, so that no reader ever sees half of
one.
"""

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `path` (text as UTF-8), replacing what was there, or leave it as it was."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # A full disk needs the room.
        raise
