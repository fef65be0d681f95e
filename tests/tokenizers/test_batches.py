"""What the codes cache rests on: in batches of one size a picture's latents are the same to the
last bit, wherever it stands in the batch and whatever stands beside it.
"""

import pytest
import torch

from icl_moe.tokenizers.features import FeaturesTokenizer
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig
from preprocessing.quantize import BATCH


def latents(tokenizer: VQGAN | FeaturesTokenizer, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """What the search for the nearest code takes."""
    with torch.inference_mode():
        if isinstance(tokenizer, FeaturesTokenizer):
            return tokenizer.features(pixels_B3HW)
        pixels_B3HW = pixels_B3HW.contiguous(memory_format=torch.channels_last)
        return tokenizer.quant_conv(tokenizer.encoder(pixels_B3HW, tokenizer.precision))


def open_tokenizer(name: str) -> VQGAN | FeaturesTokenizer:
    if name == "released size":
        torch.manual_seed(0)
        model = VQGAN(VQGANConfig())
        return VQGAN.from_weights(model.config, model.state_dict(), origin="random weights")
    return (
        VQGAN.from_pretrained(name) if name == "demo" else FeaturesTokenizer.from_pretrained(name)
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("demo", 64),
        ("demo_colours", 64),
        pytest.param("photographs", 256, marks=pytest.mark.slow),
        pytest.param("released size", 256, marks=pytest.mark.slow),
    ],
)
def test_latents_depend_neither_on_the_place_nor_on_the_other_pictures(name, size, threads):
    tokenizer = open_tokenizer(name)
    generator = torch.Generator().manual_seed(0)
    pixels_B3HW = torch.rand(BATCH, 3, size, size, generator=generator) * 2 - 1
    others_B3HW = torch.randn(BATCH, 3, size, size, generator=generator)
    others_B3HW[BATCH - 1] = pixels_B3HW[0]
    torch.set_num_threads(threads)
    try:
        whole = latents(tokenizer, pixels_B3HW)
        assert torch.equal(latents(tokenizer, pixels_B3HW.roll(1, 0)), whole.roll(1, 0))
        assert torch.equal(latents(tokenizer, others_B3HW)[-1], whole[0])
        assert torch.equal(
            tokenizer.encode(pixels_B3HW.roll(1, 0)), tokenizer.encode(pixels_B3HW).roll(1, 0)
        )
    finally:
        torch.set_num_threads(1)
