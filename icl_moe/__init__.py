"""Multimodal in-context learning with a sparse decoder."""

from typing import TYPE_CHECKING, Any

from icl_moe.auto_classes import register_when_loaded

if TYPE_CHECKING:
    from icl_moe.inference.model import InContextModel

__all__ = ["InContextModel", "__version__"]

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line's --help does not wait for torch.
    if name == "InContextModel":
        from icl_moe.inference.model import InContextModel

        return InContextModel
    raise AttributeError(f"module 'icl_moe' has no attribute '{name}'")


register_when_loaded()
