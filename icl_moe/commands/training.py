"""`icl-moe train`, `export`, `demo` and `reproduce`."""

import argparse

from icl_moe import arguments as take


def add_train(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "train", help="train a decoder, alone or under the deepspeed launcher"
    )
    take.add_recipe(parser, "recipe", "paper_256")
    parser.set_defaults(run=_train)


def add_export(verbs: argparse._SubParsersAction) -> None:
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
        help="training shards for fitting, for a model that decodes masks in one pass, how sure of "
        "a mask it must be to mark anything, and how outlines follow the edges of images",
    )
    parser.add_argument(
        "--images",
        type=take.path,
        metavar="DIR",
        help="the images of these shards (default: where they were when the shards were built)",
    )
    parser.add_argument(
        "--mean-with",
        action="append",
        default=[],
        metavar="MODEL",
        help="average the weights with those of this model, which was trained from the same "
        "weights: a folder, a shipped name or a Hub id; may be repeated",
    )
    take.add_device(parser)
    parser.set_defaults(run=_export)


def add_demo(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("demo", help="the whole pipeline, small, on this machine")
    parser.add_argument(
        "--out",
        type=take.folder,
        default="demo",
        help="folder for all results (default demo)",
    )
    parser.set_defaults(run=_demo)


def add_reproduce(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "reproduce", help="train and evaluate every row of one of the paper's tables, or a figure"
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        choices=(
            *(f"table{number}" for number in (1, 2, 3, 4, 6, 7)),
            *(f"figure{number}" for number in range(6, 13)),
        ),
        help="table1, table2, table3, table4, table6, table7, or figure6 to figure12",
    )
    parser.add_argument(
        "--scale",
        choices=("demo", "paper"),
        required=True,
        help="demo: drawn scenes, minutes on two cores; paper: its data and model, on GPUs",
    )
    parser.add_argument(
        "--data",
        type=take.path,
        help="folder with coco, visual_genome and the tokenizer, for --scale paper (default data)",
    )
    parser.add_argument(
        "--out",
        type=take.folder,
        required=True,
        help="folder for shards, models and results; tables and figures that share it share them",
    )
    parser.add_argument("--rows", default="", help="names of rows of a table, such as dense,gshard")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument("--yes", action="store_true", help="start --scale paper")
    parser.set_defaults(run=_reproduce)


def _train(options: argparse.Namespace) -> int:
    from icl_moe.signals import listening

    with listening():
        return _train_until_stopped(options)


def _train_until_stopped(options: argparse.Namespace) -> int:
    from icl_moe.launcher import launched_ranks
    from icl_moe.recipe import TrainingRecipe
    from icl_moe.settings import load_recipe
    from icl_moe.training.preflight import open_checked

    recipe = load_recipe(TrainingRecipe, options.recipe, options.overrides)
    # These checks precede the import of DeepSpeed, which takes seconds.
    checked = open_checked(recipe, launched_ranks())

    from icl_moe.training.trainer import Trainer

    Trainer(recipe, checked).fit()
    return 0


def _export(options: argparse.Namespace) -> int:
    from icl_moe.outputs import writing
    from icl_moe.training.checkpoint import export

    with writing(options.out):
        step = export(
            options.checkpoint,
            options.out,
            options.threshold_from,
            options.device,
            options.mean_with,
            options.images,
        )
    others = len(options.mean_with)
    mean = f", in the mean with {others} other model{'' if others == 1 else 's'}" if others else ""
    print(f"{options.out}: the model after {step} steps{mean}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from icl_moe.demo import run_demo

    run_demo(options.out)
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from icl_moe.reproduce.pipeline import reproduce

    rows = [name for name in options.rows.split(",") if name]
    print(
        reproduce(
            options.name,
            options.scale,
            options.out,
            options.data,
            rows,
            options.yes,
            options.dry_run,
        )
    )
    return 0
