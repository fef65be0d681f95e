"""Ablations of modern_demo: python benchmarks/learning.py TRAIN VALIDATION --out DIR [--arms
NAME,...] [--seeds 0,1,2] [--recipe modern_demo] [key=value ...]

TRAIN and VALIDATION are shard folders. Each arm is the recipe without one part, or with another
routing: it is trained, exported with a threshold fitted on TRAIN, and evaluated on VALIDATION with
the commands that a user would type, one process at a time on one thread. The same command resumes
after an interruption. DIR gets a folder for each arm and seed, and learning.json and learning.md
with the mean and range of every score over the seeds.

key=value are settings of the recipe for all arms, such as training.steps=2000.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

PARTS: dict[str, tuple[str, ...]] = {
    "all parts": (),
    "no link": ("model.link=false",),
    "no codebook": ("model.codebook_init=false",),
    "gpt2 initialisation": ("model.initialisation=gpt2",),
    "no corruption": ("training.mask_corruption=false",),
    "loss on all pairs": ("training.loss_on=all",),
    "none": (
        "model.link=false",
        "model.codebook_init=false",
        "model.initialisation=gpt2",
        "training.mask_corruption=false",
        "training.loss_on=all",
    ),
}
ROUTINGS: dict[str, tuple[str, ...]] = {
    "dense": ("model.feed_forward=dense",),
    "token gates": ("model.feed_forward=token",),
    "one expert": ("model.experts_per_token=1",),
    "no gate": ("model.gate_input=none", "model.experts_per_token=1"),
    "no auxiliary loss": ("training.auxiliary_loss_weight=0",),
    "no auxiliary loss or noise": ("training.auxiliary_loss_weight=0", "model.gate_noise=false"),
}
ARMS = PARTS | ROUTINGS
SCORES = ("miou", "mean_iou")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("validation", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(PARTS), help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2 (default %(default)s)")
    parser.add_argument("--recipe", default="modern_demo")
    parser.add_argument("--shots", default="1")
    parser.add_argument("--limit", help="number of evaluated episodes per task")
    options = parser.parse_intermixed_args()
    arms = options.arms.split(",")
    if unknown := set(arms) - ARMS.keys():
        sys.exit(f"There is no arm {min(unknown)}; there are {', '.join(ARMS)}.")
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds.split(","):  # All arms run with one seed before the next seed.
        for arm in arms:
            results.setdefault(arm, []).append(run(arm, seed, options))
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "learning.json").write_text(json.dumps(results, indent=1) + "\n")
            (options.out / "learning.md").write_text(table(results))
    print(table(results))


def run(arm: str, seed: str, options: argparse.Namespace) -> dict[str, Any]:
    """The metrics of one arm and seed; commands that are done already do nothing."""
    folder = options.out / f"{arm.replace(' ', '_')}-{seed}"
    metrics = folder / "evaluation/metrics.json"
    if not metrics.is_file():
        settings = [
            f"data.shards={options.train}",
            f"training.output={folder / 'run'}",
            f"training.seed={seed}",
            *options.settings,
            *ARMS[arm],
        ]
        corrupted = "training.mask_corruption=false" not in settings
        fitted = ["--threshold-from", options.train] if corrupted else []
        limit = ["--limit", options.limit] if options.limit else []
        model, out = folder / "model", ["--out", folder / "evaluation"]
        command("train", options.recipe, *settings)
        command("export", folder / "run", "--out", model, *fitted)
        shots = ["--shots", options.shots, "--control", "swapped"]
        command("evaluate", model, options.validation, *shots, *limit, *out)
    found: dict[str, Any] = json.loads(metrics.read_text())
    return {"seed": seed, "decoding": found["decoding"], "tasks": found["tasks"]}


def command(*arguments: Any) -> None:
    words = [sys.executable, "-m", "icl_moe", *map(str, arguments)]
    print("$", " ".join(words), flush=True)
    # A single process needs no launcher; one thread leaves the rest of the machine free.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if subprocess.run(words, env=environment, check=False).returncode:
        sys.exit("The command above failed; run this script again to resume from there.")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each arm and kind of prediction; flips are of the queries that show two classes."""
    lines = [
        f"| arm | decoding | row | {' | '.join(SCORES)} | flips | seeds |",
        f"|---|---|---|{'---|' * (len(SCORES) + 2)}",
    ]
    for arm, runs in results.items():
        tasks = [run["tasks"].get("segmentation", {}) for run in runs]
        for same in zip(*(task.get("rows", []) for task in tasks), strict=True):
            name, how = same[0]["name"], runs[0]["decoding"]
            flips = [
                row["flips"]
                for task in tasks
                for row in task.get("swapped", [])
                if row["name"] == name
            ]
            scores = [[row[score] for row in same] for score in SCORES]
            cells = [_spread(values) if values else "–" for values in (*scores, flips)]
            lines.append(f"| {arm} | {how} | {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    text = f"{mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
