"""COCO's captions -> the captioning pool: a caption that names a class seen in its image describes
that class's box.

The box is that of the class's largest instance where the caption names the class in the singular
("a zebra"), and the box around all instances and crowds where it names it in the plural ("three
zebras"). The references of a region are all captions of the image that name the class.
"""

from collections.abc import Iterable
from typing import Any, Literal

from tqdm import tqdm

from icl_moe.boxes import Box, normalise_box
from icl_moe.errors import InputError
from preprocessing.classes import COCO_CLASSES, ClassFinder
from preprocessing.coco import CheckedCOCO, coco_image, load_coco
from preprocessing.pool import ImageFile, Pool, Region, keep_present
from preprocessing.recipe import CaptioningSource
from preprocessing.visual_genome import caption_region, clean_phrase, drop_rare_classes


def read_captioning(source: CaptioningSource, missing_images: Literal["stop", "skip"]) -> Pool:
    """The captioning pool of a COCO captions file and the instances file of the same images.

    Raises InputError for whatever is wrong in them, and for captions of an image that the instances
    file does not know.
    """
    captions, instances = load_coco(source.path("annotations")), load_coco(source.path("instances"))
    finder = ClassFinder(source.classes or COCO_CLASSES)
    pool = Pool("captioning", [])
    for image_id, annotations in tqdm(
        captions.imgToAnns.items(), desc="reading captions", unit="image"
    ):
        if image_id not in instances.imgs:
            raise InputError(
                f"{captions.file}: image {image_id} has captions but is not among the images of "
                f"{instances.file}."
            )
        image = coco_image(instances, source.path("images"), image_id)
        pool.regions += _regions(captions, instances, image, image_id, annotations, finder, pool)
    pool.regions = keep_present(pool.regions, source.path("images"), missing_images, pool.skipped)
    drop_rare_classes(pool, source.min_descriptions)
    return pool


def _regions(
    captions: CheckedCOCO,
    instances: CheckedCOCO,
    image: ImageFile,
    image_id: int,
    annotations: list[dict[str, Any]],
    finder: ClassFinder,
    pool: Pool,
) -> Iterable[Region]:
    seen: dict[str, list[dict[str, Any]]] = {}
    for instance in instances.imgToAnns.get(image_id, ()):
        seen.setdefault(instances.cats[instance["category_id"]]["name"], []).append(instance)
    phrases = [
        (annotation["id"], clean_phrase(annotation.get("caption"))) for annotation in annotations
    ]
    found = [(number, phrase, finder.find(phrase)) for number, phrase in phrases]
    for number, phrase, classes in found:
        named = {category: plural for category, plural in classes.items() if category in seen}
        pool.skipped["captions_without_a_seen_class"] += not named
        for category, plural in named.items():
            box = _box(instances, image, seen[category], plural)
            references = tuple(text for _, text, others in found if category in others)
            region = caption_region(image, category, number, box, phrase, references)
            if region is None:
                pool.skipped["empty_boxes"] += 1
            else:
                yield region


def _box(
    instances: CheckedCOCO, image: ImageFile, annotations: list[dict[str, Any]], plural: bool
) -> Box:
    rects = {annotation["id"]: _rect(instances, annotation) for annotation in annotations}
    singles = [annotation["id"] for annotation in annotations if not annotation.get("iscrowd")]
    if plural or not singles:
        boxes = [normalise_box(*rect, image.width, image.height) for rect in rects.values()]
        return (
            min(b[0] for b in boxes),
            min(b[1] for b in boxes),
            max(b[2] for b in boxes),
            max(b[3] for b in boxes),
        )
    largest = max(singles, key=lambda number: rects[number][2] * rects[number][3])
    return normalise_box(*rects[largest], image.width, image.height)


def _rect(instances: CheckedCOCO, annotation: dict[str, Any]) -> tuple[float, float, float, float]:
    rect = annotation.get("bbox")
    if (
        not isinstance(rect, list)
        or len(rect) != 4
        or not all(isinstance(value, int | float) for value in rect)
    ):
        raise InputError(
            f"{instances.file}: annotation {annotation['id']} has the bbox {rect!r}; x, y, width "
            "and height belong there."
        )
    return rect[0], rect[1], rect[2], rect[3]
