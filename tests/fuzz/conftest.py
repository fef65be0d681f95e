import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy_export
from PIL import Image


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """The files to mutate: drawn data in COCO's and Visual Genome's formats, the same in LVIS's and
    as lines, shards of it, a model, a region, an image, a mask, and a folder of masks with names.
    """
    folder = tmp_path_factory.mktemp("material")
    toy_export.build_toy_line(folder, images=16, samples=6)
    (folder / "shards/synthetic").rename(folder / "data")
    instances = json.loads((folder / "data/instances_train.json").read_bytes())
    captions = [
        {"id": i, "image_id": image["id"], "caption": f"a red {name} and a star"}
        for i, (image, name) in enumerate(
            zip(instances["images"], ("disc", "ring") * 99, strict=False)
        )
    ]
    content = {"images": instances["images"], "annotations": captions}
    (folder / "captions.json").write_text(json.dumps(content))
    write_others(folder, instances)
    region = {"caption": "a red thing", "category": "thing", "box": [1, 2, 30, 40]}
    (folder / "region.json").write_text(json.dumps(region))
    picture = Image.radial_gradient("L").resize((64, 48))
    Image.merge("RGB", [picture] * 3).save(folder / "image.jpg")
    picture.point(lambda level: 255 * (level < 99)).save(folder / "mask.png")
    (folder / "own/images").mkdir(parents=True)
    (folder / "own/masks").mkdir()
    for name in ("a", "b"):
        shutil.copy(folder / "image.jpg", folder / f"own/images/{name}.jpg")
        picture.point(lambda level: level // 100).save(folder / f"own/masks/{name}.png")
    (folder / "own/names.json").write_text('{"1": "ring", "2": "disc"}')
    (folder / "own/names.txt").write_text("background: 0,0,0\nring: 1,1,1\ndisc: 2,2,2\n")
    return folder


def write_others(folder: Path, instances: dict[str, Any]) -> None:
    """The instances as LVIS and as lines."""
    names = {category["id"]: category["name"] for category in instances["categories"]}
    lvis = copy.deepcopy(instances)
    for image in lvis["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/images/{image.pop('file_name')}"
        image["not_exhaustive_category_ids"] = []
    for category, frequency in zip(lvis["categories"], "rcf" * 9, strict=False):
        category["frequency"] = frequency
    (folder / "lvis.json").write_text(json.dumps(lvis))
    files = {image["id"]: image["file_name"] for image in instances["images"]}
    lines = [
        {
            "image": files[annotation["image_id"]],
            "class": names[annotation["category_id"]],
            "caption": "a thing",
            "box": annotation["bbox"],
            "mask": annotation["segmentation"],
        }
        for annotation in instances["annotations"]
    ]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
