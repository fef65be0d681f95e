"""Evaluation during training, on the same episodes at regular steps, without effect on the run."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from icl_moe.batch import collate
from icl_moe.data.shards import ShardSet
from icl_moe.deepspeed_internals import tensorboard_writer
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.evaluation.gallery import Images, draw_evenly
from icl_moe.evaluation.predictions import Condition, PredictionLog, predict
from icl_moe.inference.model import InContextModel
from icl_moe.pictures import draw_grid
from icl_moe.recipe import TrainingRecipe
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.training.distributed import Place, generators_kept
from icl_moe.training.engine import TrainingEngine
from icl_moe.training.faults import Watchdog
from icl_moe.training.monitor import tolerate_unwritten

_DECODED_TOGETHER = 8

Figures = dict[str, float]


@dataclass(frozen=True)
class Validation:
    """The first training.evaluate_episodes of each task of data.validation.

    All ranks compute the teacher-forced loss on the same batches, which takes no more time than on
    one of them and works in every layout. Rank 0 decodes freely and draws pictures while the others
    wait, and only if a rank can compute alone.
    """

    engine: TrainingEngine
    recipe: TrainingRecipe
    shards: ShardSet
    place: Place
    watchdog: Watchdog

    def run(self, step: int) -> None:
        """Evaluate the model after `step` steps; every rank calls it."""
        with _as_it_was(self.engine):
            figures = {task: self._loss(task, step) for task in self.shards.manifest.samples}
            if self.engine.computes_alone:
                self.watchdog.on_main(step - 1, "evaluating", lambda: self._decode(step, figures))
        if self.place.is_main:
            self._report(step, figures)

    def _loss(self, task: str, step: int) -> Figures:
        """Mean cross-entropy over the targets, in nats, as in training."""
        count = min(self.shards.count(task), self.recipe.training.evaluate_episodes)
        size = self.recipe.training.micro_batch
        total = weight = 0.0
        for start in range(0, count, size):
            self.watchdog.beat(step - 1, "evaluating")
            sequences = [
                self.shards.sample(task, index).sequence
                for index in range(start, min(start + size, count))
            ]
            vocabulary = self.shards.manifest.format.vocabulary
            loss_on = self.recipe.training.loss_on
            batch = collate(sequences, vocabulary, task, self.recipe.data.layout, loss_on=loss_on)
            loss = self.engine.model(batch.to(self.place.device))
            total += float(loss.image_sum + loss.text_sum)
            weight += float(loss.image_weight + loss.text_weight)
        return {"loss": total / weight}

    def _decode(self, step: int, figures: dict[str, Figures]) -> None:
        with tolerate_unwritten():
            self._complete(step, figures)
        self._model.tokenizers.to("cpu")  # Training gets the memory of the device back.

    def _complete(self, step: int, figures: dict[str, Figures]) -> None:
        """Complete every query freely after all its examples; add the scores, and write texts and
        pictures.
        """
        folder = Path(self.recipe.training.output) / "samples" / f"step-{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = PredictionLog(folder, {"step": step, "shards": self.shards.short_fingerprint})
        self._model.tokenizers.to(self.place.device)
        for task in figures:
            episodes = _Episodes(
                self.shards,
                self._model,
                task,
                self.recipe.training.evaluate_episodes,
                self._beat(step),
            )
            condition = Condition(task, self.shards.manifest.examples)
            predict(self._model, episodes, condition, log, _DECODED_TOGETHER)
            figures[task] |= _scores(episodes, condition, log, self._model)
            images = Images(self._model, self.shards, task)
            gallery = draw_evenly(images, episodes, condition, log)
            picture = draw_grid([cells for _, cells in gallery.rows])
            picture.save(folder / f"{task}.png")
            self._show(task, picture, step)
        log.finish()

    def _beat(self, step: int) -> Callable[[], None]:
        return lambda: self.watchdog.beat(step - 1, "evaluating")

    @cached_property
    def _model(self) -> InContextModel:
        decoder = self.engine.model
        text = TextTokenizer(
            decoder.sequence_format.vocabulary.text_merges,
            source=str(self.shards.fetch("text_tokenizer")),
        )
        folders = {name: self.shards.fetch(name) for name in self.shards.manifest.tokenizer_folders}
        return InContextModel(decoder, ImageTokenizers.from_folders(folders), text)

    def _show(self, task: str, picture: Image.Image, step: int) -> None:
        tensorboard = tensorboard_writer(self.engine.deepspeed)
        if tensorboard is not None:
            pixels_HW3 = np.asarray(picture)
            tensorboard.add_image(
                f"eval/{task}",
                pixels_HW3,
                step * self.recipe.training.global_batch,
                dataformats="HWC",
            )

    def _report(self, step: int, figures: dict[str, Figures]) -> None:
        samples = step * self.recipe.training.global_batch
        events = [
            (f"eval/{task}/{name}", value, samples)
            for task, of_task in figures.items()
            for name, value in of_task.items()
        ]
        with tolerate_unwritten():
            self.engine.deepspeed.monitor.write_events(events)
        for task, of_task in figures.items():
            text = "  ".join(
                f"{name.replace('_', ' ')} {value:.4g}" for name, value in of_task.items()
            )
            tqdm.write(f"step {step}  evaluation of {task}  {text}")


class _Episodes(EpisodeSet):
    """The episodes of a task; `beat` is called for each that is read, so that a long evaluation
    does not look like a hang.
    """

    def __init__(
        self,
        shards: ShardSet,
        model: InContextModel,
        task: str,
        limit: int,
        beat: Callable[[], None],
    ) -> None:
        super().__init__(shards, model.codec, task, limit)
        self._beat = beat

    def __getitem__(self, index: int) -> EvaluationEpisode:
        self._beat()
        return super().__getitem__(index)


@contextmanager
def _as_it_was(engine: TrainingEngine) -> Iterator[None]:
    """Within this context the model is in evaluation mode, without gradients; afterwards everything
    that training depends on is restored.
    """
    engine.model.eval()
    try:
        with torch.no_grad(), generators_kept(engine.deepspeed.device):
            yield
    finally:
        engine.model.train()


def _scores(
    episodes: EpisodeSet, condition: Condition, log: PredictionLog, model: InContextModel
) -> Figures:
    """The scores of all predictions under a condition, described in docs/evaluation.md."""
    truths = [episodes[index] for index in range(len(episodes))]
    predictions = [log[condition, truth.key].said for truth in truths]
    # METEOR's Java program would need 2 GB and half a minute.
    (scores,) = episodes.task.score([predictions], truths, model.format, quick=True)
    return scores.figures()
