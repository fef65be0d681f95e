"""The model card: README.md of an exported model, which the Hugging Face Hub displays."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from icl_moe.tables import Table, as_markdown

CARD, TRAINING = "README.md", "training.json"

_LIMITS = """\
The model stretches images of any shape to {size} x {size} pixels. In training it saw up to
{examples} example(s) per episode. It accepts more: where it writes a mask in one pass, it reads
more in groups of that size and averages the results; elsewhere they must fit into its positions,
and the quality may drop. Check its output on pictures that differ from its training data.{more}"""

_OF_CAPTIONS = "\nIts captions can be wrong, as any generated text can."

_USE = """\
```python
from icl_moe import InContextModel

model = InContextModel.from_pretrained("PATH OR HUB ID OF THIS MODEL")
{call}
```"""


class _About(NamedTuple):
    """What a card says about a task. name: in the title. pair: the form of its examples. tag: for
    the Hub. call: how a model is used for it.
    """

    name: str
    pair: str
    tag: str
    call: str


_ABOUT = {
    "segmentation": _About(
        "segmentation",
        "(image, mask)",
        "segmentation",
        'mask = model.segment(examples=[("image.jpg", "mask.png")], query="another.jpg")',
    ),
    "captioning": _About(
        "region captioning",
        "(image, region caption)",
        "captioning",
        'region = model.caption(examples=[("image.jpg", "region.json")], query="another.jpg")',
    ),
    "semantic_segmentation": _About(
        "segmentation of several classes",
        "(image, painted mask)",
        "segmentation",
        "painted = model.segment_colours(\n"
        '    examples=[("image.jpg", "painted.png")], query="another.jpg"\n'
        ")",
    ),
}


def model_card(
    config: Mapping[str, Any], training: Mapping[str, Any], metrics: Path | None = None
) -> str:
    """The card of a model: what it is, its recipe, its data, its scores and its limits.

    config: the content of its config.json. training: the content of its training.json. metrics:
    metrics.json of an evaluation of it, if there is one.
    """
    recipe = training["recipe"]
    trained = list(config.get("classes") or ["segmentation"])
    told = [_ABOUT[task] for task in _ABOUT if task in trained]
    tags = dict.fromkeys(about.tag for about in told)
    marks = trained != ["captioning"]
    data = ModelCardData(
        library_name="icl-moe",
        pipeline_tag="image-segmentation" if marks else "image-to-text",
        tags=["in-context learning", "mixture of experts", *tags],
    )
    facts = {
        "optimizer steps": training["steps"],
        "episodes per step": recipe["training"]["global_batch"],
        "decoder": _decoder(recipe["model"]),
        "seed": recipe["training"]["seed"],
        "shards, by the sha256 of their manifest": training["shards"]["manifest_sha256"],
    }
    if started := training.get("initial_model"):
        name, digest = started["name"], started["weights_sha256"]
        facts["started from the weights of"] = f"{name} (sha256 {digest[:16]}...)"
    if others := training.get("mean_with"):
        facts["weights averaged with those of"] = "; ".join(
            f"{other['name']} (sha256 {other['weights_sha256'][:16]}...)" for other in others
        )
    for task, names in (config.get("classes") or {}).items():
        facts[f"classes in training, {task}"] = len(names)
    facts |= training["versions"]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# An in-context model for {' and '.join(about.name for about in told)}",
        f"Given examples, {' or '.join(about.pair for about in told)}, the model writes the output "
        "for a new image in the same form.",
        "## Use",
        _USE.format(call="\n".join(about.call for about in told)),
        "## Training",
        as_markdown(Table(("", ""), [(name, str(value)) for name, value in facts.items()])),
        f"The complete recipe is in {TRAINING}.",
        "## Scores",
        _scores(metrics),
        "## Limits",
        _LIMITS.format(
            size=config["image_size"],
            examples=config["examples"],
            more=_OF_CAPTIONS if "captioning" in trained else "",
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _decoder(model: Mapping[str, Any]) -> str:
    return (
        f"{model['layers']} layers of width {model['width']}, {model['heads']} heads, "
        f"feed-forward '{model['feed_forward']}'"
    )


def _scores(metrics: Path | None) -> str:
    if metrics is None:
        return "No evaluation was given at the export; `icl-moe evaluate` makes one."
    content = json.loads(metrics.read_text(encoding="utf-8"))
    about = ("name", "prediction", "shots", "control", "copy_rate", "truth_copy_rate")
    rows = [
        (task, row["name"], _shots(row), name, f"{value:.4g}")
        for task, result in content["tasks"].items()
        for row in [*result["rows"], *result.get("swapped", [])]
        for name, value in row.items()
        if name not in about and isinstance(value, int | float)
    ]
    return as_markdown(Table(("task", "row", "examples", "score", "value"), rows))


def _shots(row: Mapping[str, Any]) -> str:
    shots = row.get("shots")
    return "–" if shots is None else str(shots)
