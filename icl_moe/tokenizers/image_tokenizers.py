"""The image tokenizers of a data set or a model: one to three, which must have cells of the same
size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from icl_moe.errors import InputError
from icl_moe.tokenizers.features import FeaturesTokenizer
from icl_moe.tokenizers.masks import MaskTokenizer, PatchTokenizer, PictureMasks
from icl_moe.tokenizers.vqgan import VQGAN
from icl_moe.vocabulary import Vocabulary, smallest_type

Part = Literal["pictures", "masks", "painted", "features"]


@dataclass(frozen=True)
class ImageTokenizers:
    """The tokenizers of a model. pictures: the VQ-GAN, which encodes everything that the other two
    do not. masks: the tokenizer of masks and drawn boxes. features: the tokenizer of input images.
    Each may be None.

    Raises InputError if no tokenizer can encode input images or masks, or if their cells differ.
    """

    pictures: VQGAN | None
    masks: PatchTokenizer | None = None
    features: FeaturesTokenizer | None = None

    def __post_init__(self) -> None:
        if self.pictures is None and None in (self.masks, self.features):
            raise InputError(
                "Without an image tokenizer, a mask tokenizer and a features tokenizer are "
                "required: both images and masks need a tokenizer."
            )
        first, *others = self._cells.items()
        for name, width in others:
            if width != first[1]:
                raise InputError(
                    f"The {name} has cells of {width} pixels, but the {first[0]} of {first[1]}; "
                    "they must be equal."
                )

    @classmethod
    def from_folders(cls, folders: Mapping[str, Path]) -> "ImageTokenizers":
        """Load the tokenizers from the folders with these names, which shards and models use:
        image_tokenizer, mask_tokenizer and features_tokenizer. Other names are ignored.
        """
        image, masks, features = (
            folders.get(f"{name}_tokenizer") for name in ("image", "mask", "features")
        )
        return cls(
            None if image is None else VQGAN.from_pretrained(image),
            None if masks is None else PatchTokenizer.from_pretrained(masks),
            None if features is None else FeaturesTokenizer.from_pretrained(features),
        )

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Folder name -> fingerprint, None for a missing tokenizer."""
        return {
            "image_tokenizer": self.pictures.fingerprint if self.pictures else None,
            "mask_tokenizer": self.masks.fingerprint if self.masks else None,
            "features_tokenizer": self.features.fingerprint if self.features else None,
        }

    def features_unlike(self, vocabulary: Vocabulary) -> str | None:
        """How a vocabulary's features codes differ from those of the features tokenizer; None if
        they do not.
        """
        config = self.features.config if self.features else None
        for key, ours, theirs in (
            ("features", vocabulary.features, config.codebook_size if config else 0),
            ("feature_stages", vocabulary.feature_stages, config.stages if config else 1),
        ):
            if ours != theirs:
                return f"vocabulary.{key} is {ours}, and that of the features tokenizer is {theirs}"
        return None

    @property
    def picture_codes(self) -> int:
        """The number of codes of the VQ-GAN."""
        return self._pictures.codebook_size

    @property
    def downsampling(self) -> int:
        """Pixels along a side of a cell."""
        return next(iter(self._cells.values()))

    @property
    def _cells(self) -> dict[str, int]:
        widths = {
            "image tokenizer": self.pictures.downsampling if self.pictures else None,
            "mask tokenizer": self.masks.side if self.masks else None,
            "features tokenizer": self.features.downsampling if self.features else None,
        }
        return {name: width for name, width in widths.items() if width is not None}

    def save(self, folder: Path) -> None:
        """Write each into its own folder within `folder`."""
        for name, tokenizer in (
            ("image_tokenizer", self.pictures),
            ("mask_tokenizer", self.masks),
            ("features_tokenizer", self.features),
        ):
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / name)

    def to(self, device: str | torch.device) -> "ImageTokenizers":
        for tokenizer in (self.pictures, self.features):
            if tokenizer is not None:
                tokenizer.to(device).eval()
        return self

    @cached_property
    def mask_writer(self) -> MaskTokenizer:
        """The tokenizer that encodes and decodes masks."""
        return self.masks or PictureMasks(self._pictures)

    def read(self, pixels_B3HW: Tensor) -> np.ndarray:
        """codes_BN of input images, pixels in [-1, 1]."""
        return (self.features or self._pictures).encode(pixels_B3HW).cpu().numpy()

    @property
    def can_mirror(self) -> bool:
        """Whether the codes of a mirrored image are known without reading it. A feature tells what
        a cell shows, whichever way round; a VQ-GAN's code draws a cell one way round.
        """
        return self.features is not None

    def mirror_inputs(self, codes_BN: np.ndarray) -> np.ndarray:
        """The codes of input images as if they were mirrored, left for right: the same features in
        mirrored places.
        """
        side = math.isqrt(codes_BN.shape[-1])
        grid_Bhw = codes_BN.reshape(*codes_BN.shape[:-1], side, side)
        return np.ascontiguousarray(grid_Bhw[..., ::-1]).reshape(codes_BN.shape)

    def mirror_masks(self, codes_BN: np.ndarray) -> np.ndarray:
        """The codes of masks, mirrored in the same way."""
        inside_BHW = (self.mask_writer.decode(codes_BN) > 0).cpu().numpy()
        return self.mask_writer.encode(np.ascontiguousarray(inside_BHW[..., ::-1]))

    def decode(self, codes_BN: Tensor) -> Tensor:
        """The pixels of image codes, (B, 3, H, W), float32 in [-1, 1] or a little beyond."""
        return self._pictures.decode(codes_BN).float()

    def show(self, codes_BN: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), about [-1, 1], to display for the codes of input images. Features
        codes cannot be decoded, so their mean colours are shown.
        """
        return self.features.show(codes_BN) if self.features else self.decode(codes_BN)

    @torch.inference_mode()
    def encode(
        self, drawn: Sequence[np.ndarray], are_inputs: Sequence[bool], device: torch.device
    ) -> np.ndarray:
        """codes_BN of a batch of pictures of one size, each uint8 (H, W, 3), or boolean (H, W) for
        a mask or (H, W, 3) for several in colours; some may be input images.
        """
        groups: dict[Part, list[int]] = {}
        for number, (picture, is_input) in enumerate(zip(drawn, are_inputs, strict=True)):
            groups.setdefault(self.part_for(picture, is_input), []).append(number)
        codes: dict[int, np.ndarray] = {}
        for part, numbers in groups.items():
            pictures = [drawn[number] for number in numbers]
            if part == "masks":
                found = self.mask_writer.encode(np.stack(pictures))
            elif part == "painted":
                found = self.mask_writer.encode_painted(np.stack(pictures))
            elif part == "features":
                found = self.read(_pixels(pictures, device))
            else:
                found = self._pictures.encode(_pixels(pictures, device)).cpu().numpy()
            codes |= zip(numbers, found, strict=True)
        codes_BN = np.stack([codes[number] for number in range(len(drawn))])
        return codes_BN.astype(self.code_type)

    @property
    def code_type(self) -> np.dtype:
        """The smallest type that holds the codes of all tokenizers."""
        counts = [
            self.pictures.codebook_size if self.pictures else 0,
            self.features.codes if self.features else 0,
            self.masks.painted_codes if self.masks else 0,
        ]
        return smallest_type(max(counts))

    def part_for(self, picture: np.ndarray, is_input: bool) -> Part:
        """The tokenizer that encodes a picture, drawn as for `encode`."""
        if is_input and self.features is not None:
            return "features"
        if picture.dtype == bool and self.masks is not None:
            return "masks" if picture.ndim == 2 else "painted"
        return "pictures"

    @property
    def _pictures(self) -> VQGAN:
        if self.pictures is None:
            raise InputError(
                "Pictures that are neither masks nor input images need an image tokenizer, and "
                "there is none; set a VQ-GAN as the tokenizer."
            )
        return self.pictures


def _pixels(pictures: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Pictures as pixels_B3HW in [-1, 1]; masks become white on black."""
    levels = [picture * np.uint8(255) if picture.dtype == bool else picture for picture in pictures]
    coloured = [
        np.broadcast_to(picture[..., None], (*picture.shape, 3)) if picture.ndim == 2 else picture
        for picture in levels
    ]
    pixels_BHW3 = torch.from_numpy(np.stack(coloured)).to(device)
    return (pixels_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous()
