"""Measures the training-free matcher with a features tokenizer on a folder of annotated pictures:
how much of the features' information the codes retain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.evaluation.matcher import THRESHOLDS, cell_shares, iou_above, match, score_pixels
from icl_moe.images import crop_and_resize_mask, load_image, to_square_pixels
from icl_moe.tokenizers.features import FeaturesTokenizer
from preprocessing.tokenizers.samples import ClassMasks, image_files

Reading = Literal["features", "codes"]
"""What the matcher compares: the features themselves, or the centroids of their codes."""

LEAST_AREA = 0.01
"""The least area of a class mask as a share of its picture; smaller masks are neither queries nor
examples.
"""


@dataclass(frozen=True)
class Photographs:
    """A folder of annotated pictures after encoding: I pictures with R class masks.

    features_IND, codes_IN: the features and codes of the N cells of each picture. masks_RHW: the
    masks, boolean, at the tokenizer's image size; each covers at least 1% of its picture. image_R,
    category_R: the number of each mask's picture, and its category id.
    """

    features_IND: Tensor
    codes_IN: Tensor
    masks_RHW: Tensor
    image_R: np.ndarray
    category_R: np.ndarray

    def __len__(self) -> int:
        return len(self.masks_RHW)

    def masks_of_images(self) -> list[np.ndarray]:
        """The numbers of each picture's masks."""
        order_R = np.argsort(self.image_R, kind="stable")
        starts = np.flatnonzero(np.diff(self.image_R[order_R], prepend=-1))
        return np.split(order_R, starts[1:])


def read_photographs(tokenizer: FeaturesTokenizer, images: Path, annotations: Path) -> Photographs:
    """Encode the pictures of a folder whose COCO instances file is `annotations`.

    Each is stretched to the tokenizer's square. At 256 pixels, each picture and each mask takes 64
    KB of memory. Raises InputError if no picture has a mask of 1% of its area.
    """
    truth, size = ClassMasks(annotations), tokenizer.config.image_size
    features, codes, masks, image, category = [], [], [], [], []
    files = [file for file in image_files(images) if truth.has(file.name)]
    for number, file in enumerate(tqdm(files, desc="reading", unit="image", disable=None)):
        picture = load_image(file)
        pixels_13HW = to_square_pixels(picture, size)[None].to(tokenizer.device)
        features_1ND = tokenizer.features(pixels_13HW)
        features.append(features_1ND.cpu())
        codes.append(tokenizer.codes_of(features_1ND).cpu())
        for kind, mask_HW in truth.of(file.name, picture.size).items():
            if mask_HW.mean() >= LEAST_AREA:
                whole = (0, 0, picture.width, picture.height)
                resized_HW = crop_and_resize_mask(mask_HW, whole, size)
                if resized_HW.any():  # Very thin outlines may vanish.
                    masks.append(resized_HW)
                    image.append(number)
                    category.append(kind)
    if not masks:
        raise InputError(
            f"{annotations} has no class mask of at least {LEAST_AREA:.0%} of a picture in "
            f"{images}."
        )
    return Photographs(
        torch.cat(features),
        torch.cat(codes),
        torch.from_numpy(np.stack(masks)),
        np.array(image),
        np.array(category),
    )


def evaluate_matcher(
    tokenizer: FeaturesTokenizer,
    queries: Photographs,
    examples: Photographs,
    shots: Sequence[int] = (1, 3),
    seed: int = 0,
) -> dict[str, Any]:
    """The matcher's mean IoU over the queries' class masks, as plain values; `shots` examples of
    the class come from other photographs.

    The threshold is fitted on the examples alone: each of their masks in turn is a query, with
    examples from the other photographs. For comparison: `best_threshold` is fitted on the queries
    themselves and so a little optimistic; `copy` answers with the example's mask, `whole` with the
    whole picture, `objects` with all masks of the query's photograph (an oracle). `flips`: among
    ordered pairs of classes in one photograph, how often the object that the examples show has the
    higher mean score, with examples of either class.
    """
    names = {"masks": len(queries), "classes": len(np.unique(queries.category_R))}
    report: dict[str, Any] = {**names, **_plain_answers(queries, examples, seed)}
    for count in shots:
        drawn = draw_examples(queries, examples, count, seed)
        fitting = draw_examples(examples, examples, count, seed + 1)
        readings: tuple[Reading, ...] = ("features", "codes")
        for reading in readings:
            threshold = fit_threshold(tokenizer, examples, examples, fitting, reading)
            scores_RN = cell_scores(tokenizer, queries, examples, drawn, reading)
            mean_T = iou_curves(scores_RN, queries, drawn).mean(axis=0)
            report[f"{reading}_{count}"] = {
                "miou": float(mean_T[np.searchsorted(THRESHOLDS, threshold)]),
                "threshold": threshold,
                "best_threshold": float(THRESHOLDS[mean_T.argmax()]),
                "miou_at_best": float(mean_T.max()),
                **_choices(scores_RN, queries),
            }
        whole = report[f"features_{count}"]["miou"]
        report[f"retention_{count}"] = report[f"codes_{count}"]["miou"] / whole if whole else None
    return report


def draw_examples(
    queries: Photographs, examples: Photographs, count: int, seed: int
) -> list[np.ndarray]:
    """For each of the queries' masks, the numbers of up to `count` masks of its class among the
    examples, of other photographs, possibly none.
    """
    rng = np.random.default_rng(seed)
    of_class = {
        int(category): np.flatnonzero(examples.category_R == category)
        for category in np.unique(examples.category_R)
    }
    drawn = []
    for image, category in zip(queries.image_R, queries.category_R, strict=True):
        found = of_class.get(int(category), np.zeros(0, dtype=np.int64))
        if queries is examples:
            found = found[examples.image_R[found] != image]
        drawn.append(rng.permutation(found)[:count])
    return drawn


def fit_threshold(
    tokenizer: FeaturesTokenizer,
    queries: Photographs,
    examples: Photographs,
    drawn: list[np.ndarray],
    reading: Reading,
) -> float:
    """The score above which the mean IoU is highest, over the queries that have examples."""
    curve_RT = iou_curves(cell_scores(tokenizer, queries, examples, drawn, reading), queries, drawn)
    has_examples = np.array([len(numbers) > 0 for numbers in drawn])
    if not has_examples.any():
        raise InputError(
            "No class appears in two of the examples' photographs, so no threshold can be fitted; "
            "provide more of them."
        )
    return float(THRESHOLDS[curve_RT[has_examples].mean(axis=0).argmax()])


def iou_curves(scores_RN: Tensor, queries: Photographs, drawn: list[np.ndarray]) -> np.ndarray:
    """IoU of each query (R, T) where pixels that score above each of `THRESHOLDS` are the answer; 0
    for a query without examples. scores_RN: `cell_scores` of the queries.
    """
    edges_T = torch.from_numpy(THRESHOLDS).to(scores_RN.dtype)
    curves = []
    for scores_RN_, masks_RHW in zip(scores_RN.split(32), queries.masks_RHW.split(32), strict=True):
        pixels_RP = score_pixels(scores_RN_, masks_RHW.shape[-1]).flatten(1)
        curves.append(iou_above(pixels_RP, masks_RHW.flatten(1), edges_T))
    iou_RT = np.concatenate(curves)
    iou_RT[[len(numbers) == 0 for numbers in drawn]] = 0.0
    return iou_RT


def cell_scores(
    tokenizer: FeaturesTokenizer,
    queries: Photographs,
    examples: Photographs,
    drawn: list[np.ndarray],
    reading: Reading,
) -> Tensor:
    """`match` for each query, (R, N); zeros for a query without examples."""
    grid = round(queries.codes_IN.shape[1] ** 0.5)
    shares_RN = cell_shares(examples.masks_RHW, grid)
    seen, shown = (
        photos.features_IND if reading == "features" else tokenizer.vectors(photos.codes_IN)
        for photos in (queries, examples)
    )
    rows = [
        match(seen[image], shown[examples.image_R[numbers]], shares_RN[numbers])
        if len(numbers)
        else torch.zeros(shares_RN.shape[1])
        for image, numbers in zip(queries.image_R, drawn, strict=True)
    ]
    return torch.stack(rows)


def _choices(scores_RN: Tensor, queries: Photographs) -> dict[str, float]:
    """Two shares of all ordered pairs (a, b) of masks of one photograph. choice: with a's examples,
    a's cells score higher than b's. flips: with b's examples, b's cells also score higher.
    """
    grid = round(queries.codes_IN.shape[1] ** 0.5)
    shares_RN = cell_shares(queries.masks_RHW, grid)
    shares_RN /= shares_RN.sum(dim=1, keepdim=True)
    right: dict[tuple[int, int], bool] = {}
    for masks_M in queries.masks_of_images():
        mean_MM = scores_RN[masks_M] @ shares_RN[masks_M].T
        wins_MM = (mean_MM.diagonal()[:, None] > mean_MM).tolist()
        right |= {
            (int(a), int(b)): wins_MM[i][j]
            for i, a in enumerate(masks_M)
            for j, b in enumerate(masks_M)
            if i != j
        }
    if not right:
        return {"pairs": 0}
    flips = [right[a, b] and right[b, a] for a, b in right]
    return {
        "pairs": len(right),
        "choice": float(np.mean(list(right.values()))),
        "flips": float(np.mean(flips)),
    }


def _plain_answers(queries: Photographs, examples: Photographs, seed: int) -> dict[str, float]:
    """Mean IoU of answers that ignore the features; see `evaluate_matcher`."""
    copied, whole, objects = [], [], []
    drawn = draw_examples(queries, examples, 1, seed)
    for masks_M in queries.masks_of_images():
        any_HW = queries.masks_RHW[masks_M].any(dim=0)
        for number in masks_M:
            mask_HW, numbers = queries.masks_RHW[number], drawn[number]
            copied.append(_iou(examples.masks_RHW[numbers[0]], mask_HW) if len(numbers) else 0.0)
            whole.append(float(mask_HW.float().mean()))
            objects.append(_iou(any_HW, mask_HW))
    return {
        "copy": float(np.mean(copied)),
        "whole": float(np.mean(whole)),
        "objects": float(np.mean(objects)),
    }


def _iou(a_HW: Tensor, b_HW: Tensor) -> float:
    return float((a_HW & b_HW).sum() / (a_HW | b_HW).sum())
