"""The pictures that episodes show, from the files that their shards were built of."""

from pathlib import Path

from PIL import Image

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EvaluationEpisode
from icl_moe.images import crop_and_resize, load_image, load_recorded
from icl_moe.inputs import check_inside, is_inside

_SECTIONS = {"semantic_segmentation": "segmentation"}
"""The section of a data recipe that a task's episodes are from, where it has another name."""


class Photographs:
    """The pictures that the pairs of a shard folder show, from the files that it was built of.

    images: the folder of these files; by default where the data recipe had them, or the episodes
    that it was built of. Raises InputError on use if a file is not there or is another.
    """

    def __init__(self, shards: ShardSet, task: str, images: Path | None = None) -> None:
        self._recipe, self._images = shards.manifest.recipe, images
        self._made, self._size = Path(shards.location), shards.manifest.image_size
        section = self._recipe.get(_SECTIONS.get(task, task))
        self._section = section or self._recipe.get("tasks", {}).get(task) or {}

    def show(self, episode: EvaluationEpisode, pair: int) -> Image.Image:
        """What a pair shows, in the pixels of its file: the crop of the image."""
        source = episode.meta["sources"][pair]
        is_query = pair in (-1, len(episode.meta["sources"]) - 1)
        folder = self._images or self._folder(is_query, "provenance" in source)
        name, file = source["image"], folder / source["image"]
        if not is_inside(name) or not file.is_file():
            raise InputError(
                f"The image {name} of {episode.key} is not in {folder}; name its folder with "
                "--images."
            )
        check_inside(folder, file)
        size = source.get("size")  # Shards of earlier versions lack it.
        image = load_image(file) if size is None else load_recorded(file, (size[0], size[1]))
        _, _, right, bottom = source["crop"]
        fits = right <= image.width and bottom <= image.height
        if not fits or (size is not None and image.size != tuple(size)):
            crop = f"too few for the crop {source['crop']}"
            expected = f"not {size[0]} x {size[1]}" if size else crop
            raise InputError(
                f"{file} is not the image that {episode.key} was made from: it has "
                f"{image.width} x {image.height} pixels, {expected}."
            )
        return image.crop(source["crop"])

    def at_model_size(self, episode: EvaluationEpisode, pair: int) -> Image.Image:
        """What a pair shows, resized to the square that the model reads."""
        picture = self.show(episode, pair)
        return crop_and_resize(picture, (0, 0, *picture.size), self._size)

    def _folder(self, is_query: bool, is_composed: bool) -> Path:
        """Where the image of a pair is. Folders may have files of equal names, so that one must not
        stand in for another.
        """
        if is_composed:
            return self._made / "composed/images"
        if self._recipe.get("episodes_data"):
            return Path(self._recipe["episodes_data"])
        examples = None if is_query else self._section.get("examples_images")
        named = examples or self._section.get("images")
        return Path(named) if named else self._made / "synthetic/images"
