"""Captioning: the description of a region of the class that the examples show, with its box.

    pair:            [BOI] image [BOT] text [EOC] padding
    with box=image:  [BOI] image [BOI] box [BOT] text [EOC] padding

The text's template is in caption_template.py. A box drawn as an image is 0 on the object and 1
elsewhere, as in the paper.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from icl_moe.attributes import Modality
from icl_moe.bootstrap import Statistic, mean_intervals, mean_statistic
from icl_moe.boxes import Box, box_iou, box_to_bins, brightest_box
from icl_moe.errors import InputError
from icl_moe.images import box_of_mask, box_to_mask, to_image
from icl_moe.pictures import Cell, boxed
from icl_moe.sequence import Part, SequenceCodec, SequenceFormat, SequenceWriter
from icl_moe.tasks.caption_scores import (
    COUNTED,
    CaptionScores,
    count_captions,
    counted_scores,
    rouge_l,
    score_captions,
    tokenise,
)
from icl_moe.tasks.caption_styles import StyleJudge
from icl_moe.tasks.caption_template import (
    CaptionText,
    caption_grammar,
    given_category,
    longest_caption,
    read_caption,
    write_caption,
)
from icl_moe.tasks.dense_captions import Detection, Matched, Region, match
from icl_moe.tasks.grammar import Grammar, forced, image_codes
from icl_moe.tasks.task import (
    Baseline,
    CodeReader,
    Judge,
    Kind,
    Objects,
    Output,
    Task,
    Truth,
    by_kind,
    check_objects,
    mean_log_probability,
)


@dataclass(frozen=True, eq=False)
class CaptionPair:
    """Image codes (N,), and the content of the caption. `category` and `box` are None if the format
    lacks them.

    box_image: codes (N,) of the box drawn as an image, only with box=image. `box` is then known
    only if a model wrote the drawing in one pass. log_probability: the mean log-probability of the
    text's tokens, if a model wrote the caption.
    """

    image: np.ndarray
    caption: str
    category: str | None = None
    box: Box | None = None
    box_image: np.ndarray | None = None
    log_probability: float | None = None


@dataclass(frozen=True, slots=True)
class CaptionTarget:
    """The annotations of a region: its box in fractions of the crop, its text, and all references
    for a prediction.

    objects: all that is described in the region's image, of its own class and of others: (class,
    style, text, box). Evaluation tells by them whether a model describes what it was shown.
    """

    box: Box
    caption: str
    references: tuple[str, ...] = ()
    objects: Sequence[tuple[str, str, str, Box]] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class BoxPicture:
    """A box drawn as the paper's binary image: 0 on the object and 1 elsewhere."""

    box: Box

    def draw(self, size: int) -> np.ndarray:
        return ~box_to_mask(self.box, size)


_DARK = 2 / 3
"""The level, from black to white, below which an expected pixel speaks for the drawn box."""


class Captioning(Task):
    """Predictions: `caption`, `category` and `box` (normalised) if the format has them, and the
    `confidence` of a model: the mean log-probability of its text's tokens. KEY.json has `boxes`,
    `captions`, `references` and, for the query, `objects`.
    """

    name: ClassVar[str] = "captioning"
    recipe = "modern_64"
    pair_type: ClassVar[type] = CaptionPair
    measure: ClassVar[str] = "ROUGE-L"

    def outputs(self, format: SequenceFormat) -> tuple[Modality, ...]:
        return ("image", "text") if format.box == "image" else ("text",)

    def write_output(self, writer: SequenceWriter, pair: CaptionPair) -> None:
        vocabulary = writer.format.vocabulary
        if writer.format.box == "image":
            if pair.box_image is None:
                raise InputError(
                    "A caption pair lacks the image of its box, which caption.box=image requires."
                )
            writer.marker(vocabulary.boi, "image")
            writer.drawn(pair.box_image)
        writer.marker(vocabulary.bot, "text")
        caption = CaptionText(pair.category, pair.box, pair.caption)
        tokens = write_caption(writer.codec, caption)
        given = 0
        if writer.format.category == "given":
            given = len(given_category(writer.codec, pair.category))
            writer.text(tokens[:given], "given")
        writer.text([*tokens[given:], vocabulary.eoc], "output")

    def open_output(self, writer: SequenceWriter, category: str) -> None:
        if writer.format.box == "image":
            writer.marker(writer.format.vocabulary.boi, "image")
            return
        writer.marker(writer.format.vocabulary.bot, "text")
        if writer.format.category == "given":
            writer.text(given_category(writer.codec, category), "given")

    def read_pair(
        self, codec: SequenceCodec, image: np.ndarray, outputs: Sequence[Part]
    ) -> CaptionPair:
        vocabulary = codec.format.vocabulary
        drawn = [tokens for _, tokens in outputs if int(tokens[0]) in vocabulary.image_range]
        texts = [tokens for _, tokens in outputs if int(tokens[0]) not in vocabulary.image_range]
        if not texts or int(texts[-1][-1]) != vocabulary.eoc:
            raise InputError("A caption does not end with [EOC].")
        caption = read_caption(codec, (int(token) for token in np.concatenate(texts)[:-1]))
        box_image = vocabulary.to_codes(drawn[0]) if drawn else None
        return CaptionPair(image, caption.caption, caption.category, caption.box, box_image)

    def category_of(self, pair: CaptionPair) -> str:
        return pair.category or ""

    def grammar(self, codec: SequenceCodec, category: str) -> Grammar:
        if codec.format.box == "image":
            yield from image_codes(codec.format)
            yield from forced([codec.format.vocabulary.bot])
        yield from caption_grammar(codec, category)

    def read_output(
        self, codec: SequenceCodec, image: np.ndarray, tokens: Sequence[int]
    ) -> CaptionPair:
        n, vocabulary = codec.format.codes_per_image, codec.format.vocabulary
        box_image = None
        if codec.format.box == "image":
            box_image, tokens = vocabulary.to_codes(np.array(tokens[:n])), tokens[n + 1 :]
        caption = read_caption(codec, tokens[:-1])
        return CaptionPair(image, caption.caption, caption.category, caption.box, box_image)

    def settle(self, brightness_HW: np.ndarray) -> np.ndarray:
        """Returns the drawing of the box that is the darkest, compared with `_DARK`. So the box is
        whole even if the model is unsure of its edges.
        """
        box = brightest_box(2 * _DARK - 1 - brightness_HW)
        return ~box_to_mask(box, len(brightness_HW))

    def with_image(self, pair: CaptionPair, mask_HW: np.ndarray) -> CaptionPair:
        """Returns the pair with the exact box, which the drawing in codes may miss by some
        pixels.
        """
        return replace(pair, box=_box_around(~mask_HW))

    def scored(self, pair: CaptionPair, log_probabilities: Sequence[float | None]) -> CaptionPair:
        drawn = 0 if pair.box_image is None else len(pair.box_image)
        return replace(pair, log_probability=mean_log_probability(log_probabilities[drawn:]))

    def needs_category(self, format: SequenceFormat) -> bool:
        return format.class_prompt or format.category == "given"

    def pictures(self, target: CaptionTarget, format: SequenceFormat) -> tuple[BoxPicture, ...]:
        return (BoxPicture(target.box),) if format.box == "image" else ()

    def pair(
        self,
        format: SequenceFormat,
        category: str,
        image: np.ndarray,
        target: CaptionTarget,
        drawn: Sequence[np.ndarray],
    ) -> CaptionPair:
        return CaptionPair(
            image,
            target.caption,
            category if format.category != "none" else None,
            target.box if format.box == "text" else None,
            drawn[0] if drawn else None,
        )

    def surely_fits(self, codec: SequenceCodec, category: str, target: CaptionTarget) -> bool:
        return longest_caption(codec, category, target.caption) <= codec.format.codes_per_image

    def describe(self, targets: Sequence[CaptionTarget], image_size: int) -> dict[str, Any]:
        references = targets[-1].references
        return {
            "boxes": [target.box for target in targets],
            "captions": [target.caption for target in targets],
            "references": [references] if references else [],
            "objects": [
                {
                    "class": name,
                    **({"style": style} if style else {}),
                    "caption": caption,
                    "box": [round(side, 4) for side in box],
                }
                for name, style, caption, box in targets[-1].objects
            ],
        }

    def verify(self, truth: Truth, image_size: int) -> None:
        meta = truth.meta
        check_objects(truth, ("caption", "box"))
        for name in ("boxes", "captions"):
            if not isinstance(meta.get(name), list) or len(meta[name]) != len(truth.pairs):
                raise InputError(f"its JSON must have {len(truth.pairs)} {name}.")
        for number, pair in enumerate(truth.pairs):
            if pair.caption != meta["captions"][number]:
                raise InputError(
                    f"pair {number} says '{pair.caption}', its JSON '{meta['captions'][number]}'."
                )
            if pair.category not in (None, truth.category):
                raise InputError(
                    f"pair {number} is of class '{pair.category}', the episode of "
                    f"'{truth.category}'."
                )
            box = meta["boxes"][number] or ()
            if pair.box is not None and box_to_bins(pair.box) != box_to_bins(box):
                raise InputError(f"the box of pair {number} differs from its JSON.")

    def said(self, model: CodeReader, pairs: Sequence[CaptionPair]) -> list[Output]:
        return [
            {
                "caption": pair.caption,
                "category": pair.category,
                "box": box_of(pair, model),
                **_confidence(pair),
            }
            for pair in pairs
        ]

    def true_output(self, truth: Truth, pair: int = -1) -> Output:
        box = truth.meta["boxes"][pair]
        return {
            "caption": str(truth.meta["captions"][pair]),
            "category": truth.category,
            "box": None if box is None else tuple(box),
        }

    def repeats(self, pair: CaptionPair, example: CaptionPair) -> bool:
        return pair.caption == example.caption

    def score(
        self,
        sets: Sequence[Sequence[Output]],
        truths: Sequence[Truth],
        format: SequenceFormat,
        quick: bool = False,
    ) -> list[CaptionScores]:
        references = {str(n): truth.meta["references"][0] for n, truth in enumerate(truths)}
        texts = [{str(n): text for n, text in enumerate(_texts(outputs))} for outputs in sets]
        has_boxes = format.box != "none"
        matched = _matched(sets, truths) if has_boxes and not quick else None
        scores = score_captions(texts, references, not quick, not quick, matched)
        true = [self.true_output(truth) for truth in truths]
        found = []
        for of_set, outputs in zip(scores, sets, strict=True):
            values = {
                _FIELDS[heading]: of_queries
                for heading, of_queries in _of_queries(outputs, true, format).items()
            }
            means = {name: float(np.mean(of_queries)) for name, of_queries in values.items()}
            intervals = {} if quick else {n: mean_intervals(v)[0] for n, v in values.items()}
            found.append(
                replace(
                    of_set,
                    category_accuracy=means.get("category_accuracy"),
                    box_iou=means.get("box_iou"),
                    intervals=of_set.intervals | intervals,
                    mean_ap_note=of_set.mean_ap_note if has_boxes else _NO_BOXES,
                )
            )
        return found

    def statistic(
        self, sets: Sequence[Sequence[Output]], truths: Sequence[Truth], format: SequenceFormat
    ) -> Statistic:
        references = [list(truth.meta["references"][0]) for truth in truths]
        predicted = [text for outputs in sets for text in _texts(outputs)]
        tokens, _ = tokenise(
            [*predicted, *(text for reference_texts in references for text in reference_texts)]
        )
        rest = iter(tokens)
        texts = [[next(rest) for _ in outputs] for outputs in sets]
        right = [[next(rest) for _ in reference_texts] for reference_texts in references]
        counts = [count_captions(of_set, right).columns_QS for of_set in texts]
        counted = counted_scores(np.concatenate(counts))
        true = [self.true_output(truth) for truth in truths]
        means = [_of_queries(outputs, true, format) for outputs in sets]
        of_queries = {name: [v for values in means for v in values[name]] for name in means[0]}
        if not of_queries:
            return Statistic(COUNTED, counted)
        others = mean_statistic(of_queries)
        return Statistic(
            (*COUNTED, *others.names),
            lambda weights_BQ: np.hstack([counted(weights_BQ), others.of(weights_BQ)]),
        )

    def baselines(self, truths: Sequence[Truth]) -> list[Baseline]:
        """The caption and the class that are the most frequent among all examples, with the median
        of their boxes.
        """
        examples = [
            self.true_output(truth, n) for truth in truths for n in range(len(truth.pairs) - 1)
        ]
        if not examples:
            return []
        boxes = [example["box"] for example in examples if example["box"] is not None]
        output = {
            "caption": _most_frequent(example["caption"] for example in examples),
            "category": _most_frequent(truth.category for truth in truths),
            "box": tuple(np.median(boxes, axis=0).tolist()) if boxes else None,
        }
        name = "the most frequent caption of the examples"
        return [Baseline(name, "frequent caption", [output] * len(truths))]

    def objects(self, truth: Truth) -> Objects:
        return by_kind(truth)

    def right_outputs(self, truth: Truth) -> list[Output]:
        return [{"caption": text} for text in truth.meta["references"][0]]

    def agreement(self, prediction: Output, right: Sequence[Output]) -> float:
        return rouge_l(prediction["caption"] or "", [output["caption"] for output in right])

    def judge(self, truths: Sequence[Truth], format: SequenceFormat) -> Judge:
        """Returns a judge of captions in one or two respects. The class is judged by the name that
        the caption writes and by its box, if the model writes them, and otherwise by its words. The
        name alone could be copied from an example, the box could not. The style is judged by the
        words, see `StyleJudge`, if queries are described in several styles.
        """
        styles = style_judge(truths)

        def judge(prediction: Output, shown_kind: Kind, objects: Objects) -> dict[str, bool]:
            respects = {"class": self._is_of_class(prediction, shown_kind, objects, format)}
            if len({kind.style for kind in objects}) > 1:
                respects["style"] = styles.style(prediction["caption"] or "") == shown_kind.style
            return respects

        return judge

    def _is_of_class(
        self, prediction: Output, shown_kind: Kind, objects: Objects, format: SequenceFormat
    ) -> bool:
        if format.category == "written" and not _is_category(prediction, shown_kind.category):
            return False
        if format.box == "none":
            return format.category == "written" or self.agrees_most(prediction, shown_kind, objects)
        return self.agrees_most(prediction, shown_kind, objects, _best_overlap)

    def show(self, image: Image.Image, output: Output) -> Image.Image:
        return boxed(image, output["box"])

    def caption_of(self, output: Output, truth: Output | None = None) -> str:
        if truth is None:
            return str(output["caption"])
        details = [output["category"]] if output["category"] is not None else []
        if output["box"] and truth["box"]:
            details.append(f"box IoU {100 * box_iou(output['box'], truth['box']):.1f}")
        return f"{output['caption']} ({', '.join(details)})" if details else str(output["caption"])

    def preview(
        self, truth: Truth, number: int, image: Image.Image, model: CodeReader
    ) -> tuple[list[Cell], str]:
        pair = truth.pairs[number]
        cells = [Cell("image", boxed(image, pair.box))]
        if pair.box_image is not None:
            (brightness_HW,) = model.decode_masks(pair.box_image[None])
            cells.append(Cell("box", to_image(brightness_HW.expand(3, -1, -1))))
        words = f"{pair.category or ''} {pair.caption}".strip()
        if number == len(truth.pairs) - 1:
            others = [text for text in truth.meta["references"][0] if text != pair.caption]
            words += "".join(f"\nalso: {text}" for text in others)
        return cells, words


def _confidence(pair: CaptionPair) -> dict[str, float]:
    """How sure a model is of its caption: the mean log-probability of its text's tokens."""
    sure = pair.log_probability
    return {} if sure is None else {"confidence": round(sure, 6)}


def _most_frequent(texts: Iterable[str]) -> str:
    """The most frequent text; the first in the alphabet if several are equally frequent."""
    counts = Counter(texts)
    return min(counts, key=lambda text: (-counts[text], text))


def style_judge(truths: Iterable[Truth]) -> StyleJudge:
    """A judge of styles that knows all texts of each style that the truths keep."""
    texts: dict[str, list[str]] = {}
    for truth in truths:
        for kind, of_kind in by_kind(truth).items():
            texts.setdefault(kind.style, []).extend(output["caption"] for output in of_kind)
    return StyleJudge(texts)


_NO_BOXES = "not computed: these captions have no boxes"


def _matched(sets: Sequence[Sequence[Output]], truths: Sequence[Truth]) -> list[Matched]:
    """The captions of each set, assigned to regions. The regions of an image are its queries."""
    images = [str(truth.meta["sources"][-1]["image"]) for truth in truths]
    regions = [
        Region(image, tuple(truth.meta["boxes"][-1]), tuple(truth.meta["references"][0]))
        for image, truth in zip(images, truths, strict=True)
    ]
    return [
        match(
            [
                Detection(
                    image,
                    tuple(output["box"]) if output["box"] else None,
                    output["caption"] or "",
                    output.get("confidence", -math.inf),
                )
                for image, output in zip(images, outputs, strict=True)
            ],
            regions,
        )
        for outputs in sets
    ]


def box_of(pair: CaptionPair, model: CodeReader) -> Box | None:
    """The box of a caption; read off its drawing (dark on white) where only that is known, and None
    where there is none.
    """
    if pair.box is not None or pair.box_image is None:
        return pair.box
    return _box_around((model.decode_masks(pair.box_image[None])[0] <= 0).cpu().numpy())


def _box_around(drawn_HW: np.ndarray) -> Box | None:
    """The box around what is True; None where nothing is."""
    if not drawn_HW.any():
        return None
    left, top, right, bottom = box_of_mask(drawn_HW)
    height, width = drawn_HW.shape
    return left / width, top / height, right / width, bottom / height


_FIELDS = {"category": "category_accuracy", "box IoU": "box_iou"}
"""Heading -> the field of `CaptionScores`, of the means that are not of the words."""


def _of_queries(
    outputs: Sequence[Output], true: Sequence[Output], format: SequenceFormat
) -> dict[str, list[float]]:
    """The values of each query for the scores that captions of this format have, by heading."""
    values = {}
    if format.category == "written":
        values["category"] = _categories_right(outputs, true)
    if format.box != "none":
        values["box IoU"] = _box_ious(outputs, true)
    return values


def _texts(outputs: Sequence[Output]) -> list[str]:
    return [output["caption"] or "" for output in outputs]


def _categories_right(outputs: Sequence[Output], true: Sequence[Output]) -> list[float]:
    pairs = zip(outputs, true, strict=True)
    return [float(_is_category(output, truth["category"])) for output, truth in pairs]


def _is_category(output: Output, category: str) -> bool:
    """Whether an output names a category, ignoring case."""
    return (output["category"] or "").lower() == category.lower()


def _best_overlap(prediction: Output, right: Sequence[Output]) -> float:
    """The best IoU of an output's box with the box of any right output; 0 without a box."""
    return max(
        box_iou(prediction["box"], tuple(output["box"])) if prediction["box"] else 0.0
        for output in right
    )


def _box_ious(outputs: Sequence[Output], true: Sequence[Output]) -> list[float]:
    boxes = [(output["box"], t["box"]) for output, t in zip(outputs, true, strict=True)]
    return [box_iou(box, t) if box and t else 0.0 for box, t in boxes]
