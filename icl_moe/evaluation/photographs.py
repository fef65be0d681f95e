"""The pictures that episodes show, from the files that their shards were built of."""

from pathlib import Path

from PIL import Image

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EvaluationEpisode
from icl_moe.images import crop_and_resize, load_image


class Photographs:
    """The pictures that the pairs of a shard folder show, from the files that it was built of.

    images: the folder of these files; by default where the data recipe had them, or the episodes
    that it was built of. Raises InputError on use if a file is not there.
    """

    def __init__(self, shards: ShardSet, task: str, images: Path | None = None) -> None:
        self._size = shards.manifest.image_size
        recipe = shards.manifest.recipe
        section = recipe.get(task) or {}
        keys = ("images", "examples_images")
        named = [Path(section[key]) for key in keys if section.get(key)]
        if recipe.get("episodes_data"):
            named.append(Path(recipe["episodes_data"]))
        made = [Path(shards.location) / name / "images" for name in ("synthetic", "composed")]
        self._folders = [images] if images else [*made, *named]

    def show(self, episode: EvaluationEpisode, pair: int) -> Image.Image:
        """What a pair shows, in the pixels of its file: the crop of the image."""
        source = episode.meta["sources"][pair]
        for folder in self._folders:
            path = folder / source["image"]
            if path.is_file():
                return load_image(path).crop(source["crop"])
        raise InputError(
            f"The image {source['image']} of {episode.key} is not in "
            f"{' or '.join(map(str, self._folders))}; name its folder with --images."
        )

    def guide(self, episode: EvaluationEpisode) -> Image.Image:
        """The picture of an episode's query at the model's size, whose edges the outline of its
        mask can follow.
        """
        picture = self.show(episode, -1)
        return crop_and_resize(picture, (0, 0, *picture.size), self._size)
