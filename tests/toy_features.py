"""A small features tokenizer with a network of random weights, for tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from icl_moe.tokenizers.features import FeaturesConfig, FeaturesTokenizer
from preprocessing.tokenizers.features import fit_features_tokenizer

CODES, DIMENSIONS = 24, 6


def save_toy_backbone(folder: Path, seed: int = 0) -> Path:
    """Write a transformers ResNet with 8 to 16 channels and maps of strides 4 to 32."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ResNetModel(config).save_pretrained(folder)
    return folder


def write_pictures(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """Write pictures of coloured rectangles, none of them square, so that cells differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels_HW3 = np.full((50, 80, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        for _ in range(6):
            x, y = rng.integers(0, 60), rng.integers(0, 35)
            pixels_HW3[y : y + rng.integers(8, 25), x : x + rng.integers(8, 40)] = rng.integers(
                0, 256, 3
            )
        Image.fromarray(pixels_HW3).save(folder / f"{number}.png")
    return folder


def toy_config(backbone: Path, **settings: object) -> FeaturesConfig:
    values: dict[str, object] = {
        "backbone": str(backbone),
        "strides": (8, 16),
        "channels": (8, 12),
        "image_size": 64,
        "downsampling": 8,
        "codebook_size": CODES,
        "dimensions": DIMENSIONS,
    }
    return FeaturesConfig(**{**values, **settings})  # type: ignore[arg-type]


def make_toy_features(folder: Path, **settings: object) -> FeaturesTokenizer:
    """Make a tokenizer with 24 codes at downsampling 8, with its backbone and pictures in
    `folder`.
    """
    backbone = save_toy_backbone(folder / "backbone")
    pictures = write_pictures(folder / "pictures")
    return fit_features_tokenizer(pictures, toy_config(backbone, **settings), seed=0)


def recipe_settings(folder: Path, stages: int = 1) -> list[str]:
    """The settings with which a data recipe uses the tokenizer in `folder` for input images."""
    return [f"features_tokenizer={folder}", *vocabulary_settings(stages)]


def vocabulary_settings(stages: int = 1) -> list[str]:
    return [f"vocabulary.features={CODES}", f"vocabulary.feature_stages={stages}"]
