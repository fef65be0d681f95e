"""Decoding compared with Hugging Face's generate: python benchmarks/inference.py [--json FILE]

    batch 1           a mask of a query with 3 examples, code by code: our decoder, dense, against
                      `GPT2LMHeadModel.generate` with the same weights, its own cache, and logits
                      of all but image codes set to minus infinity
    shared examples   16 queries with the same 3 examples: ours reads the examples once; generate
                      reads them with each query
    parallel          all codes of a mask in one pass against one code at a time, ours both
    MoE / dense       a mask code by code, ours both, attribute-routed experts against dense

The decoder is that of `ablation_128` (GPT-2 small's trunk, 128 pixels, 64 codes an image), or of
`--recipe paper_256` (256 codes), with random weights. Before anything is timed, both sides write
the same masks and must choose the same codes (a difference is accepted only where the two best
logits are within rounding). All systems run in one process, in turns; compare the ratios.
Tokenizing images is on neither side.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Goal, in_turns, report
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor

from icl_moe.inference.cache import KeyValueCache
from icl_moe.inference.decode import Request, decode_at_once, decode_batch
from icl_moe.model.config import DecoderConfig
from icl_moe.model.decoder import InContextDecoder, initialise
from icl_moe.recipe import ModelSettings, TrainingRecipe
from icl_moe.sequence import Episode, SequenceCodec, SequenceFormat
from icl_moe.settings import load_recipe, to_dict
from icl_moe.tasks import SEGMENTATION
from icl_moe.tasks.segmentation import SegmentationPair

EXAMPLES, QUERIES = 3, 16

TOY = (
    "model.layers=2",
    "model.layers_with_experts=[1]",
    "model.width=64",
    "model.heads=2",
    "model.positions=204",
    "vocabulary.text_merges=1000",
)
"""A size at which the benchmark itself can be tested."""

GOALS = {
    "generate / ours, batch 1": Goal("generate / ours, batch 1", 0.0, 1.5),
    "generate / ours, shared examples": Goal("generate / ours, shared examples", 0.0, 3.0),
    "code by code / parallel": Goal("code by code / parallel", 0.0, 8.0),
    "MoE / dense": Goal("MoE / dense", 0.0, 1.25, at_most=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--recipe", choices=("ablation_128", "paper_256"), default="ablation_128")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="use a toy model, to test the benchmark itself"
    )
    options = parser.parse_args()
    setting = Setting.of(options.recipe, "cpu", torch.float32, TOY if options.quick else ())
    figures: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "codes an image": setting.codes,
        "tokens of the examples": EXAMPLES * setting.codec.format.pair_length,
    }
    dense, experts = setting.decoder("dense"), setting.decoder("attributes")
    peer = Generate(dense, setting)
    requests = setting.requests(QUERIES)
    check_same_choices(dense, peer, setting, requests)
    ratios = race(dense, experts, peer, setting, requests, options.repeats, figures)
    for name, decoder in (("dense", dense), ("MoE", experts)):
        figures[f"{name}: keys and values of the examples, MiB"] = session_mib(decoder, setting)
    report(
        figures, [replace(goal, value=ratios[name]) for name, goal in GOALS.items()], options.json
    )


@dataclass(frozen=True)
class Setting:
    """A recipe's decoder with masks of its own size, on a device in a precision."""

    recipe: TrainingRecipe
    codec: SequenceCodec
    device: str
    dtype: torch.dtype

    @classmethod
    def of(
        cls, recipe_name: str, device: str, dtype: torch.dtype, overrides: tuple[str, ...] = ()
    ) -> "Setting":
        mask = ("vocabulary.mask=true", "training.mask_corruption=true")
        recipe = load_recipe(TrainingRecipe, recipe_name, [*mask, *overrides])
        # The sequences of the recipe are whole: each pair has its image and its mask.
        codes = (recipe.model.positions // (EXAMPLES + 1) - 3) // 2
        format = SequenceFormat(recipe.vocabulary, codes)
        return cls(
            recipe, SequenceCodec(format, NoText(format.vocabulary.text_size)), device, dtype
        )

    @property
    def codes(self) -> int:
        return self.codec.format.codes_per_image

    @property
    def settings(self) -> ModelSettings:
        return self.recipe.model

    def decoder(self, feed_forward: str) -> InContextDecoder:
        """Our decoder with random weights."""
        recipe = replace(self.recipe, model=replace(self.recipe.model, feed_forward=feed_forward))
        decoder = InContextDecoder(
            DecoderConfig.from_recipe(recipe, format=to_dict(self.codec.format))
        )
        initialise(decoder, seed=0)
        with torch.no_grad():  # So that the choices depend on the prompt, as after training.
            for name, parameter in decoder.named_parameters():
                if "embedding" not in name:
                    parameter.mul_(3.0)
        moved: InContextDecoder = torch.nn.Module.to(decoder, self.device, self.dtype)
        return moved.eval()

    def requests(self, count: int, seed: int = 0) -> list[Request]:
        """Queries with the same random examples."""
        rng = np.random.default_rng(seed)

        def draw() -> np.ndarray:
            return rng.integers(0, self.recipe.vocabulary.image_codes, self.codes)

        episode = Episode(
            SEGMENTATION, "", tuple(SegmentationPair(draw(), draw()) for _ in range(EXAMPLES))
        )
        return [(episode, draw()) for _ in range(count)]

    def prompts(self, requests: list[Request]) -> Tensor:
        """The tokens (B, L) of the requests, which are equally long."""
        rows = [self.codec.encode_prompt(*request).unpadded().tokens_L for request in requests]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class NoText:
    """Stands for a text tokenizer where no text occurs, so that none need be installed."""

    size: int
    fingerprint: str = ""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("masks have no text")

    decode = encode


class Generate:
    """Hugging Face's GPT-2 with the weights of our dense decoder, which computes the same logits:
    both are pre-norm, with learned positions, the tanh GELU and tied embeddings.
    """

    def __init__(self, decoder: InContextDecoder, setting: Setting) -> None:
        settings, vocabulary = setting.settings, setting.recipe.vocabulary
        self._setting = setting
        self._ids = vocabulary.image_range
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary.size,
                n_positions=settings.positions,
                n_embd=settings.width,
                n_layer=settings.layers,
                n_head=settings.heads,
                layer_norm_epsilon=settings.layer_norm_epsilon,
                activation_function="gelu_new",
                attn_implementation="sdpa",
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.model.load_state_dict(gpt2_weights(decoder), strict=False)
        self.model.to(setting.device, setting.dtype).eval()

    @torch.inference_mode()
    def __call__(self, requests: list[Request]) -> list[list[int]]:
        prompts_BL = self._setting.prompts(requests)
        written = self.model.generate(
            prompts_BL,
            attention_mask=torch.ones_like(prompts_BL),
            max_new_tokens=self._setting.codes,
            min_new_tokens=self._setting.codes,
            do_sample=False,
            use_cache=True,
            pad_token_id=self._setting.recipe.vocabulary.pad,
            logits_processor=[_Only(self._ids)],
        )
        codes: list[list[int]] = written[:, prompts_BL.shape[1] :].tolist()
        return codes

    @torch.inference_mode()
    def logits(self, tokens_BL: Tensor) -> Tensor:
        """Of image codes, at every position (B, L, K), float32."""
        found: Tensor = self.model(tokens_BL).logits
        return found[..., self._ids.start : self._ids.stop].float()


class _Only(LogitsProcessor):
    """Lets generate choose among the ids of a range."""

    def __init__(self, ids: range) -> None:
        self._ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, : self._ids.start] = -torch.inf
        scores[:, self._ids.stop :] = -torch.inf
        return scores


def gpt2_weights(decoder: InContextDecoder) -> dict[str, Tensor]:
    """Our weights by GPT-2's names. Its matrices are transposed."""
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    weights: dict[str, Tensor] = {}
    for name, value in decoder.state_dict().items():
        if name.startswith("layers."):
            _, layer, *path, kind = name.split(".")
            theirs = parts[".".join(path)]
            matrix = kind == "weight" and "norm" not in path[-1]
            weights[f"transformer.h.{layer}.{theirs}.{kind}"] = value.t() if matrix else value
        else:
            module, kind = name.split(".")
            theirs = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f"}[module]
            weights[f"transformer.{theirs}.{kind}"] = value
    weights["lm_head.weight"] = decoder.token_embedding.weight
    return weights


def check_same_choices(
    decoder: InContextDecoder, peer: Generate, setting: Setting, requests: list[Request]
) -> float:
    """Assert that both sides choose the same codes for all requests together and for the first one
    alone, up to a first difference between logits that are nearly equal. Returns the share of equal
    codes.

    The bound of "nearly equal" is 1e-4 in float32 and 0.1 in bfloat16, whose logits have 8 bits.
    """
    bound = 1e-4 if setting.dtype == torch.float32 else 0.1
    equal = total = 0
    for asked in (requests, requests[:1]):
        written = decode_batch(decoder, setting.codec, asked)
        ours, theirs = [each.tokens for each in written], peer(asked)
        assert len({tuple(codes) for codes in theirs}) == len(asked), (
            "masks that do not depend on the query would prove nothing"
        )
        prompts_BL = setting.prompts(asked)
        for prompt_L, mine, other in zip(prompts_BL, ours, theirs, strict=True):
            same = [a == b for a, b in zip(mine, other, strict=True)]
            equal, total = equal + sum(same), total + len(same)
            if all(same):
                continue
            cell = same.index(False)
            read_L = torch.cat([prompt_L, prompt_L.new_tensor(other[:cell])])
            logits_K = peer.logits(read_L[None])[0, -1]
            first = setting.recipe.vocabulary.image_range.start
            gap = float((logits_K[mine[cell] - first] - logits_K[other[cell] - first]).abs())
            assert gap < bound, f"different codes in cell {cell}, whose logits differ by {gap}"
    return equal / total


def race(
    dense: InContextDecoder,
    experts: InContextDecoder,
    peer: Generate,
    setting: Setting,
    requests: list[Request],
    repeats: int,
    figures: dict[str, Any],
) -> dict[str, float]:
    """Time all systems in turns; returns the ratio of each of `GOALS`."""
    codec, one = setting.codec, requests[:1]
    runs: dict[str, Callable[[], Any]] = {
        "generate, batch 1": partial(peer, one),
        "ours, dense, batch 1": partial(decode_batch, dense, codec, one),
        "ours, MoE, batch 1": partial(decode_batch, experts, codec, one),
        "ours, MoE, parallel, batch 1": partial(decode_at_once, experts, codec, one),
        f"generate, {QUERIES} queries": partial(peer, requests),
        f"ours, dense, {QUERIES} queries": partial(decode_batch, dense, codec, requests),
        f"ours, MoE, parallel, {QUERIES} queries": partial(
            decode_at_once, experts, codec, requests
        ),
    }
    seconds = dict(
        zip(
            runs,
            in_turns(*(_waited(run, setting) for run in runs.values()), repeats=repeats),
            strict=True,
        )
    )
    for name, found in seconds.items():
        figures[f"{name}: ms per mask"] = 1e3 * found / (QUERIES if "queries" in name else 1)
    return {
        "generate / ours, batch 1": seconds["generate, batch 1"] / seconds["ours, dense, batch 1"],
        "generate / ours, shared examples": seconds[f"generate, {QUERIES} queries"]
        / seconds[f"ours, dense, {QUERIES} queries"],
        "code by code / parallel": seconds["ours, MoE, batch 1"]
        / seconds["ours, MoE, parallel, batch 1"],
        "MoE / dense": seconds["ours, MoE, batch 1"] / seconds["ours, dense, batch 1"],
    }


def _waited(run: Callable[[], Any], setting: Setting) -> Callable[[], None]:
    def waited() -> None:
        run()
        setting.synchronize()

    return waited


@torch.inference_mode()
def session_mib(decoder: InContextDecoder, setting: Setting) -> float:
    """The keys and values that are kept of the examples, in MiB."""
    ((episode, _),) = setting.requests(1)
    read = setting.codec.encode(episode)
    cache = KeyValueCache(len(read))
    decoder.next_logits(
        torch.from_numpy(read.tokens_L)[None].to(setting.device),
        torch.from_numpy(read.positions_L)[None].to(setting.device),
        torch.from_numpy(read.attributes())[None],
        cache,
    )
    return cache.bytes / 2**20


if __name__ == "__main__":
    main()
