"""`icl-moe tokenizer`: training, making, measuring and converting image tokenizers."""

import argparse
from typing import Any

from icl_moe import arguments as take
from icl_moe.errors import InputError
from icl_moe.ranges import LARGEST_INTEGER, LARGEST_SIDE
from icl_moe.vocabulary import MOST_STAGES


def add_tokenizer(verbs: argparse._SubParsersAction) -> None:
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

    parser = actions.add_parser("convert", help="convert a published VQ-GAN or IBQ checkpoint")
    parser.add_argument(
        "checkpoint",
        type=take.path,
        help="the .ckpt of a release of taming-transformers or of SEED-Voken's IBQ",
    )
    parser.add_argument("--config", type=take.path, required=True, help="the release's YAML")
    parser.add_argument(
        "--out", type=take.folder, required=True, help="folder for the converted tokenizer"
    )
    parser.set_defaults(run=_tokenizer_convert)


_FIRST_STAGE: dict[str, Any] = {
    "backbone": "efficientnet_lite0",
    "weights": None,
    "strides": "16,32",
    "codes": 1024,
    "dimensions": 64,
    "image_size": 256,
    "downsampling": 16,
}
"""The defaults of the options that describe the first stage of a features tokenizer."""


def _add_tokenizer_features(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "features", help="make a tokenizer that reads images by a frozen backbone's features"
    )
    parser.add_argument("images", type=take.path, help="folder of images")
    parser.add_argument(
        "--backbone",
        help="efficientnet_lite0, colours, timm/NAME, or a transformers folder or hub id "
        f"(default {_FIRST_STAGE['backbone']})",
    )
    parser.add_argument("--weights", metavar="FILE", help="a file with the backbone's weights")
    parser.add_argument(
        "--strides",
        help=f"maps of the backbone to combine (default {_FIRST_STAGE['strides']})",
    )
    side = "pixels along a side of"
    for name, least, text, most in (
        ("codes", 2, "codes of each stage", LARGEST_INTEGER),
        ("dimensions", 1, "number of principal components", LARGEST_INTEGER),
        ("image_size", 1, f"{side} the images", LARGEST_SIDE),
        ("downsampling", 1, f"{side} a cell", LARGEST_SIDE),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=take.whole_number(least, most),
            metavar="N",
            help=f"{text} (default {_FIRST_STAGE[name]})",
        )
    parser.add_argument(
        "--refine",
        metavar="TOKENIZER",
        help="add stages to this features tokenizer, whose settings above are kept",
    )
    stages = "codes that together describe a cell"
    take.add_whole_number(parser, "--stages", 1, 1, stages, MOST_STAGES)
    take.add_whole_number(parser, "--seed", 0, 0, "of k-means")
    parser.add_argument(
        "--annotations",
        type=take.path,
        help="COCO instances file of these images: report how much of the features' matching "
        "score the codes retain",
    )
    take.add_device(parser)
    parser.add_argument("--out", type=take.folder, required=True, help="folder for the tokenizer")
    parser.set_defaults(run=_tokenizer_features)


def _tokenizer_train(options: argparse.Namespace) -> int:
    from icl_moe.settings import load_recipe
    from preprocessing.tokenizers.recipe import TokenizerRecipe
    from preprocessing.tokenizers.train import train_tokenizer

    recipe = load_recipe(
        TokenizerRecipe, options.recipe, options.overrides, package="preprocessing.tokenizers"
    )
    from icl_moe.locks import locked_by_first

    with locked_by_first(options.out):
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
    shots = take.whole_numbers("--shots", options.shots)
    if min(shots) < 1:
        raise InputError(f"--shots must be at least 1 for a matcher, not {min(shots)}.")
    if options.annotations is None or options.examples is None:
        raise InputError(
            f"{options.tokenizer} is a features tokenizer, which is measured by matching: set "
            "--annotations for the images, and --examples IMAGES ANNOTATIONS."
        )
    from icl_moe.devices import find_device
    from icl_moe.tokenizers.features import FeaturesTokenizer
    from preprocessing.tokenizers.matching import evaluate_matcher, read_photographs

    tokenizer = FeaturesTokenizer.from_pretrained(options.tokenizer)
    tokenizer.to(find_device(options.device))
    queries = read_photographs(tokenizer, options.images, options.annotations)
    examples = read_photographs(tokenizer, *options.examples)
    return evaluate_matcher(tokenizer.cpu(), queries, examples, shots)


def _tokenizer_features(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in _FIRST_STAGE}
    given = {name: value for name, value in given.items() if value is not None}
    if given and options.refine is not None:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise InputError(f"{option} is kept from the tokenizer to --refine; leave it out.")
    settings = {**_FIRST_STAGE, **given}
    strides = tuple(take.whole_numbers("--strides", settings.pop("strides")))

    from icl_moe.devices import find_device
    from icl_moe.outputs import output_folder, writing
    from icl_moe.tokenizers.features import FeaturesConfig
    from icl_moe.tokenizers.folder import check_free
    from preprocessing.tokenizers.features import (
        fit_features_tokenizer,
        refine_features_tokenizer,
        save_with_report,
    )

    out = output_folder(options.out)
    check_free(out)
    images, device = options.images, find_device(options.device)
    if options.refine is not None:
        tokenizer = refine_features_tokenizer(
            images, options.refine, options.stages, options.seed, device
        )
    else:
        config = FeaturesConfig(
            strides=strides,
            channels=(1,) * len(strides),
            codebook_size=settings.pop("codes"),
            stages=options.stages,
            **settings,
        )
        tokenizer = fit_features_tokenizer(images, config, options.seed, device)
    with writing(out):
        report = save_with_report(tokenizer, images, out, options.annotations)
    _print_values(report)
    return 0


def _print_values(values: dict[str, Any], prefix: str = "") -> None:
    """Print plain values, one per line; those of a nested table are prefixed with `name.`."""
    for name, value in values.items():
        if isinstance(value, dict):
            _print_values(value, f"{prefix}{name}.")
        else:
            parts = value if isinstance(value, list) else [value]
            shown = [f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts]
            print(f"{prefix + name:32} {', '.join(shown)}")


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
    from icl_moe.tokenizers.releases import convert_release

    tokenizer = convert_release(options.checkpoint, options.config, options.out)
    size = f"{tokenizer.config.codebook_size} codes at downsampling {tokenizer.downsampling}"
    print(f"{options.out}: {size}, fingerprint {tokenizer.fingerprint}")
    return 0
