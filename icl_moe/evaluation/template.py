"""What another system is to predict: the pictures of the queries and their examples, and an empty
file of predictions for each task.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode, Question
from icl_moe.evaluation.other_systems import episodes_hash, predictions_file
from icl_moe.evaluation.photographs import Photographs
from icl_moe.files import write_whole
from icl_moe.inputs import read_json
from icl_moe.rle import decode_rle


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
    swapped: bool = True,
) -> None:
    """Write into `out` for each task TASK/KEY/query.png, example1.png and so on, with
    example1_mask.png for masks; TASK_episodes.json, which lists these and what the examples say;
    and TASK.json, predictions without a result. swapped: also swapped1.png and so on,
    TASK_swapped_episodes.json and TASK_swapped.json, if any query can be asked so.

    Raises InputError if the episodes have fewer examples, if a file of predictions was filled
    already, which would be lost, or if a picture is not there.
    """
    for episodes in sets:
        for also in (False, True):
            _check_not_filled(predictions_file(out, episodes, also))
        if shots > episodes.examples:
            raise InputError(
                f"The episodes of {shards.location} have {episodes.examples} example(s): --shots "
                f"must be at most that, not {shots}."
            )
    out.mkdir(parents=True, exist_ok=True)
    for episodes in sets:
        _write_asked(shards, episodes, out, shots, images)
        if swapped and shots and episodes.swaps:
            _write_asked(shards, episodes, out, shots, images, swapped=True)


def _check_not_filled(path: Path) -> None:
    content = read_json(path) if path.exists() else None
    if isinstance(content, dict) and content.get("results") == []:
        return
    if content is not None:
        raise InputError(f"{path} holds predictions already; give --out another folder.")


def _write_asked(
    shards: ShardSet,
    episodes: EpisodeSet,
    out: Path,
    shots: int,
    images: Path | None,
    swapped: bool = False,
) -> None:
    task = episodes.task.name
    photographs = Photographs(shards, task, images)
    head = {"episodes": episodes_hash(episodes, swapped), "shots": shots}
    questions = episodes.questions(swapped)
    name = "swapped" if swapped else "example"
    listed = [
        {"id": number} | _write_episode(question, photographs, out, shots, name)
        for number, question in enumerate(tqdm(questions, f"template, {task}", unit="episode"), 1)
    ]
    path = predictions_file(out, episodes, swapped)
    content = head | {"image_size": episodes.image_size, "images": listed}
    write_whole(path.with_name(f"{path.stem}_episodes.json"), json.dumps(content, indent=1) + "\n")
    write_whole(path, json.dumps({**head, "system": "", "results": []}, indent=1) + "\n")


def _write_episode(
    question: Question, photographs: Photographs, out: Path, shots: int, name: str
) -> dict[str, Any]:
    """Write the pictures of a question and return its entry, which does not contain the answer.
    name: how the files of the examples' pictures are called.
    """
    truth, source = question
    where = f"{truth.task.name}/{truth.key}"
    folder = out / where
    folder.mkdir(parents=True, exist_ok=True)
    photographs.show(truth, -1).save(folder / "query.png")
    examples = []
    for number in range(shots):
        picture = photographs.show(source, number)
        file = f"{name}{number + 1}"
        picture.save(folder / f"{file}.png")
        entry: dict[str, Any] = {"image": f"{where}/{file}.png"}
        if "masks" in source.meta:
            example_mask(source, number, picture.size).save(folder / f"{file}_mask.png")
            entry["mask"] = f"{where}/{file}_mask.png"
        else:
            entry["caption"] = source.meta["captions"][number]
            entry["box"] = source.meta["boxes"][number]
        examples.append(entry)
    return {
        "key": truth.key,
        "category": source.category,
        "query": f"{where}/query.png",
        "examples": examples,
    }
