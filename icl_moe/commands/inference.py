"""`icl-moe segment`, `caption`, `label` and `web`: what is done with a model."""

import argparse
import io
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from icl_moe import arguments as take
from icl_moe.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from icl_moe.inference.model import InContextModel


def add_segment(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("segment", help="segment an image according to examples")
    take.add_examples(parser, "MASK")
    parser.add_argument("--category", help="the class's name, for models with a class prompt")
    parser.add_argument(
        "--out",
        required=True,
        metavar="MASK.png",
        help="the mask, white on black (or in colours); it may end in .png, .bmp or .tiff",
    )
    parser.add_argument(
        "--confidence",
        metavar="FILE.png",
        help="also write the confidence of each pixel (parallel decoding): black is 50%%",
    )
    parser.add_argument(
        "--colours",
        action="store_true",
        help="the masks show several classes, each in a colour; so does the answer",
    )
    take.add_windows(parser)
    take.add_shifts(parser)
    take.add_decoding(parser)
    take.add_place(parser)
    parser.set_defaults(run=_segment)


def add_caption(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("caption", help="caption an image according to examples")
    take.add_examples(parser, "REGION.json")
    parser.add_argument("--category", help="the class's name, for models that need it")
    take.add_place(parser)
    parser.set_defaults(run=_caption)


def add_label(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("label", help="label a folder of images according to examples")
    parser.add_argument("model", type=take.model, help=take.MODEL)
    parser.add_argument(
        "--examples",
        type=take.path,
        metavar="DIR",
        help="DIR/images and DIR/masks with files of equal names; for several classes "
        "DIR/masks/CLASS, or DIR/CLASS/images and DIR/CLASS/masks",
    )
    parser.add_argument(
        "--images", type=take.path, required=True, metavar="DIR", help="the images to label"
    )
    parser.add_argument("--category", help="the class's name, if the examples show one class")
    parser.add_argument(
        "--out", required=True, metavar="FILE.json", help="the COCO instances file to write"
    )
    parser.add_argument(
        "--review",
        metavar="FILE.html",
        help="also write a page of the images with their masks, the least sure first",
    )
    parser.add_argument(
        "--nearest",
        type=take.whole_number(1),
        metavar="N",
        help="ask each image with the N examples whose images are most like it (default: all)",
    )
    parser.add_argument(
        "--split",
        action="store_true",
        help="each connected part of a mask is an instance (default: one for each class)",
    )
    parser.add_argument(
        "--least-area",
        type=take.number(0.0, 100.0),
        default=0.05,
        metavar="PERCENT",
        help="leave out instances of less than so many percent of their image (%(default)s)",
    )
    parser.add_argument(
        "--least-score",
        type=take.number(0.0, 1.0),
        default=0.0,
        metavar="S",
        help="leave out instances with a score below S, 0 to 1 (%(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --out and --review if they exist"
    )
    parser.add_argument(
        "--batch",
        type=take.whole_number(1),
        default=8,
        help="images read and decoded together (default 8)",
    )
    take.add_windows(parser)
    take.add_shifts(parser)
    take.add_decoding(parser)
    take.add_place(parser)
    parser.set_defaults(run=_label)


def add_web(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("web", help="serve a page for marking examples and finding the rest")
    parser.add_argument(
        "model",
        nargs="?",
        type=take.model,
        default="photographs",
        help=f"{take.MODEL} (%(default)s)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve at: %(default)s, the default, is for this machine alone; 0.0.0.0 "
        "also for others, without a password",
    )
    take.add_whole_number(parser, "--port", 0, 7860, "port; 0 takes any free one", 65535)
    take.add_place(parser)
    parser.set_defaults(run=_web)


def _segment(options: argparse.Namespace) -> int:
    from icl_moe.outputs import output_file

    inputs = [options.query, *(path for example in options.example for path in example)]
    endings = tuple(_PICTURE_FORMATS)
    out = output_file(options.out, endings, inputs)
    sure = options.confidence and output_file(options.confidence, endings, inputs)
    if sure and sure.resolve() == out.resolve():
        raise InputError("--out and --confidence are one file; choose another name for one.")
    if options.colours and (sure or options.windows or options.shifts):
        raise InputError("--colours goes with none of --confidence, --windows and --shifts.")

    model = _load_for_masks(options)
    if options.colours:
        return _segment_colours(model, options, out)
    if sure and model.decoding(options.decoding) == "autoregressive":
        raise InputError(
            "--confidence needs masks in one pass, which this model does not support or "
            "--decoding excludes."
        )
    drawn = model.draw_mask(
        options.example,
        query=options.query,
        category=options.category,
        progress=True,
        decoding=options.decoding,
        windows=options.windows,
        shifts=options.shifts,
    )
    _write_levels(out, drawn.mask_HW)
    if sure and drawn.confidence_HW is not None:
        _write_levels(sure, 2 * drawn.confidence_HW - 1)
    print(f"{out}: {drawn.mask_HW.mean():.1%} of the image{_cost(options, drawn.windows)}")
    return 0


def _load_for_masks(options: argparse.Namespace) -> "InContextModel":
    from icl_moe.inference.model import InContextModel

    model = InContextModel.from_pretrained(options.model, options.device, options.dtype)
    if not options.edges:
        model.edges = None
    return model


def _segment_colours(model: "InContextModel", options: argparse.Namespace, out: Path) -> int:
    painted_HW3 = model.segment_colours(
        options.example,
        query=options.query,
        category=options.category,
        progress=True,
        decoding=options.decoding,
    )
    _write_picture(out, painted_HW3)
    print(f"{out}: {painted_HW3.any(axis=2).mean():.1%} of the image in colours")
    return 0


_PICTURE_FORMATS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
"""File suffixes of image formats that store a mask without loss."""


def _write_levels(path: Path, levels_HW: "np.ndarray") -> None:
    """Write levels from 0 (black) to 1 (white) as a greyscale picture."""
    _write_picture(path, (levels_HW * 255.0).round().astype("uint8"))


def _write_picture(path: Path, picture: "np.ndarray") -> None:
    from PIL import Image

    from icl_moe.outputs import write_output

    content = io.BytesIO()
    Image.fromarray(picture).save(content, _PICTURE_FORMATS.get(path.suffix.lower(), "PNG"))
    write_output(path, content.getvalue())


def _caption(options: argparse.Namespace) -> int:
    import dataclasses
    import json

    from icl_moe.inference.model import InContextModel

    model = InContextModel.from_pretrained(options.model, options.device, options.dtype)
    region = model.caption(
        options.example, query=options.query, category=options.category, progress=True
    )
    print(json.dumps(dataclasses.asdict(region), ensure_ascii=False))
    return 0


def _label(options: argparse.Namespace) -> int:
    from icl_moe.labelling.folders import (
        are_of_one_class,
        check_new,
        find_examples,
        find_images,
        label_output,
    )
    from icl_moe.labelling.journal import journal_of

    out = label_output(options.out, ".json", options.images)
    review = options.review and label_output(options.review, ".html", options.images)
    # An unfinished run may have written its outputs already, but not have removed its journal.
    if not options.overwrite and not journal_of(out).exists():
        check_new(out, *([review] if review else ()))
    if options.category is not None and not options.category.strip():
        raise InputError("--category is blank; it must be the name of a class.")
    if options.examples is None and options.category is None:
        raise InputError(
            "There is nothing to go by: set --examples, or --category for a model with a class "
            "prompt."
        )
    examples = (
        {options.category: ()}
        if options.examples is None
        else find_examples(options.examples, options.category)
    )
    files = find_images(options.images, examples)

    from icl_moe.labelling.run import Labelling, label
    from icl_moe.tasks import SEGMENTATION

    model = _load_for_masks(options)
    if options.category is None and are_of_one_class(options.examples):
        # The name that the output file gives their class would be a wrong one for a class prompt.
        model.check_request(SEGMENTATION, examples=1, category=None)
    labelling = Labelling(
        examples,
        options.images,
        files,
        options.nearest,
        options.split,
        options.least_area / 100,
        options.least_score,
        options.windows,
        options.shifts,
        options.decoding,
        options.batch,
    )
    count = label(model, labelling, out, review)
    left_out = f"; left out: {_counted(count.unread, 'file')} that cannot be read"
    print(
        f"{out}: {_counted(count.instances, 'instance')} in {_counted(count.images, 'image')}"
        f"{_cost(options, count.windows)}{left_out if count.unread else ''}"
    )
    return 0


def _cost(options: argparse.Namespace, windows: int) -> str:
    """What was read in addition, for the line that a command ends with."""
    read = f", read once whole and in {_counted(windows, 'window')}" if options.windows else ""
    shifts = f"{',' if read else ', read'} four times, shifted" if options.shifts else ""
    return read + shifts


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _web(options: argparse.Namespace) -> int:
    from icl_moe.web.serve import serve

    try:
        serve(options.model, options.host, options.port, options.device, options.dtype)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # Without a word: it is how the command ends.
    return 0
