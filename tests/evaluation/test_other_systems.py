"""Predictions of other systems: what they are asked for, what is refused, and their rows beside a
model's.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import SegGptConfig, SegGptForImageSegmentation

from icl_moe.baselines import predict_baseline
from icl_moe.baselines.seggpt import paint
from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.compare import Compared, compare, comparison_table, sign_test
from icl_moe.evaluation.episodes import EpisodeSet
from icl_moe.evaluation.other_systems import (
    check_predictions,
    episodes_hash,
    open_episodes,
    write_predictions,
)
from icl_moe.evaluation.protocol import evaluate
from icl_moe.evaluation.template import write_template
from icl_moe.rle import run_lengths


@pytest.fixture(scope="module")
def shards(toy_shards) -> ShardSet:
    return ShardSet(toy_shards)


@pytest.fixture(scope="module")
def truths(shards, tmp_path_factory) -> Path:
    """A folder with the true outputs of all queries."""
    folder = tmp_path_factory.mktemp("truths")
    for episodes in open_episodes(shards):
        task = episodes.task
        right = [task.true_output(episodes[n]) for n in range(len(episodes))]
        write_predictions(folder, episodes, "the truth", 1, right)
        swapped = [
            task.objects(truth)[source.kind][0] | {"category": source.category}
            for truth, source in episodes.questions(swapped=True)
        ]
        write_predictions(folder, episodes, "the truth", 1, swapped, swapped=True)
    return folder


@pytest.fixture(scope="module")
def copies(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    assert predict_baseline("copy", shards, folder) == ["segmentation", "captioning"]
    return folder


@pytest.fixture(scope="module")
def evaluation(toy_model_folder, toy_shards, truths, copies, tmp_path_factory) -> Path:
    """An evaluation with the predictions of two other systems, without Java."""
    folder = tmp_path_factory.mktemp("evaluation")
    named = {"an oracle": truths, "a copy": copies}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent))
        evaluate(toy_model_folder, toy_shards, folder, predictions=named)
    return folder


def test_other_systems_are_rows_beside_the_model(evaluation):
    metrics = json.loads((evaluation / "metrics.json").read_text())
    for task, score in (("segmentation", "miou"), ("captioning", "cider")):
        rows = {row["name"]: row for row in metrics["tasks"][task]["rows"]}
        oracle, copy = rows["an oracle, 1 example"], rows["a copy, 1 example"]
        assert oracle["prediction"] == copy["prediction"] == "predictions"
        first = rows["the first example's output, whatever the query"]
        assert copy[score] == first[score] < oracle[score]
        swapped = {row["name"]: row for row in metrics["tasks"][task]["swapped"]}
        oracle, copy = swapped["an oracle, 1 example"], swapped["a copy, 1 example"]
        first = swapped["the first example's output, whatever the query"]
        assert oracle["flips"] == oracle["right_swapped"] == 1.0
        shares = ("queries", "flips", "right", "right_swapped", "swapped_with_shown")
        assert [copy[name] for name in shares] == [first[name] for name in shares]
    assert rows["an oracle, 1 example"]["category_accuracy"] == 1.0
    assert rows["an oracle, 1 example"]["box_iou"] == 1.0
    masks = {row["name"]: row for row in metrics["tasks"]["segmentation"]["rows"]}
    assert masks["an oracle, 1 example"]["miou"] == 1.0
    page = (evaluation / "report.html").read_text()
    assert "an oracle, 1 example" in page
    assert "SANSA, generalist" in page and "Published figures, of other queries" in page


@pytest.mark.parametrize(("folder", "name"), [("mine", "mine"), ("model", "the model")])
def test_a_system_with_the_name_of_the_model_is_refused(
    toy_model_folder, toy_shards, copies, tmp_path, capsys, folder, name
):
    shutil.copytree(toy_model_folder, tmp_path / folder)
    words = ["evaluate", str(tmp_path / folder), str(toy_shards), "--out", str(tmp_path / "out")]
    assert main([*words, "--predictions", f"{name}={copies}"]) == 2
    message = f"the rows of the model are named {name}; give the other system another name."
    assert capsys.readouterr().err.endswith(f"icl-moe: --predictions: {message}\n")
    assert not (tmp_path / "out").exists()


def _damage(change):
    """Change the masks' file of predictions as a function says."""

    def apply(folder: Path) -> None:
        path = folder / "segmentation.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def _result(number: int, **values: object):
    return _damage(lambda content: content["results"][number].update(values))


def _half(folder: Path) -> None:
    path = folder / "segmentation.json"
    path.write_text(path.read_text()[:500])


DAMAGES = {
    "other episodes": (
        _damage(lambda content: content.update(episodes="0123456789abcdef")),
        r"is of other episodes: it has the hash '0123456789abcdef', the 11 episodes that are",
    ),
    "missing": (
        _damage(lambda content: content["results"].__delitem__(slice(3, 5))),
        r"lacks 2 of 11 episodes, the first of them segmentation-00000003\.",
    ),
    "double": (
        _result(4, image_id="segmentation-00000002"),
        r"lacks 1 of 11 episodes, the first of them segmentation-00000004\.",
    ),
    "too many": (
        _damage(lambda content: content["results"].append(content["results"][7])),
        r"has more than one result for 1 of 11 episodes, the first of them segmentation-00000007",
    ),
    "out of range": (
        _result(4, image_id=12),
        r"result 5 is of the episode 12, which is not among the 11 that are evaluated",
    ),
    "another size": (
        _result(4, segmentation={"size": [32, 32], "counts": "PP1"}),
        r"segmentation-00000004: the mask has the size \[32, 32\]; it must be \[64, 64\]\.",
    ),
    "half a mask": (
        _result(4, segmentation={"size": [64, 64], "counts": "PP1"}),
        r"segmentation-00000004: run lengths do not cover the 64 x 64 .*: they are of 1024 pixels",
    ),
    "garbage for a mask": (
        _result(4, segmentation={"size": [64, 64], "counts": "no mask"}),
        r"segmentation-00000004: counts must be run lengths, COCO's compressed text or a list of "
        "whole numbers, not 'no mask'",
    ),
    "runs that are too long": (
        _result(4, segmentation={"size": [64, 64], "counts": [4000, 97]}),
        r"do not cover the 64 x 64 pixels of their mask: they are of 4097 pixels\.",
    ),
    "runs that are no numbers": (
        _result(4, segmentation={"size": [64, 64], "counts": [4095, True]}),
        r"counts must be run lengths, .*, not \[4095, True\]\.",
    ),
    "a negative run": (
        _result(4, segmentation={"size": [64, 64], "counts": [4097, -1]}),
        r"counts must be run lengths, .*, not \[4097, -1\]\.",
    ),
    "true in place of a number": (
        _result(0, image_id=True),
        "result 1 is of the episode True, which is not among the 11 that are evaluated",
    ),
    "true in place of examples": (
        _damage(lambda content: content.update(shots=True)),
        "shots must be a whole number from 0 to 2, not True",
    ),
    "no score": (
        _result(4, score=float("nan")),
        "segmentation-00000004: score must be a number, not nan",
    ),
    "a class by COCO's number": (
        _result(4, category_id=18),
        "segmentation-00000004: 'category_id' is not a key of a result .did you mean 'category'"
        ".*; the keys are image_id, segmentation, category, score",
    ),
    "a name that is no text": (
        _damage(lambda content: content.update(system=3)),
        "system must be text, the system's name, not 3",
    ),
    "another class": (
        _result(4, category="zebra"),
        r"segmentation-00000004: the category is 'zebra'; the examples are of '",
    ),
    "no mask": (_result(4, segmentation=None), "segmentation must be run lengths, a record"),
    "a list of episodes": (
        _result(4, image_id=[12]),
        r"result 5 is of the episode \[12\], which is not among the 11 that are evaluated",
    ),
    "no record": (
        _damage(lambda content: content["results"].insert(0, 3)),
        "result 1 must be a record with an image_id",
    ),
    "too many examples": (
        _damage(lambda content: content.update(shots=5)),
        "shots must be a whole number from 0 to 2, not 5",
    ),
    "half a file": (_half, r"segmentation\.json, line 1, column \d+ is not valid JSON"),
    "COCO's plain list": (
        lambda folder: (folder / "segmentation.json").write_text("[]"),
        "must hold the keys episodes, system, shots and results",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_predictions_that_are_not_whole_are_refused_in_a_sentence(
    toy_shards, truths, tmp_path, damage, capsys
):
    folder = tmp_path / "predictions"
    shutil.copytree(truths, folder)
    change, message = DAMAGES[damage]
    change(folder)
    assert main(["predictions", "check", str(folder), str(toy_shards)]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"caption": None}, "caption must be text, not None"),
        ({"category": 3}, "category must be text, not 3"),
        ({"box": [0.5, 0.1, 0.2, 0.4]}, "box must be x1, y1, x2, y2 in fractions of the image"),
        ({"box": [10, 10, 40, 40]}, "box must be x1, y1, x2, y2 in fractions of the image"),
        ({"score": "high"}, "score must be a number, not 'high'"),
        ({"score": True}, "score must be a number, not True"),
        ({"score": 10**400}, "score must be a number, not 1000"),
        ({"box": [False, 0.1, True, 0.4]}, "box must be x1, y1, x2, y2 in fractions of the image"),
        ({"bbox": [0.1, 0.1, 0.2, 0.4]}, "'bbox' is not a key of a result .did you mean 'box'"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(shards, truths, tmp_path, values, message):
    content = json.loads((truths / "captioning.json").read_text())
    content["results"][2].update(values)
    (tmp_path / "captioning.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"captioning-00000002: {message}"):
        check_predictions(tmp_path, shards)


def test_numbers_of_the_template_serve_as_keys(shards, truths, tmp_path):
    content = json.loads((truths / "segmentation.json").read_text())
    for number, result in enumerate(content["results"], 1):
        result["image_id"] = number
    content["results"].reverse()
    (tmp_path / "segmentation.json").write_text(json.dumps(content))
    found, expected = (
        check_predictions(folder, shards)["segmentation"] for folder in (tmp_path, truths)
    )
    assert found.outputs == expected.outputs


def test_masks_may_be_plain_lists_of_run_lengths(shards, truths, tmp_path):
    """COCO's uncompressed form: they count as the masks that they are."""
    content = json.loads((truths / "segmentation.json").read_text())
    for result in content["results"]:
        rle = result["segmentation"]
        rle["counts"] = run_lengths(rle["counts"])
        result["score"] = 0.5
    (tmp_path / "segmentation.json").write_text(json.dumps(content))
    found, expected = (
        check_predictions(folder, shards)["segmentation"] for folder in (tmp_path, truths)
    )
    assert found.outputs == expected.outputs


def test_a_folder_without_predictions_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match=r"holds neither segmentation\.json nor captioning\.json"):
        check_predictions(tmp_path, shards)


def test_the_hash_is_of_what_is_asked(shards):
    masks, captions = open_episodes(shards)
    assert episodes_hash(masks) == episodes_hash(open_episodes(shards)[0])
    fewer = open_episodes(shards, limit=10)[0]
    assert len({episodes_hash(each) for each in (masks, captions, fewer)}) == 3


def test_a_template_has_the_pictures_of_the_episodes_and_no_answers(shards, tmp_path):
    sets = open_episodes(shards, limit=3)
    write_template(shards, sets, tmp_path, shots=2)
    listed = json.loads((tmp_path / "segmentation_episodes.json").read_text())
    assert listed["episodes"] == episodes_hash(sets[0]) and listed["image_size"] == 64
    first = listed["images"][0]
    assert (first["id"], first["key"]) == (1, "segmentation-00000000")
    query = Image.open(tmp_path / first["query"])
    assert query.width == query.height
    for example in first["examples"]:
        picture, mask = (Image.open(tmp_path / example[name]) for name in ("image", "mask"))
        assert picture.size == mask.size
        assert {value for _, value in mask.getcolors()} <= {0, 255}
    assert not list(tmp_path.glob("segmentation/*/query_mask*"))
    captions = json.loads((tmp_path / "captioning_episodes.json").read_text())
    assert captions["images"][1]["examples"][0]["caption"]
    assert "caption" not in captions["images"][1]
    swapped = json.loads((tmp_path / "segmentation_swapped_episodes.json").read_text())
    assert swapped["episodes"] == episodes_hash(sets[0], swapped=True) != listed["episodes"]
    for entry, (number, swap) in zip(swapped["images"], sets[0].swaps.items(), strict=True):
        assert entry["key"] == sets[0][number].key
        assert entry["category"] == swap.shown.category != sets[0][number].category
        assert len(entry["examples"]) == 2
        assert all((tmp_path / example["mask"]).is_file() for example in entry["examples"])
    empty = json.loads((tmp_path / "segmentation.json").read_text())
    assert empty == {"episodes": listed["episodes"], "shots": 2, "system": "", "results": []}
    with pytest.raises(InputError, match=r"The image \d+\.jpg of segmentation-00000000 is not in"):
        write_template(shards, sets, tmp_path, 1, images=tmp_path)


def test_a_template_does_not_replace_predictions(shards, tmp_path):
    sets = open_episodes(shards, limit=2)
    for _ in range(2):
        write_template(shards, sets, tmp_path, shots=1)
    _edit(tmp_path / "captioning.json", results=[{"image_id": 1, "caption": "a"}])
    filled = (tmp_path / "captioning.json").read_text()
    with pytest.raises(InputError, match=r"captioning\.json holds predictions already; give --out"):
        write_template(shards, sets, tmp_path, shots=1)
    assert (tmp_path / "captioning.json").read_text() == filled


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("whole_image", ["segmentation"]),
        ("mean_mask", ["segmentation"]),
        ("frequent_caption", ["captioning"]),
    ],
)
def test_baselines_write_whole_predictions(shards, tmp_path, name, tasks):
    assert predict_baseline(name, shards, tmp_path, limit=5) == tasks
    found = check_predictions(tmp_path, shards, limit=5)
    assert list(found) == tasks
    outputs = found[tasks[0]].outputs
    assert all(output == outputs[0] for output in outputs)


def test_a_constant_baseline_is_the_same_with_swapped_examples(shards, tmp_path):
    """It therefore cannot flip, and equals the constant in the table of all queries."""
    assert predict_baseline("mean_mask", shards, tmp_path) == ["segmentation"]
    system = check_predictions(tmp_path, shards)["segmentation"]
    assert system.swapped
    assert all(output == system.outputs[0] for output in (*system.outputs, *system.swapped))


def test_a_baseline_that_there_is_not_is_named(shards, tmp_path):
    with pytest.raises(InputError, match=r"no baseline 'mean_masks' \(did you mean 'mean_mask'"):
        predict_baseline("mean_masks", shards, tmp_path)
    with pytest.raises(InputError, match="The matcher needs input images that are features codes"):
        predict_baseline("matcher", shards, tmp_path)


SWAPPED_DAMAGES = {
    "alone": (
        lambda folder: (folder / "segmentation.json").unlink(),
        r"segmentation_swapped\.json needs segmentation\.json, the predictions without swapping",
    ),
    "other examples": (
        lambda folder: shutil.copy(folder / "segmentation.json", folder / _SWAPPED),
        r"segmentation_swapped\.json is of other episodes: .* the \d+ episodes with swapped",
    ),
    "other shots": (
        lambda folder: _edit(folder / _SWAPPED, shots=2),
        r"segmentation_swapped\.json is of 2 example\(s\) and segmentation\.json of 1",
    ),
    "another system": (
        lambda folder: _edit(folder / _SWAPPED, system="another"),
        r"segmentation_swapped\.json is of the system 'another' and segmentation\.json of 'the "
        "truth'; both must be of one",
    ),
    "no examples": (
        lambda folder: _edit(folder / _SWAPPED, shots=0),
        r"segmentation_swapped\.json: shots must be a whole number from 1 to 2, not 0",
    ),
    "missing": (
        lambda folder: _edit(folder / _SWAPPED, results=[]),
        r"segmentation_swapped\.json lacks \d+ of \d+ episodes",
    ),
}
_SWAPPED = "segmentation_swapped.json"


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("damage", SWAPPED_DAMAGES)
def test_predictions_with_swapped_examples_are_checked_too(
    toy_shards, truths, tmp_path, damage, capsys
):
    folder = tmp_path / "predictions"
    shutil.copytree(truths, folder)
    change, message = SWAPPED_DAMAGES[damage]
    change(folder)
    assert main(["predictions", "check", str(folder), str(toy_shards)]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert printed.err.count("\n") == 1 and not printed.out


def test_swapping_can_be_left_out(toy_shards, tmp_path, capsys):
    arguments = ["baseline", "copy", str(toy_shards), "--limit", "4", "--out"]
    assert main(["predictions", *arguments, str(tmp_path / "both")]) == 0
    assert main(["predictions", *arguments, str(tmp_path / "own"), "--control", "none"]) == 0
    assert not list((tmp_path / "own").glob("*_swapped.json"))
    assert len(list((tmp_path / "both").glob("*_swapped.json"))) == 2
    capsys.readouterr()
    both = ["predictions", "check", str(tmp_path / "both"), str(toy_shards), "--limit", "4"]
    assert main(both) == 0
    assert "with swapped ones), are complete" in capsys.readouterr().out


@pytest.fixture(scope="module")
def seggpt(tmp_path_factory) -> Path:
    """A small SegGPT with random weights."""
    config = SegGptConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=(64, 32),
        patch_size=8,
        pretrain_image_size=16,
        mlp_dim=32,
        decoder_hidden_size=8,
        merge_index=0,
        intermediate_hidden_state_indices=[0, 1],
    )
    folder = tmp_path_factory.mktemp("seggpt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SegGptForImageSegmentation(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shots", [1, 2])
def test_seggpt_predicts_masks_of_the_right_size(shards, seggpt, tmp_path, shots):
    done = predict_baseline(
        "seggpt", shards, tmp_path, shots, limit=3, weights=str(seggpt), device="cpu"
    )
    assert done == ["segmentation"]
    system = check_predictions(tmp_path, shards, limit=3)["segmentation"]
    assert (system.name, system.shots, len(system.outputs)) == ("seggpt", shots, 3)
    assert len(system.swapped) == 1


def test_seggpt_reads_its_example_as_transformers_own_processor_does(seggpt):
    """The brightness equals what transformers' processor makes of the same pictures."""
    from transformers import SegGptImageProcessorPil as Processor

    model = SegGptForImageSegmentation.from_pretrained(seggpt).eval()
    generator = torch.Generator().manual_seed(0)
    example, query = (
        Image.fromarray(torch.randint(0, 256, (32, 32, 3), generator=generator).byte().numpy())
        for _ in range(2)
    )
    mask = Image.new("RGB", (32, 32))
    mask.paste((255, 255, 255), (8, 8, 24, 24))
    processor = Processor(size={"height": 32, "width": 32})
    inputs = processor(
        images=query, prompt_images=example, prompt_masks=mask.convert("L"), return_tensors="pt"
    )
    with torch.inference_mode():
        outputs = model(**inputs, embedding_type="semantic")
    (expected_HW,) = processor.post_process_semantic_segmentation(outputs)
    painted_HW = paint(model, [example], [mask], query)
    assert torch.equal((painted_HW * 255).int(), expected_HW) or torch.allclose(
        painted_HW * 255, expected_HW.float(), atol=1.0
    )


def test_weights_that_cannot_be_loaded_are_named(shards, tmp_path):
    with pytest.raises(InputError, match=r"SegGPT's weights .*absent cannot be loaded"):
        predict_baseline(
            "seggpt", shards, tmp_path, limit=1, weights=str(tmp_path / "absent"), device="cpu"
        )


def test_two_systems_are_compared_on_the_same_queries(toy_shards, truths, copies, capsys, no_java):
    found = {
        (compared.task, compared.measure): compared
        for compared in compare(copies, truths, ShardSet(toy_shards))
    }
    bleus = [f"B@{n}" for n in range(1, 5)]
    assert set(found) == {
        *(("segmentation", name) for name in ("mIoU", "mean IoU", "MAE", "flips")),
        *(("captioning", name) for name in ("CIDEr", "ROUGE-L", *bleus, "category", "box IoU")),
        ("captioning", "flips"),
    }
    miou = found["segmentation", "mIoU"]
    assert miou.b == 1.0 and miou.difference == pytest.approx(1.0 - miou.a)
    assert miou.interval[0] > 0 and miou.p == 2 / 2**11
    assert found["segmentation", "MAE"].b == 0.0 > found["segmentation", "MAE"].difference
    flips = found["segmentation", "flips"]
    assert (flips.a, flips.b, flips.test) == (0.0, 1.0, "sign test")
    assert main(["compare", str(copies), str(copies), str(toy_shards)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "permutation" in line]
    assert len(lines) == 11
    assert all(re.search(r"\+0\.0+ +\+0\.0+ – \+0\.0+ +1\.0000", line) for line in lines)


def test_comparisons_have_the_numbers_of_evaluations(evaluation, truths, toy_shards, no_java):
    tasks = json.loads((evaluation / "metrics.json").read_text())["tasks"]
    names = {
        "segmentation": {"mIoU": "miou", "mean IoU": "mean_iou", "MAE": "mae"},
        "captioning": {
            "CIDEr": "cider",
            "ROUGE-L": "rouge_l",
            "category": "category_accuracy",
            "box IoU": "box_iou",
        },
    }
    found = compare(evaluation, truths, ShardSet(toy_shards))
    for compared in found:
        rows = {row["name"]: row for row in tasks[compared.task]["rows"]}
        swaps = {row["name"]: row for row in tasks[compared.task]["swapped"]}
        if compared.measure == "flips":
            expected = [swaps[n]["flips"] for n in ("1 example", "an oracle, 1 example")]
        elif compared.measure.startswith("B@"):
            place = int(compared.measure[2:]) - 1
            expected = [rows[n]["bleu"][place] for n in ("1 example", "an oracle, 1 example")]
        else:
            name = names[compared.task][compared.measure]
            expected = [rows[n][name] for n in ("1 example", "an oracle, 1 example")]
        assert [compared.a, compared.b] == pytest.approx(expected), compared.measure
    assert len(found) == 13


def test_evaluations_are_compared_with_their_flips(
    evaluation, truths, toy_shards, tmp_path, no_java
):
    tasks = json.loads((evaluation / "metrics.json").read_text())["tasks"]
    masks, shards = tasks["segmentation"], ShardSet(toy_shards)
    same = {
        (compared.task, compared.measure): compared
        for compared in compare(evaluation, evaluation, shards)
    }
    flips = same["segmentation", "flips"]
    assert flips.a == flips.b == pytest.approx(masks["swapped"][0]["flips"])
    assert (flips.test, flips.interval, flips.p) == ("sign test", None, 1.0)
    assert ("captioning", "flips") in same
    with pytest.raises(InputError, match="has no predictions after 2 examples; it has 1"):
        compare(evaluation, truths, shards, shots=2)
    header, *lines = (evaluation / "predictions.jsonl").read_text().splitlines()
    elsewhere = json.dumps(json.loads(header) | {"shards": "0" * 16})
    (tmp_path / "predictions.jsonl").write_text("\n".join([elsewhere, *lines]))
    with pytest.raises(InputError, match="is an evaluation on other shards than"):
        compare(tmp_path, truths, shards)


def test_fewer_queries_are_compared_with_a_limit(
    evaluation, shards, tmp_path, no_java, capsys, monkeypatch
):
    """Predictions that were made of some episodes alone, and evaluations that have more."""
    predict_baseline("copy", shards, tmp_path / "copy", limit=5)
    words = ["compare", str(evaluation), str(tmp_path / "copy"), shards.location]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "is of other episodes" in said
    assert said.endswith("; its 5 are the first of the same shards, so give --limit 5.\n")
    own = [str(tmp_path / "copy"), shards.location]
    assert main(["predictions", "check", *own, "--limit", "7"]) == 2
    assert capsys.readouterr().err.endswith("so give --limit 5.\n")
    _edit(tmp_path / "copy/segmentation.json", episodes="0123456789abcdef")
    assert main(["predictions", "check", *own, "--limit", "7"]) == 2
    assert capsys.readouterr().err.endswith(", which are the first of 11 (--limit 7).\n")
    predict_baseline("copy", shards, tmp_path / "copy", limit=5)
    assert main([*words, "--limit", "5", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert {each["queries"] for each in found if each["measure"] != "flips"} == {5}
    monkeypatch.setattr(EpisodeSet, "_swap", lambda self, index: None)
    without = compare(evaluation, evaluation, shards, limit=5)
    assert without and "flips" not in {compared.measure for compared in without}
    header, *lines = (evaluation / "predictions.jsonl").read_text().splitlines()
    for name, limit in (("some", 7), ("more", 1000)):
        (tmp_path / name).mkdir()
        content = [json.dumps(json.loads(header) | {"limit": limit}), *lines]
        (tmp_path / name / "predictions.jsonl").write_text("\n".join(content))
    assert compare(evaluation, tmp_path / "more", shards)[0].queries == 11, "there are no more"
    message = "is of all episodes of each task and .* of the first 7; compare them on .*--limit 7"
    with pytest.raises(InputError, match=message):
        compare(evaluation, tmp_path / "some", shards)


def test_predictions_of_all_episodes_are_not_read_with_a_limit(shards, copies, capsys):
    assert main(["predictions", "check", str(copies), shards.location, "--limit", "5"]) == 2
    assert capsys.readouterr().err.endswith(
        "; its 11 are the first of the same shards, so leave out --limit.\n"
    )


def test_there_are_no_numbers_of_examples_to_choose_from_in_predictions(
    evaluation, shards, copies, truths, capsys, no_java
):
    words = ["compare", str(copies), str(truths), shards.location, "--shots", "1"]
    assert main(words) == 2
    message = r"--shots chooses among the numbers of examples of an evaluation; the predictions in"
    assert message in capsys.readouterr().err
    assert compare(evaluation, truths, shards, shots=1), "the evaluation's"


def test_a_comparison_says_how_many_examples_each_was_shown(
    evaluation, shards, tmp_path, no_java, capsys
):
    predict_baseline("copy", shards, tmp_path / "two", shots=2)
    out = tmp_path / "found.json"
    words = ["compare", str(evaluation), str(tmp_path / "two"), shards.location]
    assert main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("A 1, B 2") == 13
    assert all((each["shots_a"], each["shots_b"]) == (1, 2) for each in json.loads(out.read_text()))


def test_a_p_is_never_printed_as_0():
    found = Compared("t", 1, 1, "flips", 90, 0.1, 0.9, 0.8, None, sign_test(0, 72), "sign test")
    (line,) = comparison_table([found]).rows
    assert line[-2:] == ["< 0.0001", "sign test"]


def test_the_sign_test_is_exact():
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    assert sign_test(0, 5) == sign_test(5, 0) == 2 / 32
    assert sign_test(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
