"""Files of fixed episodes, such as those of a published benchmark, so that every model is asked the
same queries with the same examples.

A file is JSON Lines in UTF-8: a header, and one line for each episode. The header's `sha256` is
that of the header without it (as JSON with sorted keys and no spaces) and of all lines after it.
docs/evaluation.md describes both.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from icl_moe.boxes import Box
from icl_moe.errors import InputError, shown
from icl_moe.files import write_whole
from icl_moe.inputs import check_is_file, is_inside
from icl_moe.ranges import Count
from icl_moe.settings import from_dict, to_dict
from preprocessing.records import is_id

FORMAT = "icl-moe episodes 1"

Masks = Literal["painted", "union", "file", "none"]


@dataclass(frozen=True, slots=True)
class FixedPair:
    """One pair of an episode. Paths are relative to the data set's folder.

    image, width, height: the image's file, and its size in pixels. annotations: the ids of the
    class's annotations in the image, which make its mask; or the id of the region that is
    described. mask: the file of the mask, where there is one. box, caption: a described region's
    box, in fractions of the image, and its caption.
    """

    image: str
    width: Count
    height: Count
    annotations: tuple[Any, ...] = ()
    mask: str | None = None
    box: tuple[float, ...] | None = None
    caption: str | None = None

    def __post_init__(self) -> None:
        for path in (self.image, self.mask):
            if path is not None and not is_inside(path):
                raise InputError(f"{shown(path)} must be a path inside the data set's folder.")
        if not all(map(is_id, self.annotations)):
            raise InputError("annotations must be ids.")
        if (self.box is None) != (self.caption is None):
            raise InputError("box and caption go together.")
        if self.box is not None and not (
            len(self.box) == 4
            and 0 <= self.box[0] <= self.box[2] <= 1
            and 0 <= self.box[1] <= self.box[3] <= 1
        ):
            raise InputError("box must be x1, y1, x2, y2 in fractions of the image.")

    @property
    def normalised_box(self) -> Box:
        """The box of a description."""
        assert self.box is not None, "only descriptions have a box"
        x1, y1, x2, y2 = self.box
        return x1, y1, x2, y2


@dataclass(frozen=True, slots=True)
class FixedEpisode:
    """An episode: the examples, then the query. fold: the part of the benchmark that it belongs
    to, from 0.
    """

    fold: int
    category: str
    pairs: tuple[FixedPair, ...]

    def to_json(self) -> dict[str, Any]:
        """The episode as JSON, without the values that are not set."""
        pairs = [
            {k: v for k, v in asdict(pair).items() if v not in (None, ())} for pair in self.pairs
        ]
        return {"fold": self.fold, "category": self.category, "pairs": pairs}


@dataclass(frozen=True)
class EpisodeFile:
    """The content of a file.

    name: the name of the benchmark. task: the task of all its episodes. shots: the number of
    examples before each query. folds: the number of folds. protocol: how the episodes were drawn,
    and what the pairs show. score: the definition of the benchmark's own score. masks: how a mask
    is made. `painted`: all annotations except crowds are painted in the order of their file, so
    that later ones of other classes cover earlier ones. `union`: the union of all annotations of
    the class. `file`: the pixels of a picture that have the class's level (`levels`, where 255
    belongs to no class and does not count), or without levels the pixels of at least 128.
    annotations: the files that hold the annotations.
    """

    name: str
    task: Literal["segmentation", "captioning"]
    shots: Count
    folds: Count
    protocol: str
    score: str
    masks: Masks = "none"
    annotations: tuple[str, ...] = ()
    levels: dict[str, int] = field(default_factory=dict)
    episodes: tuple[FixedEpisode, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for place, episode in enumerate(self.episodes):
            if problem := self._problem(episode):
                raise InputError(f"episode {place} {problem}.")

    def _problem(self, episode: FixedEpisode) -> str | None:
        if not 0 <= episode.fold < self.folds:
            return f"is of fold {episode.fold}; folds must lie in 0..{self.folds - 1}"
        if len(episode.pairs) != self.shots + 1:
            return f"has {len(episode.pairs)} pairs; it must have {self.shots} examples and a query"
        if any(pair.image == episode.pairs[-1].image for pair in episode.pairs[:-1]):
            return "shows its query's image as an example"
        described = self.task == "captioning"
        if any((pair.caption is not None) != described for pair in episode.pairs):
            return f"must {'describe' if described else 'mark'} an object in every pair"
        if any((pair.mask is not None) != (self.masks == "file") for pair in episode.pairs):
            return "must name the file of every mask, and only where masks are files"
        return None

    @property
    def classes(self) -> list[str]:
        return sorted({episode.category for episode in self.episodes})

    def notes(self) -> list[dict[str, Any]]:
        """What KEY.json says about each episode besides."""
        return [{"standard": self.name, "fold": episode.fold} for episode in self.episodes]

    def header(self) -> dict[str, Any]:
        """Everything except the episodes, with their number and the hash of the whole content."""
        values = {"format": FORMAT, **to_dict(replace(self, episodes=()))}
        values["episodes"] = len(self.episodes)
        return values | {"sha256": _digest(values, self._lines())}

    def _lines(self) -> list[str]:
        return [_line(episode.to_json()) for episode in self.episodes]

    def write(self, path: Path) -> str:
        """Write the file, and return its sha256."""
        header = self.header()
        write_whole(path, "".join(f"{line}\n" for line in (_line(header), *self._lines())))
        return str(header["sha256"])


def read_episodes(path: Path) -> EpisodeFile:
    """The content of a file. Raises InputError if it was changed, cut off, or is none."""
    check_is_file(path)
    try:
        # Not splitlines, which also splits at characters that JSON leaves as they are.
        first, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        header, *records = [json.loads(line) for line in (first, *lines)]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a file of `icl-moe episodes`: {error}.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a file of `icl-moe episodes`; its first line must name the format "
            f"'{FORMAT}'."
        )
    values = {key: value for key, value in header.items() if key != "sha256"}
    found = _digest(values, lines)
    if header.get("sha256") != found:
        raise InputError(
            f"{path} was changed or cut off: its sha256 is {found}, but its first line says "
            f"{shown(header.get('sha256'))}; make it again with `icl-moe episodes`."
        )
    del values["format"]
    return from_dict(EpisodeFile, values | {"episodes": records}, str(path))


def _line(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _digest(header: Mapping[str, Any], lines: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for line in _of_hash(header, lines):
        digest.update(line.encode("utf-8"))
    return digest.hexdigest()


def _of_hash(header: Mapping[str, Any], lines: Sequence[str]) -> Iterator[str]:
    yield json.dumps(header, ensure_ascii=False, separators=(",", ":"), sort_keys=True) + "\n"
    for line in lines:
        yield line + "\n"
