"""`icl-moe evaluate`, `predictions` and `compare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from icl_moe import arguments as take
from icl_moe.errors import InputError


def add_evaluate(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("evaluate", help="measure a model on the episodes of a shard folder")
    parser.add_argument("model", type=take.model, help=take.MODEL)
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
    parser.add_argument(
        "--predictions",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="also score the predictions of another system; may be repeated",
    )
    take.add_shifts(parser)
    take.add_decoding(parser)
    take.add_images(parser)
    take.add_place(parser)
    parser.set_defaults(run=_evaluate)


def add_predictions(verbs: argparse._SubParsersAction) -> None:
    actions = verbs.add_parser(
        "predictions", help="predictions of other systems on the episodes of a shard folder"
    ).add_subparsers(required=True, metavar="ACTION")

    parser = actions.add_parser(
        "template", help="write what another system is to predict: pictures and an empty file"
    )
    take.add_asked(parser)
    parser.set_defaults(run=_predictions_template)

    parser = actions.add_parser("baseline", help="write the predictions of a system that runs here")
    parser.add_argument(
        "baseline",
        metavar="NAME",
        help="copy, whole_image, mean_mask, every_object, frequent_caption, matcher, seggpt or "
        "idefics",
    )
    take.add_asked(parser)
    parser.add_argument("--weights", help="of seggpt or idefics: a folder or a Hub id")
    take.add_device(parser)
    parser.set_defaults(run=_predictions_baseline)

    parser = actions.add_parser("check", help="check that predictions are whole, and of what")
    parser.add_argument("folder", type=take.path, metavar="FOLDER", help="folder of predictions")
    parser.add_argument("shards", help=take.SHARDS)
    take.add_limit(parser)
    parser.set_defaults(run=_predictions_check)


def add_compare(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "compare", help="compare two evaluations or predictions, with tests of significance"
    )
    for name in ("a", "b"):
        parser.add_argument(
            name,
            type=take.path,
            metavar=name.upper(),
            help="folder of an evaluation, or of predictions",
        )
    parser.add_argument("shards", help=take.SHARDS)
    parser.add_argument(
        "--shots",
        type=take.whole_number(0),
        help="number of examples to compare, of evaluations (default: the largest); predictions "
        "have one number, which the table says",
    )
    take.add_limit(parser)
    parser.add_argument("--out", metavar="FILE.json", help="also write the figures")
    parser.set_defaults(run=_compare)


def _evaluate(options: argparse.Namespace) -> int:
    shots = take.whole_numbers("--shots", options.shots)
    controls = None if options.control is None else options.control.split(",")
    if controls == ["none"]:
        controls = []

    predictions = _named_folders(options.predictions)

    from icl_moe.evaluation.protocol import evaluate
    from icl_moe.evaluation.report import summary
    from icl_moe.locks import locked_by_first
    from icl_moe.processes import join_processes

    with locked_by_first(options.out):
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
            predictions=predictions,
            images=options.images,
            edges=options.edges,
            shifts=options.shifts,
        )
    if metrics is not None:
        print(f"{summary(metrics)}\n\nThe report: {options.out / 'report.html'}")
    join_processes().destroy_process_group()
    return 0


def _named_folders(texts: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not (name and separator and folder):
            raise InputError(f"--predictions must be NAME=FOLDER, not {text!r}.")
        if name in found:
            raise InputError(f"--predictions names {name} twice.")
        found[name] = take.path(folder)
    return found


def _predictions_template(options: argparse.Namespace) -> int:
    from icl_moe.data.shards import ShardSet
    from icl_moe.evaluation.other_systems import open_episodes
    from icl_moe.evaluation.template import write_template
    from icl_moe.outputs import writing

    shards = ShardSet(options.shards)
    sets = open_episodes(shards, options.limit)
    with writing(options.out):
        swapped = options.control == "swapped"
        write_template(shards, sets, options.out, options.shots, options.images, swapped)
    for episodes in sets:
        task, asked = episodes.task.name, f"{len(episodes)} episodes of {episodes.task.name}"
        file = f"{task}.json"
        if (options.out / f"{task}_swapped.json").is_file():
            asked += f", {len(episodes.swaps)} of them also with swapped examples"
            file += f" and of {task}_swapped.json, or delete the latter"
        print(f"{options.out}: {asked}; fill the results of {file}")
    return 0


def _predictions_baseline(options: argparse.Namespace) -> int:
    from icl_moe.baselines import predict_baseline
    from icl_moe.data.shards import ShardSet
    from icl_moe.outputs import writing

    with writing(options.out):
        tasks = predict_baseline(
            options.baseline,
            ShardSet(options.shards),
            options.out,
            options.shots,
            options.limit,
            options.weights,
            options.images,
            options.device,
            options.control == "swapped",
        )
    print(f"{options.out}: predictions of {options.baseline} for {' and '.join(tasks)}")
    return 0


def _predictions_check(options: argparse.Namespace) -> int:
    from icl_moe.data.shards import ShardSet
    from icl_moe.evaluation.other_systems import check_predictions

    for task, system in check_predictions(
        options.folder, ShardSet(options.shards), options.limit
    ).items():
        also = "" if system.swapped is None else f" (and {len(system.swapped)} with swapped ones)"
        print(
            f"{options.folder}: {len(system.outputs)} predictions of {system.name} for {task}, "
            f"after {system.shots} example(s){also}, are complete"
        )
    return 0


def _compare(options: argparse.Namespace) -> int:
    import dataclasses
    import json

    from icl_moe.data.shards import ShardSet
    from icl_moe.evaluation.compare import compare, comparison_table
    from icl_moe.outputs import output_file, write_output
    from icl_moe.tables import as_text

    out = options.out and output_file(options.out, (".json",))
    shards = ShardSet(options.shards)
    found = compare(options.a, options.b, shards, options.shots, options.limit)
    print(f"A: {options.a}\nB: {options.b}\n\n{as_text(comparison_table(found))}")
    if out:
        values = [dataclasses.asdict(compared) for compared in found]
        write_output(out, json.dumps(values, indent=1) + "\n")
    return 0
