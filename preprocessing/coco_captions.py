"""COCO's captions -> the captioning pool: a caption that names a class seen in its image describes
that class's box.

The box is that of the class's largest instance if the caption names the class in the singular ("a
zebra"), and the box around all instances and crowds if it names the class in the plural ("three
zebras"). The references of a region are all captions of the image that name the class.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from icl_moe.boxes import Box, normalise_box
from icl_moe.errors import InputError, shown
from preprocessing.caption_regions import (
    caption_region,
    clean_phrase,
    drop_rare_classes,
    with_objects,
)
from preprocessing.classes import COCO_CLASSES, ClassFinder
from preprocessing.coco import CheckedCOCO, check_classes, coco_image, load_captions, load_instances
from preprocessing.image_check import UsableImages
from preprocessing.pool import ImageFile, Pool, PoolRegion
from preprocessing.recipe import CaptioningSource
from preprocessing.records import kinds_of_id, read_rect


def read_captioning(source: CaptioningSource, usable: UsableImages) -> Pool:
    """The captioning pool of a COCO captions file and the instances file of the same images.

    Raises InputError if anything in them is wrong, or if the instances file lacks an image that has
    captions.
    """
    captions = load_captions(source.path("annotations"))
    instances = load_instances(source.path("instances"))
    if source.classes is not None:
        check_classes("captioning.classes", set(source.classes), instances)
    finder = ClassFinder(source.classes or COCO_CLASSES)
    pool, found = Pool("captioning", []), list[PoolRegion]()
    for image_id, annotations in tqdm(
        captions.imgToAnns.items(), desc="reading captions", unit="image"
    ):
        if image_id not in instances.imgs:
            raise InputError(
                f"{captions.file}: image {shown(image_id)} has captions but is not among the "
                f"images of {instances.file}{kinds_of_id(instances.imgs, image_id)}."
            )
        image = coco_image(instances, source.path("images"), image_id)
        seen = _boxes(instances, image, image_id, pool.skipped)
        found += _regions(image, annotations, seen, finder, pool)
    pool.regions = with_objects(usable.keep(found, source.path("images"), pool))
    pool.count_classes_without_a_region(source.classes)
    drop_rare_classes(pool, source.min_descriptions)
    return pool


def _regions(
    image: ImageFile,
    annotations: list[dict[str, Any]],
    seen: dict[str, tuple[Box, Box]],
    finder: ClassFinder,
    pool: Pool,
) -> Iterable[PoolRegion]:
    phrases = [
        (annotation["id"], clean_phrase(annotation.get("caption"))) for annotation in annotations
    ]
    found = [(number, phrase, finder.find(phrase)) for number, phrase in phrases]
    for number, phrase, classes in found:
        named = {category: plural for category, plural in classes.items() if category in seen}
        pool.skipped["captions_without_a_seen_class"] += not named
        for category, plural in named.items():
            references = tuple(text for _, text, others in found if category in others)
            region = caption_region(
                image, category, number, seen[category][plural], phrase, references
            )
            if region is None:
                pool.skipped["empty_boxes"] += 1
            else:
                yield region


def _boxes(
    coco: CheckedCOCO, image: ImageFile, image_id: Any, skipped: Counter[str]
) -> dict[str, tuple[Box, Box]]:
    """Class -> the box of its largest instance, and the box around all its instances and crowds. If
    there are only crowds, the latter box twice.
    """
    rects: dict[str, list[tuple[bool, tuple[float, float, float, float]]]] = {}
    for annotation in coco.imgToAnns.get(image_id, ()):
        values = annotation.get("bbox")
        rect = read_rect(
            values if isinstance(values, list) else [values],
            image,
            f"{coco.file}: annotation {annotation['id']}",
            skipped,
        )
        if rect is not None:
            category = coco.cats[annotation["category_id"]]["name"]
            rects.setdefault(category, []).append((bool(annotation.get("iscrowd")), rect))
    boxes = {}
    for category, of_class in rects.items():
        normalised = [normalise_box(*rect, image.width, image.height) for _, rect in of_class]
        union = (
            min(b[0] for b in normalised),
            min(b[1] for b in normalised),
            max(b[2] for b in normalised),
            max(b[3] for b in normalised),
        )
        single = [rect for is_crowd, rect in of_class if not is_crowd]
        largest = max(single, key=lambda rect: rect[2] * rect[3], default=None)
        one = normalise_box(*largest, image.width, image.height) if largest else union
        boxes[category] = (one, union)
    return boxes
