"""Labels a folder of images: a mask of each class in each image, as a COCO instances file."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from icl_moe import __version__
from icl_moe.errors import InputError
from icl_moe.files import partial_of
from icl_moe.images import box_of_mask, load_image
from icl_moe.inference.examples import in_batches
from icl_moe.inference.model import Decoding, InContextModel
from icl_moe.inference.session import Query, Session
from icl_moe.inference.shifts import check_shifts
from icl_moe.labelling.components import components
from icl_moe.labelling.folders import ExampleFiles, digest_of
from icl_moe.labelling.journal import Journal, journal_of
from icl_moe.labelling.review import write_review
from icl_moe.messages import note
from icl_moe.outputs import writing
from icl_moe.rle import coco_annotation, encode_rle
from icl_moe.tasks.drawn_mask import DrawnClasses

LEAST_AREA = 0.0005
"""An eighth of a cell of the 16 x 16 in which a decoder draws a mask. Smaller pieces come from
outlines that follow the edges of an image, and from masks of which another class took the rest.
"""


@dataclass(frozen=True)
class Labelling:
    """What to label and how.

    examples: files by class; without any, classes that the model's class prompt names. folder,
    files: the images to label, as paths below the folder. nearest: see `InContextModel.session`.
    split: whether each connected part of a mask is an instance of its own. least_area: the least
    share of an image that an instance covers; smaller ones are left out, as are those whose score
    is below least_score. windows, shifts: see `Session.segment`. batch: how many images are read
    together, and how many sequences decoded.
    """

    examples: ExampleFiles
    folder: Path
    files: Sequence[str]
    nearest: int | None = None
    split: bool = False
    least_area: float = LEAST_AREA
    least_score: float = 0.0
    windows: bool = False
    shifts: bool = False
    decoding: Decoding | None = None
    batch: int = 8

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.examples)


class Count(NamedTuple):
    """The numbers that a finished labelling reports: images that were read, instances, files that
    were not read, and windows that were read in addition to the whole images.
    """

    images: int
    instances: int
    unread: int
    windows: int


def label(
    model: InContextModel, labelling: Labelling, out: Path, review: Path | None = None
) -> Count:
    """Label all images and write `out`, a COCO instances file, and `review`, a page of overlays.

    Until `out` is written there is a journal beside it: a run that was killed goes on from it, and
    its output is equal to that of a run that was not. Images may come, go and change meanwhile.
    Files that cannot be read are named and left out. Raises InputError for examples that do not fit
    the model, if no image can be read, and if the journal was begun with other settings.
    """
    session = Session(model, labelling.examples, nearest=labelling.nearest, progress=True)
    with writing(out):
        journal = Journal(journal_of(out), _settings(model, labelling))
    try:
        with writing(journal.path):
            _label_rest(model.image_size, session, labelling, journal)
        if all("unread" in entry for entry in journal.entries(labelling.files)):
            journal.remove()
            raise InputError("None of the images can be read; each is named above.")
        if review is not None:
            entries = partial(journal.entries, labelling.files)
            write_review(review, labelling.folder, labelling.classes, entries)
        count = _write_coco(out, model, labelling, journal)
    except BaseException:
        journal.close()
        raise
    journal.remove()
    return count


def _settings(model: InContextModel, labelling: Labelling) -> dict[str, Any]:
    """Everything on which the entry of an image depends. Raises InputError if the model does not
    support it.
    """
    decoding = model.decoding(labelling.decoding)
    if labelling.shifts:
        check_shifts(decoding)
    return {
        "version": __version__,
        "model": model.fingerprint,
        "classes": list(labelling.classes),
        "dtype": str(model.decoder.dtype),
        "device": model.decoder.device.type,
        "decoding": decoding,
        "edges": model.edges is not None,
        "nearest": labelling.nearest,
        "split": labelling.split,
        "least area": labelling.least_area,
        "least score": labelling.least_score,
        "windows": labelling.windows,
        "shifts": labelling.shifts,
        "examples": digest_of(labelling.examples),
    }


def _label_rest(side: int, session: Session, labelling: Labelling, journal: Journal) -> None:
    """Label the images that the journal lacks, batch by batch. A journal holds whole batches, so
    that those of a run that goes on are the ones that it would have had. Images that could not be
    read, or were changed since, come first.
    """
    known = [file for file in labelling.files if file in journal]
    again = [
        entry["file"]
        for entry in journal.entries(known)
        if "unread" in entry or entry.get("state") != _state(labelling.folder / entry["file"])
    ]
    rest = [file for file in labelling.files if file not in journal]
    first = len(known) - len(again)
    batches = chain(in_batches(again, labelling.batch), in_batches(rest, labelling.batch))
    with tqdm(total=len(labelling.files), initial=first, desc="labelling", unit="image") as bar:
        for files in batches:
            journal.add(_label_batch(side, session, labelling, files))
            bar.update(len(files))


def _label_batch(
    side: int, session: Session, labelling: Labelling, files: Sequence[str]
) -> list[dict[str, Any]]:
    states = {file: _state(labelling.folder / file) for file in files}
    entries: dict[str, dict[str, Any]] = {}
    read: list[str] = []

    def readable() -> Iterator[Query | Image.Image]:
        for file in files:
            path = labelling.folder / file
            try:
                # Windows are cut out of the image itself.
                image = load_image(path) if labelling.windows else Query.load(path, side)
            except InputError as error:
                note(f"skipped: {error}")
                entries[file] = {"unread": str(error)}
                continue
            read.append(file)
            yield image

    # With an iterator, only one mask in an image's own size is in memory at a time.
    answers = session.draw(
        readable(),
        decoding=labelling.decoding,
        batch=labelling.batch,
        windows=labelling.windows,
        shifts=labelling.shifts,
    )
    for number, drawn in enumerate(answers):
        entries[read[number]] = _describe(drawn, labelling)
    return [{"file": file, "state": states[file], **entries[file]} for file in files]


def _state(path: Path) -> list[int] | None:
    """What changes if a file is written anew: its size, and the time of the last change in
    nanoseconds. None if there is no such file.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _describe(drawn: DrawnClasses, labelling: Labelling) -> dict[str, Any]:
    """The entry of an image. sure: the least score of what is kept of a class's mask, or of the
    lack of one.
    """
    instances, scores = [], []
    for number, (of_class, mask_HW) in enumerate(drawn.disjoint(), 1):
        kept_HW = np.zeros_like(mask_HW)
        for part_HW in components(mask_HW) if labelling.split else [mask_HW]:
            if not part_HW.any() or part_HW.mean() < labelling.least_area:
                continue
            score = _rounded(of_class.score_of_part(part_HW, mask_HW))
            if score >= labelling.least_score:
                kept_HW |= part_HW
                instances.append({"category": number, "score": score, **_outline(part_HW)})
        scores.append(_rounded(of_class.score(kept_HW)))
    height, width = mask_HW.shape
    return {
        "width": width,
        "height": height,
        "sure": min(scores),
        "windows": next(iter(drawn.masks.values())).windows,
        "instances": instances,
    }


def _rounded(score: float | None) -> float:
    assert score is not None, "a session's masks have scores"
    return round(score, 4)


def _outline(mask_HW: np.ndarray) -> dict[str, Any]:
    left, top, right, bottom = box_of_mask(mask_HW)
    return {
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask_HW.sum()),
        "counts": encode_rle(mask_HW)["counts"],
    }


def _write_coco(out: Path, model: InContextModel, labelling: Labelling, journal: Journal) -> Count:
    """Write the file piece by piece, so that it need not fit into memory."""
    files = labelling.files
    unread = sum("unread" in entry for entry in journal.entries(files))
    windows = sum(entry.get("windows", 0) for entry in journal.entries(files))
    target = Path(os.path.realpath(out))
    info = {"description": f"Labelled by icl-moe {__version__} with the model {model.fingerprint}"}
    categories = [
        {"id": number, "name": name, "supercategory": ""}
        for number, name in enumerate(labelling.classes, 1)
    ]
    with writing(out), _whole_file(target) as file:
        file.write(f'{{"info": {json.dumps(info)},\n"licenses": [],\n')
        file.write(f'"categories": {json.dumps(categories)},\n')
        images = _write_list(
            file, "images", (image for image, _ in _records(journal.entries(files)))
        )
        file.write(",\n")
        instances = _write_list(
            file,
            "annotations",
            (annotation for _, those in _records(journal.entries(files)) for annotation in those),
        )
        file.write("}\n")
    return Count(images, instances, unread, windows)


@contextlib.contextmanager
def _whole_file(target: Path) -> Iterator[TextIO]:
    """A text file that appears when it is complete, or not at all."""
    partial = partial_of(target)
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # A full disk needs the space.
        raise


def _write_list(file: TextIO, name: str, records: Iterable[dict[str, Any]]) -> int:
    """Write the records under a key, one in each line; returns their number."""
    file.write(f'"{name}": [')
    count = 0
    for count, record in enumerate(records, 1):
        file.write(("\n" if count == 1 else ",\n") + json.dumps(record))
    file.write("]")
    return count


def _records(
    entries: Iterable[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """COCO's record of each image that was read, and the records of its annotations."""
    image_id = annotation_id = 0
    for entry in entries:
        if "unread" in entry:
            continue
        image_id += 1
        height, width = entry["height"], entry["width"]
        image = {"id": image_id, "file_name": entry["file"], "width": width, "height": height}
        annotations = []
        for instance in entry["instances"]:
            annotation_id += 1
            annotations.append(
                coco_annotation(
                    {"size": [height, width], "counts": instance["counts"]},
                    instance["bbox"],
                    instance["area"],
                    instance["score"],
                    id=annotation_id,
                    image_id=image_id,
                    category_id=instance["category"],
                )
            )
        yield image, annotations
