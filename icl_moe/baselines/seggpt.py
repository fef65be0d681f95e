"""SegGPT (Wang et al. 2023, "SegGPT: Segmenting Everything In Context") by transformers, on the
pictures that the shards were built of, each at SegGPT's own size.

Masks are shown to it in white on black. What it paints is read off by its brightness.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import SegGptForImageSegmentation

from icl_moe.baselines.weights import load_published
from icl_moe.data.shards import ShardSet
from icl_moe.devices import find_device
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.template import example_mask
from icl_moe.rle import encode_rle
from icl_moe.tasks.task import Output

PUBLISHED = "BAAI/seggpt-vit-large"

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The mean and deviation of ImageNet's channels, by which SegGPT's images and masks are
normalised.
"""


def predict_masks(
    shards: ShardSet,
    episodes: EpisodeSet,
    shots: int,
    weights: str | None = None,
    images: Path | None = None,
    device: str | None = None,
    swapped: bool = False,
) -> list[Output]:
    """The masks of all queries, or of those with swapped examples, after `shots` examples each,
    whose features are averaged (SegGPT's feature ensemble) if there are several.

    weights: a folder or Hub id, by default `PUBLISHED`. Raises InputError if they cannot be loaded,
    and if there are no examples.
    """
    if not shots:
        raise InputError("SegGPT needs examples: --shots must be at least 1.")
    found = load_published(SegGptForImageSegmentation, weights or PUBLISHED, "SegGPT's weights")
    model: SegGptForImageSegmentation = found.eval().to(find_device(device))
    photographs = Photographs(shards, episodes.task.name, images)
    outputs = []
    for truth, source in tqdm(episodes.questions(swapped), "SegGPT", unit="episode"):
        pictures = [photographs.show(source, number) for number in range(shots)]
        masks = [
            example_mask(source, number, picture.size).convert("RGB")
            for number, picture in enumerate(pictures)
        ]
        painted_HW = paint(model, pictures, masks, photographs.show(truth, -1))
        outputs.append({"mask": encode_rle(_resized(painted_HW, episodes.image_size) > 0.5)})
    return outputs


@torch.inference_mode()
def paint(
    model: SegGptForImageSegmentation,
    examples: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    query: Image.Image,
) -> Tensor:
    """The brightness that SegGPT paints in each pixel of the query, 0..1, at its own size."""
    height, width = _size(model)
    place = model.device

    def normalised(pictures: Sequence[Image.Image], resample: Image.Resampling) -> Tensor:
        arrays = [np.asarray(p.convert("RGB").resize((width, height), resample)) for p in pictures]
        pixels_B3HW = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _DEVIATION))
        return ((pixels_B3HW - mean) / deviation).to(place, model.dtype)

    result = model(
        pixel_values=normalised([query] * len(examples), Image.Resampling.BICUBIC),
        prompt_pixel_values=normalised(examples, Image.Resampling.BICUBIC),
        prompt_masks=normalised(masks, Image.Resampling.NEAREST),
        feature_ensemble=len(examples) > 1,
        embedding_type="semantic",
    )
    # Above is what it paints over the examples' masks, below over the query's.
    painted_B3HW = result.pred_masks[:, :, height:].float().cpu()
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _DEVIATION))
    return (painted_B3HW * deviation + mean).clamp(0, 1).mean(dim=(0, 1))


def _size(model: SegGptForImageSegmentation) -> tuple[int, int]:
    """Height and width of one picture; SegGPT's input is two of them, one above the other."""
    size = model.config.image_size
    assert not isinstance(size, int), "SegGPT's configuration has a height and a width"
    return size[0] // 2, size[1]


def _resized(values_HW: Tensor, size: int) -> np.ndarray:
    resized = F.interpolate(values_HW[None, None], (size, size), mode="bilinear")
    return np.asarray(resized[0, 0])
