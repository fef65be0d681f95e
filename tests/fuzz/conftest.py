import json
from pathlib import Path

import pytest
import toy_export
from PIL import Image


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """The files to mutate: drawn data in COCO's and Visual Genome's formats, shards of it, a model,
    and a region, an image and a mask.
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
    region = {"caption": "a red thing", "category": "thing", "box": [1, 2, 30, 40]}
    (folder / "region.json").write_text(json.dumps(region))
    picture = Image.radial_gradient("L").resize((64, 48))
    Image.merge("RGB", [picture] * 3).save(folder / "image.jpg")
    picture.point(lambda level: 255 * (level < 99)).save(folder / "mask.png")
    return folder
