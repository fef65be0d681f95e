"""Recipes are read strictly: errors are reported with the nearest right key, and values have their
types.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from icl_moe.errors import InputError
from icl_moe.ranges import Range
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import find_recipe, from_dict, load_recipe, to_dict
from preprocessing.recipe import DataRecipe
from preprocessing.tokenizers.recipe import TokenizerRecipe


@dataclass(frozen=True)
class Part:
    file: str
    size: int


@dataclass(frozen=True)
class Inner:
    steps: int
    rate: float = 1e-3
    mode: Literal["none", "written"] = "none"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"inner.steps must be at least 1, not {self.steps}.")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str = "plain"
    limit: float | None = 0.5
    layers: tuple[int, ...] = (1, 3)
    enabled: bool = False
    parts: tuple[Part, ...] = ()
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def read(tmp_path: Path, text: str, *overrides: str) -> Outer:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return load_recipe(Outer, str(file), overrides)


def test_values_come_typed_and_defaults_fill_in(tmp_path: Path) -> None:
    recipe = read(
        tmp_path, "inner: {steps: 3, rate: 1e-4, mode: null}\nname: 2017\nlayers: [0, 2]\n"
    )
    assert recipe == Outer(Inner(3, 1e-4, "none"), name="2017", layers=(0, 2))


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        "inner: {steps: 3}\n",
        "inner.steps=20",
        "layers=[5]",
        "enabled=true",
        "limit=null",
        "name=a=b",
        "inner.mode=written",
    )
    assert recipe == Outer(
        Inner(20, mode="written"), name="a=b", limit=None, layers=(5,), enabled=True
    )


def test_an_override_can_open_a_section_that_the_file_lacks(tmp_path: Path) -> None:
    assert read(tmp_path, "", "inner.steps=7").inner == Inner(7)


def test_a_recipe_comes_back_from_plain_values_and_from_yaml(tmp_path: Path) -> None:
    recipe = Outer(
        Inner(2),
        layers=(),
        parts=(Part("a.tar", 5), Part("b.tar", 6)),
        counts={"captioning": {"dog": 4}},
    )
    values = to_dict(recipe)
    assert values["parts"] == [{"file": "a.tar", "size": 5}, {"file": "b.tar", "size": 6}]
    assert from_dict(Outer, values, "values") == recipe
    assert read(tmp_path, yaml.safe_dump(values)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "inner: {stepz: 3}",
            "recipe.yaml: unknown key 'inner.stepz' (did you mean 'inner.steps'?); known here are "
            "inner.steps, inner.rate, inner.mode.",
        ),
        ("inner: {steps: 3}\nlayer: [1]", "unknown key 'layer' (did you mean 'layers'?)"),
        (
            "inner: {steps: 3}\nfrobnicate: 1",
            "unknown key 'frobnicate'; known here are inner, name",
        ),
        ("inner: {rate: 1}", "recipe.yaml: the key 'inner.steps' is missing."),
        ("name: x", "the key 'inner' is missing"),
        ("inner: {steps: three}", "'inner.steps' must be a whole number, not 'three'"),
        ("inner: {steps: 3.5}", "'inner.steps' must be a whole number, not 3.5"),
        ("inner: {steps: true}", "'inner.steps' must be a whole number, not True"),
        ("inner: {steps: 3, rate: fast}", "'inner.rate' must be a number, not 'fast'"),
        ("inner: {steps: 3}\nlimit: high", "'limit' must be a number, not 'high'"),
        ("inner: {steps: 3}\nenabled: 1", "'enabled' must be true or false, not 1"),
        ("inner: {steps: 3}\nname: [a]", "'name' must be text, not ['a']"),
        ("inner: {steps: 3}\nlayers: 3", "'layers' must be a list, not 3"),
        ("inner: {steps: 3}\nlayers: [a]", "'layers' must be a whole number, not 'a'"),
        (
            "inner: {steps: 3}\nparts: [{file: a, size: b}]",
            "'parts.size' must be a whole number, not 'b'",
        ),
        (
            "inner: {steps: 3}\ncounts: {captioning: {dog: many}}",
            "'counts.captioning.dog' must be a whole number, not 'many'",
        ),
        ("inner: {steps: 3}\ncounts: [1]", "'counts' must hold keys and values, not [1]"),
        (
            "inner: {steps: 3, mode: writen}",
            "'inner.mode' must be one of none | written, not 'writen' (did you mean 'written'?)",
        ),
        ("inner: 3", "'inner' must hold keys and values, not 3"),
        ("inner: {steps: 0}", "recipe.yaml: inner.steps must be at least 1, not 0."),
        ("- 1", "must hold keys and values, not a list"),
        ("inner: {steps: 3", "recipe.yaml, line 2 is not valid YAML"),
        ("inner: {steps: " + "9" * 5000 + "}", "a number has too many digits"),
        (
            "inner: {steps: 2024-13-45}",
            "recipe.yaml: 'inner.steps' must be a whole number, not '2024-13-45'",
        ),
        ("inner: " + "[" * 600, "recipe.yaml is not valid YAML"),
        (
            "inner: {steps: 3}\nname: a\nname: b",
            "recipe.yaml, line 3 is not valid YAML: the key 'name' occurs twice.",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path, text + "\n")


@pytest.mark.parametrize("override", ["steps", "=3"])
def test_an_override_that_is_no_setting_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError, match=f"'{override}' is not a setting: write key=value"):
        read(tmp_path, "inner: {steps: 3}", override)


def test_an_unknown_override_is_refused_like_an_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'inner\.rate'"):
        read(tmp_path, "inner: {steps: 3}", "inner.rat=1")


def test_a_file_that_is_not_there_and_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml does not exist"):
        load_recipe(Outer, str(tmp_path / "absent.yaml"))
    with pytest.raises(InputError, match=rf"{tmp_path} is not a file; it must be one"):
        load_recipe(Outer, str(tmp_path))
    with pytest.raises(
        InputError,
        match=(
            r"no recipe named 'paper_265' \(did you mean 'paper_256'\?\); shipped are "
            r".*paper_256"
        ),
    ):
        load_recipe(TrainingRecipe, "paper_265")


def shipped(package: str) -> list[str]:
    return sorted(
        path.stem
        for path in (Path(__file__).resolve().parent.parent / package / "recipes").glob("*.yaml")
    )


@pytest.mark.parametrize(
    "name", [name for name in shipped("icl_moe") if not name.startswith("tokenizer_")]
)
def test_every_shipped_training_recipe_loads_and_comes_back(name: str) -> None:
    recipe = load_recipe(TrainingRecipe, name)
    assert from_dict(TrainingRecipe, to_dict(recipe), name) == recipe


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    recipe = load_recipe(TrainingRecipe, "paper_256")
    assert recipe.vocabulary.size == 52295
    model, optimizer, training = recipe.model, recipe.optimizer, recipe.training
    assert (model.layers, model.width, model.heads, model.positions) == (12, 768, 12, 2060)
    assert (model.dropout, model.attention_dropout, model.layer_norm_epsilon) == (0.1, 0.1, 1e-12)
    assert (model.feed_forward, model.experts, len(model.sparse_layers)) == ("attributes", 8, 6)
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == (
        "mt_adamw",
        1e-4,
        0.05,
    )
    assert (training.global_batch, training.auxiliary_loss_weight) == (512, 0.02)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heads=5", "model.width (768) must be a multiple of model.heads (5)"),
        ("model.layers_with_experts=[12]", "names layer 12, but the layers are 0..11"),
        ("model.experts_per_token=3", "model.experts_per_token must lie in 1..2, not 3."),
        ("model.experts=1", "model.experts_per_token (2) must be at most model.experts (1)."),
        ("training.micro_batch=7", "must be a multiple of training.micro_batch (7)"),
        ("training.steps=0", "training.steps must be at least 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas must be two numbers"),
        (
            "model.feed_forward=sparse",
            "'model.feed_forward' must be one of dense | token | attributes",
        ),
        ("vocabulary.image_codes=1", "vocabulary.image_codes must be at least 2"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(TrainingRecipe, "paper_256", [override])


@dataclass(frozen=True)
class Number:
    """A number in a recipe: its key, type and range, and how its value is written."""

    key: str
    type: type
    range: Range | None
    written: str = "{}"

    def setting(self, value: object) -> str:
        return f"{self.key}={self.written.replace('{}', str(value))}"

    def wrong_values(self) -> list[object]:
        range, wrong = self.range, [math.nan, "-.inf", "true", "several", "[[1]]"]
        for bound, beside in ((range.least, -1), (range.most, 1)):
            wrong += [self.type(bound) + beside] if bound is not None else []
        wrong += [bound for bound in (range.above, range.below) if bound is not None]
        return [*wrong, 10**12, 10**400, *([1.5] if self.type is int else [1e-40])]


def numbers(kind: object, key: str = "", written: str = "{}") -> Iterator[Number]:
    """Every number of a recipe of type `kind`, including those in lists and tables."""
    if dataclasses.is_dataclass(kind):
        for name, inner in get_type_hints(kind, include_extras=True).items():
            yield from numbers(inner, f"{key}.{name}".lstrip("."))
    elif get_origin(kind) is Annotated:
        yield Number(key, get_args(kind)[0], get_args(kind)[1], written)
    elif kind in (int, float):
        yield Number(key, kind, None, written)
    elif get_origin(kind) is tuple:
        yield from numbers(get_args(kind)[0], key, "[{}]")
    elif get_origin(kind) is dict:
        yield from numbers(get_args(kind)[1], key, "{segmentation: {}}")
    else:
        for inner in get_args(kind):
            yield from numbers(inner, key, written) if get_origin(kind) is not Literal else ()


READ = {
    TrainingRecipe: ("demo", "icl_moe"),
    TokenizerRecipe: ("tokenizer_demo", "preprocessing.tokenizers"),
    DataRecipe: ("demo", "preprocessing"),
}
NUMBERS = [(kind, number) for kind in READ for number in numbers(kind)]


def test_every_kind_of_number_is_found() -> None:
    found = {(kind.__name__, number.key) for kind, number in NUMBERS}
    assert ("TrainingRecipe", "optimizer.task_weights") in found
    assert ("TrainingRecipe", "optimizer.clip") in found
    assert ("TokenizerRecipe", "network.channel_multipliers") in found
    assert ("DataRecipe", "captioning.min_descriptions") in found


@pytest.mark.parametrize(
    ("kind", "number"),
    NUMBERS,
    ids=[f"{READ[kind][1]} {READ[kind][0]} {number.key}" for kind, number in NUMBERS],
)
def test_every_number_of_every_recipe_has_a_range_that_it_is_held_to(
    kind: type, number: Number
) -> None:
    assert number.range is not None
    source, package = READ[kind]
    for value in number.wrong_values():
        with pytest.raises(InputError) as refusal:
            load_recipe(kind, source, [number.setting(value)], package)
        printed = str(refusal.value)
        assert re.match(
            rf"{source}\.yaml: '?{number.key}(\.segmentation)?'? must .*, not ", printed
        )
        assert "\n" not in printed


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("model.dropout=10", "model.dropout must lie in 0..1 without 1, not 10."),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate must lie in 0..1 without 0"),
        ("optimizer.clip=0", "optimizer.clip must be null or a positive number, not 0."),
        ("training.stop_after=0", "training.stop_after must be null or at least 1, not 0."),
        ("training.seed=5000000000", "training.seed must be at most 2147483647, not 5000000000."),
        (
            "optimizer.weight_decay=1e-40",
            "optimizer.weight_decay must be of a size between 1e-30 and 1e+09, not '1e-40'.",
        ),
        (f"training.steps={'9' * 2000}", "is not valid YAML: a number has too many digits."),
    ],
)
def test_a_number_outside_its_range_is_refused_with_the_range(value: str, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        load_recipe(TrainingRecipe, "demo", [value])


@pytest.mark.parametrize("value", ["model.dropout=0", "training.seed=0", "optimizer.betas=[0, 0]"])
def test_the_ends_of_a_range_belong_to_it(value: str) -> None:
    load_recipe(TrainingRecipe, "demo", [value])


def test_a_name_that_looks_like_a_date_is_a_name() -> None:
    recipe = load_recipe(TrainingRecipe, "demo", ["training.output=2026-11-26"])
    assert recipe.training.output == "2026-11-26"


def test_a_task_that_stands_twice_in_a_setting_is_refused() -> None:
    with pytest.raises(InputError, match="the key 'captioning' occurs twice"):
        load_recipe(
            TrainingRecipe, "demo", ["training.task_weights={captioning: 1, captioning: 2}"]
        )


def test_a_path_is_told_from_a_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("inner: {steps: 1}")
    assert find_recipe(str(file), "icl_moe") == file
    assert find_recipe("paper_256", "icl_moe").name == "paper_256.yaml"


CAPTIONS, MASKS, BATCH = 460_000, 280_000, 512


def test_the_ablations_train_one_task_and_have_room_for_every_box() -> None:
    """Tables 1 and 2 of the paper are of single tasks, one of them with boxes drawn as images."""
    recipe = load_recipe(TrainingRecipe, "ablation_128")
    assert (recipe.optimizer.name, recipe.optimizer.clip) == ("adamw", 0.5)
    for box in ("none", "image", "text"):
        data = load_recipe(DataRecipe, "ablation_128", [f"caption.box={box}"], "preprocessing")
        format = data.sequence_format(64)
        assert format.length(data.examples + 1) <= recipe.model.positions
    assert format.length(4) == 524
    assert recipe.training.steps == pytest.approx(20 * CAPTIONS / BATCH, rel=0.005)


def test_the_paper_s_steps_are_forty_epochs_of_both_tasks_together() -> None:
    steps = load_recipe(TrainingRecipe, "paper_256").training.steps
    assert steps == pytest.approx(40 * (CAPTIONS + MASKS) / BATCH, rel=0.005)
    share = math.sqrt(CAPTIONS) / (math.sqrt(CAPTIONS) + math.sqrt(MASKS))
    seen = steps * BATCH * share / CAPTIONS, steps * BATCH * (1 - share) / MASKS
    assert [round(each) for each in seen] == [36, 46], "as docs/training.md says"
    assert round(36_000 * BATCH * share / CAPTIONS, 1) == 22.5
    assert round(36_000 * BATCH * (1 - share) / MASKS) == 29
