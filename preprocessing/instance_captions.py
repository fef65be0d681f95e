"""Captions of single instances -> the captioning pool. The file is a COCO captions file whose
records have two more keys:

    {"id": 1, "image_id": 5, "caption": "in the middle", "instance_id": 17, "style": "place"}

instance_id: an annotation of the instances file; its class and box become the region's. style: how
the text describes the instance, a word chosen by the data set; an episode has one style. The
references of a region are all texts of its instance in its style.
"""

from collections import Counter
from typing import Any

from tqdm import tqdm

from icl_moe.boxes import normalise_box
from icl_moe.errors import InputError, nearest, shown
from preprocessing.caption_regions import (
    caption_region,
    clean_phrase,
    drop_rare_classes,
    with_objects,
)
from preprocessing.coco import CheckedCOCO, check_classes, coco_image, load_captions, load_instances
from preprocessing.image_check import UsableImages
from preprocessing.pool import Pool, PoolRegion
from preprocessing.recipe import CaptioningSource
from preprocessing.records import read_rect


def read_captioning(source: CaptioningSource, usable: UsableImages) -> Pool:
    """The captioning pool. Raises InputError if anything in the files is wrong, or if they lack a
    class or style of the recipe.
    """
    captions = load_captions(source.path("annotations"))
    instances = load_instances(source.path("instances"))
    if source.classes is not None:
        check_classes("captioning.classes", set(source.classes), instances)
    pool, found = Pool("captioning", []), list[PoolRegion]()
    texts = _texts(captions, instances, pool.skipped)
    styles = {style for _, style in texts}
    for style in source.styles or ():
        if style not in styles:
            raise InputError(
                f"captioning.styles names '{style}'{nearest(style, sorted(styles))}; the styles in "
                f"{captions.file} are {', '.join(sorted(styles))}."
            )
    for (number, style), of_instance in tqdm(
        texts.items(), desc="reading captions", unit="instance"
    ):
        if source.styles is None or style in source.styles:
            found += _regions(instances, number, style, of_instance, source, pool)
    pool.regions = with_objects(usable.keep(found, source.path("images"), pool))
    pool.count_classes_without_a_region(source.classes)
    drop_rare_classes(pool, source.min_descriptions)
    return pool


def _texts(
    captions: CheckedCOCO, instances: CheckedCOCO, skipped: Counter[str]
) -> dict[tuple[Any, str], list[tuple[Any, str]]]:
    """The ids and texts of the captions of each instance in each style, in the file's order.
    Captions without a text are counted.
    """
    texts: dict[tuple[Any, str], list[tuple[Any, str]]] = {}
    for caption in captions.anns.values():
        where = f"{captions.file}: annotation {caption['id']}"
        number, style = caption.get("instance_id"), caption.get("style")
        if not isinstance(style, str) or not style.strip():
            raise InputError(f"{where} has the style {shown(style)}; it must be text.")
        known = instances.anns.get(number) if isinstance(number, int | str) else None
        if known is None or known["image_id"] != caption["image_id"]:
            raise InputError(
                f"{where} has the instance_id {shown(number)}, which is not an annotation of image "
                f"{shown(caption['image_id'])} in {instances.file}."
            )
        text = clean_phrase(caption.get("caption"))
        skipped["captions_without_a_text"] += not text
        if text:
            texts.setdefault((number, style), []).append((caption["id"], text))
    return texts


def _regions(
    instances: CheckedCOCO,
    number: Any,
    style: str,
    texts: list[tuple[Any, str]],
    source: CaptioningSource,
    pool: Pool,
) -> list[PoolRegion]:
    """A region for each text of an instance in a style, for wanted classes."""
    annotation = instances.anns[number]
    category = instances.cats[annotation["category_id"]]["name"]
    if source.classes is not None and category not in source.classes:
        return []
    image = coco_image(instances, source.path("images"), annotation["image_id"])
    values = annotation.get("bbox")
    rect = read_rect(
        values if isinstance(values, list) else [values],
        image,
        f"{instances.file}: annotation {number}",
        pool.skipped,
    )
    if rect is None:
        return []
    box = normalise_box(*rect, image.width, image.height)
    references = tuple(text for _, text in texts)
    made = [
        caption_region(image, category, caption, box, text, references, style)
        for caption, text in texts
    ]
    regions = [region for region in made if region is not None]
    pool.skipped["empty_boxes"] += len(made) - len(regions)
    return regions
