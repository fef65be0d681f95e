"""Small hand-made data sets in the real formats, in which every number is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_tokenizer
import yaml
from PIL import Image
from small_builds import Build, small_recipe

from icl_moe.data.shards import Manifest
from preprocessing.build import build_shards

WIDTH, HEIGHT = 100, 80

Edit = Callable[[dict[str, Any]], None]


def write_image(path: Path, seed: int, width: int = WIDTH, height: int = HEIGHT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


class CocoFolder:
    """Six images of 100 x 80. All show a dog of 40 x 30 at (10, 20); images 1 to 3 two cats, 4 has
    a crowd of cats, 5 and 6 none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.file = folder / "instances.json"
        self.captions_file = folder / "captions.json"
        self.content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        }
        captions: list[dict[str, Any]] = []
        for number in range(1, 7):
            write_image(self.images / f"{number}.jpg", number)
            self.content["images"].append(
                {"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT}
            )
            self._annotate(number, 18, [rectangle(10, 20, 40, 30)], (10, 20, 40, 30))
            if number <= 3:
                self._annotate(number, 17, [rectangle(60, 10, 20, 20)], (60, 10, 20, 20))
                self._annotate(number, 17, [rectangle(80, 50, 10, 10)], (80, 50, 10, 10))
            if number == 4:
                runs = [0, 10, WIDTH * HEIGHT - 10]
                self._annotate(
                    number, 17, {"size": [HEIGHT, WIDTH], "counts": runs}, (0, 0, 1, 10), crowd=1
                )
            for text in ("A dog  on grass.", "Two cats and a dog ", "Nothing to see."):
                captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
        self.write()
        self.captions_file.write_text(
            json.dumps({"images": self.content["images"], "annotations": captions})
        )

    def write(self, edit: Edit | None = None) -> Path:
        if edit:
            edit(self.content)
        self.file.write_text(json.dumps(self.content))
        return self.file

    def _annotate(
        self, image: int, category: int, segmentation: Any, box: tuple[int, ...], crowd: int = 0
    ) -> None:
        number = len(self.content["annotations"]) + 1
        annotation = {
            "id": number,
            "image_id": image,
            "category_id": category,
            "iscrowd": crowd,
            "bbox": list(box),
        }
        self.content["annotations"].append(
            {**annotation, "segmentation": segmentation, "area": box[2] * box[3]}
        )


class GenomeFolder:
    """Five images of 100 x 80 in Visual Genome's 1.4 layout, each with the same two dogs, a tree,
    and four regions.
    """

    def __init__(self, folder: Path) -> None:
        self.images = folder / "images"
        self.content: dict[str, list[Any]] = {
            "image_data": [],
            "objects": [],
            "region_descriptions": [],
        }
        self.folder = folder
        for number in range(1, 6):
            write_image(self.images / f"VG_100K/{number}.jpg", number)
            url = f"https://cs.stanford.edu/people/rak248/VG_100K/{number}.jpg"
            self.content["image_data"].append(
                {"image_id": number, "url": url, "width": WIDTH, "height": HEIGHT, "coco_id": None}
            )
            boxes = {"dogs": (0, 0, 50, 40), "Dog": (60, 40, 60, 40), "tree": (0, 0, 100, 80)}
            objects = [
                {
                    "object_id": 10 * number + i,
                    "names": [name],
                    "x": x,
                    "y": y,
                    "w": w,
                    "h": h,
                    "synsets": [],
                    "merged_object_ids": [],
                }
                for i, (name, (x, y, w, h)) in enumerate(boxes.items())
            ]
            self.content["objects"].append(
                {"image_id": number, "objects": objects, "image_url": url}
            )
            regions = [
                self._region(number, 1, "the dogs  are asleep. ", (0, 0, 50, 36)),
                self._region(number, 2, "a dog past the edge", (60, 40, 60, 40)),
                self._region(number, 3, "a dog elsewhere", (0, 60, 10, 10)),
                self._region(number, 4, "a tall tree", (0, 0, 100, 80)),
            ]
            self.content["region_descriptions"].append({"id": number, "regions": regions})
        self.write()

    def write(self) -> None:
        for name, content in self.content.items():
            self.file(name).write_text(json.dumps(content))

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    @staticmethod
    def _region(image: int, number: int, phrase: str, box: tuple[int, ...]) -> dict[str, Any]:
        x, y, width, height = box
        return {
            "region_id": 10 * image + number,
            "image_id": image,
            "phrase": phrase,
            "x": x,
            "y": y,
            "width": width,
            "height": height,
        }


@pytest.fixture
def coco_folder(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "coco")


@pytest.fixture
def genome_folder(tmp_path: Path) -> GenomeFolder:
    (tmp_path / "genome").mkdir()
    return GenomeFolder(tmp_path / "genome")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_tokenizer.save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def build(tokenizer: Path) -> Build:
    """Builds a small version of `recipe` with the toy tokenizer."""

    def build(
        out: Path,
        *settings: str,
        recipe: str = "demo",
        workers: int = 0,
        codes_cache: Path | None = None,
    ) -> Manifest:
        of_build = small_recipe(tokenizer, *settings, recipe=recipe)
        return build_shards(of_build, out, workers, codes_cache=codes_cache)

    return build


@pytest.fixture(scope="session")
def demo(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small build."""
    out = tmp_path_factory.mktemp("build") / "demo"
    build(out)
    return out


@pytest.fixture
def coco_recipe(coco_folder: CocoFolder, tmp_path: Path) -> Path:
    """A recipe on the hand-made COCO folder."""
    coco = {"images": str(coco_folder.images), "annotations": str(coco_folder.file)}
    captions = {
        **coco,
        "annotations": str(coco_folder.captions_file),
        "instances": str(coco_folder.file),
        "min_descriptions": 0,
    }
    path = tmp_path / "coco.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "tokenizer": "set by build",
                "image_size": 64,
                "examples": 2,
                "vocabulary": {"text_merges": 1000},
                "segmentation": {"source": "coco", **coco},
                "captioning": {"source": "coco_captions", **captions},
            }
        )
    )
    return path
