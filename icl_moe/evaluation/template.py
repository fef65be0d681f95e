"""What another system is to predict: the pictures of the queries and their examples, and an empty
file of predictions for each task.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.evaluation.other_systems import episodes_hash
from icl_moe.files import write_whole
from icl_moe.images import load_image
from icl_moe.rle import decode_rle


class Photographs:
    """The pictures that the pairs of a shard folder show, from the files that it was built of.

    images: the folder of these files; by default where the data recipe had them, or the episodes
    that it was built of. Raises InputError on use if a file is not there.
    """

    def __init__(self, shards: ShardSet, task: str, images: Path | None = None) -> None:
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


def example_mask(episode: EvaluationEpisode, pair: int, size: tuple[int, int]) -> Image.Image:
    """The mask of an example, white on black, in the size (width, height) of its picture."""
    mask_HW = decode_rle(episode.meta["masks"][pair])
    picture = Image.fromarray(mask_HW.astype(np.uint8) * 255)
    return picture.resize(size, Image.Resampling.NEAREST)


def write_template(
    shards: ShardSet,
    sets: Sequence[EpisodeSet],
    out: Path,
    shots: int,
    images: Path | None = None,
) -> None:
    """Write into `out` for each task TASK/KEY/query.png, example1.png and so on, with
    example1_mask.png for masks; TASK_episodes.json, which lists these and what the examples say;
    and TASK.json, predictions without a result.

    Raises InputError if the episodes have fewer examples, or a picture is not there.
    """
    for episodes in sets:
        if shots > episodes.examples:
            raise InputError(
                f"The episodes of {shards.location} have {episodes.examples} example(s): --shots "
                f"must be at most that, not {shots}."
            )
    out.mkdir(parents=True, exist_ok=True)
    for episodes in sets:
        task = episodes.task.name
        photographs = Photographs(shards, task, images)
        head = {"episodes": episodes_hash(episodes), "shots": shots}
        listed = [
            {"id": number} | _write_episode(episode, photographs, out, shots)
            for number, episode in enumerate(_all(episodes), 1)
        ]
        size = {"image_size": episodes.image_size, "images": listed}
        content = json.dumps(head | size, indent=1) + "\n"
        write_whole(out / f"{task}_episodes.json", content)
        empty = {**head, "system": "", "results": []}
        write_whole(out / f"{task}.json", json.dumps(empty, indent=1) + "\n")


def _all(episodes: EpisodeSet) -> Iterator[EvaluationEpisode]:
    numbers = tqdm(range(len(episodes)), f"template, {episodes.task.name}", unit="episode")
    return (episodes[number] for number in numbers)


def _write_episode(
    episode: EvaluationEpisode, photographs: Photographs, out: Path, shots: int
) -> dict[str, Any]:
    """Write the pictures of an episode, and return its entry. What the query is asked for is not in
    it.
    """
    where = f"{episode.task.name}/{episode.key}"
    folder = out / where
    folder.mkdir(parents=True, exist_ok=True)
    photographs.show(episode, -1).save(folder / "query.png")
    examples = []
    for number in range(shots):
        picture = photographs.show(episode, number)
        name = f"example{number + 1}"
        picture.save(folder / f"{name}.png")
        entry: dict[str, Any] = {"image": f"{where}/{name}.png"}
        if "masks" in episode.meta:
            example_mask(episode, number, picture.size).save(folder / f"{name}_mask.png")
            entry["mask"] = f"{where}/{name}_mask.png"
        else:
            entry["caption"] = episode.meta["captions"][number]
            entry["box"] = episode.meta["boxes"][number]
        examples.append(entry)
    return {
        "key": episode.key,
        "category": episode.category,
        "query": f"{where}/query.png",
        "examples": examples,
    }
