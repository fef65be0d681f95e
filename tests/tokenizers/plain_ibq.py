"""An IBQ tokenizer written down once more: each layer as one formula on named weights, the lookup
as a loop over codes, and its release as SEED-Voken publishes it. Shares no code with the package.

The architecture is that of src/IBQ in https://github.com/TencentARC/SEED-Voken: the encoder and
decoder of VQ-GAN, with `blocks` residual blocks in each level, and the quantizer of Shi et al.,
"Scalable Image Tokenization with Index Backpropagation Quantization" (2024).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import conv2d, group_norm

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """The keys of a release's YAML, which are those of `ddconfig`, n_embed and embed_dim."""

    n_embed: int
    embed_dim: int
    z_channels: int
    resolution: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]

    @property
    def widths(self) -> list[int]:
        return [self.ch * factor for factor in self.ch_mult]

    def attends(self, level: int) -> bool:
        return self.resolution // 2**level in self.attn_resolutions


RELEASED = Sizes(1024, 256, 256, 256, 128, (1, 1, 2, 2, 4), 4, (16,))
"""The sizes of configs/IBQ/gpu/imagenet_ibqgan_1024.yaml."""


# --- The parameters ---


def random_weights(sizes: Sizes, seed: int) -> Weights:
    """Random parameters under the names of a checkpoint, in which signals keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def conv(name: str, channels: int, out: int, side: int) -> None:
        weights[f"{name}.weight"] = draw(out, channels, side, side) / (channels * side**2) ** 0.5
        weights[f"{name}.bias"] = 0.1 * draw(out)

    def norm(name: str, channels: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.1 * draw(channels)
        weights[f"{name}.bias"] = 0.1 * draw(channels)

    def block(name: str, channels: int, out: int) -> None:
        norm(f"{name}.norm1", channels)
        conv(f"{name}.conv1", channels, out, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if channels != out:
            conv(f"{name}.nin_shortcut", channels, out, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def level(name: str, number: int, channels: int, blocks: int) -> None:
        width = sizes.widths[number]
        for i in range(blocks):
            block(f"{name}.block.{i}", channels if i == 0 else width, width)
            if sizes.attends(number):
                attention(f"{name}.attn.{i}", width)

    def middle(name: str, channels: int) -> None:
        block(f"{name}.block_1", channels, channels)
        attention(f"{name}.attn_1", channels)
        block(f"{name}.block_2", channels, channels)

    widths, last = sizes.widths, len(sizes.widths) - 1
    conv("encoder.conv_in", 3, sizes.ch, 3)
    for i, width in enumerate(widths):
        level(f"encoder.down.{i}", i, widths[i - 1] if i else sizes.ch, sizes.num_res_blocks)
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], sizes.z_channels, 3)
    conv("decoder.conv_in", sizes.z_channels, widths[-1], 3)
    middle("decoder.mid", widths[-1])
    for i, width in enumerate(widths):
        level(f"decoder.up.{i}", i, widths[min(i + 1, last)], sizes.num_res_blocks + 1)
        if i:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", sizes.ch * sizes.ch_mult[0])
    conv("decoder.conv_out", sizes.ch * sizes.ch_mult[0], 3, 3)
    weights["quantize.embedding.weight"] = draw(sizes.n_embed, sizes.embed_dim)
    conv("quant_conv", sizes.z_channels, sizes.embed_dim, 1)
    conv("post_quant_conv", sizes.embed_dim, sizes.z_channels, 1)
    return weights


# --- The network ---


class PlainIBQ:
    """Reads pixels_B3HW and codes_BN with `weights`."""

    def __init__(self, sizes: Sizes, weights: Weights) -> None:
        self.sizes, self.weights = sizes, weights

    def latents(self, x: Tensor) -> Tensor:
        """latents_BChw before quantisation."""
        x = self._conv("encoder.conv_in", x)
        for i in range(len(self.sizes.ch_mult)):
            x = self._level(f"encoder.down.{i}", i, self.sizes.num_res_blocks, x)
            if i < len(self.sizes.ch_mult) - 1:
                x = torch.nn.functional.pad(x, (0, 1, 0, 1))  # at the right and at the bottom
                x = self._conv(f"encoder.down.{i}.downsample.conv", x, stride=2, padding=0)
        x = self._out("encoder", self._middle("encoder.mid", x))
        return self._conv("quant_conv", x)

    def decode(self, codes_BN: Tensor) -> Tensor:
        """pixels_B3HW of a square grid of codes."""
        side = int(codes_BN.shape[1] ** 0.5)
        table = self.weights["quantize.embedding.weight"]
        x = table[codes_BN].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        x = self._conv("decoder.conv_in", self._conv("post_quant_conv", x))
        x = self._middle("decoder.mid", x)
        for i in reversed(range(len(self.sizes.ch_mult))):
            x = self._level(f"decoder.up.{i}", i, self.sizes.num_res_blocks + 1, x)
            if i:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self._conv(f"decoder.up.{i}.upsample.conv", x)
        return self._out("decoder", x)

    def _level(self, name: str, number: int, blocks: int, x: Tensor) -> Tensor:
        for i in range(blocks):
            x = self._block(f"{name}.block.{i}", x)
            if self.sizes.attends(number):
                x = self._attention(f"{name}.attn.{i}", x)
        return x

    def _middle(self, name: str, x: Tensor) -> Tensor:
        x = self._attention(f"{name}.attn_1", self._block(f"{name}.block_1", x))
        return self._block(f"{name}.block_2", x)

    def _block(self, name: str, x: Tensor) -> Tensor:
        h = self._conv(f"{name}.conv1", self._swish(self._norm(f"{name}.norm1", x)))
        h = self._conv(f"{name}.conv2", self._swish(self._norm(f"{name}.norm2", h)))
        if f"{name}.nin_shortcut.weight" in self.weights:
            x = self._conv(f"{name}.nin_shortcut", x)
        return x + h

    def _attention(self, name: str, x: Tensor) -> Tensor:
        h = self._norm(f"{name}.norm", x)
        q, k, v = (self._conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        among = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, dim=2)
        h = torch.einsum("bij,bcj->bci", among, v).view_as(x)
        return x + self._conv(f"{name}.proj_out", h)

    def _out(self, name: str, x: Tensor) -> Tensor:
        return self._conv(f"{name}.conv_out", self._swish(self._norm(f"{name}.norm_out", x)))

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return conv2d(x, weight, self.weights[f"{name}.bias"], stride, padding)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return group_norm(x, 32, scale, shift, eps=1e-6)

    @staticmethod
    def _swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def lookup(latents_BChw: Tensor, table_KC: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each latent, row by row, the code with the largest dot product (B, N), and by how much it
    exceeds that of the next code; in float64, one latent after the other.
    """
    table = table_KC.double().numpy()
    codes, leads = [], []
    for latent in latents_BChw.double().permute(0, 2, 3, 1).flatten(0, 2).numpy():
        best, second, chosen = -np.inf, -np.inf, -1
        for number, product in enumerate((table * latent).sum(axis=1).tolist()):
            if product > best:
                best, second, chosen = product, best, number
            elif product > second:
                second = product
        codes.append(chosen)
        leads.append(best - second)
    shape = (len(latents_BChw), -1)
    return np.array(codes).reshape(shape), np.array(leads).reshape(shape)


# --- The release ---


def write_release(
    folder: Path,
    sizes: Sizes,
    last: Weights,
    averages: Weights | None,
    settings: dict[str, Any] | None = None,
) -> tuple[Path, Path]:
    """A checkpoint as Lightning 2.2 writes it, and its YAML.

    last: the weights of the last step. averages: their running averages, None for a checkpoint
    without them. settings: further keys of init_args.
    """
    network = {**asdict(sizes), "double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    of_codes = {key: network.pop(key) for key in ("n_embed", "embed_dim")}
    network |= {key: list(network[key]) for key in ("ch_mult", "attn_resolutions")}
    of_model = {
        "ddconfig": network,
        "lossconfig": {
            "target": "src.IBQ.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": {"disc_conditional": False, "disc_in_channels": 3, "disc_start": 0},
        },
        **of_codes,
        "learning_rate": "1e-4",
        "l2_normalize": False,
        "use_entropy_loss": True,
        "sample_minimization_weight": 1.0,
        "batch_maximization_weight": 1.0,
        "entropy_temperature": 0.01,
        "beta": 0.25,
        "use_ema": True,
        "resume_lr": None,
        "lr_drop_epoch": [250, 300],
        **(settings or {}),
    }
    model = {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": of_model}
    config = {"seed_everything": True, "trainer": {"precision": "16-mixed"}, "model": model}
    (folder / "imagenet_ibqgan.yaml").write_text(yaml.safe_dump({**config, "ckpt_path": None}))

    loss = {"discriminator.main.0.weight": torch.zeros(2), "perceptual_loss.lin0": torch.zeros(2)}
    state = {**last, **{f"loss.{key}": value for key, value in loss.items()}}
    if averages is not None:
        state["model_ema.decay"] = torch.tensor(0.999)
        state["model_ema.num_updates"] = torch.tensor(-1, dtype=torch.int)
        averaged = {**averages, "loss.discriminator.main.0.weight": torch.zeros(2)}
        state |= {f"model_ema.{key.replace('.', '')}": value for key, value in averaged.items()}
    monitored = "ModelCheckpoint{'monitor': 'train/perceptual_loss', 'mode': 'min'}"
    content = {
        "epoch": 329,
        "global_step": 1_000_000,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": state,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 330}}}},
        "callbacks": {monitored: {"best_model_score": torch.tensor(0.2), "best_k_models": {}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}],
        "lr_schedulers": [],
        "MixedPrecision": {"scale": 65536.0, "_growth_tracker": 7},
        "hparams_name": "kwargs",
        "hyper_parameters": {**of_model, "_class_path": model["class_path"]},
    }
    torch.save(content, folder / "imagenet256.ckpt")
    return folder / "imagenet256.ckpt", folder / "imagenet_ibqgan.yaml"
