"""A small image tokenizer of the real architecture with random weights, for tests that need codes
but no pictures.
"""

from pathlib import Path

import torch

from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig

CODES = 64


def save_toy_tokenizer(folder: Path, seed: int = 0) -> Path:
    """Write a tokenizer with downsampling 8 and 64 codes into `folder`."""
    config = VQGANConfig(
        image_size=64,
        codebook_size=CODES,
        code_channels=8,
        latent_channels=8,
        channels=32,
        channel_multipliers=(1, 1, 1, 1),
        blocks_per_level=1,
        attention_sizes=(),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VQGAN(config)
    # The codes are as spread out as the latents, so that different pictures have different codes.
    model.quantize.embedding.weight.data.normal_(
        std=0.3, generator=torch.Generator().manual_seed(seed)
    )
    model.save_pretrained(folder)
    return folder


def recipe_settings(tokenizer: Path) -> list[str]:
    """The settings with which the demo's data recipe uses it."""
    return [f"tokenizer={tokenizer}", f"vocabulary.image_codes={CODES}"]
