"""The fixed episodes of published benchmarks: drawn as their authors draw them, from small data
sets in the true formats; kept in a file that shows any change; and the way from there to scores.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import standard_data
import toy_export
import toy_tokenizer

from icl_moe.baselines import predict_baseline
from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.compare import compare
from icl_moe.evaluation.protocol import evaluate
from icl_moe.rle import decode_rle
from icl_moe.settings import load_recipe
from preprocessing import standards
from preprocessing.build import build_shards
from preprocessing.classes import COCO_CLASSES
from preprocessing.compare import compare_with_sources
from preprocessing.episode_file import EpisodeFile, FixedEpisode, FixedPair, read_episodes
from preprocessing.recipe import DataRecipe
from preprocessing.standard_masks import mask_source
from preprocessing.verify import verify_shards


def make(name: str, data: Path, out: Path, *options: str) -> EpisodeFile:
    """The file that the command writes."""
    assert main(["episodes", name, "--data", str(data), "--out", str(out), *options]) == 0
    (path,) = out.glob("*.jsonl")
    return read_episodes(path)


def drawn(file: EpisodeFile, fold: int) -> list[tuple]:
    """(class, names of the examples and the query) of a fold."""
    return [
        (episode.category, *(pair.image for pair in episode.pairs))
        for episode in file.episodes
        if episode.fold == fold
    ]


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return standard_data.write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def listed_coco(tmp_path_factory) -> tuple[Path, dict]:
    """The same data set, with HSNet's lists of images."""
    data = standard_data.write_coco(tmp_path_factory.mktemp("listed_coco"))
    return data, standard_data.write_coco_lists(data)


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    standard_data.write_voc(folder)
    return folder


@pytest.fixture(scope="module")
def fss(tmp_path_factory) -> Path:
    return standard_data.write_fss(tmp_path_factory.mktemp("fss"))


@pytest.fixture(scope="module")
def lvis(tmp_path_factory) -> Path:
    return standard_data.write_lvis(tmp_path_factory.mktemp("lvis"))


def hsnet_coco(lists: dict[int, list[str]], fold: int, shot: int, count: int) -> list[tuple]:
    """Episodes of HSNet's data/coco.py after its fix_randseed(0), by NumPy's global generator
    as there.
    """
    np.random.seed(0)  # noqa: NPY002
    class_ids, episodes = [fold + 4 * v for v in range(20)], []
    for _ in range(count):
        sample = np.random.choice(class_ids, 1, replace=False)[0]  # noqa: NPY002
        query = np.random.choice(lists[sample], 1, replace=False)[0]  # noqa: NPY002
        support: list[str] = []
        while True:
            name = np.random.choice(lists[sample], 1, replace=False)[0]  # noqa: NPY002
            if query != name:
                support.append(name)
            if len(support) == shot:
                break
        episodes.append((COCO_CLASSES[sample], *map(str, support), str(query)))
    return episodes


@pytest.mark.parametrize(("shots", "queries"), [(1, 1000), (5, 100)])
def test_coco20i_with_hsnets_lists_has_the_episodes_of_its_tests(
    listed_coco, shots, queries, tmp_path, monkeypatch
):
    assert standards.QUERIES == 1000
    monkeypatch.setattr(standards, "QUERIES", queries)
    data, lists = listed_coco
    file = make("coco20i", data, tmp_path, "--shots", str(shots))
    assert (file.folds, file.shots, len(file.episodes)) == (4, shots, 4 * queries)
    for fold in range(4):
        assert drawn(file, fold) == hsnet_coco(lists[fold], fold, shots, queries)
    assert [episode.fold for episode in file.episodes[:8]] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_coco20i_without_lists_takes_images_that_show_enough_of_a_class(
    coco, tmp_path, monkeypatch
):
    monkeypatch.setattr(standards, "QUERIES", 200)
    (coco / "splits/coco/val").mkdir(parents=True, exist_ok=True)
    file = make("coco20i", coco, tmp_path, "--fold", "0")
    assert "so the draws, are not HSNet's" in file.protocol
    assert {e.fold for e in file.episodes} == {0}
    assert len(file.episodes) == 200
    assert file.classes == sorted(COCO_CLASSES[n] for n in range(0, 80, 4))
    persons = {p.image for e in file.episodes if e.category == "person" for p in e.pairs}
    assert persons == {f"val2014/COCO_val2014_{n:012d}.jpg" for n in (2, 3)}, (
        "in image 1, half of the person is covered by what is painted later"
    )


def test_coco20i_of_the_2017_release_takes_the_images_of_the_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(standards, "QUERIES", 200)
    data = standard_data.write_coco(tmp_path / "coco", "train2017")
    standard_data.write_coco(data, "val2017")
    content = json.loads((data / "annotations/instances_val2017.json").read_text())
    for kind in ("images", "annotations"):
        content[kind] = [r for r in content[kind] if r.get("image_id", r["id"]) == 3]
    (data / "annotations/instances_val2017.json").write_text(json.dumps(content))
    standard_data.write_coco_lists(data)
    file = make("coco20i", data, tmp_path / "out", "--fold", "1")
    images = {pair.image for episode in file.episodes for pair in episode.pairs}
    assert "val2017/000000000003.jpg" in images and "train2017/000000000002.jpg" in images


def test_masks_of_coco20i_are_painted_without_crowds_in_the_order_of_the_file(
    listed_coco, tmp_path
):
    data, _ = listed_coco
    file = make("coco20i", data, tmp_path, "--fold", "0")
    (pair,) = {
        pair
        for episode in file.episodes
        if episode.category == "person"
        for pair in episode.pairs
        if pair.image.endswith("_000000000001.jpg")
    }
    masks = mask_source(file, data).masks(pair, "person")
    assert masks["person"].sum() == 25 * 50 and masks["person"][:50, 25:50].all()
    assert masks["bicycle"].sum() == 25 * 50 + 50 * 50
    assert pair.annotations == (100,)


def test_pascal5i_goes_through_hsnets_lists(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(standards, "QUERIES", 100)
    lists = {
        fold: [
            (line.split("__")[0], int(line.split("__")[1]) - 1)
            for line in (voc / f"splits/pascal/val/fold{fold}.txt").read_text().split("\n")[:-1]
        ]
        for fold in range(4)
    }
    file = make("pascal5i", voc, tmp_path)
    for fold in range(4):
        np.random.seed(0)  # noqa: NPY002
        of_class: dict[int, list[str]] = {}
        for name, number in lists[fold]:
            of_class.setdefault(number, []).append(name)
        expected = []
        for index in range(100):
            query, number = lists[fold][index % len(lists[fold])]
            while True:
                name = np.random.choice(of_class[number], 1, replace=False)[0]  # noqa: NPY002
                if name != query:
                    break
            images = [f"JPEGImages/{each}.jpg" for each in (name, query)]
            expected.append((standard_data.VOC_CLASSES[number], *images))
        assert drawn(file, fold) == expected
    source, query = mask_source(file, voc), file.episodes[0].pairs[-1]
    masks = source.masks(query, file.episodes[0].category)
    assert masks[file.episodes[0].category].sum() == 72 * 52
    assert source.ignored(query).sum() == 2 * (80 * 60 - 72 * 52)


def test_fss1000_asks_about_every_image_once(fss, tmp_path):
    file = make("fss1000", fss, tmp_path)
    np.random.seed(0)  # noqa: NPY002
    expected = []
    for name in ("ab_wheel", "zucchini"):
        for query in (1, 10, 2, 3, 4, 5, 6, 7, 8, 9):  # In the order of the names of files.
            while True:
                number = np.random.choice(range(1, 11), 1, replace=False)[0]  # noqa: NPY002
                if number != query:
                    break
            images = [f"{name}/{each}.jpg" for each in (number, query)]
            expected.append((name.replace("_", " "), *images))
    assert drawn(file, 0) == expected


def test_lvis92i_takes_every_tenth_class_in_turns(lvis, tmp_path, monkeypatch):
    monkeypatch.setattr(standards, "LVIS_QUERIES", 5)
    file = make("lvis92i", lvis, tmp_path)
    assert [len(drawn(file, fold)) for fold in range(10)] == [5] * 10
    assert {name for name, *_ in drawn(file, 1)} == {"television set"}
    assert {image.split("/")[0] for _, *images in drawn(file, 3) for image in images} <= {
        "train2017",
        "val2017",
    }


def test_paper_lvis_has_the_classes_that_coco_lacks(lvis, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(standards, "PAPER_QUERIES", 60)
    file = make("paper_lvis", lvis, tmp_path)
    assert file.classes == sorted(f"alarm clock ({n})" for n in range(10))
    assert "10 of 12 classes are not COCO's." in capsys.readouterr().out


def test_paper_coco_asks_about_every_class_in_every_image_once(tmp_path):
    data = standard_data.write_coco(tmp_path / "coco", "val2017")
    file = make("paper_coco", data, tmp_path / "out", "--shots", "2")
    queries = [(e.category, e.pairs[-1].image) for e in file.episodes]
    assert len(queries) == len(set(queries)) == 30 * 8
    assert all(len({pair.image for pair in e.pairs}) == 3 for e in file.episodes)
    (pair,) = {
        p for e in file.episodes for p in e.pairs if e.category == "person" and "001." in p.image
    }
    mask = mask_source(file, data).masks(pair, "person")["person"]
    assert mask.sum() == 50 * 50 + 240 * 30, "a crowd is part of its class, and nothing covers it"


@pytest.fixture(scope="module")
def genome(tmp_path_factory) -> Path:
    """Visual Genome's files of 130 images, each with a dog and, in another box, a tree: 120 of the
    split `train` and 10 of `test`. In `test` a cat is described too, which `train` lacks.
    """
    folder = tmp_path_factory.mktemp("genome")
    content: dict[str, list] = {"image_data": [], "objects": [], "region_descriptions": []}
    for image in range(1, 131):
        url = f"https://cs.stanford.edu/people/rak248/VG_100K/{image}.jpg"
        size = {"width": 240, "height": 200}
        content["image_data"].append({"image_id": image, "url": url, **size, "coco_id": None})
        names = ["dog", "tree"] if image <= 120 else ["dog", "tree", "cat"]
        objects, regions = [], []
        for place, name in enumerate(names):
            box = {"x": 80 * place, "y": 20, "w": 60, "h": 100}
            objects.append({"object_id": 10 * image + place, "names": [name], **box})
            region = {"region_id": 10 * image + place, "image_id": image, "x": 80 * place, "y": 20}
            region |= {"phrase": f"a {name} of image {image}", "width": 60, "height": 100}
            regions.append(region)
        content["objects"].append({"image_id": image, "objects": objects})
        content["region_descriptions"].append({"id": image, "regions": regions})
    for name, records in content.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    splits = {"train": list(range(1, 121)), "test": list(range(121, 131))}
    (folder / "densecap_splits.json").write_text(json.dumps(splits))
    for image in splits["test"]:
        standard_data.save_image(folder / f"VG_100K/{image}.jpg", image)
    return folder


@pytest.mark.parametrize(("name", "category"), [("paper_vg", "dog"), ("paper_vg_unseen", "tree")])
def test_regions_of_classes_that_the_training_split_describes_often(
    genome, name, category, tmp_path, capsys
):
    file = make(name, genome, tmp_path)
    assert file.classes == [category], "cats are described too rarely where training looks"
    queries = sorted(episode.pairs[-1].caption for episode in file.episodes)
    assert queries == sorted(f"a {category} of image {n}" for n in range(121, 131))
    printed = capsys.readouterr().out
    of_paper = "about 460k" if name == "paper_vg" else "no figure"
    assert f"training regions: 120 (the paper: {of_paper})" in printed
    assert "test regions: 10, queries: 10 (the paper: 2k)" in printed


def test_descriptions_become_shards(genome, tmp_path, settings):
    make("paper_vg", genome, tmp_path)
    manifest = build(tmp_path / "paper_vg.jsonl", genome, tmp_path / "shards", settings)
    assert manifest.samples == {"captioning": 10}
    verify_shards(tmp_path / "shards")


def test_the_same_data_give_the_same_file(fss, tmp_path, capsys):
    for name in ("a", "b"):
        make("fss1000", fss, tmp_path / name)
    files = [(tmp_path / name / "fss1000.jsonl").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    digest = json.loads(files[0].splitlines()[0])["sha256"]
    assert capsys.readouterr().out.count(f"20 episodes of 2 classes, sha256 {digest}") == 2


def test_a_file_with_any_characters_reads_back(tmp_path):
    pairs = tuple(FixedPair(f"{n}.jpg", 4, 4, (n,), box=(0, 0, 1, 1), caption=t) for n, t in CASES)
    file = EpisodeFile(
        "x", "captioning", 1, 1, "", "", episodes=(FixedEpisode(0, "a\x85b", pairs),)
    )
    file.write(tmp_path / "x.jsonl")
    assert read_episodes(tmp_path / "x.jsonl") == file


CASES = ((1, "line\u2028two\x0bthree"), (2, 'quoted "é" \\ {}'))


def answer(capsys, *command: object) -> str:
    assert main([*map(str, command)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coco20i", ["--fold", "4"], "--fold must lie in 0..3 for coco20i, not 4."),
        ("fss1000", ["--fold", "-1"], "--fold must lie in 0..0 for fss1000, not -1."),
        ("coco30i", [], "There are no episodes named 'coco30i'; known are coco20i, pascal5i"),
        (
            "coco20i",
            [],
            "has no annotations/instances_val2014.json, which is published at "
            "http://images.cocodataset.org/annotations/annotations_trainval2014.zip.",
        ),
        ("pascal5i", [], "has no JPEGImages, which is published at http://host.robots.ox.ac.uk/"),
        ("fss1000", [], "has no splits/fss/test.txt, which is published at https://github.com/"),
        ("lvis92i", [], "has no annotations/lvis_v1_val.json, which is published at https://dl."),
        ("paper_coco", [], "has no annotations/instances_val2017.json, which is published at"),
        ("paper_vg", [], "has no image_data.json, which is published at https://homes.cs."),
    ],
)
def test_wrong_input_is_one_sentence(name, options, message, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    command = ["episodes", name, "--data", tmp_path / "data", "--out", tmp_path / "out", *options]
    assert message in answer(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_a_missing_image_of_fss1000_is_named(tmp_path, capsys):
    data = standard_data.write_fss(tmp_path / "fss")
    (data / "zucchini/7.png").unlink()
    printed = answer(capsys, "episodes", "fss1000", "--data", data, "--out", tmp_path / "out")
    assert "has no zucchini/7.png, which is published at https://github.com/HKUSTCV" in printed


@pytest.fixture
def settings(tmp_path_factory) -> list[str]:
    tokenizer = toy_tokenizer.save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return toy_tokenizer.recipe_settings(tokenizer)


def build(file: Path, data: Path, out: Path, settings: list[str]):
    recipe = load_recipe(
        DataRecipe,
        "demo",
        [f"episodes={file}", f"episodes_data={data}", *settings],
        package="preprocessing",
    )
    return build_shards(recipe, out, workers=0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("/2007_", "/2008_", 1), "was changed or cut off: its sha256 is"),
        (lambda text: text.replace("JPEG", "PNG", 1), "was changed or cut off: its sha256 is"),
        (lambda text: text[: len(text) // 2], "is not a file of `icl-moe episodes`"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "was changed or cut off"),
        (lambda text: "{}\n", "its first line must name the format"),
        (lambda text: "", "is not a file of `icl-moe episodes`"),
    ],
)
def test_a_changed_file_is_refused(voc, tmp_path, monkeypatch, capsys, settings, edit, message):
    monkeypatch.setattr(standards, "QUERIES", 3)
    make("pascal5i", voc, tmp_path)
    file = tmp_path / "pascal5i.jsonl"
    file.write_text(edit(file.read_text()))
    command = ["shards", "build", "demo", f"episodes={file}", f"episodes_data={voc}", *settings]
    assert message in answer(capsys, *command, "--out", tmp_path / "shards")


@pytest.mark.parametrize("name", ["pascal5i", "paper_vg"])
def test_samples_of_fixed_episodes_are_compared_while_their_files_are_there(
    name, voc, genome, tmp_path, monkeypatch, capsys, settings
):
    monkeypatch.setattr(standards, "QUERIES", 3)
    data = {"pascal5i": voc, "paper_vg": genome}[name]
    make(name, data, tmp_path)
    file, out = tmp_path / f"{name}.jsonl", tmp_path / "shards"
    build(file, data, out, settings)
    capsys.readouterr()
    assert main(["shards", "verify", str(out), "--samples", "2"]) == 0
    assert "2 samples (4 pairs) made anew from the sources" in capsys.readouterr().out
    changed = EpisodeFile(**{**vars(read_episodes(file)), "name": "another"})
    changed.write(file)
    (line,) = compare_with_sources(out, 2, workers=0)
    assert f"episodes: {file} is not the file that the shards were built of" in line
    file.unlink()
    (line,) = compare_with_sources(out, 2, workers=0)
    assert f"episodes: {file} does not exist" in line


@pytest.mark.parametrize("part", ["JPEGImages", "SegmentationClassAug/2007_000003.png"])
def test_episodes_are_not_made_of_links_that_shards_are_not_built_of(
    voc, tmp_path, monkeypatch, settings, capsys, part
):
    """Images and masks; the folder of all of them may be a link."""
    monkeypatch.setattr(standards, "QUERIES", 6)
    (tmp_path / "voc").symlink_to(voc)
    make("pascal5i", tmp_path / "voc", tmp_path / "out")
    data = tmp_path / "data"
    shutil.copytree(voc, data)
    (data / part).rename(tmp_path / "elsewhere")
    (data / part).symlink_to(tmp_path / "elsewhere")
    words = ["episodes", "pascal5i", "--data", str(data), "--out", str(tmp_path / "none")]
    assert main(words) == 2
    message = f"is a link that leads out of the folder {data}; put the file itself there."
    said = capsys.readouterr().err
    assert said.startswith(f"icl-moe: {data / part}") and said.endswith(f"{message}\n")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="leads out of the folder"):
        build(tmp_path / "out/pascal5i.jsonl", data, tmp_path / "shards", settings)


def test_a_fold_out_of_range_in_a_file_is_refused(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(standards, "QUERIES", 3)
    made = make("pascal5i", voc, tmp_path)
    with pytest.raises(ValueError, match=r"episode 3 is of fold 3; folds must lie in 0\.\.2"):
        EpisodeFile(**{**vars(made), "folds": 3})


def test_the_way_to_the_scores_of_a_benchmark(voc, tmp_path, monkeypatch, settings, no_java):
    """Made, built, verified and evaluated: the report has the benchmark's own mIoU, its definition
    and its hash. Pixels of the level 255 do not count; nor do they where systems are compared.
    """
    monkeypatch.setattr(standards, "QUERIES", 6)
    made = make("pascal5i", voc, tmp_path)
    manifest = build(tmp_path / "pascal5i.jsonl", voc, tmp_path / "shards", settings)
    assert manifest.samples == {"segmentation": 24}
    assert (manifest.examples, manifest.standard["sha256"]) == (1, made.header()["sha256"])
    verify_shards(tmp_path / "shards")
    model = toy_export.save_toy_model(tmp_path / "model", tmp_path / "shards")
    metrics = evaluate(model, tmp_path / "shards", tmp_path / "report").to_json()
    rows = {row["prediction"]: row for row in metrics["tasks"]["segmentation"]["rows"]}
    assert metrics["standard"]["sha256"] == manifest.standard["sha256"]
    for row in rows.values():
        folds = row["fold_miou"]
        assert list(folds) == ["0", "1", "2", "3"]
        assert row["standard_miou"] == pytest.approx(np.mean(list(folds.values())))
    # The whole image, but for the edges, is marked there; the mask has 72 x 52 pixels of 200 x 240.
    edges = 2 * (80 * 60 - 72 * 52)
    whole = rows["whole image"]["standard_miou"]
    assert whole == pytest.approx(72 * 52 / (200 * 240 - edges), rel=0.05)
    shards = ShardSet(tmp_path / "shards")
    predict_baseline("whole_image", shards, tmp_path / "whole")
    compared = compare(tmp_path / "report", tmp_path / "whole", shards)
    found = {each.measure: (each.a, each.b) for each in compared}
    for measure, name in {
        "pascal5i mIoU": "standard_miou",
        "pascal5i FB-IoU": "standard_fb_iou",
        "mIoU": "miou",
        "mean IoU": "mean_iou",
        "MAE": "mae",
    }.items():
        expected = rows["model"][name], rows["whole image"][name]
        assert found.pop(measure) == pytest.approx(expected), measure
    swapped = {r["prediction"]: r for r in metrics["tasks"]["segmentation"]["swapped"]}
    assert found == {"flips": (pytest.approx(swapped["model"]["flips"]), 0.0)}
    # With the edges it would be lower by 5 %.
    own = swapped["whole image"]["own_with_own"]
    assert own == pytest.approx(rows["whole image"]["mean_iou"], rel=0.03)
    page = (tmp_path / "report/report.html").read_text()
    assert "pascal5i mIoU" in page and manifest.standard["sha256"] in page
    assert "the intersections of prediction and truth summed over its queries" in page


def test_shards_hold_exactly_the_episodes_of_the_file(coco, tmp_path, monkeypatch, settings):
    from icl_moe.data.shards import ShardSet

    monkeypatch.setattr(standards, "QUERIES", 5)
    made = make("coco20i", coco, tmp_path, "--shots", "2")
    build(tmp_path / "coco20i_2shot.jsonl", coco, tmp_path / "shards", settings)
    shards = ShardSet(tmp_path / "shards")
    for number, episode in enumerate(made.episodes):
        meta = shards.sample("segmentation", number).meta
        assert (meta["class"], meta["fold"]) == (episode.category, episode.fold)
        assert [s["image"] for s in meta["sources"]] == [pair.image for pair in episode.pairs]
        assert [s["crop"] for s in meta["sources"]] == [[0, 0, 240, 200]] * 3
        mask, share = decode_rle(meta["masks"][-1]), 50 * 50 / (240 * 200)
        assert mask.mean() == pytest.approx(share, rel=0.3)
        assert len(meta["objects"]) == 8


def test_other_annotations_than_the_episodes_were_made_of_are_refused(
    tmp_path, monkeypatch, settings
):
    monkeypatch.setattr(standards, "QUERIES", 5)
    data = standard_data.write_coco(tmp_path / "coco")
    make("coco20i", data, tmp_path)
    file = data / "annotations/instances_val2014.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["id"] += 1
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="differ from the episodes'"):
        build(tmp_path / "coco20i.jsonl", data, tmp_path / "shards", settings)


def test_a_missing_image_stops_the_build_even_where_it_may_be_skipped(
    tmp_path, monkeypatch, settings
):
    data = standard_data.write_fss(tmp_path / "fss")
    make("fss1000", data, tmp_path)
    (data / "zucchini/7.jpg").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the images.*the first is zucchini/7\.jpg"):
        build(
            tmp_path / "fss1000.jsonl",
            data,
            tmp_path / "shards",
            [*settings, "missing_images=skip"],
        )


def test_a_file_needs_its_data(settings):
    with pytest.raises(ValueError, match="episodes and episodes_data go together"):
        load_recipe(DataRecipe, "demo", ["episodes=a.jsonl"], package="preprocessing")
