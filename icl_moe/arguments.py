"""Types of paths and numbers for argparse's `type=`, and options that several commands share."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from icl_moe.devices import DTYPES
from icl_moe.errors import InputError
from icl_moe.outputs import output_folder
from icl_moe.ranges import LARGEST_INTEGER

MODEL = "an exported model's folder, the name of a shipped model, or OWNER/NAME on the Hub"
SHARDS = "a shard folder: a path, or a URL such as s3://bucket/folder"


def path(text: str) -> Path:
    """A path, with ~ expanded: shells do not expand it in --query=~/x.png."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not an empty text")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"must be a path on this machine, not the URL {text}")
    return Path(os.path.expanduser(text))  # noqa: PTH111  unlike pathlib's, this never raises


def model(text: str) -> str:
    """A model, as `find_model` takes it, with ~ expanded. It remains text, because a path would
    drop the ./ by which a folder is told from the shipped model of its name.
    """
    path(text)
    return os.path.expanduser(text)  # noqa: PTH111  as in `path`


def folder(text: str) -> Path:
    """A folder to write into (see `output_folder`)."""
    try:
        return output_folder(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def whole_number(least: int, most: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """Whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            bound = f"of at least {least}" if number < least else f"of at most {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {bound}, not {text[:60]!r}")
        return number

    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """Numbers from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"must be a number from {least:g} to {most:g}, not {text[:60]!r}"
            )
        return value

    return read


def add_whole_number(
    parser: argparse.ArgumentParser,
    option: str,
    least: int,
    default: int,
    text: str,
    most: int = LARGEST_INTEGER,
) -> None:
    """An option that takes a whole number from `least` to `most`; its help is `text` and the
    default.
    """
    parser.add_argument(
        option,
        type=whole_number(least, most),
        default=default,
        metavar="N",
        help=f"{text} (default %(default)s)",
    )


def add_recipe(parser: argparse.ArgumentParser, metavar: str, such_as: str) -> None:
    """Add the arguments for a recipe and settings that override it."""
    parser.add_argument(
        "recipe", metavar=metavar, help=f"a path, or the name of a shipped one such as {such_as}"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings that override the recipe's",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        help="where to compute: cpu, cuda, cuda:1, mps (default: a GPU if there is one)",
    )


def add_dtype(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help=meaning)


def add_examples(parser: argparse.ArgumentParser, output: str) -> None:
    """A model, examples of an image and its `output`, and a query."""
    parser.add_argument("model", type=model, help=MODEL)
    parser.add_argument(
        "--example",
        nargs=2,
        type=path,
        action="append",
        default=[],
        metavar=("IMAGE", output),
        help="may be repeated",
    )
    parser.add_argument("--query", type=path, required=True, metavar="IMAGE")


def add_asked(parser: argparse.ArgumentParser) -> None:
    """The episodes that a system is asked for, and where its predictions go."""
    parser.add_argument("shards", help=SHARDS)
    parser.add_argument("--out", type=folder, required=True, help="folder to write")
    add_whole_number(parser, "--shots", 0, 1, "examples before each query", most=100)
    add_limit(parser)
    parser.add_argument(
        "--control",
        choices=["swapped", "none"],
        default="swapped",
        help="whether to ask also with swapped examples, where a query shows something else too "
        "(default: swapped)",
    )
    add_images(parser)


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=path,
        metavar="DIR",
        help="folder of the images of the shards (default: where they were built from)",
    )


def add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=whole_number(1), help="only so many episodes of each task")


def add_windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--windows",
        action="store_true",
        help="read what is found again in up to nine overlapping windows, for small objects; "
        "takes as many times as long",
    )


def add_shifts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shifts",
        action="store_true",
        help="read each image four times, moved by half a cell of the model's grid, and average "
        "the masks; takes four times as long",
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoding",
        choices=["autoregressive", "parallel", "mirrored"],
        help="decode masks code by code, in one pass, or in one pass and once more mirrored "
        "(default: the last of these that the model can do)",
    )
    parser.add_argument(
        "--no-edges",
        dest="edges",
        action="store_false",
        help="leave masks in one pass as coarse as the model draws them (default: their outlines "
        "follow the edges of the image, if this was fitted when the model was exported)",
    )


def add_place(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_dtype(parser, "precision of the decoder's weights (default: that of the model's file)")


def whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} must be whole numbers separated by commas, such as 0,1,2,3, not '{text}'."
        ) from None
