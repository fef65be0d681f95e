"""The masks of fixed episodes: of COCO's or LVIS's annotations, or of mask files as in PASCAL VOC
and FSS-1000.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from icl_moe.errors import InputError, shown
from icl_moe.inputs import check_inside, check_is_file
from icl_moe.rle import decode_rle
from preprocessing.coco import CheckedCOCO, instance_rle, load_instances
from preprocessing.episode_file import EpisodeFile, FixedPair, Masks
from preprocessing.pool import ImageFile
from preprocessing.records import image_file

Annotation = dict[str, Any]


class MaskSource(Protocol):
    """What knows the masks of an image."""

    def masks(self, pair: FixedPair, category: str) -> dict[str, np.ndarray]:
        """Class -> boolean mask (H, W), of all classes that the image shows, the pair's own
        `category` among them.
        """
        ...

    def ignored(self, pair: FixedPair) -> np.ndarray | None:
        """The pixels that belong to no class and do not count; None if there are none."""
        ...


class _Place(NamedTuple):
    coco: CheckedCOCO
    image_id: Any


class AnnotatedImages:
    """The images of annotation files in the format of COCO or LVIS v1, under their paths in the
    data set's folder, such as val2014/COCO_val2014_000000000042.jpg.

    files: relative to the folder. how: `painted` or `union`, see `EpisodeFile.masks`. Raises
    InputError for a bad file.
    """

    def __init__(self, folder: Path, files: Sequence[str], how: Masks) -> None:
        self.folder, self.files, self.how = folder, tuple(files), how
        self._cocos = [load_instances(folder / file) for file in files]
        self._places: dict[str, _Place] = {}
        for coco in self._cocos:
            for category in coco.cats.values():
                # LVIS writes names with underscores.
                category["name"] = category["name"].replace("_", " ")
            for image_id, record in coco.imgs.items():
                self._places[_path_of(coco.file, record)] = _Place(coco, image_id)

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes in the order of their ids."""
        categories = self._cocos[0].cats
        return [categories[number]["name"] for number in sorted(categories)]

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The records of the classes in the order of their ids."""
        return [self._cocos[0].cats[number] for number in sorted(self._cocos[0].cats)]

    def with_class(self) -> dict[str, list[str]]:
        """Class -> the images that show it, in the order of the files."""
        found: dict[str, list[str]] = {name: [] for name in self.classes}
        for path in self._places:
            for name in self.annotations(path):
                found[name].append(path)
        return found

    @cached_property
    def _of_number(self) -> dict[str, str]:
        return {Path(path).stem[-12:]: path for path in self._places}

    def path_of(self, name: str) -> str:
        """The path of the image with this name, or with one that ends in the same twelve digits,
        the number that an image has in all of COCO's releases.
        """
        number = Path(name).stem[-12:]
        if number not in self._of_number:
            raise InputError(
                f"{' and '.join(self.files)} in {self.folder} lack the image {name}, which the "
                "list of images names."
            )
        return self._of_number[number]

    def image(self, path: str) -> ImageFile:
        """The file of an image."""
        coco, image_id = self._places[path]
        record = coco.imgs[image_id]
        where = f"{coco.file}: image {image_id}"
        return image_file(self.folder, path, record.get("width"), record.get("height"), where)

    def annotations(self, path: str) -> dict[str, list[Annotation]]:
        """Class -> its annotations in an image that are part of masks."""
        coco, image_id = self._places[path]
        found: dict[str, list[Annotation]] = {}
        for annotation in coco.imgToAnns.get(image_id, ()):
            if self.how == "union" or not annotation.get("iscrowd"):
                name = coco.cats[annotation["category_id"]]["name"]
                found.setdefault(name, []).append(annotation)
        return found

    def pair(self, path: str, category: str) -> FixedPair:
        """A class in an image. Raises InputError if the image does not show it."""
        image, annotations = self.image(path), self.annotations(path).get(category)
        if not annotations:
            raise InputError(
                f"{self._places[path].coco.file} has no '{category}' in the image {path}, although "
                "the list of images says so."
            )
        ids = tuple(annotation["id"] for annotation in annotations)
        return FixedPair(path, image.width, image.height, ids)

    def class_masks(self, path: str) -> dict[str, np.ndarray]:
        """Class -> boolean mask (H, W), of all classes in an image that have a pixel."""
        coco, image_id = self._places[path]
        image = self.image(path)
        names, labels_HW = list(self.annotations(path)), np.zeros((image.height, image.width), int)
        found = {name: np.zeros(labels_HW.shape, dtype=bool) for name in names}
        for annotation in coco.imgToAnns.get(image_id, ()):
            name = coco.cats[annotation["category_id"]]["name"]
            rle = instance_rle(coco, image, annotation)
            if name not in found or rle is None:
                continue
            if self.how == "union":
                found[name] |= decode_rle(rle)
            elif not annotation.get("iscrowd"):
                labels_HW[decode_rle(rle)] = names.index(name) + 1
        if self.how == "painted":
            found = {name: labels_HW == number for number, name in enumerate(names, start=1)}
        return {name: mask_HW for name, mask_HW in found.items() if mask_HW.any()}

    def showing(self, least: int) -> dict[str, list[str]]:
        """Class -> the images that show it on at least so many pixels, in alphabetical order."""
        found: dict[str, list[str]] = {name: [] for name in self.classes}
        for path in tqdm(sorted(self._places), desc="reading masks", unit="image"):
            for name, mask_HW in self.class_masks(path).items():
                if mask_HW.sum() >= least:
                    found[name].append(path)
        return found

    def showing_instances(self, least: int) -> dict[str, list[str]]:
        """Class -> the images in which an instance of it that is no crowd has at least so many
        pixels, in alphabetical order.
        """
        found: dict[str, list[str]] = {name: [] for name in self.classes}
        for path in tqdm(sorted(self._places), desc="reading masks", unit="image"):
            coco, image = self._places[path].coco, self.image(path)
            for name, annotations in self.annotations(path).items():
                rles = (instance_rle(coco, image, a) for a in annotations if not a.get("iscrowd"))
                if max((rle_tools.area(rle) for rle in rles if rle), default=0) >= least:
                    found[name].append(path)
        return found

    # The interface of MaskSource

    def masks(self, pair: FixedPair, category: str) -> dict[str, np.ndarray]:
        if pair.image not in self._places:
            raise InputError(
                f"{' and '.join(self.files)} in {self.folder} lack the image {pair.image}, which "
                "the episodes name; they must be the files that the episodes were made of."
            )
        if self.pair(pair.image, category) != pair:
            raise InputError(
                f"The annotations of '{category}' in {pair.image} differ from the episodes'; "
                f"{' and '.join(self.files)} must be the files that these were made of."
            )
        found = self.class_masks(pair.image)
        empty = np.zeros((pair.height, pair.width), dtype=bool)
        return {category: found.get(category, empty)} | found

    def ignored(self, pair: FixedPair) -> np.ndarray | None:
        return None


class MaskFiles:
    """Masks that are files. levels: class -> the level of its pixels; without levels, a file is the
    mask of its pair's class, and pixels of at least 128 belong to it.
    """

    IGNORED = 255

    def __init__(self, folder: Path, levels: dict[str, int]) -> None:
        self._folder, self._levels = folder, levels

    def masks(self, pair: FixedPair, category: str) -> dict[str, np.ndarray]:
        levels_HW = self._read(pair)
        if not self._levels:
            return {category: levels_HW >= 128}
        if category not in self._levels:
            raise InputError(f"The episodes name no level for the class {shown(category)}.")
        found = {name: levels_HW == level for name, level in self._levels.items()}
        return {name: mask for name, mask in found.items() if name == category or mask.any()}

    def ignored(self, pair: FixedPair) -> np.ndarray | None:
        ignored_HW = self._read(pair) == self.IGNORED
        return ignored_HW if self._levels and ignored_HW.any() else None

    def _read(self, pair: FixedPair) -> np.ndarray:
        """The levels of a mask, (H, W): the numbers of a palette's colours, or shades of grey."""
        assert pair.mask is not None, "the file has been checked"
        file = self._folder / pair.mask
        check_inside(self._folder, file)
        check_is_file(file)
        try:
            with Image.open(file) as image:
                plain = image if image.mode in ("P", "L") and self._levels else image.convert("L")
                levels_HW = np.asarray(plain)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"The mask {file} cannot be read: {error}.") from error
        if levels_HW.shape != (pair.height, pair.width):
            raise InputError(
                f"The mask {file} has {levels_HW.shape[1]} x {levels_HW.shape[0]} pixels, but its "
                f"image has {pair.width} x {pair.height}."
            )
        return levels_HW


def mask_source(file: EpisodeFile, folder: Path) -> MaskSource:
    """The masks of a file's episodes, in the data set's folder."""
    if file.masks == "file":
        return MaskFiles(folder, file.levels)
    return AnnotatedImages(folder, file.annotations, file.masks)


def _path_of(file: Path, record: dict[str, Any]) -> str:
    """An image's path in the data set's folder: COCO's files are named after the folder of their
    images, such as instances_val2014.json, and LVIS gives an address that ends in it.
    """
    if isinstance(record.get("coco_url"), str) and "file_name" not in record:
        return "/".join(record["coco_url"].split("/")[-2:])
    return f"{file.stem.rpartition('_')[2]}/{record.get('file_name')}"
