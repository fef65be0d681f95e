"""Masks <-> codes: with the image tokenizer, or with a small separate tokenizer whose codes are
black-and-white patches.

The VQ-GAN has about a hundred codes for plain black, and its choice among them is noise that a
decoder cannot predict. The patches have one black code.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.images import mask_to_pixels, pixels_to_brightness
from icl_moe.inputs import read_json
from icl_moe.tokenizers.folder import CONFIG_FILE, WEIGHTS_FILE, find_tokenizer, load_weights
from icl_moe.tokenizers.vqgan import VQGAN

_KIND = "patches"

_COLOURS_C3 = torch.tensor(
    [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)],
    dtype=torch.float32,
)
"""The channels of the colours of painted pictures, white first."""


class MaskTokenizer(Protocol):
    """Encodes boolean masks (B, H, W) as codes_BN of a square grid of cells, row by row, and
    decodes them as brightness_BHW, float32, about -1 (outside) to 1 (inside).
    """

    def encode(self, masks_BHW: np.ndarray) -> np.ndarray: ...

    def decode(self, codes_BN: np.ndarray) -> Tensor: ...

    def decode_expected(self, probabilities_BNK: Tensor) -> Tensor:
        """Decode probabilities of each cell's code instead of codes."""
        ...

    def encode_painted(self, painted_BHW3: np.ndarray) -> np.ndarray:
        """Codes_BN of pictures in corners of the RGB cube, boolean channels, such as several masks
        in different colours on black.
        """
        ...

    def decode_painted(self, codes_BN: np.ndarray) -> Tensor:
        """Pixels_B3HW of pictures that `encode_painted` encoded, float32, about -1 to 1."""
        ...

    def decode_colours(self, probabilities_BNK: Tensor, colours_C3: np.ndarray) -> Tensor:
        """How probable each of these colours is in each pixel of a painted picture, given the
        probabilities of each cell's code: probabilities_BCHW, float32. colours_C3: the boolean
        channels of the colours; black is not one of them.
        """
        ...


class PictureMasks:
    """The image tokenizer applied to masks as pictures, white on black."""

    def __init__(self, tokenizer: VQGAN) -> None:
        self._tokenizer = tokenizer

    @torch.inference_mode()
    def encode(self, masks_BHW: np.ndarray) -> np.ndarray:
        pixels_B3HW = torch.stack([mask_to_pixels(mask_HW) for mask_HW in masks_BHW])
        return self._tokenizer.encode(pixels_B3HW.to(self._device)).cpu().numpy()

    @torch.inference_mode()
    def decode(self, codes_BN: np.ndarray) -> Tensor:
        codes = torch.as_tensor(np.asarray(codes_BN), device=self._device)
        return pixels_to_brightness(self._tokenizer.decode(codes))

    def decode_expected(self, probabilities_BNK: Tensor) -> Tensor:
        """The pixels of the expected code vectors."""
        return pixels_to_brightness(self._tokenizer.decode_expected(probabilities_BNK))

    @torch.inference_mode()
    def encode_painted(self, painted_BHW3: np.ndarray) -> np.ndarray:
        levels_BHW3 = torch.from_numpy(np.asarray(painted_BHW3, dtype=np.float32))
        pixels_B3HW = levels_BHW3.permute(0, 3, 1, 2).contiguous() * 2 - 1
        return self._tokenizer.encode(pixels_B3HW.to(self._device)).cpu().numpy()

    @torch.inference_mode()
    def decode_painted(self, codes_BN: np.ndarray) -> Tensor:
        return self._tokenizer.decode(torch.as_tensor(np.asarray(codes_BN), device=self._device))

    def decode_colours(self, probabilities_BNK: Tensor, colours_C3: np.ndarray) -> Tensor:
        """The brightness of each channel of the expected code vectors' pixels counts as the
        probability that the channel is on, independently of the others.
        """
        pixels_B3HW = self._tokenizer.decode_expected(probabilities_BNK)
        on_B13HW = ((pixels_B3HW + 1) / 2).clamp(0, 1)[:, None]
        is_on_C311 = torch.from_numpy(colours_C3).to(on_B13HW.device)[..., None, None]
        return torch.where(is_on_C311, on_B13HW, 1 - on_B13HW).prod(dim=2)

    @property
    def _device(self) -> torch.device:
        return next(self._tokenizer.parameters()).device


class PatchTokenizer:
    """K patches of P x P pixels, float32 in 0..1, the first one black: a mask's cell is encoded as
    the nearest patch. The expected value of a pixel is exactly the sum over codes c of p(c)
    patch_c. If a vocabulary has more codes than there are patches, the surplus codes are black.

    Painted pictures have codes of their own: patch k > 0 in colour c has 1 + c (K - 1) + (k - 1).
    White is colour 0, so that the codes of white patches are those of masks.
    """

    def __init__(self, patches_KPP: Tensor) -> None:
        self.patches_KPP = patches_KPP.float()

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "PatchTokenizer":
        """The tokenizer in the folder `source`, or the shipped one of that name. Raises InputError
        if it is missing, damaged or of another kind.
        """
        folder = find_tokenizer(source, "mask_tokenizer")
        config = read_json(folder / CONFIG_FILE)
        if not isinstance(config, dict) or config.get("kind") != _KIND:
            raise InputError(
                f"{folder / CONFIG_FILE} is not a mask tokenizer's: it needs the key kind "
                f"({_KIND})."
            )
        patches = load_weights(folder / WEIGHTS_FILE).get("patches", torch.empty(0))
        if not _are_patches(patches):
            raise InputError(
                f"{folder / WEIGHTS_FILE} must hold `patches`: two or more squares of numbers in "
                "0..1, the first one black."
            )
        tokenizer = cls(patches)
        if config.get("fingerprint") != tokenizer.fingerprint:
            raise InputError(
                f"The patches in {folder} are not those of the fingerprint in its {CONFIG_FILE}."
            )
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder, each file completely or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"kind": _KIND, "codes": self.codes, "side": self.side}
        config["fingerprint"] = self.fingerprint
        write_whole(folder / WEIGHTS_FILE, save({"patches": self.patches_KPP.contiguous()}))
        write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")

    @property
    def codes(self) -> int:
        return self.patches_KPP.shape[0]

    @property
    def painted_codes(self) -> int:
        """The number of codes of painted pictures."""
        return 1 + len(_COLOURS_C3) * (self.codes - 1)

    @property
    def side(self) -> int:
        """P, pixels along a side of a cell."""
        return self.patches_KPP.shape[1]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over the patches."""
        digest = hashlib.sha256(str(tuple(self.patches_KPP.shape)).encode())
        digest.update(self.patches_KPP.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def encode(self, masks_BHW: np.ndarray) -> np.ndarray:
        """Raises InputError for masks that do not divide into cells."""
        cells_BNP = mask_cells(np.asarray(masks_BHW, dtype=np.float32), self.side)
        return nearest_patch(cells_BNP, self.patches_KPP.flatten(1).cpu().numpy())

    def decode(self, codes_BN: np.ndarray) -> Tensor:
        codes = torch.as_tensor(np.asarray(codes_BN), device=self.patches_KPP.device)
        return self._assembled(self.patches_KPP.flatten(1)[codes.where(codes < self.codes, 0)])

    def decode_expected(self, probabilities_BNK: Tensor) -> Tensor:
        """The patches' mean, weighted by the probabilities of their codes."""
        patches_KP = self.patches_KPP.flatten(1).to(probabilities_BNK.device)
        return self._assembled(probabilities_BNK[..., : self.codes].float() @ patches_KP)

    def encode_painted(self, painted_BHW3: np.ndarray) -> np.ndarray:
        """The nearest patch in any colour, by the squared distance over all channels. Raises
        InputError as `encode` does.
        """
        patches_KP = self.patches_KPP.flatten(1).cpu().numpy()
        lengths_K = (patches_KP**2).sum(axis=1)
        channels = np.asarray(painted_BHW3, dtype=np.float32)
        cells_3BNP = [mask_cells(channels[..., channel], self.side) for channel in range(3)]
        distances_CBNK = []
        for colour_3 in _COLOURS_C3.numpy():
            lit_BNP = sum(on * cells for on, cells in zip(colour_3, cells_3BNP, strict=True))
            distances_CBNK.append(colour_3.sum() * lengths_K - 2 * lit_BNP @ patches_KP.T)
        # The black patch is the same in all colours and counts once.
        black, rest = (
            distances_CBNK[0][..., :1],
            [distances_BNK[..., 1:] for distances_BNK in distances_CBNK],
        )
        return np.concatenate([black, *rest], axis=-1).argmin(axis=-1)

    def decode_painted(self, codes_BN: np.ndarray) -> Tensor:
        codes = torch.as_tensor(np.asarray(codes_BN), device=self.patches_KPP.device)
        codes = codes.where(codes < self.painted_codes, 0)
        is_lit = codes > 0
        colours = torch.where(is_lit, (codes - 1) // (self.codes - 1), 0)
        patches = torch.where(is_lit, (codes - 1) % (self.codes - 1) + 1, 0)
        levels_BNP = self.patches_KPP.flatten(1)[patches]
        on_BN3 = _COLOURS_C3.to(levels_BNP.device)[colours]
        planes = [self._assembled(levels_BNP * on_BN3[..., channel, None]) for channel in range(3)]
        return torch.stack(planes, dim=1)

    def decode_colours(self, probabilities_BNK: Tensor, colours_C3: np.ndarray) -> Tensor:
        """The patches' mean in each colour alone, weighted by the probabilities of their codes."""
        patches_KP = self.patches_KPP.flatten(1)[1:].to(probabilities_BNK.device)
        lit_BNCK = probabilities_BNK[..., 1 : self.painted_codes].float()
        levels_BNCP = lit_BNCK.unflatten(2, (len(_COLOURS_C3), -1)) @ patches_KP
        known = [tuple(colour) for colour in (_COLOURS_C3 > 0).tolist()]
        places = [known.index(tuple(colour)) for colour in colours_C3.tolist()]
        planes = [self._assembled(levels_BNCP[:, :, place]) for place in places]
        return (torch.stack(planes, dim=1) + 1) / 2

    def _assembled(self, levels_BNP: Tensor) -> Tensor:
        """brightness_BHW from the cells' levels in 0..1."""
        grid, side = math.isqrt(levels_BNP.shape[1]), self.side
        cells = levels_BNP.unflatten(2, (side, side)).unflatten(1, (grid, grid))
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2) * 2 - 1


def mask_cells(masks_BHW: np.ndarray, side: int) -> np.ndarray:
    """The cells of masks, (B, N, P^2) row by row. Raises InputError if the sides are not multiples
    of `side`.
    """
    count, height, width = masks_BHW.shape
    if height % side or width % side:
        raise InputError(
            f"Masks of {height} x {width} pixels do not divide into cells of {side} x {side}."
        )
    grid = masks_BHW.reshape(count, height // side, side, width // side, side)
    return grid.transpose(0, 1, 3, 2, 4).reshape(count, -1, side * side)


def nearest_patch(cells_BNP: np.ndarray, patches_KP: np.ndarray) -> np.ndarray:
    """The nearest patch to each cell by squared distance, codes_BN; the first one in a tie."""
    distances = (patches_KP**2).sum(axis=1) - 2 * cells_BNP @ patches_KP.T
    return distances.argmin(axis=-1)


def _are_patches(patches: Tensor) -> bool:
    if patches.dim() != 3 or not patches.is_floating_point() or len(patches) < 2:
        return False
    square = patches.shape[1] == patches.shape[2] > 0
    return square and bool(((patches >= 0) & (patches <= 1)).all()) and not patches[0].any()
