"""Draws docs/images/sequence.svg, the spans of two sequences coloured by attribute class:
python docs/draw_sequence.py
"""

from pathlib import Path

import numpy as np

from icl_moe.attributes import PADDING, describe_attributes
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat, Span, TokenSequence
from icl_moe.tasks import CAPTIONING, SEGMENTATION
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

COLOURS = ("#9ecae1", "#3182bd", "#c7e9c0", "#31a354")
PADDING_COLOUR = "#eeeeee"
CODES = 48
WIDTH, ROW, LEFT = 1000, 46, 8


def sequences() -> dict[str, TokenSequence]:
    """A segmentation and a captioning sequence, one example and a query each."""
    vocabulary = Vocabulary(text_merges=1000, image_codes=64)
    codec = SequenceCodec(SequenceFormat(vocabulary, CODES), TextTokenizer(merges=1000))
    codes = np.zeros(CODES, dtype=np.int64)
    masks = tuple(SegmentationPair(codes, codes) for _ in range(2))
    captions = tuple(
        CaptionPair(codes, text, "dog", (0.1, 0.2, 0.6, 0.9)) for text in ("a dog", "a dog")
    )
    return {
        "segmentation": codec.encode(Episode(SEGMENTATION, "dog", masks)),
        "captioning": codec.encode(Episode(CAPTIONING, "dog", captions)),
    }


def draw(path: Path) -> None:
    found = sequences()
    classes = dict.fromkeys(
        span.attributes
        for sequence in found.values()
        for span in sequence.spans
        if span.attributes != PADDING
    )
    colour = dict(zip(classes, COLOURS, strict=True)) | {PADDING: PADDING_COLOUR}
    height = 20 + 2 * (ROW + 30) + 24 * (len(classes) + 1)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' "
        "font-family='sans-serif' font-size='13'>"
    ]
    top = 20
    for name, sequence in found.items():
        parts.append(f"<text x='{LEFT}' y='{top}' font-weight='bold'>{name}</text>")
        scale = (WIDTH - 2 * LEFT) / len(sequence)
        for span in sequence.spans:
            parts.append(_block(span, top + 8, scale, colour[span.attributes]))
        top += ROW + 30
    for attributes in (*classes, PADDING):
        parts.append(
            f"<rect x='{LEFT}' y='{top}' width='18' height='14' fill='{colour[attributes]}'/>"
            f"<text x='{LEFT + 26}' y='{top + 12}'>{describe_attributes(attributes)}</text>"
        )
        top += 24
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _block(span: Span, top: float, scale: float, colour: str) -> str:
    left, width = LEFT + span.start * scale, span.length * scale
    label = {"input": "image", "output": "mask", "padding": ""}.get(span.role, "")
    if span.role == "output" and span.length != CODES:
        label = "text"
    stroke = " stroke='#222' stroke-width='1.5'" if span.role == "output" else " stroke='#fff'"
    box = (
        f"<rect x='{left:.1f}' y='{top}' width='{width:.1f}' height='28' fill='{colour}'{stroke}/>"
    )
    middle = left + width / 2
    return f"{box}<text x='{middle:.1f}' y='{top + 19}' text-anchor='middle'>{label}</text>"


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "sequence.svg")
