"""Makes a features tokenizer from a folder of images: statistics of the channels, PCA, k-means."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from icl_moe.errors import InputError
from icl_moe.files import write_whole
from icl_moe.images import load_image, to_square_pixels
from icl_moe.tokenizers.backbones import Backbone, open_backbone
from icl_moe.tokenizers.features import (
    FeaturesConfig,
    FeaturesTokenizer,
    grid_maps,
    nearest,
)
from icl_moe.vocabulary import split_stages
from preprocessing.tokenizers.matching import evaluate_matcher, read_photographs
from preprocessing.tokenizers.measures import perplexity
from preprocessing.tokenizers.samples import image_files

REPORT_FILE = "report.json"

CELLS = 200_000
"""The most cells for statistics, PCA and k-means; if there are more, each image provides an equal
share.
"""

_BATCH = 16
_ROUNDS = 30


def save_with_report(
    tokenizer: FeaturesTokenizer, images: Path, out: Path, annotations: Path | None = None
) -> dict[str, Any]:
    """Write a tokenizer into `out`, with a report of its use on the pictures in `images`, which is
    also returned. annotations: the pictures' COCO instances file, with which the report includes
    the scores of the training-free matcher with features and with codes.
    """
    tokenizer.save_pretrained(out)
    report = {"tokenizer": tokenizer.fingerprint, **_describe_use(tokenizer, images)}
    if annotations is not None:
        photographs = read_photographs(tokenizer, images, annotations)
        report |= evaluate_matcher(tokenizer.cpu(), photographs, photographs)
    write_whole(out / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    return report


def fit_features_tokenizer(
    images: Path, config: FeaturesConfig, seed: int, device: torch.device | str = "cpu"
) -> FeaturesTokenizer:
    """A tokenizer made from the pictures in `images`, on the device on which its backbone computes.

    config.channels is determined here. Equal input, seed and machine give equal tables. Raises
    InputError for a folder without pictures, a missing backbone, and fewer cells or channels than
    codes or dimensions require.
    """
    files = image_files(images)
    backbone = open_backbone(config.backbone, config.weights).to(device)
    sample = _sample_cells(files, config, backbone, seed)
    cells_MC = sample.cells_MC
    _check_cells(images, sample, config)
    if cells_MC.shape[1] < config.dimensions:
        raise InputError(
            f"The backbone's maps of these strides have {cells_MC.shape[1]} channels, fewer than "
            f"{config.dimensions} dimensions; choose fewer dimensions."
        )
    tokenizer = FeaturesTokenizer(replace(config, channels=sample.channels), backbone)
    tokenizer.mean_C.copy_(cells_MC.mean(dim=0))
    tokenizer.deviation_C.copy_(cells_MC.std(dim=0).clamp_min(1e-6))
    joined_MC = tokenizer.join(cells_MC)
    centre_C, projection_CD = principal_axes(joined_MC, config.dimensions)
    tokenizer.centre_C.copy_(centre_C)
    tokenizer.projection_CD.copy_(projection_CD)
    features_MD = tokenizer.project(joined_MC)
    _fit_stages(tokenizer, features_MD, 0, seed)
    first_M = nearest(features_MD[None], tokenizer.codebook_KD[: config.codebook_size])[0]
    tokenizer.colours_K3.copy_(_mean_colours(first_M, sample, config))
    return tokenizer.to(device)


def refine_features_tokenizer(
    images: Path,
    source: str | Path,
    stages: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> FeaturesTokenizer:
    """The tokenizer `source` with further stages, `stages` in all, fitted to the pictures in
    `images`. Raises InputError if it has as many already, or if the pictures do not suffice.
    """
    coarser = FeaturesTokenizer.from_pretrained(source)
    known = coarser.config.stages
    if stages <= known:
        raise InputError(
            f"{source} has {known} stage{'s' if known > 1 else ''} already; set --stages higher."
        )
    tokenizer = FeaturesTokenizer(replace(coarser.config, stages=stages), coarser.backbone)
    for name, table in coarser.tables().items():
        tokenizer.tables()[name][: len(table)] = table
    sample = _sample_cells(image_files(images), tokenizer.config, coarser.backbone.to(device), seed)
    _check_cells(images, sample, tokenizer.config)
    features_MD = tokenizer.project(tokenizer.join(sample.cells_MC))
    _fit_stages(tokenizer, features_MD, known, seed)
    return tokenizer.to(device)


def _check_cells(images: Path, sample: "_Sample", config: FeaturesConfig) -> None:
    if len(sample.cells_MC) < config.codebook_size:
        raise InputError(
            f"{images} has {len(sample.cells_MC)} cells, fewer than {config.codebook_size} codes; "
            "provide more images or choose fewer codes."
        )


def _fit_stages(tokenizer: FeaturesTokenizer, features_MD: Tensor, known: int, seed: int) -> None:
    """Set the centroids of all stages after the first `known` ones."""
    left_MD, size = features_MD, tokenizer.config.codebook_size
    for stage, centroids_KD in enumerate(tokenizer.codebook_KD.split(size)):
        if stage >= known:
            centroids_KD.copy_(k_means(left_MD, size, seed + stage))
        left_MD = left_MD - centroids_KD[nearest(left_MD[None], centroids_KD)[0]]


def _mean_colours(codes_M: Tensor, sample: "_Sample", config: FeaturesConfig) -> Tensor:
    """The mean colour (K, 3) of the sampled cells of each code; grey without cells."""
    count_K = torch.bincount(codes_M, minlength=config.codebook_size)
    sums_K3 = torch.zeros(config.codebook_size, 3).index_add_(0, codes_M, sample.colours_M3)
    return sums_K3 / count_K.clamp_min(1)[:, None]


def _describe_use(tokenizer: FeaturesTokenizer, images: Path) -> dict[str, Any]:
    """The use of the codes on a folder of pictures: the numbers of pictures and cells, the share of
    codes that occur, the perplexity of each stage's, and the mean cosine similarity of cells'
    features and those that their codes represent.
    """
    config = tokenizer.config
    use_SK = torch.zeros(config.stages, config.codebook_size, dtype=torch.int64)
    cosine, files = 0.0, image_files(images)
    for pixels_B3HW in picture_batches(files, config.image_size, "encoding"):
        features_BND = tokenizer.features(pixels_B3HW.to(tokenizer.device))
        codes_BN = tokenizer.codes_of(features_BND)
        parts = split_stages(codes_BN.flatten(), config.codebook_size, config.stages)
        for use_K, part_M in zip(use_SK, parts, strict=True):
            use_K += torch.bincount(part_M, minlength=len(use_K)).cpu()
        cosine += float(F.cosine_similarity(features_BND, tokenizer.vectors(codes_BN), -1).sum())
    return {
        "pictures": len(files),
        "cells": int(use_SK[0].sum()),
        "codes_used": float((use_SK > 0).double().mean()),
        "perplexity": [float(perplexity(use_K)) for use_K in use_SK],
        "cosine_to_centroid": cosine / int(use_SK[0].sum()),
    }


def picture_batches(files: list[Path], size: int, what: str) -> Iterator[Tensor]:
    """The pictures in order, each stretched to a square, as batches of pixels_B3HW."""
    for start in tqdm(range(0, len(files), _BATCH), desc=what, unit="batch", disable=None):
        chosen = files[start : start + _BATCH]
        yield torch.stack([to_square_pixels(load_image(file), size) for file in chosen])


def principal_axes(points_MC: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """The mean_C of points and their first principal axes (C, D), of length 1, ordered by
    decreasing variance. The largest component of each axis is positive.
    """
    mean_C = points_MC.mean(dim=0)
    centred_MC = points_MC - mean_C
    covariance_CC = (centred_MC.T @ centred_MC).double() / len(points_MC)
    axes_CD = torch.linalg.eigh(covariance_CC).eigenvectors.flip(1)[:, :dimensions]
    largest_D = axes_CD.gather(0, axes_CD.abs().argmax(dim=0, keepdim=True))
    return mean_C, (axes_CD * largest_D.sign()).to(points_MC.dtype)


def k_means(points_MD: Tensor, clusters: int, seed: int) -> Tensor:
    """Centroids (K, D) after 30 rounds of Lloyd's algorithm, from K of the points drawn with
    `seed`; an empty cluster restarts at another point.
    """
    generator = torch.Generator().manual_seed(seed)
    centroids_KD = points_MD[torch.randperm(len(points_MD), generator=generator)[:clusters]].clone()
    for _ in tqdm(range(_ROUNDS), desc="k-means", unit="round", disable=None):
        codes_M = nearest(points_MD[None], centroids_KD)[0]
        count_K = torch.bincount(codes_M, minlength=clusters)
        sums_KD = torch.zeros_like(centroids_KD).index_add_(0, codes_M, points_MD)
        anew_K = torch.randint(len(points_MD), (clusters,), generator=generator)
        centroids_KD = torch.where(
            (count_K > 0)[:, None], sums_KD / count_K.clamp_min(1)[:, None], points_MD[anew_K]
        )
    return centroids_KD


@dataclass(frozen=True)
class _Sample:
    """A sample of M cells. cells_MC: the concatenated raw maps of the cells. colours_M3: their mean
    colours in [-1, 1]. channels: the number of channels of each stride.
    """

    cells_MC: Tensor
    colours_M3: Tensor
    channels: tuple[int, ...]


def _sample_cells(
    files: list[Path], config: FeaturesConfig, backbone: Backbone, seed: int
) -> _Sample:
    device = backbone.mean_311.device
    rng = np.random.default_rng(seed)
    per_image = max(1, min(config.codes_per_image, CELLS // len(files)))
    cells: list[Tensor] = []
    colours: list[Tensor] = []
    channels: tuple[int, ...] = ()
    for pixels_B3HW in picture_batches(files, config.image_size, "reading images"):
        maps = grid_maps(backbone, config.strides, config.downsampling, pixels_B3HW.to(device))
        channels = tuple(map_BNC.shape[-1] for map_BNC in maps)
        colours_BN3 = F.avg_pool2d(pixels_B3HW, config.downsampling).flatten(2).transpose(1, 2)
        for cells_NC, colours_N3 in zip(torch.cat(maps, dim=-1).cpu(), colours_BN3, strict=True):
            chosen = torch.from_numpy(np.sort(rng.permutation(len(cells_NC))[:per_image]))
            cells.append(cells_NC[chosen])
            colours.append(colours_N3[chosen])
    return _Sample(torch.cat(cells), torch.cat(colours), channels)
