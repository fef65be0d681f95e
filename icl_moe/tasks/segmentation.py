"""Segmentation: the mask of what the examples' masks show.

    pair: [BOI] image [BOI] mask [EOC]

The mask is an image, white on black, and its codes are the output: those of the image tokenizer or
of a separate mask tokenizer.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from icl_moe.bootstrap import Statistic
from icl_moe.errors import InputError
from icl_moe.images import to_image
from icl_moe.pictures import Cell, masked
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.sequence import SequenceCodec, SequenceFormat
from icl_moe.tasks.constant_masks import fitted_disc, mean_mask
from icl_moe.tasks.drawn_mask import DrawnMask
from icl_moe.tasks.mask_scores import (
    MaskPair,
    SegmentationScores,
    Standard,
    count_masks,
    mask_iou,
    mask_statistic,
    score_masks,
)
from icl_moe.tasks.one_image import OneImageTask
from icl_moe.tasks.task import (
    Baseline,
    CodeReader,
    Objects,
    Output,
    Truth,
    by_kind,
    check_objects,
    mean_log_probability,
)

_MASKS_IN_CONSTANTS = 256
"""How many examples' masks the constant baselines are fitted to, at most."""

LEAST_SHOWN = 0.01
"""The least share of a query's pixels that a class must cover to be used in swapped examples."""


@dataclass(frozen=True, eq=False)
class SegmentationPair:
    """Codes of the image (N,), see `icl_moe.sequence.Pair`, and of the mask (N,), image codes.

    drawn: the pixels of a mask that was decoded in one pass, which contain more information than
    its codes. log_probability: that of a mask that was decoded code by code, see `DrawnMask`.
    """

    image: np.ndarray
    mask: np.ndarray
    drawn: DrawnMask | None = None
    log_probability: float | None = None


@dataclass(frozen=True, slots=True)
class MaskTarget:
    """The mask of a region's crop at image_size, in COCO's compressed run lengths.

    objects: the same for every class annotated in the crop, including the region's own, as (class,
    run lengths). Evaluation uses them to decide whether a model marks what it was shown.
    ignored: the pixels of which the annotation says nothing, which do not count; empty for none.
    """

    counts: bytes
    objects: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    ignored: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class MaskPicture:
    """A mask at image_size (COCO's compressed run lengths)."""

    counts: bytes

    def draw(self, size: int) -> np.ndarray:
        return decode_rle({"size": [size, size], "counts": self.counts}).astype(bool)


class Segmentation(OneImageTask):
    """Predictions: `codes` (N numbers) and `mask` (COCO's RLE). KEY.json has `masks` and, for the
    query, `objects`.
    """

    name: ClassVar[str] = "segmentation"
    recipe = "modern_64"
    pair_type: ClassVar[type] = SegmentationPair
    measure: ClassVar[str] = "IoU"
    mirrors: ClassVar[bool] = True
    outlines: ClassVar[bool] = True
    one_output: ClassVar[str] = "A segmentation pair must have one output, its mask."

    def output_codes(self, pair: SegmentationPair) -> np.ndarray:
        return pair.mask

    def scored(
        self, pair: SegmentationPair, log_probabilities: Sequence[float | None]
    ) -> SegmentationPair:
        return replace(pair, log_probability=mean_log_probability(log_probabilities))

    def read_at_once(
        self,
        codec: SequenceCodec,
        image: np.ndarray,
        tokens: Sequence[int],
        drawn: Sequence[DrawnMask],
    ) -> SegmentationPair:
        (mask,) = drawn
        return replace(self.read_output(codec, image, tokens), drawn=mask)

    def draw(self, model: CodeReader, pairs: Sequence[SegmentationPair]) -> list[DrawnMask]:
        """The masks of pairs in pixels."""
        written = [pair.mask for pair in pairs if pair.drawn is None]
        if written:
            of_codes = iter(model.decode_masks(np.stack(written)).cpu().numpy())
        return [
            DrawnMask(next(of_codes), log_probability=pair.log_probability)
            if pair.drawn is None
            else pair.drawn
            for pair in pairs
        ]

    def pictures(self, target: MaskTarget, format: SequenceFormat) -> tuple[MaskPicture, ...]:
        return (MaskPicture(target.counts),)

    def surely_fits(self, codec: SequenceCodec, category: str, target: MaskTarget) -> bool:
        return True

    def describe(self, targets: Sequence[MaskTarget], image_size: int) -> dict[str, Any]:
        def rle(counts: bytes) -> dict[str, Any]:
            return {"size": [image_size, image_size], "counts": counts.decode("ascii")}

        return {
            "boxes": [None for _ in targets],
            "masks": [rle(target.counts) for target in targets],
            "objects": [
                {"class": name, "mask": rle(counts)} for name, counts in targets[-1].objects
            ],
            **({"ignored": rle(targets[-1].ignored)} if targets[-1].ignored else {}),
        }

    def verify(self, truth: Truth, image_size: int) -> None:
        masks, pairs = truth.meta.get("masks"), len(truth.pairs)
        if not isinstance(masks, list) or len(masks) != pairs:
            raise InputError(f"its JSON must have {pairs} masks.")
        check_objects(truth, ("mask",))
        objects = [entry["mask"] for entry in truth.meta.get("objects", ())]
        ignored = [truth.meta["ignored"]] if "ignored" in truth.meta else []
        for mask in (*masks, *objects, *ignored):
            if (
                not isinstance(mask, dict)
                or mask.get("size") != [image_size, image_size]
                or not isinstance(mask.get("counts"), str)
            ):
                raise InputError(
                    f"its JSON has a mask that is not RLE of {image_size} x {image_size} pixels."
                )
            decode_rle(mask)

    def said(self, model: CodeReader, pairs: Sequence[SegmentationPair]) -> list[Output]:
        return [
            {"codes": pair.mask.tolist(), "mask": encode_rle(drawn.mask_HW)}
            for pair, drawn in zip(pairs, self.draw(model, pairs), strict=True)
        ]

    def true_output(self, truth: Truth, pair: int = -1) -> Output:
        return {"mask": truth.meta["masks"][pair], **(_ignored(truth) if pair == -1 else {})}

    def score(
        self,
        sets: Sequence[Sequence[Output]],
        truths: Sequence[Truth],
        format: SequenceFormat,
        quick: bool = False,
    ) -> list[SegmentationScores]:
        standard = _standard(truths)
        return [score_masks(_mask_pairs(outputs, truths), not quick, standard) for outputs in sets]

    def statistic(
        self, sets: Sequence[Sequence[Output]], truths: Sequence[Truth], format: SequenceFormat
    ) -> Statistic:
        counts = count_masks(pair for outputs in sets for pair in _mask_pairs(outputs, truths))
        return mask_statistic(counts, _standard([*truths] * len(sets)))

    def baselines(self, truths: Sequence[Truth]) -> list[Baseline]:
        """The whole image; two masks that are the same for all queries, namely the mean of the
        examples' masks and the disc in the middle that fits these best, which show how far the
        typical place of objects alone leads; and, as an oracle, every annotated object of the
        query.
        """
        masks = [_mask(self.true_output(truth)) for truth in truths]
        whole = [{"mask": encode_rle(np.ones_like(mask_HW))} for mask_HW in masks]
        found = [Baseline("the whole image", "whole image", whole)]
        if shown := self._examples_masks(truths):
            mean_HW = mean_mask([mask_HW for _, mask_HW in shown])
            for name, kind, mask_HW in (
                ("the mean of the examples' masks, whatever the query", "mean mask", mean_HW),
                ("a disc in the middle, whatever the query", "centred disc", fitted_disc(shown)),
            ):
                found.append(Baseline(name, kind, [{"mask": encode_rle(mask_HW)}] * len(truths)))
        if all("objects" in truth.meta for truth in truths):
            every = [
                {"mask": encode_rle(np.any([empty_HW, *map(_mask, objects)], axis=0))}
                for truth, empty_HW in zip(truths, map(np.zeros_like, masks), strict=True)
                for objects in [itertools.chain.from_iterable(self.objects(truth).values())]
            ]
            found.append(Baseline("every annotated object of the query", "every object", every))
        return found

    def _examples_masks(self, truths: Sequence[Truth]) -> list[tuple[str, np.ndarray]]:
        """Class and mask of at most `_MASKS_IN_CONSTANTS` examples, evenly spaced."""
        places = [(truth, n) for truth in truths for n in range(len(truth.pairs) - 1)]
        taken = places[:: -(-len(places) // _MASKS_IN_CONSTANTS) or 1]
        return [(truth.category, _mask(self.true_output(truth, number))) for truth, number in taken]

    def objects(self, truth: Truth) -> Objects:
        ignored = _ignored(truth)
        return {
            kind: [record | ignored for record in records]
            for kind, records in by_kind(truth).items()
        }

    def can_be_shown(self, outputs: Sequence[Output]) -> bool:
        return any(_mask(output).mean() >= LEAST_SHOWN for output in outputs)

    def agreement(self, prediction: Output, right: Sequence[Output]) -> float:
        return max(_iou(prediction, output) for output in right)

    def show(self, image: Image.Image, output: Output) -> Image.Image:
        return masked(image, _mask(output))

    def caption_of(self, output: Output, truth: Output | None = None) -> str:
        return "" if truth is None else f"IoU {100 * _iou(output, truth):.1f}"

    def preview(
        self, truth: Truth, number: int, image: Image.Image, model: CodeReader
    ) -> tuple[list[Cell], str]:
        (brightness_HW,) = model.decode_masks(truth.pairs[number].mask[None])
        mask = to_image(brightness_HW.expand(3, -1, -1))
        before = Image.fromarray(_mask(self.true_output(truth, number))).convert("RGB")
        cells = [Cell("image", image), Cell("mask as tokens", mask), Cell("mask", before)]
        return cells, ""


def _ignored(truth: Truth) -> dict[str, Any]:
    """What a true output of a query has if some of its pixels do not count."""
    return {"ignored": truth.meta["ignored"]} if "ignored" in truth.meta else {}


def _iou(prediction: Output, true: Output) -> float:
    """The IoU of an output's mask with a true one, in the pixels that count."""
    counted = ~decode_rle(true["ignored"]) if "ignored" in true else True
    return mask_iou(_mask(prediction) & counted, _mask(true) & counted)


def _mask_pairs(outputs: Sequence[Output], truths: Sequence[Truth]) -> Iterator[MaskPair]:
    for truth, output in zip(truths, outputs, strict=True):
        ignored = decode_rle(truth.meta["ignored"]) if "ignored" in truth.meta else None
        yield MaskPair(truth.category, _mask(output), decode_rle(truth.meta["masks"][-1]), ignored)


def _standard(truths: Sequence[Truth]) -> Standard | None:
    """The benchmark that all episodes are of, and the fold of each; None without one."""
    names = {truth.meta.get("standard") for truth in truths}
    if len(names) != 1 or None in names:
        return None
    return Standard(str(names.pop()), tuple(int(truth.meta["fold"]) for truth in truths))


def _mask(output: Output) -> np.ndarray:
    return decode_rle(output["mask"])
