"""Several classes in one mask: every episode has its own colours, and what is painted is read back,
scored class by class, and given in the user's colours.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
import toy_export
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from icl_moe.bootstrap import DRAWS, SEED
from icl_moe.cli import main
from icl_moe.data.shards import Sample, ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.compare import compare
from icl_moe.evaluation.episodes import EpisodeSet, EvaluationEpisode
from icl_moe.evaluation.fitting import fit_masks
from icl_moe.evaluation.other_systems import open_episodes
from icl_moe.evaluation.photographs import Photographs
from icl_moe.evaluation.protocol import evaluate
from icl_moe.images import crop_and_resize_mask, to_square_pixels
from icl_moe.inference.decode import decode_at_once
from icl_moe.inference.edges import EdgeFilter, follow_edges
from icl_moe.inference.model import InContextModel
from icl_moe.inference.session import Query, in_own_size
from icl_moe.rle import decode_rle
from icl_moe.sequence import Episode
from icl_moe.settings import load_recipe
from icl_moe.tasks import SEMANTIC_SEGMENTATION
from icl_moe.tasks.drawn_mask import DrawnClasses, DrawnMask
from icl_moe.tasks.mask_scores import mask_iou
from icl_moe.tasks.semantic_segmentation import COLOURS, PaintedPair, find_colours, paint
from icl_moe.tokenizers.vqgan import VQGAN
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe
from preprocessing.verify import open_codec

Command = Callable[..., CompletedProcess[str]]

SETTINGS = (
    "captioning=null",
    "vocabulary.mask=true",
    "synthetic.images=60",
    "segmentation.object_scale=any",
    "examples=1",
)
PATCHES = (
    "tokenizer=null",
    "mask_tokenizer=demo_masks",
    "features_tokenizer=demo_colours",
    "vocabulary.features=1024",
    "vocabulary.image_codes=3578",
)


def _build(folder: Path, *settings: str) -> Path:
    recipe = load_recipe(DataRecipe, "demo", [*SETTINGS, *settings], package="preprocessing")
    build_shards(recipe, folder, workers=0)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "shards"
    return _build(folder, *PATCHES, "segmentation.classes_per_mask=3", "samples=24")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return toy_export.save_toy_model(folder, shards, mask_corruption=True)


def _samples(shards: Path) -> list[Sample]:
    opened = ShardSet(shards)
    assert list(opened.manifest.samples) == ["semantic_segmentation"]
    count = opened.count("semantic_segmentation")
    return [opened.sample("semantic_segmentation", index) for index in range(count)]


def test_the_pairs_of_an_episode_show_the_same_classes_and_masks_are_the_annotations(
    shards: Path,
) -> None:
    """A pixel of several classes belongs to the smallest one."""
    instances = COCO(next((shards / "synthetic").glob("instances_*.json")))
    ids = {record["file_name"]: number for number, record in instances.imgs.items()}
    sizes = set()
    for sample in _samples(shards):
        names = set(sample.meta["colours"])
        sizes.add(len(names))
        assert sample.category == " + ".join(sorted(names))
        for source, masks in zip(sample.meta["sources"], sample.meta["class_masks"], strict=True):
            assert set(masks) == names
            of_class = {name: [] for name in names}
            for annotation in instances.imgToAnns[ids[source["image"]]]:
                name = instances.cats[annotation["category_id"]]["name"]
                if name in names:
                    assert annotation["id"] in source["annotations"]
                    of_class[name].append(instances.annToMask(annotation).astype(bool))
            whole = {
                name: crop_and_resize_mask(np.any(parts, axis=0), tuple(source["crop"]), 64)
                for name, parts in of_class.items()
            }
            covered = np.zeros((64, 64), dtype=bool)
            for name in sorted(names, key=lambda name: whole[name].sum()):
                assert np.array_equal(decode_rle(masks[name]), whole[name] & ~covered)
                covered |= whole[name]
    assert sizes == {2, 3}


def test_colours_are_fixed_within_an_episode_and_drawn_anew_for_each(shards: Path) -> None:
    """A class therefore says nothing about its colour, and all seven colours occur."""
    samples = _samples(shards)
    of_class: dict[str, set[str]] = {}
    for sample in samples:
        colours = sample.meta["colours"]
        assert len(set(colours.values())) == len(colours)
        for name, colour in colours.items():
            of_class.setdefault(name, set()).add(colour)
    assert max(map(len, of_class.values())) > 2
    assert set().union(*of_class.values()) == set(COLOURS)


def test_verify_reads_the_shards_and_makes_samples_anew(
    shards: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["shards", "verify", str(shards), "--samples", "6"]) == 0
    printed = capsys.readouterr().out
    assert "semantic_segmentation: 6 samples (12 pairs) made anew" in printed
    page = tmp_path / "preview.html"
    assert main(["shards", "preview", str(shards), f"--out={page}"]) == 0
    assert "classes as tokens" in page.read_text()


def test_a_vqgan_paints_where_masks_have_no_tokenizer_of_their_own(tmp_path: Path) -> None:
    """And a mask tokenizer must have room for its patches in all colours."""
    settings = ("segmentation.classes_per_mask=2", "samples=2")
    folder = _build(tmp_path / "vqgan", *settings)
    tokenizer = VQGAN.from_pretrained("demo")
    for sample in _samples(folder):
        codec = open_codec(ShardSet(folder))
        pairs = codec.decode(sample.sequence, SEMANTIC_SEGMENTATION).pairs
        for pair, masks in zip(pairs, sample.meta["class_masks"], strict=True):
            painted = torch.full((1, 3, 64, 64), -1.0)
            for name, rle in masks.items():
                colour = torch.tensor(COLOURS[sample.meta["colours"][name]]) / 127.5 - 1
                painted[0, :, torch.from_numpy(decode_rle(rle).copy())] = colour[:, None]
            assert np.array_equal(tokenizer.encode(painted)[0].numpy(), pair.painted)
    with pytest.raises(InputError, match="has 3578 codes for painted masks, more than"):
        _build(tmp_path / "small", *settings, "mask_tokenizer=demo_masks")


def test_with_one_class_per_mask_nothing_changes(tmp_path: Path) -> None:
    plain = _build(tmp_path / "plain", "samples=4")
    one = _build(tmp_path / "one", "samples=4", "segmentation.classes_per_mask=1")
    (name,) = (path.name for path in plain.glob("*.tar"))
    assert name == "segmentation-000000.tar"
    assert (plain / name).read_bytes() == (one / name).read_bytes()


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_evaluation_scores_each_class(
    shards: Path, model_folder: Path, tmp_path: Path, decoding: str
) -> None:
    evaluate(model_folder, shards, tmp_path / "report", limit=12, decoding=decoding)
    tasks = json.loads((tmp_path / "report" / "metrics.json").read_text())["tasks"]
    rows = {row["name"]: row for row in tasks["semantic_segmentation"]["rows"]}
    ceiling = rows["the truth through the tokenizer (ceiling)"]
    copied = rows["the first example's output, whatever the query"]
    assert ceiling["episodes"] == 12
    names = {name for sample in _samples(shards)[:12] for name in sample.meta["colours"]}
    assert set(ceiling["class_iou"]) == names
    assert ceiling["miou"] > 0.6 > 0.3 > copied["miou"]
    assert ceiling["miou"] == pytest.approx(np.mean(list(ceiling["class_iou"].values())))
    assert "Semantic segmentation" in (tmp_path / "report" / "report.html").read_text()
    found = compare(tmp_path / "report", tmp_path / "report", ShardSet(shards))
    (model,) = [row for row in rows.values() if row["prediction"] == "model"]
    expected = {"mIoU": model["miou"], "mean IoU": model["mean_iou"], "MAE": model["mae"]}
    assert {compared.measure: compared.a for compared in found} == pytest.approx(expected)
    assert all(compared.b == pytest.approx(compared.a) for compared in found)
    assert all((compared.queries, compared.p) == (12, 1) for compared in found)


def test_intervals_are_over_queries_not_over_their_classes(shards: Path) -> None:
    samples = _samples(shards)
    copies = [SEMANTIC_SEGMENTATION.true_output(sample, 0) for sample in samples]
    format = ShardSet(shards).manifest.format
    (found,) = SEMANTIC_SEGMENTATION.score([copies], samples, format)
    ious = [
        [
            mask_iou(decode_rle(output["colours"][colour]), decode_rle(masks[name]))
            for name, colour in sample.meta["colours"].items()
        ]
        for sample, output in zip(samples, copies, strict=True)
        for masks in [sample.meta["class_masks"][-1]]
    ]
    draws = np.random.default_rng(SEED)
    means = [
        np.mean(np.concatenate([ious[n] for n in draws.integers(len(ious), size=len(ious))]))
        for _ in range(DRAWS)
    ]
    expected = np.percentile(means, [2.5, 97.5])
    assert found.intervals["mean_iou"] == pytest.approx(expected)


def test_predictions_of_other_systems_leave_it_out(
    shards: Path, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "semantic_segmentation.json").write_text('{"results": []}')
    with pytest.raises(InputError, match="hold semantic_segmentation; predictions can be read of"):
        evaluate(model_folder, shards, tmp_path / "report", predictions={"ours": tmp_path})
    with pytest.raises(InputError, match="hold semantic_segmentation; predictions can be read of"):
        open_episodes(ShardSet(shards))


def _painted(shape: tuple[int, int], colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Upright bars of equal widths in these colours, between black ones."""
    painted = np.zeros((*shape, 3), dtype=np.uint8)
    width = shape[1] // (2 * len(colours) + 1)
    for number, colour in enumerate(colours):
        start = (2 * number + 1) * width
        painted[:, start : start + width] = colour
    return painted


def test_the_answer_is_in_the_colours_of_the_examples(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that writes what its example shows gives back the example's own picture, in any
    colours, grey and nearly black ones among them.
    """
    colours = [(10, 20, 30), (128, 128, 128), (1, 1, 1)]
    painted = _painted((70, 140), colours)
    image = np.random.default_rng(0).integers(0, 256, painted.shape, dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(painted).save(tmp_path / "painted.png")

    def copy(model, requests, *_):
        return [episode.pairs[0] for episode, _ in requests]

    monkeypatch.setattr(InContextModel, "complete", copy)
    command = ["segment", str(model_folder), "--query", str(tmp_path / "image.png"), "--colours"]
    command += ["--example", str(tmp_path / "image.png"), str(tmp_path / "painted.png")]
    assert main([*command, f"--out={tmp_path / 'out.png'}"]) == 0
    found = np.asarray(Image.open(tmp_path / "out.png"))
    assert found.shape == painted.shape
    assert (found == painted).all(axis=2).mean() > 0.9
    assert {tuple(colour) for colour in found.reshape(-1, 3).tolist()} == {(0, 0, 0), *colours}


def test_a_model_paints_with_several_examples(model_folder: Path) -> None:
    model = InContextModel.from_pretrained(model_folder, "cpu")
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    painted = _painted((40, 60), [(200, 0, 0), (0, 0, 90)])
    found = model.segment_colours([(image, painted)] * 2, np.zeros((50, 30, 3), dtype=np.uint8))
    assert found.shape == (50, 30, 3)
    assert {tuple(colour) for colour in found.reshape(-1, 3).tolist()} <= {
        (0, 0, 0),
        (200, 0, 0),
        (0, 0, 90),
    }


@pytest.fixture(scope="module")
def fitted(shards: Path, model_folder: Path) -> InContextModel:
    """A model with edges and a threshold that are fitted to this task's own episodes."""
    model = InContextModel.from_pretrained(model_folder, "cpu")
    config = model.decoder.config
    config.mask_threshold, config.mask_edges = fit_masks(model, ShardSet(shards), episodes=7)
    if config.mask_edges is None:  # The weights are random, so edges may not help.
        config.mask_edges = {"radius": 0.2, "epsilon": 1e-3, "slope": 1.5, "offset": 0.1}
    model.edges = EdgeFilter.of(config.mask_edges)
    return model


@pytest.fixture(scope="module")
def eager(fitted: InContextModel) -> InContextModel:
    """The same, but it marks something however unsure it is."""
    assert fitted.folder is not None
    model = InContextModel.from_pretrained(fitted.folder, "cpu")
    config = fitted.decoder.config
    model.decoder.config.mask_threshold = config.mask_threshold | {"value": 0.0}
    model.decoder.config.mask_edges = config.mask_edges
    model.edges = EdgeFilter.of(config.mask_edges)
    return model


def _completed(model: InContextModel, episode: EvaluationEpisode) -> PaintedPair:
    request = Episode(episode.task, episode.category, episode.pairs[:-1])
    (pair,) = model.complete([(request, episode.query.image)])
    return pair


def test_in_one_pass_each_colour_of_the_example_has_its_expected_mask(
    shards: Path, fitted: InContextModel
) -> None:
    for episode in islice(EpisodeSet(ShardSet(shards), fitted.codec, "semantic_segmentation"), 5):
        request = Episode(episode.task, episode.category, episode.pairs[:-1])
        probabilities_BNK = decode_at_once(
            fitted.decoder, fitted.codec, [(request, episode.query.image)]
        )
        pair = _completed(fitted, episode)
        assert np.array_equal(pair.painted, probabilities_BNK[0].argmax(dim=-1).numpy())
        (example,) = fitted.decode_painted(episode.pairs[0].painted[None])
        assert set(pair.drawn.masks) == set(find_colours(example))
        for name, drawn in pair.drawn.masks.items():
            corner_C3 = np.array([COLOURS[name]]) > 0
            expected = fitted.decode_colours(probabilities_BNK, corner_C3)[0, 0].numpy()
            np.testing.assert_allclose(drawn.brightness_HW, 2 * expected - 1, atol=1e-6)
        masks = pair.drawn.disjoint_masks()
        assert sum(mask_HW.astype(int) for mask_HW in masks.values()).max(initial=0) <= 1
        without = SEMANTIC_SEGMENTATION.expected_masks(fitted, probabilities_BNK, [()])
        assert (without.amax(dim=(2, 3)) > -1).all(), "no example hides a colour"


def test_the_threshold_is_fitted_on_the_masks_of_all_classes(
    shards: Path, fitted: InContextModel
) -> None:
    episodes = EpisodeSet(ShardSet(shards), fitted.codec, "semantic_segmentation")
    expected = []
    for number in (0, 4, 8, 12, 15, 19, 23):  # Seven at even distances.
        drawn = _completed(fitted, episodes[number]).drawn
        colours = episodes[number].meta["colours"].values()
        expected += [
            drawn.masks[colour].expected_iou for colour in colours if colour in drawn.masks
        ]
    found = fitted.decoder.config.mask_threshold
    assert found["value"] == pytest.approx(np.quantile(expected, 0.02), abs=1e-4)


def test_outlines_of_all_colours_follow_the_edges(
    shards: Path, eager: InContextModel, tmp_path: Path
) -> None:
    """In an evaluation, on other shards than those of the fit, and where a query is painted."""
    other = shutil.copytree(shards, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert eager.folder is not None and eager.edges is not None
    folder = shutil.copytree(eager.folder, tmp_path / "fitted")
    eager.decoder.config.save_pretrained(folder)
    evaluate(folder, other, tmp_path / "report", limit=5, controls=())
    lines = (tmp_path / "report/predictions.jsonl").read_text().splitlines()[1:]
    episodes = EpisodeSet(ShardSet(shards), eager.codec, "semantic_segmentation")
    photographs = Photographs(ShardSet(shards), "semantic_segmentation")
    for line, episode in zip(map(json.loads, lines), episodes, strict=False):
        guide = photographs.at_model_size(episode, -1)
        drawn = _completed(eager, episode).drawn
        followed = drawn.each(lambda mask, guide=guide: follow_edges(mask, guide, eager.edges))
        written = {name: decode_rle(rle) for name, rle in line["colours"].items()}
        assert written and written.keys() == followed.disjoint_masks().keys()
        for name, mask_HW in followed.disjoint_masks().items():
            assert np.mean(written[name] == mask_HW) > 0.999

    example_picture, query = (photographs.at_model_size(episodes[0], n) for n in (0, -1))
    masks = episodes[0].meta["class_masks"][0]
    colours = {name: COLOURS[colour] for name, colour in episodes[0].meta["colours"].items()}
    painted = np.zeros((64, 64, 3), dtype=np.uint8)
    for name, rle in masks.items():
        painted[decode_rle(rle)] = colours[name]
    found = eager.segment_colours([(example_picture, painted)], query)
    session_query = Query.load(query, 64)
    codes = eager.encode([to_square_pixels(each, 64) for each in (example_picture, query)])
    # The colours are exchanged for those of the training in a fixed order, and back.
    exchanged = dict(zip(sorted(colours.values()), COLOURS, strict=False))
    (example,) = eager.encode_painted(
        [paint({exchanged[c]: (painted == c).all(axis=2) for c in exchanged}, (64, 64)) > 0]
    )
    request = Episode(SEMANTIC_SEGMENTATION, "", (PaintedPair(codes[0], example),))
    (pair,) = eager.complete([(request, codes[1])])
    own = pair.drawn.each(lambda mask: in_own_size(mask, session_query, eager.edges))
    expected = np.zeros_like(painted)
    for colour, name in exchanged.items():
        if name in own.disjoint_masks():
            expected[own.disjoint_masks()[name]] = colour
    assert np.array_equal(found, expected)


def test_the_benchmark_of_colours_asks_twice_and_draws(
    shards: Path, model_folder: Path, tmp_path: Path, run_command: Command
) -> None:
    command = [sys.executable, "benchmarks/colours.py", str(model_folder), str(shards)]
    picture, file = tmp_path / "colours.png", tmp_path / "colours.json"
    done = run_command([*command, "--queries", "2", "--picture", str(picture), "--json", str(file)])
    assert done.returncode == 0, done.stdout
    figures = json.loads(file.read_text())["figures"]
    assert figures["queries"] == 2 and 0 <= figures["flips"] <= figures["right after the example"]
    assert Image.open(picture).size == (5 * 136 + 8, 2 * 136 + 8)


@pytest.mark.slow
def test_a_model_is_trained_evaluated_and_paints(
    shards: Path, tmp_path: Path, run_command: Command
) -> None:
    small = (
        "vocabulary.text_merges=1000 vocabulary.image_codes=3578 vocabulary.mask=true "
        "vocabulary.features=1024 model.layers=2 model.width=32 model.heads=2 "
        "model.layers_with_experts=[1] model.positions=400 training.steps=2 training.log_every=1 "
        "training.global_batch=2 training.micro_batch=2 training.mask_corruption=true "
        "data.workers=0 optimizer.warmup_steps=1"
    )
    run, model, image = tmp_path / "run", tmp_path / "model", tmp_path / "image.png"
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(image)
    mask = tmp_path / "mask.png"
    Image.fromarray(_painted((40, 60), [(200, 0, 0), (0, 0, 90)])).save(mask)
    for command in (
        f"train demo data.shards={shards} training.output={run} {small}",
        f"export {run} --out {model}",
        f"evaluate {model} {shards} --limit 4 --out {tmp_path / 'report'}",
        f"segment {model} --example {image} {mask} --query {image} --colours "
        f"--out {tmp_path / 'out.png'}",
    ):
        done = run_command(["icl-moe", *command.split()], timeout=900)
        assert done.returncode == 0, done.stdout
    assert Image.open(tmp_path / "out.png").size == (60, 40)
    command = f"segment {model} --example {image} {mask} --query {image} --out {tmp_path / 'a.png'}"
    done = run_command(["icl-moe", *command.split()])
    assert done.returncode == 2
    assert "was trained on semantic segmentation, not segmentation; the recipe" in done.stdout


def test_an_example_is_not_asked_about_a_colour_that_it_lacks(
    eager: InContextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask of a colour is the weighted mean over the groups of examples that show the same
    colours.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    red, blue = (255, 0, 0), (0, 0, 255)
    masks = [_painted((64, 64), colours) for colours in ([red, blue], [red], [red], [blue])]
    pairs = list(zip(images, masks, strict=True))
    query = Query.load(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), 64)
    monkeypatch.setattr(eager, "edges", None)
    found = eager.segment_colours(pairs, query)
    codes = eager.encode([to_square_pixels(Image.fromarray(each), 64) for each in images])
    (query_codes,) = eager.encode([query.pixels_3HW])
    # The users' colours are exchanged for the first of the training's in a fixed order.
    (first, second) = list(COLOURS)[:2]
    exchanged = {blue: first, red: second}
    brightness = []
    for image, mask in zip(codes, masks, strict=True):
        painted = paint({exchanged[c]: (mask == c).all(axis=2) for c in (red, blue)}, (64, 64))
        (code,) = eager.encode_painted([painted > 0])
        episode = Episode(SEMANTIC_SEGMENTATION, "", (PaintedPair(image, code),))
        (pair,) = eager.complete([(episode, query_codes)])
        brightness.append({n: drawn.brightness_HW for n, drawn in pair.drawn.masks.items()})
    assert [set(each) for each in brightness] == [{first, second}, {second}, {second}, {first}]
    mean = {
        name: np.mean([each[name] for each in brightness if name in each], axis=0)
        for name in (first, second)
    }
    expected = DrawnClasses({n: DrawnMask(b, True) for n, b in mean.items()})
    for colour, name in exchanged.items():
        is_colour_HW = (found == colour).all(axis=2)
        mask_HW = expected.disjoint_masks().get(name, np.zeros((64, 64), dtype=bool))
        assert mask_HW.any() and np.mean(is_colour_HW == mask_HW) > 0.999


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_levels_of_more_bits_are_ids_as_they_are(
    eager: InContextModel, tmp_path: Path, kind: type
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    plain_HW = _painted((64, 64), [(1, 1, 1), (2, 2, 2)])[..., 0]
    expected = eager.segment_colours([(image, plain_HW)], image)
    assert expected.any()
    ids_HW = plain_HW.astype(kind)
    assert np.array_equal(eager.segment_colours([(image, ids_HW)], image), expected)
    path = tmp_path / "ids.tiff"
    Image.fromarray(ids_HW).save(path)
    assert np.array_equal(eager.segment_colours([(image, path)], image), expected)
    ids_HW[plain_HW == 2] = 300
    with pytest.raises(InputError, match=r"has the level 300; each class must have a colour, or a"):
        eager.segment_colours([(image, ids_HW)], image)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((40, 60, 3), dtype=np.uint8), "mask of example 1 is black"),
        (_painted((40, 50), [(9, 9, 9)]), "is 50 x 40 pixels, but its image is 60 x 40"),
        (_painted((40, 60), [(n, 0, 0) for n in range(1, 9)]), "has 8 colours besides black, and"),
    ],
)
def test_a_mask_that_is_not_painted_in_a_few_colours_is_refused(
    model_folder: Path, mask: np.ndarray, message: str
) -> None:
    model = InContextModel.from_pretrained(model_folder, "cpu")
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=message):
        model.segment_colours([(image, mask)], image)


def test_a_colour_of_which_nothing_remains_is_named(model_folder: Path) -> None:
    model = InContextModel.from_pretrained(model_folder, "cpu")
    image = np.zeros((1000, 1500, 3), dtype=np.uint8)
    painted = _painted((1000, 1500), [(9, 9, 9)])
    painted[:2, :2] = (255, 0, 0)
    with pytest.raises(InputError, match=r"so little of the colour \(255, 0, 0\) that nothing"):
        model.segment_colours([(image, painted)], image)


def test_swapped_examples_are_of_single_classes(shards: Path, model_folder: Path, tmp_path) -> None:
    with pytest.raises(InputError, match="no swapped examples of several classes in one mask"):
        evaluate(model_folder, shards, tmp_path / "report", controls=("swapped",))


def test_examples_with_different_colours_and_no_examples_are_refused(model_folder: Path) -> None:
    model = InContextModel.from_pretrained(model_folder, "cpu")
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    with pytest.raises(InputError, match="need an example, which gives their colours"):
        model.segment_colours([], image)
    masks = [_painted((40, 60), [(n, n, 0) for n in range(s, s + 4)]) for s in (1, 5)]
    with pytest.raises(InputError, match="have 8 colours besides black together"):
        model.segment_colours([(image, mask) for mask in masks], image)
    with pytest.raises(InputError, match="reads no class names, only examples"):
        model.segment_colours([(image, masks[0])], image, category="cat + dog")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["segmentation.source=composed", "segmentation.images=a", "segmentation.annotations=b",
             "segmentation.composed.same_instance=0.5"],
            "same_instance must be 0",
        ),
        (["segmentation.classes_per_mask=8"], "must lie in 1..7"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings: list[str], message: str) -> None:
    chosen = ["segmentation.classes_per_mask=2", *settings]
    with pytest.raises(InputError, match=message):
        load_recipe(DataRecipe, "demo", chosen, package="preprocessing")


@given(st.permutations([*COLOURS.values(), (0, 0, 0)]), st.floats(0, 0.49))
def test_a_mixture_of_two_colours_is_read_as_the_nearer_one(
    corners: list[tuple[int, int, int]], share: float
) -> None:
    """Wherever their levels differ; so a soft edge between two classes looks like no third one."""
    near, far = (torch.tensor(corner) / 127.5 - 1 for corner in corners[:2])
    found = find_colours(((1 - share) * near + share * far)[:, None, None])
    expected = [name for name, colour in COLOURS.items() if colour == corners[0]]
    assert list(found) == expected
