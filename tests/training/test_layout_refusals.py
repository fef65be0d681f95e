"""Layouts, precisions and data that cannot work together are refused before any rank starts; valid
ones are not.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from small_run import SETTINGS

from icl_moe.errors import InputError
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.training.preflight import open_checked

LAYOUT = ("model.heads=4", "training.global_batch=8", "training.micro_batch=2")


def check_demo(shards: Path, world: int, *settings: str) -> dict:
    recipe = load_recipe(
        TrainingRecipe,
        "demo",
        [f"data.shards={shards}", "training.output=unused", *SETTINGS, *LAYOUT, *settings],
    )
    return open_checked(recipe, world)[1]


def engine_file(folder: Path, **config: object) -> str:
    path = folder / "engine.json"
    path.write_text(json.dumps(config))
    return f"engine={path}"


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (4, ["parallel.tp_size=2", "parallel.ep_size=2"]),
        (8, ["parallel.tp_size=2", "parallel.ep_size=8"]),
        # Here eight ranks are four data-parallel ones: a batch of two samples would be too small
        # for eight.
        (8, ["parallel.tp_size=2", "training.global_batch=8"]),
        (2, ["engine=zero3_bf16"]),
    ],
)
def test_layouts_that_work_pass(shards, world, settings):
    check_demo(shards, world, *settings)


@pytest.mark.parametrize(
    ("world", "settings", "sentence"),
    [
        (
            2,
            ["optimizer.name=muon", "engine=zero1_fp32"],
            "optimizer.name=muon needs whole matrices on every rank: an engine of ZeRO stage 0",
        ),
        (
            6,
            ["parallel.tp_size=3"],
            "parallel.tp_size (3) must divide model.heads (4) and the number of ranks (6).",
        ),
        (
            3,
            ["parallel.tp_size=2"],
            "parallel.tp_size (2) must divide model.heads (4) and the number of ranks (3).",
        ),
        (
            3,
            ["parallel.ep_size=2"],
            "parallel.ep_size (2) must divide model.experts (8) and the number of ranks (3).",
        ),
        (1, ["parallel.ep_size=0"], "parallel.ep_size must be at least 1, not 0."),
        (
            8,
            [],
            "training.global_batch (8) must be a multiple of training.micro_batch x data-parallel "
            "ranks (2 x 8).",
        ),
        (
            2,
            ["parallel.ep_size=2", "engine=zero3_bf16"],
            "parallel.ep_size and parallel.tp_size must be 1 with ZeRO stage 3",
        ),
        (
            2,
            ["parallel.tp_size=2", "engine=zero3_bf16"],
            "parallel.ep_size and parallel.tp_size must be 1 with ZeRO stage 3",
        ),
        (
            2,
            ["model.feed_forward=token", "model.combination=weights"],
            "model.combination=weights needs model.feed_forward=attributes",
        ),
        (
            2,
            ["parallel.ep_size=2", "model.combination=weights"],
            "parallel.ep_size must be 1 with model.combination=weights",
        ),
    ],
)
def test_layouts_that_cannot_work_are_refused(shards, world, settings, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        check_demo(shards, world, *settings)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ([], "must hold keys and values, not []."),
        ({"zero_optimization": 1}, "zero_optimization must hold keys and values, not 1."),
        (
            {"zero_optimization": {"stage": "two"}},
            "zero_optimization.stage must be one of 0 | 1 | 2 | 3, not 'two'.",
        ),
        ({"zero_optimization": {"stage": 4}}, "stage must be one of 0 | 1 | 2 | 3, not 4."),
        ({"zero_optimization": {"stage": True}}, "stage must be one of 0 | 1 | 2 | 3, not True."),
        ({"bf16": True}, "bf16 must hold keys and values, not True."),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled must be true or false, not 'yes'."),
        ({"csv_monitor": {"enabled": 1}}, "csv_monitor.enabled must be true or false, not 1."),
        ({"tensorboard": {"job_name": 5}}, "tensorboard.job_name: Input should be a valid string"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "large"}},
            "reduce_bucket_size: Input should be a valid integer, unable to parse string as an "
            "integer, not 'large'.",
        ),
        ({"comms_logger": 3}, "engine: DeepSpeed refuses "),
        ({"zero_optimisation": {"stage": 3}}, "'zero_optimisation'; write 'zero_optimization'."),
        ({"bfloat16": {"enabled": True}}, "has the key 'bfloat16'; write 'bf16'."),
        (
            {"zero_optimization": {"stage": 2, "reduce_scatter": False}},
            "sets zero_optimization.reduce_scatter to false; ZeRO stage 2 needs it true",
        ),
    ],
    ids=str,
)
def test_values_of_the_wrong_type_in_an_engine_file_are_refused(shards, tmp_path, config, sentence):
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=re.escape(sentence)) as refusal:
        check_demo(shards, 1, f"engine={path}")
    assert str(refusal.value).startswith("engine: ") and str(path) in str(refusal.value)


def test_an_engine_file_that_cannot_be_read_is_refused(shards, tmp_path):
    (tmp_path / "engine.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match=r"engine\.json is not valid JSON"):
        check_demo(shards, 1, f"engine={tmp_path / 'engine.json'}")


def test_more_readers_than_the_machine_can_use_are_refused(shards):
    with pytest.raises(InputError, match=r"data\.workers must be at most \d+ on this machine"):
        check_demo(shards, 1, "data.workers=1000000")


def test_fp16_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match="enables fp16, which is not offered"):
        check_demo(shards, 1, engine_file(tmp_path, fp16={"enabled": True}))


def test_bf16_without_zero_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match="bf16 at ZeRO stage 0"):
        check_demo(shards, 1, engine_file(tmp_path, bf16={"enabled": True}))


def test_bf16_is_refused_on_a_gpu_that_lacks_it(shards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(InputError, match="engine: zero1_bf16 enables bf16, which Tesla V100 lacks"):
        check_demo(shards, 1, "engine=zero1_bf16")


def test_a_run_on_codes_of_another_tokenizer_is_refused(shards, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"image_tokenizer": "0ther"}))
    with pytest.raises(InputError, match="was on codes of the image tokenizer 0ther"):
        check_demo(shards, 1, f"training.output={tmp_path}")


def test_a_run_whose_configuration_is_cut_off_is_refused(shards, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"image_tokenizer": "0the')
    with pytest.raises(InputError, match=r"config\.json, line 1, column 21 is not valid JSON"):
        check_demo(shards, 1, f"training.output={tmp_path}")
