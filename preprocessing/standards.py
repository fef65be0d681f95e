"""The episodes of published benchmarks, and of the paper's own evaluation, as `EpisodeFile`s.

The draws of coco20i, pascal5i and fss1000 are those of HSNet (Min, Kang and Cho 2021,
"Hypercorrelation Squeeze for Few-Shot Segmentation"; data/*.py and test.py of its repository),
which later work shares: NumPy's generator is seeded with 0 for each fold, and examples may repeat.
With HSNet's own lists of images the episodes are exactly those of its tests. lvis92i is drawn as in
Matcher (Liu et al. 2024; matcher/data/lvis.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from icl_moe.errors import InputError
from icl_moe.inputs import check_inside, check_is_file, read_json
from preprocessing import visual_genome
from preprocessing.classes import COCO_CLASSES, ClassFinder
from preprocessing.coco import SMALL_AREA
from preprocessing.episode_file import EpisodeFile, FixedEpisode, FixedPair
from preprocessing.image_check import Unchecked
from preprocessing.pool import PoolRegion
from preprocessing.recipe import CaptioningSource
from preprocessing.standard_masks import AnnotatedImages

COCO_2014 = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
COCO_2017 = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
COCO_IMAGES = "http://images.cocodataset.org/zips/{}.zip"
LVIS = "https://dl.fbaipublicfiles.com/LVIS/lvis_v1_val.json.zip"
HSNET = "https://github.com/juhongm999/hsnet (data/splits)"
GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset"
DENSECAP = "https://raw.githubusercontent.com/jcjohnson/densecap/master/info/densecap_splits.json"
VOC = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
VOC_AUGMENTED = "https://github.com/juhongm999/hsnet (README, SDS extended mask annotations)"
FSS = "https://github.com/HKUSTCV/FSS-1000"

_VOC_NAMES = """
    aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
"""
VOC_CLASSES = tuple(_VOC_NAMES.split())

QUERIES = 1000
"""Episodes of each fold of coco20i and pascal5i."""

LVIS_QUERIES = 2300
PAPER_QUERIES = 2000

LEAST_PIXELS = 2 * 32 * 32
"""An image of coco20i shows a class on at least so many pixels. HSNet's lists do not say so; for
1,327 of 1,338 pairs of an image and a class this rule tells whether they have it.
"""

_MIOU = (
    "mIoU: for each class, the intersections of prediction and truth summed over its queries, "
    "divided by the sum of their unions; then the mean over the classes of a fold, and over the "
    "folds. Foreground only"
)
_WHOLE = "Pairs show whole images, stretched to a square, and masks are compared in that square."


@dataclass(frozen=True)
class Request:
    """What `icl-moe episodes` is asked for. data: the data set's folder. fold: None for all."""

    name: str
    data: Path
    shots: int = 1
    fold: int | None = None

    def need(self, path: str, published: str) -> Path:
        """A file or folder of the data set. Raises InputError if it is missing."""
        found = self.data / path
        if not found.exists():
            raise InputError(f"{self.data} has no {path}, which is published at {published}.")
        return found

    def folds_of(self, count: int) -> Sequence[int]:
        """The folds to make, of a benchmark that has `count`."""
        if self.fold is None:
            return range(count)
        if not 0 <= self.fold < count:
            most = count - 1
            raise InputError(f"--fold must lie in 0..{most} for {self.name}, not {self.fold}.")
        return [self.fold]


@dataclass(frozen=True)
class Made:
    """A file's content, and what to say about its size."""

    file: EpisodeFile
    notes: tuple[str, ...] = field(default=())


def make_episodes(request: Request) -> Made:
    """The episodes of a benchmark. Raises InputError if the name, the fold or the data are wrong,
    or if a link leads from an image or a mask out of the data set's folder, since shards are not
    built of such files.
    """
    if request.name not in STANDARDS:
        raise InputError(
            f"There are no episodes named '{request.name}'; known are {', '.join(STANDARDS)}."
        )
    if not request.data.is_dir():
        raise InputError(f"{request.data} is not a folder; --data must be the data set's.")
    made = STANDARDS[request.name](request)
    pairs = {pair for episode in made.file.episodes for pair in episode.pairs}
    files = {name for pair in pairs for name in (pair.image, pair.mask) if name is not None}
    for name in sorted(files):
        check_inside(request.data, request.data / name)
    return made


# COCO-20i ---------------------------------------------------------------------------------------


def _coco20i(request: Request) -> Made:
    folds = request.folds_of(4)
    listed = {
        fold: _hsnet_lists(lists)
        for fold in folds
        if (lists := request.data / f"splits/coco/val/fold{fold}.json").is_file()
    }
    if listed and len(listed) < len(folds):
        (missing, *_) = [fold for fold in folds if fold not in listed]
        request.need(f"splits/coco/val/fold{missing}.json", HSNET)
    has_lists = bool(listed)
    images = AnnotatedImages(request.data, _coco_files(request, has_lists), "painted")
    if tuple(images.classes) != COCO_CLASSES:
        raise InputError(
            f"{request.data} does not have COCO's 80 classes in their order, by which the folds "
            "of coco20i are defined."
        )
    if not has_lists:
        names = images.showing(LEAST_PIXELS)
        listed = {f: {c: names[COCO_CLASSES[c]] for c in _coco_fold(f)} for f in folds}
    drawn = []
    for fold in folds:
        of_class = {number: listed[fold].get(number, []) for number in _coco_fold(fold)}
        _check_enough(request, {COCO_CLASSES[n]: names for n, names in of_class.items()})
        drawn.append(
            [
                FixedEpisode(
                    fold,
                    COCO_CLASSES[number],
                    tuple(
                        images.pair(images.path_of(n), COCO_CLASSES[number])
                        for n in example_numbers
                    ),
                )
                for number, *example_numbers in draw_by_class(of_class, request.shots, QUERIES)
            ]
        )
    where = (
        "the images are those of HSNet's lists, so these are the episodes of its tests"
        if has_lists
        else f"the images show the class on at least {LEAST_PIXELS} pixels, as in HSNet's lists, "
        "but the order of the lists, and so the draws, are not HSNet's"
    )
    file = EpisodeFile(
        "coco20i",
        "segmentation",
        request.shots,
        4,
        f"COCO-20i: {QUERIES} queries a fold, as in HSNet's protocol, of fold f the classes f, "
        f"f + 4, ..., f + 76 of 80; a class is drawn, then a query and examples of it; {where}. "
        f"{_WHOLE}",
        f"{_MIOU}, as in HSNet, which compares at 400 x 400 pixels.",
        "painted",
        images.files,
        episodes=_in_turns(drawn),
    )
    return Made(file)


def _coco_fold(fold: int) -> list[int]:
    """The numbers of a fold's classes."""
    return [fold + 4 * number for number in range(20)]


def _coco_files(request: Request, has_lists: bool) -> tuple[str, ...]:
    """COCO 2014's validation annotations or, where the lists name the images, those of 2017, which
    has the same images in two other parts.
    """
    of_2014 = "annotations/instances_val2014.json"
    if not has_lists or (request.data / of_2014).is_file():
        request.need(of_2014, COCO_2014)
        request.need("val2014", COCO_IMAGES.format("val2014"))
        return (of_2014,)
    files = tuple(f"annotations/instances_{part}2017.json" for part in ("train", "val"))
    for file, part in zip(files, ("train2017", "val2017"), strict=True):
        request.need(file, COCO_2017)
        request.need(part, COCO_IMAGES.format(part))
    return files


def _hsnet_lists(file: Path) -> dict[int, list[str]]:
    """Number of a class -> names of images, from a list of HSNet that was rewritten as JSON."""
    lists = read_json(file)
    if not isinstance(lists, dict) or not all(
        key.isdecimal() and isinstance(names, list) and all(isinstance(n, str) for n in names)
        for key, names in lists.items()
    ):
        raise InputError(f"{file} must hold a list of images' names for each class's number.")
    return {int(key): names for key, names in lists.items()}


def draw_by_class(
    images: Mapping[int, Sequence[str]], shots: int, queries: int
) -> Iterator[tuple[Any, ...]]:
    """Episodes as HSNet draws them from COCO: the class's number, the examples, and the query."""
    rng = np.random.RandomState(0)
    classes = list(images)
    for _ in range(queries):
        number = classes[_draw(rng, len(classes))]
        names = images[number]
        query = names[_draw(rng, len(names))]
        yield number, *_draw_examples(rng, names, query, shots), query


def _draw(rng: np.random.RandomState, count: int) -> int:
    """As np.random.choice(a, 1, replace=False) draws from `count` things."""
    return int(rng.choice(count, 1, replace=False)[0])


def _draw_examples(
    rng: np.random.RandomState, names: Sequence[str], query: str, shots: int
) -> list[str]:
    """Examples, which may repeat, of other images than the query's."""
    drawn: list[str] = []
    while len(drawn) < shots:
        name = names[_draw(rng, len(names))]
        if name != query:
            drawn.append(name)
    return drawn


def _check_enough(request: Request, images: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError if a class has no two images, so that no episode is possible."""
    for name, names in images.items():
        if len(set(names)) < 2:
            raise InputError(
                f"{request.data} has {len(set(names))} image(s) that show the class '{name}' well "
                f"enough for {request.name}; an episode needs two."
            )


def _in_turns(folds: Sequence[Sequence[FixedEpisode]]) -> tuple[FixedEpisode, ...]:
    """The episodes of all folds in turns, so that the first N are of all folds alike."""
    return tuple(filter(None, chain.from_iterable(zip_longest(*folds))))


# PASCAL-5i and FSS-1000 -------------------------------------------------------------------------


def _pascal5i(request: Request) -> Made:
    folds = request.folds_of(4)
    for part, published in (("JPEGImages", VOC), ("SegmentationClassAug", VOC_AUGMENTED)):
        request.need(part, published)
    drawn = []
    for fold in folds:
        listed = _pascal_list(request.need(f"splits/pascal/val/fold{fold}.txt", HSNET), fold)
        of_class: dict[int, list[str]] = {}
        for name, number in listed:
            of_class.setdefault(number, []).append(name)
        _check_enough(request, {VOC_CLASSES[n]: names for n, names in of_class.items()})
        rng = np.random.RandomState(0)
        episodes = []
        for place in range(QUERIES):
            query, number = listed[place % len(listed)]
            drawn_names = [*_draw_examples(rng, of_class[number], query, request.shots), query]
            files = [(f"JPEGImages/{n}.jpg", f"SegmentationClassAug/{n}.png") for n in drawn_names]
            episodes.append(_of_files(request, fold, VOC_CLASSES[number], files))
        drawn.append(episodes)
    file = EpisodeFile(
        "pascal5i",
        "segmentation",
        request.shots,
        4,
        f"PASCAL-5i: {QUERIES} queries a fold as in HSNet's tests, which go through its list of "
        "images and classes again and again, of fold f the classes 5 f to 5 f + 4 of 20. Pixels "
        f"of the level 255 (edges) do not count. {_WHOLE}",
        f"{_MIOU}, as in HSNet, which compares at 400 x 400 pixels.",
        "file",
        levels={name: number + 1 for number, name in enumerate(VOC_CLASSES)},
        episodes=_in_turns(drawn),
    )
    return Made(file)


def _pascal_list(file: Path, fold: int) -> list[tuple[str, int]]:
    """(image, class's number) of each line, such as 2007_000033__01."""
    listed = []
    for place, line in enumerate(_lines(file), start=1):
        name, _, number = line.rpartition("__")
        if (
            not name
            or not number.isdecimal()
            or int(number) - 1 not in range(5 * fold, 5 * fold + 5)
        ):
            raise InputError(
                f"{file}, line {place} must be an image, two underscores and the number of a class "
                f"in {5 * fold + 1}..{5 * fold + 5}, not '{line}'."
            )
        listed.append((name, int(number) - 1))
    if not listed:
        raise InputError(f"{file} is empty; it must list images and classes.")
    return listed


def _fss1000(request: Request) -> Made:
    request.folds_of(1)
    classes = sorted(_lines(request.need("splits/fss/test.txt", HSNET)))
    episodes = []
    rng = np.random.RandomState(0)
    for name in classes:
        for number in range(1, 11):
            for kind in ("jpg", "png"):
                request.need(f"{name}/{number}.{kind}", FSS)
        numbers = [str(number) for number in range(1, 11)]
        for query in sorted(numbers, key=lambda number: f"{number}.jpg"):
            drawn_numbers = [*_draw_examples(rng, numbers, query, request.shots), query]
            files = [(f"{name}/{number}.jpg", f"{name}/{number}.png") for number in drawn_numbers]
            episodes.append(_of_files(request, 0, name.replace("_", " "), files))
    file = EpisodeFile(
        "fss1000",
        "segmentation",
        request.shots,
        1,
        f"FSS-1000: each of the ten images of {len(classes)} test classes is a query once, with "
        f"examples drawn as in HSNet's tests. {_WHOLE}",
        f"{_MIOU}, as in HSNet, which compares at 400 x 400 pixels.",
        "file",
        episodes=tuple(episodes),
    )
    return Made(file)


def _of_files(
    request: Request, fold: int, category: str, files: Iterable[tuple[str, str]]
) -> FixedEpisode:
    """An episode of images and the files of their masks."""
    pairs = tuple(
        FixedPair(image, *_size_of(request.data / mask), mask=mask) for image, mask in files
    )
    return FixedEpisode(fold, category, pairs)


def _size_of(file: Path) -> tuple[int, int]:
    check_is_file(file)
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"The mask {file} cannot be read: {error}.") from error


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    check_is_file(file)
    try:
        return [
            line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as text: {error}.") from error


# LVIS-92i, and the paper's own ------------------------------------------------------------------


def _lvis92i(request: Request) -> Made:
    folds = request.folds_of(10)
    images = _lvis_images(request)
    paths_of = {
        name: paths for name, paths in images.with_class().items() if len(paths) > request.shots
    }
    names = list(paths_of)
    count = len(names) // 10
    if not count:
        raise InputError(
            f"{request.data} has only {len(names)} classes of at least {request.shots + 1} images; "
            "ten folds need ten."
        )
    drawn = []
    for fold in folds:
        rng = np.random.RandomState(0)
        episodes = []
        for place in range(LVIS_QUERIES):
            name = names[fold + 10 * (place % count)]
            query = paths_of[name][_draw(rng, len(paths_of[name]))]
            paths = [*_draw_examples(rng, paths_of[name], query, request.shots), query]
            pairs = tuple(images.pair(path, name) for path in paths)
            episodes.append(FixedEpisode(fold, name, pairs))
        drawn.append(episodes)
    file = EpisodeFile(
        "lvis92i",
        "segmentation",
        request.shots,
        10,
        f"LVIS-92i as in Matcher: {LVIS_QUERIES} queries a fold, of fold f the classes f, f + 10, "
        f"... of those that more than {request.shots} images of LVIS v1's validation set show "
        f"({count} a fold), in turns. The order of its lists is not published in a plain file, so "
        f"the draws are not Matcher's own. {_WHOLE}",
        f"{_MIOU}, as in Matcher, which compares at 518 x 518 pixels.",
        "union",
        images.files,
        episodes=_in_turns(drawn),
    )
    return Made(file, (f"{len(names)} classes, {count} of them in each fold (Matcher: 92).",))


def _lvis_images(request: Request) -> AnnotatedImages:
    name = "lvis_v1_val.json"
    file = name if (request.data / name).is_file() else f"annotations/{name}"
    request.need(file, LVIS)
    for part in ("train2017", "val2017"):
        request.need(part, COCO_IMAGES.format(part))
    return AnnotatedImages(request.data, (file,), "union")


def _paper_coco(request: Request) -> Made:
    request.folds_of(1)
    request.need("annotations/instances_val2017.json", COCO_2017)
    request.need("val2017", COCO_IMAGES.format("val2017"))
    images = AnnotatedImages(request.data, ("annotations/instances_val2017.json",), "union")
    paths_of = _large_enough(request, images.showing_instances(SMALL_AREA))
    rng = np.random.default_rng(0)
    queries = [(name, path) for name, paths in paths_of.items() for path in paths]
    episodes = [
        _unlike(rng, images, request.shots, paths_of, *queries[number])
        for number in rng.permutation(len(queries))
    ]
    file = EpisodeFile(
        "paper_coco",
        "segmentation",
        request.shots,
        1,
        "Class-aware COCO, for the paper's tables: every class in every image of val2017 is a "
        "query once, if an instance of it has at least 32 x 32 pixels; the examples are of other "
        "images of val2017. The paper states neither the number of its queries nor their crops. "
        f"{_WHOLE} So the place of an object is not given away, as by crops around it.",
        f"{_MIOU}.",
        "union",
        images.files,
        episodes=tuple(episodes),
    )
    return Made(file)


def _paper_lvis(request: Request) -> Made:
    request.folds_of(1)
    images = _lvis_images(request)
    finder = ClassFinder(COCO_CLASSES)
    new = {record["name"] for record in images.categories if not _is_of(finder, record)}
    every = images.showing_instances(SMALL_AREA)
    paths_of = _large_enough(request, {name: every[name] for name in images.classes if name in new})
    rng, names = np.random.default_rng(0), list(paths_of)
    episodes = []
    for _ in range(PAPER_QUERIES):
        name = names[int(rng.integers(len(names)))]
        query = paths_of[name][int(rng.integers(len(paths_of[name])))]
        episodes.append(_unlike(rng, images, request.shots, paths_of, name, query))
    file = EpisodeFile(
        "paper_lvis",
        "segmentation",
        request.shots,
        1,
        "Classes of LVIS v1 that COCO lacks (by their names and synonyms): "
        f"{PAPER_QUERIES} queries of its validation set, of which the class is drawn first, then "
        f"an image in which an instance of it has at least 32 x 32 pixels. {_WHOLE}",
        f"{_MIOU}.",
        "union",
        images.files,
        episodes=tuple(episodes),
    )
    return Made(file, (f"{len(new)} of {len(images.classes)} classes are not COCO's.",))


def _is_of(finder: ClassFinder, record: Mapping[str, Any]) -> bool:
    """Whether a category of LVIS is one of the finder's classes."""
    names = [record["name"], record["name"].partition(" (")[0], *record.get("synonyms", ())]
    return any(finder.exact(str(name).replace("_", " ")) for name in names)


def _large_enough(
    request: Request, images: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """The classes of which an episode is possible. Raises InputError if there are none."""
    kept = {name: paths for name, paths in images.items() if len(paths) > request.shots}
    if not kept:
        raise InputError(
            f"{request.data} has no class in the {request.shots + 1} images that an episode of "
            f"{request.name} needs."
        )
    return kept


def _unlike(
    rng: np.random.Generator,
    images: AnnotatedImages,
    shots: int,
    paths_of: Mapping[str, Sequence[str]],
    name: str,
    query: str,
) -> FixedEpisode:
    """An episode with examples of different images, none of them the query's."""
    others = [path for path in paths_of[name] if path != query]
    drawn = rng.choice(len(others), shots, replace=False)
    paths = [*(others[int(number)] for number in drawn), query]
    return FixedEpisode(0, name, tuple(images.pair(path, name) for path in paths))


def _paper_vg(request: Request) -> Made:
    file, notes = _genome(request, COCO_CLASSES, "of COCO's classes", "about 460k")
    return Made(replace(file, name="paper_vg"), notes)


def _paper_vg_unseen(request: Request) -> Made:
    _genome_files(request)
    classes = visual_genome.frequent_names(request.data / "objects.json", more_than=100)
    file, notes = _genome(request, classes, "that are not COCO's", "no figure")
    return Made(replace(file, name="paper_vg_unseen"), notes)


def _genome(
    request: Request, classes: Sequence[str], which: str, training_size: str
) -> tuple[EpisodeFile, tuple[str, ...]]:
    """Descriptions of Visual Genome's regions, by the split of DenseCap: classes by their number in
    `train`, queries and examples from `test`.
    """
    request.folds_of(1)
    _genome_files(request)
    source = CaptioningSource(
        images=str(request.data),
        regions=str(request.data / "region_descriptions.json"),
        objects=str(request.data / "objects.json"),
        image_data=str(request.data / "image_data.json"),
        splits=str(request.data / "densecap_splits.json"),
        split="train",
        classes=tuple(classes),
    )
    training = visual_genome.read_captioning(source, Unchecked())
    test = visual_genome.read_captioning(
        replace(source, split="test", counted_split="train"), Unchecked()
    )
    of_class: dict[str, list[PoolRegion]] = {}
    for region in test.regions:
        of_class.setdefault(region.category, []).append(region)
    possible = [
        region
        for region in test.regions
        if len({other.image.name for other in of_class[region.category]}) > request.shots
    ]
    if not possible:
        raise InputError(
            f"{request.data} has no class {which} with more than 100 descriptions in the images of "
            f"'train' and descriptions in {request.shots + 1} images of 'test'."
        )
    rng = np.random.default_rng(0)
    queries = [possible[number] for number in rng.permutation(len(possible))[:PAPER_QUERIES]]
    episodes = tuple(
        _described(rng, request.shots, of_class[query.category], query) for query in queries
    )
    file = EpisodeFile(
        request.name,
        "captioning",
        request.shots,
        1,
        f"Regions of Visual Genome of classes {which} with more than 100 descriptions, of which "
        f"DenseCap's split 'train' has {len(training.regions)} (the paper: {training_size}); "
        f"{len(queries)} of the {len(test.regions)} of its split 'test' are queries (the paper: "
        "2k). Pairs show whole images, stretched to a square.",
        "Caption scores and mAP as docs/evaluation.md says; there is no other score.",
        episodes=episodes,
    )
    notes = (
        f"training regions: {len(training.regions)} (the paper: {training_size})",
        f"test regions: {len(test.regions)}, queries: {len(queries)} (the paper: 2k)",
    )
    return file, notes


def _genome_files(request: Request) -> None:
    for name in ("image_data.json", "objects.json", "region_descriptions.json"):
        request.need(name, f"{GENOME}/{name}.zip")
    request.need("densecap_splits.json", DENSECAP)


def _described(
    rng: np.random.Generator, shots: int, regions: Sequence[PoolRegion], query: PoolRegion
) -> FixedEpisode:
    """An episode with examples of different images, none of them the query's."""
    drawn: list[PoolRegion] = []
    used = {query.image.name}
    while len(drawn) < shots:
        region = regions[int(rng.integers(len(regions)))]
        if region.image.name not in used:
            used.add(region.image.name)
            drawn.append(region)
    pairs = tuple(
        FixedPair(
            region.image.name,
            region.image.width,
            region.image.height,
            region.annotations,
            box=region.target.box,
            caption=region.target.caption,
        )
        for region in (*drawn, query)
    )
    return FixedEpisode(0, query.category, pairs)


STANDARDS: dict[str, Callable[[Request], Made]] = {
    "coco20i": _coco20i,
    "pascal5i": _pascal5i,
    "fss1000": _fss1000,
    "lvis92i": _lvis92i,
    "paper_coco": _paper_coco,
    "paper_lvis": _paper_lvis,
    "paper_vg": _paper_vg,
    "paper_vg_unseen": _paper_vg_unseen,
}
"""Name -> the maker of its episodes."""
