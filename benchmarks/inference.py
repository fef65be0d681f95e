"""Decoding compared with Hugging Face's generate: python benchmarks/inference.py [--json FILE]

    batch 1           a mask of a query with 3 examples, code by code: our decoder, dense, against
                      `GPT2LMHeadModel.generate` with the same weights, its own cache, and logits
                      of all but image codes set to minus infinity
    shared examples   16 queries with the same 3 examples: ours reads the examples once; generate
                      reads them with each query
    parallel          all codes of a mask in one pass against one code at a time, ours both, after
                      the examples were read, as each query of a session is asked
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generate_peer import CODES, EXAMPLES, QUERIES, Generate, Setting, check_same_choices
from measure import Goal, in_turns, report

from icl_moe.inference.cache import KeyValueCache
from icl_moe.inference.decode import Request, decode_at_once, decode_batch, read_examples
from icl_moe.model.decoder import InContextDecoder

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
    parser.add_argument("--recipe", choices=tuple(CODES), default="ablation_128")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="use a toy model, to test the benchmark itself"
    )
    options = parser.parse_args()
    setting = Setting.of(options.recipe, "cpu", torch.float32, options.quick)
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
    read = [read_examples(experts, codec, requests[0][0])]
    runs: dict[str, Callable[[], Any]] = {
        "generate, batch 1": partial(peer, one),
        "ours, dense, batch 1": partial(decode_batch, dense, codec, one),
        "ours, MoE, batch 1": partial(decode_batch, experts, codec, one),
        "ours, MoE, parallel, batch 1": partial(decode_at_once, experts, codec, one),
        "ours, MoE, batch 1, examples read": partial(decode_batch, experts, codec, one, read=read),
        "ours, MoE, parallel, batch 1, examples read": partial(
            decode_at_once, experts, codec, one, read=read
        ),
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
        "code by code / parallel": seconds["ours, MoE, batch 1, examples read"]
        / seconds["ours, MoE, parallel, batch 1, examples read"],
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
