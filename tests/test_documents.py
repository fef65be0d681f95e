"""The documentation is correct: the real command line accepts every command, every recipe and key
in it exists, every path exists, and every Python block runs.
"""

import ast
import csv
import importlib
import inspect
import re
import runpy
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest
import toy_export
import toy_tokenizer
from documents import Command
from PIL import Image
from small_run import REPOSITORY

from icl_moe.cli import main, parse_arguments
from icl_moe.recipe import TrainingRecipe
from icl_moe.settings import load_recipe
from icl_moe.tasks.task import Task
from preprocessing.build import build_shards
from preprocessing.recipe import DataRecipe
from preprocessing.tokenizers.recipe import TokenizerRecipe

COMMANDS = list(documents.commands())
SITE = "https://github.com/icl-moe/icl-moe/blob/main/"
SHELL = ("cd", "source", "mkdir", "for", "do", "done", "wget", "unzip", ".venv/bin/pre-commit")
"""Other commands in the pages: shell builtins, and programs that are not part of the project."""

RECIPE_OF = {
    "shards build": (DataRecipe, "preprocessing"),
    "tokenizer train": (TokenizerRecipe, "preprocessing.tokenizers"),
    "train": (TrainingRecipe, "icl_moe"),
}


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda page: page.name)
def test_a_block_of_code_is_fenced_and_names_its_language(page: Path) -> None:
    for block in documents.blocks(page):
        assert block.language in documents.LANGUAGES, f"{block.page}:{block.line}"
    assert not re.search(r"^\n? {4,}\S", documents.prose(page), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_is_what_the_program_takes(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(command)


def check(command: Command) -> None:
    program, *words = command.words
    program = Path(program).name
    if program == "icl-moe":
        check_icl_moe(words, command.mention)
    elif program == "make":
        assert not words or words[0] in make_targets()
        assert set(re.findall(r"\b[A-Z_]+(?==)", " ".join(words))) <= make_variables()
    elif program == "python":
        check_python(words)
    elif program == "bash" and words and words[0].startswith("benchmarks/"):
        check_benchmark_script(words)
    elif program == "bash" and words:
        check_script(words)
    elif program == "sbatch":
        check_script([word for word in words if not word.startswith("--")])
    elif program == "deepspeed" and words:
        from deepspeed.launcher.runner import parse_args

        options = parse_args(words)
        check_script([options.user_script, *options.user_args])
    elif program == "accelerate" and len(words) > 1:
        from accelerate.commands.launch import launch_command_parser

        options = launch_command_parser().parse_args(words[1:])
        assert options.module and options.training_script == "icl_moe"
        check_icl_moe(options.training_script_args, mention=False)
    elif program == "docker":
        check_docker(command, words)
    else:
        known = program in ("bash", "deepspeed", "accelerate") or command.words[0] in SHELL
        assert known, f"this test does not know how to check {program}"


def check_benchmark_script(words: Sequence[str]) -> None:
    """Check that the script exists, and that it or the program of its name knows the options."""
    script = REPOSITORY / words[0]
    known = script.read_text() + script.with_suffix(".py").read_text()
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in known, f"{words[0]} has no option {option}"


def check_icl_moe(words: Sequence[str], mention: bool) -> None:
    """Parse the command and read its recipe. A mention may consist of verbs only."""
    verbs = [word for word in words if re.fullmatch("[a-z]+", word)]
    if mention and verbs == list(words):
        with pytest.raises(SystemExit) as ended:
            parse_arguments([*words, "--help"])
        assert ended.value.code == 0
        return
    options = parse_arguments(["2" if word == "N" else word for word in words])
    if hasattr(options, "recipe") and not options.recipe.isupper():
        kind, package = RECIPE_OF[" ".join(words[: words.index(options.recipe)])]
        load_recipe(kind, options.recipe, options.overrides, package=package)


def check_python(words: Sequence[str]) -> None:
    """Check that the module exists or the script accepts these arguments."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
        return
    script = REPOSITORY / words[0]
    assert script.is_file(), script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(words))
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(ArgumentParser, name, _end_after(getattr(ArgumentParser, name)))
        with pytest.raises(_ParsedError):
            script_main(script)()


class _ParsedError(Exception):
    """The arguments were valid."""


def _end_after(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parse_and_end(parser: ArgumentParser) -> None:
        parse(parser)
        raise _ParsedError

    return parse_and_end


@cache
def script_main(script: Path) -> Callable[[], None]:
    return runpy.run_path(str(script), run_name="benchmark")["main"]


def check_script(words: Sequence[str]) -> None:
    """Check a script of the repository, and the recipe and settings that it would pass on."""
    script, *rest = words
    if script == "icl_moe.training":  # after the launcher's --module
        return
    assert (REPOSITORY / script).is_file(), script
    settings = [word for word in rest if "=" in word]
    names = [word for word in rest if "=" not in word]
    name = Path(script).stem
    if name == "pretrain":
        assert len(names) <= 1
        recipe = names[0] if names and not names[0].isupper() else "paper_256"
        load_recipe(TrainingRecipe, recipe, settings)
    elif name == "prepare_data":
        assert len(names) <= 1
        load_recipe(DataRecipe, "coco_vg_256", settings, package="preprocessing")
    else:
        assert name == "evaluate" and not settings and 2 <= len(names) <= 3


def check_docker(command: Command, words: Sequence[str]) -> None:
    verb, *rest = words
    if verb == "build":
        file = (REPOSITORY / "Dockerfile").read_text()
        for argument in re.findall(r"--build-arg (\w+)=", " ".join(rest)):
            assert re.search(rf"^ARG {argument}\b", file, re.MULTILINE)
    elif verb == "run":
        inside = tuple(rest[rest.index("icl-moe") + 1 :])
        if inside:
            check(Command(command.where, inside))


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


@cache
def make_variables() -> set[str]:
    return set(re.findall(r"^([A-Z_]+) \?=", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_every_shipped_training_recipe_reads_shards_that_a_command_builds() -> None:
    # The folders that launch_scripts/prepare_data.sh and `icl-moe demo` choose themselves.
    built = {"shards/paper_256", "demo/shards/train"}
    for command in COMMANDS:
        if command.words[:3] == ("icl-moe", "shards", "build") and not command.mention:
            built.add(command.words[command.words.index("--out") + 1])
    for path in (REPOSITORY / "icl_moe/recipes").glob("*.yaml"):
        assert load_recipe(TrainingRecipe, path.stem).data.shards in built, path.stem


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda page: page.name)
def test_every_path_and_name_of_the_code_is_there(page: Path) -> None:
    text = documents.prose(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.removeprefix(SITE).partition("#")[0]
        if target and "://" not in target:
            assert (REPOSITORY if SITE in link else page.parent).joinpath(target).exists(), link
    for span in documents.code_spans(page):
        if re.fullmatch(r"(icl_moe|preprocessing)(\.\w+)+", span):
            assert resolve(span) is not None, span
        elif re.fullmatch(r"[\w*.-]+(/[\w*.-]+)*/?", span) and is_ours(span):
            places = (REPOSITORY, REPOSITORY / "icl_moe", page.parent)
            assert any(any(place.glob(span.rstrip("/"))) for place in places), span


def is_ours(path: str) -> bool:
    """Whether a path should be in the repository: below one of its folders, or a file of code."""
    folder, slash, _ = path.partition("/")
    ours = ("icl_moe", "preprocessing", "tests", "benchmarks", "docs", "launch_scripts")
    return bool(slash) and (folder in ours or path.endswith(".py"))


def resolve(name: str) -> Any:
    """The object with a dotted name; None if there is none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the code of the pages reads: pictures, shards, a model for both
    tasks.
    """
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = toy_tokenizer.save_toy_tokenizer(folder / "tokenizer")
    settings = ["synthetic.images=12", "samples=2", "vocabulary.mask=true"]
    settings += toy_tokenizer.recipe_settings(tokenizer)
    recipe = load_recipe(DataRecipe, "demo", settings, package="preprocessing")
    shards = folder / "shards" / "paper_256"
    build_shards(recipe, shards, workers=0)
    toy_export.save_toy_model(folder / "exported", shards, mask_corruption=True)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (200, 250, 3), dtype=np.uint8)
    )
    mask = np.zeros((200, 250), dtype=np.uint8)
    mask[60:150, 40:200] = 255
    for name in ("dog", "other_dog", "dog1", "dog2", "image", "another"):
        picture.save(folder / f"{name}.jpg")
    for name in ("dog_mask", "dog1_mask", "dog1_painted", "mask"):
        Image.fromarray(mask).save(folder / f"{name}.png")
    for name in ("train", "val"):
        (folder / "shards" / name).symlink_to(shards)
    own = folder / "animals/val"
    (own / "images").mkdir(parents=True)
    (own / "masks/zebra").mkdir(parents=True)
    for name in ("000000020059", "000000104455"):
        picture.save(own / f"images/{name}.jpg")
        Image.fromarray(mask).save(own / f"masks/zebra/{name}.png")
    (folder / "dog1.json").write_text(
        '{"caption": "a dog on grass", "category": "dog", "box": [40, 60, 200, 120]}'
    )
    with (folder / "gradients.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "task", "part", "norm", "normalised"])
        rows.writerows([100, "captioning", f"layers.{n}.attention", 1.0, 0.5] for n in range(2))
    return folder


PAGES_THAT_RUN = ("README.md", "inference.md", "shards.md", "tokenizer.md", "training.md")


@pytest.mark.parametrize(
    "page",
    [page for page in documents.PAGES if page.name in PAGES_THAT_RUN],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_the_python_of_a_page_runs(page: Path, line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(line)
    monkeypatch.setattr("icl_moe.inference.model.push_model", lambda *parts: "https://hub")
    names: dict[str, Any] = {"pixels_B3HW": torch.zeros(1, 3, 64, 64)}
    for block in documents.blocks(page):
        if block.language == "python":
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), names)


def test_the_task_that_is_added_has_the_interface_of_tasks() -> None:
    page = REPOSITORY / "docs/add_a_task.md"
    first, *others = [block for block in documents.blocks(page) if block.language == "python"]
    names: dict[str, Any] = {}
    exec(first.text, names)
    for name, method in vars(names["Depth"]).items():
        if inspect.isfunction(method):
            ours = inspect.signature(getattr(Task, name)).parameters
            assert list(inspect.signature(method).parameters) == list(ours), name
    for block in others:
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


CHEAP = ("segment", "caption", "verify", "stats", "preview")
"""Verbs that take well under a second on toy data."""


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in COMMANDS
        if command.words[0] == "icl-moe"
        and set(CHEAP) & set(command.words[:3])
        and not command.mention
    ],
    ids=lambda command: command.name,
)
def test_a_cheap_command_does_what_the_page_says(
    command: Command, line: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(line)
    there = {"MODEL": "exported", "DIR": "shards/paper_256", "cuda": "cpu", "N": "2"}
    there["photographs"] = "exported"
    assert main([there.get(word, word) for word in command.words[1:]]) == 0


def test_a_wrong_command_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in (
        "icl-moe shards build demo image_sise=64 --out DIR",
        "icl-moe evaluate MODEL SHARDS --shot 1 --outt DIR",
        "icl-moe train paper_265",
        "make everything",
        "python benchmarks/learning.py",
        "bash launch_scripts/pretrain.sh demo model.depth=3",
        "deepspeed --gpus 8 launch_scripts/pretrain.sh",
    ):
        with pytest.raises((SystemExit, ValueError, AssertionError)):
            check(Command("a page", tuple(line.split())))
