"""The verbs of `icl-moe shards`: build, verify, stats, preview."""

import argparse

from icl_moe import arguments as take
from icl_moe.devices import processors
from icl_moe.messages import say


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `shards` and its verbs; `run` serves them."""
    parser = subparsers.add_parser("shards", help="build, check and look at training data")
    parser.set_defaults(run=run)
    verbs = parser.add_subparsers(dest="shards_verb", required=True)

    build = verbs.add_parser(
        "build", help="turn annotations and images into shards; resumes an interrupted build"
    )
    take.add_recipe(build, "DATA", "demo")
    build.add_argument(
        "--out", type=take.folder, required=True, metavar="DIR", help="the shard folder"
    )
    build.add_argument(
        "--workers",
        type=take.whole_number(0),
        default=processors(),
        metavar="N",
        help="worker processes, which all processes of a machine share under accelerate launch; 0 "
        "works in this process (default: %(default)s)",
    )
    build.add_argument(
        "--codes-cache",
        type=take.folder,
        metavar="DIR",
        help="a folder in which builds share the codes of equal pictures (default: none)",
    )
    take.add_device(build)

    verify = verbs.add_parser(
        "verify", help="check hashes, read every sample, and compare some with their sources"
    )
    verify.add_argument(
        "--samples",
        type=take.whole_number(0),
        default=16,
        metavar="N",
        help="random samples of each task to make anew from the annotations (default: %(default)s)",
    )
    stats = verbs.add_parser("stats", help="print what a shard folder holds")
    preview = verbs.add_parser(
        "preview", help="write a page with some samples, decoded from their tokens"
    )
    for verb in (verify, stats, preview):
        verb.add_argument(
            "folder",
            metavar="DIR",
            help="the shard folder, a path or a URL such as s3://bucket/folder",
        )
    stats.add_argument(
        "--plots", type=take.folder, metavar="DIR", help="also write PNG plots into this folder"
    )
    stats.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="DIR",
        help="other shards, such as the validation split, whose classes and images to compare",
    )
    take.add_device(verify)
    take.add_device(preview)
    preview.add_argument("--out", required=True, metavar="FILE.html", help="the page, one file")


def run(args: argparse.Namespace) -> int:
    """Run the verb in `args` and return the exit code. Raises InputError for bad input."""
    # Imported here so that --help does not wait for torch.
    if args.shards_verb == "build":
        from icl_moe.outputs import writing
        from icl_moe.processes import join_processes
        from icl_moe.settings import load_recipe
        from preprocessing.build import build_shards
        from preprocessing.recipe import DataRecipe
        from preprocessing.workers import most_workers

        recipe = load_recipe(DataRecipe, args.recipe, args.overrides, package="preprocessing")
        if args.workers > most_workers():
            say(
                f"--workers {args.workers} is more than this machine can use; at most "
                f"{most_workers()} are started."
            )
        with writing(args.out):
            manifest = build_shards(recipe, args.out, args.workers, args.device, args.codes_cache)
        process = join_processes()
        if process.is_main_process:
            counts = " and ".join(
                f"{count} {task} samples" for task, count in manifest.samples.items()
            )
            print(f"{args.out}: {counts} in {len(manifest.shards)} shards.")
        process.destroy_process_group()
    elif args.shards_verb == "verify":
        from preprocessing.compare import compare_with_sources
        from preprocessing.verify import verify_shards

        manifest = verify_shards(args.folder)
        print(
            f"{args.folder}: {len(manifest.shards)} shards with {sum(manifest.samples.values())} "
            "samples are complete and correct."
        )
        if args.samples:
            workers = processors()
            for line in compare_with_sources(args.folder, args.samples, workers, args.device):
                print(line)
    elif args.shards_verb == "stats":
        from preprocessing.plots import write_plots
        from preprocessing.stats import shard_stats

        print(shard_stats(args.folder, args.against))
        if args.plots is not None:
            for file in write_plots(args.folder, args.plots, args.against):
                print(f"Wrote {file}.")
    else:
        from preprocessing.preview import write_preview

        write_preview(args.folder, args.out, args.device)
        print(f"Wrote {args.out}.")
    return 0
