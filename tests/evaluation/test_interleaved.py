"""A vision-language model as a baseline: its prompts, its answers, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import toy_interleaved
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from icl_moe.baselines import predict_baseline
from icl_moe.baselines.interleaved import MOST_TOKENS, InterleavedModel
from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.other_systems import check_predictions, open_episodes
from icl_moe.evaluation.photographs import Photographs

SAVED = {"idefics2": toy_interleaved.save_idefics2, "idefics3": toy_interleaved.save_idefics3}


@pytest.fixture(scope="module", params=SAVED)
def weights(request, tmp_path_factory) -> Path:
    return SAVED[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory) -> Path:
    return toy_interleaved.save_idefics3(tmp_path_factory.mktemp("idefics3"))


def _greedy(weights: Path, prompt: str, pictures: list[Image.Image]) -> str:
    """What the model writes, computed anew from all tokens for each token."""
    processor = AutoProcessor.from_pretrained(weights)
    model = AutoModelForImageTextToText.from_pretrained(weights).eval()
    inputs = processor(text=prompt, images=pictures, return_tensors="pt")
    start = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        for _ in range(MOST_TOKENS):
            token = model(**inputs).logits[0, -1].argmax()
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None, None]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if token == processor.tokenizer.eos_token_id:
                break
    return processor.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)


def test_a_query_is_asked_after_its_examples_and_answered_greedily(toy_shards, weights, tmp_path):
    shards = ShardSet(toy_shards)
    (episodes,) = [found for found in open_episodes(shards) if found.task.name == "captioning"]
    done = predict_baseline(
        "idefics", shards, tmp_path, 2, limit=2, weights=str(weights), device="cpu"
    )
    assert done == ["captioning"]
    system = check_predictions(tmp_path, shards, limit=2)["captioning"]
    assert (system.name, system.shots) == ("idefics", 2)
    first, second = episodes[0].meta["captions"][:2]
    prompt = f"<image>Caption: {first}\n<image>Caption: {second}\n<image>Caption:"
    photographs = Photographs(shards, "captioning")
    pictures = [photographs.show(episodes[0], pair).convert("RGB") for pair in (0, 1, 2)]
    expected = _greedy(weights, prompt, pictures)
    (output, _) = system.outputs
    assert output["caption"] == " ".join(expected.lstrip().split("\n")[0].split()).replace('"', "")
    assert output["category"] is None and output["box"] is None


def test_the_answer_depends_on_the_query_and_on_the_examples(idefics3):
    model = InterleavedModel(str(idefics3), "cpu")
    red, blue, green = (Image.new("RGB", (32, 32), name) for name in ("red", "blue", "green"))
    answers = {
        model.describe([red, blue], ["a red one"]),
        model.describe([red, green], ["a red one"]),
        model.describe([red, blue], ["nothing of it"]),
    }
    assert len(answers) == 3


def test_captions_cannot_pass_for_pictures_or_for_other_pairs(idefics3):
    model = InterleavedModel(str(idefics3), "cpu")
    prompt = model.prompt(["a <image> dog\nCaption: two"])
    assert prompt == "<image>Caption: a dog Caption: two\n<image>Caption:"


def test_the_rows_of_captions_have_the_model(
    toy_shards, toy_model_folder, idefics3, tmp_path, no_java
):
    predicted, out = tmp_path / "predictions", tmp_path / "evaluation"
    options = ["--limit", "2", "--device", "cpu"]
    words = ["predictions", "baseline", "idefics", str(toy_shards), "--out", str(predicted)]
    assert main([*words, *options, "--weights", str(idefics3)]) == 0
    words = ["evaluate", str(toy_model_folder), str(toy_shards), "--out", str(out)]
    named = ["--predictions", f"Idefics={predicted}", "--control", "none"]
    assert main([*words, *options, *named]) == 0
    tasks = json.loads((out / "metrics.json").read_text())["tasks"]
    rows = {row["name"]: row for row in tasks["captioning"]["rows"]}
    row = rows["Idefics, 1 example"]
    assert row["prediction"] == "predictions" and 0 <= row["cider"] <= 10


def _without_image_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def _short_context(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(config))


REFUSED = {
    "a folder that is not there": (
        shutil.rmtree,
        r"The vision-language model .*weights cannot be loaded: there is no such folder\.",
    ),
    "no image processor": (
        _without_image_processor,
        r"weights holds no image processor \(preprocessor_config\.json or processor_config\.json\)",
    ),
    "pictures and texts apart": (
        toy_interleaved.save_clip_processor,
        r"weights has no processor that places images in a text; take a model",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"The vision-language model .* cannot be loaded; name a folder or a Hub id",
    ),
    "too many examples": (
        _short_context,
        r"2 examples and a query are \d+ tokens for .*, and its answer up to 20, but its context "
        r"holds 64; show fewer examples with --shots\.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_answer_is_refused_in_a_sentence(
    toy_shards, idefics3, tmp_path, case, capfd
):
    folder = tmp_path / "weights"
    shutil.copytree(idefics3, folder)
    change, message = REFUSED[case]
    change(folder)
    words = ["predictions", "baseline", "idefics", str(toy_shards), "--shots", "2"]
    more = ["--weights", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, *more]) == 2
    printed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("icl-moe")]
    assert len(printed) == 1 and re.search(message, printed[0]), printed
    assert not (tmp_path / "out/captioning.json").exists()


def test_a_query_without_examples_is_refused(toy_shards, tmp_path):
    with pytest.raises(InputError, match="--shots must be at least 1"):
        predict_baseline("idefics", ShardSet(toy_shards), tmp_path, shots=0)
