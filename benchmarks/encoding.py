"""Speed of encoding pictures for shards, and the time that COCO and Visual Genome would take:

    python benchmarks/encoding.py [--tokenizer DIR] [--size 256] [--pictures 64] [--json FILE]

Encodes parts of photographs of 640 x 480 pixels as `icl-moe shards build` does, in one process and
in two that `accelerate launch` starts, in turns, one thread each. The tokenizer is by default a
VQ-GAN of the released size with random weights, which is as fast as a trained one. The chunks are
of one batch of 4, so that few pictures are enough for two processes. A second measurement, with the
demo's small tokenizer at 64 pixels and two workers, tells what the encoding process waits for.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Goal, report
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from icl_moe.processes import join_processes
from icl_moe.tokenizers.image_tokenizers import ImageTokenizers
from icl_moe.tokenizers.vqgan import VQGAN, VQGANConfig
from preprocessing import quantize
from preprocessing.pool import ImageFile

PICTURES = 665_000
"""Pictures of `coco_vg_256`: images of Visual Genome, and a part and a mask of each class in an
image of COCO.
"""

BATCH = 4
WIDTH, HEIGHT = 640, 480
PER_IMAGE = 3
# With --cpu it would start one process, whatever the number.
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", help="a folder; by default random weights")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--total", type=int, default=PICTURES, help="pictures of the real sets")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--encode", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.encode:
        encode(args.encode, args.tokenizer, args.size, args.pictures, args.workers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        figures, goals = measure(args, Path(temporary))
    report(figures, goals, args.json)


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[Goal]]:
    tokenizer = args.tokenizer or str(_random_tokenizer(folder / "tokenizer"))
    _write_photographs(folder / "images", -(-max(args.pictures, 128) // PER_IMAGE))
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "size": args.size}
    figures["GFLOP a picture"] = _flops(tokenizer, args.size) / 1e9
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for repeat in range(args.repeats):
        for processes, of_processes in runs.items():
            print(f"{processes} of 2 processes, {repeat} ...", file=sys.stderr, flush=True)
            options = (folder, tokenizer, args.size, args.pictures)
            of_processes.append(_run(processes, *options, workers=1))
    rates = {}
    for processes, found in runs.items():
        rates[processes] = args.pictures / statistics.median(run["seconds"] for run in found)
        core_seconds = statistics.median(run["core-seconds"] for run in found) / args.pictures
        figures[f"pictures/s, {processes} processes"] = rates[processes]
        figures[f"core-seconds a picture, {processes} processes"] = core_seconds
        days = args.total / rates[processes] / 86_400
        figures[f"days for {args.total:,} pictures, {processes} processes"] = days
    profile = _run(1, folder, "demo", 64, 128, workers=2)
    figures["small tokenizer: pictures/s"] = 128 / profile["seconds"]
    for part in ("encoding", "waiting for pictures", "all else"):
        figures[f"small tokenizer: share of the time, {part}"] = profile[part] / profile["seconds"]
    figures["core-seconds to load, crop and resize a picture"] = _drawing(folder, args.size)
    else_share = profile["all else"] / profile["seconds"]
    return figures, [
        Goal("2 processes / 1, pictures/s", rates[2] / rates[1], 1.6),
        Goal("share neither encoding nor waiting for pictures", else_share, 0.05, at_most=True),
    ]


def _run(
    processes: int, folder: Path, tokenizer: str, size: int, pictures: int, workers: int
) -> dict[str, float]:
    """Encode in `processes` processes. Returns the seconds of the slowest and the sum of the
    others' figures.
    """
    launch = [*LAUNCH.split(), "--num_processes", str(processes)] if processes > 1 else []
    options = {"encode": folder, "tokenizer": tokenizer, "size": size, "pictures": pictures}
    options["workers"] = workers
    command = [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, __file__, *command], env=environment, check=True)
    found = [json.loads(file.read_text()) for file in folder.glob("rank-*.json")]
    assert len(found) == processes, "each rank writes a file"
    for file in (*folder.glob("rank-*.json"), *folder.glob("codes/*")):
        file.unlink()
    summed = {name: sum(of_rank[name] for of_rank in found) for name in found[0]}
    return summed | {"seconds": max(of_rank["seconds"] for of_rank in found)}


def encode(folder: Path, tokenizer: str, size: int, count: int, workers: int) -> None:
    """A process's part of the work, timed."""
    process = join_processes()
    tokenizers = ImageTokenizers(VQGAN.from_pretrained(tokenizer))
    pictures = _pictures(folder, count)
    quantize.BATCH = quantize.CHUNK = BATCH
    spent = {"encoding": 0.0, "waiting for pictures": 0.0}
    ImageTokenizers.encode = _timed(ImageTokenizers.encode, spent)  # type: ignore[method-assign]
    quantize.ordered_map = _timed_items(quantize.ordered_map, spent)
    process.wait_for_everyone()
    cores, started = _core_seconds(), time.perf_counter()
    rank, ranks = process.process_index, process.num_processes
    quantize.quantize(
        pictures, tokenizers, size, folder / "codes", workers, process.device, rank, ranks
    )
    spent["seconds"] = time.perf_counter() - started
    spent["core-seconds"] = _core_seconds() - cores
    spent["all else"] = spent["seconds"] - spent["encoding"] - spent["waiting for pictures"]
    (folder / f"rank-{rank}.json").write_text(json.dumps(spent))
    process.wait_for_everyone()
    process.destroy_process_group()


def _timed(function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        spent["encoding"] += time.perf_counter() - started
        return result

    return timed


def _timed_items(function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Iterator[Any]:
        items = iter(function(*arguments))
        while True:
            started = time.perf_counter()
            item = next(items, None)
            spent["waiting for pictures"] += time.perf_counter() - started
            if item is None:
                return
            yield item

    return timed


def _core_seconds() -> float:
    """The CPU time of this process and of its workers that have ended."""
    of_workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + of_workers.ru_utime + of_workers.ru_stime


def _drawing(folder: Path, size: int) -> float:
    started = time.process_time()
    for picture in _pictures(folder, 32):
        picture.draw(size)
    return (time.process_time() - started) / 32


def _pictures(folder: Path, count: int) -> list[Any]:
    """Parts of the photographs, several of each, the largest squares and smaller ones."""
    found = []
    for number in range(count):
        name, place = f"{number // PER_IMAGE:06d}.jpg", number % PER_IMAGE
        image = ImageFile(folder / "images" / name, name, WIDTH, HEIGHT)
        side = HEIGHT - 80 * place
        found.append(quantize.CropPicture(image, (40 * place, 0, 40 * place + side, side)))
    return found


def _write_photographs(folder: Path, count: int) -> None:
    """JPEG files with as much detail as photographs have."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
        pixels = noisy.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=90)


def _random_tokenizer(folder: Path) -> Path:
    torch.manual_seed(0)
    VQGAN(VQGANConfig()).save_pretrained(folder)
    return folder


def _flops(tokenizer: str, size: int) -> float:
    """Floating-point operations to encode a picture, two for a multiplication and addition."""
    model = VQGAN.from_pretrained(tokenizer)
    with FlopCounterMode(display=False) as counter:
        model.encode(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
