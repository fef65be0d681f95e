"""A session: examples that are read once, for any number of queries."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from icl_moe.boxes import Box
from icl_moe.errors import InputError
from icl_moe.images import ImageLike, load_image, to_square_pixels
from icl_moe.inference.decode import GREEDY, Sampling
from icl_moe.inference.edges import EdgeFilter, follow_edges
from icl_moe.inference.examples import (
    category_of,
    in_batches,
    is_one_image,
    list_pairs,
    read_pairs,
    task_of,
)
from icl_moe.inference.region import Region
from icl_moe.inference.retrieval import Shelf
from icl_moe.inference.shifts import READINGS, check_shifts, fused_views, shifted_views
from icl_moe.inference.windows import found_in, fuse, windows_of
from icl_moe.sequence import Episode
from icl_moe.tasks import CAPTIONING, SEGMENTATION, Task
from icl_moe.tasks.captioning import CaptionPair, box_of
from icl_moe.tasks.drawn_mask import DrawnClasses, DrawnMask

if TYPE_CHECKING:
    from icl_moe.inference.model import Decoding, InContextModel, Read

_GUIDE = 1024
"""The most pixels of a side at which the edges of a picture are followed. It bounds the memory of a
batch of large pictures, and a model's cells are far larger than the pixels of such a guide.
"""


@dataclass(frozen=True, eq=False)
class Query:
    """A query's picture at the model's size, pixels_3HW in [-1, 1]; its own size (width, height);
    and the picture itself, reduced where it is large, whose edges the outlines of masks follow.
    """

    pixels_3HW: torch.Tensor
    size: tuple[int, int]
    guide: Image.Image

    @classmethod
    def load(cls, image: "ImageLike | Query", side: int, name: str = "The query") -> "Query":
        """Raises InputError, with `name` if it is not a file, for what is no still image."""
        if isinstance(image, Query):
            return image
        picture = load_image(image, name)
        return cls(to_square_pixels(picture, side), picture.size, _reduced(picture))


Size = tuple[int, int]
"""Width and height in pixels."""

Examples = Iterable[tuple[Any, Any]] | Mapping[str, Iterable[tuple[Any, Any]]]
"""(image, mask) or (image, region) pairs, or such pairs by the name of their class."""

Queries = ImageLike | Query | Iterable[ImageLike | Query]
"""One image, or several. The results of several are a list if they are a list or a tuple, and
otherwise an iterator, which reads no more images at a time than one batch. Windows need the images
themselves, not a `Query` of each.
"""


@dataclass(frozen=True)
class Way:
    """How queries are asked; see `Session.segment`."""

    sampling: Sampling = GREEDY
    decoding: "Decoding | None" = None
    batch: int = 8
    windows: bool = False
    shifts: bool = False


Named = tuple[str, ImageLike | Query]
"""The name of a query in messages, if it is not a file, and the query."""


@dataclass(frozen=True, eq=False)
class _Shown:
    """The examples of a class: either an episode, and what the decoder has read of it, or a shelf
    from which each query gets its own.
    """

    episode: Episode
    read: "Read | None"
    shelf: Shelf | None = None

    def episode_for(self, image_N: np.ndarray) -> Episode:
        if self.shelf is None:
            return self.episode
        return replace(self.episode, pairs=self.shelf.nearest(image_N))


class Session:
    """Examples that a model has read; `InContextModel.session` makes one.

    session = model.session([("dog1.jpg", "dog1_mask.png")])
    mask_HW = session.segment("dog2.jpg")
    for drawn in session.draw(Path("photographs").glob("*.jpg")):
        print(drawn.mask_HW.mean(), drawn.confidence_HW)

    classes: the names of the classes, if examples were given by class; otherwise None.
    """

    def __init__(
        self,
        model: "InContextModel",
        examples: Examples,
        category: str | None = None,
        nearest: int | None = None,
        progress: bool = False,
        task: Task | None = None,
    ) -> None:
        """See `InContextModel.session`. task: the examples' task; by default the task they fit."""
        _check_count("nearest", 1 if nearest is None else nearest)
        self.classes = _class_names(examples, category)
        self._model, self._nearest, self._progress = model, nearest, progress
        if isinstance(examples, Mapping):
            self._pairs = {name: list_pairs(each) for name, each in examples.items()}
            empty = [name for name, pairs in self._pairs.items() if not pairs]
            if 0 < len(empty) < len(self._pairs) and not model.format.class_prompt:
                raise InputError(
                    f"The class '{empty[0]}' has no examples; this model needs at least one of "
                    "each class."
                )
        else:
            self._pairs = {category or "": list_pairs(examples)}
        self._task = task or task_of([pair for pairs in self._pairs.values() for pair in pairs])
        self._shown: dict[str, list[_Shown]] = {}
        if self._task is None:
            model.check_examples(0, SEGMENTATION)
        else:
            self._show(self._task)

    def segment(
        self,
        queries: Queries,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        decoding: "Decoding | None" = None,
        batch: int = 8,
        windows: bool = False,
        shifts: bool = False,
    ) -> Any:
        """The mask of each query, boolean (H, W), in the query's size. If the examples were given
        by class: its label map, see `DrawnClasses.labels_HW`.

        The outlines of masks in one pass follow the edges of the query if the model has `edges`.

        queries: see `Queries`. decoding: see `InContextModel.complete`. batch: how many sequences
        are decoded together, one for each query and class. windows: what is found in an image is
        read again in windows of half its size, up to nine of them (icl_moe/inference/windows.py);
        `DrawnMask.windows` tells how many. shifts: each image (and window) is read four times,
        moved by half a cell, and the masks are averaged (icl_moe/inference/shifts.py). Raises
        InputError for a query that is no image, and for what the model does not support.
        """

        def mark(drawn: DrawnMask | DrawnClasses) -> np.ndarray:
            return drawn.labels_HW if isinstance(drawn, DrawnClasses) else drawn.mask_HW

        way = Way(sampling, decoding, batch, windows, shifts)
        return self._find(mark, queries, way, progress)

    def draw(
        self,
        queries: Queries,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        decoding: "Decoding | None" = None,
        batch: int = 8,
        windows: bool = False,
        shifts: bool = False,
    ) -> Any:
        """As `segment`, but a `DrawnMask` for each query, with the brightness of each pixel and the
        model's confidence. If the examples were given by class: a `DrawnClasses`.
        """
        way = Way(sampling, decoding, batch, windows, shifts)
        return self._find(lambda mask: mask, queries, way, progress)

    def caption(
        self,
        queries: Queries,
        sampling: Sampling = GREEDY,
        progress: bool = False,
        batch: int = 8,
    ) -> Any:
        """The `Region` of each query, with the box in the query's pixels. If the examples were
        given by class: a dictionary with the region for each class.

        queries, batch: see `segment`.
        """

        def describe(pairs: Sequence[CaptionPair], query: Query) -> Region | dict[str, Region]:
            regions = [_region(self._model, pair, query.size) for pair in pairs]
            return dict(zip(self.classes, regions, strict=True)) if self.classes else regions[0]

        asking = self._asked(CAPTIONING, Way(sampling, batch=batch))
        return _answers(asking.each, describe, queries, progress)

    def _drawn(self, pairs: Sequence[Any], query: Query) -> DrawnMask | DrawnClasses:
        drawn = SEGMENTATION.draw(self._model, pairs)
        masks = [in_own_size(mask, query, self._model.edges) for mask in drawn]
        return (
            DrawnClasses(dict(zip(self.classes, masks, strict=True))) if self.classes else masks[0]
        )

    def _find(
        self,
        read: Callable[[DrawnMask | DrawnClasses], Any],
        queries: Queries,
        way: Way,
        progress: bool,
    ) -> Any:
        """One answer or several. read: the answer from the mask or masks of a query."""
        asking = self._asked(SEGMENTATION, way)

        def from_whole(pairs: Sequence[Any], query: Query) -> Any:
            return read(self._drawn(pairs, query))

        def from_windows(name: str, query: Any) -> Any:
            if isinstance(query, Query):
                raise InputError("Windows are cut out of the image itself: give that, not a Query.")
            picture = load_image(query, name)
            (pairs_and_query,) = asking.each([(name, picture)])
            whole = self._drawn(*pairs_and_query)
            boxes = windows_of(found_in(whole))
            # The windows of one query are decoded together.
            crops = asking.each((name, picture.crop(box)) for box in boxes)
            return read(fuse(whole, boxes, [self._drawn(*crop) for crop in crops]))

        if way.windows:
            return _answers(lambda named, _: named, from_windows, queries, progress)
        return _answers(asking.each, from_whole, queries, progress)

    def _asked(self, task: Task, way: Way) -> "_Asked":
        _check_count("batch", way.batch)
        decoding = self._model.decoding(way.decoding, way.sampling)
        if way.shifts:
            check_shifts(decoding)
        return _Asked(self._model, self._show(task), way)

    def _show(self, task: Task) -> list[_Shown]:
        """The examples of each class for a task, read when they are needed for the first time."""
        if self._task not in (None, task):
            has, needs = ("masks", "regions") if task is CAPTIONING else ("regions", "masks")
            raise InputError(f"The examples of this session have {has}; {task.name} needs {needs}.")
        if task.name not in self._shown:
            self._shown[task.name] = [
                self._read(task, name, pairs) for name, pairs in self._pairs.items()
            ]
        return self._shown[task.name]

    def _read(self, task: Task, name: str, pairs: Sequence[tuple[Any, Any]]) -> _Shown:
        model = self._model
        category = name or (category_of(pairs) if task is CAPTIONING else None)
        count = len(pairs) if self._nearest is None else min(len(pairs), self._nearest)
        if self.classes and task is SEGMENTATION and not task.needs_category(model.format):
            category = None
        model.check_request(task, count, category)
        of_class = name if self.classes else ""
        examples = read_pairs(model, task, pairs, category, of_class, self._progress)
        if count < len(examples):
            shelf = Shelf(model.tokenizers, examples, count)
            return _Shown(Episode(task, category or "", ()), None, shelf)
        episode = Episode(task, category or "", examples)
        return _Shown(episode, model.read_examples(episode))


@dataclass
class _Asked:
    """Queries that are asked about what is shown of each class.

    started: how many sequences were decoded so far; the next one draws as number `started`.
    """

    model: "InContextModel"
    shown: Sequence[_Shown]
    way: Way
    started: int = 0

    def each(
        self, queries: Iterable[Named], progress: bool = False
    ) -> Iterator[tuple[list[Any], Query]]:
        """The completed pair of each class of each query in turn, and the query."""
        readings = READINGS if self.way.shifts else 1
        for some in in_batches(queries, max(1, self.way.batch // (len(self.shown) * readings))):
            loaded = [Query.load(query, self.model.image_size, name) for name, query in some]
            views = [view for query in loaded for view in self._views(query)]
            requested = [
                (examples, episode, image_N)
                for of_query in in_batches(self.model.encode(views), readings)
                for examples in self.shown
                for episode in [examples.episode_for(of_query[0])]
                for image_N in of_query
            ]
            pairs: list[Any] = []
            for part in in_batches(requested, self.way.batch):
                pairs += self._complete(part, progress)
            answers = iter(
                fused_views(views) if self.way.shifts else views[0]
                for views in in_batches(pairs, readings)
            )
            for query in loaded:
                yield [next(answers) for _ in self.shown], query

    def _views(self, query: Query) -> list[torch.Tensor]:
        if not self.way.shifts:
            return [query.pixels_3HW]
        return shifted_views(query.pixels_3HW, self.model.format.codes_per_image)

    def _complete(
        self, requested: Sequence[tuple[_Shown, Episode, np.ndarray]], progress: bool
    ) -> list[Any]:
        requests = [(episode, image_N) for _, episode, image_N in requested]
        read = [examples.read for examples, _, _ in requested if examples.read is not None]
        first = self.way.sampling.first + self.started
        self.started += len(requested)
        return self.model.complete(
            requests,
            replace(self.way.sampling, first=first),
            progress,
            self.way.decoding,
            read if len(read) == len(requested) else None,
        )


def _answers(
    prepare: Callable[[Iterable[Named], bool], Iterable[tuple[Any, Any]]],
    read: Callable[[Any, Any], Any],
    queries: Any,
    progress: bool,
) -> Any:
    """One answer or several, as `Queries` says. prepare: what `read` makes the answers of, of each
    query in turn; its second argument is whether to show the progress within a query.
    """
    if is_one_image(queries):
        (prepared,) = prepare([("The query", queries)], progress)
        return read(*prepared)
    assert isinstance(queries, Iterable)
    total = len(queries) if isinstance(queries, Sized) else None
    named = ((f"Query {number}", query) for number, query in enumerate(queries, 1))
    bar = tqdm(prepare(named, False), "images", total, disable=not progress, unit="", leave=False)
    answers = (read(*prepared) for prepared in bar)
    return list(answers) if isinstance(queries, list | tuple) else answers


def _reduced(picture: Image.Image) -> Image.Image:
    """The picture with at most `_GUIDE` pixels a side, and at least one."""
    scale = min(1.0, _GUIDE / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height)) if scale < 1 else picture


def in_own_size(drawn: DrawnMask, query: Query, edges: EdgeFilter | None) -> DrawnMask:
    """The mask of a query in the query's size, with outlines that follow its edges."""
    if edges is not None:
        drawn = follow_edges(drawn, query.guide, edges)
    width, height = query.size
    return drawn.resized(height, width)


def _class_names(examples: Examples, category: str | None) -> tuple[str, ...] | None:
    """The names of examples that are given by class. Raises InputError if they, or the category,
    are not names.
    """
    if not isinstance(category, str | None):
        raise InputError(f"The category must be text, not {type(category).__name__}.")
    if not isinstance(examples, Mapping):
        return None
    if category is not None:
        raise InputError("Examples by class name their classes themselves: leave category out.")
    if not examples or not all(isinstance(name, str) and name.strip() for name in examples):
        raise InputError("Examples by class need at least one class, and names that are text.")
    return tuple(examples)


def _check_count(name: str, count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"{name} must be a whole number of at least 1, not {count!r:.60}.")


def _region(model: "InContextModel", pair: CaptionPair, size: Size) -> Region:
    box = _to_pixel_box(box_of(pair, model), size)
    return Region(pair.caption, pair.category, box, pair.log_probability)


def _to_pixel_box(box: Box | None, size: Size) -> tuple[float, float, float, float] | None:
    if box is None:
        return None
    width, height = size
    x, y = round(box[0] * width, 2), round(box[1] * height, 2)
    return x, y, round((box[2] - box[0]) * width, 2), round((box[3] - box[1]) * height, 2)
