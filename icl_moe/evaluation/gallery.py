"""Pictures of some episodes for the report: examples, query, prediction and truth, decoded from the
model's tokens.
"""

import numpy as np
from tqdm import tqdm

from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode, Swap
from icl_moe.evaluation.predictions import Condition, PredictionLog
from icl_moe.evaluation.proof import SwappedQuery, flips
from icl_moe.images import to_image
from icl_moe.inference.model import InContextModel
from icl_moe.pictures import Cell, Gallery
from icl_moe.tasks.task import Judge

EPISODES_SHOWN = 12


def draw_gallery(
    model: InContextModel, episodes: EpisodeSet, condition: Condition, log: PredictionLog
) -> Gallery:
    """Draw evenly spaced episodes, not chosen by their scores. Images are decoded from their codes;
    the codes of a features tokenizer are shown by their mean colours.
    """
    places = np.linspace(0, len(episodes) - 1, EPISODES_SHOWN)
    numbers = np.unique(places.round().astype(int)).tolist()
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for number in tqdm(numbers, desc=f"drawing {condition.task}", unit="episode", leave=False):
        episode = episodes[number]
        pixels = model.show(np.stack([pair.image for pair in episode.pairs]))
        images = [to_image(each) for each in pixels]
        said = log[condition, episode.key].said
        cells = episode.task.cells(episode, images, said, condition.shots)
        rows.append((f"{episode.category} · {episode.key}", tuple(cells)))
    task = condition.task.replace("_", " ").capitalize()
    title = (
        f"{task}, {condition.describe()}: {len(rows)} of {len(episodes)} episodes, evenly spaced"
    )
    return Gallery(title, tuple(rows))


def draw_proof(
    model: InContextModel,
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
        said, said_swapped = (
            log[condition, episode.key].said
            for condition in (swapped._replace(control=None), swapped)
        )
        query = SwappedQuery(episode, swap.shown, said, said_swapped)
        found.setdefault(flips(episodes.task, query, judge), (episode, swap, query))
        if len(found) == 2:
            break
    rows = []
    for right, words in ((True, "right with both"), (False, "not right with both")):
        if right in found:
            episode, swap, query = found[right]
            kinds = f"{episode.kind.describe()}; {swap.shown.describe()}"
            name = f"the first query that is {words}: {kinds}"
            rows.append((f"{name} · {episode.key}", _proof_cells(model, episode, swap, query)))
    title = f"{swapped.task.capitalize()}: one query, two examples"
    return Gallery(title, tuple(rows))


def _proof_cells(
    model: InContextModel, episode: EvaluationEpisode, swap: Swap, query: SwappedQuery
) -> tuple[Cell, ...]:
    """The query, then for each class the first example, the output after it, and the truth."""
    task, objects = episode.task, episode.task.objects(episode)
    sources = (episode, swap.source)
    images = [episode.query.image, *(source.pairs[0].image for source in sources)]
    picture, *examples = (to_image(each) for each in model.show(np.stack(images)))
    cells = [Cell("query", picture)]
    for source, example, said in zip(
        sources, examples, (query.said, query.said_swapped), strict=True
    ):
        shown, right = task.true_output(source, 0), objects[source.kind][0]
        cells += [
            Cell(
                f"example: {source.kind.describe()}",
                task.show(example, shown),
                task.caption_of(shown),
            ),
            Cell("prediction", task.show(picture, said), task.caption_of(said, right)),
            Cell("annotated", task.show(picture, right), task.caption_of(right)),
        ]
    return tuple(cells)
