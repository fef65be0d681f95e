"""Speed on one GPU, part by part: benchmarks/gpu.sh [--quick] [--json FILE]; python
benchmarks/gpu.py render FILE prints the table of docs/performance.md again.

It needs PyTorch, transformers and this repository alone: neither DeepSpeed nor a tokenizer. Each
part runs in a process of its own with a time limit; one that fails is named with its error, and
what it had measured until then is kept. All of it is `paper_256`'s decoder in bfloat16 with random
weights. Training is a plain step of PyTorch with what the engine does at ZeRO stage 1 on one GPU:
gradients in bfloat16, and MT-AdamW on float32 master weights. Times are medians between waits for
the device.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from generate_peer import EXAMPLES, QUERIES, Generate, NoText, Setting, check_same_choices
from torch import Tensor, nn

from icl_moe.batch import TokenBatch, collate
from icl_moe.files import write_whole
from icl_moe.inference.decode import Request, decode_at_once, decode_batch
from icl_moe.inference.static_codes import StaticCodes
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder
from icl_moe.model.kernels import (
    causal_attention,
    chunked_cross_entropy,
    cross_entropy,
    has_varlen,
    varlen_attention,
)
from icl_moe.optim.mt_adamw import MTAdamW
from icl_moe.sequence import Episode, SequenceCodec
from icl_moe.tasks import TASKS
from icl_moe.tasks.captioning import CaptionPair
from icl_moe.tasks.segmentation import SegmentationPair
from icl_moe.training.throughput import peak_of, training_flops

GOALS = {
    ("training", "segmentation, best: tokens/s"): 400_000,
    ("training", "segmentation, best: MFU, %"): 45,
    ("code by code", "best: masks/s"): 10,
    ("parallel decoding", "best: masks/s"): 300,
}
"""(the first word of a part, figure) -> at least."""

MICRO_STEPS = 8
"""Micro-steps before an update: `paper_256`'s batch of 512 on 8 GPUs with 8 episodes each."""

CAPTIONS = (
    "a brown dog",
    "the dog is on the grass",
    "dog wearing a red collar",
    "a black and white dog running outside",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure")
    run.add_argument("--json", type=Path, default=Path("gpu.json"), help="default %(default)s")
    run.add_argument("--quick", action="store_true", help="toy sizes, to test the benchmark itself")
    run.add_argument("--seconds", type=float, default=560, help="for all (default %(default)s)")
    run.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    verbs.add_parser("render", help="print the table").add_argument("json", type=Path)
    options = parser.parse_args()
    if options.verb == "run":
        measure(options.parts, options.quick, options.seconds, options.json)
    results = json.loads(options.json.read_text(encoding="utf-8"))
    print(render(results))
    return int(any(part["error"] for part in results["parts"].values()))


@dataclass(frozen=True)
class Bench:
    """What a part is given: the device, toy sizes or not, and the file of its figures."""

    device: str
    quick: bool
    file: Path

    def record(self, name: str, value: float | str) -> None:
        """Keep a figure at once, so that a later failure does not lose it."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, value]) + "\n")

    @contextmanager
    def variant(self, name: str) -> Iterator[None]:
        """A variant whose failure is recorded instead of its figure, and does not end the part."""
        try:
            yield
        except Exception as error:
            self.record(name, f"failed: {_first_line(error)}")
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
        """The median time of a run."""
        if self.quick:
            repeats, warm_up = 1, 1
        times = []
        for repeat in range(warm_up + repeats):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            if repeat >= warm_up:
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self) -> float:
        """The most memory that tensors have taken so far in this process."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0

    @property
    def peak_flops(self) -> float | None:
        return peak_of(torch.cuda.get_device_name(), "bf16") if self.device == "cuda" else None

    def setting(self) -> Setting:
        return Setting.of("paper_256", self.device, torch.bfloat16, self.quick)

    @property
    def compiler(self) -> str:
        """The backend of torch.compile. A CPU's takes too long for a test."""
        return "inductor" if self.device == "cuda" else "eager"


# --- The parts ------------------------------------------------------------------------------------


def device(bench: Bench) -> None:
    """The card, and its ceilings: a copy, and a matrix product."""
    size = 256 if bench.quick else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**20 if bench.quick else 2**30, device=bench.device)
    target = torch.empty_like(source)
    product = bench.seconds(lambda: a @ b)
    bench.record("matrix product of 8192, bf16, TFLOP/s", 2 * size**3 / product / 1e12)
    copied = bench.seconds(lambda: target.copy_(source))
    bench.record("copy, TB/s read and written", 2 * source.nbytes / copied / 1e12)


def training(bench: Bench) -> None:
    """Steps of `MICRO_STEPS` micro-batches and an update, as they are in the product."""
    found: dict[str, float] = {}
    for task in ("segmentation", "captioning"):
        for episodes in (2,) if bench.quick else (8, 16, 32):
            name = f"{task}, micro-batch {episodes}"
            with bench.variant(f"{name}: tokens/s"):
                run = Training(bench, task, episodes)
                found[name] = _record_step(bench, name, run, MICRO_STEPS)
                if task == "segmentation" and episodes == 8:
                    _record_step(bench, f"{name}, an update each", run, 1)
                    bench.record(f"{name}: waits for the device a micro-step", _waits(bench, run))
                del run
    _record_best(bench, found)


def training_compiled(bench: Bench) -> None:
    """Training with each layer compiled, for episodes of one length."""
    found: dict[str, float] = {}
    for episodes in (2,) if bench.quick else (8, 32):
        name = f"segmentation, micro-batch {episodes}, layers compiled"
        with bench.variant(f"{name}: tokens/s"):
            run = Training(bench, "segmentation", episodes)
            started = time.perf_counter()
            for layer in run.model.layers:
                layer.compile(backend=bench.compiler, dynamic=False)
            run.micro_step()
            bench.wait()
            bench.record(f"{name}: seconds to compile", time.perf_counter() - started)
            found[name] = _record_step(bench, name, run, MICRO_STEPS)
            del run
    _record_best(bench, found)


def attention(bench: Bench) -> None:
    """Causal attention of a layer, forward and backward, over packed episodes."""
    heads, size = (2, 16) if bench.quick else (12, 64)
    rng = np.random.default_rng(0)
    lengths = {
        "equal lengths": [70] * 2 if bench.quick else [2060] * 8,
        "different lengths": [40, 55] if bench.quick else rng.integers(1100, 1150, 8).tolist(),
    }
    for name, episode_lengths in lengths.items():
        ways = _attention_ways(bench, episode_lengths)
        inputs = [
            torch.randn(
                sum(episode_lengths),
                heads,
                size,
                device=bench.device,
                dtype=torch.bfloat16,
                requires_grad=True,
            )
            for _ in range(3)
        ]
        gradient = torch.randn_like(inputs[0])
        for way, attend in ways.items():
            with bench.variant(f"{name}, {way}: ms"):
                run = partial(_forward_backward, attend, inputs, gradient)
                bench.record(f"{name}, {way}: ms", 1e3 * bench.seconds(run))


def cross_entropy_blocks(bench: Bench) -> None:
    """The loss of a micro-batch of segmentation, forward and backward, by the size of a block."""
    setting = bench.setting()
    targets = 64 if bench.quick else 8 * (EXAMPLES + 1) * setting.codes
    width, ids = setting.settings.width, setting.recipe.vocabulary.size
    hidden_PM, embedding_VM = (
        torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((targets, width), (ids, width))
    )
    labels_P = torch.randint(ids, (targets,), device=bench.device)
    weights_P = torch.ones(targets, device=bench.device)

    def ours() -> None:
        cross_entropy(hidden_PM, embedding_VM, labels_P, weights_P)[0].backward()

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(hidden_PM, embedding_VM).float(), labels_P)

    for chunk in (16, 64) if bench.quick else (1024, 2048, 4096, 8192):
        with bench.variant(f"ours, {chunk} targets at a time: ms"):
            chunked_cross_entropy.GPU_CHUNK = chunk
            bench.record(f"ours, {chunk} targets at a time: ms", 1e3 * bench.seconds(ours))
    compiled = torch.compile(plain, backend=bench.compiler, dynamic=False)
    for name, loss in (("PyTorch's", plain), ("PyTorch's, compiled", compiled)):
        with bench.variant(f"{name}: ms"):
            bench.record(f"{name}: ms", 1e3 * bench.seconds(lambda loss=loss: loss().backward()))


def optimizer(bench: Bench) -> None:
    """A step on all parameters in float32, and the whole update of `Training`."""
    setting = bench.setting()
    with torch.device("meta"):
        model = InContextDecoder(DecoderConfig.from_recipe(setting.recipe))
    shapes = [parameter.shape for parameter in model.parameters()]
    bench.record("parameters", sum(shape.numel() for shape in shapes))
    kinds: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "MT-AdamW": lambda parameters: MTAdamW(parameters, norm=lambda: 100.0),
        "torch's AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
        "torch's AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    }
    for name, make in kinds.items():
        with bench.variant(f"{name}: ms"):
            parameters = [nn.Parameter(torch.randn(s, device=bench.device)) for s in shapes]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            step = make(parameters).step
            bench.record(f"{name}: ms", 1e3 * bench.seconds(step))
            del parameters, step
    with bench.variant("whole update with master weights: ms"):
        run = Training(bench, "segmentation", 1)
        run.micro_step()
        bench.record(
            "whole update with master weights: ms",
            1e3 * bench.seconds(partial(run.update, keep_gradients=True)),
        )


@torch.inference_mode()
def parallel_decoding(bench: Bench) -> None:
    """All codes of a mask in one pass, after 3 examples."""
    setting, best = bench.setting(), 0.0
    decoder = setting.decoder("attributes")
    for batch in (1, 2) if bench.quick else (1, 16, 64, 128):
        for description, requests in (
            ("the same examples", setting.requests(batch)),
            ("own examples", [setting.requests(1, seed=n)[0] for n in range(batch)]),
        ):
            name = f"batch {batch}, {description}: masks/s"
            with bench.variant(name):
                run = partial(_read_codes, decoder, setting, requests)
                best = max(best, rate := batch / bench.seconds(run, repeats=5))
                bench.record(name, rate)
    bench.record("best: masks/s", best)
    bench.record("peak memory, GiB", bench.peak_gib())


def code_by_code(bench: Bench) -> None:
    """One code of a mask after another, after 3 examples, as the product does."""
    setting = bench.setting()
    for feed_forward in ("attributes", "dense"):
        decoder = setting.decoder(feed_forward)
        for batch in (1, 2) if bench.quick else (1, QUERIES):
            name = f"{feed_forward}, batch {batch}: masks/s"
            with bench.variant(name):
                run = partial(decode_batch, decoder, setting.codec, setting.requests(batch))
                bench.record(name, batch / bench.seconds(run, repeats=2, warm_up=1))


def code_by_code_in_place(bench: Bench, compiled: bool = False) -> None:
    """Decoding code by code on static buffers, whose step a CUDA graph replays."""
    setting, best = bench.setting(), 0.0
    decoder = setting.decoder("attributes")
    how = "compiled, CUDA graph" if compiled else "CUDA graph"
    for batch in (1, 2) if bench.quick else (1, QUERIES):
        name = f"{how}, batch {batch}: masks/s"
        with bench.variant(name):
            requests = setting.requests(batch)
            static = StaticCodes(
                decoder, setting.codec, batch, setting.codec.format.length(EXAMPLES + 1)
            )
            started = time.perf_counter()
            if bench.device == "cuda":
                static.capture(requests, compiled)
            elif compiled:
                static.run_step = torch.compile(static.step, backend=bench.compiler)
            codes = static.write(requests)
            bench.record(f"{how}, batch {batch}: seconds to prepare", time.perf_counter() - started)
            rate = batch / bench.seconds(partial(static.write, requests), repeats=3, warm_up=1)
            bench.record(name, rate)
            best = max(best, rate) if batch == 1 else best
            expected = decode_batch(decoder, setting.codec, requests)
            # In bfloat16 two logits are often equal, and codes after another choice differ.
            equal = float(
                np.mean(np.array(codes) == np.array([output.tokens for output in expected]))
            )
            bench.record(f"{how}, batch {batch}: codes equal to the product's, %", 100 * equal)
    bench.record("best: masks/s", best)


def generate(bench: Bench) -> None:
    """Hugging Face's generate with the weights of our dense decoder, and our decoder."""
    setting = bench.setting()
    exact = Setting(setting.recipe, setting.codec, setting.device, torch.float32)
    requests = setting.requests(2)
    with bench.variant("float32: equal codes, %"):
        decoder = exact.decoder("dense")
        share = check_same_choices(decoder, Generate(decoder, exact), exact, requests)
        bench.record("float32: equal codes, %", 100 * share)
    decoder = setting.decoder("dense")
    peer = Generate(decoder, setting)
    for batch in (1, 2) if bench.quick else (1, QUERIES):
        requests = setting.requests(batch)
        with bench.variant(f"batch {batch}, generate: masks/s"):
            theirs = bench.seconds(partial(peer, requests), repeats=2, warm_up=1)
            ours = bench.seconds(
                partial(decode_batch, decoder, setting.codec, requests), repeats=2, warm_up=1
            )
            bench.record(f"batch {batch}, generate: masks/s", batch / theirs)
            bench.record(f"batch {batch}, generate / ours: time", theirs / ours)


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "device": (device, 40),
    "training": (training, 120),
    "training, compiled": (training_compiled, 150),
    "code by code, CUDA graph": (code_by_code_in_place, 90),
    "code by code, compiled": (partial(code_by_code_in_place, compiled=True), 120),
    "parallel decoding": (parallel_decoding, 60),
    "cross-entropy": (cross_entropy_blocks, 60),
    "attention": (attention, 90),
    "optimizer": (optimizer, 60),
    "code by code": (code_by_code, 60),
    "generate": (generate, 90),
}
"""Name -> what it runs, and its time limit in seconds."""


# --- Training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words(NoText):
    """Stands for a text tokenizer: one token for each word."""

    def encode(self, text: str) -> list[int]:
        return [crc32(word.encode()) % self.size for word in text.split()]


class Training:
    """paper_256's decoder with its loss and optimizer on micro-batches of one task."""

    def __init__(self, bench: Bench, task: str, episodes: int) -> None:
        setting = bench.setting()
        self.batch = _batch(setting, task, episodes)
        torch.manual_seed(0)
        with torch.device(bench.device):
            self.model = InContextDecoder(DecoderConfig.from_recipe(setting.recipe))
        for name, parameter in self.model.named_parameters():
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        nn.Module.to(self.model, torch.bfloat16).train()
        named = list(self.model.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
        decayed, plain = [], []
        for (name, _), master in zip(named, self.masters, strict=True):
            matrix = master.dim() >= 2 and "embedding" not in name
            (decayed if matrix else plain).append(master)
        optimizer = setting.recipe.optimizer
        self.norm: Tensor | None = None
        self.optimizer = MTAdamW(
            [
                {"params": decayed, "weight_decay": optimizer.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            norm=lambda: self.norm,
            lr=optimizer.learning_rate,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.epsilon,
        )
        self.flops = training_flops(setting.settings, setting.recipe.vocabulary.size, self.batch)
        self._micro_steps = 0

    def step(self, micro_steps: int) -> None:
        for _ in range(micro_steps):
            self.micro_step()
        self.update()

    def micro_step(self) -> None:
        self._micro_steps += 1
        self.model(self.batch, noise=(0, self._micro_steps)).total.backward()

    @torch.no_grad()
    def update(self, keep_gradients: bool = False) -> None:
        """An expert to which no token went has no gradient, and is left as it is."""
        with_gradient = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None:
                master.grad = None
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
            with_gradient.append((parameter, master))
        gradients = [master.grad for _, master in with_gradient]
        torch._foreach_copy_(gradients, [parameter.grad for parameter, _ in with_gradient])
        self.norm = torch.stack(torch._foreach_norm(gradients)).norm()
        self.optimizer.step()
        torch._foreach_copy_(
            [parameter for parameter, _ in with_gradient], [master for _, master in with_gradient]
        )
        if not keep_gradients:
            self.model.zero_grad(set_to_none=True)


def _batch(setting: Setting, task: str, episodes: int) -> TokenBatch:
    """Random episodes of `EXAMPLES` + 1 pairs, packed."""
    rng = np.random.default_rng(0)
    vocabulary = setting.recipe.vocabulary
    codec = SequenceCodec(setting.codec.format, Words(vocabulary.text_size))

    def codes() -> np.ndarray:
        return rng.integers(0, vocabulary.image_codes, setting.codes)

    def pair(number: int) -> SegmentationPair | CaptionPair:
        if task == "segmentation":
            return SegmentationPair(codes(), codes())
        caption = CAPTIONS[number % len(CAPTIONS)]
        return CaptionPair(codes(), caption, "dog", (0.1, 0.2, 0.6, 0.7))

    made = [
        Episode(TASKS[task], "dog", tuple(pair(start + n) for n in range(EXAMPLES + 1)))
        for start in range(episodes)
    ]
    batch = collate([codec.encode(episode) for episode in made], vocabulary, task, "packed")
    return batch.to(setting.device)


def _record_step(bench: Bench, name: str, run: Training, micro_steps: int) -> float:
    """Record tokens/s and MFU of a step; returns tokens/s."""
    seconds = bench.seconds(partial(run.step, micro_steps), repeats=5, warm_up=2)
    rate = micro_steps * len(run.batch.tokens_T) / seconds
    bench.record(f"{name}: tokens/s", rate)
    if bench.peak_flops:
        share = micro_steps * run.flops / seconds / bench.peak_flops
        bench.record(f"{name}: MFU, %", 100 * share)
    bench.record(f"{name}: peak memory, GiB", bench.peak_gib())
    bench.record(f"{name}: MFLOP a token", run.flops / len(run.batch.tokens_T) / 1e6)
    return rate


def _record_best(bench: Bench, rates: dict[str, float]) -> None:
    of_masks = {name: rate for name, rate in rates.items() if name.startswith("segmentation")}
    if not of_masks:
        return
    name = max(of_masks, key=of_masks.__getitem__)
    recorded = dict(json.loads(line) for line in bench.file.read_text("utf-8").splitlines())
    bench.record("segmentation, best: tokens/s", of_masks[name])
    if f"{name}: MFU, %" in recorded:
        bench.record("segmentation, best: MFU, %", recorded[f"{name}: MFU, %"])


def _waits(bench: Bench, run: Training) -> int:
    """How often a forward and backward pass waits for the GPU, as PyTorch itself warns."""
    if bench.device != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run.micro_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


# --- Attention ------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attention_ways(bench: Bench, lengths: Sequence[int]) -> dict[str, Attend]:
    """Name -> attention of (T, H, D) inputs within episodes of these lengths."""

    def by_rows(attend: Attend) -> Attend:
        """The same attention over a stream that is cut into rows (B, H, L, D)."""

        def attended(*inputs_THD: Tensor) -> Tensor:
            rows = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in inputs_THD)
            return attend(*rows).transpose(1, 2).flatten(0, 1)

        return attended

    def looped(*inputs_THD: Tensor) -> Tensor:
        pieces = [x.transpose(0, 1).split(list(lengths), dim=1) for x in inputs_THD]
        attended = [causal_attention(*piece) for piece in zip(*pieces, strict=True)]
        return torch.cat(attended, dim=1).transpose(0, 1)

    def varlen(*inputs_THD: Tensor) -> Tensor:
        assert has_varlen(inputs_THD[0]), "this device has no FlashAttention"
        return varlen_attention(*inputs_THD, offsets, max(lengths))

    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=bench.device)
    ways: dict[str, Attend] = {"loop over episodes": looped, "varlen": varlen}
    if len(set(lengths)) == 1:
        causal = partial(F.scaled_dot_product_attention, is_causal=True)
        ways["SDPA"] = by_rows(causal)
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            ways[f"SDPA, {backend}"] = by_rows(_with_backend(backend, causal))
    ways["FlexAttention"] = _flex(bench, lengths)
    return ways


def _with_backend(name: str, attend: Attend) -> Attend:
    def attended(*inputs: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, name)):
            return attend(*inputs)

    return attended


def _flex(bench: Bench, lengths: Sequence[int]) -> Attend:
    """FlexAttention over the whole stream with a mask of blocks, which is made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    episode_T = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(bench.device)
    total = sum(lengths)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (episode_T[query] == episode_T[key])

    mask = create_block_mask(visible, None, None, total, total, device=bench.device)
    run = torch.compile(flex_attention, backend=bench.compiler, dynamic=False)

    def attended(*inputs_THD: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in inputs_THD)
        return run(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attended


def _forward_backward(attend: Attend, inputs: Sequence[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(attend(*inputs), inputs, gradient)


def _read_codes(decoder: InContextDecoder, setting: Setting, requests: list[Request]) -> Tensor:
    """The most probable codes, on the host."""
    return decode_at_once(decoder, setting.codec, requests).argmax(dim=-1).cpu()


# --- Processes and results ------------------------------------------------------------------------


def measure(parts: Sequence[str], quick: bool, seconds: float, file: Path) -> None:
    """Run the parts one after another and write `file` after each."""
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    results: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if has_gpu else "no GPU: CPU",
        "torch": torch.__version__,
        "quick": quick,
        "parts": {},
    }
    end = time.monotonic() + seconds
    for name in parts:
        limit = min(PARTS[name][1], end - time.monotonic())
        print(f"{name}: at most {limit:.0f} s ...", file=sys.stderr, flush=True)
        results["parts"][name] = run_part(name, device, quick, limit, file)
        found = results["parts"][name]
        print(f"    {found['error'] or 'done'}, {found['seconds']:.0f} s", file=sys.stderr)
        write_whole(file, json.dumps(results, indent=1) + "\n")


def run_part(name: str, device: str, quick: bool, limit: float, file: Path) -> dict[str, Any]:
    """The figures of a part, its error if it had one, and the seconds that it took."""
    if limit < 1:
        return {"figures": {}, "error": "not run: no time was left", "seconds": 0.0}
    figures, log = (file.with_suffix(f".{kind}") for kind in ("figures", "log"))
    for path in (figures, log):
        path.write_text("", encoding="utf-8")
    # A process that has used a GPU must not be forked; on a CPU that saves the imports.
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    process = context.Process(target=_part_alone, args=(name, Bench(device, quick, figures), log))
    started = time.monotonic()
    process.start()
    process.join(limit)
    error = None
    if process.is_alive():
        error = f"stopped after its {limit:.0f} s"
    elif process.exitcode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        error = f"exit code {process.exitcode}: {lines[-1][:300] if lines else 'no output'}"
        sys.stderr.write("\n".join(lines[-15:]) + "\n")
    assert process.pid is not None
    _end(process.pid)
    process.kill()  # It may not have had the time to lead a group of its own.
    process.join()
    found = [json.loads(line) for line in figures.read_text("utf-8").splitlines()]
    for path in (figures, log):
        path.unlink()
    return {"figures": dict(found), "error": error, "seconds": time.monotonic() - started}


def _end(group: int) -> None:
    """End a part's process and those that it has started, such as compilers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _part_alone(name: str, bench: Bench, log: Path) -> None:
    os.setsid()
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8", buffering=1)
    for stream in (1, 2):  # What libraries print below Python.
        os.dup2(sys.stderr.fileno(), stream)
    try:
        PARTS[name][0](bench)
    except Exception as error:
        traceback.print_exc()
        print(_first_line(error), file=sys.stderr)
        os._exit(1)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def render(results: dict[str, Any]) -> str:
    """The Markdown table of the results."""
    lines = [
        f"Measured on {results['card']} with torch {results['torch']}"
        + (", at toy size: the figures have no meaning." if results["quick"] else "."),
        "",
        "| part | figure | value | goal |",
        "|---|---|---|---|",
    ]
    for part, found in results["parts"].items():
        for name, value in found["figures"].items():
            lines.append(f"| {part} | {name} | {_shown(value)} | {_goal(part, name, value)} |")
        if found["error"]:
            lines.append(f"| {part} | **failed** | {found['error']} | |")
    return "\n".join(lines)


def _goal(part: str, figure: str, value: float | str) -> str:
    bound = next(
        (
            goal
            for (prefix, name), goal in GOALS.items()
            if name == figure and part.startswith(prefix)
        ),
        None,
    )
    if bound is None or isinstance(value, str):
        return ""
    return f"at least {bound:,}, {'met' if value >= bound else 'missed'}"


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value.replace("|", "/")
    if value and (abs(value) >= 100 or value == int(value)):
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


if __name__ == "__main__":
    sys.exit(main())
