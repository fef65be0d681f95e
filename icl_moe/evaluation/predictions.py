"""What a model writes for every episode, kept batch by batch, so that an interrupted evaluation
goes on where it stopped.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode, encode_rle
from icl_moe.images import pixels_to_mask
from icl_moe.inference.model import InContextModel
from icl_moe.sequence import CaptionPair, Episode, SegmentationPair
from icl_moe.tokenizers.boxes import Box

Pair = SegmentationPair | CaptionPair


@dataclass(frozen=True)
class Condition:
    """How the queries of a task are asked: after `shots` examples, which are of another class if
    `shuffled`.
    """

    task: str
    shots: int
    shuffled: bool = False

    def describe(self) -> str:
        """Such as "2 examples of another class"."""
        return (
            f"{self.shots} "
            f"example{'' if self.shots == 1 else 's'}{' of another class' if self.shuffled else ''}"
        )


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: the condition, the episode's key and class, and what the model
    wrote.

    codes and mask (COCO's compressed run lengths) in segmentation; caption, category and box
    (normalised) in captioning, the last two where the format has them. copied: whether it equals an
    example's output; truth_copied: whether the truth does.
    seconds: the time of its batch / its size.
    """

    task: str
    shots: int
    shuffled: bool
    key: str
    true_category: str
    copied: bool
    truth_copied: bool
    seconds: float
    codes: list[int] | None = None
    mask: dict[str, Any] | None = None
    caption: str | None = None
    category: str | None = None
    box: Box | None = None


class PredictionLog:
    """predictions.jsonl of the folder `out`, under a temporary name until `finish`.

    header: what the predictions depend on. Earlier lines are used again only where they stand under
    an equal header.
    """

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        self._path, self._partial = out / "predictions.jsonl", out / "predictions.partial.jsonl"
        self._lines: dict[tuple[Condition, str], Prediction] = {}
        self._header = json.dumps(header)
        kept = self._read_partial()
        self._partial.write_text(
            "".join(line + "\n" for line in (self._header, *kept)), encoding="utf-8"
        )

    def __contains__(self, place: tuple[Condition, str]) -> bool:
        return place in self._lines

    def __getitem__(self, place: tuple[Condition, str]) -> Prediction:
        """The prediction under a condition for the episode of this key."""
        return self._lines[place]

    def add(self, predictions: Sequence[Prediction]) -> None:
        with self._partial.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(prediction)) + "\n" for prediction in predictions))
        for prediction in predictions:
            self._keep(prediction)

    def finish(self) -> None:
        """Give the file its name."""
        os.replace(self._partial, self._path)

    def _read_partial(self) -> list[str]:
        """The whole lines of an earlier run under the same header; a line that was cut off, or
        damaged, ends them.
        """
        if not self._partial.is_file():
            return []
        header, *lines = self._partial.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = []
        for line in lines[:-1] if header == self._header else ():
            try:
                self._keep(Prediction(**json.loads(line)))
            except (ValueError, TypeError):
                break
            kept.append(line)
        return kept

    def _keep(self, prediction: Prediction) -> None:
        self._lines[
            Condition(prediction.task, prediction.shots, prediction.shuffled), prediction.key
        ] = prediction


def predict(
    model: InContextModel,
    episodes: EpisodeSet,
    condition: Condition,
    log: PredictionLog,
    batch_size: int,
) -> None:
    """Complete every episode under a condition, greedily, in batches of fixed make-up, and log what
    is new.
    """
    with tqdm(
        total=len(episodes),
        desc=f"{condition.task}, {condition.describe()}",
        unit="episode",
        leave=None,
    ) as bar:
        for start in range(0, len(episodes), batch_size):
            numbers = range(start, min(start + batch_size, len(episodes)))
            batch = [episodes[number] for number in numbers]
            if not all((condition, episode.key) in log for episode in batch):
                examples = [_examples(episodes, number, condition) for number in numbers]
                log.add(_complete(model, condition, batch, examples))
            bar.update(len(batch))


def _examples(episodes: EpisodeSet, number: int, condition: Condition) -> tuple[Pair, ...]:
    source = episodes.of_another_class(number) if condition.shuffled else episodes[number]
    assert source is not None, "shuffling was planned for episodes of several classes only"
    return source.pairs[: condition.shots]


def _complete(
    model: InContextModel,
    condition: Condition,
    batch: Sequence[EvaluationEpisode],
    examples: Sequence[tuple[Pair, ...]],
) -> list[Prediction]:
    started = time.perf_counter()
    requests = [
        # All of one task.
        (
            Episode(episode.task, episode.category, pairs),  # type: ignore[arg-type]
            episode.query.image,
        )
        for episode, pairs in zip(batch, examples, strict=True)
    ]
    outputs = model.complete(requests)
    written = _written(model, outputs)
    seconds = round((time.perf_counter() - started) / len(batch), 4)
    return [
        Prediction(
            **asdict(condition),
            key=episode.key,
            true_category=episode.category,
            copied=_equals_an_output(output, pairs),
            truth_copied=_equals_an_output(episode.query, pairs),
            seconds=seconds,
            **values,
        )
        for episode, pairs, output, values in zip(batch, examples, outputs, written, strict=True)
    ]


def _written(model: InContextModel, outputs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The fields of a prediction that depend on the task."""
    captions = [pair for pair in outputs if isinstance(pair, CaptionPair)]
    if captions:
        return [
            {"caption": pair.caption, "category": pair.category, "box": model.box_of(pair)}
            for pair in captions
        ]
    codes_BN = np.stack([pair.mask for pair in outputs if isinstance(pair, SegmentationPair)])
    masks_BHW = pixels_to_mask(model.decode(codes_BN))
    return [
        {"codes": codes_N.tolist(), "mask": encode_rle(mask_HW)}
        for codes_N, mask_HW in zip(codes_BN, masks_BHW, strict=True)
    ]


def _equals_an_output(output: Pair, examples: Sequence[Pair]) -> bool:
    """Whether it equals the output of an example: all its mask codes, or its caption's text."""
    if isinstance(output, SegmentationPair):
        return any(
            isinstance(example, SegmentationPair) and np.array_equal(output.mask, example.mask)
            for example in examples
        )
    return any(
        isinstance(example, CaptionPair) and output.caption == example.caption
        for example in examples
    )
