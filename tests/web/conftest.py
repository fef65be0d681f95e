import pytest
import toy_export
import toy_tokenizer

from icl_moe import InContextModel
from icl_moe.settings import load_recipe
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe
from preprocessing.world import ClassPool, classes_of_split, draw_class_scene

MEANT = 3
"""The number of the class in the pool that the examples show."""


@pytest.fixture(scope="session")
def both_tasks(tmp_path_factory) -> InContextModel:
    """A model with random weights for masks and captions, of up to two examples."""
    folder = tmp_path_factory.mktemp("web")
    settings = toy_tokenizer.recipe_settings(toy_tokenizer.save_toy_tokenizer(folder / "tokenizer"))
    settings += ["synthetic.images=12", "samples=2", "examples=2"]
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    toy_export.save_toy_model(folder / "model", folder / "shards")
    return InContextModel.from_pretrained(folder / "model", "cpu")


@pytest.fixture(scope="session")
def demo() -> InContextModel:
    """The shipped model for drawn scenes."""
    return InContextModel.from_pretrained("demo", "cpu")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of drawn scenes 0.png, 1.png ... that show one class, which the demo model has not
    seen in training, and the masks of that class.
    """
    folder = tmp_path_factory.mktemp("scenes")
    pool = ClassPool([drawn for _, drawn in classes_of_split("val", 8)][:8])
    masks = []
    for number in range(40):
        scene = draw_class_scene(pool, 160, 5, "val", number, 0.5)
        meant = [each.mask_HW for each in scene.objects if each.number == MEANT]
        if meant and meant[0].mean() > 0.06 and len(masks) < 5:
            scene.image.save(folder / f"{len(masks)}.png")
            masks.append(meant[0])
    assert len(masks) == 5
    return folder, masks
