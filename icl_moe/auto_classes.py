"""Registers the decoder with transformers' Auto classes when this package is imported, without
loading transformers or torch, so that the command line's --help does not wait for them.

    import icl_moe
    from transformers import AutoModel

    decoder = AutoModel.from_pretrained("exported")
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.models.auto.modeling_auto"
_DECODER = "icl_moe.model.decoder"  # This module registers the decoder at its end.


def register_when_loaded() -> None:
    """Register the decoder with transformers' Auto classes: now if they are loaded, otherwise as
    soon as they are.
    """
    if _AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    # If the decoder's module is being imported, it registers the decoder itself at its end.
    if _DECODER not in sys.modules:
        importlib.import_module(_DECODER)


class _Watcher(importlib.abc.MetaPathFinder):
    """Reacts to the first import of the Auto classes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            vars(spec.loader)["exec_module"] = load_and_register
        return spec
