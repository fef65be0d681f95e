"""`icl-moe shards preview`: a page of samples as the model sees them, decoded from tokens."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from icl_moe.data.shards import Manifest, Sample, ShardSet, evenly_spaced
from icl_moe.devices import Device, find_device
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EvaluationEpisode
from icl_moe.evaluation.photographs import Photographs
from icl_moe.images import to_image
from icl_moe.outputs import output_file, write_output
from icl_moe.pages import render
from icl_moe.pictures import Cell
from icl_moe.sequence import SequenceCodec
from icl_moe.tasks import TASKS
from icl_moe.tasks.task import lacks_class
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from preprocessing.verify import open_codec

SAMPLES_PER_TASK = 12


def write_preview(location: str | Path, out: Path, device: Device | None = None) -> None:
    """Write a self-contained HTML page with samples of each task, spread over the shards at a path
    or a URL. device: what decodes them, by default a GPU if there is one. Raises InputError, before
    anything is decoded, if `out` cannot be written or the device does not exist.
    """
    out = output_file(out, (".html", ".htm"))
    place = find_device(device)
    shards = ShardSet(location)
    codec = open_codec(shards)
    reader = _CodeReader(shards, place)
    tasks = []
    for task, count in shards.manifest.samples.items():
        numbers = evenly_spaced(count, SAMPLES_PER_TASK)
        photographs = Photographs(shards, task)
        episodes = [
            _episode(shards.sample(task, number), codec, reader, photographs)
            for number in tqdm(numbers, desc=f"drawing {task}", unit="sample")
        ]
        tasks.append((task, episodes))
    title = Path(shards.location).name
    page = render("preview.html.j2", title=title, tasks=tasks, summary=_summary(shards.manifest))
    write_output(out, page)


def _summary(manifest: Manifest) -> list[tuple[str, str]]:
    """The figures at the top of the page: each a number and what it counts."""
    classes = {name for of_task in manifest.classes.values() for name in of_task}
    return [
        *((f"{count:,}", f"samples of {task}") for task, count in manifest.samples.items()),
        (f"{len(classes):,}", "classes"),
        (f"{manifest.examples}", "examples in each"),
        (f"{manifest.image_size}", "pixels a side"),
        (f"{manifest.format.codes_per_image}", "tokens an image"),
    ]


class _CodeReader:
    """Decodes codes for the tasks."""

    def __init__(self, shards: ShardSet, device: torch.device) -> None:
        folders = {name: shards.fetch(name) for name in shards.manifest.tokenizer_folders}
        self._tokenizers = ImageTokenizers.from_folders(folders).to(device)
        self._device = device

    def show(self, codes_BN: np.ndarray) -> torch.Tensor:
        return self._tokenizers.show(self._tensor(codes_BN))

    def decode(self, codes_BN: np.ndarray) -> torch.Tensor:
        return self._tokenizers.decode(self._tensor(codes_BN))

    def decode_masks(self, codes_BN: np.ndarray) -> torch.Tensor:
        return self._tokenizers.mask_writer.decode(codes_BN)

    def decode_painted(self, codes_BN: np.ndarray) -> torch.Tensor:
        return self._tokenizers.mask_writer.decode_painted(codes_BN)

    def _tensor(self, codes_BN: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(codes_BN).to(self._device)


def _episode(
    sample: Sample, codec: SequenceCodec, reader: _CodeReader, photographs: Photographs
) -> dict[str, Any]:
    """The values that the template shows for a sample."""
    task, meta = TASKS[sample.task], sample.meta
    pairs = codec.decode(sample.sequence, task).pairs
    truth = EvaluationEpisode(sample.key, task, sample.category, pairs, meta)
    rows = []
    for number, pair in enumerate(pairs):
        image = to_image(reader.show(pair.image[None])[0])
        cells, words = task.preview(truth, number, image, reader)
        source, scale = meta["sources"][number], meta["scale"][number]
        with contextlib.suppress(InputError):  # The images may no longer be there.
            photograph = photographs.at_model_size(truth, number)
            shown_here = task.show(photograph, task.true_output(truth, number))
            cells = [Cell("source", shown_here), *cells]
        absent = "the class is absent" if lacks_class(meta, number) else ""
        size = absent or f"object {scale:.1%} of the picture"
        lines = [*([words] if words else []), f"{source['image']}, {size}"]
        rows.append({"cells": cells, "words": "\n".join(lines)})
    style = str(meta.get("style", ""))
    return {"category": sample.category, "key": sample.key, "style": style, "pairs": rows}
