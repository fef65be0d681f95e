"""The mean average precision of dense captioning: boxes and their descriptions together.

Johnson, Karpathy and Fei-Fei 2016, "DenseCap", as their `eval/eval_utils.lua` computes it. In every
image, regions whose boxes overlap by at least `MERGED` are one region with several descriptions
and the mean of their boxes. Detections, in the order of their confidence, are assigned to the
region that they overlap most, and a region counts for the first of them alone. A detection is right
if it is the first of its region, its box overlaps that by at least an IoU threshold, and the METEOR
of its text exceeds a METEOR threshold. The average precision is the mean over the recalls 0, 0.01,
..., 1 of the highest precision at this recall or a higher one; the mean over all pairs of
thresholds is the score.

Two things are settled here that DenseCap leaves to the order of its lists. Detections of equal
confidence enter the curve of precision and recall together; within an image, that with the larger
overlap comes first. And boxes are fractions of the image, so that no pixel is added to their sides.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from icl_moe.boxes import Box, box_iou

IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
METEOR_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
MERGED = 0.7
"""The IoU from which regions of an image count as one."""


class Region(NamedTuple):
    """What is to be found: a box in an image, and the texts that describe it."""

    image: str
    box: Box
    texts: tuple[str, ...]


class Detection(NamedTuple):
    """What was written. box: None where none was."""

    image: str
    box: Box | None
    text: str
    confidence: float = 0.0


class Match(NamedTuple):
    """A detection and the region that it overlaps most. overlap: their IoU. is_first: whether no
    detection before it was assigned to this region. references: the texts of the region, none where
    the detection overlaps nothing.
    """

    confidence: float
    overlap: float
    is_first: bool
    text: str
    references: tuple[str, ...]

    @property
    def needs_meteor(self) -> bool:
        """Whether the METEOR of its text matters and must be computed. An empty text has a METEOR
        of 0.
        """
        return self.is_first and self.overlap >= min(IOU_THRESHOLDS) and bool(self.text)

    @property
    def all_texts(self) -> tuple[str, ...]:
        """The text of the detection and the texts of the region."""
        return self.text, *self.references


class Matched(NamedTuple):
    """What `match` finds: the detections by falling confidence, and how many regions there are to
    find.
    """

    matches: tuple[Match, ...]
    regions: int

    def with_texts(self, texts: Mapping[str, str]) -> "Matched":
        """The same matches with each text replaced, for example by the tokenised text."""
        return self._replace(
            matches=tuple(
                match._replace(
                    text=texts[match.text],
                    references=tuple(texts[text] for text in match.references),
                )
                for match in self.matches
            )
        )


def match(detections: Sequence[Detection], regions: Sequence[Region]) -> Matched:
    """Assign each detection to a region. The result does not depend on the order of either list."""
    of_image: dict[str, list[Region]] = {}
    for region in sorted(regions):
        of_image.setdefault(region.image, []).append(region)
    merged = {image: _merged(found) for image, found in of_image.items()}
    best = [_best(detection, merged.get(detection.image, [])) for detection in detections]

    def order(place: int) -> tuple[float, float, str, str, Box]:
        detection, (overlap, _) = detections[place], best[place]
        box = detection.box or (0.0, 0.0, 0.0, 0.0)
        return -detection.confidence, -overlap, detection.image, detection.text, box

    matches: list[Match] = []
    used: set[tuple[str, int]] = set()
    for place in sorted(range(len(detections)), key=order):
        detection, (overlap, number) = detections[place], best[place]
        texts = merged[detection.image][number].texts if overlap else ()
        is_first = overlap > 0 and (detection.image, number) not in used
        if overlap:
            used.add((detection.image, number))
        matches.append(Match(detection.confidence, overlap, is_first, detection.text, texts))
    return Matched(tuple(matches), sum(map(len, merged.values())))


def mean_average_precision(matched: Matched, meteors: Sequence[float]) -> float:
    """The score, 0..1, with the METEOR of each match (any number where `needs_meteor` is false)."""
    matches, regions = matched
    if not matches or not regions:
        return 0.0
    confidences_D = np.array([match.confidence for match in matches])
    ends_P = np.flatnonzero(np.append(confidences_D[1:] != confidences_D[:-1], True))
    overlaps_D = np.array([match.overlap if match.needs_meteor else 0.0 for match in matches])
    meteors_D = np.array(meteors, dtype=np.float64)
    found = []
    for least in IOU_THRESHOLDS:
        for more_than in METEOR_THRESHOLDS:
            right_D = (overlaps_D >= least) & (meteors_D > more_than)
            right_P = np.cumsum(right_D)[ends_P]
            found.append(_average_precision(right_P, ends_P + 1, regions))
    return float(np.mean(found))


def _average_precision(right_P: np.ndarray, count_P: np.ndarray, regions: int) -> float:
    """The average precision of a curve of P points, with so many detections each, so many of them
    right.
    """
    precision_P = right_P / count_P
    reached_RP = 100 * right_P[None] >= np.arange(101)[:, None] * regions
    return float(np.where(reached_RP, precision_P[None], 0.0).max(axis=1).mean())


def _best(detection: Detection, regions: Sequence[Region]) -> tuple[float, int]:
    """The IoU with the region that a detection overlaps most, and its number; the first of
    several.
    """
    overlaps = [_iou(detection.box, region.box) if detection.box else 0.0 for region in regions]
    most = max(overlaps, default=0.0)
    return most, overlaps.index(most) if overlaps else -1


def _merged(regions: Sequence[Region]) -> list[Region]:
    """The regions of an image, with overlapping regions merged into one. The region that overlaps
    the most others is merged with these first.
    """
    overlaps = np.array([[_iou(a.box, b.box) for b in regions] for a in regions])
    np.fill_diagonal(overlaps, 1.0)
    merged = []
    left_RR = overlaps >= MERGED
    while left_RR.any():
        group = np.flatnonzero(left_RR[left_RR.sum(axis=1).argmax()]).tolist()
        left_RR[group], left_RR[:, group] = False, False
        boxes = np.array([regions[number].box for number in group])
        x1, y1, x2, y2 = boxes.mean(axis=0).tolist()
        texts = tuple(text for number in group for text in regions[number].texts)
        merged.append(Region(regions[group[0]].image, (x1, y1, x2, y2), texts))
    return merged


def _iou(a: Box, b: Box) -> float:
    """The intersection over union, rounded, so that a value of exactly a threshold reaches it in
    spite of rounding errors.
    """
    return round(box_iou(a, b), 9)
