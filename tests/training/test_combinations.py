"""Every accepted combination of a training recipe's choices trains: any two choices occur together
in one of the rows here, and each row runs for a step. Any two that are refused are refused before
anything starts.
"""

import itertools
import json
from pathlib import Path

import pytest
from training import training_on_ranks
from training.pairwise import Pair, covering_rows

from icl_moe.errors import InputError
from icl_moe.training.preflight import open_checked

FACTORS = {
    "model.feed_forward": ("dense", "token", "attributes"),
    "model.gate_input": ("attributes", "token", "token+attributes", "none"),
    "model.combination": ("outputs", "weights"),
    "model.experts_per_token": ("1", "2"),
    "model.gate_noise": ("true", "false"),
    "model.layers_with_experts": ("[1]", "[0, 1]"),
    "model.link": ("false", "true"),
    "model.initialisation": ("gpt2", "fan_in"),
    "model.codebook_init": ("false", "true"),
    "model.dropout": ("0", "0.1"),
    "model.attention_dropout": ("0", "0.1"),
    "data.layout": ("packed", "padded"),
    "optimizer.name": ("adamw", "mt_adamw", "muon"),
    "optimizer.clip": ("null", "0.5"),
    "optimizer.task_weights": ("null", "{captioning: 2}"),
    "optimizer.schedule": ("constant", "cosine"),
    "training.sampling": ("unmixed", "mixed"),
    "training.task_weights": ("null", "{segmentation: 1, captioning: 2}"),
    "training.micro_batch": ("1", "2"),
    "training.loss_on": ("all", "query"),
    "training.mask_corruption": ("false", "true"),
    "training.input_loss_weight": ("0", "0.5"),
    "training.input_loss": ("tokens", "mean"),
    "training.activation_checkpointing": ("false", "true"),
    "training.dry_run": ("false", "true"),
    "training.deterministic": ("false", "true"),
    "training.gradient_report_every": ("null", "1"),
    "engine": ("zero0_fp32", *(f"zero{n}_{kind}" for n in (1, 2, 3) for kind in ("fp32", "bf16"))),
    "parallel.ep_size": ("1", "2"),
    "parallel.tp_size": ("1", "2"),
}


def pair(first: str, second: str) -> Pair:
    (a, x), (b, y) = first.split("="), second.split("=")
    return frozenset([(a, x), (b, y)])


REFUSED = {
    pair("model.combination=weights", "model.feed_forward=token"),
    pair("model.combination=weights", "model.gate_input=token"),
    pair("model.combination=weights", "model.gate_input=token+attributes"),
    pair("model.gate_input=none", "model.feed_forward=dense"),
    pair("model.gate_input=none", "model.feed_forward=token"),
    pair("model.gate_input=none", "model.experts_per_token=2"),
    pair("model.combination=weights", "parallel.ep_size=2"),
    pair("optimizer.name=mt_adamw", "optimizer.clip=0.5"),
    pair("optimizer.name=mt_adamw", "training.sampling=mixed"),
    pair("optimizer.name=adamw", "optimizer.task_weights={captioning: 2}"),
    pair("optimizer.name=muon", "optimizer.task_weights={captioning: 2}"),
    pair("optimizer.name=muon", "parallel.tp_size=2"),
    *(
        pair("optimizer.name=muon", f"engine=zero{n}_{precision}")
        for n, precision in itertools.product((1, 2, 3), ("fp32", "bf16"))
    ),
    pair("optimizer.clip=0.5", "optimizer.task_weights={captioning: 2}"),
    pair("training.sampling=mixed", "optimizer.task_weights={captioning: 2}"),
    pair("training.sampling=mixed", "training.task_weights={segmentation: 1, captioning: 2}"),
    *(
        pair(f"engine=zero3_{precision}", f"parallel.{size}=2")
        for precision, size in itertools.product(("fp32", "bf16"), ("ep_size", "tp_size"))
    ),
}

ENGINES = {"zero2_fp32": 2, "zero3_fp32": 3}
"""ZeRO stage -> an engine file that is not shipped."""


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for name, stage in ENGINES.items():
        # Without this threshold stage 3 would not partition parameters as small as these.
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder


def settings(row: dict[str, str], engines: Path) -> list[str]:
    chosen = [f"{key}={value}" for key, value in row.items() if key != "engine"]
    engine = row.get("engine", "zero1_fp32")
    return [*chosen, f"engine={engines / engine}.json" if engine in ENGINES else f"engine={engine}"]


@pytest.mark.parametrize("row", covering_rows(FACTORS, REFUSED), ids=lambda row: row["engine"])
def test_any_two_choices_that_are_accepted_train(rank_group, shards, tmp_path, engines, row):
    fixed = ("training.steps=1", "data.workers=0", "training.global_batch=4")
    for rank in rank_group(2).run(
        training_on_ranks.run, shards, tmp_path / "run", (*fixed, *settings(row, engines))
    ):
        assert rank["ended"] == "well"
        if rank["printed"]:
            assert "step 1/1" in rank["printed"]
            assert "not finite" not in rank["printed"]
            assert "optimizer.warmup_steps (2) is more than training.steps (1)" in rank["printed"]
    assert list((tmp_path / "run/checkpoints").glob("*/complete.json"))


@pytest.mark.parametrize("refused", sorted(map(sorted, REFUSED)), ids=str)
def test_any_two_choices_that_are_refused_are_refused_before_anything_starts(
    shards, tmp_path, engines, refused
):
    # If one of them needs a third choice to be accepted at all, that is added.
    needed = {
        "optimizer.task_weights": {"optimizer.name": "mt_adamw", "optimizer.clip": "null"},
        "optimizer.clip": {"optimizer.name": "adamw"},
    }
    row: dict[str, str] = {}
    for key, _ in refused:
        row |= needed.get(key, {})
    with pytest.raises(InputError):
        open_checked(
            training_on_ranks.load(
                shards, tmp_path / "run", *settings({**row, **dict(refused)}, engines)
            ),
            world=2,
        )
    assert not (tmp_path / "run").exists()
