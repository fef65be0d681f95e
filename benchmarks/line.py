"""Speed and memory of each stage of the pipeline on this machine: python benchmarks/line.py [--json
FILE]

Each stage runs in a separate process, which gives its peak memory. The training step is compared
with Hugging Face's GPT-2 of the same size on the same number of tokens, in turns within one
process; compare the ratio, not the seconds.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import in_turns, run_apart

IMAGES, BATCH, REPEATS = 200, 8, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        name, folder = options.stage
        print(json.dumps(STAGES[name](Path(folder))))
        return
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in STAGES:
            print(f"{name} ...", file=sys.stderr, flush=True)
            figures["stages"][name] = _run_apart(name, folder)
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def build_shards(folder: Path) -> dict[str, float]:
    from icl_moe.settings import load_recipe
    from preprocessing import synthetic
    from preprocessing.build import build_shards as build
    from preprocessing.recipe import DataRecipe

    recipe = load_recipe(
        DataRecipe, "demo", [f"synthetic.images={IMAGES}"], package="preprocessing"
    )
    started = time.perf_counter()
    synthetic.write_dataset(folder / "drawn", IMAGES, seed=0)
    drawn = time.perf_counter()
    manifest = build(recipe, folder / "shards", workers=len(os.sched_getaffinity(0)))
    samples = sum(manifest.samples.values())
    return {
        "images drawn/s": IMAGES / (drawn - started),
        "samples built/s": samples / (time.perf_counter() - drawn),
        "samples": samples,
    }


def train_step(folder: Path) -> dict[str, float]:
    """Forward, backward and AdamW step on the demo's micro-batch of segmentation, compared with
    GPT-2 on as many tokens.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from icl_moe.data.loader import MicroBatches
    from icl_moe.data.schedule import RankSlice, Schedule
    from icl_moe.data.shards import ShardSet
    from icl_moe.recipe import TrainingRecipe
    from icl_moe.settings import load_recipe
    from icl_moe.training.distributed import process_group
    from icl_moe.training.engine import TrainingEngine
    from icl_moe.training.preflight import read_engine

    overrides = [
        f"data.shards={folder / 'shards'}",
        f"training.global_batch={BATCH}",
        f"training.micro_batch={BATCH}",
        "engine=zero1_fp32",
    ]
    recipe = load_recipe(TrainingRecipe, "demo", overrides)
    shards = ShardSet(folder / "shards")
    part = RankSlice.of(0, 1, BATCH, BATCH)
    dataset = MicroBatches(
        shards,
        Schedule({"segmentation": shards.count("segmentation")}, BATCH, 0),
        part,
        "packed",
        0.0,
    )
    batch = dataset[0]
    length = batch.lengths[0]

    with process_group() as place:
        engine = TrainingEngine(recipe, shards.manifest, read_engine(recipe.engine), part, place)
        model = recipe.model
        sizes = dict(
            n_positions=length, n_embd=model.width, n_layer=model.layers, n_head=model.heads
        )
        peer = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=recipe.vocabulary.size,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **sizes,
            )
        )
        optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3)
        tokens_BL = batch.tokens_T.view(BATCH, length)

        def ours() -> None:
            engine.backward(batch, noise=(0, 0))
            engine.step()

        def theirs() -> None:
            peer(tokens_BL, labels=tokens_BL).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = in_turns(ours, theirs, repeats=REPEATS, warm_up=2)
    tokens = BATCH * length
    return {
        "tokens/s": tokens / seconds[0],
        "GPT-2 tokens/s": tokens / seconds[1],
        "ratio": seconds[1] / seconds[0],
    }


def random_model(folder: Path) -> Any:
    """The shards in `folder`, as a `ShardSet`, and an untrained model of the demo's size for them,
    as an `InContextModel`, which is as slow as a trained one. It is written into the folder too.
    """
    from icl_moe.data.shards import ShardSet
    from icl_moe.inference.model import InContextModel
    from icl_moe.model.config import DecoderConfig
    from icl_moe.model.decoder import InContextDecoder, initialise
    from icl_moe.recipe import TrainingRecipe
    from icl_moe.settings import load_recipe
    from icl_moe.training.checkpoint import write_model_folder

    shards = ShardSet(folder / "shards")
    config = DecoderConfig.from_recipe(
        load_recipe(TrainingRecipe, "demo"), **shards.manifest.of_model
    )
    decoder = InContextDecoder(config)
    initialise(decoder, seed=0)
    write_model_folder(folder, config, shards)
    decoder.save_pretrained(folder / "model")
    return shards, InContextModel.from_pretrained(folder / "model")


def evaluate(folder: Path) -> dict[str, float]:
    """Free decoding of one-shot queries with an untrained model."""
    from icl_moe.evaluation.episodes import EpisodeSet
    from icl_moe.evaluation.predictions import Condition, PredictionLog, predict

    shards, model = random_model(folder)
    rates = {}
    for task in shards.manifest.samples:
        (folder / f"log-{task}").mkdir()
        log = PredictionLog(folder / f"log-{task}", {"benchmark": task})
        started = time.perf_counter()
        predict(model, EpisodeSet(shards, model.codec, task, 32), Condition(task, 1), log, 8)
        rates[f"{task} queries/s"] = 32 / (time.perf_counter() - started)
    return rates


STAGES: dict[str, Callable[[Path], dict[str, float]]] = {
    "build_shards": build_shards,
    "train_step": train_step,
    "evaluate": evaluate,
}


def _run_apart(name: str, folder: str) -> dict[str, float]:
    figures, peak = run_apart([__file__, "--stage", name, folder])
    return {**json.loads(figures), "peak memory MiB": peak}


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['cores']} cores\n\n| stage | figure | value |\n|---|---|---|")
    for stage, values in figures["stages"].items():
        for name, value in values.items():
            print(f"| {stage} | {name} | {value:,.4g} |")


if __name__ == "__main__":
    main()
