"""The paper's tables as data: what each row trains, on what, and what is evaluated.

What makes one row differ from another is written once, for both scales; what differs between the
scales is their `Base`. Published figures are in icl_moe/evaluation/published.yaml, under the same
names of tables and rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from icl_moe.errors import InputError, nearest

Scale = Literal["demo", "paper"]
SCALES: tuple[Scale, ...] = ("demo", "paper")

SEGMENTATION, CAPTIONING = "segmentation", "captioning"

EPISODES = {SEGMENTATION: 280_000, CAPTIONING: 460_000}
"""About the numbers of episodes of the paper's training data: for captions its own count of
regions; for masks the (image, class) pairs of COCO's training images, without pairs that show only
small objects.
"""


def _epochs(epochs: int, *tasks: str) -> str:
    """The setting of the number of steps, to the nearest hundred, that this many epochs of these
    tasks together take with 512 episodes a step.
    """
    episodes = sum(EPISODES[task] for task in tasks)
    return f"training.steps={round(epochs * episodes / 512, -2):.0f}"


@dataclass(frozen=True)
class Shards:
    """A data recipe with overrides. name: the name of the folder, unique among the shards of a
    scale. split: the split of the data sets that a recipe reads from files.
    """

    name: str
    recipe: str
    settings: tuple[str, ...]
    split: Literal["train", "val"]


@dataclass(frozen=True)
class Run:
    """One model: a training recipe with overrides, trained on `trained`, and evaluated on
    `evaluated` after each of `shots` examples. evaluation: options of `icl-moe evaluate`. name: of
    its folder, and unique among the runs of a scale.
    """

    name: str
    trained: Shards
    evaluated: Shards
    recipe: str
    settings: tuple[str, ...]
    evaluation: tuple[str, ...] = ()
    shots: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Score:
    """Where a row's figures of a task come from: the run, and the number of examples."""

    run: Run
    task: str
    shots: int = 1


@dataclass(frozen=True)
class Row:
    """A row: its name, which published.yaml has too, and the scores that its figures are of. A row
    without scores is of a system that this code does not train.
    """

    name: str
    scores: tuple[Score, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(dict.fromkeys(score.run for score in self.scores))


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper at one scale. notes: what was decided where the paper does not say."""

    name: str
    scale: Scale
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def chosen(self, names: tuple[str, ...]) -> tuple[Row, ...]:
        """The rows with these names, or all; raises InputError for a name that there is not."""
        known = [row.name for row in self.rows if row.scores]
        for name in names:
            if name not in known:
                raise InputError(
                    f"--rows: {self.name} has no row {name!r}{nearest(name, known)}; its rows are "
                    f"{', '.join(known)}."
                )
        return tuple(row for row in self.rows if not names or row.name in names)


@dataclass(frozen=True)
class _Base:
    """What the rows of a table have in common at one scale.

    train, held_out: overrides of the data recipe for what is trained on, and in addition for what
    is evaluated. varied: overrides of the training recipe by the kind of episodes, whose length
    `model.positions` must be.
    """

    data: str
    training: str
    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    positions: Mapping[str, int] = field(default_factory=dict)

    def run(
        self,
        name: str,
        kind: str,
        data: tuple[str, ...] = (),
        settings: tuple[str, ...] = (),
        shots: tuple[int, ...] = (1,),
        data_name: str | None = None,
        evaluated: Shards | None = None,
    ) -> Run:
        """A run with these settings. kind: the kind of its episodes, a key of `positions`. data,
        settings: the settings in which this run differs from others. data_name: the folder of its
        shards, which runs with the same data share. evaluated: the episodes of the evaluation; by
        default held-out episodes that are made in the same way as those for training.
        """
        folder = data_name or name
        trained = Shards(folder, self.data, self.train + data, "train")
        own = (*self.settings, f"model.positions={self.positions[kind]}", *settings)
        held_out = evaluated or self.hold_out(f"{folder}_val", data)
        return Run(name, trained, held_out, self.training, own, self.evaluation, shots)

    def hold_out(self, name: str, data: tuple[str, ...]) -> Shards:
        return Shards(name, self.data, self.train + self.held_out + data, "val")


_DEMO_POSITIONS = {
    "masks": 262,  # 2 pairs x (3 + 2 x 64)
    "boxes": 392,  # 2 pairs x (4 + 3 x 64), with a drawn box
    "label": 212,  # The class's name, 16, and 1 pair x (4 + 3 x 64)
    "three": 784,  # 4 pairs x (4 + 3 x 64)
}
_PAPER_128_POSITIONS = {
    "masks": 524,  # 4 pairs x (3 + 2 x 64)
    "boxes": 784,  # 4 pairs x (4 + 3 x 64)
}
_PAPER_256_POSITIONS = {
    "masks": 2060,  # 4 pairs x (3 + 2 x 256)
    "boxes": 2060,
    "label": 531,  # The class's name, 16, and 1 pair x (3 + 2 x 256)
    "three": 2060,
}

_SINGLE_TASK = ("optimizer.name=adamw", "optimizer.clip=0.5")
_JOINT = (*_SINGLE_TASK, "training.task_weights=null", "training.sampling=mixed")
_MT = (
    "optimizer.name=mt_adamw",
    "optimizer.clip=null",
    "training.task_weights=null",
    "training.sampling=unmixed",
)
"""One task a step, drawn by the square root of its number of episodes, and MT-AdamW."""

_SCENES = ("synthetic.images=2000", "samples=6000", "shard_size=1024")
_HELD_OUT_SCENES = (
    "synthetic.split=val",
    "synthetic.seed=1",
    "synthetic.images=120",
    "samples=100",
)

_DEMO_NOTES = (
    "Demo scale: drawn scenes, a decoder of some hundred thousand parameters and minutes of "
    "training on two cores. It shows that the machinery works from data to table, and at best the "
    "direction of a difference; its figures cannot be compared with the published ones.",
    "One seed for each row: differences of a few points mean nothing.",
)
_PAPER_NOTES = (
    "Evaluated on the first 2,000 queries of each task: COCO's val2017, and the regions of the "
    "images of DenseCap's split `val` of Visual Genome that are of classes seen in training.",
)


def _demo(steps: int, *settings: str, evaluation: tuple[str, ...] = ()) -> _Base:
    return _Base(
        "modern_demo",
        "modern_demo",
        _SCENES,
        _HELD_OUT_SCENES,
        (f"training.steps={steps}", "training.save_every=100", *settings),
        ("--batch", "16", *evaluation),
        _DEMO_POSITIONS,
    )


OF_SHAPES = (
    "synthetic.world=shapes",
    "synthetic.classes=2000",
    "captioning.classes=[arrow, bolt, crescent, cross, disc, flower, heart, hexagon, ring, square, "
    "star, triangle]",
)
"""What the data recipe of the demo needs for scenes of the world `shapes`."""


def unlike_training() -> Shards:
    """Scenes of a drawn world that no row of a table is trained on, for the model of Table 4."""
    return Shards("shapes_val", "modern_demo", (*_HELD_OUT_SCENES, *OF_SHAPES), "val")


def _paper(recipe: str, data: str, *settings: str) -> _Base:
    return _Base(
        data,
        recipe,
        settings=settings,
        evaluation=("--limit", "2000", "--batch", "32"),
        positions=_PAPER_128_POSITIONS if data == "ablation_128" else _PAPER_256_POSITIONS,
    )


def _table1(scale: Scale) -> PaperTable:
    one: tuple[str, ...] = ("captioning=null",)
    if scale == "demo":
        # Only scenes of this world are larger than the image that is shown, so that objects may be
        # small, and the part that is shown may be chosen.
        shapes = ("synthetic.world=shapes", "synthetic.classes=2000", "caption.box=text")
        base = _demo(500, "training.task_weights=null")
        one += shapes
    else:
        steps = _epochs(20, SEGMENTATION)
        base = _paper("ablation_128", "ablation_128", *_SINGLE_TASK, steps)
    everything = ("segmentation.small_objects=true", "segmentation.object_scale=any")
    evaluated = base.hold_out("table1_val", (*one, *everything))
    rows = []
    for name, small, objects in (
        ("small_any", "true", "any"),
        ("any", "false", "any"),
        ("small_large", "true", "large"),
        ("large", "false", "large"),
    ):
        own = (f"segmentation.small_objects={small}", f"segmentation.object_scale={objects}")
        run = base.run(f"table1_{name}", "masks", (*one, *own), evaluated=evaluated)
        rows.append(Row(name, (Score(run, SEGMENTATION),)))
    note = (
        "All rows are evaluated on one set of queries: objects of every size, in the largest "
        "square of their image. (A `large` crop is centred on the true object, so that a constant "
        "disc in its middle would score high there.)"
    )
    return _table("table1", scale, rows, note)


def _table2(scale: Scale) -> PaperTable:
    if scale == "demo":
        base = _demo(500, "training.task_weights=null")
    else:
        steps = _epochs(20, CAPTIONING)
        base = _paper("ablation_128", "ablation_128", *_SINGLE_TASK, steps)
    rows = []
    for name, box, kind in (
        ("no_box", "none", "masks"),
        ("box_image", "image", "boxes"),
        ("box_text", "text", "masks"),
    ):
        run = base.run(f"table2_{name}", kind, ("segmentation=null", f"caption.box={box}"))
        rows.append(Row(name, (Score(run, CAPTIONING),)))
    return _table("table2", scale, rows)


def _table3(scale: Scale) -> PaperTable:
    """All rows share their shards; a single task is drawn from them by its weight."""
    if scale == "demo":
        base = _demo(250)
    else:
        base = _paper("paper_256", "coco_vg_256", _epochs(20, SEGMENTATION, CAPTIONING))

    def run(name: str, *settings: str, evaluated: Shards | None = None) -> Run:
        return base.run(
            f"table3_{name}",
            "boxes",
            settings=settings,
            data_name=_both(scale),
            evaluated=evaluated,
        )

    single = []
    for task in (SEGMENTATION, CAPTIONING):
        evaluated = _hold_out_one(base, scale, task)
        alone: tuple[str, ...]
        alone = (f"training.task_weights={{{task}: 1}}", "model.feed_forward=dense")
        if scale == "paper":
            alone += (_epochs(20, task),)
        model = run(f"{task}_alone", *_SINGLE_TASK, *alone, evaluated=evaluated)
        single.append(Score(model, task))
    rows = [Row("single", tuple(single))]
    for name, feed_forward, sampling in (
        ("dense", "dense", _JOINT),
        ("gshard", "token", _JOINT),
        ("attributes", "attributes", _JOINT),
        ("dense_mt", "dense", _MT),
        ("attributes_mt", "attributes", _MT),
    ):
        watched = _watched(scale) if sampling is _MT else ()
        model = run(name, *sampling, f"model.feed_forward={feed_forward}", *watched)
        rows.append(Row(name, (Score(model, SEGMENTATION), Score(model, CAPTIONING))))
    notes = [
        "Without MT, tasks are mixed in every batch in proportion to their episodes, with AdamW. "
        "With MT, a step has one task, drawn by the square root of its number of episodes, with "
        "MT-AdamW. The two models of single tasks are dense."
    ]
    if scale == "paper":
        notes.append("20 epochs, as the paper's ablations.")
    return _table("table3", scale, rows, *notes)


def _watched(scale: Scale) -> tuple[str, ...]:
    """What Figure 6 needs of a run. At demo scale all of its few checkpoints are kept."""
    if scale == "demo":
        return ("training.gradient_report_every=10", "training.keep_checkpoints=3")
    return ("training.gradient_report_every=100",)


def _table4(scale: Scale) -> PaperTable:
    if scale == "demo":
        model = _demo(900).run("both", "boxes", data_name=_both(scale))
    else:
        model = _with_category(scale)
    others = [
        Row(name)
        for name in ("fptrans", "vat", "dcama", "grit", "seggpt_448", "seggpt_256", "openflamingo")
    ]
    ours = Row("ours", (Score(model, SEGMENTATION), Score(model, CAPTIONING)))
    note = (
        "Other systems were not run here; `icl-moe predictions` writes what they are to predict, "
        "and `icl-moe evaluate --predictions` scores it on the same queries."
    )
    return _table("table4", scale, [*others, ours], note)


def _table6(scale: Scale) -> PaperTable:
    alone: tuple[str, ...]
    evaluated: Shards | None
    if scale == "demo":
        base = _demo(300, "training.loss_on=all", "training.task_weights=null", evaluation=_PLAIN)
        data: tuple[str, ...] = ("segmentation=null", "examples=3")
        data_name, alone, evaluated = "captions_three", (), None
    else:
        steps = _epochs(40, CAPTIONING)
        base = _paper("paper_256", "coco_vg_256", *_SINGLE_TASK, steps)
        data, data_name = (), _both(scale)
        alone = (f"training.task_weights={{{CAPTIONING}: 1}}",)
        evaluated = _hold_out_one(base, scale, CAPTIONING)
    rows = []
    for name, weight in (("output", "0"), ("input", "1"), ("half", "0.5")):
        settings = (
            *alone,
            f"training.input_loss_weight={weight}",
            "training.input_loss=mean",
        )
        run = base.run(f"table6_{name}", "three", data, settings, (1, 2, 3), data_name, evaluated)
        rows += [Row(f"{name}_{shots}", (Score(run, CAPTIONING, shots),)) for shots in run.shots]
    note = (
        "The paper does not say how its two losses are averaged; here the step's mean loss of "
        "inputs is weighed against its mean loss of outputs (training.input_loss=mean)."
    )
    return _table("table6", scale, rows, note)


def _table7(scale: Scale) -> PaperTable:
    base = _demo(400) if scale == "demo" else _paper("paper_256", "coco_vg_256")

    def run(name: str, category: str) -> Run:
        data = (f"caption.category={category}",)
        if scale == "paper":
            return base.run(name, "three", data, shots=(1, 2, 3))
        # Trained with one example, so that masks are written in one pass: a model reads more of
        # them in groups of one.
        evaluated = base.hold_out(f"{name}_val", ("examples=3", *data))
        return base.run(name, "boxes", data, shots=(1, 2, 3), evaluated=evaluated)

    label = base.run("table7_label", "label", ("examples=0", "class_prompt=true"), shots=(0,))
    plain = run("table7_plain", "none")
    category = run("table7_category", "written") if scale == "demo" else _with_category(scale)
    rows = [Row("label", (Score(label, SEGMENTATION, 0), Score(label, CAPTIONING, 0)))]
    for name, trained_run in (("plain", plain), ("category", category)):
        rows += [
            Row(
                f"{name}_{shots}",
                (Score(trained_run, SEGMENTATION, shots), Score(trained_run, CAPTIONING, shots)),
            )
            for shots in trained_run.shots
        ]
    return _table("table7", scale, rows)


_PLAIN = ("--control", "none", "--decoding", "autoregressive")
"""Options of the evaluation of models with fewer examples than they were trained with: in training
they saw hidden masks only after all examples, so they write masks code by code.
"""


def _with_category(scale: Scale) -> Run:
    """The paper's model, which Tables 4 and 7 share."""
    base = _paper("paper_256", "coco_vg_256")
    return base.run("paper_256", "three", shots=(1, 2, 3), data_name=_both(scale))


def _hold_out_one(base: _Base, scale: Scale, task: str) -> Shards:
    """Held-out episodes of one task, the same as in the shards of both tasks."""
    other = {SEGMENTATION: CAPTIONING, CAPTIONING: SEGMENTATION}[task]
    return base.hold_out(f"{_both(scale)}_val_{task}", (f"{other}=null",))


def _both(scale: Scale) -> str:
    return "both" if scale == "demo" else "coco_vg_256"


def _table(name: str, scale: Scale, rows: list[Row], *notes: str) -> PaperTable:
    common = _DEMO_NOTES if scale == "demo" else _PAPER_NOTES
    return PaperTable(name, scale, tuple(rows), (*common, *notes))


TABLES = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table6": _table6,
    "table7": _table7,
}
"""The name of each table -> what makes it at a scale."""
