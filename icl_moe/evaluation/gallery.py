"""Pictures of some episodes for the report: examples, query, prediction and truth, as the model
sees them.
"""

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode, decode_rle
from icl_moe.evaluation.predictions import Condition, Prediction, PredictionLog
from icl_moe.evaluation.report import Cell, Gallery
from icl_moe.evaluation.segmentation import mask_iou
from icl_moe.images import to_image
from icl_moe.inference.model import InContextModel
from icl_moe.tokenizers.boxes import Box, box_iou

EPISODES_SHOWN = 12
_BOX_COLOUR = (255, 70, 70)
_LEAST_SIDE = 256


def draw_gallery(
    model: InContextModel, episodes: EpisodeSet, condition: Condition, log: PredictionLog
) -> Gallery:
    """Episodes at even distances, not chosen by their scores. Images are what the tokenizer makes
    of their codes.
    """
    numbers = np.unique(
        np.linspace(0, len(episodes) - 1, EPISODES_SHOWN).round().astype(int)
    ).tolist()
    rows = []
    for number in tqdm(numbers, desc=f"drawing {condition.task}", unit="episode", leave=False):
        episode = episodes[number]
        images = [
            to_image(pixels)
            for pixels in model.decode(np.stack([pair.image for pair in episode.pairs]))
        ]
        shown = [*images[: condition.shots], images[-1]]
        draw = _segmentation_cells if episode.task.output == "image" else _caption_cells
        rows.append(
            (
                f"{episode.category} · {episode.key}",
                tuple(draw(episode, log[condition, episode.key], shown)),
            )
        )
    title = (
        f"{condition.task.capitalize()}, {condition.describe()}: {len(rows)} of {len(episodes)} "
        f"episodes, at even distances"
    )
    return Gallery(title, tuple(rows))


def _segmentation_cells(
    episode: EvaluationEpisode, prediction: Prediction, images: list[Image.Image]
) -> list[Cell]:
    *examples, query = images
    predicted, true = decode_rle(prediction.mask or {}), episode.true_mask()
    cells = [
        Cell("example", _masked(image, episode.true_mask(pair)))
        for pair, image in enumerate(examples)
    ]
    return [
        *cells,
        Cell("query", query),
        Cell("prediction", _masked(query, predicted), f"IoU {100 * mask_iou(predicted, true):.1f}"),
        Cell("truth", _masked(query, true)),
    ]


def _caption_cells(
    episode: EvaluationEpisode, prediction: Prediction, images: list[Image.Image]
) -> list[Cell]:
    *examples, query = images
    cells = [
        Cell("example", _boxed(image, episode.true_box(pair)), str(episode.meta["captions"][pair]))
        for pair, image in enumerate(examples)
    ]
    true_box = episode.true_box()
    said = [prediction.category] if prediction.category is not None else []
    said += (
        [f"box IoU {100 * box_iou(prediction.box, true_box):.1f}"]
        if prediction.box and true_box
        else []
    )
    caption = f"{prediction.caption} ({', '.join(said)})" if said else str(prediction.caption)
    return [
        *cells,
        Cell("query", query),
        Cell("prediction", _boxed(query, prediction.box), caption),
        Cell("truth", _boxed(query, true_box), str(episode.meta["captions"][-1])),
    ]


def _masked(image: Image.Image, mask_HW: np.ndarray) -> Image.Image:
    """The image in its colours where the mask is, dark and grey elsewhere."""
    grey = np.asarray(image.convert("L").convert("RGB")) * 0.35
    return Image.fromarray(np.where(mask_HW[..., None], np.asarray(image), grey).astype(np.uint8))


def _boxed(image: Image.Image, box: Box | None) -> Image.Image:
    """The image, enlarged so that a thin frame can be drawn on it."""
    factor = -(-_LEAST_SIDE // image.width)
    shown = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if box is not None:
        corners = [value * (side - 1) for value, side in zip(box, shown.size * 2, strict=True)]
        ImageDraw.Draw(shown).rectangle(corners, outline=_BOX_COLOUR, width=3)
    return shown
