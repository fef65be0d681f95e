"""VQ-GAN in plain torch, which encodes and decodes pictures, with the architecture and parameter
names of taming-transformers.

The network is that of Esser et al., "Taming Transformers for High-Resolution Image Synthesis"
(2021). Its published weights, and those of IBQ (Shi et al., "Scalable Image Tokenization with Index
Backpropagation Quantization", 2024), which has the same network and another search for the nearest
code, are converted by `releases`. A saved tokenizer is a folder of config.json and
model.safetensors.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_moe.errors import InputError
from icl_moe.ranges import Count, ImageSide
from icl_moe.settings import from_dict, to_dict
from icl_moe.tokenizers.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_keys,
    check_sides,
    find_tokenizer,
    first_line,
    load_weights,
    read_config,
    save_folder,
    weights_fingerprint,
)

Precision = Literal["fp32", "bf16"]
Lookup = Literal["distance", "dot_product"]


@dataclass(frozen=True)
class VQGANConfig:
    """The network's sizes; the defaults are the released f16 tokenizer of 1024 codes.

    image_size: the side of its training images, in pixels (other multiples of `downsampling` work
    too).
    channel_multipliers: one per level; each level except the last halves the sides.
    attention_sizes: the sides of feature maps, for images of image_size, at which levels have
    self-attention.
    lookup: the code of a latent z is the one whose vector e has the least distance |z - e|, as in
    VQ-GAN, or the largest dot product z.e, as in IBQ.
    """

    image_size: ImageSide = 256
    codebook_size: Count = 1024
    code_channels: Count = 256
    latent_channels: Count = 256
    channels: Count = 128
    channel_multipliers: tuple[Count, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: Count = 2
    attention_sizes: tuple[Count, ...] = (16,)
    lookup: Lookup = "distance"

    def __post_init__(self) -> None:
        if not self.channel_multipliers:
            raise InputError("channel_multipliers must have a number for each level, at least one.")
        if len(self.channel_multipliers) > _MOST_LEVELS:
            raise InputError(
                f"channel_multipliers must have at most {_MOST_LEVELS} numbers, one for each "
                f"halving of the sides, not {len(self.channel_multipliers)}."
            )
        if self.channels % _NORM_GROUPS:
            raise InputError(f"channels must be a multiple of {_NORM_GROUPS}, not {self.channels}.")
        if self.image_size % self.downsampling:
            raise InputError(
                f"image_size must be a multiple of {self.downsampling}, the downsampling, not "
                f"{self.image_size}."
            )

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square that one code represents."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def codes_per_image(self) -> int:
        return (self.image_size // self.downsampling) ** 2

    def settings(self) -> dict[str, Any]:
        """The sizes as in config.json and in the fingerprint. The lookup is left out if it is the
        default, so that tokenizers from before there was another one keep their fingerprints.
        """
        settings = to_dict(self)
        if self.lookup == "distance":
            del settings["lookup"]
        return settings


class VQGAN(nn.Module):
    """An image tokenizer. A new one has random weights; `from_pretrained` loads a trained one.

    precision: the precision of `encode` and `decode`. With bf16 the convolutions of the
    encoder's finest level and of all of the decoder's levels run in bfloat16, and a few codes in a
    thousand differ (docs/tokenizer.md). The weights stay float32.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = "fp32"
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = _Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.latent_channels, 1)
        self.apply(_initialise)

    @classmethod
    def from_pretrained(cls, source: str | Path, precision: Precision = "fp32") -> "VQGAN":
        """The tokenizer in the folder `source`, or the shipped one of that name ("demo"), in eval
        mode.

        Raises InputError if files are missing or damaged, if keys are missing or surplus, if the
        config contradicts the weights, or if the weights do not match the fingerprint.
        """
        folder = find_tokenizer(source, "image_tokenizer")
        settings, fingerprint = read_config(folder / CONFIG_FILE, "vqgan", "a VQ-GAN")
        config = from_dict(VQGANConfig, settings, origin=str(folder / CONFIG_FILE))
        weights = load_weights(folder / WEIGHTS_FILE)
        model = cls.from_weights(config, weights, origin=str(folder / WEIGHTS_FILE))
        if model.fingerprint != fingerprint:
            raise InputError(
                f"The weights in {folder} are not those of the fingerprint {fingerprint} in its "
                f"{CONFIG_FILE}."
            )
        model.precision = precision
        return model

    @classmethod
    def from_weights(cls, config: VQGANConfig, weights: dict[str, Tensor], origin: str) -> "VQGAN":
        """A tokenizer with `weights` by parameter name, in eval mode. Raises InputError, which
        lists the keys that do not fit.
        """
        # This precedes the construction of the network, since a damaged number could exhaust the
        # memory; each block has several weights.
        blocks = config.blocks_per_level * len(config.channel_multipliers)
        try:
            if blocks > len(weights):
                raise ValueError(f"{blocks} blocks for {len(weights)} weights")
            with torch.device("meta"):
                model = cls(config)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{origin} does not fit its config: {first_line(error)}.") from error
        check_keys(model.state_dict(), weights, origin)
        model.load_state_dict(
            {key: _channels_last(value.float()) for key, value in weights.items()}, assign=True
        )
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder. Weights that float16 represents exactly are stored as float16 and load
        as the same float32.
        """
        weights = {
            key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()
        }
        if all(torch.equal(value.half().to(value.dtype), value) for value in weights.values()):
            weights = {key: value.half() for key, value in weights.items()}
        save_folder(Path(folder), "vqgan", self.config.settings(), self.fingerprint, weights)

    @property
    def downsampling(self) -> int:
        return self.config.downsampling

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def codebook_KC(self) -> Tensor:
        """The vector of each code, float32."""
        return self.quantize.embedding.weight.detach().float()

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over the config and all weights as float32."""
        return weights_fingerprint(self.config.settings(), self.state_dict())

    @torch.inference_mode()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] as codes_BN, int64, the grid of H/f x W/f codes row by row.

        Raises InputError if a side is not a multiple of the downsampling f.
        """
        check_sides(pixels_B3HW, self.downsampling)
        pixels_B3HW = pixels_B3HW.contiguous(memory_format=torch.channels_last)
        latents_BChw = self.quant_conv(self.encoder(pixels_B3HW, self.precision))
        return self.quantize.nearest(latents_BChw).flatten(1)

    @torch.inference_mode()
    def decode(self, codes_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes as pixels_B3HW, about [-1, 1], not clipped. `grid`: rows and columns of codes; a
        square by default.

        Raises InputError if the number of codes does not fit the grid, or a code is outside the
        codebook.
        """
        count = codes_BN.shape[1]
        rows, columns = grid or (math.isqrt(count), math.isqrt(count))
        if rows * columns != count:
            raise InputError(
                f"{count} codes do not form a grid of {rows} x {columns}; pass its rows and "
                "columns."
            )
        if codes_BN.numel() and (
            int(codes_BN.min()) < 0 or int(codes_BN.max()) >= self.config.codebook_size
        ):
            raise InputError(f"Codes must lie in 0..{self.config.codebook_size - 1}.")
        # Channels are last in memory, since the rows of the table are contiguous.
        latents_BChw = self.quantize.vectors(codes_BN.unflatten(1, (rows, columns)))
        return self.decoder(self.post_quant_conv(latents_BChw), self.precision).contiguous()

    @torch.inference_mode()
    def decode_expected(self, probabilities_BNK: Tensor) -> Tensor:
        """Pixels_B3HW of the expected code vectors, sum over codes k of p(k) e_k in each of the N
        cells of a square grid.
        """
        side = math.isqrt(probabilities_BNK.shape[1])
        vectors_BNC = probabilities_BNK.float() @ self.quantize.embedding.weight
        latents_BChw = vectors_BNC.unflatten(1, (side, side)).movedim(-1, 1)
        return self.decoder(self.post_quant_conv(latents_BChw), self.precision).contiguous()

    def latents(self, pixels_B3HW: Tensor) -> Tensor:
        """The encoder's output before quantisation, latents_BChw; differentiable."""
        return self.quant_conv(self.encoder(pixels_B3HW))

    def pixels(self, latents_BChw: Tensor) -> Tensor:
        """The decoder's output for quantised latents, pixels_B3HW; differentiable."""
        return self.decoder(self.post_quant_conv(latents_BChw))


# --- The network. Attribute names are those of the published checkpoints. ---

_NORM_GROUPS = 32

_MOST_LEVELS = 16
"""Sixteen levels reduce the largest images to one pixel."""


_MOST_SCORES = 2**26
"""The most distances or dot products that are computed at a time, a quarter of a gigabyte."""


class _Codebook(nn.Module):
    """The code vectors and the search for the nearest one."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.lookup = config.lookup
        self.embedding = nn.Embedding(config.codebook_size, config.code_channels)
        nn.init.uniform_(
            self.embedding.weight, -1.0 / config.codebook_size, 1.0 / config.codebook_size
        )

    def nearest(self, latents_BChw: Tensor) -> Tensor:
        """codes_Bhw of latents, by the config's lookup."""
        flat_NC = latents_BChw.movedim(1, -1).flatten(0, -2)
        table_KC = self.embedding.weight
        find = _by_dot_product if self.lookup == "dot_product" else _by_distance
        at_once = max(1, min(4096, _MOST_SCORES // len(table_KC)))
        codes = [find(z_nC, table_KC) for z_nC in flat_NC.split(at_once)]
        return torch.cat(codes).view(latents_BChw.shape[0], *latents_BChw.shape[2:])

    def vectors(self, codes_Bhw: Tensor) -> Tensor:
        """latents_BChw of codes."""
        return self.embedding(codes_Bhw).movedim(-1, 1)


def _by_distance(z_nC: Tensor, table_KC: Tensor) -> Tensor:
    """The code with the least |z|^2 + |e|^2 - 2 z.e, summed in this order so that ties are resolved
    as in the published code.
    """
    lengths_K = (table_KC**2).sum(dim=1)
    distances_nK = (z_nC**2).sum(dim=1, keepdim=True) + lengths_K - 2 * z_nC @ table_KC.T
    return distances_nK.argmin(dim=1)


def _by_dot_product(z_nC: Tensor, table_KC: Tensor) -> Tensor:
    """The code with the largest z.e. The published code takes the largest softmax of these."""
    return (z_nC @ table_KC.T).argmax(dim=1)


class _ResnetBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_norm_and_silu(self.norm1, x))
        h = self.conv2(_norm_and_silu(self.norm2, h))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """Self-attention of one head over the pixels of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.proj_out(attended.reshape(x.shape))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # The input is padded at the right and bottom only, as in the published network.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The blocks at one size of feature maps, each followed by attention if the level has it, then
    a resize.
    """

    def __init__(self, channels_in: int, channels: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _ResnetBlock(channels_in if i == 0 else channels, channels) for i in range(blocks)
        )
        self.attn = nn.ModuleList(_Attention(channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resize in ("downsample", "upsample"):
            if hasattr(self, resize):
                x = getattr(self, resize)(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResnetBlock(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            attention = config.image_size >> i in config.attention_sizes
            level = _Level(
                widths[i - 1] if i else config.channels, width, config.blocks_per_level, attention
            )
            if i < len(widths) - 1:
                level.downsample = _Downsample(width)
            self.down.append(level)
        self.mid = _Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixels_B3HW: Tensor, precision: Precision = "fp32") -> Tensor:
        h = self.conv_in(pixels_B3HW)
        for number, level in enumerate(self.down):
            # The finest level is three fifths of a released encoder's work. More levels in bf16
            # would change codes of masks.
            h = _run_level(level, h, precision if number == 0 else "fp32")
        return self.conv_out(_norm_and_silu(self.norm_out, self.mid(h)))


class _Decoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        # The finest level comes first, as the parameters are numbered; the levels run from the last
        # to the first.
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            attention = config.image_size >> i in config.attention_sizes
            level = _Level(
                widths[min(i + 1, len(widths) - 1)], width, config.blocks_per_level + 1, attention
            )
            if i > 0:
                level.upsample = _Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents_BChw: Tensor, precision: Precision = "fp32") -> Tensor:
        h = self.mid(self.conv_in(latents_BChw))
        for level in reversed(self.up):
            h = _run_level(level, h, precision)
        return self.conv_out(_norm_and_silu(self.norm_out, h))


def _run_level(level: nn.Module, h: Tensor, precision: Precision) -> Tensor:
    if precision == "fp32":
        return level(h)
    with torch.autocast(h.device.type, torch.bfloat16):
        return level(h).float()


def _norm_and_silu(norm: nn.Module, x: Tensor) -> Tensor:
    # The in-place version saves a feature map but has no gradient.
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def _initialise(module: nn.Module) -> None:
    """Initialise as a chain of resizing convolutions that preserve the variance, with all residual
    branches at zero.

    With torch's default weights the branches dominate the latents, and training makes no progress
    in its first hundreds of steps.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, _ResnetBlock):  # after its convolutions: children come first
        nn.init.zeros_(module.conv2.weight)
    if isinstance(module, _Attention):
        nn.init.zeros_(module.proj_out.weight)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_NORM_GROUPS, channels, eps=1e-6)


# --- Files ---


def _channels_last(weight: Tensor) -> Tensor:
    """Use the memory layout of the feature maps in `encode` and `decode`, so that convolutions need
    not reorder the weight.
    """
    return weight.contiguous(
        memory_format=torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    )
