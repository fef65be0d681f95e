"""The codes of pictures that earlier builds encoded, by the pictures' content.

A key is a digest of the pixels that the tokenizer sees, so neither names nor times of files matter.
The rest that codes depend on, the tokenizer and the arithmetic, selects a subfolder. A file in it
holds the keys and the codes of a chunk and is never changed; its name is a digest of its content:

    DIR/SETTINGS/about.json     what the digest SETTINGS is of
    DIR/SETTINGS/CONTENT.npy    rows of a key and its codes

Any number of builds may read and write at once: they write the same codes under the same key.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icl_moe.files import write_whole
from icl_moe.messages import say
from icl_moe.outputs import writing

_KEY_BYTES = 16
_ABOUT = "about.json"

_OLD = 24 * 3600.0
"""Seconds after which a file that is not whole counts as left behind."""

_ARITHMETIC_VARIABLES = ("ATEN_", "CUBLAS_", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_TF32", "ONEDNN_")
"""Environment variables that begin so may change how a library rounds."""


class CodeCache:
    """The codes of one tokenizer in the folder `parent`, under `settings`, which say all that codes
    depend on besides the picture.

    Finds what was there when it was opened. A damaged file is reported and not used. Raises
    InputError if the folder cannot be written.
    """

    def __init__(self, parent: Path, settings: Mapping[str, Any]) -> None:
        about = json.dumps(settings, indent=1, sort_keys=True)
        self._folder = parent / _digest(about.encode())
        with writing(parent):
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._folder)
            if not (self._folder / _ABOUT).is_file():
                _write(self._folder / _ABOUT, about.encode())
        self._files = sorted(self._folder.glob("*.npy"))
        keys = [_read_keys(file) for file in self._files]
        counts = [len(of_file) for of_file in keys]
        all_keys = np.concatenate(keys) if keys else np.empty(0, _key_type())
        order = np.argsort(all_keys, kind="stable")
        # Arrays, since worker processes share their memory, which they would not do with a dict.
        self._keys = all_keys[order]
        self._file_of = np.repeat(np.arange(len(counts)), counts)[order]
        self._row_of = np.concatenate([np.arange(0), *map(np.arange, counts)])[order]

    def find(self, key: bytes) -> np.ndarray | None:
        """The codes (N,) of the picture with this key; None if they are not there."""
        wanted = np.frombuffer(key, _key_type())[0]
        place = int(np.searchsorted(self._keys, wanted))
        if place == len(self._keys) or self._keys[place] != wanted:
            return None
        try:
            rows = _open_rows(self._files[self._file_of[place]])
        except OSError:  # Somebody has emptied the cache meanwhile.
            return None
        return np.array(rows["codes"][self._row_of[place]])

    def add(self, codes: Mapping[bytes, np.ndarray]) -> None:
        """Keep codes (N,) by their keys for later builds."""
        codes_BN = np.stack(list(codes.values()))
        type_of_rows = [("key", _key_type()), ("codes", codes_BN.dtype, codes_BN.shape[1:])]
        rows = np.empty(len(codes_BN), np.dtype(type_of_rows))
        rows["key"] = np.frombuffer(b"".join(codes), _key_type())
        rows["codes"] = codes_BN
        content = io.BytesIO()
        np.save(content, rows, allow_pickle=False)
        with writing(self._folder.parent):
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(self._folder / f"{_digest(content.getvalue())}.npy", content.getvalue())


def key_of(picture: np.ndarray) -> bytes:
    """The key of a picture as it was drawn, uint8 (H, W, 3), or boolean (H, W) for a mask."""
    digest = hashlib.blake2b(f"{picture.dtype} {picture.shape}".encode(), digest_size=_KEY_BYTES)
    digest.update(np.ascontiguousarray(picture).data)
    return digest.digest()


def arithmetic(device: torch.device) -> dict[str, Any]:
    """All besides weights and pixels that may change the rounding on a device: libraries, processor
    and settings.
    """
    about: dict[str, Any] = {
        "torch": torch.__version__,
        "device": device.type,
        "variables": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_ARITHMETIC_VARIABLES)
        },
    }
    if device.type == "cuda":
        return about | {
            "name": torch.cuda.get_device_name(device),
            "cudnn": torch.backends.cudnn.version(),
            "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        }
    return about | {
        "name": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's model, as Linux names it; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _key_type() -> np.dtype:
    return np.dtype(f"S{_KEY_BYTES}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read_keys(file: Path) -> np.ndarray:
    """The keys of a file. If its content does not match its name, there is a message and no key."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:  # Somebody has just emptied the cache.
        return np.empty(0, _key_type())
    if _digest(content) != file.stem:
        say(f"warning: the file {file} of the codes cache is damaged and is not used; delete it.")
        return np.empty(0, _key_type())
    return np.load(io.BytesIO(content), allow_pickle=False)["key"]


@lru_cache(maxsize=64)  # The pictures of a chunk come again in nearly the same order.
def _open_rows(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _write(path: Path, content: bytes) -> None:
    """Write a file as a whole, under a temporary name of this process: others may write it too."""
    own = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.partial")
    write_whole(path, content, own)


def _remove_leftovers(folder: Path) -> None:
    """Remove what builds that were killed have left. Builds that still run write a file within
    seconds.
    """
    for partial in folder.glob("*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _OLD:
                partial.unlink()
