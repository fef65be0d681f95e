"""The published VQ-GAN, independent of this project: the modules of taming-transformers-rom1504,
assembled as in its VQModel.

VQModel itself needs pytorch_lightning; its modules need only torch. Tests compare our VQGAN with
it, and benchmarks/tokenizer.py measures both.
"""

from typing import Any

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn

from icl_moe.tokenizers.vqgan import VQGANConfig


class PublishedVQGAN(nn.Module):
    """Its parameters have the names of a release, which are also ours. A new instance has random
    weights.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.network = network_options(config)
        self.encoder, self.decoder = Encoder(**self.network), Decoder(**self.network)
        self.quantize = VectorQuantizer2(config.codebook_size, config.code_channels, beta=0.25)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.latent_channels, 1)
        # The codes are close to the latents; otherwise all pictures would use only a few codes.
        self.quantize.embedding.weight.data.normal_(std=0.5)
        self.eval()

    @torch.no_grad()
    def latents(self, pixels_B3HW: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels_B3HW))

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """codes_BN."""
        _, _, (_, _, codes) = self.quantize(self.latents(pixels_B3HW))
        return codes.view(len(pixels_B3HW), -1)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> Tensor:
        """pixels_B3HW."""
        side = int(codes_BN.shape[1] ** 0.5)
        shape = (len(codes_BN), side, side, self.quantize.e_dim)
        return self.decoder(
            self.post_quant_conv(self.quantize.get_codebook_entry(codes_BN.flatten(), shape))
        )


def network_options(config: VQGANConfig) -> dict[str, Any]:
    """The network's sizes under the names of `ddconfig` in the published YAML."""
    return {
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": config.image_size,
        "in_channels": 3,
        "out_ch": 3,
        "dropout": 0.0,
        "ch": config.channels,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.blocks_per_level,
        "attn_resolutions": list(config.attention_sizes),
    }
