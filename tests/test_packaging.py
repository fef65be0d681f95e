"""The package, its set-up and its continuous integration: what is installed is whole, and what
fails is seen to fail.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import icl_moe

REPOSITORY = Path(__file__).resolve().parent.parent
VERBS = ("shards", "tokenizer", "train", "export", "evaluate", "segment", "caption", "demo")


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
    for line in [*project["dependencies"], *extras["test"], *extras["dev"]]:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_every_import_is_a_declared_dependency(project: dict) -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    imported = {
        name for package in ("icl_moe", "preprocessing") for name in imports(REPOSITORY / package)
    }
    others = imported - {"icl_moe", "preprocessing"} - sys.stdlib_module_names
    undeclared = {
        name
        for name in others
        if not declared & {canonicalize_name(found) for found in distributions.get(name, ())}
    }
    assert undeclared == set()


def imports(folder: Path) -> set[str]:
    """Top-level names that the Python files under `folder` import."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def test_the_wheel_has_code_recipes_and_assets_and_nothing_else(
    run_command: Callable, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "icl_moe", "preprocessing", "tests"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    done = run_command([*pip, "--target", target, source])
    assert done.returncode == 0, done.stdout

    def files(folder: Path) -> set[str]:
        found = (
            path for name in ("icl_moe", "preprocessing") for path in (folder / name).rglob("*")
        )
        return {
            str(path.relative_to(folder))
            for path in found
            if path.is_file() and path.suffix != ".pyc"
        }

    assert files(target) == files(source)
    assert any(name.startswith("icl_moe/recipes/paper_256") for name in files(target))
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {
        "icl_moe",
        "preprocessing",
        "bin",
    }


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
    """.ci/run in a checkout of its own, with a stand-in for make."""

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
        assert ci('echo "make $*"') == (0, "make test\n")
        assert ci("exit 3")[0] == 3

    def test_it_finds_the_data_beside_the_checkout(
        self, ci: Callable[..., tuple[int, str]], tmp_path: Path
    ) -> None:
        say = 'echo "${ICL_MOE_REAL_DATA-unset}"'
        assert ci(say) == (0, "unset\n")
        (tmp_path / "shared/data").mkdir(parents=True)
        assert ci(say) == (0, f"{tmp_path}/shared/data\n")
        assert ci(say, ICL_MOE_REAL_DATA="/elsewhere") == (0, "/elsewhere\n")


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
