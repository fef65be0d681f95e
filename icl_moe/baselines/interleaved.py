"""An interleaved vision-language model by transformers (of the Idefics family), for the row of
Flamingo: it reads examples as pictures and captions in turns, then the query, and goes on.

The prompt is that of OpenFlamingo's evaluation of COCO's and Flickr30k's captions, in the wording
of its wrapper for IDEFICS (open_flamingo/eval/eval_models/idefics.py):

    <image>Caption: a brown dog
    <image>Caption: a white dog
    <image>Caption:

Examples end with a line break, since the mark <|endofchunk|> is OpenFlamingo's own; the answer is
the rest of the line, at most as many tokens as there, with its quotation marks removed as there.
Decoding is greedy, as ours is; OpenFlamingo's evaluation takes three beams.

Every picture is what the pair shows a model of ours, the query without its box: which region is
meant is for the examples to tell, and a crop of the query would give its box away. So the boxes of
the examples are left out as well: such a model has no notation for them, and writes none.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from icl_moe.baselines.weights import load_published
from icl_moe.data.shards import ShardSet
from icl_moe.devices import find_device
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.predictions import describe_shots
from icl_moe.tasks.task import Output

PUBLISHED = "HuggingFaceM4/idefics2-8b-base"

MOST_TOKENS = 20
"""The most tokens of an answer, as in OpenFlamingo's evaluation of captions."""

_ASKED = "Caption:"
_WHAT = "The vision-language model"


def predict_captions(
    shards: ShardSet,
    episodes: EpisodeSet,
    shots: int,
    weights: str | None = None,
    images: Path | None = None,
    device: str | None = None,
    swapped: bool = False,
) -> list[Output]:
    """The captions of all queries, or of those with swapped examples, after `shots` examples each.

    weights: a folder or Hub id, by default `PUBLISHED`. Raises InputError if they cannot be loaded,
    if there are no examples, and if there are more than the model's context holds.
    """
    if not shots:
        raise InputError(
            "A vision-language model learns what to describe from examples: --shots must be at "
            "least 1."
        )
    reader = InterleavedModel(weights or PUBLISHED, device)
    photographs = Photographs(shards, episodes.task.name, images)
    outputs = []
    questions = episodes.questions(swapped)
    for truth, source in tqdm(questions, "vision-language model", unit="episode"):
        pictures = [photographs.show(source, number) for number in range(shots)]
        pictures.append(photographs.show(truth, -1))
        caption = reader.describe(pictures, source.meta["captions"][:shots])
        outputs.append({"caption": caption, "category": None, "box": None})
    return outputs


class InterleavedModel:
    """A model and its processor. Raises InputError if they cannot be loaded from `weights`."""

    def __init__(self, weights: str, device: str | None = None) -> None:
        self._weights = weights
        place = find_device(device)
        self._check_files()
        self._processor = load_published(AutoProcessor, weights, _WHAT)
        self._check_processor()
        self._model = load_published(AutoModelForImageTextToText, weights, _WHAT)
        self._model.eval().to(place)

    def _check_files(self) -> None:
        folder = Path(self._weights)
        names = ("preprocessor_config.json", "processor_config.json")
        if folder.is_dir() and not any((folder / name).is_file() for name in names):
            raise InputError(
                f"{folder} holds no image processor ({' or '.join(names)}), which a "
                "vision-language model needs beside its weights and its tokenizer."
            )

    def _check_processor(self) -> None:
        has_images = getattr(self._processor, "image_processor", None) is not None
        if not has_images or not isinstance(getattr(self._processor, "image_token", None), str):
            raise InputError(
                f"{self._weights} has no processor that places images in a text; take a model that "
                "reads images and texts in turns, such as those of the Idefics family."
            )

    @torch.inference_mode()
    def describe(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> str:
        """The caption of the last picture, after those of the pictures before it.

        Raises InputError if they do not fit into the model's context.
        """
        prompt = self.prompt(captions)
        rgb = [picture.convert("RGB") for picture in pictures]
        inputs = self._processor(text=prompt, images=rgb, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        self._check_length(length, len(captions))
        inputs = inputs.to(self._model.device, dtype=self._model.dtype)
        written_1L = self._model.generate(
            **inputs, max_new_tokens=MOST_TOKENS, do_sample=False, num_beams=1
        )
        text = self._processor.tokenizer.decode(written_1L[0, length:], skip_special_tokens=True)
        return _answer(text)

    def prompt(self, captions: Sequence[str]) -> str:
        """The text for examples with these captions and a query; each mark stands for a picture."""
        mark = self._processor.image_token
        lines = [f"{mark}{_ASKED} {_one_line(each.replace(mark, ' '))}\n" for each in captions]
        return "".join([*lines, f"{mark}{_ASKED}"])

    def _check_length(self, length: int, examples: int) -> None:
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length + MOST_TOKENS > most:
            raise InputError(
                f"{describe_shots(examples)} and a query are {length} tokens for {self._weights}, "
                f"and its answer up to {MOST_TOKENS}, but its context holds {most}; show fewer "
                "examples with --shots."
            )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _answer(text: str) -> str:
    """The first line that a model wrote, up to where it begins another pair of its own."""
    line = text.lstrip().split("\n", 1)[0]
    return _one_line(line.split(_ASKED, 1)[0].replace('"', ""))
