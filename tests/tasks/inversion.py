"""A third task outside the package: the negative of the query's image.

Run as a program, it is `icl-moe` with this task: `python inversion.py shards build ...`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from icl_moe.cli import main
from icl_moe.images import PixelBox, crop_and_resize, load_image, to_image
from icl_moe.pictures import Cell
from icl_moe.tasks import register
from icl_moe.tasks.grammar import image_codes
from icl_moe.tasks.task import GroupScore, Measure, Task
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.sources import Reading, register_source


@dataclass(frozen=True, eq=False)
class InversionPair:
    image: np.ndarray
    negative: np.ndarray


@dataclass(frozen=True)
class Negative:
    """The target, which is also the picture to encode."""

    path: Path
    crop: PixelBox

    def draw(self, size: int) -> np.ndarray:
        return 255 - np.asarray(crop_and_resize(load_image(self.path), self.crop, size))


@dataclass(frozen=True)
class Closeness:
    """The mean absolute difference of the pixels, in levels."""

    episodes: int
    difference: float

    def measures(self) -> dict[str, Measure]:
        return {"difference": Measure(self.difference, is_share=False, more_is_better=False)}

    def figures(self) -> dict[str, float]:
        return {"difference": self.difference}

    def groups(self) -> dict[str, dict[str, GroupScore]]:
        return {}

    def notes(self) -> list[str]:
        return ["Differences are in levels of 255."]


class Inversion(Task):
    name = "inversion"
    pair_type = InversionPair

    def outputs(self, format):
        return ("image",)

    def write_output(self, writer, pair):
        vocabulary = writer.format.vocabulary
        writer.marker(vocabulary.boi, "image")
        writer.drawn(pair.negative)
        writer.marker(vocabulary.eoc, "image")

    def open_output(self, writer, category):
        writer.marker(writer.format.vocabulary.boi, "image")

    def read_pair(self, codec, image, outputs):
        return InversionPair(image, codec.format.vocabulary.to_codes(outputs[0][1]))

    def grammar(self, codec, category):
        return image_codes(codec.format)

    def read_output(self, codec, image, tokens):
        return InversionPair(image, codec.format.vocabulary.to_codes(np.array(tokens)))

    def pictures(self, target, format):
        return (target,)

    def pair(self, format, category, image, target, drawn):
        return InversionPair(image, drawn[0])

    def describe(self, targets, image_size):
        return {"negatives": [target.draw(8)[..., 0].tolist() for target in targets]}

    def verify(self, truth, image_size):
        assert len(truth.meta["negatives"]) == len(truth.pairs)

    def said(self, model, pairs):
        pixels = model.decode(np.stack([pair.negative for pair in pairs]))
        small = [np.asarray(to_image(each).resize((8, 8)).convert("L")) for each in pixels]
        return [{"negative": levels.tolist()} for levels in small]

    def true_output(self, truth, pair=-1):
        return {"negative": truth.meta["negatives"][pair]}

    def repeats(self, pair, example):
        return np.array_equal(pair.negative, example.negative)

    def score(self, sets, truths, format, quick=False):
        def difference(outputs: Sequence[dict[str, Any]]) -> float:
            pairs = zip(outputs, map(self.true_output, truths), strict=True)
            return float(
                np.mean([np.abs(np.subtract(a["negative"], b["negative"])) for a, b in pairs])
            )

        return [Closeness(len(outputs), difference(outputs)) for outputs in sets]

    def ceiling(self, model, truths):
        return self.said(model, [truth.pairs[-1] for truth in truths])

    def show(self, image, output):
        return Image.fromarray(np.array(output["negative"], dtype=np.uint8)).convert("RGB")

    def caption_of(self, output, truth=None):
        return ""

    def preview(self, truth, number, image, model):
        negative = to_image(model.decode(truth.pairs[number].negative[None])[0])
        return [Cell("image", image), Cell("negative", negative)], ""


@dataclass(frozen=True)
class ImageFolder:
    """images: a folder of pictures, each named CLASS_NUMBER.png."""

    images: str


def read(settings: ImageFolder, reading: Reading) -> Pool:
    regions = []
    for path in sorted(Path(settings.images).glob("*.png")):
        with Image.open(path) as image:
            width, height = image.size
        file, crop = ImageFile(path, path.name, width, height), (0, 0, width, height)
        category = path.stem.split("_")[0]
        regions.append(PoolRegion(file, category, (), crop, 1.0, Negative(path, crop)))
    return Pool("inversion", regions)


register(Inversion())
register_source("inversion", "folder", ImageFolder, read)

if __name__ == "__main__":
    for line in sys.stdin:
        print("$ icl-moe", line, end="", flush=True)
        if code := main(line.split()):
            sys.exit(code)
