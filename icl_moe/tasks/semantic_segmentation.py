"""Semantic segmentation: several classes in one picture, each painted in a colour that the examples
give.

    pair: [BOI] image [BOI] painted classes [EOC]

The painted picture is black where none of the classes is, and its codes, those of the tokenizer of
masks, are the output. All pairs of an episode show the same classes in the same colours. The
colours are drawn anew for each episode, so that only the examples tell which class has which.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from icl_moe.bootstrap import Statistic
from icl_moe.errors import InputError
from icl_moe.images import to_image
from icl_moe.pictures import Cell, overlaid
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.sequence import SequenceCodec, SequenceFormat
from icl_moe.tasks.drawn_mask import DrawnClasses, DrawnMask
from icl_moe.tasks.mask_scores import (
    SegmentationScores,
    count_masks,
    mask_iou,
    mask_statistic,
    score_masks,
)
from icl_moe.tasks.one_image import OneImageTask
from icl_moe.tasks.task import CodeReader, ExpectedReader, Output, Truth

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
}
"""The colours of classes. With black they are the corners of the RGB cube, of which no two have a
mixture that is nearest to a third one, so soft edges between classes look like neither of the rest.
"""


@dataclass(frozen=True, eq=False)
class PaintedPair:
    """Codes of the image (N,), see `icl_moe.sequence.Pair`, and of the painted picture (N,), image
    codes.

    drawn: the mask of each colour that the examples show, if the picture was decoded in one pass;
    the masks contain more information than its codes.
    """

    image: np.ndarray
    painted: np.ndarray
    drawn: DrawnClasses | None = None


@dataclass(frozen=True, slots=True)
class ClassesTarget:
    """The masks of several classes in a region's crop at image_size, which do not overlap, in
    COCO's compressed run lengths, as (class, run lengths) in the order of the names.

    colours: the name of each class's colour, in that order. Empty in a pool, since each episode has
    its own.
    """

    masks: tuple[tuple[str, bytes], ...]
    colours: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PaintedPicture:
    """Masks at image_size (COCO's compressed run lengths), each with the name of its colour."""

    masks: tuple[tuple[str, bytes], ...]

    def draw(self, size: int) -> np.ndarray:
        masks = {
            colour: decode_rle({"size": [size, size], "counts": counts})
            for colour, counts in self.masks
        }
        return paint(masks, (size, size)) > 0


def paint(masks: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The picture, uint8 (H, W, 3), of masks (H, W) by the names of their colours."""
    painted_HW3 = np.zeros((*shape, 3), dtype=np.uint8)
    for colour, mask_HW in masks.items():
        painted_HW3[mask_HW] = COLOURS[colour]
    return painted_HW3


def find_colours(pixels_3HW: torch.Tensor) -> dict[str, np.ndarray]:
    """The mask (H, W) of each colour that occurs in a painted picture, pixels in [-1, 1]: the
    nearest corner of the RGB cube has the channels that are brighter than the middle.
    """
    levels_HW3 = (pixels_3HW > 0).movedim(0, -1).cpu().numpy()
    masks = {
        name: (levels_HW3 == (np.array(colour) > 0)).all(axis=-1)
        for name, colour in COLOURS.items()
    }
    return {name: mask_HW for name, mask_HW in masks.items() if mask_HW.any()}


class SemanticSegmentation(OneImageTask):
    """Predictions: `codes` (N numbers) and `colours`, the mask of each colour that occurs (COCO's
    RLE). KEY.json has `colours`, class -> colour, and for each pair `class_masks`, class -> RLE.
    """

    name: ClassVar[str] = "semantic_segmentation"
    recipe = "modern_colours"
    pair_type: ClassVar[type] = PaintedPair
    measure: ClassVar[str] = "IoU"
    outlines: ClassVar[bool] = True
    one_output: ClassVar[str] = "A pair of semantic segmentation must have one output, its picture."

    def output_codes(self, pair: PaintedPair) -> np.ndarray:
        return pair.painted

    def expected_masks(
        self,
        model: ExpectedReader,
        probabilities_BNK: torch.Tensor,
        examples: Sequence[Sequence[PaintedPair]],
    ) -> torch.Tensor:
        """The masks of all `COLOURS`; those of colours that no example shows are black, except
        where there are no examples.
        """
        corners_C3 = np.array(list(COLOURS.values())) > 0
        brightness_BCHW = 2 * model.decode_colours(probabilities_BNK, corners_C3) - 1
        for masks_CHW, pairs in zip(brightness_BCHW, examples, strict=True):
            if not pairs:
                continue
            painted = model.decode_painted(np.stack([pair.painted for pair in pairs]))
            found = {name for pixels_3HW in painted for name in find_colours(pixels_3HW)}
            masks_CHW[[name not in found for name in COLOURS]] = -1
        return brightness_BCHW

    def read_at_once(
        self,
        codec: SequenceCodec,
        image: np.ndarray,
        tokens: Sequence[int],
        drawn: Sequence[DrawnMask],
    ) -> PaintedPair:
        masks = zip(COLOURS, drawn, strict=True)
        seen = {name: mask for name, mask in masks if (mask.brightness_HW > -1).any()}
        return replace(self.read_output(codec, image, tokens), drawn=DrawnClasses(seen))

    def pictures(self, target: ClassesTarget, format: SequenceFormat) -> tuple[PaintedPicture, ...]:
        counts = (counts for _, counts in target.masks)
        return (PaintedPicture(tuple(zip(target.colours, counts, strict=False))),)

    def target_of(self, target: ClassesTarget, meta: Mapping[str, Any]) -> ClassesTarget:
        return replace(target, colours=tuple(meta["colours"][name] for name, _ in target.masks))

    def describe(self, targets: Sequence[ClassesTarget], image_size: int) -> dict[str, Any]:
        size, query = [image_size, image_size], targets[-1]
        names = [name for name, _ in query.masks]
        return {
            "boxes": [None for _ in targets],
            "colours": dict(zip(names, query.colours, strict=True)),
            "class_masks": [
                {
                    name: {"size": size, "counts": counts.decode("ascii")}
                    for name, counts in target.masks
                }
                for target in targets
            ],
        }

    def verify(self, truth: Truth, image_size: int) -> None:
        colours, masks = truth.meta.get("colours"), truth.meta.get("class_masks")
        if (
            not isinstance(colours, dict)
            or not colours
            or not all(colour in COLOURS for colour in colours.values())
            or len(set(colours.values())) < len(colours)
        ):
            raise InputError(
                f"its JSON must have colours, one of {', '.join(COLOURS)} for each class."
            )
        if not isinstance(masks, list) or len(masks) != len(truth.pairs):
            raise InputError(f"its JSON must have class_masks of {len(truth.pairs)} pairs.")
        for of_pair in masks:
            if not isinstance(of_pair, dict) or of_pair.keys() != colours.keys():
                raise InputError(
                    "its JSON must have class_masks of exactly the classes of colours."
                )
            for rle in of_pair.values():
                if not isinstance(rle, dict) or rle.get("size") != [image_size, image_size]:
                    raise InputError(
                        f"its JSON has a mask that is not RLE of {image_size} x {image_size} "
                        "pixels."
                    )
                decode_rle(rle)

    def said(self, model: CodeReader, pairs: Sequence[PaintedPair]) -> list[Output]:
        masks_of = self._colour_masks(model, pairs)
        return [
            {
                "codes": pair.painted.tolist(),
                "colours": {name: encode_rle(mask_HW) for name, mask_HW in masks.items()},
            }
            for pair, masks in zip(pairs, masks_of, strict=True)
        ]

    def _colour_masks(
        self, model: CodeReader, pairs: Sequence[PaintedPair]
    ) -> list[dict[str, np.ndarray]]:
        """For each pair, the mask (H, W) of each colour in its painted picture."""
        written = [pair.painted for pair in pairs if pair.drawn is None]
        of_codes = iter(model.decode_painted(np.stack(written)) if written else ())
        return [
            find_colours(next(of_codes)) if pair.drawn is None else pair.drawn.disjoint_masks()
            for pair in pairs
        ]

    def true_output(self, truth: Truth, pair: int = -1) -> Output:
        masks, colours = truth.meta["class_masks"][pair], truth.meta["colours"]
        return {"colours": {colours[name]: rle for name, rle in masks.items()}}

    def score(
        self,
        sets: Sequence[Sequence[Output]],
        truths: Sequence[Truth],
        format: SequenceFormat,
        quick: bool = False,
    ) -> list[SegmentationScores]:
        """The scores of the masks of single classes, one mask for each class of each episode.
        Intervals are over episodes, since the masks of one query are not independent.
        """
        queries = _queries(truths)
        found = [
            score_masks(_class_masks(outputs, truths), not quick, queries=queries)
            for outputs in sets
        ]
        return [replace(scores, episodes=len(truths)) for scores in found]

    def statistic(
        self, sets: Sequence[Sequence[Output]], truths: Sequence[Truth], format: SequenceFormat
    ) -> Statistic:
        masks = mask_statistic(
            count_masks(pair for outputs in sets for pair in _class_masks(outputs, truths))
        )
        output_E = np.array(_queries([*truths] * len(sets)))
        return masks._replace(of=lambda weights_BO: masks.of(weights_BO[:, output_E]))

    def agreement(self, prediction: Output, right: Sequence[Output]) -> float:
        return max(_mean_iou(prediction, output) for output in right)

    def show(self, image: Image.Image, output: Output) -> Image.Image:
        for name, rle in output["colours"].items():
            image = overlaid(image, decode_rle(rle), COLOURS[name])
        return image

    def caption_of(self, output: Output, truth: Output | None = None) -> str:
        return "" if truth is None else f"mean IoU {100 * _mean_iou(output, truth):.1f}"

    def preview(
        self, truth: Truth, number: int, image: Image.Image, model: CodeReader
    ) -> tuple[list[Cell], str]:
        (pixels_3HW,) = model.decode_painted(truth.pairs[number].painted[None])
        masks = {
            name: decode_rle(rle)
            for name, rle in self.true_output(truth, number)["colours"].items()
        }
        shape = next(iter(masks.values())).shape
        before = Image.fromarray(paint(masks, shape))
        cells = [
            Cell("image", image),
            Cell("classes as tokens", to_image(pixels_3HW)),
            Cell("classes", before),
        ]
        words = (f"{name}: {colour}" for name, colour in truth.meta["colours"].items())
        return cells, ", ".join(words)


def _queries(truths: Sequence[Truth]) -> list[int]:
    """The number of the query of each class mask."""
    return [n for n, truth in enumerate(truths) for _ in truth.meta["class_masks"][-1]]


def _class_masks(
    outputs: Iterable[Output], truths: Iterable[Truth]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(class, predicted mask, true mask) of each class of each episode. What is painted in a colour
    that the episode does not have is of no class.
    """
    for output, truth in zip(outputs, truths, strict=True):
        for name, rle in truth.meta["class_masks"][-1].items():
            true_HW = decode_rle(rle)
            yield name, _mask(output, truth.meta["colours"][name], true_HW.shape), true_HW


def _mean_iou(output: Output, truth: Output) -> float:
    """The mean over the colours of the truth."""
    true = {name: decode_rle(rle) for name, rle in truth["colours"].items()}
    ious = [mask_iou(_mask(output, name, mask.shape), mask) for name, mask in true.items()]
    return float(np.mean(ious))


def _mask(output: Output, colour: str, shape: tuple[int, ...]) -> np.ndarray:
    rle = output["colours"].get(colour)
    return np.zeros(shape, dtype=bool) if rle is None else decode_rle(rle)
