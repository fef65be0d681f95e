"""The command line `icl-moe`, with one verb for each stage. Every verb imports what it needs when
it runs, so that --help answers at once.
"""

import argparse
import contextlib
import errno
import io
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from icl_moe import __version__
from icl_moe import arguments as take
from icl_moe.errors import InputError, RankError, UnsavedError
from icl_moe.messages import is_main, say, say_on_main
from icl_moe.ranges import LARGEST_SIDE
from icl_moe.signals import before_the_run

if TYPE_CHECKING:
    import numpy as np


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 if it succeeded; 2, with one sentence on standard
    error, if the input is wrong; 1, with one sentence, if a result could not be saved.
    """
    _prepare_streams()
    done = False
    try:
        try:
            options = parse_arguments(arguments)
            code = options.run(options) or 0
            done = True
            return code
        except SystemExit:  # argparse has printed its message.
            done = True
            raise
        finally:
            sys.stdout.flush()  # Now, while an error of writing can still be handled.
    except InputError as error:
        _say_once(error)
        return 2
    except UnsavedError as error:
        say_on_main(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept.")
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _discard_closed_pipes():
            # The reader of our output, such as `head`, has ended. If the work was not done yet, the
            # exit code must not say that it was: it is the one that other commands have then.
            return 0 if done else 128 + signal.SIGPIPE
        return _answer_system(error)
    finally:
        if arguments is None:
            # Only the interpreter's own clean-up is left: a Ctrl-C ends it without a message.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


_FOR_RANK_0 = 10.0
"""Seconds that a silent rank leaves rank 0 to print the error that both find, before it ends. When
rank 0 has ended, the launcher ends this rank too, without waiting for that time.
"""

_OF_THE_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
)
"""Errors of the machine, which are reported even if they name no file."""


def _answer_system(error: OSError) -> int:
    """Report in one sentence what the operating system refused, and return the exit code. Errors
    that point to a bug in this code are raised again.
    """
    if error.filename is None and error.errno not in _OF_THE_MACHINE:
        raise error
    where = error.filename if error.filename is not None else "standard output or a file"
    try:
        sys.stdout.flush()
    except OSError:
        where = "standard output"
        _discard(sys.stdout)
    say(f"{where}: {error.strerror}.")
    return 2


def _discard_closed_pipes() -> bool:
    """Discard what is written to standard output or standard error if it is a pipe without a
    reader; returns whether there was such a pipe.
    """
    closed = []
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            closed.append(stream)
            _discard(stream)
    return bool(closed)


def _discard(stream: TextIO) -> None:
    """Discard what a stream holds in its buffer, and everything that is written to it later."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _prepare_streams() -> None:
    """Make sure that printing cannot fail: open standard streams that are closed, and escape
    characters in file names that cannot be encoded.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # It gets the lowest free number, which is the stream's own: no other file may get it.
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say_once(error: InputError) -> None:
    """Print an error once. Under a launcher every rank finds the same error, and rank 0 prints it.
    But an error may concern one machine only, so the first rank of every other machine prints it
    with the name of that machine, and a RankError is printed by the rank that raises it.
    """
    if is_main() or isinstance(error, RankError):
        say(str(error))
    elif os.environ.get("LOCAL_RANK") == "0":
        say(str(error), machine=platform.node())
    elif before_the_run():
        # Launchers end all ranks as soon as one has ended, and rank 0 may be slower to find this.
        time.sleep(_FOR_RANK_0)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, by default that of this process. `run` of the result executes it. Ends
    the process with a message, as argparse does, if there is no such command.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse reads positional arguments in one group, so settings after an option remain unparsed.
    if rest and not (
        hasattr(options, "overrides")
        and all("=" in each and not each.startswith("-") for each in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="icl-moe", description="Multimodal in-context learning with a sparse decoder."
    )
    parser.add_argument("--version", action="version", version=f"icl-moe {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_shards(verbs)
    _add_tokenizer(verbs)
    _add_train(verbs)
    _add_export(verbs)
    _add_evaluate(verbs)
    _add_segment(verbs)
    _add_caption(verbs)
    _add_web(verbs)
    _add_label(verbs)
    _add_demo(verbs)
    return parser


def _add_shards(verbs: argparse._SubParsersAction) -> None:
    from preprocessing import cli

    cli.add_parser(verbs)


def _add_tokenizer(verbs: argparse._SubParsersAction) -> None:
    actions = verbs.add_parser(
        "tokenizer", help="train, measure or convert an image tokenizer"
    ).add_subparsers(required=True, metavar="ACTION")

    parser = actions.add_parser("train", help="train a VQ-GAN as a recipe says")
    take.add_recipe(parser, "recipe", "tokenizer_demo")
    parser.add_argument(
        "--out",
        type=take.folder,
        required=True,
        help="folder for the tokenizer, its log and its training state",
    )
    take.add_device(parser)
    parser.set_defaults(run=_tokenizer_train)

    parser = actions.add_parser(
        "evaluate",
        help="measure a tokenizer by its reconstructions, or by its features",
    )
    parser.add_argument("tokenizer", help="a tokenizer's folder, or the name of a shipped one")
    parser.add_argument("images", type=take.path, help="folder of images")
    parser.add_argument(
        "--annotations",
        type=take.path,
        help="COCO instances file of these images, for the mask ceiling or the matcher's queries",
    )
    parser.add_argument(
        "--examples",
        nargs=2,
        type=take.path,
        metavar=("IMAGES", "ANNOTATIONS"),
        help="for a features tokenizer: the source of the matcher's examples and threshold",
    )
    parser.add_argument(
        "--shots", default="1,3", help="for a features tokenizer: numbers of examples (default 1,3)"
    )
    take.add_device(parser)
    take.add_dtype(parser, "precision of the tokenizer (default: float32)")
    parser.set_defaults(run=_tokenizer_evaluate)

    _add_tokenizer_features(actions)

    parser = actions.add_parser(
        "masks", help="learn a tokenizer of black-and-white patches from masks"
    )
    parser.add_argument(
        "masks", help="a shard folder, a path or a URL; or a COCO instances file (.json)"
    )
    side = "of an instances file: pixels along a side of"
    take.add_whole_number(parser, "--codes", 2, 512, "patches")
    take.add_whole_number(parser, "--image-size", 1, 256, f"{side} the images", LARGEST_SIDE)
    take.add_whole_number(parser, "--cell", 1, 16, f"{side} a patch", LARGEST_SIDE)
    parser.add_argument("--out", type=take.folder, required=True, help="folder for the tokenizer")
    parser.set_defaults(run=_tokenizer_masks)

    parser = actions.add_parser("convert", help="convert a taming-transformers checkpoint")
    parser.add_argument("checkpoint", type=take.path, help="the release's last.ckpt")
    parser.add_argument("--config", type=take.path, required=True, help="the release's model.yaml")
    parser.add_argument(
        "--out", type=take.folder, required=True, help="folder for the converted tokenizer"
    )
    parser.set_defaults(run=_tokenizer_convert)


def _add_tokenizer_features(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "features", help="make a tokenizer that reads images by a frozen backbone's features"
    )
    parser.add_argument("images", type=take.path, help="folder of images")
    parser.add_argument(
        "--backbone",
        default="efficientnet_lite0",
        help="efficientnet_lite0, colours, timm/NAME, or a transformers folder or hub id "
        "(default %(default)s)",
    )
    parser.add_argument("--weights", metavar="FILE", help="a file with the backbone's weights")
    parser.add_argument(
        "--strides", default="16,32", help="maps of the backbone to combine (default 16,32)"
    )
    for option, least, default, text in (
        ("--codes", 2, 1024, "codes"),
        ("--dimensions", 1, 64, "number of principal components"),
        ("--seed", 0, 0, "of k-means"),
    ):
        take.add_whole_number(parser, option, least, default, text)
    side = "pixels along a side of"
    take.add_whole_number(parser, "--image-size", 1, 256, f"{side} the images", LARGEST_SIDE)
    take.add_whole_number(parser, "--downsampling", 1, 16, f"{side} a cell", LARGEST_SIDE)
    parser.add_argument(
        "--annotations",
        type=take.path,
        help="COCO instances file of these images: report how much of the features' matching "
        "score the codes retain",
    )
    parser.add_argument("--out", type=take.folder, required=True, help="folder for the tokenizer")
    parser.set_defaults(run=_tokenizer_features)


_MODEL = "an exported model's folder, the name of a shipped model, or OWNER/NAME on the Hub"


def _add_train(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "train", help="train a decoder, alone or under the deepspeed launcher"
    )
    take.add_recipe(parser, "recipe", "paper_256")
    parser.set_defaults(run=_train)


def _add_export(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("export", help="write a checkpoint as one folder for from_pretrained")
    parser.add_argument(
        "checkpoint",
        type=take.path,
        help="a run's output folder (its newest checkpoint), or one step's folder in it",
    )
    parser.add_argument("--out", type=take.folder, required=True, help="folder for the model")
    parser.add_argument(
        "--threshold-from",
        metavar="SHARDS",
        help="training shards for fitting the mask threshold of a model that decodes in parallel",
    )
    take.add_device(parser)
    parser.set_defaults(run=_export)


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("evaluate", help="measure a model on the episodes of a shard folder")
    parser.add_argument("model", type=take.path, help=_MODEL)
    parser.add_argument(
        "shards", help="a shard folder: a path, or a URL such as s3://bucket/folder"
    )
    parser.add_argument(
        "--shots", default="1", help="numbers of examples, such as 0,1,2,3 (default 1)"
    )
    parser.add_argument(
        "--out",
        type=take.folder,
        required=True,
        help="folder for metrics.json, predictions and report.html",
    )
    parser.add_argument(
        "--limit", type=take.whole_number(1), help="evaluate at most this many episodes per task"
    )
    parser.add_argument(
        "--batch",
        type=take.whole_number(1),
        default=8,
        help="episodes decoded together (default 8)",
    )
    parser.add_argument(
        "--control",
        help="how examples are exchanged for comparison: swapped (something else in the query), "
        "shuffled (any other class), both separated by a comma, or none (default: swapped, "
        "if the shards contain the necessary data)",
    )
    _add_decoding(parser)
    _add_place(parser)
    parser.set_defaults(run=_evaluate)


def _add_segment(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("segment", help="segment an image according to examples")
    _add_examples(parser, "MASK")
    parser.add_argument("--category", help="the class's name, for models with a class prompt")
    parser.add_argument(
        "--out",
        required=True,
        metavar="MASK.png",
        help="the mask, white on black; it may end in .png, .bmp or .tiff",
    )
    parser.add_argument(
        "--confidence",
        metavar="FILE.png",
        help="also write the confidence of each pixel (parallel decoding): black is 50%%",
    )
    _add_windows(parser)
    _add_decoding(parser)
    _add_place(parser)
    parser.set_defaults(run=_segment)


def _add_examples(parser: argparse.ArgumentParser, output: str) -> None:
    """A model, examples of an image and its `output`, and a query."""
    parser.add_argument("model", type=take.path, help=_MODEL)
    parser.add_argument(
        "--example",
        nargs=2,
        type=take.path,
        action="append",
        default=[],
        metavar=("IMAGE", output),
        help="may be repeated",
    )
    parser.add_argument("--query", type=take.path, required=True, metavar="IMAGE")


def _add_windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--windows",
        action="store_true",
        help="read what is found again in up to nine overlapping windows, for small objects; "
        "takes as many times as long",
    )


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoding",
        choices=["autoregressive", "parallel"],
        help="decode masks code by code or in one pass (default: parallel if the model was "
        "trained for it)",
    )


def _add_place(parser: argparse.ArgumentParser) -> None:
    take.add_device(parser)
    take.add_dtype(parser, "precision of the decoder's weights (default: that of the model's file)")


def _add_caption(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("caption", help="caption an image according to examples")
    _add_examples(parser, "REGION.json")
    parser.add_argument("--category", help="the class's name, for models that need it")
    _add_place(parser)
    parser.set_defaults(run=_caption)


def _add_web(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("web", help="serve a page for marking examples and finding the rest")
    parser.add_argument(
        "model", nargs="?", type=take.path, default="photographs", help=f"{_MODEL} (%(default)s)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve at: %(default)s, the default, is for this machine alone; 0.0.0.0 "
        "also for others, without a password",
    )
    take.add_whole_number(parser, "--port", 0, 7860, "port; 0 takes any free one", 65535)
    _add_place(parser)
    parser.set_defaults(run=_web)


def _add_label(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("label", help="label a folder of images according to examples")
    parser.add_argument("model", type=take.path, help=_MODEL)
    parser.add_argument(
        "--examples",
        type=take.path,
        metavar="DIR",
        help="DIR/images and DIR/masks with files of equal names, or DIR/CLASS/images and "
        "DIR/CLASS/masks for each class",
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
        "--batch",
        type=take.whole_number(1),
        default=8,
        help="images read and decoded together (default 8)",
    )
    _add_windows(parser)
    _add_decoding(parser)
    _add_place(parser)
    parser.set_defaults(run=_label)


def _add_demo(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("demo", help="the whole pipeline, small, on this machine")
    parser.add_argument(
        "--out",
        type=take.folder,
        default="demo",
        help="folder for all results (default demo)",
    )
    parser.set_defaults(run=_demo)


def _train(options: argparse.Namespace) -> int:
    from icl_moe.signals import listening

    with listening():
        return _train_until_stopped(options)


def _train_until_stopped(options: argparse.Namespace) -> int:
    from icl_moe.recipe import TrainingRecipe
    from icl_moe.settings import load_recipe
    from icl_moe.training.preflight import open_checked

    recipe = load_recipe(TrainingRecipe, options.recipe, options.overrides)
    # These checks precede the import of DeepSpeed, which takes seconds.
    checked = open_checked(recipe, world=int(os.environ.get("WORLD_SIZE", "1")))

    from icl_moe.training.trainer import Trainer

    Trainer(recipe, checked).fit()
    return 0


def _export(options: argparse.Namespace) -> int:
    from icl_moe.outputs import writing
    from icl_moe.training.checkpoint import export

    with writing(options.out):
        step = export(options.checkpoint, options.out, options.threshold_from, options.device)
    print(f"{options.out}: the model after {step} steps")
    return 0


def _tokenizer_train(options: argparse.Namespace) -> int:
    from icl_moe.settings import load_recipe
    from preprocessing.tokenizers.recipe import TokenizerRecipe
    from preprocessing.tokenizers.train import train_tokenizer

    recipe = load_recipe(
        TokenizerRecipe, options.recipe, options.overrides, package="preprocessing.tokenizers"
    )
    with _locked_by_first(options.out):
        train_tokenizer(recipe, options.out, options.device)
    return 0


def _tokenizer_evaluate(options: argparse.Namespace) -> int:
    from icl_moe.tokenizers.folder import folder_kind

    if folder_kind(options.tokenizer) == "features":
        _print_values(_match_photographs(options))
        return 0
    if options.examples is not None:
        raise InputError(
            f"--examples is for a features tokenizer, which {options.tokenizer} is not."
        )
    from preprocessing.tokenizers.measures import evaluate_tokenizer

    _print_values(
        evaluate_tokenizer(
            options.tokenizer,
            options.images,
            options.annotations,
            device=options.device,
            dtype=options.dtype,
        )
    )
    return 0


def _match_photographs(options: argparse.Namespace) -> dict[str, Any]:
    shots = _whole_numbers("--shots", options.shots)
    if min(shots) < 1:
        raise InputError(f"--shots must be at least 1 for a matcher, not {min(shots)}.")
    if options.annotations is None or options.examples is None:
        raise InputError(
            f"{options.tokenizer} is a features tokenizer, which is measured by matching: set "
            "--annotations for the images, and --examples IMAGES ANNOTATIONS."
        )
    from icl_moe.tokenizers.features import FeaturesTokenizer
    from preprocessing.tokenizers.matching import evaluate_matcher, read_photographs

    tokenizer = FeaturesTokenizer.from_pretrained(options.tokenizer)
    queries = read_photographs(tokenizer, options.images, options.annotations)
    examples = read_photographs(tokenizer, *options.examples)
    return evaluate_matcher(tokenizer, queries, examples, shots)


def _tokenizer_features(options: argparse.Namespace) -> int:
    strides = tuple(_whole_numbers("--strides", options.strides))

    from icl_moe.outputs import output_folder, writing
    from icl_moe.tokenizers.features import FeaturesConfig
    from icl_moe.tokenizers.folder import check_free
    from preprocessing.tokenizers.features import make_features_tokenizer

    out = output_folder(options.out)
    check_free(out)
    config = FeaturesConfig(
        backbone=options.backbone,
        weights=options.weights,
        strides=strides,
        channels=(1,) * len(strides),
        image_size=options.image_size,
        downsampling=options.downsampling,
        codebook_size=options.codes,
        dimensions=options.dimensions,
    )
    with writing(out):
        report = make_features_tokenizer(
            options.images, config, options.seed, out, options.annotations
        )
    _print_values(report)
    return 0


def _print_values(values: dict[str, Any], prefix: str = "") -> None:
    """Print plain values, one per line; those of a nested table are prefixed with `name.`."""
    for name, value in values.items():
        if isinstance(value, dict):
            _print_values(value, f"{prefix}{name}.")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{prefix + name:32} {shown}")


def _tokenizer_masks(options: argparse.Namespace) -> int:
    from icl_moe.outputs import output_folder, writing
    from icl_moe.tokenizers.folder import check_free
    from preprocessing.tokenizers.masks import learn_mask_tokenizer

    out = output_folder(options.out)
    check_free(out)
    tokenizer, report = learn_mask_tokenizer(
        options.masks, options.codes, options.image_size, options.cell
    )
    with writing(out):
        tokenizer.save_pretrained(out)
    print(
        f"{out}: {tokenizer.codes} patches of {tokenizer.side} x {tokenizer.side} pixels, "
        f"fingerprint {tokenizer.fingerprint}; of {report.masks} held-out masks mIoU "
        f"{report.ceiling:.3f} and {report.entropy:.2f} nats per cell"
    )
    return 0


def _tokenizer_convert(options: argparse.Namespace) -> int:
    from icl_moe.tokenizers.vqgan import convert_taming

    tokenizer = convert_taming(options.checkpoint, options.config, options.out)
    size = f"{tokenizer.config.codebook_size} codes at downsampling {tokenizer.downsampling}"
    print(f"{options.out}: {size}, fingerprint {tokenizer.fingerprint}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    shots = _whole_numbers("--shots", options.shots)
    controls = None if options.control is None else options.control.split(",")
    if controls == ["none"]:
        controls = []

    from icl_moe.evaluation.protocol import evaluate
    from icl_moe.evaluation.report import summary

    with _locked_by_first(options.out):
        metrics = evaluate(
            options.model,
            options.shards,
            options.out,
            shots,
            options.limit,
            options.batch,
            controls,
            options.device,
            decoding=options.decoding,
            dtype=options.dtype,
        )
    print(f"{summary(metrics)}\n\nThe report: {options.out / 'report.html'}")
    return 0


def _locked_by_first(out: Path) -> contextlib.AbstractContextManager[None]:
    """The lock of --out; if several processes share the work, the first one takes it."""
    from icl_moe.locks import locked

    return locked(out, "--out") if is_main() else contextlib.nullcontext()


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} must be whole numbers separated by commas, such as 0,1,2,3, not '{text}'."
        ) from None


_PICTURE_FORMATS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
"""File suffixes of image formats that store a mask without loss."""


def _segment(options: argparse.Namespace) -> int:
    from icl_moe.outputs import output_file

    inputs = [options.query, *(path for example in options.example for path in example)]
    endings = tuple(_PICTURE_FORMATS)
    out = output_file(options.out, endings, inputs)
    sure = options.confidence and output_file(options.confidence, endings, [*inputs, out])

    from icl_moe.inference.model import InContextModel

    model = InContextModel.from_pretrained(options.model, options.device, options.dtype)
    if sure and model.decoding(options.decoding) != "parallel":
        raise InputError(
            "--confidence needs parallel decoding, which this model does not support or "
            "--decoding excludes."
        )
    drawn = model.draw_mask(
        options.example,
        query=options.query,
        category=options.category,
        progress=True,
        decoding=options.decoding,
        windows=options.windows,
    )
    _write_levels(out, drawn.mask_HW)
    if sure and drawn.confidence_HW is not None:
        _write_levels(sure, 2 * drawn.confidence_HW - 1)
    cost = f", read once whole and in {drawn.windows} windows" if options.windows else ""
    print(f"{out}: {drawn.mask_HW.mean():.1%} of the image{cost}")
    return 0


def _write_levels(path: Path, levels_HW: "np.ndarray") -> None:
    """Write levels from 0 (black) to 1 (white) as a greyscale picture."""
    from PIL import Image

    from icl_moe.outputs import write_output

    content = io.BytesIO()
    Image.fromarray((levels_HW * 255.0).round().astype("uint8")).save(
        content, _PICTURE_FORMATS.get(path.suffix.lower(), "PNG")
    )
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


def _web(options: argparse.Namespace) -> int:
    from icl_moe.web.serve import serve

    serve(options.model, options.host, options.port, options.device, options.dtype)
    return 0


def _label(options: argparse.Namespace) -> int:
    from icl_moe.labelling.folders import find_examples, find_images, label_output

    out = label_output(options.out, ".json", options.images)
    review = options.review and label_output(options.review, ".html", options.images)
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
    files = find_images(options.images)

    from icl_moe.inference.model import InContextModel
    from icl_moe.labelling.run import Labelling, label

    model = InContextModel.from_pretrained(options.model, options.device, options.dtype)
    labelling = Labelling(
        examples,
        options.images,
        files,
        options.nearest,
        options.split,
        options.windows,
        options.decoding,
        options.batch,
    )
    count = label(model, labelling, out, review)
    skipped = f"; {count.unread} files cannot be read and were left out" if count.unread else ""
    cost = f", read once whole and in {count.windows} windows" if options.windows else ""
    print(f"{out}: {count.instances} instances in {count.images} images{cost}{skipped}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from icl_moe.demo import run_demo

    run_demo(options.out)
    return 0
