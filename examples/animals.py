"""Writes photographs and masks of animals, as docs/own_data.md reads them, from COCO's images and
annotations: python examples/animals.py COCO --out DIR

COCO has the folders train2017, val2017 and annotations. For every image of an animal whose mask is
at least 2% of the picture, DIR/train and DIR/val get the photograph, images/NAME.jpg, and a mask of
each such kind of animal, masks/KIND/NAME.png, white on black.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

LEAST_AREA = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("coco", type=Path, metavar="COCO")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    for split in ("train", "val"):
        annotations = COCO(options.coco / f"annotations/instances_{split}2017.json")
        write_split(annotations, options.coco / f"{split}2017", options.out / split)


def write_split(coco: COCO, photographs: Path, out: Path) -> None:
    for image in coco.imgs.values():
        for category in coco.loadCats(coco.getCatIds(supNms=["animal"])):
            of_kind = coco.getAnnIds(image["id"], [category["id"]], iscrowd=False)
            masks = [coco.annToMask(each) for each in coco.loadAnns(of_kind)]
            if not masks or (mask_HW := np.maximum.reduce(masks)).mean() < LEAST_AREA:
                continue
            name = Path(image["file_name"])
            file = out / "masks" / category["name"] / f"{name.stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask_HW * np.uint8(255)).save(file)
            (out / "images").mkdir(exist_ok=True)
            shutil.copy(photographs / name, out / "images" / name.name)


if __name__ == "__main__":
    main()
