"""Measures an image tokenizer: fidelity, use of its codes, and the mask ceiling."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from icl_moe.devices import Device, find_device, find_dtype
from icl_moe.images import (
    crop_and_resize,
    crop_and_resize_mask,
    load_image,
    mask_to_pixels,
    middle_square,
    pixels_to_mask,
    to_pixels,
)
from icl_moe.tokenizers.vqgan import VQGAN, Precision
from preprocessing.tokenizers.samples import ClassMasks, image_files


def evaluate_tokenizer(
    folder: str | Path,
    images: Path,
    annotations: Path | None = None,
    batch_size: int = 32,
    device: Device | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Measure the tokenizer `folder` (or a shipped one by name) on the pictures in `images`, as
    plain values.

    Each picture's short side is resized to the tokenizer's image size and its middle square is
    taken. The result holds the means over pictures of PSNR and SSIM, and the share and perplexity
    of the codes over the whole set. With `annotations`, a COCO instances file, also the mask
    ceiling: each class mask of a picture is drawn white on black, encoded, decoded and thresholded;
    mask_miou is the mean over classes of (sum of a class's intersections with the original masks) /
    (sum of its unions), mask_iou the mean over masks of intersection / union, mask_mae the mean
    share of wrong pixels. By size: mask_iou for COCO's small, medium and large masks, separated at
    32^2 and 96^2 pixels of the whole mask in the original picture.

    device: by default a GPU if there is one. dtype: float32, or bfloat16, which then computes as
    `VQGAN.from_pretrained(precision="bf16")` does. Memory does not grow with the number of
    pictures. Raises InputError for an unknown device or dtype, a folder without pictures, an
    unreadable picture, annotations that are not in COCO's format, and a picture whose size
    disagrees with its record.
    """
    precision: Precision = "bf16" if find_dtype(dtype) is torch.bfloat16 else "fp32"
    place = find_device(device)
    tokenizer = VQGAN.from_pretrained(folder, precision).to(place)
    truth = ClassMasks(Path(annotations)) if annotations else None
    measures = _Measures(tokenizer, batch_size)
    for file in tqdm(image_files(Path(images)), desc="measuring", unit="image", disable=None):
        image = load_image(file)
        box, size = middle_square(image.size), tokenizer.config.image_size
        measures.add_picture(to_pixels(crop_and_resize(image, box, size)))
        for category, mask_HW in truth.of(file.name, image.size).items() if truth else ():
            measures.add_mask(
                crop_and_resize_mask(mask_HW, box, size), category, int(mask_HW.sum())
            )
    return measures.report()


class _Measures:
    """Collects pictures and masks into batches and accumulates the measures of
    `evaluate_tokenizer`.
    """

    def __init__(self, tokenizer: VQGAN, batch_size: int) -> None:
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._pictures: list[Tensor] = []
        self._masks: list[tuple[np.ndarray, int, str]] = []
        self._use_K = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64)
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._iou: dict[str, list[float]] = {"small": [], "medium": [], "large": []}
        self._wrong: list[float] = []
        # The pixels of the intersection and of the union of each class.
        self._by_class: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))

    def add_picture(self, pixels_3HW: Tensor) -> None:
        self._pictures.append(pixels_3HW)
        if len(self._pictures) == self._batch_size:
            self._measure_pictures()

    def add_mask(self, mask_HW: np.ndarray, category: int, area: int) -> None:
        """Count a mask, unless the crop leaves it empty. area: the area of the whole mask in the
        original picture.
        """
        if mask_HW.any():
            self._masks.append(
                (
                    mask_HW,
                    category,
                    "small" if area < 32**2 else "medium" if area < 96**2 else "large",
                )
            )
        if len(self._masks) == self._batch_size:
            self._measure_masks()

    def report(self) -> dict[str, Any]:
        if self._pictures:
            self._measure_pictures()
        if self._masks:
            self._measure_masks()
        report: dict[str, Any] = {
            "tokenizer": self._tokenizer.fingerprint,
            "pictures": len(self._psnr),
            "psnr": float(np.mean(self._psnr)),
            "ssim": float(np.mean(self._ssim)),
            "codes_used": float((self._use_K > 0).double().mean()),
            "perplexity": float(perplexity(self._use_K)),
        }
        if self._wrong:
            ious = [iou for group in self._iou.values() for iou in group]
            per_class = [intersection / union for intersection, union in self._by_class.values()]
            report |= {
                "masks": len(ious),
                "mask_miou": float(np.mean(per_class)),
                "mask_iou": float(np.mean(ious)),
            }
            report["mask_mae"] = float(np.mean(self._wrong))
            for name, group in self._iou.items():
                report |= {
                    f"masks_{name}": len(group),
                    f"mask_iou_{name}": float(np.mean(group)) if group else None,
                }
        return report

    def _measure_pictures(self) -> None:
        given_B3HW = torch.stack(self._pictures)
        drawn_B3HW = self._redraw(given_B3HW)
        self._psnr += psnr_B(drawn_B3HW, given_B3HW).tolist()
        drawn, given = (drawn_B3HW.double() + 1) / 2, (given_B3HW.double() + 1) / 2
        ssim_B = structural_similarity_index_measure(drawn, given, data_range=1.0, reduction="none")
        assert isinstance(ssim_B, Tensor)
        self._ssim += ssim_B.reshape(
            -1
        ).tolist()  # for a single picture the result lacks the batch axis
        self._pictures.clear()

    def _measure_masks(self) -> None:
        drawn_BHW = pixels_to_mask(
            self._redraw(torch.stack([mask_to_pixels(mask) for mask, _, _ in self._masks]))
        )
        for (mask_HW, category, size), drawn_HW in zip(self._masks, drawn_BHW, strict=True):
            pixels = np.array([(mask_HW & drawn_HW).sum(), (mask_HW | drawn_HW).sum()])
            self._by_class[category] += pixels
            self._iou[size].append(float(pixels[0] / pixels[1]))
            self._wrong.append(float((mask_HW != drawn_HW).mean()))
        self._masks.clear()

    def _redraw(self, pixels_B3HW: Tensor) -> Tensor:
        drawn_B3HW, codes_BN = through(self._tokenizer, pixels_B3HW)
        self._use_K += torch.bincount(codes_BN.flatten(), minlength=len(self._use_K))
        return drawn_B3HW


def through(tokenizer: VQGAN, pixels_B3HW: Tensor, at_once: int = 16) -> tuple[Tensor, Tensor]:
    """The tokenizer's reconstructions of pictures, clipped to [-1, 1], and their codes_BN, both on
    the CPU. Computed `at_once` at a time to save memory.
    """
    device = next(tokenizer.parameters()).device
    drawn, codes = [], []
    for some in pixels_B3HW.split(at_once):
        codes.append(tokenizer.encode(some.to(device)))
        drawn.append(tokenizer.decode(codes[-1]).clamp(-1, 1).cpu())
    return torch.cat(drawn), torch.cat(codes).cpu()


def psnr_B(drawn_B3HW: Tensor, pixels_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in decibels, on 8-bit levels: 10 log10(255^2 /
    mean squared error).
    """
    error_B = ((drawn_B3HW - pixels_B3HW) * 127.5).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error_B.clamp_min(1e-4))


def perplexity(use_K: Tensor) -> Tensor:
    """exp of the entropy of the codes' frequencies, a scalar on their device: the number of codes
    in use if all were used equally often.
    """
    share_K = use_K.double() / use_K.sum()
    return torch.exp(-(share_K * share_K.clamp_min(1e-300).log()).sum())
