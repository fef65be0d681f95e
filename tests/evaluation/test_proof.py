"""Swapped examples, flips and the number of examples: with `evaluate` on models that follow or
ignore their examples, and compared with plain loops.
"""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import toy_export
import toy_tokenizer

from icl_moe.cli import main
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError
from icl_moe.evaluation.episodes import EpisodeSet, Swap
from icl_moe.evaluation.proof import SwappedQuery, score_shots, score_swaps
from icl_moe.evaluation.protocol import evaluate
from icl_moe.images import crop_and_resize_mask
from icl_moe.inference.model import InContextModel
from icl_moe.rle import decode_rle, encode_rle
from icl_moe.sequence import SequenceFormat
from icl_moe.settings import load_recipe
from icl_moe.tasks import CAPTIONING, SEGMENTATION
from icl_moe.tasks.caption_styles import StyleJudge
from icl_moe.tasks.captioning import CaptionPair, style_judge
from icl_moe.tasks.segmentation import Segmentation, SegmentationPair
from icl_moe.tasks.task import Kind, by_kind
from preprocessing.build import build_shards
from preprocessing.coco import class_masks, load_instances
from preprocessing.recipe import DataRecipe


@pytest.fixture
def episodes(toy_shards, toy_model_folder):
    codec = InContextModel.from_pretrained(toy_model_folder).codec
    shards = ShardSet(toy_shards)
    return {task: EpisodeSet(shards, codec, task) for task in shards.manifest.samples}


@dataclass(frozen=True, eq=False)
class Said(SegmentationPair):
    """A pair with a given mask, independent of its codes."""

    output: dict = field(default_factory=dict)


@pytest.fixture
def model_that(monkeypatch, episodes):
    """Makes every model mark, or describe, the classes `marks(all of the query, the one shown)`.
    Returns a list to which the requests to models are appended.
    """

    def install(marks) -> list:
        requests_seen = []
        known = {
            (e.task.name, e.query.image.tobytes()): e
            for of_task in episodes.values()
            for e in map(of_task.__getitem__, range(len(of_task)))
        }

        def complete(_, requests, **options):
            requests_seen.extend(requests)
            return [answer(request, query) for request, query in requests]

        def answer(request, query):
            truth = known[request.task.name, query.tobytes()]
            classes = sorted({e["class"] for e in truth.meta["objects"]})
            marked = marks(classes, request.category)
            entries = [e for e in truth.meta["objects"] if e["class"] in marked]
            if request.task is CAPTIONING:
                first = entries[0]
                return CaptionPair(query, first["caption"], first["class"], tuple(first["box"]))
            mask = np.any([decode_rle(e["mask"]) for e in entries], axis=0)
            return Said(query, query, output={"mask": encode_rle(mask)})

        monkeypatch.setattr(InContextModel, "complete", complete)
        monkeypatch.setattr(Segmentation, "said", lambda _, model, pairs: [p.output for p in pairs])
        monkeypatch.setattr(Segmentation, "ceiling", lambda *_: None)
        return requests_seen

    return install


@pytest.fixture
def run(toy_model_folder, toy_shards, tmp_path, no_java):
    def run(**settings):
        return evaluate(toy_model_folder, toy_shards, tmp_path / "out", **settings).to_json()

    return run


def swapped(metrics, task: str, prediction: str = "model") -> dict:
    (row,) = [r for r in metrics["tasks"][task]["swapped"] if r["prediction"] == prediction]
    return row


def test_a_model_that_obeys_its_examples_flips_always(run, model_that, tmp_path):
    model_that(lambda classes, shown: {shown})
    metrics = run(controls=["swapped"])
    for task in ("segmentation", "captioning"):
        row = swapped(metrics, task)
        assert row["queries"] >= 3
        assert (row["right"], row["right_swapped"], row["flips"]) == (1, 1, 1)
        assert row["intervals"]["flips"] == (1, 1)
    masks = swapped(metrics, "segmentation")
    assert (masks["own_with_own"], masks["swapped_with_shown"]) == (1, 1)
    assert (masks["own_with_other"], masks["swapped_with_own"]) == (0, 0)
    assert swapped(metrics, "segmentation", "every object")["flips"] == 0
    assert swapped(metrics, "segmentation", "whole image")["flips"] == 0
    page = (tmp_path / "out/report.html").read_text()
    assert page.index("one query, two examples") < page.index('id="loss"')
    assert "The first query that is right with both" in page
    assert "The first query that is not" not in page


def test_baselines_of_masks_equal_plain_sums(run, model_that, episodes):
    model_that(lambda classes, shown: {shown})
    rows = {r["prediction"]: r for r in run(limit=4)["tasks"]["segmentation"]["rows"]}
    every, whole = [], []
    for episode in map(episodes["segmentation"].__getitem__, range(4)):
        true, union = decode_rle(episode.meta["masks"][-1]), np.zeros((64, 64), bool)
        for entry in episode.meta["objects"]:
            union |= decode_rle(entry["mask"])
        every.append(true.sum() / union.sum())  # The query's own mask is part of the union.
        whole.append(true.mean())
    assert rows["model"]["mean_iou"] == 1
    assert rows["every object"]["mean_iou"] == pytest.approx(np.mean(every))
    assert rows["whole image"]["mean_iou"] == pytest.approx(np.mean(whole))


def test_a_model_that_ignores_its_examples_never_flips(run, model_that):
    """It always chooses the class whose name is first, which is often right in one of the two
    cases.
    """
    model_that(lambda classes, shown: {classes[0]})
    metrics = run()
    for task in ("segmentation", "captioning"):
        row = swapped(metrics, task)
        assert 0 < row["right"] + row["right_swapped"] <= 1
        assert row["flips"] == 0
    masks = swapped(metrics, "segmentation")
    assert masks["own_with_own"] == masks["swapped_with_own"] > 0


def test_swapped_examples_are_of_another_class_that_the_query_shows(run, model_that, episodes):
    requests_seen = model_that(lambda classes, shown: {shown})
    run(shots=(1, 2))
    for task, of_task in episodes.items():
        for number, (shown_kind, source) in of_task.swaps.items():
            episode = of_task[number]
            assert shown_kind.category != episode.category == of_task[number].category
            assert source.kind == shown_kind
            assert shown_kind.category in {e["class"] for e in episode.meta["objects"]}
            images = {origin["image"] for origin in source.meta["sources"][:2]}
            assert episode.meta["sources"][-1]["image"] not in images
            requests = [
                len(request.pairs)
                for request, query in requests_seen
                if request.task.name == task
                and request.category == shown_kind.category
                and np.array_equal(query, episode.query.image)
                and request.pairs
                and np.array_equal(request.pairs[0].image, source.pairs[0].image)
            ]
            assert {*requests} == {1, 2}


def test_shards_keep_all_that_is_annotated_in_a_query(episodes, toy_shards):
    """Masks are compared with the scene's annotations, cropped here; captions with its regions."""
    coco = load_instances(toy_shards / "synthetic/instances_train.json")
    ids = {record["file_name"]: number for number, record in coco.imgs.items()}
    described = {
        record["id"]: record["regions"]
        for record in json.loads((toy_shards / "synthetic/region_descriptions.json").read_text())
    }
    several = 0
    for episode in map(episodes["segmentation"].__getitem__, range(11)):
        source = episode.meta["sources"][-1]
        wanted = {}
        for number, mask in class_masks(coco, ids[source["image"]]).items():
            cut = crop_and_resize_mask(mask, tuple(source["crop"]), 64)
            if cut.any():
                wanted[coco.cats[number]["name"]] = cut
        found = {e["class"]: decode_rle(e["mask"]) for e in episode.meta["objects"]}
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
        assert np.array_equal(found[episode.category], decode_rle(episode.meta["masks"][-1]))
        several += len(found) > 1
    assert several >= 3
    for episode in map(episodes["captioning"].__getitem__, range(11)):
        regions = described[ids[episode.meta["sources"][-1]["image"]]]
        captions = {e["caption"] for e in episode.meta["objects"]}
        assert captions == {region["phrase"] for region in regions}
        own = {e["caption"] for e in episode.meta["objects"] if e["class"] == episode.category}
        assert episode.meta["captions"][-1] in own


def test_scores_of_swapped_examples_equal_plain_loops(episodes):
    """Random masks: IoU pixel by pixel; an output is right if its IoU is higher than with any other
    class.
    """
    of_task, rng = episodes["segmentation"], np.random.default_rng(0)
    queries = []
    for number, swap in of_task.swaps.items():
        truth = of_task[number]
        masks = {e["class"]: decode_rle(e["mask"]) for e in truth.meta["objects"]}
        kept = [(rng.random((64, 64)) < 0.7) & masks[rng.choice(list(masks))] for _ in range(2)]
        predictions = [{"mask": encode_rle(mask)} for mask in kept]
        queries.append(SwappedQuery(truth, swap.shown, *predictions))
    scores = score_swaps(SEGMENTATION, queries, SEGMENTATION.judge([], of_task._codec.format))

    def iou(a, b) -> float:
        pixels = list(zip(a.flat, b.flat, strict=True))
        return sum(p and q for p, q in pixels) / sum(p or q for p, q in pixels)

    flips, agreements = [], []
    for truth, shown_kind, prediction, swapped_prediction in queries:
        masks = {e["class"]: decode_rle(e["mask"]) for e in truth.meta["objects"]}
        both = []
        for output, wanted in (
            (prediction, truth.category),
            (swapped_prediction, shown_kind.category),
        ):
            found = {name: iou(decode_rle(output["mask"]), mask) for name, mask in masks.items()}
            best = max(found.values())
            both.append(found[wanted] == best and list(found.values()).count(best) == 1)
            agreements.append((found[truth.category], found[shown_kind.category]))
        flips.append(all(both))
    assert scores.flips == pytest.approx(sum(flips) / len(flips))
    own, after = np.array(agreements[::2]).mean(axis=0), np.array(agreements[1::2]).mean(axis=0)
    assert (scores.own_with_own, scores.own_with_other) == pytest.approx(tuple(own))
    assert (scores.swapped_with_own, scores.swapped_with_shown) == pytest.approx(tuple(after))
    low, high = scores.intervals["own_with_own"]
    assert low <= scores.own_with_own <= high


@pytest.mark.parametrize(
    ("category", "box", "named", "placed", "right"),
    [
        ("written", "text", "shown", "shown", True),
        ("written", "text", "shown", "own", False),  # A name can be copied from an example.
        ("written", "text", "own", "shown", False),
        ("written", "none", "shown", "own", True),
        ("given", "text", "shown", "own", False),
        ("none", "none", "own", "shown", True),  # Then the words decide.
    ],
)
def test_a_caption_is_right_by_all_that_it_writes(category, box, named, placed, right):
    objects = {
        Kind("own"): [{"caption": "the red ring on the left", "box": (0.0, 0.0, 0.4, 0.4)}],
        Kind("shown"): [
            {"caption": "a star", "box": (0.5, 0.5, 0.7, 0.7)},
            {"caption": "a big star", "box": (0.6, 0.6, 1.0, 1.0)},
        ],
    }
    format = replace(SequenceFormat(), category=category, box=box)
    prediction = {"category": named, "box": objects[Kind(placed)][-1]["box"], "caption": "one star"}
    judge = CAPTIONING.judge([], format)
    assert judge(prediction, Kind("shown"), objects) == {"class": right}


@pytest.fixture(scope="module")
def styled(tmp_path_factory):
    """Drawn scenes of eight classes, described in three styles, and a model for them."""
    folder = tmp_path_factory.mktemp("styled")
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    settings = ["synthetic.images=40", "synthetic.classes=8", "samples=40", "segmentation=null"]
    settings += ["examples=1", *toy_tokenizer.recipe_settings(tokenizer)]
    recipe = load_recipe(DataRecipe, "modern_world", settings, package="preprocessing")
    build_shards(recipe, folder / "shards", workers=0)
    return toy_export.save_toy_model(folder / "model", folder / "shards"), folder / "shards"


def in_style(classes: str, styles: str):
    """How to answer: with a text of the `shown` or the `own` class (the query's), and style."""

    def answer(truth, shown_kind):
        kinds = {"shown": shown_kind, "own": truth.kind}
        wanted = Kind(kinds[classes].category, kinds[styles].style)
        return CAPTIONING.objects(truth)[wanted][0]

    return answer


def key_of(query: CaptionPair, example: CaptionPair) -> tuple[bytes, bytes, str]:
    return query.image.tobytes(), example.image.tobytes(), example.caption


@pytest.mark.parametrize(
    ("answer", "classes", "styles", "both"),
    [
        (in_style("shown", "shown"), 1, 1, 1),
        (in_style("shown", "own"), 1, 0, 0),
        (in_style("own", "shown"), 0, 1, 0),
    ],
)
def test_captions_are_asked_for_another_class_in_another_style(
    styled, tmp_path, no_java, monkeypatch, answer, classes, styles, both
):
    model, shards = styled
    episodes = EpisodeSet(
        ShardSet(shards), InContextModel.from_pretrained(model).codec, "captioning"
    )
    asked_for = {}
    for number in range(len(episodes)):
        own, swap = episodes[number], episodes.swaps.get(number)
        asked_for[key_of(own.query, own.pairs[0])] = own, own.kind
        if swap:
            asked_for[key_of(own.query, swap.source.pairs[0])] = own, swap.shown

    def complete(_, requests, **options):
        pairs = []
        for request, query in requests:
            (example,) = request.pairs
            prediction = answer(
                *asked_for[query.tobytes(), example.image.tobytes(), example.caption]
            )
            pairs.append(CaptionPair(query, prediction["caption"], None, tuple(prediction["box"])))
        return pairs

    monkeypatch.setattr(InContextModel, "complete", complete)
    metrics = evaluate(model, shards, tmp_path / "out").to_json()
    row = swapped(metrics, "captioning")
    assert row["queries"] == len(episodes.swaps) >= 5
    for number, swap in episodes.swaps.items():
        own = episodes[number].kind
        assert swap.shown.category != own.category or swap.shown.style != own.style
    respects = row["respects"]
    assert respects["class"]["flips"] == classes
    assert respects["style"]["flips"] == pytest.approx(styles, abs=0.05)
    assert row["flips"] == pytest.approx(both, abs=0.05)
    copied = swapped(metrics, "captioning", "first example")["respects"]
    assert copied["style"]["flips"] >= 0.95 > 0.6 > copied["class"]["flips"]
    page = (tmp_path / "out/report.html").read_text()
    assert "style place" in page and "right means right in every respect" in page


def test_a_query_counts_in_the_respects_in_which_its_examples_differ(
    styled, tmp_path, no_java, monkeypatch
):
    """Where the other examples are of the same class in another style, what is always said of the
    query's own class would be of the right class after both.
    """
    model, shards = styled
    usual = EpisodeSet._swap

    def swap(self, index):
        episode = self[index]
        if index % 2:
            return usual(self, index)
        styles = [
            kind
            for kind in sorted(self.task.objects(episode))
            if kind.category == episode.category and kind != episode.kind
        ]
        sources = ((kind, self._source(episode, kind)) for kind in styles)
        return next((Swap(kind, source) for kind, source in sources if source), None)

    monkeypatch.setattr(EpisodeSet, "_swap", swap)
    episodes = EpisodeSet(
        ShardSet(shards), InContextModel.from_pretrained(model).codec, "captioning"
    )
    own = {e.query.image.tobytes(): e for e in map(episodes.__getitem__, range(len(episodes)))}

    def complete(_, requests, **options):
        said = [(q, CAPTIONING.true_output(own[q.tobytes()])) for _, q in requests]
        return [CaptionPair(q, each["caption"], None, tuple(each["box"])) for q, each in said]

    monkeypatch.setattr(InContextModel, "complete", complete)
    row = swapped(evaluate(model, shards, tmp_path / "out").to_json(), "captioning")
    kinds = [(episodes[number].kind, swap.shown) for number, swap in episodes.swaps.items()]
    other_class = sum(own.category != shown.category for own, shown in kinds)
    other_style = sum(own.style != shown.style for own, shown in kinds)
    assert row["queries"] == len(kinds) > other_class >= 3
    assert row["of_another_class"] == row["respects"]["class"]["queries"] == other_class
    assert row["respects"]["style"]["queries"] == other_style
    assert row["respects"]["class"]["flips"] == row["respects"]["style"]["flips"] == 0
    assert row["flips"] == 0
    assert row["own_with_own"] > row["own_with_other"] > 0
    page = (tmp_path / "out/report.html").read_text()
    assert f"class ({other_class} queries)" in page and f"style ({other_style} queries)" in page
    assert f"of which {other_class} show two classes, asked with examples of either" in page


def test_agreement_with_another_class_is_not_measured_without_one():
    kinds = [Kind("star", style) for style in ("place", "colour")]
    texts = ["the star is on the left", "red on a grey ground"]
    box = (0.0, 0.0, 0.4, 0.4)
    truth = Described(
        {
            "class": "star",
            "style": "place",
            "objects": [
                {"class": "star", "style": kind.style, "caption": text, "box": box}
                for kind, text in zip(kinds, texts, strict=True)
            ],
        }
    )
    format = replace(SequenceFormat(), category="none", box="text")
    said = [{"category": None, "box": box, "caption": text} for text in texts]
    query = SwappedQuery(truth, kinds[1], *said)
    scores = score_swaps(CAPTIONING, [query], CAPTIONING.judge([truth], format))
    assert (scores.queries, scores.of_another_class, scores.flips) == (1, 0, 1)
    assert scores.own_with_other is scores.swapped_with_own is None
    assert set(scores.respects) == {"style"}


@dataclass
class Described:
    """A truth that keeps nothing but what is described."""

    meta: dict


def test_the_style_of_a_caption_is_judged_by_its_words():
    box, other = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 1.0, 1.0)
    objects = {
        Kind("star", "place"): [{"caption": "the star is on the left", "box": box}],
        Kind("star", "colour"): [{"caption": "red on a grey ground", "box": box}],
        Kind("ring", "place"): [{"caption": "a ring in the middle", "box": other}],
        Kind("ring", "colour"): [{"caption": "blue on a grey ground", "box": other}],
    }
    entries = [
        {"class": kind.category, "style": kind.style, **output}
        for kind, of_kind in objects.items()
        for output in of_kind
    ]
    format = replace(SequenceFormat(), category="none", box="text")
    judge = CAPTIONING.judge([Described({"objects": entries})], format)

    def judged(text: str, box: tuple[float, ...] = (0.0, 0.0, 0.5, 0.4)) -> dict[str, bool]:
        prediction = {"category": None, "box": box, "caption": text}
        return judge(prediction, Kind("star", "place"), objects)

    assert judged("the star is on the right") == {"class": True, "style": True}
    assert judged("a thing in the middle") == {"class": True, "style": True}
    assert judged("blue on a brown ground") == {"class": True, "style": False}
    assert judged("nothing known") == {"class": True, "style": False}
    assert judged("the star is on the left", other) == {"class": False, "style": True}
    # Where all is described in one style, there is nothing to obey.
    places = {kind: of_kind for kind, of_kind in objects.items() if kind.style == "place"}
    prediction = {"category": None, "box": box, "caption": "blue"}
    assert judge(prediction, Kind("star", "place"), places) == {"class": True}


def test_the_styles_of_drawn_captions_can_be_told_by_their_words(styled):
    """Texts that the judge has not counted: what it says of a model's captions can be trusted."""
    shards = ShardSet(styled[1])
    truths = [shards.sample("captioning", number) for number in range(40)]
    texts = {
        (kind.style, entry["caption"])
        for truth in truths
        for kind, entries in by_kind(truth).items()
        for entry in entries
    }
    right = []
    for style, text in sorted(texts):
        others: dict[str, list[str]] = {}
        for other_style, other in sorted(texts - {(style, text)}):
            others.setdefault(other_style, []).append(other)
        right.append(StyleJudge(others).style(text) == style)
    assert len(right) > 40 and np.mean(right) >= 0.95
    assert style_judge(truths).style(text) == style
    assert StyleJudge({}).style("red") is None


def test_more_examples_are_compared_query_by_query(episodes):
    of_task, rng = episodes["captioning"], np.random.default_rng(0)
    truths = [of_task[number] for number in range(11)]
    right = [CAPTIONING.true_output(truth) for truth in truths]
    half = [output if rng.random() < 0.5 else {**output, "caption": "none"} for output in right]
    none, one, two = score_shots(
        CAPTIONING, truths, {2: right, 1: half, 0: [{"caption": "none"}] * 11}
    )
    assert [row.shots for row in (none, one, two)] == [0, 1, 2]
    assert (none.agreement, two.agreement) == (0, 1)
    share = sum(a == b for a, b in zip(half, right, strict=True)) / 11
    assert one.agreement == one.gain == pytest.approx(share)
    assert two.gain == pytest.approx(1 - share)
    assert two.gain_interval == pytest.approx((1 - one.interval[1], 1 - one.interval[0]))
    assert none.gain is None


def test_the_command_swaps_and_shuffles_and_shows_numbers_of_examples(
    toy_model_folder, toy_shards, tmp_path, no_java, capsys
):
    arguments = f"evaluate {toy_model_folder} {toy_shards} --shots 1,2 --limit 6".split()
    arguments += ["--control", "swapped,shuffled", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for text in (
        "queries that show two classes",
        "flips",
        "2 examples of another class",
        "every annotated object of the query",
        "the whole image",
        "Captioning by number of examples",
        "95 % interval",
    ):
        assert text in printed, printed
    assert main([*arguments, "--control", "turned"]) == 2
    assert "A control must be shuffled or swapped, not 'turned'" in capsys.readouterr().err


@pytest.fixture
def shards_of(tmp_path):
    """Builds small shards of drawn scenes; returns their folder and a model for them."""

    def build(*settings: str):
        tokenizer = toy_tokenizer.save_toy_tokenizer(tmp_path / "tokenizer")
        recipe = load_recipe(
            DataRecipe,
            "demo",
            ["captioning=null", *settings, *toy_tokenizer.recipe_settings(tokenizer)],
            package="preprocessing",
        )
        build_shards(recipe, tmp_path / "shards", workers=0)
        model = toy_export.save_toy_model(tmp_path / "model", tmp_path / "shards")
        return model, tmp_path / "shards"

    return build


def test_shards_without_what_else_is_seen_are_read_and_the_control_says_what_it_needs(
    shards_of, monkeypatch, tmp_path
):
    described = Segmentation.describe

    def as_before(self, targets, image_size):
        return {k: v for k, v in described(self, targets, image_size).items() if k != "objects"}

    monkeypatch.setattr(Segmentation, "describe", as_before)
    model, shards = shards_of("synthetic.images=40", "samples=3")
    with pytest.raises(InputError, match=r"do not keep what else a query shows.*build them again"):
        evaluate(model, shards, tmp_path / "out", controls=["swapped"])
    assert not (tmp_path / "out").exists()
    result = evaluate(model, shards, tmp_path / "out").to_json()["tasks"]["segmentation"]
    assert result["swapped"] == []
    assert "these shards do not keep what else a query shows" in result["swapped_note"]
    assert "every object" not in {row["prediction"] for row in result["rows"]}
    assert result["swapped_note"] in (tmp_path / "out/report.html").read_text()


def test_queries_that_show_one_class_only_cannot_be_asked_for_another(
    shards_of, tmp_path, monkeypatch
):
    monkeypatch.setattr("icl_moe.tasks.segmentation.LEAST_SHOWN", 2.0)
    model, shards = shards_of("synthetic.images=40", "samples=3")
    with pytest.raises(InputError, match=r"No query in .* shows another class of which the shards"):
        evaluate(model, shards, tmp_path / "out", controls=["swapped"])
