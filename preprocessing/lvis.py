"""LVIS v1 -> the segmentation pool (Gupta et al. 2019, "LVIS: A Dataset for Large Vocabulary
Instance Segmentation").

LVIS annotates COCO's images with 1,203 classes. Its records name no file but COCO's address of the
image, http://images.cocodataset.org/train2017/000000391895.jpg: the file is in the folder
train2017 of the images' folder, or in that itself. An image lists the classes of which not all
instances are annotated (not_exhaustive_category_ids): it makes no region of such a class, and in
evaluation it does not count as showing it either. A region's group is the frequency of its class:
`rare`, `common` or `frequent`.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from icl_moe.errors import InputError, shown
from preprocessing.coco import CheckedCOCO, load_instances, read_instances
from preprocessing.image_check import UsableImages, is_file
from preprocessing.pool import Pool
from preprocessing.recipe import SegmentationSource
from preprocessing.region_table import RegionTable

_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


def read_segmentation(
    source: SegmentationSource, image_size: int, usable: UsableImages, workers: int
) -> Pool:
    """The segmentation pool of an LVIS file. Raises InputError if anything in it is wrong."""
    lvis = load_lvis(source.path("annotations"), source.path("images"))
    frequencies = {name: _frequency(lvis, record) for name, record in _by_name(lvis).items()}
    pool = read_instances(lvis, source, image_size, usable, workers, _not_exhaustive(lvis))
    pool.regions = RegionTable.of(pool.regions).with_groups(frequencies)
    return pool


def load_lvis(file: Path, images: Path) -> CheckedCOCO:
    """An LVIS file, in which each image has the name of its file in the folder `images`. Raises
    InputError if the file is malformed.
    """
    lvis = load_instances(file)
    for number, record in lvis.imgs.items():
        if "file_name" not in record:
            record["file_name"] = _file_name(images, record, f"{file}: image {number}")
    return lvis


def _file_name(images: Path, record: dict[str, Any], where: str) -> str:
    url = record.get("coco_url")
    parts = url.split("/") if isinstance(url, str) and "\0" not in url else []
    if len(parts) < 2 or not parts[-1]:
        raise InputError(
            f"{where} has the coco_url {shown(url)}; it must be the address of an image."
        )
    in_folder = f"{parts[-2]}/{parts[-1]}"
    if ".." not in parts[-2:] and is_file(images / in_folder):
        return in_folder
    return parts[-1]


def _not_exhaustive(lvis: CheckedCOCO) -> Mapping[Any, Set[str]]:
    """Image id -> classes of which it may show more instances than are annotated."""
    found = {}
    for number, record in lvis.imgs.items():
        listed = record.get("not_exhaustive_category_ids", [])
        where = f"{lvis.file}: image {number}"
        if not isinstance(listed, list):
            raise InputError(f"{where} has no list of not_exhaustive_category_ids.")
        for category in listed:
            if not isinstance(category, int | str) or category not in lvis.cats:
                raise InputError(
                    f"{where} lists the category {shown(category)} as not exhaustive, which is not "
                    "among the file's categories."
                )
        found[number] = {lvis.cats[category]["name"] for category in listed}
    return found


def _by_name(lvis: CheckedCOCO) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in lvis.cats.values()}


def _frequency(lvis: CheckedCOCO, record: dict[str, Any]) -> str:
    """The name of a class's frequency; empty where the file has none."""
    frequency = record.get("frequency", "")
    if frequency and (not isinstance(frequency, str) or frequency not in _FREQUENCIES):
        raise InputError(
            f"{lvis.file}: category {record['id']} has the frequency {shown(frequency)}; it must "
            "be r, c or f."
        )
    return _FREQUENCIES.get(frequency, "")
