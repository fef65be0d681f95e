"""`icl-moe shards` and `icl-moe episodes`: training data and the episodes of benchmarks."""

import argparse

from icl_moe import arguments as take


def add_shards(verbs: argparse._SubParsersAction) -> None:
    from preprocessing import cli

    cli.add_parser(verbs)


def add_episodes(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "episodes", help="write the fixed episodes of a benchmark, for `shards build episodes=FILE`"
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="coco20i, pascal5i, fss1000, lvis92i, paper_coco, paper_vg, paper_lvis or "
        "paper_vg_unseen",
    )
    parser.add_argument(
        "--data", type=take.path, required=True, metavar="DIR", help="the data set's folder"
    )
    parser.add_argument(
        "--out", type=take.folder, required=True, metavar="DIR", help="folder for NAME.jsonl"
    )
    take.add_whole_number(parser, "--shots", 1, 1, "examples before each query", most=100)
    parser.add_argument(
        "--fold", type=int, metavar="F", help="only this fold, from 0 (default: all)"
    )
    parser.set_defaults(run=_episodes)


def _episodes(options: argparse.Namespace) -> int:
    from icl_moe.outputs import writing
    from preprocessing.standards import Request, make_episodes

    made = make_episodes(Request(options.name, options.data, options.shots, options.fold))
    name = options.name if options.shots == 1 else f"{options.name}_{options.shots}shot"
    path = options.out / f"{name}{'' if options.fold is None else f'_fold{options.fold}'}.jsonl"
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        digest = made.file.write(path)
    for note in made.notes:
        print(note)
    count, classes = len(made.file.episodes), len(made.file.classes)
    print(f"{path}: {count} episodes of {classes} classes, sha256 {digest}")
    return 0
