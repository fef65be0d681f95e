"""The paper's figures 6 to 12 as data: what each shows, and of which runs of the tables."""

from dataclasses import dataclass
from typing import Literal

from icl_moe.reproduce.tables import (
    CAPTIONING,
    SEGMENTATION,
    TABLES,
    Row,
    Run,
    Scale,
    Shards,
    unlike_training,
)

Choice = Literal["spaced", "failures"]
"""Which queries a figure shows: evenly spaced ones, independently of their scores; or the queries
of each kind of failure with the lowest agreement.
"""


@dataclass(frozen=True)
class Standard:
    """Episodes of `icl-moe episodes NAME`, from a folder below --data. also: the files that it
    needs in addition to those of the tables, each with the address where it is published.
    """

    name: str
    folder: str
    also: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Elsewhere:
    """Queries that a run was not made for. `what` completes the sentence "The queries are"."""

    shards: Shards
    what: str
    standard: Standard | None = None


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper at one scale.

    rows: the rows of a table whose runs the figure shows. task: the task that its pictures show;
    None for the figure of the gradients. elsewhere: where the queries are from; by default they are
    those of the run's own evaluation.
    """

    name: str
    scale: Scale
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    task: str | None = None
    choice: Choice = "spaced"
    elsewhere: Elsewhere | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(dict.fromkeys(run for row in self.rows for run in row.runs))


_DEMO_NOTE = (
    "Demo scale: drawn scenes, a decoder of some hundred thousand parameters and minutes of "
    "training on two cores, with one seed. It cannot be compared with the paper's figure."
)

_LVIS = "https://s3-us-west-2.amazonaws.com/dl.fbaipublicfiles.com/LVIS/lvis_v1_val.json.zip"


def _figure6(scale: Scale) -> PaperFigure:
    rows = {row.name: row for row in TABLES["table3"](scale).rows}
    notes = (
        "The paper's figure shows the normalised gradient of each attention layer for each task. "
        "Here both models are those of Table 3 that are trained with MT, in which every step is of "
        "one task.",
        "Normalised: the L2 norm of a part's gradient / that of the whole gradient, in steps of "
        "the training itself.",
        "Cosines are of gradients at equal weights, those of the newest checkpoint, of the batches "
        "that training would take next, in four groups for each task, and without the auxiliary "
        "loss of gates. Between tasks: the mean over the pairs of a group of either task; within a "
        "task: over the pairs of its own groups, which is what two gradients of one task reach "
        "with so many episodes. 1: the tasks want the same change; 0: neither "
        "helps nor hinders the other; below 0: they are in conflict. "
        "Where the experts of two tasks are different ones, their cosine is 0 by construction.",
    )
    return PaperFigure(
        "figure6",
        scale,
        "Gradients of the tasks (the paper's Figure 6)",
        (rows["dense_mt"], rows["attributes_mt"]),
        _notes(scale, *notes),
    )


def _pictures(
    name: str,
    scale: Scale,
    what: str,
    task: str,
    choice: Choice = "spaced",
    elsewhere: Elsewhere | None = None,
) -> PaperFigure:
    number = name.removeprefix("figure")
    rows = tuple(row for row in TABLES["table4"](scale).rows if row.scores)
    notes = [
        "The model is that of Table 4, after one example. Pictures are those of the files, in the "
        "size that the model reads."
    ]
    if scale == "paper":
        notes.append(
            "Which queries the paper's figure shows, and how they were chosen, it does not say."
        )
    return PaperFigure(
        name,
        scale,
        f"{what} (the paper's Figure {number})",
        rows,
        _notes(scale, *notes),
        task,
        choice,
        elsewhere,
    )


def _figure7(scale: Scale) -> PaperFigure:
    where = _out_of_domain(
        scale,
        Standard("paper_lvis", "coco", (("coco/annotations/lvis_v1_val.json", _LVIS),)),
        "photographs of LVIS's classes that COCO lacks",
    )
    return _pictures("figure7", scale, "Masks out of domain", SEGMENTATION, elsewhere=where)


def _figure8(scale: Scale) -> PaperFigure:
    where = _out_of_domain(
        scale,
        Standard("paper_vg_unseen", "visual_genome"),
        "regions of Visual Genome whose names are none of COCO's classes",
    )
    return _pictures("figure8", scale, "Captions out of domain", CAPTIONING, elsewhere=where)


def _figure9(scale: Scale) -> PaperFigure:
    return _pictures("figure9", scale, "Masks beside their examples", SEGMENTATION)


def _figure10(scale: Scale) -> PaperFigure:
    return _pictures("figure10", scale, "Captions beside their examples", CAPTIONING)


def _figure11(scale: Scale) -> PaperFigure:
    return _pictures("figure11", scale, "Masks that fail", SEGMENTATION, "failures")


def _figure12(scale: Scale) -> PaperFigure:
    return _pictures("figure12", scale, "Captions that fail", CAPTIONING, "failures")


def _out_of_domain(scale: Scale, standard: Standard, photographs: str) -> Elsewhere:
    if scale == "paper":
        shards = Shards(standard.name, "coco_vg_256", (), "val")
        return Elsewhere(shards, photographs, standard)
    what = (
        "scenes of another drawn world, whose twelve classes are shapes of any colour and pattern, "
        "with other words for them"
    )
    return Elsewhere(unlike_training(), what)


def _notes(scale: Scale, *notes: str) -> tuple[str, ...]:
    return (_DEMO_NOTE, *notes) if scale == "demo" else notes


FIGURES = {
    "figure6": _figure6,
    "figure7": _figure7,
    "figure8": _figure8,
    "figure9": _figure9,
    "figure10": _figure10,
    "figure11": _figure11,
    "figure12": _figure12,
}
"""The name of each figure -> what makes it at a scale."""
