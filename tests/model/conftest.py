import numpy as np
import pytest

from icl_moe.data.batch import TokenBatch, collate
from icl_moe.model.config import DecoderConfig
from icl_moe.recipe import ModelSettings, to_dict
from icl_moe.sequence import CaptionPair, Episode, SegmentationPair, SequenceCodec, SequenceFormat, TokenSequence
from icl_moe.tasks import TASKS
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.vocabulary import Vocabulary

CODES = 16


@pytest.fixture(scope="session")
def codec() -> SequenceCodec:
    vocabulary = Vocabulary(text_merges=44, image_codes=32)
    format = SequenceFormat(vocabulary, codes_per_image=CODES, category="none", box="none")
    return SequenceCodec(format, TextTokenizer(44))


@pytest.fixture(scope="session")
def make_config(codec):
    def make(**settings: object) -> DecoderConfig:
        defaults = dict(
            layers=3, width=32, heads=4, positions=200, layers_with_experts=(1, 2), experts=8, dropout=0.0, attention_dropout=0.0
        )
        model = ModelSettings(**{**defaults, **settings})
        return DecoderConfig(model=to_dict(model), vocabulary=to_dict(codec.format.vocabulary), format=to_dict(codec.format))

    return make


@pytest.fixture(scope="session")
def make_sequences(codec):
    """Random episodes of one task; captions of different lengths, so that the layouts differ."""

    def make(task: str, episodes: int, seed: int = 0, pairs: int = 3) -> list[TokenSequence]:
        rng = np.random.default_rng(seed)

        def codes() -> np.ndarray:
            return rng.integers(0, 32, CODES)

        def pair() -> SegmentationPair | CaptionPair:
            if task == "segmentation":
                return SegmentationPair(codes(), codes())
            return CaptionPair(codes(), "ab"[: int(rng.integers(1, 3))])

        return [codec.encode(Episode(TASKS[task], "", tuple(pair() for _ in range(pairs)))) for _ in range(episodes)]

    return make


@pytest.fixture(scope="session")
def make_batch(codec, make_sequences):
    def make(task: str, episodes: int, layout: str = "packed", seed: int = 0, **options: object) -> TokenBatch:
        return collate(make_sequences(task, episodes, seed), codec.format.vocabulary, task, layout, **options)

    return make


@pytest.fixture(scope="session")
def one_rank():
    """Gives the expert layers of a model their process groups, in a world of one."""
    from icl_moe.training.distributed import process_group

    group = process_group()
    group.__enter__()

    def join(model):
        for module in model.modules():
            if hasattr(module, "set_deepspeed_parallelism"):
                module.set_deepspeed_parallelism()
        return model

    yield join
    group.__exit__(None, None, None)
