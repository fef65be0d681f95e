"""The two optional losses of VQ-GAN training: a perceptual loss and a patch discriminator."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from icl_moe.errors import InputError

_POOL_AFTER = ("conv1", "fire4", "fire8")
_COMPARED = ("conv1", "fire3", "fire5", "fire7", "fire9")


class PerceptualLoss(nn.Module):
    """The distance of two pictures in SqueezeNet 1.0's features (LPIPS without learned weights,
    Zhang et al., 2018).

    At five depths the features are normalised to unit length over the channels; the loss is the
    mean of their squared distance over pixels and pictures, summed over the depths. `weights`: an
    .npz of arrays NAME.w and NAME.b for conv1 and fire2..fire9's _s, _e1 and _e3, in Caffe's
    conventions (BGR, 0..255, mean subtracted). Raises InputError for any other file.
    """

    _mean: Tensor

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        try:
            with np.load(weights, allow_pickle=False) as arrays:
                for name in (
                    "conv1",
                    *(f"fire{i}_{part}" for i in range(2, 10) for part in ("s", "e1", "e3")),
                ):
                    for suffix in ("w", "b"):
                        self.register_buffer(
                            f"{name}_{suffix}",
                            torch.from_numpy(arrays[f"{name}.{suffix}"].astype(np.float32)),
                        )
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            AttributeError,
            zipfile.BadZipFile,
        ) as error:
            raise InputError(
                f"perceptual_network: {weights} holds no SqueezeNet 1.0 weights as .npz ({error})."
            ) from error
        self.register_buffer("_mean", torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1))

    def forward(self, drawn_B3HW: Tensor, given_B3HW: Tensor) -> Tensor:
        distances = []
        for a, b in zip(self._features(drawn_B3HW), self._features(given_B3HW), strict=True):
            distances.append(
                (F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6))
                .square()
                .sum(dim=1)
                .mean()
            )
        return torch.stack(distances).sum()

    def _features(self, pixels_B3HW: Tensor) -> list[Tensor]:
        h = (pixels_B3HW.float().flip(1) + 1) * 127.5 - self._mean
        features = []
        for name in ("conv1", *(f"fire{i}" for i in range(2, 10))):
            if name == "conv1":
                h = F.relu(F.conv2d(h, *self._weights("conv1"), stride=2))
            else:
                squeezed = F.relu(F.conv2d(h, *self._weights(f"{name}_s")))
                one = F.conv2d(squeezed, *self._weights(f"{name}_e1"))
                three = F.conv2d(squeezed, *self._weights(f"{name}_e3"), padding=1)
                h = F.relu(torch.cat([one, three], dim=1))
            if name in _COMPARED:
                features.append(h)
            if name in _POOL_AFTER:
                h = F.max_pool2d(h, 3, stride=2, ceil_mode=True)
        return features

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"{name}_w"), self.get_buffer(f"{name}_b")


class Adversary:
    """A PatchGAN discriminator (Isola et al., 2017) and its optimizer, trained with the hinge loss
    alongside the tokenizer.
    """

    def __init__(self, accelerator: Accelerator, learning_rate: float) -> None:
        self._accelerator = accelerator
        self._judge = _PatchDiscriminator()
        optimizer = torch.optim.AdamW(
            self._judge.parameters(), lr=learning_rate, betas=(0.5, 0.9), weight_decay=0.0
        )
        self._wrapped, self._optimizer = accelerator.prepare(self._judge, optimizer)

    def fooling_loss(
        self, drawn_B3HW: Tensor, reconstruction: Tensor, last_layer: Tensor
    ) -> Tensor:
        """-mean(D(drawn)), weighted by |d reconstruction / d last layer| / |d this / d last layer|
        (Esser et al., 2021, eq. 7).
        """
        self._judge.requires_grad_(False)
        loss = -self._judge(drawn_B3HW).float().mean()
        self._judge.requires_grad_(True)
        (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (of_loss,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        weight = of_reconstruction.float().norm() / (of_loss.float().norm() + 1e-4)
        weight = self._accelerator.reduce(weight.detach(), "mean")
        return weight.clamp(0.0, 1e4) * loss

    def train_step(self, drawn_B3HW: Tensor, given_B3HW: Tensor, learning_rate: float) -> Tensor:
        """One step of the discriminator. Returns its hinge loss, which is 1 if it cannot tell the
        two apart.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # One call for both inputs: on several devices a second call before the backward pass is not
        # allowed.
        drawn_logits, given_logits = (
            self._wrapped(torch.cat([drawn_B3HW.detach().float(), given_B3HW])).float().chunk(2)
        )
        loss = 0.5 * (F.relu(1 + drawn_logits).mean() + F.relu(1 - given_logits).mean())
        self._optimizer.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        self._optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"judge": self._judge.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._judge.load_state_dict(state["judge"])
        self._optimizer.load_state_dict(state["optimizer"])


class _PatchDiscriminator(nn.Module):
    """logits_B1hw, one for each patch of 70 x 70 pixels: high for given pictures, low for
    reconstructions.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for width_in, stride in ((1, 2), (2, 2), (4, 1)):
            width = 2 * width_in * channels
            layers += [
                nn.Conv2d(width_in * channels, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * channels, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        return self.layers(pixels_B3HW)
