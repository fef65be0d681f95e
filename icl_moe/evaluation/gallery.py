"""Pictures of some episodes for the report: examples, query, prediction and truth."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from icl_moe.data.shards import ShardSet, evenly_spaced
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode, Swap
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.predictions import Condition, PredictionLog, describe_task
from icl_moe.evaluation.proof import SwappedQuery, flips
from icl_moe.images import to_image
from icl_moe.inference.model import InContextModel
from icl_moe.pictures import Cell, Gallery
from icl_moe.tables import percent
from icl_moe.tasks.task import Judge, lacks_class

EACH_SHOWN = 3
"""How many of the best, the middle and the worst outputs are shown."""

EVENLY_SHOWN = 12


class Images:
    """The images of episodes, from their files at the model's size; or, if the files are missing,
    decoded from their codes (codes of a features tokenizer are shown as their mean colours).
    """

    def __init__(self, model: InContextModel, shards: ShardSet, task: str) -> None:
        self._model, self._size = model, shards.manifest.image_size
        self._photographs: Photographs | None = Photographs(shards, task)

    def show(self, episode: EvaluationEpisode, pairs: Sequence[int]) -> list[Image.Image]:
        """The images of some of an episode's pairs."""
        if self._photographs is not None:
            try:
                found = [self._photographs.show(episode, pair) for pair in pairs]
                return [image.resize((self._size, self._size)) for image in found]
            except InputError:
                self._photographs = None
        codes = np.stack([episode.pairs[pair].image for pair in pairs])
        return [to_image(each) for each in self._model.show(codes)]

    @property
    def note(self) -> str:
        """What the images are, in a sentence."""
        if self._photographs is None:
            return "Images are shown as decoded from the model's codes."
        return f"Images are shown at the model's size, {self._size} px."


def draw_gallery(
    images: Images, episodes: EpisodeSet, condition: Condition, log: PredictionLog
) -> Gallery:
    """Draw the queries with the best, the middle and the worst agreement with the truth, of those
    that show their class if there are any.
    """
    task, agreements, absent = episodes.task, dict[int, float](), dict[int, float]()
    for number in range(len(episodes)):
        episode = episodes[number]
        prediction = log[condition, episode.key].said
        among = absent if lacks_class(episode.meta) else agreements
        among[number] = task.agreement(prediction, task.right_outputs(episode))
    agreements = agreements or absent
    ranked = sorted(agreements, key=lambda number: (-agreements[number], number))
    found = {
        ranked[place]: f"{words}: {task.measure} {percent(agreements[ranked[place]])} · "
        for place, words in _places(len(ranked))
    }
    title = (
        f"{describe_task(task.name)}, {condition.describe()}: the best, the middle and the worst "
        f"of {len(ranked)} queries by {task.measure}. "
    )
    rows = _rows(images, episodes, condition, log, found)
    return Gallery(title + images.note, rows)


def draw_evenly(
    images: Images, episodes: EpisodeSet, condition: Condition, log: PredictionLog
) -> Gallery:
    """Draw evenly spaced episodes, which are the same whatever was predicted."""
    numbers = evenly_spaced(len(episodes), EVENLY_SHOWN)
    title = f"{describe_task(condition.task)}, {condition.describe()}"
    return Gallery(title, _rows(images, episodes, condition, log, dict.fromkeys(numbers, "")))


def _rows(
    images: Images,
    episodes: EpisodeSet,
    condition: Condition,
    log: PredictionLog,
    numbers: Mapping[int, str],
) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    """The rows of a gallery. numbers: the number of each episode to draw -> the beginning of the
    row's title.
    """
    rows = []
    bar = tqdm(numbers.items(), desc=f"drawing {condition.task}", unit="episode", leave=False)
    for number, words in bar:
        episode = episodes[number]
        prediction = log[condition, episode.key].said
        pictures = images.show(episode, range(len(episode.pairs)))
        cells = episode.task.cells(episode, pictures, prediction, condition.shots)
        rows.append((f"{words}{episode.category} · {episode.key}", tuple(cells)))
    return tuple(rows)


def _places(queries: int) -> list[tuple[int, str]]:
    """The ranks of the best, the middle and the worst, each once, with what to call them."""
    middle = (queries - EACH_SHOWN) // 2
    begins = ((0, "Best"), (middle, "Median"), (queries - EACH_SHOWN, "Worst"))
    found: dict[int, str] = {}
    for begin, words in begins:
        for place in range(max(begin, 0), min(begin + EACH_SHOWN, queries)):
            found.setdefault(place, f"{words} (rank {place + 1} of {queries})")
    return sorted(found.items())


def draw_proof(
    images: Images,
    episodes: EpisodeSet,
    swapped: Condition,
    log: PredictionLog,
    judge: Judge,
) -> Gallery:
    """One query with examples of two things that it shows: the first query that is right with
    both, and the first that is not.
    """
    found: dict[bool, tuple[EvaluationEpisode, Swap, SwappedQuery]] = {}
    for number, swap in episodes.swaps.items():
        episode = episodes[number]
        prediction, swapped_prediction = (
            log[condition, episode.key].said
            for condition in (swapped._replace(control=None), swapped)
        )
        query = SwappedQuery(episode, swap.shown, prediction, swapped_prediction)
        found.setdefault(flips(episodes.task, query, judge), (episode, swap, query))
        if len(found) == 2:
            break
    rows = []
    for right, words in ((True, "right with both"), (False, "not right with both")):
        if right in found:
            episode, swap, query = found[right]
            name = f"The first query that is {words} · {episode.key}"
            rows.append((name, _proof_cells(images, episode, swap, query)))
    title = (
        f"{describe_task(swapped.task)}: one query, two examples. What is written must change with "
        f"the example. {images.note}"
    )
    return Gallery(title, tuple(rows))


def _proof_cells(
    images: Images, episode: EvaluationEpisode, swap: Swap, query: SwappedQuery
) -> tuple[Cell, ...]:
    """The query, then for each class the first example, the output after it, and the truth."""
    task, objects = episode.task, episode.task.objects(episode)
    (picture,) = images.show(episode, [-1])
    cells = [Cell("query", picture)]
    for source, prediction in ((episode, query.said), (swap.source, query.said_swapped)):
        (example,) = images.show(source, [0])
        example_output, right = task.true_output(source, 0), objects[source.kind][0]
        words = filter(None, (source.kind.describe(), task.caption_of(example_output)))
        cells += [
            Cell("example", task.show(example, example_output), ": ".join(words)),
            Cell("prediction", task.show(picture, prediction), task.caption_of(prediction, right)),
            Cell("annotated", task.show(picture, right), task.caption_of(right)),
        ]
    return tuple(cells)
