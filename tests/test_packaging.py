"""The package, its set-up and its continuous integration: installations are complete, and failures
are reported.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from inference.test_lean_install import ABSENT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import icl_moe
from icl_moe.launcher import free_port

REPOSITORY = Path(__file__).resolve().parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]
VERBS = (
    "shards",
    "episodes",
    "tokenizer",
    "train",
    "export",
    "evaluate",
    "predictions",
    "compare",
    "segment",
    "caption",
    "label",
    "web",
    "demo",
    "reproduce",
)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    matches = [
        re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        for line in lines
        if line and not line.startswith("#")
    ]
    assert all(matches), "a constraint is one pin, without a local version"
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


def test_every_dependency_is_pinned_within_its_range(project: dict, pins: dict[str, str]) -> None:
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["web"], *extras["test"], *extras["dev"]]:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


EXTRAS = ("evaluate", "train")
"""Packages of a default installation that only Linux gets."""


def installed_on(platform: str, lines: list[str]) -> dict[str, Requirement]:
    requirements = map(Requirement, lines)
    return {
        canonicalize_name(each.name): each
        for each in requirements
        if each.marker is None or each.marker.evaluate({"sys_platform": platform})
    }


def test_a_default_install_is_whole_on_linux_and_inference_elsewhere(project: dict) -> None:
    default = installed_on("linux", project["dependencies"])
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    for name, requirement in installed_on("linux", extras).items():
        if name == project["name"]:
            assert requirement.extras <= set(EXTRAS)
        else:
            assert default[name].specifier == requirement.specifier
    for platform in ("darwin", "win32"):
        lean = installed_on(platform, project["dependencies"])
        assert not lean.keys() & installed_on("linux", extras).keys()
        assert not lean.keys() & {name.replace("_", "-") for name in ABSENT}
        added = installed_on(platform, extras)
        assert not added.keys() & {"deepspeed", "megatron-core", "ninja"}
        assert lean.keys() | added.keys() < default.keys() | {project["name"]}


def test_every_import_is_a_declared_dependency(project: dict) -> None:
    lines = [*project["dependencies"], *project["optional-dependencies"]["web"]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = importlib.metadata.packages_distributions()
    imported = {
        name for package in ("icl_moe", "preprocessing") for name in imports(REPOSITORY / package)
    }
    others = imported - {"icl_moe", "preprocessing"} - sys.stdlib_module_names
    undeclared = {
        name
        for name in others
        # What is not installed, such as Gradio, has the name of its distribution.
        if not declared & {canonicalize_name(found) for found in distributions.get(name, (name,))}
    }
    assert undeclared == set()


def imports(folder: Path) -> set[str]:
    """The top-level names that the Python files under `folder` import."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a checkout that belong in a wheel, and some that do not."""
    folder = tmp_path_factory.mktemp("source")
    for path in map(REPOSITORY.joinpath, ("icl_moe", "preprocessing", "ds_configs", "tests")):
        shutil.copytree(path, folder / path.name, symlinks=True)
    for path in map(REPOSITORY.joinpath, ("pyproject.toml", "README.md", "LICENSE")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def installed(run_command: Command, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel of `source`, without its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--disable-pip-version-check", "--no-deps", "--no-index"]
    build = ["wheel", *options, "--no-build-isolation", "--wheel-dir", folder / "wheels", source]
    done = run_command([sys.executable, "-m", "pip", *build])
    assert done.returncode == 0, done.stdout
    (wheel,) = (folder / "wheels").iterdir()
    install = ["install", *options, "--target", folder / "packages", wheel]
    done = run_command([sys.executable, "-m", "pip", *install])
    assert done.returncode == 0, done.stdout
    return folder / "packages"


@pytest.fixture
def elsewhere(run_command: Command, installed: Path, tmp_path: Path) -> Command:
    """Runs a command of the installed package in an empty folder, without access to a checkout."""
    (tmp_path / "empty").mkdir()
    command = ["env", "--chdir", tmp_path / "empty", sys.executable]

    def run(*parts: str | Path) -> subprocess.CompletedProcess[str]:
        return run_command([*command, *parts], PYTHONPATH=str(installed), DS_ACCELERATOR="cpu")

    return run


def test_the_wheel_has_code_recipes_and_assets_and_nothing_else(
    source: Path, installed: Path
) -> None:
    def files(folder: Path) -> set[str]:
        return {
            os.path.relpath(Path(parent) / name, folder)
            for package in ("icl_moe", "preprocessing")
            for parent, _, names in os.walk(folder / package, followlinks=True)
            for name in names
            if not name.endswith(".pyc")
        }

    assert files(installed) == files(source)
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {
        "icl_moe",
        "preprocessing",
        "bin",
    }


def test_an_installed_copy_finds_its_recipes_and_engine_files(
    elsewhere: Command, installed: Path
) -> None:
    code = """
from icl_moe import recipe, settings
from icl_moe.training.preflight import read_engine
print(recipe.__file__)
for name in ("demo", "ablation_128", "paper_256"):
    engine = settings.load_recipe(recipe.TrainingRecipe, name).engine
    print(name, read_engine(engine)["zero_optimization"]["stage"])
"""
    done = elsewhere("-c", code)
    assert done.stdout.splitlines() == [
        str(installed / "icl_moe/recipe.py"),
        "demo 0",
        "ablation_128 1",
        "paper_256 1",
    ]


@pytest.mark.slow
def test_an_installed_copy_builds_shards_trains_and_exports_in_an_empty_folder(
    elsewhere: Command, tmp_path: Path
) -> None:
    """The stages of `icl-moe demo`, including the launcher, at a smaller scale."""
    shards = ("shards", "build", "demo", "synthetic.images=12", "--out", "shards")
    train = ["demo", "data.shards=shards", "training.output=run", "training.steps=1"]
    train += ["training.global_batch=2", "training.micro_batch=1"]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    launcher += ["--master_port", str(free_port()), "--module", "icl_moe.training"]
    for command in (
        ["-m", "icl_moe", *shards, "--workers", "1"],
        [*launcher, *train],
        ["-m", "icl_moe", "export", "run", "--out", "model"],
    ):
        done = elsewhere(*command)
        assert done.returncode == 0, done.stdout
    assert (tmp_path / "empty/model/model.safetensors").is_file()
    assert (tmp_path / "empty/run/csv_monitor").is_dir(), "ds_configs/demo.json enables it"


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_has_the_verb_and_explains_it(run_command: Callable, verb: str) -> None:
    done = run_command(["icl-moe", verb, "--help"])
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(f"usage: icl-moe {verb}")


def test_help_does_not_wait_for_torch(run_command: Callable) -> None:
    code = (
        "import sys; sys.argv = ['icl-moe', '--help']; "
        "import atexit; atexit.register(lambda: print('torch' in sys.modules)); "
    )
    done = run_command([sys.executable, "-c", code + "from icl_moe.cli import main; main()"])
    assert done.returncode == 0, done.stdout
    assert all(verb in done.stdout for verb in VERBS)
    assert done.stdout.endswith("False\n")


def test_wrong_input_is_one_sentence_and_exit_code_2(run_command: Callable) -> None:
    done = run_command(["icl-moe", "train", "no_such_recipe"])
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("icl-moe: There is no recipe named 'no_such_recipe'")


class TestContinuousIntegration:
    """.ci/run in a separate checkout, with a fake make."""

    @pytest.fixture
    def ci(self, run_command: Callable, tmp_path: Path) -> Callable[..., tuple[int, str]]:
        checkout, tools = tmp_path / "checkout", tmp_path / "tools"
        (checkout / ".ci").mkdir(parents=True)
        shutil.copy(REPOSITORY / ".ci/run", checkout / ".ci/run")
        tools.mkdir()

        def run(make: str, **environment: str) -> tuple[int, str]:
            (tools / "make").write_text(f"#!/bin/sh\n{make}\n")
            (tools / "make").chmod(0o755)
            command = ["env", "-u", "ICL_MOE_REAL_DATA", f"PATH={tools}:{os.environ['PATH']}"]
            command += [f"{name}={value}" for name, value in environment.items()]
            done = run_command([*command, "bash", checkout / ".ci/run"])
            return done.returncode, done.stdout

        return run

    def test_it_runs_the_tests_and_fails_when_they_fail(
        self, ci: Callable[..., tuple[int, str]]
    ) -> None:
        assert ci('echo "make $*"') == (0, "make lint\nmake test\n")
        assert ci('test "$*" != lint') == (1, "")
        assert ci('test "$*" != test') == (1, "")

    def test_it_finds_the_data_beside_the_checkout(
        self, ci: Callable[..., tuple[int, str]], tmp_path: Path
    ) -> None:
        say = 'echo "${ICL_MOE_REAL_DATA-unset}"'
        assert ci(say) == (0, 2 * "unset\n")
        (tmp_path / "shared/data").mkdir(parents=True)
        assert ci(say) == (0, 2 * f"{tmp_path}/shared/data\n")
        assert ci(say, ICL_MOE_REAL_DATA="/elsewhere") == (0, 2 * "/elsewhere\n")


@pytest.mark.parametrize(
    ("python", "sentence"),
    [("", "Python 3.11 or newer is needed"), ("false", "false cannot make a virtual environment")],
)
def test_set_up_says_what_it_needs(
    run_command: Callable, tmp_path: Path, python: str, sentence: str
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    done = run_command(["make", "-C", tmp_path, "setup", f"PYTHON={python}"])
    assert done.returncode == 2
    assert sentence in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_the_version_stands_in_one_place(run_command: Callable) -> None:
    done = run_command(["icl-moe", "--version"])
    assert done.stdout.strip() == f"icl-moe {icl_moe.__version__}"
    assert f"version: {icl_moe.__version__}" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"## {icl_moe.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
