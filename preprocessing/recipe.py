"""The data recipe, for `icl-moe shards build`."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from icl_moe.errors import InputError
from icl_moe.ranges import Count, ImageSide, Natural, Range, Share
from icl_moe.sequence import PromptLength, SequenceFormat
from icl_moe.vocabulary import Vocabulary

ObjectScale = Literal["any", "large"]


@dataclass(frozen=True)
class CaptionText:
    """What a caption contains besides its text; see `SequenceFormat`."""

    category: Literal["none", "written", "given"] = "written"
    box: Literal["none", "text", "image"] = "text"


_PATHS = (
    *("images", "annotations", "masks", "names", "examples_images", "examples_annotations"),
    *("instances", "regions", "objects", "image_data", "splits"),
)
"""The keys of a source that name files or folders."""


class _Source:
    def path(self, key: str) -> Path:
        """The file or folder under `key`; the recipe has checked that it is given."""
        return Path(getattr(self, key))

    def paths(self) -> dict[str, Path]:
        """Key -> the file or folder that it names, for the keys that are given."""
        return {key: self.path(key) for key in _PATHS if getattr(self, key, None) is not None}


@dataclass(frozen=True)
class ComposedImages:
    """The compositions that `source: composed` makes of a data set's objects and images.

    images: how many compositions. pasted: the most objects pasted into one image; at least one is
    pasted if any fits. With 0, a composition is an augmented photograph: a random square part of
    it, perhaps mirrored, in another light.
    balance: a class is pasted in proportion to instances^(1 - balance): 0 pastes classes as often
    as the data set has instances of them, 1 all equally often.
    same_instance: the share of episodes whose pairs all show the same object, pasted into different
    images with other lighting, rotation and size.
    photographs: whether the original images join the pool.
    """

    images: Count = 2000
    seed: Natural = 0
    pasted: Annotated[int, Range(0, 8)] = 3
    balance: Share = 0.5
    same_instance: Share = 0.0
    photographs: bool = True


@dataclass(frozen=True)
class SegmentationSource(_Source):
    """Where class masks come from: COCO's instances format, LVIS, a folder of masks, lines of
    JSON, compositions of such a data set's own objects, or drawn scenes in COCO's format.

    images: the folder of images. annotations: the instances file (source=coco, lvis, composed), or
    the file of lines (source=jsonl).
    masks, names: the folder of masks, files whose names are those of the images except for the
    ending, and the file that says which class an id or a colour of them stands for; null where each
    mask marks one object in white (source=folder; composed instead of annotations). masks is also
    the folder of the mask files that lines name; null means that of the images (source=jsonl).
    examples_images, examples_annotations: the same for a second data set, from which all examples
    come, while the first provides only queries; for example, training images as examples for
    validation images (source=coco).
    composed: the settings of the compositions (source=composed).
    classes_per_mask: 1 for masks of one class, white on black (the task segmentation); n for
    pictures of 2 to n classes, each in a colour that the examples give (the task
    semantic_segmentation).
    classes: the classes to use; null means all in the file.
    small_objects: keep images in which all instances of the class have less than 32^2 pixels.
    marks: masks of the whole `class` in an image, or of its `largest_instance`; the rest of the
    class is then background. Crowds are never an instance.
    object_scale: the part of an image that is shown; `any` is the largest square, `large` a square
    close around the class's largest instance.
    least_scale: leave out masks that cover less than this share of what the pair shows.
    crowds: annotations with iscrowd=1 `join` the mask of their class, or count as `instances`, for
    files of tools that mark all masks so.
    absent: the share of queries that lack the class of their examples, so that their mask is empty.
    The source's annotations must name every class that an image shows (source=coco, folder,
    composed, synthetic).
    """

    source: Literal["coco", "lvis", "folder", "jsonl", "composed", "synthetic"] = "coco"
    images: str | None = None
    annotations: str | None = None
    masks: str | None = None
    names: str | None = None
    examples_images: str | None = None
    examples_annotations: str | None = None
    classes: tuple[str, ...] | None = None
    small_objects: bool = True
    marks: Literal["class", "largest_instance"] = "class"
    object_scale: ObjectScale = "any"
    least_scale: Share = 0.0
    crowds: Literal["join", "instances"] = "join"
    absent: Annotated[float, Range(0, 0.9)] = 0.0
    classes_per_mask: Annotated[int, Range(1, 7)] = 1  # There are seven colours.
    composed: ComposedImages = ComposedImages()


@dataclass(frozen=True)
class CaptioningSource(_Source):
    """Where region descriptions come from: Visual Genome, COCO's captions, captions of single
    instances, lines of JSON, or drawn scenes in one of these formats.

    images: the folder of images. annotations, instances: the captions and the instances file
    (source=coco_captions, instance_captions). annotations: the file of lines, and masks: the
    folder of the mask files that lines without a box name, null for that of the images
    (source=jsonl).
    styles: the styles of the captions to use; null means all (source=instance_captions, and
    synthetic with synthetic.world=classes).
    regions, objects, image_data: the three files of Visual Genome (source=visual_genome). splits,
    split: a JSON file of named lists of image ids (such as DenseCap's), and the name of the list to
    use, since Visual Genome defines no split.
    classes: the classes to use; null means COCO's 80, or all of the instances file
    (source=instance_captions). min_descriptions: classes with at most this many descriptions are
    left out. counted_split: the list of `splits` whose descriptions are counted for that, by
    default `split`; so held-out shards can keep the classes of the training shards
    (source=visual_genome).
    """

    source: Literal["visual_genome", "coco_captions", "instance_captions", "jsonl", "synthetic"] = (
        "visual_genome"
    )
    images: str | None = None
    annotations: str | None = None
    masks: str | None = None
    instances: str | None = None
    regions: str | None = None
    objects: str | None = None
    image_data: str | None = None
    splits: str | None = None
    split: str | None = None
    counted_split: str | None = None
    classes: tuple[str, ...] | None = None
    styles: tuple[str, ...] | None = None
    min_descriptions: Natural = 100


@dataclass(frozen=True)
class SyntheticScenes:
    """The drawn data set that `source: synthetic` reads. images: how many. split: its name.

    world: `shapes`, twelve classes that keep their shape (synthetic.py); `classes`, thousands of
    composed classes in scenes of image_size pixels (world.py). Its split `val` shows only the
    classes that are held out from `train`.
    classes: the number of classes in the scenes of the split `train` (world=classes). With fewer
    images than classes, some do not appear.
    hard_neighbours: the share of scenes with two objects of the same outline or fill colour
    (world=classes).
    """

    images: Count = 1000
    seed: Natural = 0
    split: Literal["train", "val"] = "train"
    world: Literal["shapes", "classes"] = "shapes"
    classes: Annotated[int, Range(4, 100_000)] = 2000
    hard_neighbours: Share = 0.5


@dataclass(frozen=True)
class DataRecipe:
    """Settings of one shard folder.

    episodes, episodes_data: a file of `icl-moe episodes`, and the data set's folder that it was
    made of. Then the shards hold its episodes, and the settings of other sources, `examples` and
    `samples` have no effect.
    tasks: the sections of tasks that other packages register; see sources.py.
    tokenizer: the folder of a VQGAN, or the name of a shipped one; null if mask_tokenizer and
    features_tokenizer encode everything. tokenizer_precision: bf16 encodes faster and changes a few
    codes in a thousand (docs/tokenizer.md). mask_tokenizer: the folder of a PatchTokenizer, or the
    name of a shipped one, for masks and drawn boxes; null uses the image tokenizer.
    features_tokenizer: the folder of a FeaturesTokenizer, for input images; null uses the image
    tokenizer. text_tokenizer: see `TextTokenizer`'s source. image_size: side in pixels of the
    images that the tokenizers see. examples: pairs before the query in each episode.
    samples: episodes per task; null means one for each region of the pool as the query.
    balance: 0 takes each region as the query in turn; above that, queries are drawn, a class's in
    proportion to its regions^(1 - balance), so that 1 asks for all classes equally often.
    shard_size: samples in a shard. missing_images: `stop` at annotated images that do not exist, or
    `skip` and count them. bad_images: the same for images that cannot be read or whose size differs
    from their record; the manifest lists them.
    """

    tokenizer: str | None
    mask_tokenizer: str | None = None
    features_tokenizer: str | None = None
    segmentation: SegmentationSource | None = None
    captioning: CaptioningSource | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    episodes: str | None = None
    episodes_data: str | None = None
    synthetic: SyntheticScenes = SyntheticScenes()
    image_size: ImageSide = 256
    examples: Natural = 3
    seed: Natural = 0
    samples: Count | None = None
    balance: Share = 0.0
    shard_size: Count = 4096
    missing_images: Literal["stop", "skip"] = "stop"
    bad_images: Literal["stop", "skip"] = "stop"
    tokenizer_precision: Literal["fp32", "bf16"] = "fp32"
    vocabulary: Vocabulary = Vocabulary()
    text_tokenizer: str = "auto"
    caption: CaptionText = field(default_factory=CaptionText)
    class_prompt: bool = False
    prompt_length: PromptLength = 16

    def __post_init__(self) -> None:
        if (self.episodes is None) != (self.episodes_data is None):
            raise InputError(
                "episodes and episodes_data go together: a file of `icl-moe episodes`, and the "
                "folder of the data set that it was made of."
            )
        sections = (self.segmentation, self.captioning, self.episodes)
        if sections == (None, None, None) and not self.tasks:
            raise InputError("a data recipe needs a section 'segmentation', 'captioning' or both.")
        for name in ("segmentation", "captioning"):
            section = getattr(self, name)
            if section is not None and section.classes == ():
                raise InputError(
                    f"{name}.classes must name at least one class, or be null for all classes."
                )
        if self.segmentation is not None:
            self._check_files(self.segmentation)
        if not self.examples and not self.class_prompt:
            raise InputError(
                "examples may be 0 only with class_prompt=true: otherwise nothing tells what is "
                "asked of the query."
            )
        self._check_tokenizers()
        self._check_parts()
        if self.draws_scenes and self.synthetic.world == "classes" and self.image_size < 32:
            raise InputError(
                "image_size must be at least 32 where synthetic.world=classes, not "
                f"{self.image_size}: in smaller scenes classes cannot be told apart."
            )
        if self.captioning is not None and self.captioning.source == "visual_genome":
            _require("captioning", self.captioning, ("images", "regions", "objects", "image_data"))
            if (self.captioning.splits is None) != (self.captioning.split is None):
                raise InputError(
                    "captioning.splits and captioning.split go together: a file, and the name of a "
                    "list in it."
                )
            if self.captioning.counted_split is not None and self.captioning.split is None:
                raise InputError(
                    "captioning.counted_split needs captioning.splits and captioning.split."
                )
        if self.captioning is not None and self.captioning.source.endswith("_captions"):
            _require("captioning", self.captioning, ("images", "annotations", "instances"))
        if self.captioning is not None and self.captioning.source == "jsonl":
            _require("captioning", self.captioning, ("images", "annotations"))
        elif self.captioning is not None and self.captioning.masks is not None:
            raise InputError("captioning.masks needs captioning.source=jsonl.")
        if self.captioning is not None and self.captioning.styles is not None:
            self._check_styles(self.captioning)
        self.sequence_format(codes_per_image=1)  # checks the vocabulary against the text settings

    def _check_files(self, segmentation: SegmentationSource) -> None:
        source = segmentation.source
        if source == "folder" or (source == "composed" and segmentation.masks is not None):
            _require("segmentation", segmentation, ("images", "masks"))
        elif source != "synthetic":
            _require("segmentation", segmentation, ("images", "annotations"))
        may_have = {
            "masks": ("folder", "composed", "jsonl"),
            "names": ("folder", "composed") if segmentation.masks is not None else (),
        }
        for key, sources in may_have.items():
            if getattr(segmentation, key) is not None and source not in sources:
                needed = "segmentation.source=folder" if source != "folder" else "masks"
                raise InputError(f"segmentation.{key} needs {needed}.")

    def _check_tokenizers(self) -> None:
        if self.tokenizer is None and None in (self.mask_tokenizer, self.features_tokenizer):
            raise InputError(
                "tokenizer may be null only where mask_tokenizer and features_tokenizer are "
                "given: both images and masks need a tokenizer."
            )
        if self.features_tokenizer is None and self.vocabulary.features:
            raise InputError(
                f"vocabulary.features is {self.vocabulary.features}, but the recipe names no "
                "features_tokenizer; set it to 0."
            )

    def _check_parts(self) -> None:
        """Raise InputError for settings that would have no effect in this recipe."""
        segmentation, plain = self.segmentation, SyntheticScenes()
        if segmentation is not None and segmentation.source != "composed":
            for f in fields(ComposedImages):
                if getattr(segmentation.composed, f.name) != getattr(ComposedImages(), f.name):
                    raise InputError(
                        f"segmentation.composed.{f.name} needs segmentation.source=composed."
                    )
        if segmentation is not None:
            if segmentation.composed.same_instance and not segmentation.composed.pasted:
                raise InputError(
                    "segmentation.composed.same_instance is of pasted objects; set it to 0, or "
                    "segmentation.composed.pasted to at least 1."
                )
            examples = (segmentation.examples_images, segmentation.examples_annotations)
            if any(examples) and (segmentation.source != "coco" or not all(examples)):
                raise InputError(
                    "segmentation.examples_images and segmentation.examples_annotations go "
                    "together, with segmentation.source=coco."
                )
            if segmentation.absent and segmentation.source in ("lvis", "jsonl"):
                raise InputError(
                    f"segmentation.absent must be 0 where segmentation.source={segmentation.source}"
                    ": its records do not name every class that an image shows."
                )
            if segmentation.absent and segmentation.classes_per_mask > 1:
                raise InputError(
                    "segmentation.absent must be 0 where segmentation.classes_per_mask is above 1."
                )
            if segmentation.marks != "class" and segmentation.source == "folder":
                raise InputError(
                    "segmentation.marks=largest_instance needs annotations of instances; a folder "
                    "of masks has whole classes."
                )
            if segmentation.classes_per_mask > 1 and segmentation.composed.same_instance:
                raise InputError(
                    "segmentation.composed.same_instance must be 0 where "
                    "segmentation.classes_per_mask is above 1."
                )
        for name in ("classes", "hard_neighbours"):
            if self.synthetic.world == "shapes" and (
                getattr(self.synthetic, name) != getattr(plain, name)
            ):
                raise InputError(f"synthetic.{name} needs synthetic.world=classes.")

    def _check_styles(self, captioning: CaptioningSource) -> None:
        draws_classes = captioning.source == "synthetic" and self.synthetic.world == "classes"
        if captioning.source != "instance_captions" and not draws_classes:
            raise InputError(
                "captioning.styles needs captions that have styles: "
                "captioning.source=instance_captions, or synthetic with synthetic.world=classes."
            )
        if not captioning.styles:
            raise InputError(
                "captioning.styles must name at least one style, or be null for all styles."
            )

    @property
    def draws_scenes(self) -> bool:
        return any(
            section is not None and section.source == "synthetic"
            for section in (self.segmentation, self.captioning)
        )

    def of_episodes(self, shots: int) -> "DataRecipe":
        """This recipe of `episodes` without what has no effect then."""
        return replace(
            self, segmentation=None, captioning=None, tasks={}, examples=shots, samples=None
        )

    def sequence_format(self, codes_per_image: int) -> SequenceFormat:
        return SequenceFormat(
            vocabulary=self.vocabulary,
            codes_per_image=codes_per_image,
            category=self.caption.category,
            box=self.caption.box,
            class_prompt=self.class_prompt,
            prompt_length=self.prompt_length,
        )

    def with_scenes_in(self, folder: Path) -> "DataRecipe":
        """This recipe with `source: synthetic` resolved to the files that `write_dataset` of
        `synthetic`, or of `world`, wrote into `folder`.
        """
        images = str(folder / "images")
        instances = str(folder / f"instances_{self.synthetic.split}.json")
        segmentation, captioning = self.segmentation, self.captioning
        if segmentation is not None and segmentation.source == "synthetic":
            segmentation = replace(
                segmentation, source="coco", images=images, annotations=instances
            )
        if (
            captioning is not None
            and captioning.source == "synthetic"
            and self.synthetic.world == "classes"
        ):
            captioning = replace(
                captioning,
                source="instance_captions",
                images=images,
                annotations=str(folder / f"captions_{self.synthetic.split}.json"),
                instances=instances,
            )
        if captioning is not None and captioning.source == "synthetic":
            regions, objects, image_data = (
                str(folder / f"{name}.json")
                for name in ("region_descriptions", "objects", "image_data")
            )
            captioning = replace(
                captioning,
                source="visual_genome",
                images=images,
                regions=regions,
                objects=objects,
                image_data=image_data,
            )
        return replace(self, segmentation=segmentation, captioning=captioning)


def _require(
    section: str, settings: SegmentationSource | CaptioningSource, keys: tuple[str, ...]
) -> None:
    given = {f.name: getattr(settings, f.name) for f in fields(settings)}
    for key in keys:
        if given[key] is None:
            raise InputError(f"{section}.source={settings.source} needs the key '{section}.{key}'.")
