"""`icl-moe shards preview`: a page of samples as a model gets them, everything on it decoded from
tokens.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from icl_moe.data.shards import Sample, ShardSet
from icl_moe.evaluation.report import data_url
from icl_moe.images import to_image
from icl_moe.outputs import output_file, write_output
from icl_moe.sequence import CaptionPair, SegmentationPair, SequenceCodec
from icl_moe.tokenizers.boxes import Box
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing.coco import decode_mask
from preprocessing.verify import open_codec

SAMPLES_PER_TASK = 12
_SHOWN_SIDE = 192
_BOX_COLOUR = (255, 60, 60)

_STYLE = f"""
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem;
  padding: 0 1rem; color: #222; }}
article {{ border-top: 1px solid #ccc; padding: .8rem 0; }}
.pairs {{ display: flex; flex-wrap: wrap; gap: 1.6rem; }}
figure {{ margin: 0; }} figure img {{ width: {_SHOWN_SIDE}px; image-rendering: pixelated; }}
figcaption {{ max-width: {2 * _SHOWN_SIDE}px; color: #555; }}
.query {{ outline: 2px solid #36c; outline-offset: 6px; }}
"""


def write_preview(location: str | Path, out: Path) -> None:
    """Write a page, one file without references, with samples of each task spread over the shards
    at a path or a URL. Raises InputError, before anything is drawn, where `out` cannot be written.
    """
    out = output_file(out, (".html", ".htm"))
    shards = ShardSet(location)
    codec = open_codec(shards)
    tokenizer = VQGAN.from_pretrained(shards.fetch("image_tokenizer")).eval()
    title = html.escape(Path(shards.location).name)
    parts = [f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"]
    parts.append(
        f"<h1>{title}</h1><p>Pictures are decoded from tokens; the query is framed in blue.</p>"
    )
    for task, count in shards.manifest.samples.items():
        parts.append(f"<h2>{html.escape(task)}</h2>")
        numbers = np.unique(np.linspace(0, count - 1, SAMPLES_PER_TASK).astype(int)).tolist()
        parts += [
            _article(shards.sample(task, number), codec, tokenizer)
            for number in tqdm(numbers, desc=f"drawing {task}", unit="sample")
        ]
    write_output(out, "\n".join(parts))


def _article(sample: Sample, codec: SequenceCodec, tokenizer: VQGAN) -> str:
    pairs: Sequence[SegmentationPair | CaptionPair] = codec.decode(sample.sequence).pairs
    figures = [
        _figure(sample, number, pair, tokenizer, query=number == len(pairs) - 1)
        for number, pair in enumerate(pairs)
    ]
    title = f"<h3>{html.escape(sample.category)} <small>{html.escape(sample.key)}</small></h3>"
    return f"<article>{title}<div class='pairs'>{''.join(figures)}</div></article>"


def _figure(
    sample: Sample, number: int, pair: SegmentationPair | CaptionPair, tokenizer: VQGAN, query: bool
) -> str:
    image = _decode(pair.image, tokenizer)
    if isinstance(pair, SegmentationPair):
        truth = Image.fromarray(decode_mask(sample.meta["masks"][number])).convert("RGB")
        pictures = [image, _decode(pair.mask, tokenizer), truth]
        words = "image, mask as tokens, mask before tokens"
    else:
        pictures = [_with_box(image, pair.box)] if pair.box else [image]
        pictures += [_decode(pair.box_image, tokenizer)] if pair.box_image is not None else []
        words = f"<b>{html.escape(pair.category or '')}</b> {html.escape(pair.caption)}"
        others = (
            [text for text in sample.meta["references"][0] if text != pair.caption] if query else []
        )
        words += "".join(f"<br>also: {html.escape(text)}" for text in others)
    name = html.escape(str(sample.meta["sources"][number]["image"]))
    shown = "".join(f"<img alt='' src='{data_url(picture)}'>" for picture in pictures)
    caption = f"{words}<br>{name}, object / crop {sample.meta['scale'][number]:.3f}"
    kind = " class=query" if query else ""
    return f"<figure{kind}>{shown}<figcaption>{caption}</figcaption></figure>"


@torch.inference_mode()
def _decode(codes: np.ndarray, tokenizer: VQGAN) -> Image.Image:
    return to_image(tokenizer.decode(torch.from_numpy(codes)[None])[0])


def _with_box(image: Image.Image, box: Box) -> Image.Image:
    shown = image.resize((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.NEAREST)
    ImageDraw.Draw(shown).rectangle(
        [value * (_SHOWN_SIDE - 1) for value in box], outline=_BOX_COLOUR, width=2
    )
    return shown
