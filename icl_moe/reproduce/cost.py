"""What a table costs at paper scale, counted before anything is started."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from icl_moe.batch import collate
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.recipe import TrainingRecipe
from icl_moe.reproduce.tables import CAPTIONING, EPISODES, SEGMENTATION, Row, Run, Shards
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat, TokenSequence
from icl_moe.settings import load_recipe, to_dict
from icl_moe.tables import Table
from icl_moe.tasks import TASKS
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.training.throughput import peak_of, training_flops

MFU = 0.35
"""The model FLOPs utilisation that the hours assume. It is an assumption: no run of this size has
been measured.
"""

GPUS = {"RTX A6000": 8, "A100": 8, "H100": 8}
"""The machines for which hours are given; the paper used eight A6000."""

_CAPTION = "a brown dog that lies on the green grass beside a wooden bench"
"""A caption as long as the description of a region usually is."""

_QUERIES = 2000
_QUERIES_PER_SECOND = 2.0
"""The paper decodes 1.4 to 2.8 images a second."""

_BYTES_PER_EPISODE = 14_000
"""The size of an episode in a shard: at most 2,060 tokens of two bytes, and masks, boxes and texts
as JSON.
"""

_BYTES_PER_PARAMETER = 12 * 2 + 4
"""The weights and two moments in float32, in the two checkpoints that are kept, and the exported
weights.
"""


@dataclass(frozen=True)
class Cost:
    """The cost of one run: tokens without padding, FLOPs of training, and bytes of checkpoints."""

    name: str
    steps: int
    tokens: float
    flops: float
    parameters: int

    def hours(self, gpu: str) -> float:
        """The hours of training on the number of GPUs in `GPUS`, with the utilisation `MFU`."""
        peak = peak_of(gpu, "bf16")
        assert peak is not None
        return self.flops / (peak * MFU * GPUS[gpu]) / 3600


def cost_of(run: Run) -> Cost:
    """The cost of a run at paper scale, by the FLOPs of one step of each task as training counts
    them, and the steps in which the recipe draws that task.
    """
    recipe = load_recipe(TrainingRecipe, run.recipe, run.settings)
    format, examples = format_of(run, recipe)
    per_episode = {task: _episode_cost(recipe, format, examples, task) for task in EPISODES}
    shares = _shares(run, recipe)
    episodes = recipe.training.steps * recipe.training.global_batch
    tokens, flops = (
        sum(shares[task] * episodes * per_episode[task][place] for task in shares)
        for place in (0, 1)
    )
    config = DecoderConfig.from_recipe(recipe, format=to_dict(format))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in InContextDecoder(config).parameters())
    return Cost(run.name, recipe.training.steps, tokens, flops, parameters)


def describe_cost(rows: Sequence[Row]) -> tuple[Table, list[str]]:
    """A table with a line for each run of these rows and one for all, and what it assumes."""
    runs = list(dict.fromkeys(run for row in rows for run in row.runs))
    costs = [cost_of(run) for run in runs]
    head = ["run", "steps", "G tokens", "EFLOP", *(f"hours, {n} x {g}" for g, n in GPUS.items())]
    lines = [_line(cost.name, cost.steps, [cost]) for cost in costs]
    lines.append(_line("all", sum(cost.steps for cost in costs), costs))
    shards = {run.trained for run in runs}
    episodes = sum(EPISODES[task] for folder in shards for task in _tasks_of(folder))
    parameters = sum(cost.parameters for cost in costs)
    gigabytes = (episodes * _BYTES_PER_EPISODE + parameters * _BYTES_PER_PARAMETER) / 1e9
    queries = sum(map(_queries, runs))
    return Table(head, lines), [
        f"Hours assume {MFU:.0%} of the GPUs' dense bf16 peak (MFU) and count training alone; "
        "building shards, which one GPU encodes, comes on top.",
        f"Episodes of a task are drawn as if there were {EPISODES[CAPTIONING]:,} captions and "
        f"{EPISODES[SEGMENTATION]:,} masks.",
        f"Evaluation: up to {queries:,} queries, those with swapped examples too, at "
        f"{_QUERIES_PER_SECOND:g} a second, the paper's speed, "
        f"{queries / _QUERIES_PER_SECOND / 3600:.0f} hours of one GPU.",
        f"Disk: about {gigabytes:.0f} GB for {len(shards)} shard folder(s), checkpoints and "
        "models, besides the data sets.",
    ]


def _tasks_of(shards: Shards) -> list[str]:
    return [task for task in EPISODES if f"{task}=null" not in shards.settings]


def _queries(run: Run) -> int:
    """How many queries a run is asked, at most: after examples also with swapped ones."""
    times_asked = sum(2 if shots else 1 for shots in run.shots)
    return _QUERIES * len(_tasks_of(run.evaluated)) * times_asked


def _line(name: str, steps: int, costs: Sequence[Cost]) -> list[str]:
    tokens, flops = sum(c.tokens for c in costs), sum(c.flops for c in costs)
    hours = [f"{sum(c.hours(gpu) for c in costs):.1f}" for gpu in GPUS]
    return [name, f"{steps:,}", f"{tokens / 1e9:.1f}", f"{flops / 1e18:.1f}", *hours]


def format_of(run: Run, recipe: TrainingRecipe) -> tuple[SequenceFormat, int]:
    """The format of a run's sequences, and the examples in each, from the overrides of its data
    recipe; a test compares them with the recipe.
    """
    settings = dict(text.split("=", 1) for text in run.trained.settings)
    codes = 64 if run.trained.recipe == "ablation_128" else 256
    format = SequenceFormat(
        recipe.vocabulary,
        codes_per_image=codes,
        category=settings.get("caption.category", "written"),  # type: ignore[arg-type]
        box=settings.get("caption.box", "text"),  # type: ignore[arg-type]
        class_prompt=settings.get("class_prompt") == "true",
    )
    return format, int(settings.get("examples", 3))


def _shares(run: Run, recipe: TrainingRecipe) -> dict[str, float]:
    """The share of each task in the episodes that a run trains on."""
    left = {task: float(EPISODES[task]) for task in _tasks_of(run.trained)}
    weights = recipe.training.task_weights
    if weights is not None:
        left = {task: weights[task] for task in left if task in weights}
    elif recipe.training.sampling == "unmixed":
        left = {task: count**0.5 for task, count in left.items()}
    return {task: count / sum(left.values()) for task, count in left.items()}


def _episode_cost(
    recipe: TrainingRecipe, format: SequenceFormat, examples: int, task: str
) -> tuple[float, float]:
    """Tokens, and FLOPs of training, of one episode."""
    sequence = _episode(format, examples, task)
    batch = collate(
        [sequence],
        recipe.vocabulary,
        task,
        recipe.data.layout,
        input_weight=recipe.training.input_loss_weight,
    )
    flops = training_flops(recipe.model, recipe.vocabulary.size, batch)
    return float(len(batch.tokens_T)), float(flops)


def _episode(format: SequenceFormat, examples: int, task: str) -> TokenSequence:
    codes = np.zeros(format.codes_per_image, dtype=np.int64)
    if task == SEGMENTATION:
        pairs: Iterable[object] = [SegmentationPair(codes, codes)] * (examples + 1)
    else:
        caption = CaptionPair(
            codes,
            _CAPTION,
            "dog" if format.category != "none" else None,
            (0.1, 0.2, 0.5, 0.8) if format.box == "text" else None,
            codes if format.box == "image" else None,
        )
        pairs = [caption] * (examples + 1)
    codec = SequenceCodec(format, _text_tokenizer(format.vocabulary.text_merges))
    return codec.encode(Episode(TASKS[task], "dog", tuple(pairs)))


@cache
def _text_tokenizer(merges: int) -> TextTokenizer:
    return TextTokenizer(merges)
