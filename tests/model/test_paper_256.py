"""The paper's model at full size. Needs about 8 GiB of memory."""

import numpy as np
import pytest
import torch

from icl_moe.batch import collate
from icl_moe.data.schedule import RankSlice
from icl_moe.data.shards import SCHEMA_VERSION, Manifest
from icl_moe.recipe import TrainingRecipe
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat
from icl_moe.settings import load_recipe
from icl_moe.tasks import TASKS
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_training_step_at_full_size_runs_and_lowers_the_loss(one_rank):
    from icl_moe.training.distributed import Place
    from icl_moe.training.engine import TrainingEngine

    overrides = [
        "training.global_batch=1",
        "training.micro_batch=1",
        "optimizer.warmup_steps=0",
        "model.dropout=0",
        "model.attention_dropout=0",
    ]
    recipe = load_recipe(TrainingRecipe, "paper_256", overrides)
    format = SequenceFormat(recipe.vocabulary)
    manifest = Manifest(SCHEMA_VERSION, format, 3, 256, "", "", {}, {"segmentation": 1}, {}, (), {})
    rng = np.random.default_rng(0)
    pairs = tuple(
        SegmentationPair(rng.integers(0, 1024, 256), rng.integers(0, 1024, 256)) for _ in range(4)
    )
    sequence = SequenceCodec(format, TextTokenizer()).encode(
        Episode(TASKS["segmentation"], "dog", pairs)
    )
    assert len(sequence) == 2060 == recipe.model.positions

    part = RankSlice.of(0, 1, 1, 1)
    engine = TrainingEngine(
        recipe,
        manifest,
        {"zero_optimization": {"stage": 1}},
        part,
        Place(0, 1, torch.device("cpu")),
    )
    batch = collate([sequence], recipe.vocabulary, "segmentation")
    losses = []
    for _ in range(2):
        engine.begin_step(1e-4, "segmentation", 1.0)
        loss = engine.backward(batch, noise=(0, 0))
        engine.step()
        losses.append(loss.image_sum.item() / loss.image_weight.item())
    # At the start all 52,295 tokens are about equally likely.
    assert losses[0] == pytest.approx(np.log(52_295), abs=0.5)
    assert losses[1] < losses[0]
