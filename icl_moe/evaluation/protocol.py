"""`icl-moe evaluate`: every episode of a shard folder is completed freely from its first examples,
then scored.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.captioning import score_captions
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode, decode_rle
from icl_moe.evaluation.gallery import draw_gallery
from icl_moe.evaluation.held_out import held_out_loss
from icl_moe.evaluation.predictions import Condition, Prediction, PredictionLog, predict
from icl_moe.evaluation.report import Section, write_report
from icl_moe.evaluation.segmentation import score_masks
from icl_moe.files import write_whole
from icl_moe.images import pixels_to_mask
from icl_moe.inference.model import InContextModel
from icl_moe.outputs import output_folder, writing
from icl_moe.sequence import SegmentationPair
from icl_moe.tokenizers.boxes import Box, box_iou
from icl_moe.versions import installed_versions

Control = Literal["shuffled"]
"""`shuffled`: ask each query also with examples of another class. A model that makes use of its
examples must do worse then.
"""

_FIRST_EXAMPLE = {
    "name": "the first example's output, whatever the query",
    "prediction": "first example",
}
_TOKENIZER = {"name": "the truth through the image tokenizer (ceiling)", "prediction": "tokenizer"}
_PACKAGES = ("icl-moe", "torch", "transformers", "numpy", "pillow", "pycocotools", "pycocoevalcap")


def evaluate(
    model_dir: str | Path,
    shards_dir: str | Path,
    out: str | Path,
    shots: Sequence[int] = (1,),
    limit: int | None = None,
    batch_size: int = 8,
    control: Control | None = None,
    device: str | None = None,
    sections: Sequence[Section] = (),
) -> dict[str, Any]:
    """Evaluate an exported model on the first `limit` episodes of each task of a shard folder, at a
    path or a URL (all by default).

    shots: how many of an episode's examples to show; each number gives a row of the table.
    sections: more of the report. Writes metrics.json, predictions.jsonl and report.html into `out`
    and returns what is in metrics.json; docs/evaluation.md describes it. Called again after an
    interruption, it goes on after the last whole batch.

    Raises InputError where the model and the shards do not belong together, where they cannot be
    asked with so many examples, and where `out` cannot be written.
    """
    out, shots = output_folder(out), list(shots)
    _check_numbers(shots, limit, batch_size)
    shards = ShardSet(shards_dir)
    model = InContextModel.from_pretrained(model_dir, device)
    _check(model, shards, shots)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        model_name = Path(model_dir).resolve().name
        return _evaluate(
            model, model_name, shards, out, shots, limit, batch_size, control, sections
        )


def _evaluate(
    model: InContextModel,
    model_name: str,
    shards: ShardSet,
    out: Path,
    shots: Sequence[int],
    limit: int | None,
    batch_size: int,
    control: Control | None,
    sections: Sequence[Section],
) -> dict[str, Any]:
    header = {
        "model": model.fingerprint,
        "shards": shards.fingerprint[:16],
        "limit": limit,
        "batch_size": batch_size,
    }
    batch_size = min(batch_size, max(shards.manifest.samples.values(), default=1))
    log = PredictionLog(out, header)
    tasks: dict[str, Any] = {}
    galleries = []
    for task in shards.manifest.samples:
        episodes = EpisodeSet(shards, model.codec, task, limit)
        conditions = _conditions(episodes, shots, control)
        for condition in conditions:
            predict(model, episodes, condition, log, batch_size)
        if episodes.task.output == "image":
            rows = _segmentation_rows(model, episodes, conditions, log, batch_size)
        else:
            rows = _captioning_rows(model, episodes, conditions, log)
        tasks[task] = {
            "rows": rows,
            "held_out": asdict(held_out_loss(model, shards, task, limit, batch_size)),
            "classes": _class_overlap(model, shards, task),
        }
        shown = max((c for c in conditions if not c.shuffled), key=lambda c: c.shots)
        galleries.append(draw_gallery(model, episodes, shown, log))
    metrics = {
        **header,
        "model_folder": model_name,
        "shards_folder": Path(shards.location).name,
        "decoding": "greedy",
        "versions": installed_versions(_PACKAGES),
        "tasks": tasks,
    }
    log.finish()
    write_whole(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_report(out / "report.html", metrics, galleries, sections)
    return metrics


def _check_numbers(shots: Sequence[int], limit: int | None, batch_size: int) -> None:
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and not (isinstance(number, int) and number >= 1):
            raise InputError(f"{name} must be a whole number of at least 1, not {number!r}.")
    if not shots or not all(isinstance(count, int) and count >= 0 for count in shots):
        raise InputError(
            f"shots must be whole numbers of at least 0, one or more, not {list(shots)}."
        )


def _check(model: InContextModel, shards: ShardSet, shots: Sequence[int]) -> None:
    manifest = shards.manifest
    ours = (
        model.format,
        model.image_size,
        model.image_tokenizer.fingerprint,
        model.codec.text.fingerprint,
    )
    theirs = (
        manifest.format,
        manifest.image_size,
        manifest.image_tokenizer,
        manifest.text_tokenizer,
    )
    for name, mine, other in zip(
        ("sequence format", "image size", "image tokenizer", "text tokenizer"),
        ours,
        theirs,
        strict=True,
    ):
        if mine != other:
            raise InputError(
                f"The model's {name} is not that of {shards.location}: {mine} and {other}; build "
                "the shards with the model's."
            )
    for count in shots:
        if count > manifest.examples:
            most = manifest.examples
            raise InputError(
                f"The episodes of {shards.location} have {most} example(s): shots must lie in "
                f"0..{most}, not {count}."
            )
        model.check_examples(count)


def _conditions(
    episodes: EpisodeSet, shots: Sequence[int], control: Control | None
) -> list[Condition]:
    """A row of the table each; the control is left out where there is nothing to exchange."""
    own = [Condition(episodes.task.name, count) for count in dict.fromkeys(shots)]
    shuffle = control == "shuffled" and episodes.of_another_class(0) is not None
    return own + [Condition(c.task, c.shots, shuffled=True) for c in own if shuffle and c.shots]


def _segmentation_rows(
    model: InContextModel,
    episodes: EpisodeSet,
    conditions: Sequence[Condition],
    log: PredictionLog,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Scores of the model under each condition, then of the first example's mask, then of the truth
    after the tokenizer.
    """
    rows = []
    for condition in conditions:
        predictions = {key: log[condition, key] for key in episodes.keys}
        scores = score_masks(
            (e.category, decode_rle(predictions[e.key].mask or {}), e.true_mask())
            for e in _all(episodes, "scoring")
        )
        rows.append(_model_row(condition, list(predictions.values())) | asdict(scores))
    if episodes.examples:
        copied = score_masks(
            (e.category, e.true_mask(0), e.true_mask()) for e in _all(episodes, "scoring")
        )
        rows.append(_FIRST_EXAMPLE | asdict(copied))
    rows.append(_TOKENIZER | asdict(score_masks(_through_tokenizer(model, episodes, batch_size))))
    return rows


def _captioning_rows(
    model: InContextModel, episodes: EpisodeSet, conditions: Sequence[Condition], log: PredictionLog
) -> list[dict[str, Any]]:
    """Scores of the model under each condition, then of the first example's caption."""
    truths = {
        e.key: _CaptionTruth(e.references, e.category, e.true_box(), e.meta["captions"][0])
        for e in _all(episodes, "reading")
    }
    asked = [{key: log[condition, key] for key in episodes.keys} for condition in conditions]
    sets = [{key: p.caption or "" for key, p in predictions.items()} for predictions in asked]
    if episodes.examples:
        sets.append({key: truth.first_example for key, truth in truths.items()})
    scores = score_captions(sets, {key: truth.references for key, truth in truths.items()})
    rows = [
        _model_row(condition, list(predictions.values()))
        | asdict(of_set)
        | _template_scores(model, predictions, truths)
        for condition, predictions, of_set in zip(conditions, asked, scores, strict=False)
    ]
    return rows + [_FIRST_EXAMPLE | asdict(of_set) for of_set in scores[len(rows) :]]


class _CaptionTruth(NamedTuple):
    references: list[str]
    category: str
    box: Box | None
    first_example: str


def _template_scores(
    model: InContextModel, predictions: dict[str, Prediction], truths: dict[str, _CaptionTruth]
) -> dict[str, float]:
    """How right the category and the box are, where the model writes them: category_accuracy (up to
    case), box_iou (mean).
    """
    scores = {}
    if model.format.category == "written":
        right = [
            (p.category or "").lower() == truths[key].category.lower()
            for key, p in predictions.items()
        ]
        scores["category_accuracy"] = float(np.mean(right))
    if model.format.box != "none":
        boxes = [(p.box, truths[key].box) for key, p in predictions.items()]
        scores["box_iou"] = float(
            np.mean([box_iou(box, true) if box and true else 0.0 for box, true in boxes])
        )
    return scores


def _model_row(condition: Condition, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What a row says beside its scores. copy_rate: how often an output equals an example's;
    truth_copy_rate: how often it should.
    """
    return {
        "name": condition.describe(),
        "prediction": "model",
        "shots": condition.shots,
        "shuffled": condition.shuffled,
        "copy_rate": float(np.mean([p.copied for p in predictions])),
        "truth_copy_rate": float(np.mean([p.truth_copied for p in predictions])),
        "queries_per_second": round(
            1 / max(float(np.mean([p.seconds for p in predictions])), 1e-4), 3
        ),
    }


def _class_overlap(model: InContextModel, shards: ShardSet, task: str) -> dict[str, Any]:
    """The classes evaluated, and those of them that the model was trained on for this task (None
    where it does not say).
    """
    evaluated = sorted(shards.manifest.classes[task])
    trained = getattr(model.decoder.config, "classes", None)
    seen = None if trained is None else sorted(set(evaluated) & set(trained.get(task, ())))
    return {"evaluated": evaluated, "seen_in_training": seen}


def _all(episodes: EpisodeSet, doing: str) -> Iterator[EvaluationEpisode]:
    numbers = tqdm(
        range(len(episodes)), desc=f"{doing}, {episodes.task.name}", unit="episode", leave=False
    )
    return (episodes[number] for number in numbers)


def _through_tokenizer(
    model: InContextModel, episodes: EpisodeSet, batch_size: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(class, the query's true mask encoded and decoded, the true mask): the best that any model
    can reach with these codes.
    """
    everything = _all(episodes, "tokenizer's ceiling")
    while batch := list(islice(everything, batch_size)):
        codes_BN = np.stack(
            [episode.query.mask for episode in batch if isinstance(episode.query, SegmentationPair)]
        )
        masks_BHW = pixels_to_mask(model.decode(codes_BN))
        yield from (
            (episode.category, mask_HW, episode.true_mask())
            for episode, mask_HW in zip(batch, masks_BHW, strict=True)
        )
