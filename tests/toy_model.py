"""A small decoder and random episodes, for tests of the model and of ranks (which import them by
name).
"""

from functools import cache

import numpy as np

from icl_moe.batch import TokenBatch, collate
from icl_moe.data.shards import SCHEMA_VERSION, Manifest
from icl_moe.model.config import DecoderConfig
from icl_moe.recipe import DataSettings, ModelSettings, TrainingRecipe, TrainingSettings
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat, TokenSequence
from icl_moe.settings import to_dict
from icl_moe.tasks import TASKS
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

CODES = 16
# The number of ids is odd, so tensor ranks must pad it.
VOCABULARY = Vocabulary(text_merges=46, image_codes=32, mask=True)
FORMAT = SequenceFormat(VOCABULARY, codes_per_image=CODES, category="none", box="none")
MANIFEST = Manifest(SCHEMA_VERSION, FORMAT, 2, 32, "", "", {}, {}, {}, (), {})


def model_settings(**settings: object) -> ModelSettings:
    defaults = dict(
        layers=3,
        width=32,
        heads=4,
        positions=200,
        layers_with_experts=(1, 2),
        experts=8,
        dropout=0.0,
        attention_dropout=0.0,
    )
    return ModelSettings(**{**defaults, **settings})


def make_config(**settings: object) -> DecoderConfig:
    return DecoderConfig(
        model=to_dict(model_settings(**settings)),
        vocabulary=to_dict(VOCABULARY),
        format=to_dict(FORMAT),
    )


def make_recipe(
    output: str = "unused", model: dict | None = None, **training: object
) -> TrainingRecipe:
    settings = TrainingSettings(
        **{"steps": 6, "global_batch": 4, "micro_batch": 1, "output": output, **training}
    )
    return TrainingRecipe(
        DataSettings("unused"), settings, VOCABULARY, model_settings(**(model or {}))
    )


def make_sequences(task: str, episodes: int, seed: int = 0, pairs: int = 3) -> list[TokenSequence]:
    """Random episodes of one task, with captions of different lengths so that the layouts
    differ.
    """
    rng = np.random.default_rng(seed)
    codec = _codec()

    def codes() -> np.ndarray:
        return rng.integers(0, VOCABULARY.image_codes, CODES)

    def pair() -> SegmentationPair | CaptionPair:
        if task == "segmentation":
            return SegmentationPair(codes(), codes())
        return CaptionPair(codes(), "ab"[: int(rng.integers(1, 3))])

    return [
        codec.encode(Episode(TASKS[task], "", tuple(pair() for _ in range(pairs))))
        for _ in range(episodes)
    ]


@cache
def _codec() -> SequenceCodec:
    """Loaded once per process: a text tokenizer takes half a second, a toy step a few
    milliseconds.
    """
    return SequenceCodec(FORMAT, TextTokenizer(VOCABULARY.text_merges))


def make_batch(
    task: str, episodes: int, layout: str = "packed", seed: int = 0, **options: object
) -> TokenBatch:
    return collate(make_sequences(task, episodes, seed), VOCABULARY, task, layout, **options)
