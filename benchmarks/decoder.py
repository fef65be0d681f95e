"""Speed and memory of the decoder compared with other implementations: python benchmarks/decoder.py
[--json FILE] [--precision fp32 bf16] [--repeat N]

A model of the size of GPT-2 small, the paper's episodes (3 examples and a query at 256 pixels,
micro-batch 1), forward and backward passes, in turns:

    ours    attribute-routed experts, packed layout, logits at targets
    stock   the same trunk on stock parts: deepspeed.moe top-2, dropless, PyTorch's own kernels,
            padded layout, all logits
    gpt2    Hugging Face's GPT2LMHeadModel, dense, padded layout, all logits
    floor   the matrix products that ours needs, each timed separately

All have random weights and no dropout. Compare ratios, not seconds. On a GPU the model FLOPs
utilisation is printed too. With --steps ours is instead compared with itself without each of its
optimizations.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import Goal, in_turns, report, run_apart
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from icl_moe.batch import Layout, TokenBatch, collate
from icl_moe.model.attention import EpisodeAttention
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.model.deepspeed_moe import exported_name, sparse_layer_factory
from icl_moe.model.kernels import cross_entropy
from icl_moe.model.kernels.onednn_linear import Linear, product
from icl_moe.recipe import ModelSettings, TrainingRecipe
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat
from icl_moe.settings import load_recipe, to_dict
from icl_moe.tasks import TASKS
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.tokenizers.text import TextTokenizer
from icl_moe.training.distributed import process_group
from icl_moe.training.throughput import peak_of, training_flops

PAIRS = 4
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

SAMPLES = {"segmentation": 300_000, "captioning": 460_000}
"""The number of samples of each task; a task's share of the mix is proportional to the square root.
Captions are the paper's number; segmentation is COCO's train2017, 118,287 images of about 2.5
classes with a region of at least 32 x 32 pixels (estimated from 663 of its images with the recipe
of docs/shards.md).
"""

CAPTIONS = (
    "a brown dog",
    "the dog is on grass",
    "dog wearing a red collar",
    "a black and white dog running outside",
)
"""These have 4, 5, 5 and 7 tokens with GPT-2's vocabulary. The quartiles of Visual Genome's regions
(the 7,278 of 100 images) are 4, 6 and 7.
"""

EFFICIENCY = {"fp32": 0.7, "bf16": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--repeat", type=int, default=3, help="timed turns, after one warm-up turn")
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=1,
        help="episodes at a time; the goals are for 1 on a CPU",
    )
    parser.add_argument(
        "--steps",
        action="store_true",
        help="time ours without each of its optimizations",
    )
    parser.add_argument(
        "--quick", action="store_true", help="use a toy model, to test the benchmark itself"
    )
    # The system whose memory this process measures.
    parser.add_argument("--memory", choices=("ours", "stock"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(
            json.dumps(
                memory_of(
                    options.memory,
                    Workload(options.quick, options.precision[0], options.micro_batch),
                )
            )
        )
        return
    figures: dict[str, Any] = {
        "device": _device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    goals: list[Goal] = []
    # This precedes joining a process group, whose address child processes would inherit.
    if not options.steps:
        goals += [
            goal for precision in options.precision for goal in memory(precision, options, figures)
        ]
    with process_group():
        for precision in options.precision:
            workload = Workload(options.quick, precision, options.micro_batch)
            goals += (
                undo_steps(workload, options.repeat, figures)
                if options.steps
                else race(workload, options.repeat, figures)
            )
    report(figures, goals, options.json)


@dataclass
class Workload:
    """The model's size and the episodes, which are the same for all systems."""

    quick: bool
    precision: str
    micro_batch: int
    recipe: TrainingRecipe = field(init=False)
    format: SequenceFormat = field(init=False)

    def __post_init__(self) -> None:
        overrides = ["model.dropout=0", "model.attention_dropout=0"]
        if self.quick:
            overrides += [
                "model.layers=2",
                "model.layers_with_experts=[1]",
                "model.width=64",
                "model.heads=2",
                "vocabulary.text_merges=1000",
            ]
        self.recipe = load_recipe(TrainingRecipe, "paper_256", overrides)
        self.format = SequenceFormat(
            self.recipe.vocabulary, codes_per_image=64 if self.quick else 256
        )

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def batch(self, task: str, layout: Layout) -> TokenBatch:
        rng = np.random.default_rng(0)
        codec = SequenceCodec(self.format, TextTokenizer(self.recipe.vocabulary.text_merges))

        def codes() -> np.ndarray:
            return rng.integers(0, self.recipe.vocabulary.image_codes, self.format.codes_per_image)

        def pair(i: int) -> SegmentationPair | CaptionPair:
            if task == "segmentation":
                return SegmentationPair(codes(), codes())
            return CaptionPair(codes(), CAPTIONS[i], "dog", (0.1, 0.2, 0.6, 0.7))

        episodes = [
            Episode(TASKS[task], "dog", tuple(pair(i) for i in range(PAIRS)))
            for _ in range(self.micro_batch)
        ]
        return collate(
            [codec.encode(episode) for episode in episodes], self.recipe.vocabulary, task, layout
        ).to(_device())


class System:
    """A model and its step, a forward and a backward pass, on the episodes of a task."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[TokenBatch], Tensor],
        workload: Workload,
        layout: Layout,
    ) -> None:
        self.model = model
        self._loss = loss
        self.batches = {task: workload.batch(task, layout) for task in SAMPLES}

    def step(self, task: str) -> None:
        self.model.zero_grad()
        self._loss(self.batches[task]).backward()
        _synchronize()


@dataclass(frozen=True)
class Parts:
    """The parts of our decoder that are used; the others are replaced by PyTorch's or DeepSpeed's.

    linear, attention, loss: icl_moe.model.{linear, blockwise_attention, loss}. targets: logits at
    targets only.
    """

    feed_forward: str = "attributes"
    layout: Layout = "packed"
    linear: bool = True
    attention: bool = True
    loss: bool = True
    targets: bool = True


STOCK = Parts("token", "padded", linear=False, attention=False, loss=False, targets=False)

STEPS = {
    "float32 products by oneDNN": Parts(linear=False),
    "attention by blocks": Parts(attention=False),
    "cross-entropy by chunks, gradient in the forward pass": Parts(loss=False),
    "logits at targets only": Parts(loss=False, targets=False),
    "packed layout": Parts(layout="padded"),
    "attributes' experts by slices": Parts("token"),
}
"""Each optimization, and our decoder without it. If logits are computed everywhere, they are not
computed in chunks either.
"""


def decoder(workload: Workload, parts: Parts) -> System:
    model = _decoder(workload, parts.feed_forward)
    if not parts.linear:
        for module in model.modules():
            if isinstance(module, Linear):
                module.forward = nn.Linear.forward.__get__(module)

    def loss(batch: TokenBatch) -> Tensor:
        if parts.loss and parts.attention:
            total: Tensor = model(batch, noise=(0, 0)).total
            return total
        attention = (
            EpisodeAttention(batch.lengths, batch.real_T)
            if parts.attention
            else _StockAttention(len(batch.lengths))
        )
        hidden_TM, losses = model.hidden(
            batch.tokens_T, batch.positions_T, attention, batch.routing
        )
        embedding_VM = model.token_embedding.weight
        auxiliary = model.auxiliary_weight * torch.stack(losses).mean()
        if parts.loss:
            weighted_sum, _ = cross_entropy(
                hidden_TM[batch.predictors_P], embedding_VM, batch.labels_P, batch.weights_P
            )
            return weighted_sum * batch.loss_scale + auxiliary
        if parts.targets:
            return (
                F.cross_entropy(
                    F.linear(hidden_TM[batch.predictors_P], embedding_VM).float(), batch.labels_P
                )
                + auxiliary
            )
        labels_T = torch.full_like(batch.tokens_T, -100)
        labels_T[batch.predictors_P] = batch.labels_P
        return F.cross_entropy(F.linear(hidden_TM, embedding_VM).float(), labels_T) + auxiliary

    return System(model, loss, workload, parts.layout)


def gpt2(workload: Workload) -> System:
    settings = workload.recipe.model
    config = GPT2Config(
        vocab_size=workload.recipe.vocabulary.size,
        n_positions=settings.positions,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).to(_device(), workload.dtype)

    def loss(batch: TokenBatch) -> Tensor:
        tokens_BL = batch.tokens_T.view(len(batch.lengths), -1)
        found: Tensor = model(tokens_BL, labels=tokens_BL).loss
        return found

    return System(model, loss, workload, "padded")


SYSTEMS: dict[str, Callable[[Workload], System]] = {
    "ours": lambda workload: decoder(workload, Parts()),
    "stock": lambda workload: decoder(workload, STOCK),
    "gpt2": gpt2,
}


class Floor:
    """The matrix products of one step that every implementation needs: x W^T, dy W and dy^T x of
    every linear layer, with this batch's shapes.

    Each product is timed separately, with the fastest available kernel; attention is added at the
    same rate.
    """

    def __init__(self, workload: Workload, batch: TokenBatch) -> None:
        self._products = [
            (
                count,
                *(
                    torch.randn(shape, dtype=workload.dtype, device=_device())
                    for shape in ((rows, i), (o, i), (rows, o))
                ),
            )
            for rows, i, o, count in _linear_layers(
                workload.recipe.model, batch, workload.recipe.vocabulary.size
            )
        ]
        self._times: list[list[float]] = [[] for _ in self._products]
        self.flops = training_flops(workload.recipe.model, workload.recipe.vocabulary.size, batch)

    def run(self) -> None:
        for (_, x_NI, weight_OI, dy_NO), times in zip(self._products, self._times, strict=True):
            started = time.perf_counter()
            product(x_NI, weight_OI.t())
            product(dy_NO, weight_OI)
            product(dy_NO.t(), x_NI)
            _synchronize()
            times.append(time.perf_counter() - started)

    @property
    def rate(self) -> float:
        """FLOP/s, with each product weighted by how often a step computes it."""
        seconds = sum(
            product[0] * statistics.median(times[1:] or times)
            for product, times in zip(self._products, self._times, strict=True)
        )
        return (
            sum(count * 6 * x.numel() * len(weight) for count, x, weight, _ in self._products)
            / seconds
        )


def race(workload: Workload, repeats: int, figures: dict[str, Any]) -> list[Goal]:
    """Episodes per second of all systems, on each task and on the mix."""
    systems = {name: build(workload) for name, build in SYSTEMS.items()}
    floors = {task: Floor(workload, systems["ours"].batches[task]) for task in SAMPLES}
    seconds = _seconds_an_episode(
        workload, systems, repeats, {task: (floor.run,) for task, floor in floors.items()}
    )
    for name, by_task in seconds.items():
        for task, found in [*by_task.items(), ("mix", _mix(by_task))]:
            figures[f"{workload.precision}, {name}, {task}: s per episode"] = found
    return _speed_goals(workload, seconds, floors, figures)


def undo_steps(workload: Workload, repeats: int, figures: dict[str, Any]) -> list[Goal]:
    """The time of ours without one optimization relative to ours, on each task and on the mix."""
    for step, parts in STEPS.items():
        systems = {"ours": decoder(workload, Parts()), "without": decoder(workload, parts)}
        seconds = _seconds_an_episode(workload, systems, repeats)
        for task in SAMPLES:
            figures[f"{workload.precision}, without {step}: time on {task}"] = (
                seconds["without"][task] / seconds["ours"][task]
            )
        figures[f"{workload.precision}, without {step}: time on the mix"] = _mix(
            seconds["without"]
        ) / _mix(seconds["ours"])
    return []


def _seconds_an_episode(
    workload: Workload,
    systems: dict[str, System],
    repeats: int,
    others: dict[str, tuple[Callable[[], None], ...]] | None = None,
) -> dict[str, dict[str, float]]:
    """System -> task -> seconds, timed in turns; `others` run in the same turns, by task."""
    seconds: dict[str, dict[str, float]] = {name: {} for name in systems}
    for task in SAMPLES:
        print(
            f"{workload.precision}, {task}: {', '.join(systems)} ...", file=sys.stderr, flush=True
        )
        runs = [partial(system.step, task) for system in systems.values()]
        times = in_turns(*runs, *(others or {}).get(task, ()), repeats=repeats)
        for name, found in zip(systems, times, strict=False):
            seconds[name][task] = found / workload.micro_batch
    return seconds


def _speed_goals(
    workload: Workload,
    seconds: dict[str, dict[str, float]],
    floors: dict[str, Floor],
    figures: dict[str, Any],
) -> list[Goal]:
    precision, own = workload.precision, seconds["ours"]
    goals = [
        Goal(f"{precision}, stock / ours, mix", _mix(seconds["stock"]) / _mix(own), 2.0),
        Goal(
            f"{precision}, stock / ours, segmentation",
            seconds["stock"]["segmentation"] / own["segmentation"],
            1.4,
        ),
        Goal(f"{precision}, gpt2 / ours, mix", _mix(seconds["gpt2"]) / _mix(own), 1.2),
        Goal(
            f"{precision}, gpt2 / ours, segmentation",
            seconds["gpt2"]["segmentation"] / own["segmentation"],
            0.9,
        ),
    ]
    for task, floor in floors.items():
        figures[f"{precision}, {task}: TFLOP per episode"] = (
            floor.flops / workload.micro_batch / 1e12
        )
        figures[f"{precision}, {task}: products alone, GFLOP/s"] = floor.rate / 1e9
        figures[f"{precision}, {task}: floor / ours"] = (
            floor.flops / floor.rate / workload.micro_batch / own[task]
        )
    floor_seconds = {
        task: floor.flops / floor.rate / workload.micro_batch for task, floor in floors.items()
    }
    goals.append(
        Goal(
            f"{precision}, floor / ours, mix",
            _mix(floor_seconds) / _mix(own),
            EFFICIENCY[precision],
        )
    )
    peak = peak_of(_device_name(), "bf16")
    if peak and precision == "bf16":
        needed = _mix({task: floor.flops / workload.micro_batch for task, floor in floors.items()})
        goals.append(Goal("bf16, model FLOPs utilisation, mix", needed / _mix(own) / peak, 0.45))
    return goals


def memory(precision: str, options: argparse.Namespace, figures: dict[str, Any]) -> list[Goal]:
    """Peak memory of a step, the maximum over the tasks, in a separate process: without weights and
    gradients, and in total.
    """
    above, whole = [], []
    for name in ("ours", "stock"):
        print(f"{precision}, memory of {name} ...", file=sys.stderr, flush=True)
        flags = [
            "--memory",
            name,
            "--precision",
            precision,
            "--micro-batch",
            str(options.micro_batch),
            *(["--quick"] if options.quick else []),
        ]
        last_line, _ = run_apart([__file__, *flags])
        standing, peak = json.loads(last_line)
        figures[f"{precision}, {name}: weights and gradients, MiB"] = standing
        figures[f"{precision}, {name}: peak, MiB"] = peak
        above.append(peak - standing)
        whole.append(peak)
    figures[f"{precision}, peak memory in all, ours / stock"] = whole[0] / whole[1]
    return [
        Goal(
            f"{precision}, peak memory above weights and gradients, ours / stock",
            above[0] / max(above[1], 1e-9),
            0.6,
            at_most=True,
        )
    ]


def memory_of(name: str, workload: Workload) -> tuple[float, float]:
    """Memory of this process in MiB with weights and all gradients, and at the peak of a step of
    each task.
    """
    with process_group():
        system = SYSTEMS[name](workload)
        for parameter in system.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        standing = _peak_memory()
        for batch in system.batches.values():
            system._loss(batch).backward()
            _synchronize()
        return standing, _peak_memory()


def _linear_layers(
    settings: ModelSettings, batch: TokenBatch, vocabulary: int
) -> Iterator[tuple[int, int, int, int]]:
    """(rows, input features, output features, count) of the linear layers of one step."""
    tokens, targets, width = len(batch.tokens_T), len(batch.labels_P), settings.width
    sparse = len(settings.sparse_layers)
    feed_forwards = settings.layers - sparse + settings.experts_per_token * sparse
    yield tokens, width, 3 * width, settings.layers
    yield tokens, width, width, settings.layers
    yield tokens, width, 4 * width, feed_forwards
    yield tokens, 4 * width, width, feed_forwards
    yield targets, width, vocabulary, 1


def _mix(by_task: dict[str, float]) -> float:
    """The mean over the paper's mix, in which a task's probability is proportional to the square
    root of its size.
    """
    weights = {task: samples**0.5 for task, samples in SAMPLES.items()}
    return sum(weights[task] * value for task, value in by_task.items()) / sum(weights.values())


def _decoder(workload: Workload, feed_forward: str) -> InContextDecoder:
    model = {**to_dict(workload.recipe.model), "feed_forward": feed_forward}
    decoder = InContextDecoder(
        DecoderConfig(model=model, vocabulary=to_dict(workload.recipe.vocabulary)),
        sparse_layer_factory(),
    )
    initialise(decoder, seed=0, exported_name=exported_name)
    for layer in _sparse_layers(decoder):
        layer.set_deepspeed_parallelism()
    moved: InContextDecoder = nn.Module.to(decoder, _device(), workload.dtype)
    return moved.train()


def _sparse_layers(model: InContextDecoder) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "set_deepspeed_parallelism")]


@dataclass(frozen=True)
class _StockAttention:
    """Causal attention over `rows` rows of equal length with PyTorch's kernel. Padding needs no
    mask, since it only follows the tokens of its own pair.
    """

    rows: int

    def attend(
        self, layer: int, queries_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, dropout: float
    ) -> Tensor:
        q, k, v = (
            x.unflatten(0, (self.rows, -1)).transpose(1, 2)
            for x in (queries_THD, keys_THD, values_THD)
        )
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
            .transpose(1, 2)
            .flatten(0, 1)
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> float:
    """The most memory in use so far, in MiB: the process's on a CPU, the tensors' on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
