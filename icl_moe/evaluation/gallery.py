"""Pictures of some episodes for the report: examples, query, prediction and truth, as the model
sees them.
"""

import numpy as np
from tqdm import tqdm

from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.predictions import Condition, PredictionLog
from icl_moe.images import to_image
from icl_moe.inference.model import InContextModel
from icl_moe.pictures import Gallery

EPISODES_SHOWN = 12


def draw_gallery(
    model: InContextModel, episodes: EpisodeSet, condition: Condition, log: PredictionLog
) -> Gallery:
    """Episodes at even distances, not chosen by their scores. Images are what the tokenizer makes
    of their codes.
    """
    places = np.linspace(0, len(episodes) - 1, EPISODES_SHOWN)
    numbers = np.unique(places.round().astype(int)).tolist()
    rows = []
    for number in tqdm(numbers, desc=f"drawing {condition.task}", unit="episode", leave=False):
        episode = episodes[number]
        pixels = model.decode(np.stack([pair.image for pair in episode.pairs]))
        images = [to_image(each) for each in pixels]
        said = log[condition, episode.key].said
        cells = episode.task.cells(episode, images, said, condition.shots)
        rows.append((f"{episode.category} · {episode.key}", tuple(cells)))
    title = (
        f"{condition.task.capitalize()}, {condition.describe()}: {len(rows)} of {len(episodes)} "
        "episodes, at even distances"
    )
    return Gallery(title, tuple(rows))
